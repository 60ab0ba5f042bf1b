"""The bodies of responses, in the shapes of OpenAI's API with more fields beside them."""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from stepserve.api.bodies.schemas import MAX_LISTED, HiresBody
from stepserve.api.errors import ErrorDetail, PromptError, error_detail
from stepserve.api.images.trajectories import TrajectoryResponse
from stepserve.domain.events import CutPrompt, EncodedImage, Finished
from stepserve.domain.guidance import GuidanceKind, StepWork
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.models import (
    AdapterSharing,
    Compilation,
    Control,
    SizeRange,
    StepRange,
)
from stepserve.domain.progress import Progress
from stepserve.domain.reports import BatchView
from stepserve.domain.requests import AdapterUse, GenerationRequest
from stepserve.domain.states import RequestState
from stepserve.domain.step_cache import OFF, StepCacheMethod, StepCacheUse
from stepserve.domain.tasks import Count, Role, Task
from stepserve.domain.timings import Timings


class ImageData(BaseModel):
    """One image; of a call with `prompts` also what was made of which, or why there is none."""

    prompt_index: int | None = Field(
        default=None, description="With `prompts`: which of them, from 0. They are in order."
    )
    b64_json: str | None = Field(default=None, description="The image file, base64.")
    url: str | None = Field(default=None, description="Where the file is, until the link expires.")
    seed: int = Field(description="With `n` of 1, this seed makes this image again.")
    content_filtered: Literal[True] | None = Field(
        default=None,
        description="The model's own safety checker withheld the image: there is no file.",
    )
    trajectory: TrajectoryResponse | None = Field(
        default=None, description="The steps to it, where the request has a `trajectory`."
    )
    error: PromptError | None = Field(
        default=None, description="With `prompts`: why this one has no images."
    )
    parameters: Parameters | None = Field(
        default=None, description="With `prompts`: of this one, sent by itself."
    )
    fingerprint: str | None = Field(default=None, description="With `prompts`: as below.")
    timings: Timings | None = Field(default=None, description="With `prompts`: of this one.")
    prompt_truncated: dict[str, dict[str, int]] | None = Field(
        default=None, description="With `prompts`: as below."
    )


class ReferenceParameters(BaseModel):
    """How a reference image was used."""

    scale: float
    adapter: str = Field(description="Empty: the model's only one.")


class ControlParameters(BaseModel):
    """How a control image was used."""

    name: str
    scale: float
    start: float
    end: float
    preprocessor: str = Field(description="Empty, or `none`: the image was taken as it is.")


class Parameters(BaseModel):
    """Everything that shaped the images: sent back as a request body, it makes them again."""

    model: str
    prompt: str | None = Field(default=None, description="Absent where there are `prompts`.")
    prompts: list[str] | None = Field(default=None, description="Of a call with several.")
    negative_prompt: str
    n: int
    size: str
    num_inference_steps: int
    guidance_scale: float
    seed: int
    scheduler: str
    adapters: list[AdapterUse]
    output_format: Literal["png", "jpeg", "webp"]
    output_compression: int | None = None
    guidance_start: float
    guidance_end: float
    step_cache: StepCacheUse | Literal["off"] = Field(
        description="Which denoiser calls were skipped; `off`: none."
    )
    reproducible: bool
    strength: float | None = Field(default=None, description="Of edits and variations.")
    class_label: int | None = Field(default=None, description="Of models with classes.")
    image_guidance_scale: float | None = Field(default=None, description="Of edits.")
    noise_level: int | None = Field(default=None, description="Of upscaled images.")
    controls: list[ControlParameters] | None = Field(
        default=None, description="Without their images; absent where there were none."
    )
    references: list[ReferenceParameters] | None = Field(
        default=None, description="Without their images; absent where there were none."
    )
    hires: HiresBody | None = Field(
        default=None, description="Of images that were enlarged; `size` is that they were drawn in."
    )


