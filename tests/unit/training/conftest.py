"""Synthetic artwork, and tiny models trained once for all tests that want one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from stepserve.training.data.artwork import Artwork
from stepserve.training.digits import train_digits
from stepserve.training.emoji import train_emoji
from tiny_digits import tiny_digits_recipe, tiny_images
from tiny_recipe import tiny_recipe

NAMES = ("red apple", "owl", "red apple", "house", "blue circle")
STYLES = ("noto", "noto", "fluent", "fluent", "noto")


@pytest.fixture(autouse=True)
def _everywhere(one_thread: None) -> None:
    """All modules here are tiny."""


@pytest.fixture(scope="session")
def artwork() -> Artwork:
    """Five squares of one colour each, 32 px, on nothing."""
    chance = np.random.default_rng(0)
    pixels = np.zeros((len(NAMES), 32, 32, 4), np.uint8)
    pixels[..., :3] = chance.integers(0, 255, (len(NAMES), 1, 1, 3))
    pixels[:, 8:24, 8:24, 3] = 255
    return Artwork(pixels, NAMES, STYLES)


@pytest.fixture(scope="session")
def trained(artwork: Artwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny training; the model is in `model`."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("training")
    train_emoji(tiny_recipe(), folder, folder / "no-cache", artwork)
    return folder


@pytest.fixture(scope="session")
def trained_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny training on pixels; the model is in `model`."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("digits")
    train_digits(tiny_digits_recipe(), folder, folder / "no-cache", tiny_images())
    return folder
