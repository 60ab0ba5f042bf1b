from __future__ import annotations

import pytest

from loadtests.engine_bench import over_neighbours


def test_a_drift_is_the_same_for_both_sides_of_a_ratio() -> None:
    assert over_neighbours([3.0, 5.0], [2.0, 4.0, 6.0]) == pytest.approx([1.0, 1.0])
    with pytest.raises(ValueError, match="zip"):
        over_neighbours([1.0], [1.0])
