"""What the engine finds out at its start.

About pipelines that change modules, rules that are wrong, and rows that depend on co-batched ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from stepserve.domain.events import Finished
from stepserve.domain.requests import GenerationRequest
from stepserve.domain.tasks import Task
from stepserve.engine.calls.arguments import ArgumentRules
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.copies.factory import PipelineFactory
from stepserve.pipelines.loading.folders import LoadedModel, load_model
from stepserve.pipelines.modules import parking
from stepserve.pipelines.modules.parking import ParkingOptions
from stepserve.pipelines.probing import sharing_plan as sharing_module
from stepserve.pipelines.probing.probe_requests import make_probe_requests
from stepserve.pipelines.probing.sharing_check import ENOUGH_ROWS, check_sharing
from stepserve.pipelines.probing.sharing_plan import (
    FIXED_ROWS,
    SharingPlan,
    plan_co_batching,
    plan_sharing,
)
from stepserve.pipelines.requests.call import make_images
from stepserve.pipelines.requests.images import encode_image
from stepserve.pipelines.serving.preparation import SharingOptions
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_model import a_request, submit_all
from usual_tasks import USUAL_TASKS

MAX_ROWS = 16


class UnknownPipeline(StableDiffusionPipeline):
    """Its requests could share, but nobody has seen to it."""


class SwappingPipeline(StableDiffusionPipeline):
    """Computes attention in its own way while it runs, as perturbed-attention guidance does."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = self.unet.attn_processors
        self.unet.set_attn_processor(ScalingProcessor())
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.unet.set_attn_processor(before)


class ScalingProcessor(AttnProcessor):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return -30.0 * super().__call__(*args, **kwargs)


class EncoderChangingPipeline(StableDiffusionPipeline):
    """Sets the text encoder to something of its own while it encodes."""

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        bias = next(p for name, p in self.text_encoder.named_parameters() if "final" in name)
        shift = float(len(kwargs.get("prompt") or args[0]))
        self.text_encoder.train()
        bias.data += shift
        try:
            return super().encode_prompt(*args, **kwargs)
        finally:
            bias.data -= shift
            self.text_encoder.eval()


class HookingPipeline(StableDiffusionPipeline):
    """Reads what its text encoder gives through a hook, as JoyImage's pipelines do."""

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        seen: list[Any] = []
        handle = self.text_encoder.register_forward_hook(lambda *given: seen.append(given))
        try:
            wanted = super().encode_prompt(*args, **kwargs)
        finally:
            handle.remove()
        # One for each prompt: of the hook's own call, and of nobody else's.
        assert [torch.equal(wanted[i][:1], seen[i][2][0]) for i in range(len(seen))] == [True] * (
            2 if wanted[1] is not None else 1
        )
        return wanted


@pytest.fixture
def fresh(tiny_folder: Path) -> LoadedModel:
    """A model that a test may change."""
    return load_model("tiny", tiny_folder, dtype="float32", device="cpu")


