"""What one caller asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum
from typing import NamedTuple

from stepserve.domain.step_cache import StepCacheUse
from stepserve.domain.tasks import Role, Task


class OutputFormat(StrEnum):
    """File formats of finished images."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"


class Priority(IntEnum):
    """Who goes first while there is more work than the device can do. Lower is sooner."""

    INTERACTIVE = 0
    NORMAL = 1
    BATCH = 2


@dataclass(frozen=True)
class AdapterUse:
    """A LoRA adapter of the model, by name, and how strongly it is applied."""

    name: str
    scale: float = 1.0


PROMPT_MARK = ":"
"""Between the id of a call with several prompts and the index of one: no client's id has it."""


@dataclass(frozen=True)
class ControlUse:
    """An image that steers the denoiser through a control network of the model.

    Args:
        name: of the network.
        image: a file.
        scale: how strongly it steers.
        start: from which share of the steps on.
        end: up to which share of the steps.
        preprocessor: what makes the control image of `image`; empty: it is one.
    """

    name: str
    image: bytes
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    preprocessor: str = ""


@dataclass(frozen=True)
class ReferenceUse:
    """An image whose content an IP-Adapter shows to the denoiser.

    Args:
        image: a file.
        scale: how strongly it shows.
        adapter: of the model, by name; empty where it has one only.
    """

    image: bytes
    scale: float = 0.6
    adapter: str = ""


@dataclass(frozen=True)
class Hires:
    """An image is drawn, enlarged, and refined by image-to-image.

    Args:
        scale: from the first image's sides to the last one's.
        strength: of the refinement.
        num_inference_steps: of the refinement, of which the strength leaves a share.
        width: of the last image: `scale` times that of the first, as near as the model takes it.
        height: the same.
    """

    scale: float
    strength: float
    num_inference_steps: int
    width: int
    height: int


class TrajectoryFormat(StrEnum):
    """How a trajectory is returned."""

    IMAGES = "images"
    """Decoded, as files of the request's output format."""

    SAFETENSORS = "safetensors"
    """As the scheduler had them, in one file."""


@dataclass(frozen=True)
class TrajectoryRequest:
    """That a request wants the trajectories of its images.

    Args:
        format: how they are returned.
        every: of so many steps one is recorded, the first of all among them.
    """

    format: TrajectoryFormat = TrajectoryFormat.IMAGES
    every: int = 1

    def records(self, step: int) -> bool:
        """Whether step `step` (from 1) is recorded."""
        return (step - 1) % self.every == 0

    def recorded(self, steps: int) -> int:
        """How many of `steps` steps are recorded."""
        return math.ceil(steps / self.every)


class RequestKey(NamedTuple):
    """What names a request: its id and who sent it.

    Callers choose ids, so that two owners may use the same one at once.
    """

    id: str
    owner: str = ""

    def of_prompt(self, index: int) -> RequestKey:
        """What names the request for prompt `index` of a call of this name."""
        return RequestKey(f"{self.id}{PROMPT_MARK}{index}", self.owner)

    @property
    def prompt_index(self) -> int | None:
        """Which prompt of its call a request is for; None for a call with one prompt."""
        _, mark, index = self.id.rpartition(PROMPT_MARK)
        return int(index) if mark else None

    def is_prompt_of(self, call: RequestKey) -> bool:
        """Whether it names the request for one of the prompts of `call`."""
        return self.owner == call.owner and self.id.startswith(call.id + PROMPT_MARK)


