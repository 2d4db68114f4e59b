"""Class labels: int64 indices into the class names of a data set, -1 where there is no label."""

import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from engine.errors import UserError
from engine.settings import suggest

NO_LABEL = -1
INVERSE_GOLDEN_RATIO = 0x9E3779B97F4A7C15  # in units of 2^-64
MAX_CLASSES = 10_000
UNCONDITIONAL_ERROR = "this model is unconditional: it takes no labels"


def labels_from_folders(paths: Sequence[str], location: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns the labels (N,) and class names of images in class folders.

    paths: relative to `location`, with slashes; the first folder is the class. Without any folder
    there are no classes; one around all class folders is none. Raises UserError for images outside.
    """
    while len({p.partition("/")[0] for p in paths}) == 1 and all(p.count("/") > 1 for p in paths):
        paths = [path.partition("/")[2] for path in paths]
    outside = [path for path in paths if "/" not in path]
    if len(outside) == len(paths):
        return np.full(len(paths), NO_LABEL), ()
    if outside:
        raise UserError(
            f"{location} has images outside its class folders ({len(outside)}, e.g. {outside[0]}), "
            "whose class is unknown. Move them into a folder, or pass --no-class_conditional"
        )
    names, labels = np.unique([path.partition("/")[0] for path in paths], return_inverse=True)
    # Names in other encodings could not be shown.
    names = [name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name in names]
    return labels.astype(np.int64), tuple(names)


def check_num_classes(class_names: Sequence[str], location: str) -> None:
    """Raises UserError for a number of classes that a model cannot be trained with."""
    count = len(class_names)
    if not 2 <= count <= MAX_CLASSES:
        found = "no labels" if not count else "1 class" if count == 1 else f"{count:,} classes"
        needed = f"--class_conditional needs 2 to {MAX_CLASSES:,} classes"
        advice = "Pass --no-class_conditional, or choose other data"
        raise UserError(f"{location} has {found}, but {needed}. {advice}")


def check_distinct(class_names: Sequence[str], location: str) -> None:
    """Raises UserError if two classes have one name."""
    twice = [name for name, count in Counter(class_names).items() if count > 1]
    if twice:
        reason = f"has several classes that are named {twice[0]} here (with - for slashes)"
        raise UserError(f"{location} {reason}. Rename one")


def parse_classes(text: str, class_names: Sequence[str]) -> list[int]:
    """Parses `cat,dog`, `0-4,7` or `cat-dog` to labels; names come before numbers.

    Raises UserError for an unknown class, with the nearest name, and for a reversed range.
    """
    if not class_names:
        raise UserError(f"{UNCONDITIONAL_ERROR}, so --classes cannot be set")
    labels: list[int] = []
    for part in [text] if text in class_names else text.split(","):
        labels += _parse_range(part if part in class_names else part.strip(), class_names)
    return list(dict.fromkeys(labels))


def _parse_range(text: str, class_names: Sequence[str]) -> Sequence[int]:
    """Returns the labels of a class or of a range of classes."""

    def label_of(name: str) -> int | None:
        if name in class_names:
            return class_names.index(name)
        is_number = name.isdecimal() and len(name) < 9
        return int(name) if is_number and int(name) < len(class_names) else None

    label = label_of(text)
    if label is not None:
        return [label]
    # Any hyphen may make the range: names contain hyphens, too.
    for hyphen in re.finditer("-", text):
        names = text[: hyphen.start()], text[hyphen.end() :]
        first, last = map(label_of, names)
        if first is not None and last is not None:
            if first > last:
                forward = f"{names[1]}-{names[0]}"
                raise UserError(f"classes has the reversed range {text}. Write {forward}")
            return range(first, last + 1)
    known = textwrap.shorten(", ".join(class_names), 100)
    closest = suggest(text, class_names)
    raise UserError(f"unknown class {text!r}; choose from {known}, or by number{closest}")


def as_class_counts(class_counts: Mapping[str, int]) -> dict[str, int]:
    """Returns numbers of images by class name; UserError for invalid ones.

    A name must suit a folder.
    """
    for name, count in class_counts.items():
        is_folder = 0 < len(os.fsencode(name)) < 256 and not set(name) & set("/\\\0")
        is_count = isinstance(count, (int, np.integer)) and count >= 0
        if name in (".", "..") or not is_folder or not is_count:
            needed = "names that a folder can have, with numbers of images"
            shown = textwrap.shorten(repr(name), 60)
            raise UserError(f"the model has the class {shown}: {count!r}, but must have {needed}")
    return {str(name): int(count) for name, count in class_counts.items()}


def check_classes_on_resume(
    path: Path, saved: Mapping[str, int], class_counts: Mapping[str, int]
) -> None:
    """Raises UserError if a run would continue on the same images with other labels.

    saved, class_counts: images by class name, of the run and of the data. An unconditional run may
    continue as a conditional one.
    """
    # The order of the names is that of the labels.
    if not saved or list(saved.items()) == list(class_counts.items()):
        return
    if not class_counts:
        raise UserError(f"{path} was trained with classes. Resume with --class_conditional")
    changes = [
        f"{name}: {saved.get(name, 'none')}, now {class_counts.get(name, 'none')}"
        for name in {**saved, **class_counts}
        if saved.get(name) != class_counts.get(name)
    ]
    found = textwrap.shorten("; ".join(changes), 100) or "the classes in another order"
    advice = f"To train with them from its weights, start a new run with --init_from {path}"
    raise UserError(f"the labels are not those that {path} was trained with ({found}). {advice}")


def labels_in_proportion(seeds: Iterable[int], counts: Iterable[int]) -> np.ndarray:
    """Returns a label for each seed, int64 (N,), in proportion to the counts.

    Consecutive seeds spread evenly: a seed's place in [0, 1) is the fractional part of its
    quotient by the golden ratio. Raises UserError if all counts are 0.
    """
    places = [(seed * INVERSE_GOLDEN_RATIO % 2**64 >> 11) / 2**53 for seed in seeds]
    bounds = np.cumsum(list(counts))
    if not bounds[-1]:
        raise UserError("no class has an image, so labels must be named")
    return np.searchsorted(bounds / bounds[-1], places, side="right")
