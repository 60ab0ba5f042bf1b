"""How many replicas a backlog takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stepserve.config import AutoscalingSettings
from stepserve.ray_serve.autoscaling import (
    BACKLOG,
    BacklogPolicy,
    autoscaling_config,
    wanted_replicas,
)

BACKLOGS = st.floats(0, 1000)
REPLICAS = st.integers(0, 50)


@given(BACKLOGS, REPLICAS)
def test_what_is_wanted_gets_everything_done_in_time(backlog_s: float, current: int) -> None:
    wanted = wanted_replicas(backlog_s, 5.0, current, waiting_for_a_replica=False)
    assert wanted * 5.0 >= backlog_s - 1e-9


@given(BACKLOGS, REPLICAS)
def test_it_settles(backlog_s: float, current: int) -> None:
    """Else replicas would come and go under a steady load."""
    once = wanted_replicas(backlog_s, 5.0, current, waiting_for_a_replica=False)
    assert wanted_replicas(backlog_s, 5.0, once, waiting_for_a_replica=False) == once


def test_it_shrinks_only_with_room_to_spare() -> None:
    assert wanted_replicas(9.0, 5.0, 3, waiting_for_a_replica=False) == 3
    assert wanted_replicas(4.0, 5.0, 3, waiting_for_a_replica=False) == 2
    assert wanted_replicas(0.0, 5.0, 3, waiting_for_a_replica=False) == 0


def test_who_waits_for_a_sleeping_model_wakes_it() -> None:
    assert wanted_replicas(0.0, 5.0, 0, waiting_for_a_replica=True) == 1


def context(backlogs_s: dict[str, float], replicas: int, queued: int = 0) -> Any:
    return SimpleNamespace(
        aggregated_metrics={BACKLOG: backlogs_s},
        target_num_replicas=replicas,
        current_num_replicas=replicas,
        total_queued_requests=queued,
        running_replicas=list(backlogs_s),
    )


def test_the_policy_reads_what_replicas_record() -> None:
    policy = BacklogPolicy(target_backlog_s=5.0)
    assert policy(context({"a": 12.0, "b": 9.0}, 2)) == (5, {})
    assert policy(context({}, 0, queued=1)) == (1, {})
    assert policy(context({}, 0)) == (0, {})
    assert policy(context({"a": 0.0}, 1)) == (0, {})


def test_a_model_is_loaded_before_it_may_sleep() -> None:
    policy = BacklogPolicy(target_backlog_s=5.0)
    assert policy(context({}, 1)) == (1, {})
    assert policy(context({"a": 0.0}, 2)) == (2, {})
    assert policy(context({"a": 90.0}, 2)) == (18, {})


def test_a_replica_that_is_gone_counts_no_more() -> None:
    told = context({"a": 1.0, "gone": 90.0}, 1)
    told.running_replicas = ["a"]
    assert BacklogPolicy(target_backlog_s=5.0)(told) == (1, {})


def test_ray_serve_takes_the_settings() -> None:
    settings = AutoscalingSettings(min_replicas=0, max_replicas=7, downscale_delay_s=3)
    config = autoscaling_config(settings)
    assert (config.min_replicas, config.max_replicas, config.downscale_delay_s) == (0, 7, 3)
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert policy(context({"a": 12.0}, 1))[0] == 3


def test_bounds_are_in_order() -> None:
    with pytest.raises(ValueError, match="max_replicas is 1, below min_replicas \\(2\\)"):
        AutoscalingSettings(min_replicas=2, max_replicas=1)