@dataclass(frozen=True)
class GenerationRequest:
    """A request for images with every default filled in.

    Image `i` of `n` is drawn from seed `seed + i`, so that each can be made again by itself.
    What `guidance_scale` does, and how many rows a step takes, is the model's (`Guidance`); with
    most, 1 or less means no guidance and one row instead of two. Guidance is applied at denoiser
    call `i` (from 0) of `c` if `guidance_start <= i / c` and `i / c < guidance_end`; the other
    calls take one row instead of two as well.

    Args:
        prompt: empty where the task takes none.
        images: files that the images are made of.
        mask: white where inpainting may paint, as a file.
        strength: share of the noise schedule that is applied to the image, over 0 up to 1; that
            share of the steps is done. None where the task takes none.
        class_label: number of the class to draw, or None.
        image_guidance_scale: how closely to follow the image of an edit, or None for the usual.
        noise_level: how much noise an upscaler adds to the image, or None for the usual.
        adapters: LoRA adapters, applied together.
        deadline_s: seconds after acceptance by which the images are of use, or None.
        reproducible: its rows never share a forward, so that its bytes depend on nothing else.
        output_compression: quality of JPEG and WEBP files, 0 to 100, or None for the usual.
        previews: how many times, evenly spread over its steps, to show what the images will be.
        trajectory: how its steps are returned beside the images, or None where they are not.
        step_cache: which denoiser calls are skipped, or None for none.
        owner: who sent it; empty for anybody.
        trace_context: headers that name which trace it belongs to, such as W3C's `traceparent`.
    """

    id: str
    model: str
    prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    scheduler: str
    negative_prompt: str = ""
    n: int = 1
    output_format: OutputFormat = OutputFormat.PNG
    task: Task = Task.TEXT_TO_IMAGE
    images: tuple[bytes, ...] = ()
    mask: bytes | None = None
    strength: float | None = None
    class_label: int | None = None
    image_guidance_scale: float | None = None
    noise_level: int | None = None
    controls: tuple[ControlUse, ...] = ()
    references: tuple[ReferenceUse, ...] = ()
    hires: Hires | None = None
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    adapters: tuple[AdapterUse, ...] = ()
    priority: Priority = Priority.NORMAL
    deadline_s: float | None = None
    reproducible: bool = False
    output_compression: int | None = None
    previews: int = 0
    trajectory: TrajectoryRequest | None = None
    step_cache: StepCacheUse | None = None
    owner: str = ""
    trace_context: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> RequestKey:
        """What names it on a replica."""
        return RequestKey(self.id, self.owner)

    @property
    def has_files(self) -> bool:
        """Whether it brings images along."""
        return bool(self.images or self.mask or self.controls or self.references)

    @property
    def step_size(self) -> tuple[int, ...]:
        """What decides the cost of its steps: width and height in pixels, then how many images.

        Images that an edit looks at are in every step, beside the one that is made. The one that
        other tasks begin with is not.
        """
        seen = len(self.images) - (self.task is not Task.EDIT)
        return (self.width, self.height, seen) if seen > 0 else (self.width, self.height)

    def given(self) -> dict[Role, int]:
        """How many inputs of each role it brings."""
        return {
            Role.PROMPT: int(bool(self.prompt.strip())),
            Role.CLASS_LABEL: int(self.class_label is not None),
            Role.IMAGE: len(self.images),
            Role.MASK: int(self.mask is not None),
            Role.STRENGTH: int(self.strength is not None),
            Role.IMAGE_GUIDANCE: int(self.image_guidance_scale is not None),
            Role.NOISE_LEVEL: int(self.noise_level is not None),
            Role.CONTROL: len(self.controls),
            Role.REFERENCE: len(self.references),
            Role.HIRES: int(self.hires is not None),
        }

    @property
    def phases(self) -> tuple[GenerationRequest, ...]:
        """The pipeline calls that it takes, one after the other, each as a request of its own.

        The second one refines what the first one made, enlarged; it brings no image of its own.
        """
        hires = self.hires
        if hires is None:
            return (self,)
        refinement = replace(
            self,
            task=Task.IMAGE_TO_IMAGE,
            width=hires.width,
            height=hires.height,
            strength=hires.strength,
            num_inference_steps=hires.num_inference_steps,
            hires=None,
        )
        return replace(self, hires=None), refinement

    @property
    def expected_steps(self) -> int:
        """Steps of all phases, as far as they can be told without the scheduler."""
        shares = ((part.num_inference_steps, part.strength) for part in self.phases)
        return sum(
            max(math.ceil(steps * (1.0 if strength is None else strength)), 1)
            for steps, strength in shares
        )

    @property
    def step_cache_kind(self) -> str:
        """Requests of one kind skip about as many denoiser calls; empty: none is skipped."""
        use = self.step_cache
        if use is None:
            return ""
        parts = (f"{part.num_inference_steps} {part.strength} {part.size}" for part in self.phases)
        return " ".join([use.method, f"{use.threshold:g}", self.scheduler, *parts])

    @property
    def size(self) -> str:
        """Such as `1024x768`."""
        return f"{self.width}x{self.height}"

    @property
    def final_size(self) -> str:
        """Of the images that it ends with, which is another one if they are enlarged."""
        return self.phases[-1].size

    @property
    def is_guidance_limited(self) -> bool:
        """Whether some denoiser calls may do without guidance."""
        return (self.guidance_start, self.guidance_end) != (0, 1)

    def is_guided(self, call: int, calls: int) -> bool:
        """Whether guidance is applied at denoiser call `call` (from 0) of `calls`."""
        return self.guidance_start <= call / calls < self.guidance_end
