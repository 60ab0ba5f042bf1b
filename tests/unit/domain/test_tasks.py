"""Which task a request asks for, and what is said where its inputs do not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stepserve.domain.checks.input_limits import check_counts, describe_inputs
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.models import ModelCapabilities, SizeRange
from stepserve.domain.tasks import Count, Role, Task, TaskInputs, fitting_task, misfits
from usual_tasks import USUAL_TASKS

EDIT_INPUTS: TaskInputs = {
    Role.PROMPT: Count(1, 1),
    Role.IMAGE: Count(1, 3),
    Role.MASK: Count(0, 1),
}
MODEL = ModelCapabilities(
    id="m",
    description="",
    sizes=SizeRange(8, 64, 8, 32),
    schedulers=("euler",),
    default_scheduler="euler",
    tasks={**USUAL_TASKS, Task.EDIT: EDIT_INPUTS},
)
EDITS = (Task.EDIT, Task.IMAGE_TO_IMAGE, Task.INPAINTING)


@pytest.mark.parametrize(
    ("given", "task"),
    [
        ({Role.PROMPT: 1, Role.IMAGE: 1}, Task.EDIT),
        ({Role.PROMPT: 1, Role.IMAGE: 3}, Task.EDIT),
        ({Role.PROMPT: 1, Role.IMAGE: 1, Role.MASK: 1}, Task.EDIT),
        ({Role.PROMPT: 1, Role.IMAGE: 1, Role.STRENGTH: 1}, Task.IMAGE_TO_IMAGE),
        ({Role.PROMPT: 1, Role.IMAGE: 1, Role.STRENGTH: 1, Role.MASK: 1}, Task.INPAINTING),
        # Nothing fits: the message is about the first.
        ({Role.PROMPT: 1, Role.IMAGE: 4}, Task.EDIT),
    ],
)
def test_what_is_given_says_which_task_is_meant(given: dict[Role, int], task: Task) -> None:
    assert fitting_task(EDITS, MODEL.tasks, given) is task


def test_a_model_that_does_none_of_them_has_no_fitting_task() -> None:
    assert fitting_task((Task.UPSCALING,), MODEL.tasks, {}) is None


counts = st.builds(
    lambda least, more: Count(least, least + more), st.integers(0, 3), st.integers(0, 3)
)
inputs = st.dictionaries(st.sampled_from(Role), counts)


@given(
    offered=st.dictionaries(st.sampled_from(Task), inputs, min_size=1),
    given=st.dictionaries(st.sampled_from(Role), st.integers(0, 5)),
)
def test_no_other_task_fits_better(offered: dict[Task, TaskInputs], given: dict[Role, int]) -> None:
    best = fitting_task(Task, offered, given)
    assert best is not None
    fewest = min(len(misfits(taken, given)) for taken in offered.values())
    assert len(misfits(offered[best], given)) == fewest


@pytest.mark.parametrize(
    ("task", "given", "field", "message"),
    [
        (Task.EDIT, {Role.PROMPT: 1, Role.IMAGE: 4}, "image", "image must be 1 to 3 for edit"),
        (Task.EDIT, {Role.PROMPT: 1}, "image", "image must be 1 to 3 for edit"),
        (Task.EDIT, {Role.IMAGE: 1}, "prompt", "prompt is empty: edit"),
        (
            Task.EDIT,
            {Role.PROMPT: 1, Role.IMAGE: 1, Role.CONTROL: 2},
            "controls",
            "controls must be left out: edit with model 'm' does not take any",
        ),
        (Task.INPAINTING, {Role.IMAGE: 1}, "mask", "mask is required by inpainting"),
        (Task.UPSCALING, {}, "model", "model 'm' does not do upscaling (it does: "),
    ],
)
def test_the_message_names_the_role_and_what_is_taken(
    task: Task, given: dict[Role, int], field: str, message: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_counts(task, MODEL, given)
    assert caught.value.field == field
    assert caught.value.message.startswith(message)
    told = describe_inputs(MODEL.inputs_of(task)) if task in MODEL.tasks else "edit)"
    assert told in caught.value.message


def test_inputs_are_described_for_people() -> None:
    assert describe_inputs(EDIT_INPUTS) == "prompt, image (1 to 3), mask (optional)"
    assert describe_inputs({}) == "no input"


def test_a_usual_request_is_of_the_usual_task_with_its_strength() -> None:
    assert MODEL.usual_request("r").task is Task.TEXT_TO_IMAGE
    assert MODEL.usual_request("r").strength is None
    assert MODEL.usual_request("r", Task.INPAINTING).strength == 0.8
    edits = replace(MODEL, tasks={Task.EDIT: EDIT_INPUTS})
    assert edits.usual_request("r").task is Task.EDIT
