"""What a pipeline is seen to do decides what it offers."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from stepserve.domain.models import SizeRange
from stepserve.domain.tasks import Task
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.probing.probed_tasks import find_offer, with_probed_tasks
from usual_tasks import USUAL_TASKS

SIZES = SizeRange(minimum=32, maximum=128, step=8, native=64)
NATIVE_ONLY = SizeRange(minimum=64, maximum=64, step=8, native=64)
ALL = tuple(USUAL_TASKS)


def obeys(task: Task, wanted_px: int) -> int:
    return wanted_px


def makes_its_own(task: Task, wanted_px: int) -> int:
    return 64


def draws_only(task: Task, wanted_px: int) -> int:
    if task is not Task.TEXT_TO_IMAGE:
        raise TypeError("takes no strength")
    return wanted_px


def draws_nothing(task: Task, wanted_px: int) -> int:
    raise ValueError("prompt is too short")


def edits_at_one_size(task: Task, wanted_px: int) -> int:
    return 64 if task is Task.IMAGE_TO_IMAGE else wanted_px


@pytest.mark.parametrize(
    ("side", "tasks", "sizes"),
    [
        (obeys, ALL, SIZES),
        (makes_its_own, ALL, NATIVE_ONLY),
        (edits_at_one_size, ALL, NATIVE_ONLY),
        (draws_only, (Task.TEXT_TO_IMAGE,), SIZES),
        (draws_nothing, (Task.TEXT_TO_IMAGE,), SIZES),
    ],
)
def test_only_what_works_is_offered(
    side: Callable[[Task, int], int], tasks: tuple[Task, ...], sizes: SizeRange
) -> None:
    assert find_offer(ALL, SIZES, side) == (tasks, sizes)


def test_what_is_left_out_is_told_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        find_offer(ALL, SIZES, draws_only)
    assert "inpainting does not work, so it is not offered: TypeError: takes no str" in caplog.text


def test_what_an_operator_says_of_sizes_is_believed(tiny: LoadedModel) -> None:
    assert with_probed_tasks(tiny).capabilities == tiny.capabilities
