"""A request's own view of the denoiser: it adds the request's scales to every call.

A denoiser with IP-Adapters wants embeddings in each call. Requests without references get zeros
with a scale of 0, which adds nothing to an image, so that they share forwards with the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from stepserve.pipelines.references.scales import ROW_SCALES


@dataclass(frozen=True)
class EmbeddingsPlace:
    """Where a denoiser call has the embeddings of reference images.

    Args:
        component: the denoiser's name in its pipeline.
        states: the argument whose leading size is the row count.
        argument: the dictionary that holds the embeddings, and their `key` in it.
        is_listed: whether they are a list with one entry an adapter, of shape (rows, images, ...);
            else there is one adapter, of shape (rows, ...).
    """

    component: str
    states: str
    argument: str
    key: str
    is_listed: bool = True


class ReferencedDenoiser:
    """The resident denoiser in every respect, but for the scales that it adds to each call.

    Args:
        denoiser: what the request's copy of the pipeline had.
        place: where embeddings go.
        scales: of each slot.
        empty: shapes of the embeddings of one image, of each adapter.
    """

    def __init__(
        self,
        denoiser: Any,
        place: EmbeddingsPlace,
        scales: Sequence[float],
        empty: Sequence[tuple[int, ...]],
    ) -> None:
        # A copy of a copy has one already.
        self.inner: Any = denoiser.inner if isinstance(denoiser, ReferencedDenoiser) else denoiser
        self._place = place
        self._scales = tuple(scales)
        self._empty = tuple(empty)
        # The same at every step.
        self._row_scales = cache(self._make_row_scales)
        self._no_embeddings = cache(self._make_no_embeddings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the resident denoiser, with a scale for each row."""
        states: Tensor = args[0] if args else kwargs[self._place.states]
        where = len(states), states.device, states.dtype
        held = kwargs.get(self._place.argument) or {}
        if self._place.key not in held:
            kwargs[self._place.argument] = {**held, self._place.key: self._no_embeddings(*where)}
        kwargs[ROW_SCALES] = self._row_scales(*where)
        return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _make_row_scales(self, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        # As exact as a number in Python is to a kernel of that dtype.
        exact = torch.promote_types(dtype, torch.float32)
        return torch.tensor([self._scales] * rows, dtype=exact).to(device)

    def _make_no_embeddings(
        self, rows: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor | list[Tensor]:
        images = (1,) if self._place.is_listed else ()
        zeros = [
            torch.zeros(rows, *images, *shape, device=device, dtype=dtype) for shape in self._empty
        ]
        return zeros if self._place.is_listed else zeros[0]
