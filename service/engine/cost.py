"""The cost model: learned seconds for (shape, rows), measured while running.

For each shape it keeps a straight line `seconds = fixed + per_row * rows`, fitted by least squares
with exponential forgetting, so that it follows a machine whose speed changes. Admission, the policy
and Retry-After all read it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

FORGETTING = 0.98
UNKNOWN_S = 0.05
# A weak belief that cost grows in proportion to rows, until different row counts have been seen.
PRIOR_WEIGHT = 1e-3


@dataclass
class LineFit:
    """Weighted sums for a least-squares line through (rows, seconds)."""

    weight: float = 0.0
    rows: float = 0.0
    rows_squared: float = 0.0
    seconds: float = 0.0
    product: float = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        """Forget a little of the past, then add one measurement."""
        for name, value in (
            ("weight", 1.0),
            ("rows", rows),
            ("rows_squared", rows * rows),
            ("seconds", seconds),
            ("product", rows * seconds),
        ):
            setattr(self, name, getattr(self, name) * FORGETTING + value)

    def predict(self, rows: int) -> float:
        """Seconds for that many rows; never less than a proportional share of nothing."""
        mean_rows = self.rows / self.weight
        mean_seconds = self.seconds / self.weight
        spread = self.rows_squared / self.weight - mean_rows**2
        if spread < PRIOR_WEIGHT:
            return mean_seconds * (rows / mean_rows if rows > mean_rows else 1.0)
        covariance = self.product / self.weight - mean_rows * mean_seconds
        slope = max(covariance / spread, 0.0)
        return max(mean_seconds + slope * (rows - mean_rows), mean_seconds * 0.05)


class CostModel:
    """Predicts forward times of shapes that were measured before.

    Not thread-safe: the engine thread writes, others may read slightly old values.
    """

    def __init__(self, unknown_s: float = UNKNOWN_S) -> None:
        self.unknown_s = unknown_s
        self._fits: dict[Hashable, LineFit] = {}

    def observe(self, shape: Hashable, rows: int, seconds: float) -> None:
        """Learn from one measured forward."""
        self._fits.setdefault(shape, LineFit()).observe(rows, seconds)

    def knows(self, shape: Hashable) -> bool:
        """Whether this shape was ever measured."""
        return shape in self._fits

    def predict(self, shape: Hashable, rows: int) -> float:
        """Expected seconds of one forward; a guess for a shape never seen."""
        fit = self._fits.get(shape)
        return self.unknown_s if fit is None else fit.predict(rows)