_EXAMPLE: dict[str, Any] = {
    "id": "3f0c9d5be1f34c5f8d1c5b8f0f7d2a11",
    "created": 1795450000,
    "model": "emoji",
    "data": [{"b64_json": "iVBORw0KGgo=", "seed": 7}],
    "output_format": "png",
    "size": "64x64",
    "seed": 7,
    "parameters": {
        "model": "emoji",
        "prompt": "red heart, noto, on a blue background",
        "negative_prompt": "",
        "n": 1,
        "size": "64x64",
        "num_inference_steps": 20,
        "guidance_scale": 4.0,
        "seed": 7,
        "scheduler": "EulerDiscreteScheduler",
        "adapters": [{"name": "pixel-art", "scale": 0.8}],
        "output_format": "png",
        "guidance_start": 0.0,
        "guidance_end": 1.0,
        "step_cache": OFF,
        "reproducible": False,
    },
    "fingerprint": "5f1d7a84c0be93a2",
    "timings": {
        "queue_s": 0.002,
        "first_step_s": 0.011,
        "encode_s": 0.006,
        "denoise_s": 0.91,
        "decode_s": 0.02,
        "total_s": 0.94,
        "batch_share": 0.5,
        "denoiser_calls": 20,
        "denoiser_calls_run": 20,
    },
}


class ImagesResponse(BaseModel):
    """The finished images."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    id: str = Field(
        description="The `X-Request-ID`. Unique, unless a caller uses one of its own again."
    )
    created: int = Field(description="Unix time in seconds.")
    model: str
    data: list[ImageData]
    output_format: Literal["png", "jpeg", "webp"]
    size: str = Field(description="`WIDTHxHEIGHT` in pixels.", examples=["64x64"])
    seed: int = Field(description="The seed used, also where it was drawn by the server.")
    parameters: Parameters
    fingerprint: str = Field(
        description="The `short` fingerprint of the model in `GET /v1/models`: where it is the "
        "same, the same parameters give the same images."
    )
    timings: Timings = Field(description="With `prompts`: of the one that was finished last.")
    ignored_fields: list[str] | None = Field(
        default=None, description="Fields that were sent and changed nothing; absent without any."
    )
    prompt_truncated: dict[str, dict[str, int]] | None = Field(
        default=None,
        description="By field (`prompt`, `negative_prompt`) and text encoder, how many tokens that "
        "one read of a longer text, which another encoder read whole; absent where all did.",
        examples=[{"prompt": {"text_encoder": 77}}],
    )


class FingerprintResponse(BaseModel):
    """What decides the bytes of an image besides its request."""

    digest: str = Field(description="SHA-256 over everything below.")
    short: str = Field(
        description="The beginning of the digest, as every response with images has it."
    )
    weights: str = Field(description="SHA-256 over the weights and the settings of components.")
    stepserve: str
    torch: str
    diffusers: str
    transformers: str
    device: str
    processor: str
    dtype: str
    row_buckets: str
    threads: int
    code: str = Field(description="What runs the denoiser: eager or compiled code.")
    step_cache: str = Field(
        description="SHA-256 over the magnitudes that `magcache` decides by; empty where the model "
        "has none."
    )


class GuidanceResponse(BaseModel):
    """How a model takes guidance, as it was seen to when it was loaded."""

    kind: GuidanceKind = Field(
        description="`classifier-free`: each step predicts with the prompt and "
        "without it; `embedded`: the scale is an input of the denoiser; `none`: there is no scale."
    )
    argument: str = Field(
        description="What `guidance_scale` is passed to the pipeline as; empty where it has none."
    )
    above: float = Field(description="Requests with a `guidance_scale` over this are guided.")
    negative_prompt: bool = Field(
        description="Whether guided requests may have a `negative_prompt`; it costs no more."
    )
    guided: StepWork
    unguided: StepWork


class ClassResponse(BaseModel):
    """One class that a model draws."""

    class_label: int
    names: list[str] = Field(description="Each is as good as the number; empty where it has none.")


class ModelResponse(BaseModel):
    """One model: OpenAI's four fields, then its limits and defaults."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    aliases: list[str] = Field(description="Other names that requests may give it.")
    description: str
    ready: bool
    detail: str = Field(description="Why the model is not ready; empty where it is.")
    sizes: SizeRange
    schedulers: list[str]
    default_scheduler: str
    default_num_inference_steps: int
    min_num_inference_steps: int = Field(description="With the default scheduler.")
    max_num_inference_steps: int = Field(description="With the default scheduler.")
    scheduler_steps: dict[str, StepRange] = Field(
        description="Of the schedulers that can do other numbers of steps than the default one."
    )
    default_guidance_scale: float
    max_guidance_scale: float
    max_n: int
    max_prompts: int = Field(
        default=MAX_LISTED,
        description="Most `prompts` of one call, and most images of them; 0, as the "
        "limits below, where no prompt is taken.",
    )
    max_prompt_characters: int
    max_prompt_tokens: int
    adapters: list[str] = Field(description="LoRA adapters that requests may name.")
    adapter_sharing: list[AdapterSharing] = Field(
        description="Of each of them, whether requests with it share forwards with those that have "
        "other adapters, or none; `shares` is null until it has been loaded once."
    )
    max_adapters: int = Field(description="Most adapters of one request.")
    ip_adapters: list[str] = Field(
        description="IP-Adapters that read the `references` of requests, the usual one first."
    )
    controls: list[Control] = Field(
        description="Controls that requests may name: networks, which are loaded when they are "
        "first used, or the model's own."
    )
    preprocessors: list[str] = Field(
        description="What can make control images of ordinary ones on this server; empty where the "
        "model has no controls."
    )
    tasks: list[Task] = Field(description="What the model does, its usual task first.")
    inputs: dict[Task, dict[Role, Count]] = Field(
        description="By task, how many inputs of each role a request brings; none of the others."
    )
    classes: list[ClassResponse] = Field(
        description="What `class_label` may say; empty where a model has no classes."
    )
    upscale_factor: int = Field(
        description="How many times larger than the image an upscaled one is; 1 where the model "
        "does not upscale."
    )
    max_noise_level: int | None = Field(
        description="Largest `noise_level` of upscaling; null where none is added."
    )
    default_noise_level: int | None = Field(
        description="`noise_level` of upscaling that says none; null where none is added."
    )
    default_image_guidance_scale: float | None = Field(
        description="`image_guidance_scale` of guided edits that say none; null where there is none"
        ", or where it is not known."
    )
    guidance: GuidanceResponse
    guidance_interval: bool = Field(
        description="Whether `guidance_start` and `guidance_end` may be set."
    )
    previews: bool = Field(
        description="Whether images can be shown on the way, as `partial_images` and `previews` "
        "ask for; responses of models that cannot name these in `ignored_fields`."
    )
    step_cache_methods: list[StepCacheMethod] = Field(
        description="What `step_cache` of a request may name; empty where no call can be skipped."
    )
    default_step_cache: StepCacheUse | None = Field(
        description="`step_cache` of requests that say none; null: no call is skipped."
    )
    safety_checker: bool = Field(
        description="Whether the model's own checker looks at images, and may withhold them."
    )
    same_bytes: bool = Field(
        description="Whether an image has the same bytes at any load, on the device at hand."
    )
    sharing_remark: str = Field(
        description="What is unusual in how requests share computation; empty where nothing is."
    )
    compilation: Compilation = Field(
        description="Whether the denoiser is compiled; eager code serves where it is not."
    )
    compilation_remark: str = Field(description="Why compilation failed; empty where it did not.")
    expected_s: float | None = Field(
        description="Seconds that a request with the defaults should take on an idle replica; null "
        "while that is not known."
    )
    load_s: float | None = Field(
        description="Seconds that loading it took; null while that is not known."
    )
    fingerprint: FingerprintResponse | None = Field(description="Null while the model is loading.")


