"""The bodies of requests for images, as they arrive.

Only types are checked here. What a model can do is checked by `stepserve.domain.checks.limits`.
"""

from __future__ import annotations

import math
import re
import secrets
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from stepserve.api.auth.keys import Caller
from stepserve.api.bodies.fields import OPEN, Body, ClassLabel, WholeNumber
from stepserve.api.bodies.names import AS_EVER
from stepserve.domain.checks.control_limits import MAX_CONTROL_SCALE
from stepserve.domain.checks.input_limits import (
    MAX_HIRES_SCALE,
    MAX_REFERENCE_SCALE,
    class_number,
)
from stepserve.domain.checks.limits import MAX_PREVIEWS, MAX_SEED, MIN_DEADLINE_S
from stepserve.domain.checks.trajectory_limits import MAX_EVERY
from stepserve.domain.checks.wording import digits, shown
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.guidance import Guidance
from stepserve.domain.models import ModelCapabilities, SizeRange
from stepserve.domain.requests import (
    AdapterUse,
    ControlUse,
    GenerationRequest,
    Hires,
    OutputFormat,
    ReferenceUse,
    TrajectoryFormat,
    TrajectoryRequest,
)
from stepserve.domain.step_cache import (
    LEAST_THRESHOLD,
    MOST_THRESHOLD,
    OFF,
    StepCacheMethod,
    StepCacheUse,
)
from stepserve.domain.tasks import Task

T = TypeVar("T")

UNUSED = "Accepted for compatibility and not used; the response names it in `ignored_fields`."
STRENGTH = (
    "How far to go from the image; 1 keeps nothing of it. 0.8 if left out. Instruction edits take "
    "none."
)
MAX_PARTIAL_IMAGES = 3

MAX_LISTED = 64
"""Of any list: counted before its entries are looked at."""

URLS_BY_DEFAULT = "dall-e-"
"""OpenAI returns images of these models as links, and their clients count on it."""

_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")


def _documented(description: str, **bounds: Any) -> Any:
    """Describe an optional field; the bounds are shown only, because each model has its own."""
    return Field(default=None, description=description, json_schema_extra=bounds or None)


def _check_count(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, list) and len(value) > MAX_LISTED:
        message = f"{info.field_name} must have at most {MAX_LISTED} entries, got {len(value)}"
        raise ValueError(message)
    return value


COUNTED = BeforeValidator(_check_count)


class AdapterBody(Body):
    """A LoRA adapter to apply."""

    name: str = Field(description="An adapter that the model lists in `GET /v1/models`.")
    scale: float = Field(default=1.0, description="How strongly it is applied.")


class HiresBody(Body):
    """How an image is enlarged and refined."""

    scale: float = Field(
        default=2.0,
        description="From the sides of the image that is drawn, which `size` says, to those of the "
        "image that is returned, over 1 up to 4; they are rounded to what the model takes.",
        json_schema_extra={"exclusiveMinimum": 1, "maximum": MAX_HIRES_SCALE},
    )
    strength: float = Field(
        default=0.5,
        description="How far to go from the enlarged image; 1 keeps nothing of it.",
        json_schema_extra={"exclusiveMinimum": 0, "maximum": 1},
    )
    num_inference_steps: WholeNumber | None = _documented(
        "Denoising steps of refining, of which `strength` leaves a share; as many as the image is "
        "drawn with if left out.",
        minimum=1,
    )

    def fill_in(self, drawn: GenerationRequest, sizes: SizeRange) -> Hires:
        """What it means for a request that draws the small image."""
        return Hires(
            scale=self.scale,
            strength=self.strength,
            num_inference_steps=_or(self.num_inference_steps, drawn.num_inference_steps),
            width=_times(drawn.width, self.scale, sizes),
            height=_times(drawn.height, self.scale, sizes),
        )


class StepCacheBody(Body):
    """Which denoiser calls are skipped, as their output can be predicted."""

    method: Literal["easycache", "magcache", "off"] = Field(
        default="easycache",
        description="What decides: `easycache`: how much the request's earlier calls changed; "
        "`magcache`: magnitudes measured once for the model; `off`: no call is skipped. "
        "`step_cache_methods` in `GET /v1/models` lists those that the model has.",
    )
    threshold: float | None = _documented(
        "The expected relative error that may add up until a call has to run: the larger, the "
        "fewer calls run, and the further the image is from that of all. If left out, "
        + " and ".join(f"{method.usual_threshold} of `{method}`" for method in StepCacheMethod)
        + ".",
        minimum=LEAST_THRESHOLD,
        maximum=MOST_THRESHOLD,
    )

    def use(self) -> StepCacheUse | None:
        """What it means for a request."""
        if self.method == OFF:
            return None
        return StepCacheUse.of(StepCacheMethod(self.method), self.threshold)