def as_class(model: LoadedModel, pipeline_class: type) -> LoadedModel:
    """The model as if its folder had named another class, that diffusers has no other tasks for."""
    pipeline = pipeline_class(**model.pipeline.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    capabilities = replace(
        model.capabilities, tasks={Task.TEXT_TO_IMAGE: USUAL_TASKS[Task.TEXT_TO_IMAGE]}
    )
    factory = PipelineFactory(pipeline, model.schedulers)
    return replace(model, pipeline=pipeline, capabilities=capabilities, factory=factory)


def mix_rows(model: LoadedModel, share: float = 1e-2) -> None:
    """Make every row depend on the co-batched ones, by `share` of the mean."""
    model.pipeline.unet.conv_out.register_forward_hook(
        lambda module, args, output: output + share * output.mean(0, keepdim=True)
    )


@contextmanager
def running(model: LoadedModel, **sharing: Any) -> Iterator[PipelineRunner]:
    # As many threads as plain calls have here: float32 kernels may sum otherwise with more.
    options = EngineOptions(max_rows=MAX_ROWS, threads=1)
    runner = PipelineRunner(model, options, sharing=SharingOptions(**sharing))
    runner.start()
    try:
        yield runner
    finally:
        runner.stop()


REQUESTS = [
    a_request(id="one", prompt="red heart"),
    a_request(id="two", prompt="big blue apple", seed=9, guidance_scale=1.0, num_inference_steps=3),
    a_request(id="three", prompt="cat", seed=17, n=2, guidance_scale=6.0),
]


def assert_files_are_plain(runner: PipelineRunner, requests: list[GenerationRequest]) -> None:
    """Served at once they are what plain calls give, one after another, in every byte."""
    with torch.no_grad():
        wanted = [make_images(runner.model, request) for request in requests]
    inboxes = submit_all(runner, requests)
    outcomes = [inbox.wait() for inbox in inboxes]
    for request, images, finished in zip(requests, wanted, outcomes, strict=True):
        assert isinstance(finished, Finished), finished
        assert finished.images == tuple(encode_image(im, request, i) for i, im in enumerate(images))


def plan_of(model: LoadedModel) -> SharingPlan:
    return plan_co_batching(model.pipeline, make_probe_requests(model))


def test_a_verified_pipeline_shares_unchecked(
    fresh: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sharing_module, "check_sharing")
    assert plan_of(fresh) == SharingPlan()


def test_an_unknown_pipeline_is_checked_and_shares(
    fresh: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = []

    def checked(*args: Any, **kwargs: Any) -> Any:
        reports.append(check_sharing(*args, **kwargs))
        return reports[-1]

    monkeypatch.setattr(sharing_module, "check_sharing", checked)
    assert plan_of(as_class(fresh, UnknownPipeline)) == SharingPlan()
    (report,) = reports
    assert report.calls_per_forward == 2
    assert report.difference < report.bound < report.separation


def test_a_pipeline_that_swaps_processors_is_served_alone_and_right(fresh: LoadedModel) -> None:
    model = as_class(fresh, SwappingPipeline)
    with running(model) as runner:
        assert runner.prepared.plan.serial
        assert runner.prepared.plan.same_bytes
        capabilities = runner.capabilities()
        assert capabilities.sharing_remark == "a call changes unet while it runs"
        assert capabilities.fingerprint is not None
        assert capabilities.fingerprint.row_buckets == "one request at a time"
        assert_files_are_plain(runner, REQUESTS)
        counters = runner.engine.counters
        assert counters.calls == counters.forwards > len(REQUESTS)


def test_a_text_encoder_that_a_call_changes_runs_inside_it(fresh: LoadedModel) -> None:
    model = as_class(fresh, EncoderChangingPipeline)
    plan = plan_of(model)
    assert not plan.serial
    assert plan.inline == {"text_encoder"}
    assert plan.remark == "text_encoder: changed by a call, so runs inside it"
    with torch.no_grad():
        report = check_sharing(
            model.pipeline, make_probe_requests(model), options=plan.parking(ENOUGH_ROWS)
        )
    assert report.objection == ""
    assert report.calls_per_forward == 2
    with running(model) as runner:
        assert runner.capabilities().sharing_remark.startswith(plan.remark)


def test_a_text_encoder_that_is_read_through_a_hook_runs_inside_the_call(
    fresh: LoadedModel,
) -> None:
    """Outputs that were kept would call no hook, and others' calls would."""
    model = as_class(fresh, HookingPipeline)
    assert plan_of(model).inline == {"text_encoder"}
    with running(model) as runner:
        inboxes = submit_all(runner, [*REQUESTS, replace(REQUESTS[0], id="the same prompt")])
        for inbox in inboxes:
            assert isinstance(inbox.wait(), Finished)


def test_a_wrong_rule_is_found_and_requests_run_one_at_a_time(
    fresh: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = ArgumentRules(ignored=frozenset({"encoder_hidden_states"}))
    monkeypatch.setitem(parking.ARGUMENT_RULES, "UNet2DConditionModel", wrong)
    with running(as_class(fresh, UnknownPipeline)) as runner:
        assert runner.prepared.plan.serial
        assert "shared forwards raised" in runner.capabilities().sharing_remark
        assert_files_are_plain(runner, REQUESTS)


def test_rows_that_mix_are_found_and_requests_run_one_at_a_time(fresh: LoadedModel) -> None:
    mix_rows(fresh, share=0.5)
    with running(as_class(fresh, UnknownPipeline)) as runner:
        assert runner.prepared.plan.serial
        assert "answers differ by" in runner.capabilities().sharing_remark
        assert_files_are_plain(runner, REQUESTS)


def test_without_a_cure_it_is_said_that_bytes_depend_on_the_load(fresh: LoadedModel) -> None:
    mix_rows(fresh, share=1e-6)
    with running(fresh) as runner:
        assert not runner.prepared.plan.same_bytes
        assert not runner.prepared.plan.serial
        capabilities = runner.capabilities()
        assert not capabilities.same_bytes
        assert "rows depend on co-batched requests" in capabilities.sharing_remark
        # What asks for forwards of its own has the same bytes all the same.
        assert_files_are_plain(runner, [replace(r, reproducible=True) for r in REQUESTS])


def limited_to(rows: int, fixed: bool) -> dict[str, Any]:
    """What a device would give that keeps bits up to `rows` rows, and in forwards of one count."""
    return {
        "independent_rows": lambda calls, max_rows: min(rows, max_rows),
        "agreeing_row_counts": lambda calls, counts: counts[:2] if fixed else (),
    }


@pytest.mark.parametrize(
    ("kept", "fixed", "wanted"),
    [
        (64, False, SharingPlan(max_rows=MAX_ROWS)),
        (12, True, SharingPlan(max_rows=12)),
        (FIXED_ROWS - 1, True, SharingPlan(max_rows=FIXED_ROWS, filled_rows=(4, FIXED_ROWS))),
        (
            1,
            False,
            SharingPlan(
                same_bytes=False, remark="rows depend on co-batched requests in the last bits"
            ),
        ),
    ],
)
def test_forwards_get_as_many_rows_as_keep_the_bits(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, kept: int, fixed: bool, wanted: SharingPlan
) -> None:
    for name, found in limited_to(kept, fixed).items():
        monkeypatch.setattr(sharing_module, name, found)
    with torch.no_grad():
        assert plan_sharing(tiny.pipeline, make_probe_requests(tiny), MAX_ROWS) == wanted


def test_fixed_rows_may_be_declined(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, found in limited_to(1, fixed=True).items():
        monkeypatch.setattr(sharing_module, name, found)
    with torch.no_grad():
        plan = plan_sharing(tiny.pipeline, make_probe_requests(tiny), MAX_ROWS, fix_rows=False)
    assert plan.filled_rows == ()
    assert not plan.same_bytes


def test_a_model_whose_texts_have_one_length_has_none_to_fill_up(tiny: LoadedModel) -> None:
    """So that the setting does not change what the fingerprint tells of its images."""
    with torch.no_grad():
        plan = plan_sharing(tiny.pipeline, make_probe_requests(tiny), 2, pad_prompts=False)
    assert plan.pads_prompts


def test_a_plan_says_how_to_park() -> None:
    options = ParkingOptions(max_rows=32)
    assert SharingPlan().parking(options) == options
    assert SharingPlan(max_rows=12).parking(options).max_rows == 12
    assert SharingPlan(max_rows=64).parking(options).max_rows == 32
    fixed = SharingPlan(filled_rows=(8,), inline=frozenset({"vae"})).parking(options)
    assert (fixed.max_rows, fixed.bucket_rows, fixed.inline) == (8, (8,), frozenset({"vae"}))
    several = SharingPlan(filled_rows=(4, 8, 16)).parking(options)
    assert (several.max_rows, several.bucket_rows) == (16, (4, 8, 16))
    assert not SharingPlan(pads_prompts=False).parking(options).pads_prompts


def test_row_policies_are_told_by_the_fingerprint(fresh: LoadedModel) -> None:
    filled, unpadded = SharingPlan(filled_rows=(8,)), SharingPlan(pads_prompts=False)
    plans = (SharingPlan(), SharingPlan(max_rows=12), filled, unpadded)
    told = []
    for plan in plans:
        with running(fresh, plan=plan) as runner:
            fingerprint = runner.capabilities().fingerprint
            assert fingerprint is not None
            assert fingerprint.row_buckets == plan.row_policy
            told.append(fingerprint.short)
    # A lower limit does not change an image where rows do not depend on co-batched ones.
    assert told[0] == told[1]
    assert len(set(told)) == 3


def test_the_number_of_threads_is_told_by_the_fingerprint(fresh: LoadedModel) -> None:
    told = []
    for threads in (1, 2):
        sharing = SharingOptions(plan=SharingPlan())
        runner = PipelineRunner(fresh, EngineOptions(threads=threads), sharing=sharing)
        runner.start()
        runner.stop()
        told.append(runner.capabilities().fingerprint)
    assert [fingerprint.threads for fingerprint in told if fingerprint is not None] == [1, 2]


def test_nothing_of_the_trials_is_left_behind(fresh: LoadedModel) -> None:
    pipeline = fresh.pipeline
    modules = [pipeline.unet, pipeline.vae, pipeline.text_encoder]
    before = [set(vars(module)) for module in modules]
    with torch.no_grad():
        plan_sharing(pipeline, make_probe_requests(fresh), MAX_ROWS)
    assert [set(vars(module)) for module in modules] == before
    assert not any("forward" in vars(module) for module in modules)
