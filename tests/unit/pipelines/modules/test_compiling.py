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
from stepserve.engine.calls.call_key import CallArguments
from stepserve.pipelines.modules.compiling import (
    CompiledForward,
    UniformArguments,
    rows_of,
    shape_of,
)
from stepserve.pipelines.probing.sharing_plan import row_buckets
from stepserve.private_files import NotPrivateError
from tiny_model import tiny_unet
from torch._inductor.runtime import cache_dir_utils

BUCKETS = (1, 2)

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


def small_examples(buckets: Sequence[int] = BUCKETS) -> list[CallArguments]:
    return [((torch.ones(rows, 4),), {}) for rows in buckets]


def unet_example(rows: int) -> CallArguments:
    return (
        (torch.randn(rows, 4, 8, 8), torch.full((rows,), 500)),
        {"encoder_hidden_states": torch.randn(rows, 16, 16), "return_dict": False},
    )


def test_compiled_shapes_run_no_eager_code(small: Small) -> None:
    forward = CompiledForward(small.forward, small_examples(), "eager")
    calls = small.eager_calls
    for rows in BUCKETS:
        assert torch.equal(forward(torch.ones(rows, 4)), small.linear(torch.ones(rows, 4)))
    # A column of a wider tensor: another layout, the same shape.
    forward(torch.ones(2, 8)[:, ::2])
    assert small.eager_calls == calls


def test_a_shape_that_was_not_compiled_is_always_served_by_eager_code(small: Small) -> None:
    forward = CompiledForward(small.forward, small_examples(), "eager")
    calls = small.eager_calls
    for _ in range(2):
        forward(torch.ones(3, 4))
        forward(torch.ones(1, 4), scale=2.0)
    assert small.eager_calls == calls + 4


def test_a_graph_that_does_not_fit_gives_way_to_eager_code(small: Small) -> None:
    """Made for so many threads and called by others: compiling would keep everybody waiting."""
    forward = CompiledForward(small.forward, small_examples(), "eager")
    calls, threads = small.eager_calls, torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert torch.equal(forward(torch.ones(1, 4)), small.linear(torch.ones(1, 4)))
    finally:
        torch.set_num_threads(threads)
    assert small.eager_calls == calls + 1
    forward(torch.ones(1, 4))
    assert small.eager_calls == calls + 1


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
    with pytest.raises(NotPrivateError, match=f"other users may write to {tmp_path}"):
        CompiledForward(small.forward, small_examples(), "eager")


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
    forward = CompiledForward(small.forward, small_examples(), backend)
    broken.append(True)
    with pytest.raises(RuntimeError, match="out of memory"):
        forward(torch.ones(1, 4))


def test_more_graphs_than_torch_makes_of_itself(small: Small) -> None:
    """Beyond eight for one function it would quietly run eager code."""
    buckets = range(1, 12)
    forward = CompiledForward(small.forward, small_examples(buckets), "eager")
    calls = small.eager_calls
    for rows in buckets:
        forward(torch.ones(rows, 4))
    assert small.eager_calls == calls


def test_shapes_tell_calls_apart_by_all_but_content() -> None:
    def shape(value: Any) -> Any:
        return shape_of(((value,), {}))

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
    made, named = uniform(args, kwargs)
    found = named["timestep"] if by_name else made[1]
    assert found.dtype == torch.float32
    assert found.tolist() == [500.0, 500.0]
    assert made[0] is sample


def test_a_module_without_timesteps_keeps_its_arguments() -> None:
    args, kwargs = UniformArguments(Small().forward)((torch.ones(2, 4), 3), {"scale": 1.0})
    assert (args[1], kwargs) == (3, {"scale": 1.0})
    assert rows_of((3,), {}) == 1


@pytest.mark.parametrize(
    ("max_rows", "wanted"),
    [(1, (1,)), (2, (2,)), (6, (2, 4, 6)), (32, (2, 4, 8, 16, 32))],
)
def test_row_buckets(max_rows: int, wanted: tuple[int, ...]) -> None:
    assert row_buckets(max_rows) == wanted
