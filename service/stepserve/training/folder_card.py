"""What lies beside the weights of a model of a person's own images."""

from __future__ import annotations

import time
from string import Template

from diffusers import DiffusionPipeline

from stepserve.training.data.folders.dataset import FolderDataset
from stepserve.training.export import (
    TEMPLATES,
    Documents,
    count_parameters,
    describe_training,
    weights_mb,
)
from stepserve.training.recipe_files import FolderRecipe, recipe_text

COMMAND = "stepserve train FOLDER --out DIR --recipe recipe.yaml"


def folder_documents(
    pipeline: DiffusionPipeline, recipe: FolderRecipe, dataset: FolderDataset
) -> Documents:
    """Those of a pipeline that was trained on a dataset."""
    classes = {"class_labels": list(dataset.class_names)} if dataset.class_names else {}
    manifest = {
        "description": f"Pixel diffusion model of {len(dataset)} images",
        "default_scheduler": "DDIMScheduler",
        "default_num_inference_steps": min(50, recipe.model.timesteps),
        "created": int(time.time()),
        **classes,
    }
    training = describe_training(pipeline, COMMAND, recipe, [], len(dataset))
    return Documents(write_card(pipeline, recipe, dataset), training, manifest, ())


def write_card(pipeline: DiffusionPipeline, recipe: FolderRecipe, dataset: FolderDataset) -> str:
    """The model card, a Hugging Face `README.md`."""
    template = Template((TEMPLATES / "folder-card.md").read_text(encoding="utf-8"))
    return template.substitute(
        pipeline=type(pipeline).__name__,
        argument="class_labels=0, " if dataset.class_names else "",
        size_px=recipe.model.size_px,
        weights_mb=weights_mb(pipeline),
        parameters=f"{count_parameters(pipeline)['unet']:,}",
        data="\n".join(f"- {line}" for line in dataset.summary()),
        command=COMMAND,
        recipe=recipe_text(recipe).rstrip(),
    )
