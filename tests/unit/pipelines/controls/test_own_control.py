"""Models that take a control image by themselves, and probing beside listed controls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from families.catalogue import FAMILIES
from stepserve.domain.events import Failed, Finished
from stepserve.domain.models import Control, ControlKind
from stepserve.domain.requests import ControlUse
from stepserve.domain.tasks import ONE, Count, Role, Task
from stepserve.pipelines.controls.files import ControlOptions, ControlSource
from stepserve.pipelines.loading.folders import LoadedModel, load_model
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_controls import drawing, opened, png, save_controlnet
from tiny_model import UNTRIED, a_request, submit_all


@pytest.fixture(scope="module")
def flux_control(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("flux-control")
    FAMILIES["FLUX Control"].build().save_pretrained(folder)
    return load_model("flux", folder, dtype="float32", device="cpu")


def test_it_needs_one_image_under_the_name_control(flux_control: LoadedModel) -> None:
    runner = PipelineRunner(flux_control, sharing=UNTRIED)
    runner.start()
    try:
        model = runner.capabilities()
        assert model.tasks[Task.TEXT_TO_IMAGE][Role.CONTROL] == ONE
        own = Control("control", ControlKind.OWN, True, takes_scale=False, takes_interval=False)
        assert model.controls == (own,)
        side = model.sizes.native
        request = a_request(
            model="flux", scheduler=model.default_scheduler, width=side, height=side
        )
        images = []
        for seed in (0, 1):
            control = ControlUse("control", png(drawing(seed)))
            (inbox,) = submit_all(runner, [a_request(**vars(request) | {"controls": (control,)})])
            outcome = inbox.wait()
            assert isinstance(outcome, Finished), outcome
            images.append(opened(outcome.images[0].data))
        assert np.abs(images[0] - images[1]).max() > 5
        for controls, said in (
            ((), "controls is required by text-to-image"),
            ((ControlUse("canny", b""),), "'canny' is not known"),
            (
                (ControlUse("control", b"", scale=0.5),),
                "must be 1, got 0.5: 'control' takes no other",
            ),
            ((ControlUse("control", b"", end=0.5),), "which steers at every step"),
        ):
            (inbox,) = submit_all(runner, [a_request(**vars(request) | {"controls": controls})])
            refused = inbox.wait()
            assert isinstance(refused, Failed)
            assert said in str(refused.error)
    finally:
        runner.stop()


def test_listed_controls_outlast_what_is_probed(tiny: LoadedModel, tmp_path: Path) -> None:
    controls = ControlOptions({"edges": ControlSource(save_controlnet(tmp_path / "edges"))})
    runner = PipelineRunner(tiny, controls=controls)
    runner.start()
    try:
        model = runner.capabilities()
        assert model.tasks[Task.TEXT_TO_IMAGE][Role.CONTROL] == Count(0, 4)
        control = ControlUse("edges", png(drawing()))
        (inbox,) = submit_all(runner, [a_request(controls=(control,))])
        outcome = inbox.wait()
        assert isinstance(outcome, Finished), outcome
    finally:
        runner.stop()