def _as_step_cache(value: Any) -> Any:
    is_word = isinstance(value, str) and value.lstrip()[:1] not in ("{", "[")
    return {"method": value} if is_word else value


StepCacheField = Annotated[
    StepCacheBody,
    BeforeValidator(_as_step_cache, json_schema_input_type=StepCacheBody | Literal["off"]),
]
"""A step cache, also one that is written as its method alone."""


class TrajectoryBody(Body):
    """How the steps to an image are returned."""

    format: Literal["images", "safetensors"] = Field(
        default="images",
        description="`images`: decoded, as files of `output_format`; `safetensors`: raw tensors, "
        "exactly as the scheduler had them.",
    )
    every: WholeNumber = Field(
        default=1,
        description="Of so many steps one is returned, beginning with the first.",
        json_schema_extra={"minimum": 1, "maximum": MAX_EVERY},
    )

    def wanted(self) -> TrajectoryRequest:
        """What it means for a request."""
        return TrajectoryRequest(TrajectoryFormat(self.format), self.every)


def _as_trajectory(value: Any) -> Any:
    return {"format": value} if isinstance(value, str) else value


TrajectoryField = Annotated[
    TrajectoryBody,
    BeforeValidator(
        _as_trajectory,
        json_schema_input_type=TrajectoryBody | Literal["images", "safetensors"],
    ),
]
"""A trajectory, also one that is written as its format alone."""


class ImageReference(Body):
    """An image by its address."""

    image_url: str = Field(description="A `data:` URL; `https:` where the operator allows it.")


def _referred_to(value: Any) -> Any:
    # A union of both would name its branches, which are names of this code, in messages.
    return {"image_url": value} if isinstance(value, str) else value


Reference = Annotated[
    ImageReference, BeforeValidator(_referred_to, json_schema_input_type=ImageReference | str)
]
"""An image by its address, also one that is written without `image_url`."""


class ReferenceImageBody(Body):
    """A reference image, which an IP-Adapter of the model reads."""

    image: Reference | None = Field(
        default=None,
        description="The image. In a form it may be left out: the next file of `reference_image` "
        "takes its place.",
    )
    scale: float = Field(
        default=ReferenceUse.scale,
        description="How strongly it shows; 0 leaves it out.",
        json_schema_extra={"minimum": 0, "maximum": MAX_REFERENCE_SCALE},
    )
    adapter: str = Field(
        default="",
        description="Of `ip_adapters` in `GET /v1/models`; may be left out where there is one.",
    )


class ControlBody(Body):
    """An image that steers the model, through one of its controls."""

    name: str = Field(
        default="",
        description="Of `controls` in `GET /v1/models`; may be left out where there is one.",
    )
    image: Reference | None = Field(
        default=None,
        description="The image. In a form it may be left out: the next file of `control_image` "
        "takes its place.",
    )
    scale: float = Field(
        default=ControlUse.scale,
        description="How strongly it steers.",
        json_schema_extra={"minimum": 0, "maximum": MAX_CONTROL_SCALE},
    )
    start: float = Field(
        default=ControlUse.start,
        description="It steers from this share of the steps on.",
        json_schema_extra={"minimum": 0, "exclusiveMaximum": 1},
    )
    end: float = Field(
        default=ControlUse.end,
        description="It steers up to this share of the steps.",
        json_schema_extra={"exclusiveMinimum": 0, "maximum": 1},
    )
    preprocessor: str | None = Field(
        default=None,
        description="What makes the control image of `image`: `canny`, `grey`, `invert`, `tile`, "
        "or `none` where it is one already. The control's own if left out.",
    )


