"""The IP-Adapters of a resident pipeline, and what a request's references are in a call of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.loaders import FluxIPAdapterMixin, IPAdapterMixin, SD3IPAdapterMixin
from diffusers.models.embeddings import ImageProjection
from PIL import Image
from torch import Tensor

from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.facts.capabilities import denoiser_of
from stepserve.pipelines.references.denoiser import EmbeddingsPlace, ReferencedDenoiser
from stepserve.pipelines.references.scales import (
    ScaleTable,
    hold_row_scales,
    slot_scales,
    taking_row_scales,
)

UNET = EmbeddingsPlace("unet", "sample", "added_cond_kwargs", "image_embeds")
FLUX = EmbeddingsPlace(
    "transformer", "hidden_states", "joint_attention_kwargs", "ip_adapter_image_embeds"
)
SD3 = EmbeddingsPlace(
    "transformer", "hidden_states", "joint_attention_kwargs", "ip_adapter_image_embeds", False
)
PLACES = {
    "UNet2DConditionModel": UNET,
    "FluxTransformer2DModel": FLUX,
    "SD3Transformer2DModel": SD3,
}
"""By class of the denoiser."""

MOST_IMAGES = 8
"""Reference images of one request."""

BLACK = Image.new("RGB", (64, 64))


@dataclass(frozen=True)
class Reference:
    """One reference image of a request: RGB, with its scale and the adapter that reads it."""

    image: Image.Image
    scale: float
    adapter: str


@dataclass(frozen=True, eq=False)
class ReferenceAdapters:
    """IP-Adapters that are loaded into the denoiser of a pipeline, all at once.

    Args:
        names: of the adapters, in the order of their slots.
        place: where a call has the embeddings.
        max_images: most reference images of one adapter.
        table: where the scales of a forward are put.
        black: the embeddings of a black image for each adapter, of shape (1, ...).
    """

    names: tuple[str, ...]
    place: EmbeddingsPlace
    max_images: int
    table: ScaleTable
    black: tuple[Tensor, ...]

    @property
    def wrap(self) -> dict[str, Callable[[Any], Any]]:
        """By component, what makes its forward take a scale for each row."""
        return {self.place.component: partial(taking_row_scales, table=self.table)}

    def attach(
        self, pipeline: Any, references: Sequence[Reference], guidance_scale: float
    ) -> dict[str, Any]:
        """Give a request's copy of the pipeline its references.

        The image encoder is called, which parks.

        Args:
            pipeline: a copy for this request.
            references: any number up to the most; none leaves images as they are without adapters.
            guidance_scale: decides whether there are unconditional rows.

        Returns:
            Arguments of the call.
        """
        sorted_out = [[r for r in references if r.adapter == name] for name in self.names]
        images = max(1, *map(len, sorted_out))
        scales = slot_scales([[r.scale for r in rs] for rs in sorted_out], images)
        denoiser = getattr(pipeline, self.place.component)
        empty = [tuple(embeddings.shape[1:]) for embeddings in self.black]
        vars(pipeline)[self.place.component] = ReferencedDenoiser(
            denoiser, self.place, scales, empty
        )
        if not references:
            return {}
        pairs = [
            self._encode(pipeline, index, [r.image for r in rs], images)
            for index, rs in enumerate(sorted_out)
        ]
        return self._arguments(pipeline, pairs, guidance_scale)

    def _encode(
        self, pipeline: Any, index: int, images: Sequence[Image.Image], count: int
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of an adapter's images, and of what stands for none: (count, ...) each."""
        like = self.black[index]
        dtype = getattr(pipeline, self.place.component).dtype
        nothing = torch.zeros(count - len(images), *like.shape[1:])
        nothing = nothing.to(like.device, dtype)
        # One by one, so that the embeddings of an image do not depend on the others.
        encoded = [encode_image(pipeline, self.place, index, image) for image in images]
        found = [one.to(dtype) for one, _ in encoded]
        none = [(like if other is None else other).to(dtype) for _, other in encoded]
        return torch.cat([*found, nothing]), torch.cat([*none, nothing])

    def _arguments(
        self, pipeline: Any, pairs: Sequence[tuple[Tensor, Tensor]], guidance_scale: float
    ) -> dict[str, Any]:
        if self.place is FLUX:
            return {
                "ip_adapter_image_embeds": [found[None] for found, _ in pairs],
                "negative_ip_adapter_image_embeds": [none[None] for _, none in pairs],
            }
        embeddings = [_for_guidance(pipeline, *pair, guidance_scale) for pair in pairs]
        if self.place is SD3:
            return {"ip_adapter_image_embeds": embeddings[0].flatten(0, 1)}
        return {"ip_adapter_image_embeds": embeddings}


