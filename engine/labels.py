"""Class labels: int64 indices into the class names of a data set, -1 where there is no label."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from engine.errors import UserError
from engine.settings import suggest

NO_LABEL = -1
MAX_CLASSES = 10_000
UNCONDITIONAL = "this model is unconditional: it takes no labels"


def labels_from_folders(paths: Sequence[str], location: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns the labels (N,) and class names of images in class folders.

    paths: relative to `location`, with slashes; the first folder is the class. Without any folder
    there are no classes. Raises UserError for images outside of them.
    """
    outside = [path for path in paths if "/" not in path]
    if len(outside) == len(paths):
        return np.full(len(paths), NO_LABEL), ()
    if outside:
        raise UserError(
            f"{location} has images outside its class folders ({len(outside)}, e.g. {outside[0]}), "
            "whose class is unknown. Move them into a folder, or drop --class_conditional"
        )
    names, labels = np.unique([path.partition("/")[0] for path in paths], return_inverse=True)
    return labels.astype(np.int64), tuple(names.tolist())


def check_classes(class_names: Sequence[str], location: str) -> None:
    """Raises UserError for a number of classes that a model cannot be trained with."""
    count = len(class_names)
    if not 2 <= count <= MAX_CLASSES:
        found = "no labels" if not count else "1 class" if count == 1 else f"{count:,} classes"
        needed = f"--class_conditional needs 2 to {MAX_CLASSES:,} classes"
        raise UserError(f"{location} has {found}, but {needed}. Drop it, or choose other data")


def parse_classes(text: str, class_names: Sequence[str]) -> list[int]:
    """Parses `cat,dog`, `0-4,7` or `cat-dog` to labels; names come before numbers.

    Raises UserError for an unknown class, with the nearest name.
    """
    if not class_names:
        raise UserError(f"{UNCONDITIONAL}, so --classes cannot be set")

    def label_of(name: str) -> int | None:
        if name in class_names:
            return class_names.index(name)
        return int(name) if name.isdecimal() and int(name) < len(class_names) else None

    labels: list[int] = []
    for part in [text] if text in class_names else text.split(","):
        name = part.strip()
        label = label_of(name)
        found = [] if label is None else [label]
        # A hyphen may be part of a name, or make a range.
        for i in [i for i, letter in enumerate(name) if letter == "-" and not found]:
            first = label_of(name[:i])
            last = label_of(name[i + 1 :])
            if first is not None and last is not None:
                found = list(range(first, last + 1))
        if not found:
            known = textwrap.shorten(", ".join(class_names), 100)
            closest = suggest(name, class_names)
            raise UserError(f"unknown class {name!r}{closest}; choose from {known}, or by number")
        labels += found
    return list(dict.fromkeys(labels))


def check_class_names(class_counts: Mapping[str, int]) -> None:
    """Raises UserError for class names that could not be names of folders."""
    for name, count in class_counts.items():
        if name in ("", ".", "..") or set(name) & set("/\\\0") or not isinstance(count, int):
            raise UserError(f"{name!r} is not a class: names are those of folders, with counts")


def check_classes_on_resume(
    path: Path, saved: Mapping[str, int], class_counts: Mapping[str, int]
) -> None:
    """Raises UserError if a run would continue with other or smaller classes.

    saved, class_counts: images by class name, of the run and of the data. An unconditional run may
    continue as a conditional one.
    """
    if not saved or saved == class_counts:
        return
    was, now = (
        textwrap.shorten(", ".join(f"{count} {name}" for name, count in each.items()), 80)
        for each in (saved, class_counts)
    )
    message = f"{path} was trained on {len(saved)} classes ({was})"
    if not class_counts:
        raise UserError(f"{message}. Resume with --class_conditional")
    raise UserError(f"{message}, but the data has {len(class_counts)} ({now}): start another run")


def labels_of_seeds(seeds: Iterable[int], counts: Iterable[int]) -> np.ndarray:
    """Returns a label for each seed, int64 (N,), in proportion to the counts.

    Consecutive seeds spread evenly: a seed's place in [0, 1) is the fractional part of its product
    with the golden ratio.
    """
    places = [(seed * 0x9E3779B97F4A7C15 % 2**64 >> 11) / 2**53 for seed in seeds]
    bounds = np.cumsum(list(counts))
    return np.searchsorted(bounds / bounds[-1], places, side="right")
