"""Layers whose inputs begin with the rows of a forward are told from others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.probing.probe_requests import make_probe_requests
from stepserve.pipelines.probing.row_layers import find_row_layers
from stepserve.pipelines.probing.sharing_check import ENOUGH_ROWS
from torch import Tensor, nn

WIDTH, TOKENS = 4, 6


class Layouts(nn.Module):
    """Gives its layers the rows in several orders."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(WIDTH, WIDTH)
        self.folded = nn.Linear(WIDTH, WIDTH)
        self.image = nn.Conv2d(WIDTH, WIDTH, 1)
        self.turned = nn.Linear(WIDTH, WIDTH)
        self.turned_flat = nn.Linear(WIDTH, WIDTH)
        self.table = nn.Linear(WIDTH, WIDTH)
        self.both = nn.Linear(WIDTH, WIDTH)
        self.once = nn.Linear(WIDTH, WIDTH)
        self.never = nn.Linear(WIDTH, WIDTH)
        self.for_one = nn.Linear(WIDTH, WIDTH)

    def forward(self, sample: Tensor) -> Tensor:
        rows = sample.shape[0]
        sample = self.tokens(sample) + self.folded(sample.flatten(0, 1)).view_as(sample)
        sample = sample + self.image(sample.mT[..., None])[..., 0].mT
        sample = sample + self.turned(sample.transpose(0, 1)).transpose(0, 1)
        flat = sample.transpose(0, 1).flatten(0, 1)
        sample = sample + self.turned_flat(flat).view(TOKENS, rows, WIDTH).transpose(0, 1)
        sample = sample + self.table(torch.ones(TOKENS, WIDTH))
        sample = sample + self.both(sample) + self.both(sample.transpose(0, 1)).transpose(0, 1)
        sample = sample + self.once(sample[:1])
        return self.for_one(sample) if rows == 1 else sample


class Pipeline:
    """One step of a denoiser."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.components = {"unet": Layouts()}

    def __call__(self) -> Tensor:
        output: Tensor = self.components["unet"](torch.ones(2, TOKENS, WIDTH))
        return output


def test_only_layers_that_get_one_row_after_the_other_are_found() -> None:
    pipeline = Pipeline()
    found = find_row_layers(pipeline, [pipeline], ENOUGH_ROWS)
    assert found == {"unet": {"tokens", "folded", "image"}}


def test_forwards_that_are_filled_up_in_service_are_not_for_this() -> None:
    pipeline = Pipeline()
    filled = replace(ENOUGH_ROWS, bucket_rows=(8,))
    found = find_row_layers(pipeline, [pipeline], filled)
    assert found == find_row_layers(pipeline, [pipeline], ENOUGH_ROWS)


def test_all_layers_of_a_unet_are_found(tiny: LoadedModel) -> None:
    probes = make_probe_requests(tiny)
    found = find_row_layers(tiny.pipeline, probes, ENOUGH_ROWS)
    unet = tiny.pipeline.unet
    layers = {p for p, m in unet.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
    assert found == {"unet": layers}


def test_a_probe_that_fails_finds_nothing(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = Pipeline()
    pipeline.components["unet"].tokens = nn.Linear(WIDTH + 1, WIDTH)
    assert find_row_layers(pipeline, [pipeline], ENOUGH_ROWS) == {}
    assert "adapters are not mixed" in caplog.text