class ImageRequestBase(Body):
    """What every request for images may say: OpenAI's fields, then Stepserve's own."""

    model: str | None = _documented(
        "A model's id or alias in `GET /v1/models`; else the default model."
    )
    n: WholeNumber | None = _documented("How many images; 1 if left out.", minimum=1)
    size: str | None = _documented(
        "`WIDTHxHEIGHT` in pixels, or `auto` for the model's native size.",
        pattern="^(auto|[0-9]{1,5}x[0-9]{1,5})$",
    )
    response_format: Literal["b64_json", "url"] | None = _documented(
        "How images are returned: in the response, or as links that expire; `b64_json` if left "
        "out, but `url` where `model` is an alias that begins with `dall-e-`."
    )
    output_format: Literal["png", "jpeg", "webp"] | None = _documented(
        "The file format of the images; `png` if left out."
    )
    output_compression: WholeNumber | None = _documented(
        "Quality of JPEG and WEBP files; 95 if left out.", minimum=0, maximum=100
    )
    stream: bool | None = _documented(
        "Respond with server-sent events: partial images, then the finished ones."
    )
    partial_images: WholeNumber | None = _documented(
        "How many partial images a stream holds; 0 if left out.", minimum=0, maximum=3
    )
    user: str | None = _documented(UNUSED)
    quality: str | None = _documented(UNUSED)
    moderation: str | None = _documented(UNUSED)
    style: str | None = _documented(UNUSED)
    background: str | None = _documented(f"{UNUSED} Images are opaque.")
    safety_identifier: str | None = _documented(UNUSED)
    complexity: str | None = _documented(UNUSED)
    frame_count: Any = _documented(UNUSED)
    frame_duration_ms: Any = _documented(UNUSED)
    svg: Any = _documented(UNUSED)
    prompt: str | None = None
    negative_prompt: str | None = _documented("What the image must not show.")
    num_inference_steps: WholeNumber | None = _documented("Denoising steps.", minimum=1)
    guidance_scale: float | None = _documented(
        "How closely to follow the prompt; 1 or less turns guidance off, which is twice as fast.",
        minimum=0,
    )
    seed: WholeNumber | None = _documented(
        "The same seed and parameters give the same image; random if left out. "
        "Image `i` (from 0) of `n` is drawn from `seed + i`.",
        minimum=0,
        maximum=MAX_SEED,
    )
    scheduler: str | None = _documented("A scheduler that the model lists in `GET /v1/models`.")
    adapters: Annotated[list[AdapterBody], COUNTED] | None = _documented(
        "LoRA adapters, applied together."
    )
    controls: Annotated[list[ControlBody], COUNTED] | None = _documented(
        "Images that steer the new ones, such as edges or depths, where a model has controls; "
        "`inputs` in `GET /v1/models` says how many."
    )
    references: Annotated[list[ReferenceImageBody], COUNTED] | None = _documented(
        "Images whose style or content the new ones are to have, where a model has IP-Adapters; "
        "`inputs` in `GET /v1/models` says how many."
    )
    guidance_start: float | None = _documented(
        "Guidance is applied from this share of the steps on; 0 if left out. Steps without "
        "guidance are twice as fast.",
        minimum=0,
        exclusiveMaximum=1,
    )
    guidance_end: float | None = _documented(
        "Guidance is applied before this share of the steps; 1 if left out.",
        exclusiveMinimum=0,
        maximum=1,
    )
    step_cache: StepCacheField | None = _documented(
        "Skip denoiser calls whose output can be predicted, which is faster and changes the image "
        "a little; `{}` for the usual, `off` for none, `default_step_cache` in `GET /v1/models` if "
        "left out."
    )
    priority: Literal["interactive", "normal", "batch"] | None = _documented(
        "Who goes first when there is more work than the server can do; `normal` if left out."
    )
    deadline_s: float | None = _documented(
        "Seconds after which the response is no longer useful.", minimum=MIN_DEADLINE_S
    )
    reproducible: bool | None = _documented(
        "Share no computation with other requests, so that equal fingerprints mean equal bytes on "
        "every device; slower. `false` if left out."
    )
    previews: WholeNumber | None = _documented(
        "How many partial images to make, in a stream or to be followed under "
        "`/v1/requests/{id}/events`; `partial_images` without its limit of 3.",
        minimum=0,
        maximum=MAX_PREVIEWS,
    )

    trajectory: TrajectoryField | None = _documented(
        "Return the steps to each image beside it: what each began with (x_t), the clean sample "
        "that was predicted of it (x_0) and its timestep; `{}` for images of all steps."
    )

    @field_validator("partial_images")
    @classmethod
    def _check_partial_images(cls, value: int | None) -> int | None:
        if value is not None and not 0 <= value <= MAX_PARTIAL_IMAGES:
            got = digits(value)
            raise ValueError(f"partial_images must be 0 to {MAX_PARTIAL_IMAGES}, got {got}")
        return value

    @field_validator("size")
    @classmethod
    def _check_form(cls, value: str | None) -> str | None:
        if value not in (None, "auto") and not _SIZE.fullmatch(value):
            raise ValueError(f"size must be 'auto' or 'WIDTHxHEIGHT' in pixels, got {shown(value)}")
        return value

    @property
    def wants_urls(self) -> bool:
        """Whether the images are to be links."""
        if self.response_format is None:
            return (self.model or "").startswith(URLS_BY_DEFAULT)
        return self.response_format == "url"

    def ignored_fields(
        self, guidance_scale: float, guidance: Guidance, previews: bool = True
    ) -> tuple[str, ...]:
        """The fields that were sent and changed nothing.

        Args:
            guidance_scale: of the request, after what was left out has been filled in.
            guidance: of its model.
            previews: whether its model can show images on the way.
        """
        sent = ((name, getattr(self, name, None)) for name in AS_EVER)
        unused = (name for name, value in sent if value not in (None, *AS_EVER[name]))
        unguided = () if guidance.guides(guidance_scale) else self._guidance_limits()
        return (*unused, *self._unsent_previews(previews), *unguided, *self.unknown_fields)

    def _guidance_limits(self) -> tuple[str, ...]:
        """Fields that were sent to leave some steps without guidance."""
        sent = {"guidance_start": self.guidance_start, "guidance_end": self.guidance_end}
        at_every_step = {"guidance_start": 0, "guidance_end": 1}
        return tuple(name for name in sent if sent[name] not in (None, at_every_step[name]))

    def _unsent_previews(self, made: bool) -> tuple[str, ...]:
        """`partial_images`, if there is no stream to hold them, or `previews` take their place.

        Both, if the model makes none.
        """
        if not made:
            sent = {"partial_images": self.partial_images, "previews": self.previews}
            return tuple(name for name, value in sent.items() if value)
        replaced = not self.stream or self.previews is not None
        return ("partial_images",) if self.partial_images and replaced else ()

    def fill_in(
        self, request_id: str, caller: Caller, model: ModelCapabilities, task: Task
    ) -> GenerationRequest:
        """Return a request with everything left out filled in from `model`; draws a seed.

        The images that it is made of come from `read_inputs`.
        """
        width, height = _parse_size(self.size, model.sizes.native)
        guidance_scale = _or(self.guidance_scale, model.default_guidance_scale)
        filled = GenerationRequest(
            task=task,
            id=request_id,
            owner=caller.name,
            model=model.id,
            prompt=self.prompt or "",
            strength=_or(getattr(self, "strength", None), model.default_strength(task)),
            image_guidance_scale=_or(
                getattr(self, "image_guidance_scale", None),
                model.usual_image_guidance(task, guidance_scale),
            ),
            noise_level=_or(getattr(self, "noise_level", None), model.usual_noise_level(task)),
            class_label=class_number(getattr(self, "class_label", None), model),
            width=width,
            height=height,
            num_inference_steps=_or(self.num_inference_steps, model.default_num_inference_steps),
            guidance_scale=guidance_scale,
            seed=_or(self.seed, secrets.randbits(32)),
            scheduler=_or(self.scheduler, model.default_scheduler),
            negative_prompt=_or(self.negative_prompt, ""),
            n=_or(self.n, 1),
            output_format=OutputFormat(_or(self.output_format, "png")),
            output_compression=self.output_compression,
            adapters=tuple(AdapterUse(use.name, use.scale) for use in self.adapters or ()),
            guidance_start=_or(self.guidance_start, 0.0),
            guidance_end=_or(self.guidance_end, 1.0),
            step_cache=model.default_step_cache
            if self.step_cache is None
            else self.step_cache.use(),
            priority=caller.priority(self.priority),
            deadline_s=self.deadline_s,
            reproducible=_or(self.reproducible, False),
            previews=_or(self.previews, _or(self.partial_images, 0) if self.stream else 0),
            trajectory=None if self.trajectory is None else self.trajectory.wanted(),
        )
        hires: HiresBody | None = getattr(self, "hires", None)
        return (
            filled if hires is None else replace(filled, hires=hires.fill_in(filled, model.sizes))
        )


