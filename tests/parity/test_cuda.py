"""On a CUDA device: the pictures that plain diffusers makes there, with and without graphs.

Skipped where there is no such device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from loadtests.engine_bench import mixed_requests, plain_call, raw_pixels, run_engine
from service.config import SpeedSettings
from service.models.catalogue import EMBEDDED
from service.pipelines.load import load_model
from service.pipelines.runner import PipelineRunner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture(params=[False, True], ids=["eager", "graphs"])
def runner(request: pytest.FixtureRequest) -> Iterator[PipelineRunner]:
    speed = SpeedSettings(cuda_graphs=request.param)
    runner = PipelineRunner(load_model("emoji", EMBEDDED, device="cuda", speed=speed))
    runner.start()
    yield runner
    runner.stop()


@pytest.fixture(scope="module")
def plain() -> Any:
    return load_model("emoji", EMBEDDED, device="cuda").pipeline


def test_pictures_are_those_of_plain_diffusers(runner: PipelineRunner, plain: Any) -> None:
    assert runner.plan.same_bytes
    requests = mixed_requests()
    # Forwards of one shape meet again, so that later ones are replayed.
    for _ in range(3):
        _, finished = run_engine(runner, requests)
    assert runner.engine.counters.retries == 0
    assert runner.engine.counters.calls > 2 * runner.engine.counters.forwards
    with torch.no_grad():
        wanted = [plain_call(plain, request) for request in requests]
    assert [raw_pixels(answer) for answer in finished] == wanted
    recorded = sum(graph.recorded for graph in runner.graphs)
    assert (recorded > 0) == runner.model.cuda_graphs
