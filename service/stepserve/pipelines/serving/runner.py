"""A resident model behind an engine: requests in, events out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image

from stepserve.domain.errors import ContentFilteredError, InvalidRequestError, RefusedError
from stepserve.domain.events import (
    Accepted,
    CutPrompt,
    Event,
    Failed,
    Finished,
    Preview,
    Started,
    StepFinished,
)
from stepserve.domain.guidance import Guidance
from stepserve.domain.limits import check_request
from stepserve.domain.models import ModelCapabilities
from stepserve.domain.reports import BatchView
from stepserve.domain.requests import GenerationRequest, RequestKey
from stepserve.domain.timings import Timings
from stepserve.engine.loop.engine import Engine, EngineOptions
from stepserve.engine.loop.side_stream import CudaSideStream
from stepserve.engine.loop.timing import timing_for
from stepserve.engine.tracks.listener import tell
from stepserve.engine.tracks.track import Work, as_stepserve_error
from stepserve.pipelines.adapters.cache import AdapterCache
from stepserve.pipelines.adapters.files import AdapterOptions
from stepserve.pipelines.copies.guidance_interval import narrow_to_interval
from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.loading.memory import memory_bytes
from stepserve.pipelines.modules.attach import PROMPTS_BYTES, ParkingOptions, attach
from stepserve.pipelines.modules.compiling import row_buckets
from stepserve.pipelines.modules.cuda_graphs import CudaRecorder, GraphedForward, graph_denoisers
from stepserve.pipelines.modules.third_party.pinned_noise import can_keep_on_host
from stepserve.pipelines.probing.guidance_cost import settle_guidance
from stepserve.pipelines.probing.probe_requests import make_probe_requests
from stepserve.pipelines.probing.probed_tasks import limited_to_pipeline, tried_offer
from stepserve.pipelines.probing.shape_rules import SizeRules
from stepserve.pipelines.probing.sharing_check import Trial
from stepserve.pipelines.probing.sharing_plan import SharingPlan, plan_sharing
from stepserve.pipelines.probing.vae_batching import decoding_rules
from stepserve.pipelines.requests.call import denoiser_calls, make_images
from stepserve.pipelines.requests.encoding import ImageEncoder, Telling
from stepserve.pipelines.requests.images import encode_image, encode_preview
from stepserve.pipelines.requests.input_decoding import InputDecoder, Inputs
from stepserve.pipelines.serving.denoiser_code import Code, DenoiserCode

logger = logging.getLogger(__name__)

Sink = Callable[[Event], None]
Images = Sequence[Image.Image | None]
"""None in place of one that the pipeline's own safety checker withheld."""


@dataclass(frozen=True)
class SharingOptions:
    """What an operator decides about how requests share forwards.

    Args:
        fixed_rows: where images would else depend on the load in their last bits, fill forwards
            up to one row count if that cures it.
        prompt_cache_bytes: how much is kept of each text encoder's outputs.
        plan: made before; None makes one when the engine starts.
    """

    fixed_rows: bool = True
    prompt_cache_bytes: int = PROMPTS_BYTES
    plan: SharingPlan | None = None


DEFAULT_SHARING = SharingOptions()


