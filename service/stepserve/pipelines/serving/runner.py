"""A resident model behind an engine: requests in, events out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from stepserve.domain.errors import InvalidRequestError, RefusedError
from stepserve.domain.events import Failed
from stepserve.domain.guidance import Guidance
from stepserve.domain.limits import check_request
from stepserve.domain.models import Compilation, ModelCapabilities
from stepserve.domain.reports import BatchView
from stepserve.domain.requests import GenerationRequest, RequestKey
from stepserve.engine.loop.engine import Engine, EngineOptions
from stepserve.engine.loop.execution import Execution
from stepserve.engine.tracks.track import as_stepserve_error
from stepserve.pipelines.adapters.cache import AdapterCache
from stepserve.pipelines.adapters.files import AdapterOptions
from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.loading.memory import memory_bytes
from stepserve.pipelines.modules.compiling import Backend
from stepserve.pipelines.modules.cuda_graphs import GraphedForward
from stepserve.pipelines.modules.wrappers import (
    Wrappers,
    describe_wrappers,
    graphs_of,
    wrap_modules,
)
from stepserve.pipelines.probing.sharing_plan import SharingPlan
from stepserve.pipelines.requests.encoding import ImageEncoder
from stepserve.pipelines.requests.input_decoding import InputDecoder, Inputs
from stepserve.pipelines.serving.compilation import compile_denoiser
from stepserve.pipelines.serving.listener import RequestListener, Sink
from stepserve.pipelines.serving.preparation import (
    DEFAULT_SHARING,
    Preparation,
    SharingOptions,
    prepare,
)
from stepserve.pipelines.serving.track import track_of

logger = logging.getLogger(__name__)


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
        options = options or EngineOptions()
        # Graphs are not made for inference mode.
        self.engine = Engine(replace(options, gradients=options.gradients or model.compiles))
        self.adapters = AdapterCache(model.pipeline, adapters or AdapterOptions())
        if model.compiles and self.adapters.options.any:
            raise ModelLoadError("compile and adapters cannot be combined")
        # By the model's own safety checker, since the start.
        self.images_withheld = 0
        # Diffusers walks through all modules for it.
        self._device = model.pipeline.device
        self._sharing = sharing
        self._prepared = Preparation(model, SharingPlan(), Wrappers())
        self._limits = self._limits_of(self._prepared)
        self._encoder = ImageEncoder(options.max_pending_images)
        self._decoder = InputDecoder(self.engine)
        self._unwrap: Callable[[], None] = lambda: None

    @property
    def model(self) -> LoadedModel:
        """The model, with the capabilities that it was seen to have."""
        return self._prepared.model

    @property
    def plan(self) -> SharingPlan:
        """How forwards are shared."""
        return self._prepared.plan

    @property
    def graphs(self) -> tuple[GraphedForward, ...]:
        """The forwards that record CUDA graphs."""
        return graphs_of(self.model.pipeline)

    @property
    def guidance(self) -> Guidance:
        """How the model takes guidance, as it was seen to."""
        return self._limits.guidance

    def start(self) -> None:
        """Start the engine, and find out on its thread how requests may share forwards."""
        self.engine.start(self._prepare)
        plan, model_id = self.plan, self._limits.id
        how = ", ".join(filter(None, (plan.row_policy, plan.remark)))
        logger.info("model %s, how forwards are shared: %s", model_id, how)
        self._log_wrappers()

    def compile(self, backend: Backend = "inductor") -> ModelCapabilities:
        """Compile the denoiser, if it was loaded to be compiled, and serve it by compiled code.

        When the model is warm, as the row limit is known then, and before it serves: it takes
        seconds to minutes for each row count. Where it fails, eager code serves.

        Returns:
            What the model can do now; `compilation_remark` says why it is not compiled.
        """
        if self.model.compiles:
            logger.info("model %s: compiling, which may take minutes", self._limits.id)
            self.engine.call(partial(self._compile, backend))
            self._log_wrappers()
        return self.capabilities()

    def capabilities(self) -> ModelCapabilities:
        """What the model can do at this moment: adapters come, sizes are found out about."""
        limits = replace(
            self._limits, adapters=self.adapters.names(), expected_s=self._usual_request_s()
        )
        rules = self._prepared.shape_rules
        return limits if rules is None else replace(limits, same_bytes=rules.same_bytes)

    def submit(self, request: GenerationRequest, sink: Sink) -> None:
        """Accept a request, or answer at once with Failed if it is refused."""
        try:
            check_request(request, self._limits)
            cut_prompts = self.model.prompt_meter.check(request)
            self._encoder.check_room()
            inputs = Inputs(request)
            listener = RequestListener(
                request,
                sink,
                self._encoder,
                inputs,
                self._fingerprint,
                self._count_withheld,
                cut_prompts,
            )
            self.engine.submit(track_of(self.model, self.adapters, request, listener))
            self._decoder.submit(inputs)
        except (InvalidRequestError, RefusedError) as error:
            sink(Failed(request.id, error))
        except Exception as error:
            logger.exception("request %s could not be handed to the engine", request.id)
            sink(Failed(request.id, as_stepserve_error(error, request.id)))

    def estimator_of(self, key: RequestKey) -> tuple[int, float] | None:
        """Pending requests that came before this one, and seconds until it should end, or None."""
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
        """Finish what is in flight within `drain_s` seconds, cancel the rest, and end."""
        self.engine.stop(drain_s)
        self._decoder.stop()
        self._encoder.shutdown()
        self._unwrap()
        self.adapters.close()

    def _prepare(self) -> Execution:
        """On the engine's thread."""
        self._prepared = prepare(self.model, self.engine, self.adapters, self._sharing)
        self._limits = self._limits_of(self._prepared)
        self._unwrap = wrap_modules(self.model.pipeline, self._prepared.wrappers)
        return self._prepared.execution

    def _compile(self, backend: Backend) -> None:
        """On the engine's thread, while no request is in flight."""
        prepared = self._prepared
        self._unwrap()
        compiled = compile_denoiser(
            self.model.pipeline, prepared.plan, prepared.probes, self.engine.row_limit, backend
        )
        wrappers = replace(prepared.wrappers, compiled=compiled.forwards)
        self._unwrap = wrap_modules(self.model.pipeline, wrappers)
        limits = replace(
            self._limits, compilation=compiled.state, compilation_remark=compiled.remark
        )
        if compiled.state is Compilation.COMPILED:
            limits = replace(limits, same_bytes=compiled.same_bytes)
            if limits.fingerprint is not None:
                limits = replace(limits, fingerprint=replace(limits.fingerprint, code="compiled"))
        self._limits = limits

    def _limits_of(self, prepared: Preparation) -> ModelCapabilities:
        plan, capabilities = prepared.plan, prepared.model.capabilities
        fingerprint = capabilities.fingerprint
        if fingerprint is not None:
            fingerprint = replace(
                fingerprint, row_buckets=plan.row_policy, threads=prepared.threads
            )
        return replace(
            capabilities,
            max_adapters=self.adapters.max_per_request,
            fingerprint=fingerprint,
            same_bytes=plan.same_bytes,
            sharing_remark=plan.remark,
        )

    def _log_wrappers(self) -> None:
        wrappers = describe_wrappers(self.model.pipeline)
        logger.info("model %s, wrappers of its modules: %s", self._limits.id, wrappers)

    def _count_withheld(self, images: int) -> None:
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
        listener = RequestListener(usual, lambda event: None, self._encoder, Inputs(usual))
        track = track_of(self.model, self.adapters, usual, listener)
        return self.engine.serial_s(track) or None

    def _fingerprint(self) -> str:
        fingerprint = self._limits.fingerprint
        return "" if fingerprint is None else fingerprint.short
