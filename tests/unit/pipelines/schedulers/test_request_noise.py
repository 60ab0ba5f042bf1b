"""The same request makes the same image: all noise is of its own seed, and nobody else's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import diffusers
import pytest
import torch
from stepserve.domain.events import Finished
from stepserve.domain.requests import GenerationRequest
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.loading.folders import load_model
from stepserve.pipelines.schedulers.usable import usable_schedulers
from stepserve.pipelines.schedulers.watch import draw_from, drop_unknown
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_families import save_tiny_flux, save_tiny_sd3
from tiny_model import UNTRIED, a_request, default_scheduler, pixels, save_tiny_model, submit_all

FLOW = {
    "plain": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "stochastic": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
    "heun": diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    "lcm": diffusers.FlowMatchLCMScheduler(shift=3.0),
}
FAMILIES = {"flux": save_tiny_flux, "sd3": save_tiny_sd3}
NAMES = sorted(usable_schedulers(default_scheduler()))
STEPS = 4


def started(folder: Path) -> PipelineRunner:
    model = load_model("tiny", folder, dtype="float32", device="cpu")
    runner = PipelineRunner(model, EngineOptions(max_rows=8, max_pending_images=64), None, UNTRIED)
    runner.start()
    return runner


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PipelineRunner]:
    runner = started(save_tiny_model(tmp_path_factory.mktemp("sd")))
    yield runner
    runner.stop()


def use_scheduler(folder: Path, scheduler: Any) -> None:
    """Make it the own scheduler of the flow-matching model that lies there."""
    scheduler.save_pretrained(folder / "scheduler")
    index = folder / "model_index.json"
    usual = "FlowMatchEulerDiscreteScheduler"
    index.write_text(index.read_text().replace(usual, type(scheduler).__name__))


def sized(runner: PipelineRunner, **changes: Any) -> GenerationRequest:
    limits = runner.capabilities()
    usual = {
        "width": limits.sizes.minimum,
        "height": limits.sizes.minimum,
        "scheduler": limits.default_scheduler,
        "num_inference_steps": STEPS,
    }
    return a_request(**(usual | changes))


def images(runner: PipelineRunner, *requests: GenerationRequest) -> list[list[bytes]]:
    outcomes = [inbox.wait() for inbox in submit_all(runner, requests)]
    assert all(isinstance(outcome, Finished) for outcome in outcomes), outcomes
    return [[pixels(i.data) for i in o.images] for o in outcomes if isinstance(o, Finished)]


def assert_same_alone_and_co_batched(runner: PipelineRunner, **changes: Any) -> None:
    before = torch.get_rng_state()
    request = sized(runner, id="a", n=2, **changes)
    [first] = images(runner, request)
    torch.manual_seed(5)
    [second] = images(runner, request)
    torch.manual_seed(6)
    state = torch.get_rng_state()
    others = [sized(runner, id=name, seed=50 + i, **changes) for i, name in enumerate("bc")]
    co_batched = images(runner, others[0], request, others[1])
    assert first == second
    # Co-batched, the last bits may differ, which noise of another seed is far from.
    assert furthest(first, co_batched[1]) <= 2
    assert furthest(first[:1], co_batched[0]) > 10
    assert torch.equal(state, torch.get_rng_state())
    torch.set_rng_state(before)


def furthest(some: list[bytes], others: list[bytes]) -> int:
    """Levels between the pixels that differ most."""
    return max(
        abs(a - b)
        for one, other in zip(some, others, strict=True)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_scheduler_keeps_to_the_seed(stable_diffusion: PipelineRunner, name: str) -> None:
    assert_same_alone_and_co_batched(stable_diffusion, scheduler=name)


@pytest.mark.parametrize(
    ("family", "flow"),
    # FLUX tells the scheduler its sigmas, which Heun's does not take.
    [(family, flow) for family in FAMILIES for flow in FLOW if (family, flow) != ("flux", "heun")],
)
def test_every_flow_scheduler_keeps_to_the_seed(family: str, flow: str, tmp_path: Path) -> None:
    cast(Any, FAMILIES[family])(tmp_path)
    use_scheduler(tmp_path, FLOW[flow])
    runner = started(tmp_path)
    try:
        assert_same_alone_and_co_batched(runner)
    finally:
        runner.stop()


def test_rows_without_a_class_draw_from_the_same_generators_after_the_others() -> None:
    """As DiT has them: twice the rows in one step, of which the first half counts."""

    def first_rows(n: int, rows: int) -> torch.Tensor:
        scheduler = diffusers.DDPMScheduler()
        draw_from(scheduler, [torch.Generator().manual_seed(7 + i) for i in range(n)])
        scheduler.set_timesteps(4)
        sample = torch.zeros(rows, 1, 2, 2)
        stepped = scheduler.step(sample, scheduler.timesteps[0], sample).prev_sample
        return cast(torch.Tensor, stepped[:n])

    two, one = first_rows(2, 4), first_rows(1, 2)
    assert torch.equal(two[:1], one)
    assert torch.equal(two, first_rows(2, 2))
    assert not torch.equal(two[0], two[1])


def test_a_step_ignores_what_only_others_take() -> None:
    sample = torch.ones(1, 1, 2, 2)
    results = []
    for extra in ({}, {"eta": 0.5, "generator": [torch.Generator()]}):
        scheduler = diffusers.UniPCMultistepScheduler()
        drop_unknown(scheduler)
        scheduler.set_timesteps(4)
        stepped = scheduler.step(sample, scheduler.timesteps[0], sample, **extra)
        results.append(stepped.prev_sample)
    assert torch.equal(*results)
