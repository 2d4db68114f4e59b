"""Class labels: int64 indices into the class names of a data set, -1 where there is no label."""

from collections.abc import Sequence

import numpy as np

from engine.errors import UserError

NO_LABEL = -1
MAX_CLASSES = 10_000


def labels_from_folders(paths: Sequence[str], location: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns the labels (N,) and class names of images in class folders.

    paths: relative to `location`, with slashes; the first folder is the class. Without any folder
    there are no classes. Raises UserError for images beside the folders.
    """
    beside = [path for path in paths if "/" not in path]
    if len(beside) == len(paths):
        return np.full(len(paths), NO_LABEL), ()
    if beside:
        raise UserError(
            f"{location} has images beside its class folders ({len(beside)}, e.g. {beside[0]}), "
            "whose class is unknown. Move them into a folder, or drop --class_conditional"
        )
    classes = [path.partition("/")[0] for path in paths]
    names, labels = np.unique(classes, return_inverse=True)
    return labels.astype(np.int64), tuple(names.tolist())


def check_classes(class_names: Sequence[str], location: str) -> None:
    """Raises UserError for a number of classes that a model cannot be trained with."""
    count = len(class_names)
    if not 2 <= count <= MAX_CLASSES:
        found = "no labels" if not count else "1 class" if count == 1 else f"{count:,} classes"
        needed = f"--class_conditional needs 2 to {MAX_CLASSES:,} classes"
        raise UserError(f"{location} has {found}, but {needed}. Drop it, or choose other data")
