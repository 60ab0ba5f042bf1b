"""Nodes can be emptied, and not all at once."""

from __future__ import annotations

import pytest
from manifests import OVERLAYS, PRODUCTION, Pod, objects, pods, selects


def budgets_of(overlay: str, pod: Pod) -> list[dict]:
    found = [budget["spec"] for budget in objects(overlay, "PodDisruptionBudget")]
    return [spec for spec in found if selects(spec["selector"], pod.labels)]


@pytest.mark.parametrize("overlay", PRODUCTION)
def test_a_budget_leaves_one_eviction_and_keeps_one_worker(overlay: str):
    """Pods of a RayCluster, which has no `scale`, are counted for a whole `minAvailable` only."""
    (budget,) = objects(overlay, "PodDisruptionBudget")
    spec = budget["spec"]
    least = sum(pod.least for pod in pods(overlay) if selects(spec["selector"], pod.labels))

    assert "maxUnavailable" not in spec
    assert type(spec["minAvailable"]) is int
    assert 1 <= spec["minAvailable"] < least
    # A worker that hangs at its start would otherwise hold the drain of its node up.
    assert spec["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_pod_has_two_budgets_and_none_that_is_alone_has_one(overlay: str):
    """Kubernetes refuses to evict a pod of two budgets, and one of a budget that it must fill."""
    for pod in pods(overlay):
        budgets = budgets_of(overlay, pod)
        assert len(budgets) <= 1
        assert pod.most > 1 or not budgets
