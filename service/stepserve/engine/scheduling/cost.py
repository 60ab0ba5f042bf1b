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


@dataclass(frozen=True)
class Line:
    """Seconds by rows, and never less than `least_s`."""

    fixed_s: float
    per_row_s: float
    least_s: float

    def at(self, rows: float) -> float:
        """Seconds for that many rows."""
        seconds = self.fixed_s + self.per_row_s * rows
        return seconds if seconds > self.least_s else self.least_s


@dataclass
class LineFit:
    """Weighted sums for a least-squares line through (rows, seconds).

    `line` is kept until the next measurement: it is asked for hundreds of times at each submission.
    """

    weight: float = 0.0
    rows: float = 0.0
    rows_squared: float = 0.0
    seconds: float = 0.0
    product: float = 0.0
    _line: Line | None = None

    def observe(self, rows: int, seconds: float) -> None:
        """Forget a little of the past, then add one measurement."""
        self.weight = self.weight * FORGETTING + 1.0
        self.rows = self.rows * FORGETTING + rows
        self.rows_squared = self.rows_squared * FORGETTING + rows * rows
        self.seconds = self.seconds * FORGETTING + seconds
        self.product = self.product * FORGETTING + rows * seconds
        self._line = None

    @property
    def line(self) -> Line:
        """Where one row count was seen: in proportion beyond it."""
        # In a local: another thread may be learning at this moment.
        line = self._line
        if line is None:
            line = self._line = self._fit()
        return line

    def _fit(self) -> Line:
        mean_rows = self.rows / self.weight
        mean_s = self.seconds / self.weight
        spread = self.rows_squared / self.weight - mean_rows**2
        if spread < SMALLEST_SPREAD:
            return Line(0.0, mean_s / mean_rows, max(mean_s, SMALLEST_S))
        covariance = self.product / self.weight - mean_rows * mean_s
        slope = max(covariance / spread, 0.0)
        least_s = max(mean_s * SMALLEST_SHARE, SMALLEST_S)
        return Line(mean_s - slope * mean_rows, slope, least_s)


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
            fit = self._fits.get(shape) or LineFit()
            fit.observe(rows, seconds)
            # Only now, as other threads may look at this moment.
            self._fits[shape] = fit

    def knows(self, shape: Hashable) -> bool:
        """Whether this shape was ever measured."""
        return shape in self._fits

    def predict(self, shape: Hashable, rows: int) -> float:
        """Expected seconds of one forward; a guess for a shape never seen."""
        return self.line(shape).at(rows)

    def line(self, shape: Hashable) -> Line:
        """Expected seconds of forwards by rows; a guess for a shape never seen."""
        fit = self._fits.get(shape)
        return Line(self.unknown_s, 0.0, 0.0) if fit is None else fit.line
