"""What a served model can do; the limits that requests are checked against."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum

from stepserve.domain.guidance import CLASSIC, Guidance
from stepserve.domain.requests import GenerationRequest
from stepserve.domain.step_cache import StepCacheMethod, StepCacheUse
from stepserve.domain.tasks import ONE, Role, Task, TaskInputs


@dataclass(frozen=True)
class SizeRange:
    """Image sides that a model accepts, in pixels: from `minimum` to `maximum` by `step`."""

    minimum: int
    maximum: int
    step: int
    native: int

    def accepts(self, side_px: int) -> bool:
        """Whether one side of an image may be this long."""
        in_range = self.minimum <= side_px <= self.maximum
        return in_range and (side_px - self.minimum) % self.step == 0

    def nearest(self, side_px: float) -> int:
        """The nearest side in steps, whether or not it is in the range."""
        return self.minimum + round((side_px - self.minimum) / self.step) * self.step

    def describe(self) -> str:
        """For error messages: `48 to 128 in steps of 16 (native: 64x64)`, or `64`."""
        if self.minimum == self.maximum:
            return f"{self.native}"
        return (
            f"{self.minimum} to {self.maximum} in steps of {self.step} (native: "
            f"{self.native}x{self.native})"
        )


@dataclass(frozen=True)
class StepRange:
    """Numbers of denoising steps that can be done: from `minimum` to `maximum`."""

    minimum: int = 1
    maximum: int = 1000

    def within(self, other: StepRange) -> StepRange:
        """What is in both."""
        return StepRange(max(self.minimum, other.minimum), min(self.maximum, other.maximum))

    def nearest(self, steps: int) -> int:
        """The number of these that is closest to `steps`."""
        return min(max(steps, self.minimum), self.maximum)


@dataclass(frozen=True)
class ClassLabels:
    """The classes of a model by number, from 0 on, and what they are called.

    Args:
        count: how many there are; 0 where a model has none.
        names: by number; a class may have several, and many models say none.
    """

    count: int = 0
    names: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def numbers_of(self, name: str) -> list[int]:
        """The classes of a name, written in any case; different classes may share one."""
        wanted = name.casefold()
        return [n for n, names in self.names.items() if wanted in map(str.casefold, names)]


class Compilation(StrEnum):
    """Whether the denoiser is compiled. Where that failed, eager code serves."""

    OFF = "off"
    COMPILED = "compiled"
    FAILED = "failed"


OWN_CONTROL = "control"
"""What requests call the control of a model that takes one by itself."""

AS_IT_IS = "none"
"""What requests say instead of a preprocessor: the image is a control image already."""


class ControlKind(StrEnum):
    """What steers the denoiser."""

    CONTROLNET = "controlnet"
    UNION = "union-controlnet"
    """One network for several kinds of control images, each a mode of it."""

    T2I_ADAPTER = "t2i-adapter"
    OWN = "model"
    """The model itself: it was trained to take a control image."""


class Preprocessor(StrEnum):
    """Makes control images without a network."""

    CANNY = "canny"
    """White edges on black."""

    GREY = "grey"
    INVERT = "invert"
    """Light for dark: drawings on white as scribble and line-art networks take them."""

    TILE = "tile"
    """The image without its details, for networks that invent new ones."""


@dataclass(frozen=True)
class Control:
    """One control that requests may name.

    Args:
        name: by which requests name it.
        kind: what it is.
        loaded: whether its network is in memory; it is loaded when it is first used.
        memory_bytes: of its weights, while they are loaded; 0 for the model itself.
        preprocessor: what makes the control image of a request that says nothing; empty: it sends
            one.
        takes_scale: whether requests may say how strongly it steers.
        takes_interval: whether requests may say at which steps.
        problem: why it cannot be used; empty where it can.
    """

    name: str
    kind: ControlKind
    loaded: bool = False
    memory_bytes: int = 0
    preprocessor: str = ""
    takes_scale: bool = True
    takes_interval: bool = True
    problem: str = ""


@dataclass(frozen=True)
class AdapterSharing:
    """Whether requests with one adapter share forwards with those that have others, or none.

    Args:
        name: by which requests name the adapter.
        shares: whether they do; None as long as it has not been loaded.
        reason: why they share with requests of the same adapters and scales only; empty where they
            share with all, or where it is not known.
    """

    name: str
    shares: bool | None = None
    reason: str = ""


SHORT_CHARACTERS = 16
"""Of a fingerprint's digest: enough to distinguish fingerprints."""