class ImageRequest(ImageRequestBase):
    """What to draw. OpenAI's fields, then Stepserve's own. `null` means the same as left out."""

    model_config = ConfigDict(
        json_schema_extra={
            **OPEN,
            "examples": [
                {"prompt": "red heart, noto, on a blue background"},
                {
                    "prompt": "smiling cat",
                    "n": 2,
                    "seed": 7,
                    "num_inference_steps": 30,
                    "guidance_scale": 5.0,
                },
                {"prompts": ["smiling cat", "red heart"], "seed": 7},
            ],
        },
    )

    prompt: str | None = _documented(
        "What the image shows; left out with `prompts`, and where a model takes none, as `inputs` "
        "in `GET /v1/models` says."
    )
    prompts: Annotated[list[str], COUNTED] | None = _documented(
        "Instead of `prompt`: what each of several images shows. They are made side by side, and "
        "each fails by itself. Prompt `i` (from 0) is drawn from `seed + i * n`.",
        minItems=1,
        maxItems=MAX_LISTED,
    )

    hires: HiresBody | None = _documented(
        "Draw the image in `size`, enlarge it, and refine it by image-to-image; `{}` for the "
        "usual. For models that do both tasks."
    )
    class_label: ClassLabel | None = _documented(
        "The class to draw, by its number or a name, where a model has classes; "
        "`GET /v1/models/{id}` lists them."
    )

    def check_prompts(self) -> None:
        """Return if there is one of `prompt` and `prompts`, or neither.

        Raises:
            InvalidRequestError: there are both, or too many images, or no prompt in a list, or
                several with trajectories.
        """
        if self.prompts is None:
            return
        if self.prompt is not None:
            message = "prompt and prompts exclude each other: send one of them"
            raise InvalidRequestError(message, "prompts")
        if self.trajectory is not None:
            message = "trajectory and prompts exclude each other: send a request for each prompt"
            raise InvalidRequestError(message, "trajectory")
        if not self.prompts:
            raise InvalidRequestError("prompts is empty: it must have at least one", "prompts")
        if (images := len(self.prompts) * _or(self.n, 1)) > MAX_LISTED:
            raise InvalidRequestError(
                f"{len(self.prompts)} prompts with n={digits(self.n or 1)} are {digits(images)} "
                f"images; the limit of one call is {MAX_LISTED}: send fewer prompts, or a smaller "
                "n",
                "prompts",
            )


