"""The benchmark of step caches, in small."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from stepserve.domain.step_cache import StepCacheUse
from stepserve.models.catalogue import EMBEDDED
from stepserve.pipelines.loading.folders import load_model
from stepserve.pipelines.serving.preparation import SharingOptions
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_model import UNTRIED, save_tiny_model

from loadtests.step_cache.quality import Quality, Way, as_many_forwards, draw, measure
from loadtests.step_cache.speed import Speed, measure_deciding, measure_speed
from loadtests.step_cache_bench import DDIM, PROMPTS, goals_of_quality, serving

WHOLE, CACHED = Way(DDIM, 12), Way(DDIM, 12, StepCacheUse(threshold=0.4))

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # numpy's word to torch, by way of diffusers' schedulers.
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PipelineRunner]:
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    with serving(folder, "float32", 1, UNTRIED) as runner:
        yield runner


def test_ways_are_told_apart_by_forwards_and_distance(tiny: PipelineRunner) -> None:
    same, cached = measure(tiny, Way(DDIM, 20), [WHOLE, CACHED], PROMPTS[:2])
    assert (same.way, cached.way) == (WHOLE, CACHED)
    assert same.forwards == 12 > cached.forwards > 4
    assert same.distance > 0
    assert cached.distance != same.distance


def test_an_image_is_the_same_again(tiny: PipelineRunner) -> None:
    one, other = (draw(tiny, [CACHED], PROMPTS[:2])[CACHED] for _ in range(2))
    assert [a.pixels.equal(b.pixels) for a, b in zip(one, other, strict=True)] == [True, True]
    assert not one[0].pixels.equal(one[1].pixels)


def test_speed_is_measured_in_turns(tiny: PipelineRunner) -> None:
    speed = measure_speed(tiny, CACHED, PROMPTS, requests=4, repeats=2)
    assert (len(speed.whole), len(speed.cached)) == (3, 2)
    assert 4 < speed.forwards < 12


def test_deciding_is_measured_beside_a_step(tmp_path: Path) -> None:
    model = load_model("tiny", save_tiny_model(tmp_path), "float32", "cpu")
    deciding = measure_deciding(model, StepCacheUse(), rows=8)
    assert 0 < deciding.share < 10


def test_a_gain_is_over_the_turns_around() -> None:
    assert Speed((1.0, 3.0), (4.0,), forwards=5).gain == pytest.approx(2.0)


def test_as_many_forwards_are_rounded_up() -> None:
    ways = as_many_forwards(["DDIMScheduler", "HeunDiscreteScheduler"], 20.2)
    assert [way.steps for way in ways] == [21, 11]


@pytest.mark.parametrize(
    ("forwards", "distance", "rival", "hold"),
    [
        (20.0, 0.006, 0.008, [True, True, True]),
        (26.0, 0.006, 0.008, [False, True, True]),
        (20.0, 0.009, 0.010, [True, False, True]),
        (20.0, 0.006, 0.005, [True, True, False]),
    ],
)
def test_each_goal_can_be_missed(
    forwards: float, distance: float, rival: float, hold: list[bool]
) -> None:
    goals = goals_of_quality(
        Quality(WHOLE, 50, 0.005),
        Quality(CACHED, forwards, distance),
        [Quality(WHOLE, 25, 0.02), Quality(Way("DEISMultistepScheduler", 25), 25, rival)],
    )
    assert [goal.holds for goal in goals] == hold


@pytest.mark.slow
def test_the_goals_hold_for_the_embedded_model() -> None:
    whole, cached = Way(DDIM, 50), Way(DDIM, 50, StepCacheUse())
    prompts = PROMPTS[:6]
    with serving(Path(EMBEDDED), "float32", 1, SharingOptions(fixed_rows=False)) as runner:
        fine, *_ = ways = [Way(DDIM, 100), whole, cached]
        found = {quality.way: quality for quality in measure(runner, fine, ways, prompts)}
        spent = as_many_forwards(["DDIMScheduler", "DEISMultistepScheduler"], 25)
        rivals = measure(runner, fine, spent, prompts)
    goals = goals_of_quality(found[whole], found[cached], rivals)
    assert [str(goal) for goal in goals if not goal.holds] == []
