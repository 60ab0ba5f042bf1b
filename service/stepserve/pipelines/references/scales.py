"""A scale for each row of a forward, where diffusers' processors hold one for all.

diffusers keeps the scale of an IP-Adapter on its attention processors, which all requests share.
Here it travels with the call, as one more argument with one entry a row. It is set for the time of
one forward: the processors hold a `RowScale` in place of a number, and its product with a tensor is
that of each row with its own scale.

Slots are the places in the lists of the processors: one for each adapter, then one more for each,
and so on. Each reference of a request takes one. So it is attended to by itself and added with its
own scale, as diffusers does with an adapter that was loaded once for each image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from torch import Tensor, nn

ROW_SCALES = "reference_scales"
"""The argument of a denoiser call that holds them, of shape (rows, slots)."""


class ScaleTable:
    """The scales of the forward that is running, of shape (rows, slots); None between forwards."""

    def __init__(self) -> None:
        self.values: Tensor | None = None


class RowScale:
    """What stands in a processor for its scale: the column of one slot.

    It never equals 0, so that a row's bits do not depend on whether other rows have references.
    """

    def __init__(self, table: ScaleTable, slot: int) -> None:
        self._table = table
        self._slot = slot

    def __mul__(self, states: Tensor) -> Tensor:
        """Scale states of shape (rows, tokens, channels), each row by its own scale."""
        if self._table.values is None:
            return states
        # A product with a Python number is rounded once, too.
        scale = self._table.values[:, self._slot].view(-1, 1, 1)
        return (scale * states).to(states.dtype)

    __rmul__ = __mul__


class SeparateReferences(MultiIPAdapterImageProjection):
    """Projects the images of all adapters, and hands each on as one of a slot of its own."""

    def forward(self, image_embeds: list[Tensor]) -> list[Tensor]:
        """Tokens of each slot, of shape (rows, 1, tokens, channels).

        Args:
            image_embeds: of each adapter, of shape (rows, images, ...), with equally many images.
        """
        images = image_embeds[0].shape[1]
        # One by one, so that the tokens of an image do not depend on the others in their last bits.
        project = super().forward
        slots = ([all_[:, i : i + 1].contiguous() for all_ in image_embeds] for i in range(images))
        return [tokens for slot in slots for tokens in project(slot)]


def hold_row_scales(denoiser: nn.Module, images: int) -> ScaleTable:
    """Make the processors of a denoiser with IP-Adapters take scales by row.

    Args:
        denoiser: diffusers has loaded IP-Adapters into it.
        images: most reference images of each adapter.

    Returns:
        Where the scales of a forward are to be put.
    """
    table = ScaleTable()
    projection = getattr(denoiser, "encoder_hid_proj", None)
    if not isinstance(projection, MultiIPAdapterImageProjection):
        # Stable Diffusion 3 takes one adapter and one image.
        for processor in _processors(denoiser, SD3IPAdapterJointAttnProcessor2_0):
            vars(processor)["scale"] = RowScale(table, 0)
        return table
    layers = list(projection.image_projection_layers)
    denoiser.encoder_hid_proj = SeparateReferences(layers)
    scales = [RowScale(table, slot) for slot in range(images * len(layers))]
    for processor in _processors(denoiser):
        # The very layers of each adapter, for each of its images.
        processor.to_k_ip = nn.ModuleList([*processor.to_k_ip] * images)
        processor.to_v_ip = nn.ModuleList([*processor.to_v_ip] * images)
        # They stop at the last slot that has tokens.
        processor.scale = scales
    return table


def taking_row_scales(forward: Callable[..., Any], table: ScaleTable) -> Callable[..., Any]:
    """A forward that takes scales by row, and hands them to the processors."""

    @functools.wraps(forward)
    def scaled(*args: Any, **kwargs: Any) -> Any:
        table.values = kwargs.pop(ROW_SCALES, None)
        output = forward(*args, **kwargs)
        table.values = None
        return output

    return scaled


def slot_scales(scales: Sequence[Sequence[float]], images: int) -> list[float]:
    """The scale of each slot; 0 where there is no reference.

    Args:
        scales: of the references of each adapter.
        images: that each adapter is given.
    """
    return [
        of_adapter[image] if image < len(of_adapter) else 0.0
        for image in range(images)
        for of_adapter in scales
    ]


def _processors(denoiser: Any, kind: type | None = None) -> list[Any]:
    """The attention processors that read references."""
    processors = denoiser.attn_processors.values()
    if kind is not None:
        return [processor for processor in processors if isinstance(processor, kind)]
    return [processor for processor in processors if hasattr(processor, "to_k_ip")]
