"""Make the images of the README and the docs with the embedded model, through the engine.

python docs/make_images.py
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageDraw
from stepserve.domain.events import Finished
from stepserve.domain.requests import GenerationRequest
from stepserve.models.catalogue import EMBEDDED
from stepserve.pipelines.loading.folders import load_model
from stepserve.pipelines.serving.local import generate_locally
from stepserve.training.drawing.explain import explain

IMAGES = Path(__file__).parent / "images"
PROMPTS = (
    "red heart",
    "pizza",
    "rocket on a blue background",
    "cat face",
    "smiling face with sunglasses",
    "fire engine",
    "birthday cake on a pink background",
    "sunflower",
    "hamburger",
    "soccer ball on a green background",
    "house",
    "octopus",
    "red apple",
    "guitar on a yellow background",
    "panda",
    "rainbow",
    "ghost on a black background",
    "strawberry",
    "alarm clock",
    "frog",
    "crown on a purple background",
    "avocado",
    "snowman on a light blue background",
    "green heart on a black background",
)
COLUMNS = 6
CELL_PX = 128
LABEL_PX = 18
STEPS = 40
SEED = 2


def draw_grid(path: Path) -> None:
    """Every prompt once, the same seed and settings for all, none picked by hand."""
    rows = -(-len(PROMPTS) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * CELL_PX, rows * (CELL_PX + LABEL_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (prompt, image) in enumerate(zip(PROMPTS, make_all(), strict=True)):
        left, top = index % COLUMNS * CELL_PX, index // COLUMNS * (CELL_PX + LABEL_PX)
        larger = image.resize((CELL_PX - 4, CELL_PX - 4), Image.Resampling.LANCZOS)
        sheet.paste(larger, (left, top))
        draw.text((left + 2, top + CELL_PX - 2), prompt.replace("background", "bg"), fill="black")
    sheet.save(path, optimize=True)


def make_all() -> list[Image.Image]:
    """One image of each prompt."""
    model = load_model("emoji", EMBEDDED)
    return [open_image(generate_locally(model, request(prompt))) for prompt in PROMPTS]


def request(prompt: str) -> GenerationRequest:
    """The embedded model's defaults, with a fixed seed."""
    return GenerationRequest(
        id=prompt.replace(" ", "-"),
        model="emoji",
        prompt=prompt,
        width=64,
        height=64,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        seed=SEED,
        scheduler="DDIMScheduler",
    )


def open_image(finished: Finished) -> Image.Image:
    """The first image of an answer."""
    return Image.open(io.BytesIO(finished.images[0].data)).convert("RGB")


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    draw_grid(IMAGES / "grid.png")
    explain(EMBEDDED, IMAGES, "red heart", seed=SEED, steps=STEPS)