class ModelList(BaseModel):
    """Every model that is served."""

    object: Literal["list"] = "list"
    data: list[ModelResponse]


class ProgressResponse(BaseModel):
    """Where one request stands."""

    id: str
    object: Literal["request"] = "request"
    model: str
    created: int = Field(description="Unix time in seconds.")
    state: RequestState
    position: int = Field(description="How many requests were accepted before it and still run.")
    step: int = Field(description="Denoising steps that are done.")
    steps: int
    expected_s: float | None = Field(
        description="Estimated seconds until it is finished; null where that is not known."
    )
    error: ErrorDetail | None = Field(description="Why there are no images.")
    timings: Timings | None = Field(description="Once it is finished.")
    prompts: list[ProgressResponse] | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="Of a call with `prompts`: the request for each, under a name of its own.",
    )


class BatchResponse(BaseModel):
    """What the replicas of a model are working on."""

    model: str
    replicas: list[BatchView]


class HealthResponse(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"
    version: str


class ReadyResponse(BaseModel):
    """Requests are taken, if not for every model."""

    status: Literal["ready"] = "ready"
    models: list[str] = Field(description="Those that take requests.")
    not_ready: dict[str, str] = Field(description="The others, and why they do not.")
    results: str = Field(
        description="Why no links to images can be made now; empty where they can."
    )


class ErrorResponse(BaseModel):
    """The body of every error."""

    error: ErrorDetail


def images_response(
    request: GenerationRequest,
    finished: Finished,
    data: list[ImageData],
    ignored_fields: Sequence[str] = (),
) -> ImagesResponse:
    """Return the response to `request`, dated now, with its images as `data`."""
    parameters = parameters_response(request)
    return ImagesResponse(
        id=request.id,
        created=int(time.time()),
        model=request.model,
        data=data,
        output_format=parameters.output_format,
        # Some pipelines make their own choice of sizes, by the shape of an image.
        size=next((image.size for image in finished.images if image.size), request.final_size),
        seed=request.seed,
        parameters=parameters,
        fingerprint=finished.fingerprint,
        timings=finished.timings,
        ignored_fields=list(ignored_fields) or None,
        prompt_truncated=truncation_response(finished.cut_prompts),
    )


def prompt_entries(
    request: GenerationRequest, index: int, finished: Finished, data: Sequence[ImageData]
) -> list[ImageData]:
    """Return the images of one prompt of several, with what else its own response would say."""
    update = {
        "prompt_index": index,
        "parameters": parameters_response(request),
        "fingerprint": finished.fingerprint,
        "timings": finished.timings,
        "prompt_truncated": truncation_response(finished.cut_prompts),
    }
    return [image.model_copy(update=update) for image in data]


def prompts_response(
    call: GenerationRequest,
    prompts: list[str],
    last: Finished,
    data: list[ImageData],
    ignored_fields: Sequence[str] = (),
) -> ImagesResponse:
    """Return the response to a call with several prompts.

    Args:
        call: what they have in common, and the first seed.
        last: of the prompt that was finished last.
    """
    response = images_response(call, replace(last, cut_prompts=()), data, ignored_fields)
    several = {"prompt": None, "prompts": prompts}
    return response.model_copy(
        update={"parameters": response.parameters.model_copy(update=several)}
    )


def truncation_response(cut_prompts: Sequence[CutPrompt]) -> dict[str, dict[str, int]] | None:
    """Return which text encoders read how many tokens only, by field, or None."""
    told: dict[str, dict[str, int]] = {}
    for cut in cut_prompts:
        told.setdefault(cut.field, {})[cut.encoder] = cut.limit
    return told or None


def model_response(status: ModelStatus) -> ModelResponse:
    """Return one model as the catalogue shows it."""
    told = asdict(status.capabilities) | {"ready": status.ready, "detail": status.detail}
    inputs = {task: dict(taken) for task, taken in status.capabilities.tasks.items()}
    classes = status.capabilities.classes
    told |= {"tasks": list(inputs), "inputs": inputs}
    told["classes"] = [
        {"class_label": number, "names": list(classes.names.get(number, ()))}
        for number in range(classes.count)
    ]
    told["guidance"] |= {"kind": status.capabilities.guidance.kind}
    if not any(Role.PROMPT in taken for taken in inputs.values()):
        told |= dict.fromkeys(("max_prompts", "max_prompt_characters", "max_prompt_tokens"), 0)
    fingerprint = status.capabilities.fingerprint
    if fingerprint is not None:
        told["fingerprint"] |= {"digest": fingerprint.digest, "short": fingerprint.short}
    return ModelResponse.model_validate(told)


def base64_of(image: EncodedImage) -> str:
    """An image file as JSON can hold it."""
    return b64encode(image.data).decode("ascii")


def parameters_response(request: GenerationRequest) -> Parameters:
    """Everything that shaped the images of a request."""
    told = asdict(request) | {"size": request.size, "step_cache": request.step_cache or OFF}
    for placed in ("references", "controls"):
        told[placed] = told[placed] or None
    if request.hires is not None:
        told["hires"] = {name: told["hires"][name] for name in HiresBody.model_fields}
    return Parameters.model_validate(told)


def progress_response(progress: Progress, prompts: Sequence[Progress] = ()) -> ProgressResponse:
    """Return where a request stands, as its own URL tells it.

    Args:
        prompts: where the requests for its prompts stand, if it is a call with several.
    """
    error = None if progress.error is None else error_detail(progress.error, progress.request_id)
    told = vars(progress) | {"id": progress.request_id, "error": error}
    of_prompts = [progress_response(prompt) for prompt in prompts] or None
    return ProgressResponse.model_validate(told | {"prompts": of_prompts})
