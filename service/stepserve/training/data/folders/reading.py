"""From a folder to its dataset: every file is looked at before a training starts."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from stepserve.training.data.folders.caption_files import (
    Captions,
    caption_from_file_name,
    is_table,
    read_sidecars,
    read_tables,
    sidecar_of,
)
from stepserve.training.data.folders.dataset import (
    FolderDataset,
    Labelling,
    Outcome,
    Problem,
    ProblemReport,
    TrainingImage,
)
from stepserve.training.data.folders.image_files import SUFFIXES, UnusableImageError, decode
from stepserve.training.errors import DatasetError

MIN_IMAGES = 2
SHOWN_NAMES = 3
OnFile = Callable[[str], None]


@dataclass(frozen=True)
class Listing:
    """The names of a folder's files, by what they may be."""

    images: tuple[str, ...]
    texts: tuple[str, ...]
    tables: tuple[str, ...]
    problems: tuple[Problem, ...]


def read_folder(
    folder: Path,
    size_px: int,
    labelling: Labelling | None = None,
    on_file: OnFile | None = None,
) -> tuple[FolderDataset, ProblemReport]:
    """Find, decode and label all images below `folder`.

    Args:
        size_px: what they are trained at; smaller ones are noted.
        labelling: None: caption tables if there are any, else text files beside images, else class
            folders, else none. Captions from file names have to be asked for.
        on_file: called with the name of each image before it is decoded.

    Raises:
        DatasetError: there is no such folder, fewer than two usable images, a caption file that
            cannot be read, or no label of the kind that was asked for.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder")
    listing = list_files(folder)
    images, problems = _decode_all(folder, listing.images, size_px, on_file or _ignore)
    problems = [*listing.problems, *problems]
    _check_enough(folder, len(images), problems)
    chosen = labelling or _find_labelling(listing)
    dataset, label_problems = _label(FolderDataset(folder, images, chosen), listing)
    problems += [*label_problems, *_duplicates(dataset)]
    _check_enough(folder, len(dataset), problems)
    return dataset, ProblemReport(tuple(problems))


def list_files(folder: Path) -> Listing:
    """The files below a folder, sorted; links out of it and unknown files are problems."""
    images: list[str] = []
    texts: list[str] = []
    tables: list[str] = []
    problems: list[Problem] = []
    for name in _walk(folder, problems):
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in SUFFIXES:
            images.append(name)
        elif is_table(name):
            tables.append(name)
        elif suffix == ".txt":
            texts.append(name)
        else:
            problems.append(Problem(name, Outcome.SKIPPED, "neither an image nor captions"))
    return Listing(tuple(images), tuple(texts), tuple(tables), tuple(problems))


def _walk(folder: Path, problems: list[Problem]) -> list[str]:
    """Names of regular files within the folder; hidden ones are left out."""
    names = []
    inside = folder.resolve()
    for parent, folders, files in os.walk(folder):
        folders[:] = [each for each in folders if not each.startswith(".")]
        links = [each for each in folders if Path(parent, each).is_symlink()]
        for each in (*links, *files):
            path = Path(parent, each)
            name = path.relative_to(folder).as_posix()
            if each.startswith("."):
                continue
            if each in links:
                problems.append(Problem(name, Outcome.SKIPPED, "links to folders are not followed"))
            elif not path.resolve().is_relative_to(inside):
                problems.append(
                    Problem(name, Outcome.SKIPPED, "a link that leads out of the folder")
                )
            elif not path.is_file():
                problems.append(Problem(name, Outcome.SKIPPED, "not a file that can be read"))
            else:
                names.append(name)
    return sorted(names)


def _decode_all(
    folder: Path, names: Iterable[str], size_px: int, on_file: OnFile
) -> tuple[tuple[TrainingImage, ...], list[Problem]]:
    images, problems = [], []
    for name in names:
        on_file(name)
        try:
            decoded = decode(folder / name)
        except UnusableImageError as error:
            problems.append(Problem(name, Outcome.SKIPPED, str(error)))
            continue
        problems += [Problem(name, Outcome.CONVERTED, done) for done in decoded.conversions]
        width, height = decoded.image.size
        if min(width, height) < size_px:
            enlarged = f"{width}x{height} px is enlarged to {size_px} px"
            problems.append(Problem(name, Outcome.NOTED, enlarged))
        shape = f"{width}x{height}:".encode()
        digest = hashlib.sha256(shape + decoded.image.tobytes()).hexdigest()
        images.append(TrainingImage(name, width, height, digest))
    return tuple(images), problems


def _check_enough(folder: Path, images: int, problems: Sequence[Problem]) -> None:
    if images < MIN_IMAGES:
        found = ProblemReport(tuple(problems)).lines()
        heading = f"{folder} has {images} usable images; at least {MIN_IMAGES} are needed"
        raise DatasetError("\n".join([heading, *found]))


def _find_labelling(listing: Listing) -> Labelling:
    if listing.tables:
        return Labelling.TABLES
    texts = set(listing.texts)
    if any(sidecar_of(image) in texts for image in listing.images):
        return Labelling.SIDECARS
    if all(_class_of(image) for image in listing.images):
        return Labelling.CLASSES
    return Labelling.NONE


def _label(dataset: FolderDataset, listing: Listing) -> tuple[FolderDataset, list[Problem]]:
    if dataset.labelling == Labelling.CLASSES:
        return _label_classes(dataset, listing)
    if dataset.labelling == Labelling.NONE:
        mixed = sorted({_class_of(image.name) for image in dataset.images} - {""})
        unused = "not taken as a class, as there are images beside it"
        return dataset, [Problem(name, Outcome.NOTED, unused) for name in mixed]
    captions = _captions(dataset, listing)
    if not captions.by_name:
        raise DatasetError(f"{dataset.folder} has no captions from {dataset.labelling}")
    images = tuple(
        replace(image, caption=captions.by_name.get(image.name)) for image in dataset.images
    )
    bare = [image.name for image in images if image.caption is None]
    missing = [Problem(name, Outcome.NOTED, "has no caption, or an empty one") for name in bare]
    return replace(dataset, images=images), [*captions.problems, *missing]


def _label_classes(dataset: FolderDataset, listing: Listing) -> tuple[FolderDataset, list[Problem]]:
    """Each first sub-folder is a class; the image's label is its index among the sorted names."""
    inside = tuple(image for image in dataset.images if _class_of(image.name))
    names = sorted({_class_of(image.name) for image in inside})
    if not names:
        raise DatasetError(f"{dataset.folder} has no sub-folders with usable images")
    labelled = tuple(replace(image, label=names.index(_class_of(image.name))) for image in inside)
    problems = [
        Problem(image.name, Outcome.SKIPPED, "lies in no class folder")
        for image in dataset.images
        if not _class_of(image.name)
    ]
    empty = sorted({_class_of(name) for name in listing.images} - {*names, ""})
    problems += [Problem(name, Outcome.SKIPPED, "a class without a usable image") for name in empty]
    return replace(dataset, images=labelled, class_names=tuple(names)), problems


