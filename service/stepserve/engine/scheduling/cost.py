"""The cost model: learned seconds for (shape, rows), measured while running.

For each shape it keeps a straight line `seconds = fixed + per_row * rows`, fitted by least squares
with exponential forgetting, so that it follows a machine whose speed changes. Admission, the policy
and Retry-After all read it. Predictions are finite, positive, and never fall as rows grow.

Where rows have lengths, shapes of one form differ in nothing else, and there are many: one for each
size and length of a prompt. So a line through the tokens of all of them, `fixed + per_token * rows
* length`, says what is not known of one: all, if it was never measured, and how much of its seconds
is fixed, if it was measured with one row count only.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TypeVar

from stepserve.engine.calls.call_key import CallShape

Key = TypeVar("Key", bound=Hashable)

FORGETTING = 0.98
UNKNOWN_S = 0.05
# Below this variance of rows a line cannot be told from noise: only one row count has been seen.
SMALLEST_SPREAD = 1e-3
# No forward is free: a line that is steep far out may not promise that few rows are.
SMALLEST_SHARE = 0.05
SMALLEST_S = 1e-6
# Tokens are counted in so many, which makes numbers like those of rows.
TOKENS = 1024


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

    def scaled(self, factor: float) -> Line:
        """So many times the seconds."""
        return Line(self.fixed_s * factor, self.per_row_s * factor, self.least_s * factor)

    def of_rows(self, tokens: float) -> Line:
        """Seconds by rows of so many tokens, where this one is by tokens."""
        return Line(self.fixed_s, self.per_row_s * tokens, self.least_s)


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

    def observe(self, rows: float, seconds: float) -> None:
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

    @property
    def mean_rows(self) -> float:
        """Of the measurements."""
        return self.rows / self.weight

    @property
    def mean_s(self) -> float:
        """Of the measurements."""
        return self.seconds / self.weight

    @property
    def spread(self) -> float:
        """Variance of their rows; hardly any where one row count was seen."""
        return self.rows_squared / self.weight - self.mean_rows**2

    def _fit(self) -> Line:
        mean_rows, mean_s, spread = self.mean_rows, self.mean_s, self.spread
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
        self._fits: dict[CallShape, LineFit] = {}
        # Through the tokens of all shapes of a form.
        self._by_tokens: dict[Hashable, LineFit] = {}

    def observe(self, shape: CallShape, rows: int, seconds: float) -> None:
        """Learn from one measured forward; what cannot be a measurement is left out."""
        if rows > 0 and math.isfinite(seconds) and seconds >= 0:
            _learn(self._fits, shape, rows, seconds)
            if shape.length:
                _learn(self._by_tokens, shape.form, rows * shape.length / TOKENS, seconds)

    def knows(self, shape: CallShape) -> bool:
        """Whether this shape was ever measured."""
        return shape in self._fits

    def predict(self, shape: CallShape, rows: int) -> float:
        """Expected seconds of one forward; a guess for a shape never seen."""
        return self.line(shape).at(rows)

    def line(self, shape: CallShape) -> Line:
        """Expected seconds of forwards by rows; a guess for a shape never seen."""
        fit = self._fits.get(shape)
        by_tokens = self._by_tokens.get(shape.form) if shape.length else None
        if by_tokens is None:
            return Line(self.unknown_s, 0.0, 0.0) if fit is None else fit.line
        if fit is not None and fit.spread >= SMALLEST_SPREAD:
            return fit.line
        line = by_tokens.line.of_rows(shape.length / TOKENS)
        return (
            line
            if fit is None
            else line.scaled(max(fit.mean_s, SMALLEST_S) / line.at(fit.mean_rows))
        )


def _learn(fits: dict[Key, LineFit], key: Key, rows: float, seconds: float) -> None:
    fit = fits.get(key) or LineFit()
    fit.observe(rows, seconds)
    # Only now, as other threads may look at this moment.
    fits[key] = fit
