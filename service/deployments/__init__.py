"""The only room that knows Ray: the applications, the ingress, the replicas, and their life."""

import os

# Ray Serve reads them when it is imported. Its own 10 s are too slow for a burst.
METRIC_VARIABLES = {
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}
for _name, _value in METRIC_VARIABLES.items():
    os.environ.setdefault(_name, _value)
