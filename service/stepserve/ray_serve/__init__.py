"""The only room that knows Ray: the applications, the ingress, the replicas, and their life."""

import os

# Ray reads its variables when it is imported. An empty one is how compose files and shells say "not
# set"; Ray takes it for a number, an address or a folder.
for _name in [name for name, value in os.environ.items() if not value.strip()]:
    if _name.startswith("RAY_"):
        del os.environ[_name]

# Ray Serve's own 10 s are too slow for a burst.
METRIC_VARIABLES = {
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}
for _name, _value in METRIC_VARIABLES.items():
    os.environ.setdefault(_name, _value)
