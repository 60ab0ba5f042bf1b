"""A model that is compiled while it serves, with quick backends of torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event as Flag
from typing import Any

import pytest
import torch
from stepserve.config import SpeedSettings
from stepserve.domain.events import Event, Failed, Finished, StepFinished
from stepserve.domain.models import Compilation
from stepserve.domain.requests import RequestKey
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.adapters.files import AdapterOptions
from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.loading.folders import LoadedModel, load_model
from stepserve.pipelines.probing.sharing_plan import SharingPlan
from stepserve.pipelines.serving.denoiser_code import Code
from stepserve.pipelines.serving.runner import PipelineRunner, SharingOptions
from tiny_model import UNTRIED, Inbox, a_request, pixels

Graph = Callable[..., Any]
# The compiling thread steps back behind all others, and a busy machine has many.
WAIT_S = 600
STEP_S = 0.2
MAX_ROWS = 4
BUCKETS = (2, 4)
# One graph: quicker, where a test is not about their number.
ONE_GRAPH = SharingOptions(plan=SharingPlan(filled_rows=(4,)))

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Dynamo detected")


@pytest.fixture
def model(tiny_folder: Path) -> LoadedModel:
    torch._dynamo.reset()
    return load_model("tiny", tiny_folder, "float32", "cpu", SpeedSettings(compile=True))


@contextmanager
def serving(
    model: LoadedModel, sharing: SharingOptions = UNTRIED, max_rows: int = MAX_ROWS
) -> Iterator[PipelineRunner]:
    runner = PipelineRunner(model, EngineOptions(max_rows=max_rows, threads=1), sharing=sharing)
    runner.start()
    try:
        yield runner
    finally:
        runner.stop()


def make(runner: PipelineRunner, **changes: Any) -> Finished:
    inbox = Inbox()
    runner.submit(a_request(**changes), inbox)
    finished = inbox.wait()
    assert isinstance(finished, Finished), finished
    return finished


def in_use(model: LoadedModel) -> str:
    assert model.denoiser_forward is not None
    return model.denoiser_forward.in_use


def told_fingerprint(runner: PipelineRunner) -> str:
    fingerprint = runner.capabilities().fingerprint
    assert fingerprint is not None
    return fingerprint.short


class Backend:
    """Runs graphs as they are, says how many rows each has, and can be held up."""

    def __init__(self, held_at: int | None = None) -> None:
        self.graphs = 0
        self.rows: list[int] = []
        self.reached, self.go_on = Flag(), Flag()
        self._held_at = held_at

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Graph:
        self.graphs += 1
        if self.graphs == self._held_at:
            self.reached.set()
            assert self.go_on.wait(WAIT_S)
        return self.compiled(graph)

    def compiled(self, graph: torch.fx.GraphModule) -> Graph:
        def run(*args: Any) -> Any:
            outputs = graph(*args)
            self.rows.append(len(outputs[0]))
            return outputs

        return run


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_images_stay_and_fingerprints_change_with_the_code(
    model: LoadedModel, backend: str
) -> None:
    with serving(model) as runner:
        before, told_before = make(runner), runner.capabilities()
        assert told_before.compilation is Compilation.COMPILING
        assert told_before.compilation_remark == "begins when the model is warm"
        assert before.fingerprint == told_fingerprint(runner)

        runner.start_compiling(backend)
        told = runner.wait_until_compiled(WAIT_S)
        after = make(runner)
        assert (told.compilation, told.compilation_remark) == (Compilation.COMPILED, "")
        assert told.fingerprint is not None
        # No class of ours: the door reads it without importing torch.
        assert (told.fingerprint.code, type(told.fingerprint.code)) == ("compiled", str)
        assert told.fingerprint.row_buckets == "filled up to 2, 4 rows"
        assert after.fingerprint == told.fingerprint.short != before.fingerprint
        assert pixels(after.images[0].data) == pixels(before.images[0].data)


def test_eager_code_serves_until_the_last_graph_is_ready(model: LoadedModel) -> None:
    backend = Backend(held_at=len(BUCKETS))
    with serving(model) as runner:
        eager = told_fingerprint(runner)
        runner.start_compiling(backend)
        assert backend.reached.wait(WAIT_S)
        assert make(runner).fingerprint == eager
        assert backend.rows == list(BUCKETS[:-1]), "compiling runs each graph once"
        told = runner.capabilities()
        assert told.compilation is Compilation.COMPILING
        assert told.compilation_remark == "1 of 2 graphs are ready"
        backend.go_on.set()
        assert runner.wait_until_compiled(WAIT_S).compilation is Compilation.COMPILED
    assert backend.graphs == len(BUCKETS)


def test_no_image_is_made_by_both_codes(model: LoadedModel) -> None:
    """Requests are at work while the code changes, and share no forward with a later one."""
    steps: list[tuple[str, str]] = []
    begun, changed = Flag(), Flag()
    inboxes = {name: Inbox() for name in ("early", "late")}

    def sink(event: Event) -> None:
        # Told inside the call that the forward before this was for.
        if isinstance(event, StepFinished):
            steps.append((event.request_id, in_use(model)))
            begun.set()
            # Else the early one is done before the compiling thread, which steps back, gets on.
            changed.wait(STEP_S)
        inboxes[event.request_id](event)

    backend = Backend(held_at=len(BUCKETS))
    with serving(model) as runner:
        eager = told_fingerprint(runner)
        runner.start_compiling(backend)
        assert backend.reached.wait(WAIT_S)
        runner.submit(a_request(id="early", num_inference_steps=1000), sink)
        assert begun.wait(WAIT_S)
        backend.go_on.set()
        runner.wait_until_compiled(WAIT_S)
        runner.submit(a_request(id="late", num_inference_steps=5), sink)
        late = inboxes["late"].wait()
        changed.set()
        compiled = told_fingerprint(runner)
        early = inboxes["early"].wait()
    assert isinstance(early, Finished)
    assert isinstance(late, Finished)
    assert (early.fingerprint, late.fingerprint) == (eager, compiled)
    assert set(steps) == {("early", "eager"), ("late", "compiled")}
    assert steps.index(("late", "compiled")) > 0
    assert steps[-1] == ("early", "eager"), "the early one went on beside the late one"


def test_forwards_get_the_rows_of_a_bucket_whichever_code_runs_them(model: LoadedModel) -> None:
    forward, rows = model.denoiser_forward, list[int]()
    assert forward is not None
    hook = forward.module.conv_in.register_forward_pre_hook(  # type: ignore[union-attr,operator]
        lambda module, args: rows.append(len(args[0]))
    )
    with serving(model) as runner:
        rows.clear()
        make(runner, n=3, guidance_scale=0.0)
        assert set(rows) == {4}
        hook.remove()
        backend = Backend()
        runner.start_compiling(backend)
        runner.wait_until_compiled(WAIT_S)
        backend.rows.clear()
        make(runner, n=3, guidance_scale=0.0)
        make(runner, n=1, guidance_scale=0.0)
        assert set(backend.rows) == {4, 2}
        assert runner.engine.counters.padded_rows > 0
        # Larger than any shared forward, and of another size: eager code, at every load.
        backend.rows.clear()
        make(runner, n=3)
        make(runner, width=80)
        assert backend.rows == []


def test_isolated_requests_use_the_code_of_their_time(model: LoadedModel) -> None:
    with serving(model, ONE_GRAPH) as runner:
        runner.start_compiling("eager")
        runner.wait_until_compiled(WAIT_S)
        assert make(runner, reproducible=True).fingerprint == told_fingerprint(runner)
        assert in_use(model) == "compiled"


def test_a_failure_leaves_eager_code_on_and_says_why(model: LoadedModel) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Any]) -> Graph:
        raise ValueError("no C++ compiler")

    with serving(model, ONE_GRAPH) as runner:
        eager = told_fingerprint(runner)
        runner.start_compiling(broken)
        told = runner.wait_until_compiled(WAIT_S)
        assert told.compilation is Compilation.FAILED
        # What torch says stays in the log.
        assert (
            told.compilation_remark
            == "torch.compile failed (BackendCompilerFailed); the log says why"
        )
        assert make(runner).fingerprint == told_fingerprint(runner) == eager


def test_a_graph_that_does_not_fit_the_engine_is_found_out_before_anyone_gets_it(
    model: LoadedModel,
) -> None:
    with serving(model, ONE_GRAPH) as runner:
        runner.engine.call(lambda: torch.set_num_threads(2))
        runner.start_compiling("eager")
        told = runner.wait_until_compiled(WAIT_S)
        assert told.compilation is Compilation.FAILED
        assert told.compilation_remark == "torch.compile failed (RuntimeError); the log says why"
        assert make(runner).fingerprint == told_fingerprint(runner)
        assert in_use(model) == "eager"


def test_graphs_that_stop_fitting_are_told_by_a_fingerprint_of_its_own(model: LoadedModel) -> None:
    with serving(model, ONE_GRAPH) as runner:
        eager = told_fingerprint(runner)
        runner.start_compiling("eager")
        runner.wait_until_compiled(WAIT_S)
        compiled = told_fingerprint(runner)
        runner.engine.call(lambda: torch.set_num_threads(2))
        caught = make(runner)
        assert caught.fingerprint not in (eager, compiled)
        assert make(runner).fingerprint == told_fingerprint(runner) == eager
        assert runner.capabilities().compilation is Compilation.FAILED


def test_same_bytes_are_promised_only_if_compiled_rows_are_seen_to_be_independent(
    model: LoadedModel,
) -> None:
    class Careless(Backend):
        def compiled(self, graph: torch.fx.GraphModule) -> Graph:
            return lambda *args: tuple(part + part.sum() for part in graph(*args))

    with serving(model, ONE_GRAPH) as runner:
        assert runner.capabilities().same_bytes
        runner.start_compiling(Careless())
        told = runner.wait_until_compiled(WAIT_S)
        assert told.compilation is Compilation.COMPILED
        assert not told.same_bytes


def test_stopping_while_it_compiles(model: LoadedModel) -> None:
    backend = Backend(held_at=2)
    with serving(model) as runner:
        runner.start_compiling(backend)
        assert backend.reached.wait(WAIT_S)
        runner.stop()
        backend.go_on.set()
        told = runner.wait_until_compiled(WAIT_S)
        assert told.compilation is Compilation.FAILED
        assert "stopped before everything was compiled" in told.compilation_remark
    assert backend.graphs == 2
    assert in_use(model) == "eager"


def test_stopping_before_the_change(model: LoadedModel) -> None:
    """The last graph is made when the engine is gone, and nobody waits for anybody."""
    backend = Backend(held_at=len(BUCKETS))
    with serving(model) as runner:
        runner.start_compiling(backend)
        assert backend.reached.wait(WAIT_S)
        runner.engine.stop()
        backend.go_on.set()
        told = runner.wait_until_compiled(WAIT_S)
        assert told.compilation is Compilation.FAILED
        assert "the engine is not running" in told.compilation_remark


def test_a_fixed_row_count_needs_one_graph_and_has_the_same_bytes_at_any_load(
    model: LoadedModel,
) -> None:
    backend = Backend()
    with serving(model, ONE_GRAPH, max_rows=8) as runner:
        runner.start_compiling(backend)
        told = runner.wait_until_compiled(WAIT_S)
        assert told.compilation is Compilation.COMPILED
        assert told.same_bytes
        assert told.fingerprint is not None
        assert told.fingerprint.row_buckets == "filled up to 4 rows"
        make(runner)
    assert backend.graphs == 1
    assert set(backend.rows) == {4}


def test_rows_beyond_the_measured_limit_are_not_compiled(model: LoadedModel) -> None:
    backend = Backend()
    with serving(model, max_rows=64) as runner:
        runner.engine.limit_rows(3)
        runner.start_compiling(backend)
        runner.wait_until_compiled(WAIT_S)
    assert backend.graphs == len(BUCKETS)
    assert max(backend.rows) == 4


def test_requests_that_run_one_at_a_time_are_not_compiled(model: LoadedModel) -> None:
    alone = SharingPlan(alone=True, remark="a call changes unet while it runs")
    with serving(model, SharingOptions(plan=alone)) as runner:
        runner.start_compiling("eager")
        told = runner.capabilities()
        assert told.compilation is Compilation.FAILED
        assert told.compilation_remark == (
            "requests run one at a time: a call changes unet while it runs"
        )
        assert make(runner).fingerprint == told_fingerprint(runner)


def test_a_model_that_is_not_to_be_compiled_never_is(runner: PipelineRunner) -> None:
    runner.start_compiling("eager")
    told = runner.wait_until_compiled(WAIT_S)
    assert (told.compilation, told.compilation_remark) == (Compilation.OFF, "")
    assert told.fingerprint is not None
    assert told.fingerprint.code == Code.EAGER
    assert told.fingerprint.row_buckets == "any rows"


def test_adapters_are_refused(model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="compile and adapters cannot be combined"):
        PipelineRunner(model, adapters=AdapterOptions(folder=tmp_path))


def test_a_cancelled_request_leaves_the_code_as_it_was(model: LoadedModel) -> None:
    with serving(model, ONE_GRAPH) as runner:
        runner.start_compiling("eager")
        runner.wait_until_compiled(WAIT_S)
        inbox = Inbox()
        runner.submit(a_request(id="gone", num_inference_steps=1000), inbox)
        runner.cancel(RequestKey("gone"))
        assert isinstance(inbox.wait(), Failed)
        assert make(runner).fingerprint == told_fingerprint(runner)
