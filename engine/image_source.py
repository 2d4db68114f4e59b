"""Sources of images: what they have, and how they are read."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine import pixels
from engine.distributed import print0
from engine.errors import UserError
from engine.image_cache import Source
from engine.image_files import file_fingerprint, find_images
from engine.pixels import Range

MAX_SIZES_CHECKED = 200  # images whose size is compared with --image_size
MAX_CROPPED_FRACTION = 0.1  # of an image; with more, a line says so
ARRAY_FILES = (".npz", ".npy")
CHANNEL_NAMES = {1: "gray", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class ReadOptions:
    """How images are read, as in the settings of these names."""

    channels: int = 0  # 1, 3 or 4; 0: what the images have
    value_range: str = ""  # LOW,HIGH of images with more than 8 bits; "": found from all of them
    frames: str = "first"  # or "all": of files with several

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ReadOptions":
        """Returns the options of a run; runs of earlier versions are RGB."""
        known = {name.upper(): name for name in ("channels", "value_range", "frames")}
        values = {"CHANNELS": 3} | dict(config)
        return cls(**{name: values[key] for key, name in known.items() if key in values})


DEFAULT_OPTIONS = ReadOptions()


def path_source(path: Path, options: ReadOptions) -> Source:
    """Returns the source of the images in a folder, .zip, .tar, .npz or .npy.

    Raises UserError if there are none, or if the file is of another kind.
    """
    if path.suffix.lower() in ARRAY_FILES and path.is_file():
        return array_source(path, options)
    files = find_images(path)

    def open_image(name: str) -> Image.Image:
        return Image.open(files.open(name))

    source = image_source(path, files.fingerprint, files.names, open_image, options)
    return replace(source, names=files.names)


def array_source(path: Path, options: ReadOptions) -> Source:
    """Returns the source of the images (N, H, W) or (N, H, W, C) in an .npz or .npy.

    Values of more than 8 bits and floats are scaled like those of image files.
    """
    images = load_array(path)
    if images.dtype != np.uint8:
        value_range = pixels.parse_range(options.value_range)
        if not value_range:
            lowest, highest = float(images.min()), float(images.max())
            if not math.isfinite(highest - lowest):
                raise UserError(f"{path} has values that are not finite. Remove those images")
            value_range = pixels.find_range(lowest, highest)
            print_range(len(images), lowest, highest, value_range)

    def open_image(index: int) -> Image.Image:
        image = images[index]
        image = image if image.dtype == np.uint8 else pixels.scale(image, value_range)
        return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)

    return image_source(path, file_fingerprint(path), range(len(images)), open_image, options)


def load_array(path: Path) -> np.ndarray:
    """Returns the first array of images in an .npz or .npy: (N, H, W, C), C is 1, 3 or 4."""
    try:
        file = np.load(path, allow_pickle=False, mmap_mode="r")
        arrays = [file[name] for name in file.files] if path.suffix.lower() == ".npz" else [file]
    except Exception as error:  # numpy and zipfile each raise their own
        raise UserError(f"{path} is damaged or not an array file ({error})") from error
    found = []
    for array in arrays:
        if array.ndim == 3 and array.shape[2] > 4:
            array = array[..., None]
        if array.ndim == 4 and array.shape[3] in (1, 3, 4) and array.size and is_number(array):
            return array
        found.append(f"{array.dtype} {array.shape}")
    expected = "images (N, H, W), or (N, H, W, C) with 1, 3 or 4 channels"
    raise UserError(f"{path} holds {', '.join(found) or 'nothing'}, but should hold {expected}")


def is_number(array: np.ndarray) -> bool:
    """Whether an array has real numbers or booleans."""
    return array.dtype.kind in "biuf"


def image_source(
    path: Path, fingerprint: str, items: Sequence, open_image: Callable[[Any], Image.Image],
    options: ReadOptions | None,
) -> Source:  # fmt: skip
    """Returns the source of the images open_image(item). options: None for single RGB images."""

    @functools.cache
    def survey() -> tuple[int, Range | None]:
        return examine(items, open_image, options) if options else (3, None)

    def read(block: range, size: int) -> list[np.ndarray | str]:
        channels, value_range = survey()
        results: list[np.ndarray | str] = []
        for index in block:
            try:
                with open_image(items[index]) as image:
                    how = channels, value_range, all_frames
                    results.append(pixels.read_pixels(image, size, *how))
            except Exception as error:  # Pillow raises nearly anything on a broken file
                results.append(f"{items[index]}: {error!r}")
        return results

    def sample_sizes() -> Iterator[int]:
        for item in items[:: -(-len(items) // MAX_SIZES_CHECKED)]:
            with suppress(Exception), open_image(item) as image:  # reads the header only
                yield min(image.size)

    all_frames = options is not None and options.frames == "all"
    return Source(
        str(path.resolve()), fingerprint, len(items), read, lambda: survey()[0], sample_sizes,
        variant=f"\n{options}" if options else "",
    )  # fmt: skip


def examine(
    items: Sequence, open_image: Callable[[Any], Image.Image], options: ReadOptions
) -> tuple[int, Range | None]:
    """Reads every header; returns the channels and the range of values, and prints both.

    Also decodes images with more than 8 bits, unless their range is given, and some with
    transparency. Prints what cropping to squares cuts off, if that is much, and how many frames
    there are.
    """
    kinds: Counter[str] = Counter()
    is_transparent = False
    value_range = pixels.parse_range(options.value_range)
    lowest, highest = math.inf, -math.inf
    num_deep = num_frames = num_animated = 0
    cropped = 0.0
    for index, item in enumerate(items):
        with suppress(Exception), open_image(item) as image:  # broken ones are reported later
            has_alpha = image.has_transparency_data
            kinds["RGBA" if has_alpha else "gray" if pixels.is_gray(image) else "RGB"] += 1
            cropped += 1 - min(image.size) / max(image.size)
            frames = getattr(image, "n_frames", 1)
            num_animated += frames > 1
            num_frames += frames if frames > 1 else 0
            # Many images have an alpha channel that is opaque everywhere.
            if has_alpha and index % -(-len(items) // MAX_SIZES_CHECKED) == 0:
                is_transparent |= image.convert("RGBA").getextrema()[3][0] < 255
            if pixels.is_deep(image) and value_range is None:
                for frame in pixels.iterate_frames(image, options.frames == "all"):
                    values = np.asarray(frame)[np.isfinite(frame)]
                    lowest = min(lowest, float(values.min()))
                    highest = max(highest, float(values.max()))
                num_deep += 1

    # What is done with them, in a line each.
    count = max(kinds.total(), 1)
    channels = options.channels or choose_channels(kinds, is_transparent)
    if kinds:
        print_channels(kinds, channels)
    if num_deep:
        value_range = pixels.find_range(lowest, highest)
        print_range(num_deep, lowest, highest, value_range)
    if num_animated:
        is_first = options.frames == "first"
        use = "the first of each (--frames all: every one)" if is_first else "all of them"
        print0(f"files of several frames: {num_animated} with {num_frames} frames; using {use}")
    if cropped / count > MAX_CROPPED_FRACTION:
        print0(f"cropping to squares cuts off {100 * cropped / count:.0f} % of the images' area")
    return channels, value_range


def choose_channels(kinds: Mapping[str, int], is_transparent: bool) -> int:
    """Returns 4 if all images have transparency, 1 if all are gray, else 3."""
    if len(kinds) == 1 and "gray" in kinds:
        return 1
    return 4 if len(kinds) == 1 and is_transparent else 3


def print_channels(kinds: Mapping[str, int], channels: int) -> None:
    """Prints how many images there are of each kind, and as what they are read."""
    found = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    white = ", transparency on white" if "RGBA" in kinds and channels != 4 else ""
    print0(f"images read as {CHANNEL_NAMES[channels]}{white}: {found} (--channels 1, 3 or 4)")


def print_range(count: int, lowest: float, highest: float, value_range: Range) -> None:
    """Prints what is taken for black and white."""
    low, high = value_range
    print0(
        f"images of more than 8 bits: {count} with values {lowest:g} to {highest:g}; {low:g} is "
        f"black and {high:g} white (--value_range=LOW,HIGH)"
    )
