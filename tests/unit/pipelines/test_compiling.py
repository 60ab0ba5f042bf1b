"""With quick backends of torch.compile; inductor, which takes minutes, is measured in the docs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from stepserve.engine.tracks.interception import make_parkable
from stepserve.pipelines.modules.call_shapes import (
    Example,
    UniformArguments,
    rows_of,
    shape_of,
)
from stepserve.pipelines.modules.compiling import (
    SWITCH_INTERVAL_S,
    BackgroundCompiler,
    CompileState,
    SwitchableForward,
    row_buckets,
)
from tiny_model import tiny_unet
from torch._inductor.runtime import cache_dir_utils

BUCKETS = (1, 2)
# The thread steps back behind all others, and a busy machine has many.
WAIT_S = 600

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.eager_calls = 0

    def forward(self, sample: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            self.eager_calls += 1
        return self.linear(sample) * scale


@pytest.fixture
def small() -> Small:
    torch._dynamo.reset()
    return Small()


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def small_examples(buckets: Sequence[int] = BUCKETS) -> list[Example]:
    return [Example((torch.ones(rows, 4),), {}) for rows in buckets]


def compiler_of(
    forward: SwitchableForward, examples: list[Example], backend: Any = "eager"
) -> BackgroundCompiler:
    threads = torch.get_num_threads()
    return BackgroundCompiler(forward.eager, examples, forward.switch, threads, backend)


def unet_example(rows: int) -> Example:
    return Example(
        (torch.randn(rows, 4, 8, 8), torch.full((rows,), 500)),
        {"encoder_hidden_states": torch.randn(rows, 16, 16), "return_dict": False},
    )


def test_eager_code_serves_until_every_bucket_is_ready_then_it_switches_once(small: Small) -> None:
    forward = SwitchableForward(small)
    switched: list[int] = []
    in_use_while_compiling = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        small(torch.ones(2, 4))
        in_use_while_compiling.append(forward.in_use)
        return graph.forward

    def switch(run: Callable[..., Any]) -> None:
        switched.append(compiler.graphs_ready)
        forward.switch(run)

    threads = torch.get_num_threads()
    compiler = BackgroundCompiler(forward.eager, small_examples(), switch, threads, backend)
    compiler.start()
    assert compiler.wait(WAIT_S) is CompileState.READY, compiler.reason
    assert in_use_while_compiling == ["eager", "eager"]
    assert switched == [len(BUCKETS)]
    assert forward.in_use == "compiled"


def test_after_the_switch_compiled_shapes_run_no_eager_code(small: Small) -> None:
    forward = SwitchableForward(small)
    compiler = compiler_of(forward, small_examples())
    compiler.start()
    assert compiler.wait(WAIT_S) is CompileState.READY, compiler.reason
    calls = small.eager_calls
    for rows in BUCKETS:
        small(torch.ones(rows, 4))
    assert small.eager_calls == calls
    # A column of a wider tensor: another layout, the same shape.
    small(torch.ones(2, 8)[:, ::2])
    assert small.eager_calls == calls


def test_who_compiles_lets_the_engine_have_the_interpreter(small: Small) -> None:
    forward = SwitchableForward(small)
    usual_s = sys.getswitchinterval()
    while_compiling_s = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        while_compiling_s.append(sys.getswitchinterval())
        return graph.forward

    compiler = compiler_of(forward, small_examples(), backend)
    compiler.start()
    assert compiler.wait(WAIT_S) is CompileState.READY
    assert while_compiling_s == [pytest.approx(SWITCH_INTERVAL_S, rel=0.1)] * len(BUCKETS)
    assert sys.getswitchinterval() == usual_s


def test_a_shape_that_was_not_compiled_is_always_served_by_eager_code(small: Small) -> None:
    forward = SwitchableForward(small)
    compiler = compiler_of(forward, small_examples())
    compiler.start()
    assert compiler.wait(WAIT_S) is CompileState.READY, compiler.reason
    calls = small.eager_calls
    small(torch.ones(3, 4))
    small(torch.ones(1, 4), scale=2.0)
    assert small.eager_calls == calls + 2
    assert compiler.state is CompileState.READY


def test_what_cannot_be_compiled_leaves_eager_code_on_and_says_why(small: Small) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        raise ValueError("no C++ compiler")

    forward = SwitchableForward(small)
    compiler = compiler_of(forward, small_examples(), backend)
    compiler.start()
    assert compiler.wait(WAIT_S) is CompileState.FAILED
    assert "no C++ compiler" in compiler.reason
    assert "\n" not in compiler.reason
    assert "ValueError" in compiler.reason
    assert forward.in_use == "eager"
    assert torch.equal(small(torch.ones(1, 4)), small.linear(torch.ones(1, 4)))


def test_a_graph_that_does_not_fit_gives_way_to_eager_code_for_good(small: Small) -> None:
    """Made for two threads and called by one: compiling again would keep everybody waiting."""
    forward = SwitchableForward(small)
    other = torch.get_num_threads() + 1
    compiler = BackgroundCompiler(forward.eager, small_examples(), forward.switch, other, "eager")
    compiler.start()
    assert compiler.wait(WAIT_S) is CompileState.READY, compiler.reason
    calls = small.eager_calls
    wanted = small.linear(torch.ones(1, 4))
    assert torch.equal(small(torch.ones(1, 4)), wanted)
    assert small.eager_calls == calls + 1
    assert compiler.state is CompileState.FAILED
    assert "recompile" in compiler.reason
    assert forward.in_use == "eager"


@pytest.mark.parametrize("named", [True, False])
def test_no_compiled_code_of_others_is_run(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """Others may write to the folder where torch looks for it first."""
    monkeypatch.setattr(cache_dir_utils, "default_cache_dir", lambda: str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    if named:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o777)
    forward = SwitchableForward(small)
    compiler = compiler_of(forward, small_examples())
    compiler.start()
    assert compiler.wait(WAIT_S) is CompileState.FAILED
    assert f"other users may write to {tmp_path}" in compiler.reason
    assert forward.in_use == "eager"


def test_an_empty_name_of_that_folder_is_as_if_there_was_none() -> None:
    """Torch would look for compiled code in the current folder."""
    code = "import os, stepserve.pipelines; print(os.environ.get('TORCHINDUCTOR_CACHE_DIR'))"
    environ = os.environ | {"TORCHINDUCTOR_CACHE_DIR": ""}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert ran.stdout == "None\n"


def test_an_error_of_the_forward_itself_is_passed_on(small: Small) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if broken:
                raise RuntimeError("out of memory")
            return graph(*args)

        return run

    broken: list[bool] = []
    forward = SwitchableForward(small)
    compiler = compiler_of(forward, small_examples(), backend)
    compiler.start()
    assert compiler.wait(WAIT_S) is CompileState.READY, compiler.reason
    broken.append(True)
    with pytest.raises(RuntimeError, match="out of memory"):
        small(torch.ones(1, 4))
    assert compiler.state is CompileState.READY


def test_stopping_leaves_eager_code_on(small: Small) -> None:
    forward = SwitchableForward(small)
    compiler = compiler_of(forward, small_examples())
    compiler.stop()
    compiler.start()
    assert compiler.wait(WAIT_S) is CompileState.FAILED
    assert "stopped" in compiler.reason
    assert forward.in_use == "eager"


def test_what_the_switch_raises_is_a_failure_to_compile(small: Small) -> None:
    forward = SwitchableForward(small)

    def switch(run: Callable[..., Any]) -> None:
        if run != forward.eager:
            raise ValueError("not wanted any more")
        forward.switch(run)

    threads = torch.get_num_threads()
    compiler = BackgroundCompiler(forward.eager, small_examples(), switch, threads, "eager")
    compiler.start()
    assert compiler.wait(WAIT_S) is CompileState.FAILED
    assert compiler.reason == "ValueError: not wanted any more"
    assert forward.in_use == "eager"


def test_more_graphs_than_torch_makes_of_itself(small: Small) -> None:
    """Beyond eight for one function it would quietly run eager code."""
    buckets = range(1, 12)
    forward = SwitchableForward(small)
    compiler = compiler_of(forward, small_examples(buckets))
    compiler.start()
    assert compiler.wait(WAIT_S) is CompileState.READY, compiler.reason
    calls = small.eager_calls
    for rows in buckets:
        small(torch.ones(rows, 4))
    assert (small.eager_calls, compiler.graphs_ready) == (calls, len(buckets))


def test_a_parked_call_runs_through_the_switch(small: Small) -> None:
    """`attach` comes second: it wraps what is installed here, and takes only itself off."""
    forward = SwitchableForward(small)
    detach = make_parkable(small, "small", "forward", stage="denoise")
    forward.switch(lambda sample: sample + 1)
    assert torch.equal(small(torch.zeros(1, 4)), torch.ones(1, 4))
    detach()
    assert small.forward is forward


def test_shapes_tell_calls_apart_by_all_but_content() -> None:
    def shape(value: Any) -> Any:
        return shape_of(Example((value,), {}))

    assert shape_of(unet_example(2)) == shape_of(unet_example(2))
    assert shape_of(unet_example(2)) != shape_of(unet_example(4))
    assert shape(torch.ones(1)) == shape(torch.zeros(1))
    assert shape(torch.ones(1)) != shape(torch.ones(1).double())
    assert shape(1) != shape(True)
    assert shape({"a": 1}) != shape({"b": 1})


@pytest.mark.parametrize(
    "timestep",
    [torch.tensor(500), torch.tensor(500.0), torch.tensor([500]), torch.full((2,), 500)],
    ids=["number", "fraction", "single", "rows"],
)
@pytest.mark.parametrize("by_name", [True, False])
def test_timesteps_are_brought_into_one_form(timestep: torch.Tensor, by_name: bool) -> None:
    sample = torch.randn(2, 4, 8, 8)
    uniform = UniformArguments(tiny_unet().forward)
    args, kwargs = ((sample,), {"timestep": timestep}) if by_name else ((sample, timestep), {})
    call = uniform(args, kwargs)
    found = call.kwargs["timestep"] if by_name else call.args[1]
    assert found.dtype == torch.float32
    assert found.tolist() == [500.0, 500.0]
    assert call.args[0] is sample


def test_a_module_without_timesteps_keeps_its_arguments() -> None:
    call = UniformArguments(Small().forward)((torch.ones(2, 4), 3), {"scale": 1.0})
    assert (call.args[1], call.kwargs) == (3, {"scale": 1.0})
    assert rows_of((3,), {}) == 1


@pytest.mark.parametrize(
    ("max_rows", "wanted"),
    [(1, (1,)), (2, (2,)), (6, (2, 4, 6)), (32, (2, 4, 8, 16, 32))],
)
def test_row_buckets(max_rows: int, wanted: tuple[int, ...]) -> None:
    assert row_buckets(max_rows) == wanted
