"""A resident model behind an engine: requests in, events out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from stepserve.domain.checks.limits import check_request
from stepserve.domain.errors import InvalidRequestError, RefusedError
from stepserve.domain.events import Failed
from stepserve.domain.models import ModelCapabilities
from stepserve.domain.requests import GenerationRequest, RequestKey
from stepserve.engine.loop.engine import Engine, EngineOptions
from stepserve.engine.loop.execution import Execution
from stepserve.engine.tracks.track import Track, as_stepserve_error
from stepserve.pipelines.adapters.cache import AdapterCache
from stepserve.pipelines.adapters.files import AdapterOptions
from stepserve.pipelines.controls.cache import ControlCache
from stepserve.pipelines.controls.capabilities import own_controls, with_controls
from stepserve.pipelines.controls.files import ControlOptions
from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.loading.memory import memory_bytes
from stepserve.pipelines.modules.compiling import Backend
from stepserve.pipelines.modules.wrappers import (
    describe_wrappers,
    wrap_modules,
    wrap_network,
)
from stepserve.pipelines.requests.encoding import ImageEncoder
from stepserve.pipelines.requests.input_decoding import InputDecoder, Inputs
from stepserve.pipelines.requests.trajectory import TrajectoryRoom, trajectory_of
from stepserve.pipelines.serving.compilation import compile_denoiser
from stepserve.pipelines.serving.listener import RequestListener, Sink, track_of
from stepserve.pipelines.serving.preparation import (
    DEFAULT_SHARING,
    Preparation,
    SharingOptions,
    prepare,
)

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
        controls: ControlOptions | None = None,
    ) -> None:
        options = options or EngineOptions()
        # Graphs are not made for inference mode.
        self.engine = Engine(replace(options, gradients=options.gradients or model.compiles))
        self.adapters = AdapterCache(model.pipeline, adapters or AdapterOptions())
        self.controls = ControlCache(model.pipeline, controls or ControlOptions())
        if model.compiles and self.adapters.options.any:
            raise ModelLoadError("compile and adapters cannot be combined")
        # By the model's own safety checker, since the start.
        self.images_withheld = 0
        # Diffusers walks through all modules for it.
        self._device = model.pipeline.device
        self._sharing = sharing
        limits = replace(model.capabilities, max_adapters=self.adapters.max_per_request)
        limits = with_controls(limits, model.factory, self.controls)
        self.prepared = Preparation(replace(model, capabilities=limits))
        self._encoder = ImageEncoder(options.max_pending_images)
        self._decoder = InputDecoder(self.engine)
        self.trajectory_room = TrajectoryRoom()
        self._unwrap: Callable[[], None] = lambda: None

    @property
    def model(self) -> LoadedModel:
        """The model, with the capabilities that it was seen to have."""
        return self.prepared.model

    def set_previews(self, made: bool) -> None:
        """Tell whether images can be shown on the way, as it was seen."""
        limits = replace(self.model.capabilities, previews=made)
        self.prepared = replace(self.prepared, model=replace(self.model, capabilities=limits))

    def start(self) -> None:
        """Start the engine, and find out on its thread how requests may share forwards."""
        self.engine.start(self._prepare)
        plan = self.prepared.plan
        how = ", ".join(filter(None, (plan.row_policy, plan.remark)))
        logger.info("model %s, how forwards are shared: %s", self.model.capabilities.id, how)
        self._log_wrappers()
        self.controls.log_unusable()

    def compile(self, backend: Backend = "inductor") -> ModelCapabilities:
        """Compile the denoiser, if it was loaded to be compiled, and serve it by compiled code.

        When the model is warm, as the row limit is known then, and before it serves: it takes
        seconds to minutes for each row count. Where it fails, eager code serves.

        Returns:
            What the model can do now; `compilation_remark` says why it is not compiled.
        """
        if self.model.compiles:
            model_id = self.model.capabilities.id
            logger.info("model %s: compiling, which may take minutes", model_id)
            self.engine.call(partial(self._compile, backend))
            self._log_wrappers()
        return self.capabilities()

    def capabilities(self) -> ModelCapabilities:
        """What the model can do at this moment: adapters come, sizes are found out about."""
        limits = replace(
            self.model.capabilities,
            adapters=self.adapters.names(),
            adapter_sharing=self.adapters.sharing(),
            controls=own_controls(self.model.factory) + self.controls.listed(),
            expected_s=self._usual_request_s(),
        )
        rules = self.prepared.shape_rules
        return limits if rules is None else replace(limits, same_bytes=rules.same_bytes)

    def submit(self, request: GenerationRequest, sink: Sink) -> None:
        """Accept a request, or answer at once with Failed if it is refused."""
        try:
            check_request(request, self.model.capabilities)
            cut_prompts = self.model.prompt_meter.check(request)
            self._encoder.check_room()
            factor = self.model.capabilities.upscale_factor
            inputs = Inputs(request, self.model.factory.tasks[request.task].is_fitted, factor)
            listener = RequestListener(
                request,
                sink,
                self._encoder,
                inputs,
                self._fingerprint,
                self._count_withheld,
                cut_prompts,
                trajectory_of(request, self.trajectory_room),
            )
            self.engine.submit(self._track_of(request, listener))
            self._decoder.submit(inputs)
        except (InvalidRequestError, RefusedError) as error:
            sink(Failed(request.id, error))
        except Exception as error:
            logger.exception("request %s could not be handed to the engine", request.id)
            sink(Failed(request.id, as_stepserve_error(error, request.id)))

    def estimator_of(self, key: RequestKey) -> tuple[int, float] | None:
        """Pending requests that came before this one, and seconds until it should end, or None."""
        return self.engine.estimator_of(key)

    def memory_bytes(self) -> dict[str, int]:
        """Memory that the model's device holds, by kind."""
        kinds = memory_bytes(self._device)
        if self.controls.tasks:
            kinds["controls"] = self.controls.memory_bytes()
        if self.adapters.options.any:
            kinds["adapters"] = self.adapters.memory_bytes()
        return kinds

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
        self.prepared = prepare(self.model, self.engine, self.adapters, self._sharing)
        self._unwrap = wrap_modules(self.model.pipeline, self.prepared.wrappers)
        self.controls.park = partial(wrap_network, wrappers=self.prepared.wrappers)
        return self.prepared.execution

    def _track_of(self, request: GenerationRequest, listener: RequestListener) -> Track:
        return track_of(self.model, self.adapters, self.controls, request, listener)

    def _compile(self, backend: Backend) -> None:
        """On the engine's thread, while no request is in flight."""
        self._unwrap()
        self.prepared = compile_denoiser(self.prepared, self.engine.row_limit, backend)
        self._unwrap = wrap_modules(self.model.pipeline, self.prepared.wrappers)

    def _log_wrappers(self) -> None:
        wrappers = describe_wrappers(self.model.pipeline)
        logger.info("model %s, wrappers of its modules: %s", self.model.capabilities.id, wrappers)

    def _count_withheld(self, images: int) -> None:
        """On the engine's thread."""
        self.images_withheld += images

    def _usual_request_s(self) -> float | None:
        """Seconds that a request with the defaults should take on an idle replica."""
        limits = self.model.capabilities
        usual = replace(limits.usual_request("usual"), step_cache=limits.default_step_cache)
        listener = RequestListener(usual, lambda event: None, self._encoder, Inputs(usual))
        track = self._track_of(usual, listener)
        return self.engine.serial_s(track) or None

    def _fingerprint(self) -> str:
        fingerprint = self.model.capabilities.fingerprint
        return "" if fingerprint is None else fingerprint.short
