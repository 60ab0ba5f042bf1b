"""A recipe of digits whose training takes seconds, and images for it."""

from __future__ import annotations

import numpy as np
from stepserve.training.data.labelled import LabelledImages
from stepserve.training.digits import DigitsRecipe
from stepserve.training.loop.hyperparameters import LoopConfig
from stepserve.training.stages.pixels import PixelConfig

SIDE_PX = 16
CLASS_NAMES = ("top", "bottom")


def tiny_images(count: int = 20) -> LabelledImages:
    """Noisy images whose upper or lower half is brighter."""
    labels = np.arange(count) % 2
    pixels = np.random.default_rng(0).integers(0, 100, (count, 1, SIDE_PX, SIDE_PX), np.uint8)
    half = SIDE_PX // 2
    for image, label in zip(pixels, labels, strict=True):
        image[:, half * label : half * (label + 1)] += 150
    return LabelledImages(pixels, labels, CLASS_NAMES)


def tiny_digits_recipe(steps: int = 4) -> DigitsRecipe:
    """16 px images, a useless model."""
    loop = LoopConfig(
        steps=steps,
        batch_size=4,
        learning_rate=1e-3,
        warmup_steps=2,
        checkpoint_interval_steps=2,
        sample_interval_steps=steps,
    )
    shape = PixelConfig(
        size_px=SIDE_PX, block_channels=(8, 16), attention_head_width=8, norm_groups=4
    )
    return DigitsRecipe(pixels=shape, loop=loop)
