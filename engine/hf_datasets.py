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
REQUIREMENTS = (
    "It must be user/name of the Hub or a folder, of one configuration, with a split train or a "
    "single one"
)
HOW_TO_NAME = "Name it: --dataset hf:NAME,IMAGE_COLUMN or hf:NAME,IMAGE_COLUMN,LABEL_COLUMN"


def hf_source(dataset: str, options: ReadOptions, use_labels: bool) -> Source:
    """Returns the source of `hf:NAME[,IMAGE_COLUMN[,LABEL_COLUMN]]`.

    NAME: user/name of the Hub, or a local folder of parquet, arrow, image or WebDataset files. Its
    split `train` is streamed, or its only one; columns that are not named are found. Nothing of it
    is executed. options: channels 0 are RGB; images with more than 8 bits need a value_range.
    Raises UserError if it cannot be read, or if a column is not clear.
    """
    name, image_column, label_column = parse_reference(dataset)
    location, fingerprint, count, table = open_table(name)
    image_column = find_image_column(table.features, image_column, name)
    class_names: Sequence[str] | None = None
    if use_labels:
        label_column = find_label_column(table.features, label_column, name)
        class_names = getattr(table.features[label_column], "names", None)
        if class_names is not None:  # else the column's values are the classes
            check_num_classes(class_names, location)
    else:
        label_column = ""
    reader = TableReader(table, location, image_column, label_column, options)
    return Source(
        location, fingerprint, count, reader.read, lambda: reader.channels, reader.sample_sizes,
        stream=reader.stream, cache_key=reader.key_of(options), chosen=reader.chosen,
        key_of=reader.key_of,
        labels=(lambda: to_labels(reader.label_values, class_names)) if use_labels else None,
    )  # fmt: skip


class TableReader:
    """Reads a streamed table for a Source: blocks of rows, images of a block, labels.

    label_column: "" for none. label_values: its values, as far as the table was streamed.
    """

    def __init__(
        self, table: Any, location: str, image_column: str, label_column: str, options: ReadOptions
    ):  # fmt: skip
        self.location = location
        self.image_column = image_column
        self.label_column = label_column
        self.columns = [column for column in (image_column, label_column) if column]
        self.rows = table.select_columns(self.columns)
        self.options = options
        self.channels = options.channels or 3
        self.value_range = parse_range(options.value_range)
        self.used: set[str] = set()  # options that changed how an image was read
        self.label_values: list[Any] = []

    def stream(self) -> Iterator[list[tuple[int, Any]]]:
        """Yields blocks of numbered encoded images, from the first; collects their labels."""
        self.label_values.clear()
        rows = enumerate(self.rows)
        try:
            while block := list(islice(rows, BLOCK)):
                self.label_values += [row.get(self.label_column) for _, row in block]
                yield [(index, row[self.image_column]) for index, row in block]
        except Exception as error:  # of HTTP, of the file's format
            count = len(self.label_values)
            reason = f"{self.location} stops after {count} images ({type_and_message(error)})"
            raise UserError(f"{reason}. Start again, or get its files again") from error

    def read(self, block: Sequence[tuple[int, Any]], size: int) -> list[np.ndarray | str]:
        """Returns the frames of each image of a block, or why it cannot be read."""
        return [self.read_image(index, value, size) for index, value in block]

    def read_image(self, index: int, value: Any, size: int) -> np.ndarray | str:
        """Returns an image's frames, uint8 (N, C, size, size), or why it cannot be read."""
        all_frames = self.options.frames == "all"
        try:
            with open_image(value) as image:
                if is_deep(image.mode):
                    if not self.value_range:
                        raise ValueError("has more than 8 bits. Set --value_range LOW,HIGH")
                    self.used.add("value_range")
                frames = read_pixels(image, size, self.channels, self.value_range, all_frames)
        except Exception as error:  # Pillow raises nearly anything on a broken file
            return f"image {index}: {error!r}"
        if len(frames) > 1:
            self.used.add("frames")
        return frames

    def sample_sizes(self) -> Iterator[int]:
        """Yields the smaller side of each of the first images; before all are read."""
        for _, value in next(self.stream(), []):
            with suppress(Exception), open_image(value) as image:
                yield min(image.size)

    def chosen(self) -> ReadOptions:
        """Returns the options that the images were read with."""
        return ReadOptions(self.channels, **{n: getattr(self.options, n) for n in self.used})

    def key_of(self, options: ReadOptions) -> str:
        """Returns what tells the caches of these options from those of others."""
        is_default = not options.value_range and options.frames == ReadOptions.frames
        return f"\n{','.join(self.columns)} {self.channels if is_default else options}"


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
        reason = f"--dataset hf:{name} cannot be read ({short_reason(error)})"
        raise UserError(f"{reason}. {REQUIREMENTS}") from error
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
