"""A model that is compiled before it serves, with quick backends of torch.compile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from stepserve.config import SpeedSettings
from stepserve.domain.events import Failed, Finished
from stepserve.domain.models import Compilation
from stepserve.domain.requests import RequestKey
from stepserve.domain.step_cache import StepCacheUse
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.adapters.files import AdapterOptions
from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.loading.folders import LoadedModel, load_model
from stepserve.pipelines.modules.wrappers import describe_wrappers
from stepserve.pipelines.probing.sharing_plan import SharingPlan
from stepserve.pipelines.serving.preparation import SharingOptions
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_model import UNTRIED, Inbox, a_request, pixels

Graph = Callable[..., Any]
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


def fingerprint_of(runner: PipelineRunner) -> str:
    fingerprint = runner.capabilities().fingerprint
    assert fingerprint is not None
    return fingerprint.short


class Backend:
    """Runs graphs as they are, and says how many rows each forward has."""

    def __init__(self) -> None:
        self.graphs = 0
        self.rows: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Graph:
        self.graphs += 1
        return self.compiled(graph)

    def compiled(self, graph: torch.fx.GraphModule) -> Graph:
        def run(*args: Any) -> Any:
            outputs = graph(*args)
            self.rows.append(len(outputs[0]))
            return outputs

        return run


@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
def test_images_stay_and_fingerprints_change_with_the_code(
    model: LoadedModel, backend: str
) -> None:
    with serving(model) as runner:
        before = make(runner)
        assert before.fingerprint == fingerprint_of(runner)
        assert runner.capabilities().compilation is Compilation.OFF

        found = runner.compile(backend)
        after = make(runner)
        assert (found.compilation, found.compilation_remark) == (Compilation.COMPILED, "")
        assert found.fingerprint is not None
        assert found.fingerprint.code == "compiled"
        assert found.fingerprint.row_buckets == "filled up to 2, 4 rows"
        assert after.fingerprint == found.fingerprint.short != before.fingerprint
        assert pixels(after.images[0].data) == pixels(before.images[0].data)
        assert "unet.forward: parking > compiled code" in describe_wrappers(model.pipeline)
    assert "unet.forward: nothing" in describe_wrappers(model.pipeline)


def test_forwards_get_the_rows_of_a_bucket_before_and_after(model: LoadedModel) -> None:
    rows = list[int]()
    hook = model.pipeline.unet.conv_in.register_forward_pre_hook(
        lambda module, args: rows.append(len(args[0]))
    )
    with serving(model) as runner:
        rows.clear()
        make(runner, n=3, guidance_scale=0.0)
        assert set(rows) == {4}
        hook.remove()
        backend = Backend()
        runner.compile(backend)
        assert backend.graphs == len(BUCKETS)
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


def test_reproducible_requests_are_compiled_as_well(model: LoadedModel) -> None:
    backend = Backend()
    with serving(model, ONE_GRAPH) as runner:
        runner.compile(backend)
        backend.rows.clear()
        assert make(runner, reproducible=True).fingerprint == fingerprint_of(runner)
        assert backend.rows


def test_steps_are_skipped_beside_compiled_code(model: LoadedModel) -> None:
    backend = Backend()
    wanted = {"num_inference_steps": 12, "step_cache": StepCacheUse(threshold=0.5)}
    with serving(model, ONE_GRAPH) as runner:
        before = make(runner, **wanted)
        runner.compile(backend)
        backend.rows.clear()
        after = make(runner, **wanted)
    assert len(backend.rows) == after.timings.denoiser_calls_run
    assert 3 < after.timings.denoiser_calls_run < after.timings.denoiser_calls == 12
    assert pixels(after.images[0].data) == pixels(before.images[0].data)


def test_a_failure_leaves_eager_code_on_and_says_why(model: LoadedModel) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Any]) -> Graph:
        raise ValueError("no C++ compiler")

    with serving(model, ONE_GRAPH) as runner:
        eager = fingerprint_of(runner)
        found = runner.compile(broken)
        assert found.compilation is Compilation.FAILED
        # What torch says stays in the log.
        assert (
            found.compilation_remark
            == "torch.compile failed (BackendCompilerFailed); the log says why"
        )
        assert make(runner).fingerprint == fingerprint_of(runner) == eager
        assert "unet.forward: parking;" in describe_wrappers(model.pipeline) + ";"


def test_a_folder_of_code_that_others_may_write_to_is_a_failure(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o777)
    with serving(model, ONE_GRAPH) as runner:
        found = runner.compile("eager")
        assert found.compilation is Compilation.FAILED
        assert f"other users may write to {os.fspath(tmp_path)}" in found.compilation_remark


def test_graphs_that_stop_fitting_are_not_compiled_again(model: LoadedModel) -> None:
    """It would keep everybody waiting."""
    backend = Backend()
    with serving(model, ONE_GRAPH) as runner:
        runner.compile(backend)
        make(runner)
        runner.engine.call(lambda: torch.set_num_threads(2))
        graphs, rows = backend.graphs, list(backend.rows)
        make(runner)
        assert (backend.graphs, backend.rows) == (graphs, rows)


def test_same_bytes_are_promised_only_if_compiled_rows_are_seen_to_be_independent(
    model: LoadedModel,
) -> None:
    class Careless(Backend):
        def compiled(self, graph: torch.fx.GraphModule) -> Graph:
            return lambda *args: tuple(part + part.sum() for part in graph(*args))

    with serving(model, ONE_GRAPH) as runner:
        assert runner.capabilities().same_bytes
        found = runner.compile(Careless())
        assert found.compilation is Compilation.COMPILED
        assert not found.same_bytes


def test_a_fixed_row_count_needs_one_graph_and_has_the_same_bytes_at_any_load(
    model: LoadedModel,
) -> None:
    backend = Backend()
    with serving(model, ONE_GRAPH, max_rows=8) as runner:
        found = runner.compile(backend)
        assert found.compilation is Compilation.COMPILED
        assert found.same_bytes
        assert found.fingerprint is not None
        assert found.fingerprint.row_buckets == "filled up to 4 rows"
        make(runner)
    assert backend.graphs == 1
    assert set(backend.rows) == {4}


def test_rows_beyond_the_measured_limit_are_not_compiled(model: LoadedModel) -> None:
    backend = Backend()
    with serving(model, max_rows=64) as runner:
        runner.engine.limit_rows(3)
        runner.compile(backend)
    assert backend.graphs == len(BUCKETS)
    assert max(backend.rows) == 4


def test_requests_that_run_one_at_a_time_are_not_compiled(model: LoadedModel) -> None:
    serial = SharingPlan(serial=True, remark="a call changes unet while it runs")
    with serving(model, SharingOptions(plan=serial)) as runner:
        found = runner.compile("eager")
        assert found.compilation is Compilation.FAILED
        assert found.compilation_remark == (
            "requests run one at a time: a call changes unet while it runs"
        )
        assert make(runner).fingerprint == fingerprint_of(runner)


def test_a_model_that_is_not_to_be_compiled_never_is(runner: PipelineRunner) -> None:
    found = runner.compile("eager")
    assert (found.compilation, found.compilation_remark) == (Compilation.OFF, "")
    assert found.fingerprint is not None
    assert found.fingerprint.code == "eager"
    assert found.fingerprint.row_buckets == "any rows"


def test_adapters_are_refused(model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="compile and adapters cannot be combined"):
        PipelineRunner(model, adapters=AdapterOptions(folder=tmp_path))


def test_a_cancelled_request_leaves_compiled_code_on(model: LoadedModel) -> None:
    backend = Backend()
    with serving(model, ONE_GRAPH) as runner:
        runner.compile(backend)
        inbox = Inbox()
        runner.submit(a_request(id="gone", num_inference_steps=1000), inbox)
        runner.cancel(RequestKey("gone"))
        assert isinstance(inbox.wait(), Failed)
        backend.rows.clear()
        assert make(runner).fingerprint == fingerprint_of(runner)
        assert backend.rows