class RequestFromImages(ImageRequestBase):
    """What requests have in common that begin with images: files of a form, or addresses."""

    image: Reference | None = _documented("An image; several go into `images`.")
    images: Annotated[list[Reference], COUNTED] | None = _documented(
        "Images, in the order in which the prompt means them; a model takes as many as `inputs` "
        "in `GET /v1/models` says."
    )
    strength: float | None = _documented(STRENGTH, exclusiveMinimum=0, maximum=1)


class EditRequest(RequestFromImages):
    """How to change images. `image` and `mask` are files of a form, or addresses in JSON."""

    prompt: str | None = _documented(
        "What the changed image shows, or what to do with it; left out only where `inputs` in "
        "`GET /v1/models` says that it is optional."
    )
    mask: Reference | None = _documented(
        "Where to repaint: where it is transparent, or white in an image without transparency."
    )
    image_guidance_scale: float | None = _documented(
        "How closely to follow the image, where a model takes such a scale; "
        "`default_image_guidance_scale` in `GET /v1/models` if left out.",
        minimum=0,
    )
    input_fidelity: str | None = _documented(UNUSED)


class VariationRequest(RequestFromImages):
    """How to vary an image. `image` is a file of a form, or an address in JSON."""

    prompt: str | None = _documented("What the variations show; nothing in particular if left out.")


class UpscaleRequest(ImageRequestBase):
    """What to make larger. `image` is a file of a form, or an address in JSON."""

    prompt: str | None = _documented(
        "What the image shows, where a model takes a prompt; nothing in particular if left out."
    )
    size: str | None = _documented(
        "Left out or `auto`: it follows from the image, as `upscale_factor` in `GET /v1/models` "
        "says.",
        pattern="^(auto|[0-9]{1,5}x[0-9]{1,5})$",
    )
    image: Reference | None = _documented("The image.")
    noise_level: WholeNumber | None = _documented(
        "How much noise is added to the image first, where a model adds any: more lets it invent "
        "more. Up to `max_noise_level` in `GET /v1/models`; `default_noise_level` there if left "
        "out.",
        minimum=0,
    )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _times(side_px: int, scale: float, sizes: SizeRange) -> int:
    """The enlarged side; where the scale is no scale, the same one, as that is refused later."""
    larger_px = side_px * scale
    return sizes.nearest(larger_px) if math.isfinite(larger_px) else side_px


def _parse_size(size: str | None, native_px: int) -> tuple[int, int]:
    parts = _SIZE.fullmatch(size or "auto")
    return (int(parts[1]), int(parts[2])) if parts else (native_px, native_px)