def _captions(dataset: FolderDataset, listing: Listing) -> Captions:
    names = [image.name for image in dataset.images]
    if dataset.labelling == Labelling.TABLES:
        return read_tables(dataset.folder, listing.tables, names)
    if dataset.labelling == Labelling.SIDECARS:
        return read_sidecars(dataset.folder, names, listing.texts)
    found = {name: caption_from_file_name(name) for name in names}
    return Captions({name: caption for name, caption in found.items() if caption}, ())


def _class_of(name: str) -> str:
    """The first sub-folder of a name, or nothing."""
    first, *rest = PurePosixPath(name).parts
    return first if rest else ""


def _duplicates(dataset: FolderDataset) -> list[Problem]:
    pixels = _groups((image.pixels_digest, image.name) for image in dataset.images)
    captioned = [(image.caption, image.name) for image in dataset.images if image.caption]
    return [
        *_told(pixels, lambda _, others: f"the same image as {others}"),
        *_told(_groups(captioned), lambda text, others: f'the same caption "{text}" as {others}'),
    ]


def _groups(pairs: Iterable[tuple[str, str]]) -> Mapping[str, list[str]]:
    groups = defaultdict(list)
    for key, name in pairs:
        groups[key].append(name)
    return groups


def _told(
    groups: Mapping[str, Sequence[str]], message: Callable[[str, str], str]
) -> Iterable[Problem]:
    """One problem for each group of two or more, under the name of its first file."""
    for key, (first, *others) in groups.items():
        if others:
            more = len(others) - SHOWN_NAMES
            listed = ", ".join(others[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
            yield Problem(first, Outcome.NOTED, message(key, listed))


def _ignore(_: str) -> None:
    """What is done with a file's name where nobody wants to know it."""