DEFAULT_STRENGTH = 0.8
"""Of image-to-image and inpainting, where a request says none."""


@dataclass(frozen=True)
class Fingerprint:
    """Where a model runs and what it is made of: all that decides its images besides requests.

    The same request gives the same bytes wherever fingerprints are equal. Where they differ it may
    give other bytes: another processor, version of torch or number of threads may round otherwise.

    Args:
        weights: SHA-256 over the files with weights and with the settings of components.
        stepserve: version, as are `torch`, `diffusers` and `transformers`.
        device: type of the device, such as `cpu`.
        processor: what kernels are chosen by: the CPU's capability, or the GPU's name.
        dtype: what the model computes in, such as `bfloat16`.
        row_buckets: to how many rows forwards are padded.
        threads: that CPU kernels use; 0 where that is not known.
        code: what runs the denoiser, `eager` or `compiled`: the two round differently.
        step_cache: SHA-256 over the magnitudes that decide which calls MagCache skips; empty where
            the model has none.
    """

    weights: str
    stepserve: str
    torch: str
    diffusers: str
    transformers: str
    device: str
    processor: str
    dtype: str
    row_buckets: str = "any rows"
    threads: int = 0
    code: str = "eager"
    step_cache: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 over everything above, in hexadecimal."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def short(self) -> str:
        """The beginning of the digest."""
        return self.digest[:SHORT_CHARACTERS]


def _text_to_image() -> dict[Task, TaskInputs]:
    return {Task.TEXT_TO_IMAGE: {Role.PROMPT: ONE}}


