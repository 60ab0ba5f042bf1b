"""The cost model: learned seconds for (shape, rows), measured while running.

For each shape it keeps a straight line `seconds = fixed + per_row * rows`, fitted by least squares
with exponential forgetting, so that it follows a machine whose speed changes. Admission, the policy
and Retry-After all read it. Predictions are finite, positive, and never fall as rows grow.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

FORGETTING = 0.98
UNKNOWN_S = 0.05
# Below this variance of rows a line cannot be told from noise: only one row count has been seen.
SMALLEST_SPREAD = 1e-3
# No forward is free: a line that is steep far out may not promise that few rows are.
SMALLEST_SHARE = 0.05
SMALLEST_S = 1e-6


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
        self.weight = self.weight * FORGETTING + 1.0
        self.rows = self.rows * FORGETTING + rows
        self.rows_squared = self.rows_squared * FORGETTING + rows * rows
        self.seconds = self.seconds * FORGETTING + seconds
        self.product = self.product * FORGETTING + rows * seconds

    def predict(self, rows: int) -> float:
        """Seconds for that many rows. Where one row count was seen: in proportion beyond it."""
        mean_rows = self.rows / self.weight
        mean_seconds = self.seconds / self.weight
        spread = self.rows_squared / self.weight - mean_rows**2
        if spread < SMALLEST_SPREAD:
            return mean_seconds * max(rows / mean_rows, 1.0)
        covariance = self.product / self.weight - mean_rows * mean_seconds
        slope = max(covariance / spread, 0.0)
        return max(mean_seconds + slope * (rows - mean_rows), mean_seconds * SMALLEST_SHARE)


class CostModel:
    """Predicts forward times of shapes that were measured before.

    Not thread-safe: the engine thread writes, others may read slightly old values.
    """

    def __init__(self, unknown_s: float = UNKNOWN_S) -> None:
        self.unknown_s = unknown_s
        self._fits: dict[Hashable, LineFit] = {}

    def observe(self, shape: Hashable, rows: int, seconds: float) -> None:
        """Learn from one measured forward; what cannot be a measurement is left out."""
        if rows > 0 and math.isfinite(seconds) and seconds >= 0:
            self._fits.setdefault(shape, LineFit()).observe(rows, seconds)

    def knows(self, shape: Hashable) -> bool:
        """Whether this shape was ever measured."""
        return shape in self._fits

    def predict(self, shape: Hashable, rows: int) -> float:
        """Expected seconds of one forward; a guess for a shape never seen."""
        fit = self._fits.get(shape)
        return self.unknown_s if fit is None else max(fit.predict(rows), SMALLEST_S)
