"""What diffusers' own classes do, as their signatures and the table of rows say."""

from __future__ import annotations

import re
from typing import Any

import diffusers
import pytest
from stepserve.domain.tasks import ONE, OPTIONAL, Count, Role, Task
from stepserve.pipelines.facts.pipeline_tasks import ROWS, pipeline_tasks, unknown_needs
from stepserve.pipelines.facts.signature import read_signature

PROMPT = {Role.PROMPT: ONE}
FROM_IMAGE = {Role.PROMPT: OPTIONAL, Role.IMAGE: ONE, Role.STRENGTH: OPTIONAL}
REPAINTED = {Role.PROMPT: ONE, Role.IMAGE: ONE, Role.MASK: ONE, Role.STRENGTH: OPTIONAL}
EDITED = {Role.PROMPT: ONE, Role.IMAGE: ONE}
INSTRUCTED = EDITED | {Role.IMAGE_GUIDANCE: OPTIONAL}
CASES: dict[str, dict[Task, dict[Role, Count]]] = {
    "StableDiffusionPipeline": {Task.TEXT_TO_IMAGE: PROMPT},
    "StableDiffusionImg2ImgPipeline": {Task.IMAGE_TO_IMAGE: FROM_IMAGE},
    "StableDiffusionXLInpaintPipeline": {Task.INPAINTING: REPAINTED},
    "StableDiffusionInstructPix2PixPipeline": {Task.EDIT: INSTRUCTED},
    "FluxFillPipeline": {Task.INPAINTING: EDITED | {Role.MASK: ONE}},
    "FluxKontextPipeline": {Task.TEXT_TO_IMAGE: PROMPT, Task.EDIT: EDITED},
    "FluxControlPipeline": {Task.TEXT_TO_IMAGE: PROMPT | {Role.CONTROL: ONE}},
    "Flux2Pipeline": {
        Task.TEXT_TO_IMAGE: PROMPT,
        Task.EDIT: EDITED | {Role.IMAGE: Count(1, 10)},
    },
    "DDPMPipeline": {Task.UNCONDITIONAL: {}},
    "DiTPipeline": {Task.CLASS_TO_IMAGE: {Role.CLASS_LABEL: ONE}},
    "StableDiffusionUpscalePipeline": {
        Task.UPSCALING: {Role.PROMPT: OPTIONAL, Role.IMAGE: ONE, Role.NOISE_LEVEL: OPTIONAL}
    },
    "LDMSuperResolutionPipeline": {Task.UPSCALING: {Role.IMAGE: ONE}},
}


def class_named(name: str) -> Any:
    return getattr(diffusers, name)


@pytest.mark.parametrize("name", CASES)
def test_a_class_does_what_it_takes(name: str) -> None:
    done = pipeline_tasks(name, read_signature(class_named(name)))
    assert {one.task: dict(one.inputs) for one in done} == CASES[name]


@pytest.mark.parametrize("name", CASES)
def test_every_role_has_an_argument_that_the_call_takes(name: str) -> None:
    signature = read_signature(class_named(name))
    for one in pipeline_tasks(name, signature):
        assert one.arguments.keys() == one.inputs.keys()
        assert all(map(signature.accepts, one.arguments.values()))


def test_images_are_fitted_where_the_task_is_about_their_pixels() -> None:
    fitted = {
        name: {one.is_fitted for one in pipeline_tasks(name, read_signature(class_named(name)))}
        for name in ("StableDiffusionImg2ImgPipeline", "StableDiffusionInstructPix2PixPipeline")
    }
    assert set().union(*fitted.values()) == {True}
    edits = pipeline_tasks("Flux2Pipeline", read_signature(class_named("Flux2Pipeline")))
    assert not any(one.is_fitted for one in edits)


def test_what_no_request_can_give_is_named() -> None:
    signature = read_signature(class_named("KandinskyV22Pipeline"))
    assert unknown_needs("KandinskyV22Pipeline", signature) == [
        "image_embeds",
        "negative_image_embeds",
    ]
    assert pipeline_tasks("KandinskyV22Pipeline", signature) == ()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.classes)
def test_every_row_is_of_a_class_that_there_is(row: Any) -> None:
    assert any(re.fullmatch(row.classes, name) for name in dir(diffusers))
