"""Every kind of file that a folder of images may hold is told, and used or skipped."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from image_folders import pixels, write_image, write_images
from PIL import Image, PngImagePlugin
from stepserve.training.data.folders.dataset import Labelling, Outcome, ProblemReport
from stepserve.training.data.folders.image_files import decode
from stepserve.training.data.folders.reading import read_folder
from stepserve.training.errors import DatasetError


def told(report: ProblemReport, file: str) -> list[tuple[Outcome, str]]:
    return [(each.outcome, each.message) for each in report.problems if each.file == file]


def test_class_folders_are_labels_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_images(tmp_path, "owl/2.png", "cat/1.png", "cat/deep/3.png")
    dataset, report = read_folder(tmp_path, 16)
    assert dataset.class_names == ("cat", "owl")
    labels = {image.name: image.label for image in dataset.images}
    assert labels == {"cat/1.png": 0, "cat/deep/3.png": 0, "owl/2.png": 1}
    assert dataset.summary()[1] == "2 classes: cat (2), owl (1)"
    assert report.problems == ()


def test_a_class_without_a_usable_image_is_told(tmp_path: Path) -> None:
    write_images(tmp_path, "cat/1.png", "cat/2.png")
    (tmp_path / "owl").mkdir()
    (tmp_path / "owl" / "bad.png").write_bytes(b"no image")
    dataset, report = read_folder(tmp_path, 16)
    assert dataset.class_names == ("cat",)
    assert told(report, "owl") == [(Outcome.SKIPPED, "a class without a usable image")]


def test_images_beside_folders_are_no_classes_unless_asked_for(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "cat/1.png", "cat/2.png")
    dataset, report = read_folder(tmp_path, 16)
    assert (dataset.labelling, len(dataset)) == (Labelling.NONE, 3)
    assert told(report, "cat")[0][0] == Outcome.NOTED
    asked, report = read_folder(tmp_path, 16, Labelling.CLASSES)
    assert len(asked) == 2
    assert told(report, "a.png") == [(Outcome.SKIPPED, "lies in no class folder")]


def test_captions_from_file_names(tmp_path: Path) -> None:
    write_images(tmp_path, "red_apple-2.png", "blue owl.png")
    dataset, _ = read_folder(tmp_path, 16, Labelling.FILE_NAMES)
    assert [image.caption for image in dataset.images] == ["blue owl", "red apple 2"]


def test_text_files_beside_images(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "a.txt").write_text("a red\n apple\n")
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "gone.txt").write_text("nothing to see")
    dataset, report = read_folder(tmp_path, 16)
    assert dataset.labelling == Labelling.SIDECARS
    assert [image.caption for image in dataset.images] == ["a red apple", None, None]
    assert told(report, "b.png") == told(report, "c.png")
    assert told(report, "c.png") == [(Outcome.NOTED, "has no caption, or an empty one")]
    assert told(report, "gone.txt") == [(Outcome.SKIPPED, "there is no image of this name")]


def write_table(path: Path, rows: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
        path.write_text("\n".join(lines) + "\n")
        return
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *rows])


@pytest.mark.parametrize("table", ["captions.csv", "metadata.csv", "metadata.jsonl", "any.jsonl"])
def test_tables_of_captions(tmp_path: Path, table: str) -> None:
    write_images(tmp_path, "a.png", "train/b.png", "c.png")
    rows = [("a.png", "one, two"), ("train/b.png", "two"), ("gone.png", "x"), ("a.png", "other")]
    write_table(tmp_path / table, [*rows, ("../a.png", "outside")])
    dataset, report = read_folder(tmp_path, 16)
    assert dataset.labelling == Labelling.TABLES
    captions = {image.name: image.caption for image in dataset.images}
    assert captions == {"a.png": "one, two", "train/b.png": "two", "c.png": None}
    messages = [each.message for each in report.skipped]
    assert messages == [
        "names the image gone.png, which is not there or cannot be used",
        "a second caption of a.png; the first is kept",
        "names the image ../a.png, which is not there or cannot be used",
    ]
    assert all(each.file.startswith(f"{table}:") for each in report.skipped)


def test_a_table_below_the_folder_names_files_beside_it(tmp_path: Path) -> None:
    write_images(tmp_path, "train/a.png", "train/b.png")
    write_table(tmp_path / "train" / "metadata.jsonl", [("a.png", "one"), ("b.png", "two")])
    dataset, _ = read_folder(tmp_path, 16)
    assert [image.caption for image in dataset.images] == ["one", "two"]


@pytest.mark.parametrize(
    ("table", "content", "message"),
    [
        ("captions.csv", b"name,text\na.png,one\n", "captions.csv:2: each row needs"),
        ("captions.csv", b"file_name,text\na.png\n", "captions.csv:2: each row needs"),
        ("captions.csv", b"file_name,text\na.png,\xff\n", "captions.csv cannot be read as UTF-8"),
        ("x.jsonl", b"{'file_name': 1}\n", "x.jsonl:1: not JSON"),
        ("x.jsonl", b"[1]\n", "x.jsonl:1: each line needs a JSON object"),
        ("x.jsonl", b'{"file_name": "a.png", "text": 1}\n', "x.jsonl:1: each row needs"),
        ("x.jsonl", b"\n", "has no captions from caption-files"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(
    tmp_path: Path, table: str, content: bytes, message: str
) -> None:
    write_images(tmp_path, "a.png", "b.png")
    (tmp_path / table).write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        read_folder(tmp_path, 16)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_are_refused_with_what_is_wrong(tmp_path: Path, count: int) -> None:
    write_images(tmp_path, *[f"{index}.png" for index in range(count)])
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=f"{count} usable images; at least 2") as refused:
        read_folder(tmp_path, 16)
    assert "bad.png: skipped: not an image" in refused.value.message


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is not a folder"):
        read_folder(tmp_path / "gone", 16)


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.webp", "cut.gif"])
def test_a_file_that_is_cut_short_is_skipped(tmp_path: Path, name: str) -> None:
    write_images(tmp_path, "a.png", "b.png")
    path = write_image(tmp_path, name, pixels(5, 64))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    dataset, report = read_folder(tmp_path, 16)
    assert len(dataset) == 2
    assert [each.file for each in report.skipped] == [name]


def test_every_byte_of_damage_is_told_or_harmless(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    whole = write_image(tmp_path, "damaged.png", 5).read_bytes()
    for position in range(0, len(whole), 7):
        broken = bytearray(whole)
        broken[position] ^= 0xFF
        (tmp_path / "damaged.png").write_bytes(bytes(broken))
        dataset, report = read_folder(tmp_path, 16)
        assert len(dataset) + len(report.skipped) == 3


CONVERSIONS = {
    "cmyk.jpg": (Image.new("CMYK", (16, 16)), "CMYK to RGB"),
    "palette.gif": (Image.new("P", (16, 16)), "P to RGB"),
    "alpha.png": (Image.new("RGBA", (16, 16)), "RGBA laid over white"),
    "gray-alpha.png": (Image.new("LA", (16, 16)), "LA laid over white"),
    "deep.png": (Image.fromarray(np.full((16, 16), 65535, np.uint16)), "16-bit to 8-bit"),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_other_modes_are_converted_and_told(tmp_path: Path, name: str) -> None:
    image, message = CONVERSIONS[name]
    write_images(tmp_path, "a.png")
    write_image(tmp_path, name, image)
    dataset, report = read_folder(tmp_path, 16)
    assert len(dataset) == 2
    assert told(report, name) == [(Outcome.CONVERTED, message)]


@pytest.mark.parametrize("name", ["alpha.png", "gray-alpha.png", "deep.png"])
def test_what_is_seen_through_or_at_its_maximum_becomes_white(tmp_path: Path, name: str) -> None:
    path = write_image(tmp_path, name, CONVERSIONS[name][0])
    assert decode(path).image.getcolors() == [(256, (255, 255, 255))]


def test_a_mode_without_a_known_range_is_skipped(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    write_image(tmp_path, "float.tiff", Image.new("F", (16, 16)))
    _, report = read_folder(tmp_path, 16)
    assert told(report, "float.tiff") == [(Outcome.SKIPPED, "mode F has no known range of values")]


def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    write_images(tmp_path, "a.png")
    _, report = read_folder(tmp_path, 16)
    assert told(report, "moving.png") == [(Outcome.CONVERTED, "first of 2 frames")]
    assert decode(tmp_path / "moving.png").image.getcolors() == [(256, (255, 0, 0))]


def test_an_image_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 32)).save(tmp_path / "turned.jpg", exif=exif)
    assert decode(tmp_path / "turned.jpg").image.size == (32, 16)


def test_more_pixels_than_the_service_takes_are_never_decoded(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    for name, side in (("large.png", 4097), ("huge.png", 30_000)):
        header = io.BytesIO()
        PngImagePlugin.putchunk(
            header, b"IHDR", side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
        )
        PngImagePlugin.putchunk(header, b"IDAT", b"")
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + header.getvalue())
    _, report = read_folder(tmp_path, 16)
    assert {each.file for each in report.skipped} == {"large.png", "huge.png"}
    assert all("limit of 16777216 pixels" in each.message for each in report.skipped)


def test_tiny_images_are_skipped_and_small_ones_noted(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    write_image(tmp_path, "tiny.png", pixels(7, 7))
    write_image(tmp_path, "small.png", pixels(8, 12))
    dataset, report = read_folder(tmp_path, 16)
    assert len(dataset) == 3
    assert told(report, "tiny.png") == [(Outcome.SKIPPED, "7x7 px, and each side needs 8 px")]
    assert told(report, "small.png") == [(Outcome.NOTED, "12x12 px is enlarged to 16 px")]


def test_duplicates_are_told(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    write_image(tmp_path, "same.webp", Image.new("RGB", (16, 16), "red"))
    write_image(tmp_path, "same.png", decode(tmp_path / "same.webp").image)
    write_table(tmp_path / "captions.csv", [("a.png", "x"), ("b.png", "x"), ("same.png", "y")])
    dataset, report = read_folder(tmp_path, 16)
    assert len(dataset) == 4
    assert (Outcome.NOTED, "the same image as same.webp") in told(report, "same.png")
    assert told(report, "a.png") == [(Outcome.NOTED, 'the same caption "x" as b.png')]


def test_links_out_of_the_folder_and_to_folders_are_not_followed(tmp_path: Path) -> None:
    outside = write_image(tmp_path / "outside", "secret.png", 9)
    folder = write_images(tmp_path / "inside", "a.png", "b.png")
    (folder / "out.png").symlink_to(outside)
    (folder / "folder").symlink_to(tmp_path / "outside")
    (folder / "gone.png").symlink_to(folder / "nothing.png")
    (folder / "again.png").symlink_to(folder / "a.png")
    dataset, report = read_folder(folder, 16)
    assert [image.name for image in dataset.images] == ["a.png", "again.png", "b.png"]
    assert told(report, "out.png") == [(Outcome.SKIPPED, "a link that leads out of the folder")]
    assert told(report, "folder") == [(Outcome.SKIPPED, "links to folders are not followed")]
    assert told(report, "gone.png") == [(Outcome.SKIPPED, "not a file that can be read")]


def test_other_files_are_told_and_hidden_ones_are_not(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png", ".cache/c.png")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.pdf").write_bytes(b"")
    dataset, report = read_folder(tmp_path, 16)
    assert len(dataset) == 2
    assert [str(each) for each in report.problems] == [
        "notes.pdf: skipped: neither an image nor captions"
    ]


def test_a_long_report_is_cut_with_what_costs_files_first(tmp_path: Path) -> None:
    write_images(tmp_path, *[f"{index}.png" for index in range(6)])
    (tmp_path / "z.pdf").write_bytes(b"")
    _, report = read_folder(tmp_path, 32)
    lines = report.lines(limit=3)
    assert lines[0] == "z.pdf: skipped: neither an image nor captions"
    assert lines[3:] == ["and 4 more noted"]