@dataclass(frozen=True)
class ModelCapabilities:
    """Limits and defaults of one model, as `GET /v1/models` shows them.

    Args:
        aliases: other names that requests may give it.
        min_num_inference_steps: fewest steps, with the default scheduler.
        max_num_inference_steps: most steps, with the default scheduler.
        scheduler_steps: of the schedulers that can do other numbers of steps.
        adapter_sharing: of each of its adapters, whether forwards may have others besides.
        ip_adapters: those that read reference images, the usual one first.
        tasks: what it does, its usual task first, and which inputs that takes.
        classes: which a class label may name.
        controls: what may steer it by an image.
        upscale_factor: how many times larger than an image the result of upscaling is.
        max_noise_level: most noise that upscaling adds to the image, or None where it adds none.
        default_noise_level: of requests that say none, as its authors chose; None: there is none.
        default_image_guidance_scale: of edits that say none; None: it takes none, or is not known.
        preprocessors: that make control images here; none where it takes no controls.
        unusable_schedulers: of diffusers' schedulers those that it cannot use.
        guidance: how it takes guidance, and what that costs.
        guidance_interval: whether guidance may be limited to some of the steps.
        previews: whether images can be shown on the way; not known before one was tried.
        step_cache_methods: what may decide which denoiser calls of a request are skipped.
        default_step_cache: of requests that say nothing of it; None: no call is skipped.
        same_bytes: whether an image is the same in every bit whatever the load, on the device that
            serves it. Where it is not, `reproducible` requests have that.
        sharing_remark: what is unusual in how requests share forwards; empty: nothing.
        compilation: whether requests are served by compiled code.
        expected_s: estimated seconds of a request with the defaults on an idle replica, or None
            while nothing is learned.
        load_s: how long loading and warming took, in seconds, or None where it was not measured.
        safety_checker: whether a checker looks at images before they are sent, and may withhold
            them.
        compilation_remark: why it failed; empty: nothing to say.
    """

    id: str
    description: str
    sizes: SizeRange
    schedulers: tuple[str, ...]
    default_scheduler: str
    default_num_inference_steps: int = 20
    min_num_inference_steps: int = 1
    max_num_inference_steps: int = 1000
    scheduler_steps: Mapping[str, StepRange] = field(default_factory=dict)
    default_guidance_scale: float = 4.0
    max_guidance_scale: float = 30.0
    max_n: int = 8
    max_prompt_characters: int = 1000
    max_prompt_tokens: int = 77
    adapters: tuple[str, ...] = ()
    adapter_sharing: tuple[AdapterSharing, ...] = ()
    max_adapters: int = 0
    ip_adapters: tuple[str, ...] = ()
    created: int = 0
    owned_by: str = "stepserve"
    aliases: tuple[str, ...] = ()
    tasks: Mapping[Task, TaskInputs] = field(default_factory=_text_to_image)
    classes: ClassLabels = field(default_factory=ClassLabels)
    controls: tuple[Control, ...] = ()
    upscale_factor: int = 1
    max_noise_level: int | None = None
    default_noise_level: int | None = None
    default_image_guidance_scale: float | None = None
    preprocessors: tuple[str, ...] = ()
    unusable_schedulers: tuple[str, ...] = ()
    guidance: Guidance = CLASSIC
    guidance_interval: bool = True
    step_cache_methods: tuple[StepCacheMethod, ...] = (StepCacheMethod.EASYCACHE,)
    default_step_cache: StepCacheUse | None = None
    previews: bool = True
    safety_checker: bool = False
    same_bytes: bool = True
    sharing_remark: str = ""
    compilation: Compilation = Compilation.OFF
    compilation_remark: str = ""
    expected_s: float | None = None
    load_s: float | None = None
    fingerprint: Fingerprint | None = None

    def steps_of(self, scheduler: str) -> StepRange:
        """How many steps requests with this scheduler may have."""
        usual = StepRange(self.min_num_inference_steps, self.max_num_inference_steps)
        return self.scheduler_steps.get(scheduler, usual)

    @property
    def usual_task(self) -> Task:
        """What it is mostly asked for."""
        return next(iter(self.tasks))

    def inputs_of(self, task: Task) -> TaskInputs:
        """How many inputs of each role a task takes."""
        return self.tasks.get(task, {})

    def default_strength(self, task: Task) -> float | None:
        """The strength of a request that says none; None where the task takes none."""
        return DEFAULT_STRENGTH if Role.STRENGTH in self.inputs_of(task) else None

    def usual_noise_level(self, task: Task) -> int | None:
        """The noise level of a request that says none; None where the task takes none."""
        return self.default_noise_level if Role.NOISE_LEVEL in self.inputs_of(task) else None

    def usual_image_guidance(self, task: Task, guidance_scale: float) -> float | None:
        """The image guidance of a request that says none; None where it would have no effect."""
        is_taken = Role.IMAGE_GUIDANCE in self.inputs_of(task)
        guides = is_taken and self.guidance.guides(guidance_scale)
        return self.default_image_guidance_scale if guides else None

    def usual_request(self, request_id: str, task: Task | None = None) -> GenerationRequest:
        """A request for one image of the native size, with the defaults and without any input.

        Args:
            request_id: its id.
            task: what it asks for; None for the usual.
        """
        task = self.usual_task if task is None else task
        return GenerationRequest(
            id=request_id,
            model=self.id,
            prompt="",
            width=self.sizes.native,
            height=self.sizes.native,
            num_inference_steps=self.default_num_inference_steps,
            guidance_scale=self.default_guidance_scale,
            seed=0,
            scheduler=self.default_scheduler,
            task=task,
            strength=self.default_strength(task),
        )
