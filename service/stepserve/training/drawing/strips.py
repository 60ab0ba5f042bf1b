"""Image strips: rows of images, with names before the rows and above the columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

CELL_PX = 112
GAP_PX = 4
HEAD_PX = 22
MARGIN_PX = 96
FONT_PX = 13
INK = (40, 40, 40)


def draw_strip(rows: Mapping[str, Sequence[Image.Image]], columns: Sequence[str]) -> Image.Image:
    """Lay rows of images out below the column names.

    Args:
        rows: the images of each row by the row's name, which may have several lines.
        columns: one name for each image of a row.
    """
    pitch = CELL_PX + GAP_PX
    sheet = Image.new(
        "RGB", (MARGIN_PX + len(columns) * pitch, HEAD_PX + len(rows) * pitch), "white"
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_PX)
    for column, name in enumerate(columns):
        centre = (MARGIN_PX + column * pitch + CELL_PX // 2, HEAD_PX // 2)
        draw.text(centre, name, INK, font, anchor="mm")
    for row, (name, images) in enumerate(rows.items()):
        top = HEAD_PX + row * pitch
        draw.multiline_text((GAP_PX, top + CELL_PX // 2), name, INK, font, anchor="lm")
        for column, image in enumerate(images):
            sheet.paste(_cell(image), (MARGIN_PX + column * pitch, top))
    return sheet


def _cell(image: Image.Image) -> Image.Image:
    return image.convert("RGB").resize((CELL_PX, CELL_PX), Image.Resampling.BICUBIC)
