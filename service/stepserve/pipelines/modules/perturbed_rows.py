"""Perturbed-attention guidance by row: which rows are perturbed travels with the call.

diffusers swaps attention processors of the shared denoiser while a call runs; those perturb the
last third of the rows of a forward, or the last half without classifier-free guidance. Here
processors that can do both stay for good. A request's own view of the denoiser says with each
call which rows are perturbed, so that requests with any scales, and without, share forwards.

https://arxiv.org/abs/2403.17377
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.pipelines.pag.pag_utils import PAGMixin
from torch import Tensor

PERTURBED_ROWS = "perturbed_rows"
"""The argument of a denoiser call that says it: truths, of shape (rows,)."""
HELD_LAYERS = "stepserve_perturbed_layers"
"""Where a denoiser keeps the names of the layers that can be perturbed by row."""

Forward = Callable[..., Any]


class RowTable:
    """Which rows of the forward that is running are perturbed; None where nobody said."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None


class ProcessorByRow:
    """Attends as it always did, or perturbed, as the table says of each row.

    Args:
        usual: the processor of before.
        halved: diffusers' own, which perturbs the second half of the rows.
        table: of the denoiser.
    """

    def __init__(self, usual: Any, halved: Any, table: RowTable) -> None:
        self._usual = usual
        self._halved = halved
        self._table = table

    # diffusers reads in the signature which arguments it may hand on.
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """What the layer makes of states of shape (rows, ...); a pair where it has two streams."""
        given = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "temb": temb,
            "image_rotary_emb": image_rotary_emb,
        }
        given = {name: value for name, value in given.items() if value is not None}
        perturbed = self._table.rows
        if perturbed is None:
            return self._usual(attn, hidden_states, **given)
        # Every row once as it is and once perturbed: kernels see one shape whoever is perturbed.
        if encoder_hidden_states is not None:
            given["encoder_hidden_states"] = _twice(encoder_hidden_states)
        both = self._halved(attn, _twice(hidden_states), **given)
        if isinstance(both, tuple):
            return tuple(_chosen(stream, perturbed) for stream in both)
        return _chosen(both, perturbed)


class PerturbedDenoiser:
    """The resident denoiser in every respect, but that it says which rows of a call are perturbed.

    Args:
        denoiser: what the request's copy of the pipeline had.
    """

    def __init__(self, denoiser: Any) -> None:
        self.inner: Any = denoiser.inner if isinstance(denoiser, PerturbedDenoiser) else denoiser
        # One part of the rows is perturbed, the last of so many; 0: none is.
        self._parts = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the resident denoiser."""
        states = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        rows = torch.zeros(len(states), dtype=torch.bool, device=states.device)
        if self._parts:
            rows[-(len(states) // self._parts) :] = True
        return self.inner(*args, **kwargs, **{PERTURBED_ROWS: rows})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def perturb(self, pag_applied_layers: Sequence[str], do_classifier_free_guidance: bool) -> None:
        """What a pipeline does before its first step, in place of swapping processors."""
        self._parts = 3 if do_classifier_free_guidance else 2


def hold_perturbed_rows(pipeline: Any) -> dict[str, Callable[[Forward], Forward]]:
    """Have the layers of a pipeline with perturbed-attention guidance perturb rows one by one.

    Returns:
        By path of the denoiser, what makes its forward take the rows; empty for other pipelines.
    """
    if not isinstance(pipeline, PAGMixin):
        return {}
    name = _denoiser_name(pipeline)
    denoiser = getattr(pipeline, name)
    table = RowTable()
    usual = denoiser.attn_processors
    pipeline._set_pag_attn_processor(pipeline.pag_applied_layers, do_classifier_free_guidance=False)
    halved = denoiser.attn_processors
    denoiser.set_attn_processor(
        {
            layer: before
            if halved[layer] is before
            else ProcessorByRow(before, halved[layer], table)
            for layer, before in usual.items()
        }
    )
    setattr(denoiser, HELD_LAYERS, tuple(pipeline.pag_applied_layers))
    return {name: functools.partial(taking_perturbed_rows, table=table)}


def perturb_by_row(copied: Any) -> None:
    """Have a request's own pipeline say which rows are perturbed, if its denoiser asks for that."""
    if not isinstance(copied, PAGMixin):
        return
    name = _denoiser_name(copied)
    denoiser = getattr(copied, name)
    if getattr(denoiser, HELD_LAYERS, None) == tuple(copied.pag_applied_layers):
        own = PerturbedDenoiser(denoiser)
        vars(copied).update({name: own, "_set_pag_attn_processor": own.perturb})


def taking_perturbed_rows(forward: Forward, table: RowTable) -> Forward:
    """A forward that takes which rows are perturbed, and hands it to the processors."""

    @functools.wraps(forward)
    def perturbed(*args: Any, **kwargs: Any) -> Any:
        table.rows = kwargs.pop(PERTURBED_ROWS, None)
        try:
            return forward(*args, **kwargs)
        finally:
            table.rows = None

    return perturbed


def _denoiser_name(pipeline: Any) -> str:
    return "unet" if hasattr(pipeline, "unet") else "transformer"


def _twice(states: Tensor) -> Tensor:
    return torch.cat([states, states])


def _chosen(both: Tensor, perturbed: Tensor) -> Tensor:
    usual, changed = both.chunk(2)
    return torch.where(perturbed.view(-1, *[1] * (usual.dim() - 1)), changed, usual)