@dataclass(frozen=True)
class RequestListener:
    """Turns what the engine says about one request into events for its sink."""

    request: GenerationRequest
    sink: Sink
    encoder: ImageEncoder
    inputs: Inputs
    fingerprint: Callable[[], str] = str
    withheld: Callable[[int], None] = lambda images: None
    cut_prompts: tuple[CutPrompt, ...] = ()

    def accepted(self, position: int, expected_s: float) -> None:
        """The request was let in. Told once its images are known to be fine."""
        self.inputs.then(partial(self.sink, Accepted(self.request.id, position, expected_s)))

    def started(self) -> None:
        """The pipeline call begins."""
        self.sink(Started(self.request.id))

    def step_ended(self, step: int, steps: int) -> None:
        """The pipeline call got one step further. Called inside it, where raising would end it."""
        tell(self.request.id, self.sink, StepFinished(self.request.id, step, steps))

    def predicted(self, index: int, step: int, steps: int, images: Images) -> None:
        """What the images will roughly be. Called inside the pipeline call, as `step_ended` is.

        Previews and the images themselves are encoded by one thread, so they stay in order.
        """
        encode = partial(self._encode_preview, index, step, steps, images)
        tell(self.request.id, self.encoder.submit, len(images), encode)

    def finished(self, result: Images, timings: Timings) -> None:
        """Encode off the engine thread: the next forward must not wait for it."""
        self.withheld(sum(image is None for image in result))
        try:
            self.encoder.submit(len(result), partial(self._encode, result, timings))
        except RuntimeError as error:
            # The interpreter is shutting down.
            self.failed(error, timings)

    def failed(self, error: BaseException, timings: Timings) -> None:
        """Cancelled, or the pipeline raised, or an image cannot be read."""
        self.inputs.forget()
        if isinstance(error, ContentFilteredError):
            self.withheld(self.request.n)
        self.sink(Failed(self.request.id, as_stepserve_error(error, self.request.id)))

    def _encode_preview(self, index: int, step: int, steps: int, images: Images) -> Telling:
        files = tuple(encode_preview(image, self.request, i) for i, image in enumerate(images))
        preview = Preview(self.request.id, index, step, steps, files)
        return partial(tell, self.request.id, self.sink, preview)

    def _encode(self, images: Images, timings: Timings) -> Telling:
        try:
            encoded = tuple(encode_image(image, self.request, i) for i, image in enumerate(images))
            finished = Finished(
                self.request.id, encoded, timings, self.fingerprint(), self.cut_prompts
            )
        except Exception as error:
            return partial(tell, self.request.id, self.failed, error, timings)
        return partial(tell, self.request.id, self.sink, finished)


