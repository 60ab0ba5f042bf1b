"""Captions from files: one text beside each image, or tables in the layout of imagefolder.

A table is `captions.csv`, `metadata.csv` or any `.jsonl` file, in the folder or below it. Its
columns are `file_name` (relative to the table) and `text`, as in imagefolder of Hugging Face.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from stepserve.training.data.folders.dataset import Outcome, Problem
from stepserve.training.errors import DatasetError

TABLE_NAMES = frozenset({"captions.csv", "metadata.csv"})
MAX_TEXT_BYTES = 64 * 1024 * 1024
COLUMNS = ("file_name", "text")


@dataclass(frozen=True)
class Captions:
    """Captions by the image's name, and what is wrong with the files that they come from."""

    by_name: Mapping[str, str]
    problems: tuple[Problem, ...]


def is_table(name: str) -> bool:
    """Whether a file may hold captions of many images."""
    path = PurePosixPath(name)
    return path.name in TABLE_NAMES or path.suffix.lower() == ".jsonl"


def sidecar_of(image: str) -> str:
    """The text file that belongs to an image."""
    return str(PurePosixPath(image).with_suffix(".txt"))


def caption_from_file_name(name: str) -> str:
    """The words of a file's name: `red_apple-2.png` is `red apple 2`."""
    stem = PurePosixPath(name).stem
    return " ".join(stem.replace("_", " ").replace("-", " ").split())


def read_sidecars(folder: Path, images: Sequence[str], texts: Sequence[str]) -> Captions:
    """The captions in the text files `texts` beside the images.

    Raises:
        DatasetError: one is not UTF-8 text, or too long.
    """
    known = set(texts)
    captions = {
        image: " ".join(read_text(folder, sidecar_of(image)).split())
        for image in images
        if sidecar_of(image) in known
    }
    unused = sorted(known - {sidecar_of(image) for image in images})
    return Captions(
        {image: text for image, text in captions.items() if text},
        tuple(Problem(name, Outcome.SKIPPED, "there is no image of this name") for name in unused),
    )


def read_tables(folder: Path, tables: Sequence[str], images: Sequence[str]) -> Captions:
    """The captions in all tables; a row for an image that is not there is a problem.

    Raises:
        DatasetError: a table is not UTF-8 text, too long, lacks a column, or a row is malformed.
    """
    known = set(images)
    captions: dict[str, str] = {}
    problems: list[Problem] = []
    for table in tables:
        for line, file_name, text in _rows(folder, table):
            name = str(PurePosixPath(table).parent / file_name)
            problem = _row_problem(name, known, captions)
            if problem is not None:
                problems.append(Problem(f"{table}:{line}", Outcome.SKIPPED, problem))
            elif text.strip():
                captions[name] = " ".join(text.split())
    return Captions(captions, tuple(problems))


def read_text(folder: Path, name: str) -> str:
    """A text file.

    Raises:
        DatasetError: names the file; it is not UTF-8 text, or too long.
    """
    path = folder / name
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise DatasetError(f"{name} is larger than the limit of {MAX_TEXT_BYTES} bytes")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{name} cannot be read as UTF-8 text: {error}") from error


def _row_problem(name: str, known: set[str], captions: Mapping[str, str]) -> str | None:
    if name not in known:
        return f"names the image {name}, which is not there or cannot be used"
    if name in captions:
        return f"a second caption of {name}; the first is kept"
    return None


def _rows(folder: Path, table: str) -> Iterator[tuple[int, str, str]]:
    """Line number, file name and text of each row."""
    content = read_text(folder, table)
    rows = _csv_rows(content) if table.endswith(".csv") else _jsonl_rows(table, content)
    for line, row in rows:
        values = [row.get(column) for column in COLUMNS]
        file_name, text = values
        if not isinstance(file_name, str) or not isinstance(text, str):
            raise DatasetError(f"{table}:{line}: each row needs texts {' and '.join(COLUMNS)}")
        yield line, file_name, text


def _csv_rows(content: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    reader = csv.DictReader(io.StringIO(content, newline=""))
    for row in reader:
        yield reader.line_num, row


def _jsonl_rows(table: str, content: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DatasetError(f"{table}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DatasetError(f"{table}:{number}: each line needs a JSON object")
        yield number, row
