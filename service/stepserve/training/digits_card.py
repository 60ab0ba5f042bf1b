"""What lies beside the weights of the digits model: its card, recipe, manifest and licences."""

from __future__ import annotations

import time
from string import Template
from typing import TYPE_CHECKING, Any

from diffusers import ConsistencyModelPipeline

from stepserve.training.data.digits import PACKAGE
from stepserve.training.data.labelled import LabelledImages
from stepserve.training.export import (
    TEMPLATES,
    Documents,
    count_parameters,
    describe_training,
    weights_mb,
)

if TYPE_CHECKING:
    from stepserve.training.digits import DigitsRecipe

LICENCES = ("mnist-images-CC-BY-SA-3.0.txt", "mnist-package-MIT.txt")


def digits_documents(
    pipeline: ConsistencyModelPipeline, recipe: DigitsRecipe, images: LabelledImages
) -> Documents:
    """Those of a pipeline that was trained on `images`."""
    training = describe_training(pipeline, recipe.command, recipe, [PACKAGE], len(images))
    manifest = {
        "description": "Handwritten digits by DDPM on pixels, trained on MNIST",
        "class_labels": list(images.class_names),
        "default_scheduler": "DPMSolverMultistepScheduler",
        "default_num_inference_steps": 25,
        "created": int(time.time()),
    }
    return Documents(write_card(pipeline, recipe, images), training, manifest, LICENCES)


def write_card(
    pipeline: ConsistencyModelPipeline, recipe: DigitsRecipe, images: LabelledImages
) -> str:
    """The model card, a Hugging Face `README.md`, filled in from the recipe and the model."""
    template = Template((TEMPLATES / "digits-card.md").read_text(encoding="utf-8"))
    return template.substitute(
        weights_mb=weights_mb(pipeline),
        parameters=f"{count_parameters(pipeline)['unet']:,}",
        folder_name="path/to/this/folder",
        classes=", ".join(f"`{name}`" for name in images.class_names),
        images=f"{len(images):,}",
        package=PACKAGE.name,
        package_version=PACKAGE.version,
        seed=recipe.seed,
        command=recipe.command,
        **_shape_values(recipe),
        **_loop_values(recipe),
    )


def _shape_values(recipe: DigitsRecipe) -> dict[str, Any]:
    shape = recipe.pixels
    return {
        "size_px": shape.size_px,
        "block_channels": ", ".join(map(str, shape.block_channels)),
        "layers_per_block": shape.layers_per_block,
        "timesteps": shape.timesteps,
        "beta_schedule": shape.beta_schedule,
        "beta_start": shape.beta_start,
        "beta_end": shape.beta_end,
    }


def _loop_values(recipe: DigitsRecipe) -> dict[str, Any]:
    loop = recipe.loop
    return {
        "steps": f"{loop.steps:,}",
        "batch_size": loop.batch_size,
        "samples": f"{loop.steps * loop.batch_size:,}",
        "learning_rate": f"{loop.learning_rate:g}",
        "final_learning_rate": f"{loop.final_learning_rate:g}",
        "ema_decay": loop.ema_decay,
    }