def _for_guidance(pipeline: Any, found: Tensor, none: Tensor, guidance_scale: float) -> Tensor:
    """As the pipeline splits them up: behind those of no image, if there is guidance."""
    # The pipeline's own rule, which asks for the scale of the call that is about to begin.
    pipeline._guidance_scale = guidance_scale
    guided: bool = pipeline.do_classifier_free_guidance
    return torch.stack([none, found]) if guided else found[None]


def place_of(pipeline: Any) -> EmbeddingsPlace:
    """Where calls of a pipeline's denoiser have the embeddings of references.

    Raises:
        ModelLoadError: it takes no IP-Adapters.
    """
    mixins = IPAdapterMixin | FluxIPAdapterMixin | SD3IPAdapterMixin
    place = PLACES.get(type(denoiser_of(pipeline)).__name__)
    if place is None or not isinstance(pipeline, mixins) or _mixes_text(denoiser_of(pipeline)):
        raise ModelLoadError(
            f"ip_adapters: this {type(pipeline).__name__} takes none; pipelines with the denoisers "
            "of Stable Diffusion, Stable Diffusion XL, Stable Diffusion 3 and FLUX do"
        )
    return place


def _mixes_text(denoiser: Any) -> bool:
    """Whether its attention has text and image in one, as some UNets have: nothing crosses."""
    return any("AddedKV" in type(p).__name__ for p in denoiser.attn_processors.values())


def hold_references(pipeline: Any, names: Sequence[str]) -> ReferenceAdapters:
    """Make a resident pipeline take references by request.

    `taking_row_scales` must stand around its denoiser's forward from then on.

    Args:
        pipeline: IP-Adapters and an image encoder are loaded, and it is on its device.
        names: of the adapters, in the order in which they were loaded.

    Raises:
        ModelLoadError: it takes no IP-Adapters, or its image encoder is not the one that they were
            made for.
    """
    place = place_of(pipeline)
    with torch.no_grad():
        encoded = [encode_image(pipeline, place, index, BLACK) for index in range(len(names))]
        black = tuple(embeddings for embeddings, _ in encoded)
        _check_projections(pipeline, place, names, black)
    images = MOST_IMAGES if place.is_listed else 1
    table = hold_row_scales(getattr(pipeline, place.component), images)
    return ReferenceAdapters(tuple(names), place, images, table, black)


def _check_projections(
    pipeline: Any, place: EmbeddingsPlace, names: Sequence[str], black: Sequence[Tensor]
) -> None:
    denoiser = getattr(pipeline, place.component)
    try:
        if place is SD3:
            denoiser.image_proj(black[0], torch.zeros(1, device=black[0].device))
        else:
            denoiser.encoder_hid_proj([embeddings[None] for embeddings in black])
    except RuntimeError as error:
        kind = type(pipeline.image_encoder).__name__
        shapes = ", ".join(str(tuple(embeddings.shape[1:])) for embeddings in black)
        raise ModelLoadError(
            f"ip_adapters: {', '.join(names)} were made for another image encoder: the {kind} "
            f"gives embeddings of shape {shapes} ({error})",
            "its image encoder is not the one that its IP-Adapters were made for",
        ) from error


def encode_image(
    pipeline: Any, place: EmbeddingsPlace, index: int, image: Image.Image
) -> tuple[Tensor, Tensor | None]:
    """What the image encoder says of an image, of shape (1, ...), as the adapter wants it.

    Args:
        pipeline: has an image encoder.
        place: of its denoiser.
        index: of the adapter.
        image: RGB.

    Returns:
        That, and of the same shape what stands for no image; None where a black one does.
    """
    device = pipeline._execution_device
    if place is SD3:
        found = pipeline.encode_image([image], device)
        return found, torch.zeros_like(found)
    if place is FLUX:
        return pipeline.encode_image([image], device, 1), None
    projection = pipeline.unet.encoder_hid_proj.image_projection_layers[index]
    wants_states = not isinstance(projection, ImageProjection)
    found, none = pipeline.encode_image([image], device, 1, wants_states)
    return found, none
