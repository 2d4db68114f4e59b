"""Data sets that Hugging Face `datasets` reads: of the Hub, or local folders of its formats."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import suppress
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.errors import UserError, short_reason, type_and_message
from engine.image_source import BLOCK, ReadOptions, Source
from engine.labels import NO_LABEL, check_num_classes
from engine.pixels import is_deep, parse_range, read_pixels

PREFIX = "hf:"
FORMATS = ("parquet", "arrow", "imagefolder", "webdataset")
IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")  # of columns of encoded images
LABEL_NAMES = ("label", "labels", "class", "cls")  # of columns of integers or strings
LABEL_TYPES = ("bool", "int", "uint", "string", "large_string")
HOW_TO_NAME = "Name it: --dataset hf:NAME,IMAGE_COLUMN or hf:NAME,IMAGE_COLUMN,LABEL_COLUMN"


def hf_source(dataset: str, options: ReadOptions, use_labels: bool) -> Source:
    """Returns the source of `hf:NAME[,IMAGE_COLUMN[,LABEL_COLUMN]]`.

    NAME: user/name of the Hub, or a local folder of parquet, arrow, image or WebDataset files. Its
    split `train` is streamed, or its only one; columns that are not named are found. Nothing of it
    is executed. options: channels 0 are RGB; images with more than 8 bits need a value_range.
    Raises UserError if it cannot be read, or if a column is not clear.
    """
    # The table, its columns and its classes.
    name, image_column, label_column = parse_reference(dataset)
    location, fingerprint, count, table = open_table(name)
    image_column = find_image_column(table.features, image_column, name)
    class_names: Sequence[str] | None = None
    columns = [image_column]
    if use_labels:
        label_column = find_label_column(table.features, label_column, name)
        class_names = getattr(table.features[label_column], "names", None)
        check_num_classes(class_names if class_names is not None else ("?", "?"), location)
        columns.append(label_column)
    rows = table.select_columns(columns)
    values: list[Any] = []  # of the label column, as far as it was streamed
    used: set[str] = set()  # options that are for images like some that were read
    channels = options.channels or 3
    value_range = parse_range(options.value_range)
    all_frames = options.frames == "all"

    # How the cache reads it: rows in blocks, images of a block, some sizes.
    def stream() -> Iterator[list[tuple[int, Any]]]:
        values.clear()
        iterator = enumerate(rows)
        try:
            while block := list(islice(iterator, BLOCK)):
                values.extend(row.get(label_column) for _, row in block)
                yield [(index, row[image_column]) for index, row in block]
        except Exception as error:  # of HTTP, of the file's format
            reason = f"{location} stops after {len(values)} images ({type_and_message(error)})"
            raise UserError(f"{reason}. Start again, or get its files again") from error

    def read(block: Sequence[tuple[int, Any]], size: int) -> list[np.ndarray | str]:
        results: list[np.ndarray | str] = []
        for index, value in block:
            try:
                with open_image(value) as image:
                    if is_deep(image.mode):
                        if not value_range:
                            raise ValueError("has more than 8 bits. Set --value_range LOW,HIGH")
                        used.add("value_range")
                    frames = read_pixels(image, size, channels, value_range, all_frames)
                    if len(frames) > 1:
                        used.add("frames")
                    results.append(frames)
            except Exception as error:  # Pillow raises nearly anything on a broken file
                results.append(f"image {index}: {error!r}")
        return results

    def sample_sizes() -> Iterator[int]:
        for _, value in next(stream(), []):
            with suppress(Exception), open_image(value) as image:
                yield min(image.size)

    def chosen() -> ReadOptions:
        needed = {name: getattr(options, name) for name in used}
        return ReadOptions(channels, **needed)

    def key_of(options: ReadOptions) -> str:
        is_default = not options.value_range and options.frames == ReadOptions.frames
        return f"\n{','.join(columns)} {channels if is_default else options}"

    return Source(
        location, fingerprint, count, read, lambda: channels, sample_sizes, stream=stream,
        cache_key=key_of(options), chosen=chosen, key_of=key_of,
        labels=(lambda: to_labels(values, class_names)) if use_labels else None,
    )  # fmt: skip


def parse_reference(dataset: str) -> tuple[str, str, str]:
    """Returns name and image and label column of `hf:...`, empty if not named."""
    reference = dataset.removeprefix(PREFIX)
    parts = [reference] if Path(reference).exists() else reference.split(",")
    if not parts[0] or len(parts) > 3:
        raise UserError(f"--dataset is {dataset}, but must look like hf:user/name or hf:my_folder")
    return (*parts, "", "")[:3]


def open_table(name: str) -> tuple[str, str, int, Any]:
    """Opens a data set: location, fingerprint, number of rows (0: unknown), stream."""
    if not importlib.util.find_spec("datasets"):
        raise UserError(f"--dataset hf:{name} needs a package. Run `pip install datasets`")
    import datasets

    # The split `train`, or the only one, of a format that executes no code.
    try:
        builder = datasets.load_dataset_builder(name)
        files = builder.config.data_files
        split = "train" if "train" in files or len(files) > 1 else next(iter(files))
        table = builder.as_streaming_dataset(split=split)
        format_ = type(builder).__module__.rpartition(".")[2]
        if format_ in FORMATS and table.features is None:
            table = table._resolve_features()
        for column, feature in (table.features or {}).items():
            if isinstance(feature, datasets.Image):  # encoded: bytes, or a dict of bytes or path
                table = table.cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # of HTTP, of the Hub, of the files
        advice = "It must be user/name of the Hub or a folder, of one configuration, with a split "
        reason = f"--dataset hf:{name} cannot be read ({short_reason(error)})"
        raise UserError(f"{reason}. {advice}train or a single one") from error
    if format_ not in FORMATS:
        raise UserError(f"hf:{name} has {format_} files, but must have {', '.join(FORMATS)}")

    # What identifies it.
    found = builder.info.splits or {}
    count = found[split].num_examples if split in found else 0
    location = str(Path(name).resolve()) if Path(name).exists() else f"{PREFIX}{name}"
    states = zip(files[split], files[split].origin_metadata, strict=False)
    return location, "".join(f"{file} {state}\n" for file, state in states), count, table


def find_image_column(features: dict[str, Any], name: str, dataset: str) -> str:
    """Returns the column of the images: the given one, the only one, or by its name."""
    import datasets

    binary = datasets.Value("binary")
    able = [n for n, f in features.items() if isinstance(f, (datasets.Image, dict)) or f == binary]
    typed = [n for n in able if isinstance(features[n], datasets.Image)]
    found = typed or [n for n in able if n.lower() in IMAGE_NAMES]
    return choose_column("images", features, name, able, found, dataset)


def find_label_column(features: dict[str, Any], name: str, dataset: str) -> str:
    """Returns the column of the labels: the given one, the only one, or by its name."""
    types = {n: str(getattr(f, "dtype", "")).rstrip("0123456789") for n, f in features.items()}
    able = [n for n, type_ in types.items() if type_ in LABEL_TYPES]
    typed = [n for n in able if hasattr(features[n], "names")]
    named = [n for n in able if n.lower() in LABEL_NAMES]
    found = named if named and len(typed) != 1 else typed
    return choose_column("labels", features, name, able, found, dataset)


def choose_column(
    content: str, features: dict[str, Any], name: str, able: list[str], found: list[str],
    dataset: str,
) -> str:  # fmt: skip
    """Returns the column `name`, of those `able`; without a name, the only one found."""
    types = {n: getattr(f, "dtype", type(f).__name__) for n, f in features.items()}
    columns = ", ".join(f"{n}: {type_}" for n, type_ in types.items())
    if name and name not in able:
        raise UserError(f"{dataset} has no {content} in a column {name} ({columns})")
    if not name and len(found) != 1:
        reason = f"{content} in {', '.join(found)}" if found else f"no column of {content}"
        raise UserError(f"{dataset} has {reason} ({columns}). {HOW_TO_NAME}")
    return name or found[0]


def open_image(value: bytes | dict[str, Any]) -> Image.Image:
    """Opens an encoded image, or the file that it names."""
    import fsspec  # comes with datasets

    content = value.get("bytes") if isinstance(value, dict) else value
    return Image.open(BytesIO(content) if content else fsspec.open(value["path"]).open())


def to_labels(
    values: Sequence[Any], class_names: Sequence[str] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns labels, int64, and class names of a column's values; None has NO_LABEL.

    class_names: what the column's integers index; None if the values themselves are the classes.
    Slashes in names are returned as hyphens.
    """
    if class_names is None:
        known = sorted({v for v in values if v is not None})
        indices = {value: index for index, value in enumerate(known)}
        values = [indices.get(value) for value in values]
        class_names = map(str, known)
    # A class name is a folder's, too.
    class_names = tuple(name.translate(str.maketrans("/\\\0", "---")) for name in class_names)
    return np.array([NO_LABEL if v is None else v for v in values], np.int64), class_names