class PipelineRunner:
    """Serves one model: every submitted request gets exactly one Finished or Failed event.

    Sinks are called on the submitting thread (Accepted, or Failed if refused) and then on the
    engine's threads: they must return quickly. What they raise there is logged and ignored.

    Raises:
        ModelLoadError: the model was loaded to be compiled, which excludes adapters.
    """

    def __init__(
        self,
        model: LoadedModel,
        options: EngineOptions | None = None,
        adapters: AdapterOptions | None = None,
        sharing: SharingOptions = DEFAULT_SHARING,
    ) -> None:
        self.model = model
        # Diffusers walks through all modules to tell.
        self._device = model.pipeline.device
        # Graphs are not made for inference mode.
        compiled = model.denoiser_forward is not None
        options = options or EngineOptions()
        self.engine = Engine(replace(options, gradients=options.gradients or compiled))
        self.adapters = AdapterCache(model.pipeline, adapters or AdapterOptions())
        self.plan = SharingPlan()
        # By the model's own safety checker, since the start.
        self.images_withheld = 0
        self._sharing = sharing
        self._limits = replace(model.capabilities, max_adapters=self.adapters.max_per_request)
        self._encoder = ImageEncoder(options.max_pending_images)
        self._decoder = InputDecoder(self.engine)
        self._threads = 0
        self.denoiser_code: DenoiserCode | None = None
        self.graphs: list[GraphedForward] = []
        self.size_rules: SizeRules | None = None
        if model.denoiser_forward is not None:
            if self.adapters.options.any:
                raise ModelLoadError("compile and adapters cannot be combined")
            self.denoiser_code = DenoiserCode(model.pipeline, model.denoiser_forward, self.engine)
        self._detach: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Start the engine, and find out on its thread how requests may share forwards."""
        self.engine.start(self._settle_plan)
        plan, fingerprint = self.plan, self._limits.fingerprint
        if fingerprint is not None:
            fingerprint = replace(fingerprint, row_buckets=plan.row_policy, threads=self._threads)
        self._limits = replace(
            self._limits,
            fingerprint=fingerprint,
            same_bytes=plan.same_bytes,
            sharing_remark=plan.remark,
        )
        how = ", ".join(filter(None, (plan.row_policy, plan.remark)))
        logger.info("model %s, how forwards are shared: %s", self.model.capabilities.id, how)

    def capabilities(self) -> ModelCapabilities:
        """What the model can do at this moment: adapters come, and compiled code does."""
        limits = replace(
            self._limits, adapters=self.adapters.names(), expected_s=self._usual_request_s()
        )
        if self.size_rules is not None:
            limits = replace(limits, same_bytes=self.size_rules.same_bytes)
        return limits if self.denoiser_code is None else _with_code(limits, self.denoiser_code)

    @property
    def guidance(self) -> Guidance:
        """How the model takes guidance, as it was seen to."""
        return self._limits.guidance

    def start_compiling(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile the denoiser in the background, if it was loaded to be compiled.

        Only when the model is warm: then the row limit is known.
        """
        if self.denoiser_code is not None:
            self.denoiser_code.start_compiling(self.plan, backend)

    def wait_until_compiled(self, timeout_s: float | None = None) -> ModelCapabilities:
        """Wait until the compilation has ended, well or not, or until the time is over."""
        if self.denoiser_code is not None:
            self.denoiser_code.wait(timeout_s)
        return self.capabilities()

    def submit(self, request: GenerationRequest, sink: Sink) -> None:
        """Accept a request, or answer at once with Failed if it is refused."""
        try:
            check_request(request, self._limits)
            cut_prompts = self.model.prompt_meter.check(request)
            self._encoder.check_room()
            inputs = Inputs(request)
            self.engine.submit(self._work(request, sink, inputs, cut_prompts))
            self._decoder.submit(inputs)
        except (InvalidRequestError, RefusedError) as error:
            sink(Failed(request.id, error))
        except Exception as error:
            logger.exception("request %s could not be handed to the engine", request.id)
            sink(Failed(request.id, as_stepserve_error(error, request.id)))

    def estimator_of(self, key: RequestKey) -> tuple[int, float] | None:
        """Requests in hand that came before this one, and seconds until it should end, or None."""
        return self.engine.estimator_of(key)

    def view(self, owner: str = "") -> BatchView:
        """The batch as `owner` may see it: without the ids of others."""
        return self.engine.batcher.view(owner)

    def memory_bytes(self) -> dict[str, int]:
        """Memory that the model's device holds, by kind."""
        return memory_bytes(self._device)

    def cancel(self, key: RequestKey) -> None:
        """End a request at its next park."""
        self.engine.cancel(key)

    def stop(self, drain_s: float = 0.0) -> None:
        """Finish what is in hand within `drain_s` seconds, cancel the rest, and end."""
        if self.denoiser_code is not None:
            self.denoiser_code.stop()
        self.engine.stop(drain_s)
        self._decoder.stop()
        self._encoder.shutdown()
        self._detach()
        self.adapters.close()

    def _settle_plan(self) -> None:
        # Here, as it is the engine thread's own number that counts.
        device = self._device
        self._threads = torch.get_num_threads() if device.type == "cpu" else 0
        self.engine.batcher.start_timing = timing_for(device)
        pipeline, ceiling = self.model.pipeline, self.engine.options.row_ceiling
        if self._sharing.plan is None:
            self._settle_capabilities()
        trials = make_probe_requests(self.model, self._limits.tasks)
        buckets = row_buckets(ceiling) if self.denoiser_code else ()
        self.plan = self._sharing.plan or plan_sharing(
            pipeline, trials, ceiling, self._sharing.fixed_rows, buckets
        )
        if self.denoiser_code is not None:
            self.plan = self.denoiser_code.examine(self.plan, trials, ceiling)
        elif self.plan.same_bytes and not self.plan.alone:
            self._adjust_calls(trials[0])
        if can_keep_on_host(pipeline, device) and not self.plan.alone:
            self.engine.batcher.aside = CudaSideStream()
        # Adapters change modules, and a graph is of a module as it was.
        if self.model.cuda_graphs and not (self.adapters.options.any or self.plan.alone):
            self.graphs = graph_denoisers(pipeline, self.plan.inline, CudaRecorder())
        parking = self.plan.parking(
            ParkingOptions(
                max_rows=ceiling,
                prompt_cache_bytes=self._sharing.prompt_cache_bytes,
                enter=self.denoiser_code.enter() if self.denoiser_code else self.adapters.enter(),
            )
        )
        self.engine.batcher.one_at_a_time = self.plan.alone
        self.engine.row_ceiling = parking.max_rows
        if not self.plan.has_one_row_count:
            self.engine.limit_rows(parking.max_rows)
        self._detach = attach(pipeline, parking)

    def _settle_capabilities(self) -> None:
        """Tell what holds, not what the pipeline seems to offer."""
        self._change_capabilities(limited_to_pipeline(self.model))
        self._change_capabilities(settle_guidance(self.model).capabilities)
        offer = tried_offer(self.model)
        self._limits = replace(self._limits, tasks=offer.tasks, sizes=offer.sizes)

    def _change_capabilities(self, capabilities: ModelCapabilities) -> None:
        self.model = replace(self.model, capabilities=capabilities)
        self._limits = replace(capabilities, max_adapters=self.adapters.max_per_request)

    def _adjust_calls(self, trial: Trial) -> None:
        """Give calls the rows that keep their bits, where these are not the same for all."""
        pipeline, batcher = self.model.pipeline, self.engine.batcher
        if self._device.type != "cpu":
            self.size_rules = SizeRules(lambda: self.engine.row_limit, self._sharing.fixed_rows)
            batcher.adjust = self.size_rules
        # A plan that was given is to be kept to, untried.
        elif self._sharing.plan is None:
            rules = decoding_rules(pipeline, trial, self.plan)
            batcher.adjust = rules if rules.rows else None

    def _work(
        self,
        request: GenerationRequest,
        sink: Sink,
        inputs: Inputs,
        cut_prompts: tuple[CutPrompt, ...] = (),
    ) -> Work:
        code = self.denoiser_code.in_use if self.denoiser_code else None
        fingerprint = partial(self._fingerprint, code)
        withheld = self._note_withheld
        listener = RequestListener(
            request, sink, self._encoder, inputs, fingerprint, withheld, cut_prompts
        )
        calls = denoiser_calls(self.model, request)
        variant = self.adapters.resolve(request.adapters)

        def make() -> Images:
            steps, previews = listener.step_ended, listener.predicted
            return make_images(self.model, request, inputs.images, steps, previews)

        guidance = self.guidance
        return Work(
            id=request.id,
            rows=guidance.rows_of(request),
            steps=guidance.calls_of(request, calls),
            images=request.n,
            run=partial(self.adapters.run_with, variant, make),
            listener=listener,
            # Compared at every tick, and an enumeration's members are slow at that.
            priority=int(request.priority),
            deadline_s=request.deadline_s,
            isolated=request.reproducible,
            size=(request.width, request.height),
            variant=code or variant,
            narrowing=narrow_to_interval(guidance, request, calls),
            owner=request.owner,
            held=inputs.are_needed,
        )

    def _note_withheld(self, images: int) -> None:
        """On the engine's thread."""
        self.images_withheld += images

    def _usual_request_s(self) -> float | None:
        """Seconds that a request with the defaults should take on an idle replica."""
        limits = self._limits
        usual = GenerationRequest(
            id="usual",
            model=limits.id,
            prompt="",
            width=limits.sizes.native,
            height=limits.sizes.native,
            num_inference_steps=limits.default_num_inference_steps,
            guidance_scale=limits.default_guidance_scale,
            seed=0,
            scheduler=limits.default_scheduler,
        )
        return self.engine.serial_s(self._work(usual, lambda event: None, Inputs(usual))) or None

    def _fingerprint(self, code: Code | None) -> str:
        """Of an image that was made since `code` was in use; None without a choice of code."""
        fingerprint = self._limits.fingerprint
        if fingerprint is None:
            return ""
        if self.denoiser_code is None or code is None:
            return fingerprint.short
        return replace(fingerprint, code=self.denoiser_code.outcome(code).value).short


def _with_code(limits: ModelCapabilities, code: DenoiserCode) -> ModelCapabilities:
    """What is to be told of a model whose denoiser is, or will be, compiled."""
    in_use = code.in_use
    limits = replace(limits, compilation=code.state, compilation_remark=code.remark)
    if limits.fingerprint is not None:
        limits = replace(limits, fingerprint=replace(limits.fingerprint, code=in_use.value))
    return limits if in_use is Code.EAGER else replace(limits, same_bytes=code.same_bytes)
