"""A replica's metrics and traces, once a second."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray import serve
from ray.serve.exceptions import RayServeException

from stepserve import __version__
from stepserve.ray_serve.ray_instruments import RayInstruments
from stepserve.telemetry import catalogue
from stepserve.telemetry.engine_metrics import EngineMetrics, Gauges, Totals
from stepserve.telemetry.flusher import Flusher

if TYPE_CHECKING:
    from stepserve.pipelines.serving.runner import PipelineRunner
    from stepserve.telemetry.request_traces import RequestTraces


class ReplicaMetrics:
    """Watches a warm runner from now on.

    Args:
        load_s: seconds that it took to become warm.
        traces: hears of forwards as well, and makes spans of them; None where nothing is traced.
    """

    def __init__(
        self,
        runner: PipelineRunner,
        model_id: str,
        load_s: float,
        traces: RequestTraces | None = None,
    ) -> None:
        self._runner = runner
        self._load_s = load_s
        self._instruments = RayInstruments()
        self._metrics = EngineMetrics(self._instruments, model_id, replica_name())
        self._traces = traces
        self._flusher = Flusher(self._flush)

    def start(self) -> None:
        """Begin. What warmed the replica up is not counted."""
        self._runner.engine.observe(self._metrics)
        if self._traces is not None:
            self._runner.engine.observe(self._traces)
        self._metrics.started(self._totals())
        self._flusher.start()

    def stop(self) -> None:
        """Record what is left, and end."""
        self._flusher.stop()
        if self._traces is not None:
            self._traces.close()

    def _flush(self) -> None:
        self._metrics.flush(self._totals(), self._gauges())
        labels = {"version": __version__, "process": "replica"}
        self._instruments.set(catalogue.BUILD, 1, labels)
        if self._traces is not None:
            self._traces.flush()

    def _totals(self) -> Totals:
        counters = self._runner.engine.counters
        withheld = self._runner.images_withheld
        return Totals(counters.retries, counters.out_of_memory, counters.busy_s, withheld)

    def _gauges(self) -> Gauges:
        engine = self._runner.engine
        load = engine.load()
        return Gauges(
            backlog_s=load.backlog_s,
            requests=load.requests,
            images=load.images,
            image_limit=engine.options.max_pending_images,
            row_limit=engine.row_limit,
            load_s=self._load_s,
            memory_bytes=self._runner.memory_bytes(),
        )


def open_request_traces() -> RequestTraces | None:
    """What makes spans of this replica's requests; None where nothing is to be traced."""
    from stepserve.telemetry.request_traces import RequestTraces
    from stepserve.telemetry.tracing import open_traces

    replica = replica_name()
    provider = open_traces(replica)
    return None if provider is None else RequestTraces(provider, {"stepserve.replica": replica})


def replica_name() -> str:
    """The name of this replica, unique in its deployment."""
    try:
        name: str = serve.get_replica_context().replica_id.unique_id
    except RayServeException:
        return "local"
    return name
