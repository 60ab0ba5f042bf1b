"""How many replicas a model should have: as many as the work in flight takes.

Ray Serve asks the policy in its controller, and applies delays and bounds around it.
"""

from __future__ import annotations

import math
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from stepserve.config import AutoscalingSettings

BACKLOG = "backlog_s"
# Down only when what is left could be done with room to spare, or it would be up again at once.
ROOM_TO_SHRINK = 0.5
# Ray Serve wants more than ten. The most of that time counts: a burst is seen at once, and its end
# a little later.
LOOK_BACK_S = 11.0


def autoscaling_config(settings: AutoscalingSettings) -> AutoscalingConfig:
    """As Ray Serve wants it."""
    return AutoscalingConfig(
        min_replicas=settings.min_replicas,
        # Loaded once, so that it is known what the model can do, and what waking it takes.
        initial_replicas=max(settings.min_replicas, 1),
        max_replicas=settings.max_replicas,
        upscale_delay_s=settings.upscale_delay_s,
        downscale_delay_s=settings.downscale_delay_s,
        look_back_period_s=LOOK_BACK_S,
        aggregation_function="max",
        policy=AutoscalingPolicy(
            policy_function="stepserve.ray_serve.autoscaling:BacklogPolicy",
            policy_kwargs={"target_backlog_s": settings.target_backlog_s},
        ),
    )


class BacklogPolicy:
    """Enough replicas for everything in flight to be finished within `target_backlog_s` seconds."""

    def __init__(self, target_backlog_s: float) -> None:
        self.target_backlog_s = target_backlog_s

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Called by Ray Serve at every turn of its control loop."""
        backlogs_s = (context.aggregated_metrics or {}).get(BACKLOG, {})
        told = [float(backlogs_s[key]) for key in context.running_replicas if key in backlogs_s]
        wanted = wanted_replicas(
            total_backlog_s=sum(told),
            target_backlog_s=self.target_backlog_s,
            current=context.target_num_replicas,
            waiting_for_a_replica=context.current_num_replicas == 0
            and context.total_queued_requests > 0,
        )
        if len(told) < context.target_num_replicas:
            # Some still load, or have told nothing yet: whether they are wanted will show.
            wanted = max(wanted, context.target_num_replicas)
        return wanted, {}


def wanted_replicas(
    total_backlog_s: float, target_backlog_s: float, current: int, waiting_for_a_replica: bool
) -> int:
    """How many replicas there should be.

    Args:
        total_backlog_s: seconds until each replica would be done, summed up.
        target_backlog_s: seconds within which everything should be done.
        current: replicas that are wanted now.
        waiting_for_a_replica: there is none, and somebody waits for one.
    """
    if waiting_for_a_replica:
        return max(current, 1)
    up = math.ceil(total_backlog_s / target_backlog_s)
    if up >= current:
        return up
    down = math.ceil(total_backlog_s / (target_backlog_s * ROOM_TO_SHRINK))
    return min(down, current)
