"""Pixels of Pillow images: channels, the range of values, frames and center squares."""

import math
import threading
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
from PIL import Image, ImageOps

from engine.errors import UserError

Range = tuple[float, float]  # the values that become black, 0, and white, 255

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels
GRAY_MODES = ("1", "L", "LA", "La", "F")  # and I, I;16, ...
LARGE_IMAGE = 2**26  # pixels; only one image of more is decoded at a time
Image.MAX_IMAGE_PIXELS = 2**29  # Pillow refuses twice this number, which takes 4 GiB as RGB
_large_image_lock = threading.Lock()


def is_gray(image: Image.Image) -> bool:
    """Whether a Pillow image has no color."""
    return image.mode in GRAY_MODES or image.mode.startswith("I")


def is_deep(mode: str) -> bool:
    """Whether Pillow images of a mode are gray with more than 8 bits: integers or floats."""
    return mode == "F" or mode.startswith("I")


def parse_range(text: str) -> Range | None:
    """Parses `LOW,HIGH`; None for an empty text. Raises UserError for anything else."""
    if not text:
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = math.nan
        high = math.nan
    if not -math.inf < low < high < math.inf:
        expected = "two increasing numbers, such as 0,4095 or -1000,400"
        raise UserError(f"VALUE_RANGE is {text!r}, but must be {expected}")
    return low, high


def format_range(value_range: Range | None) -> str:
    """Returns a range as parse_range reads it."""
    return "{},{}".format(*value_range) if value_range else ""


def find_range(lowest: float, highest: float, is_float: bool = False) -> Range:
    """Returns the values of black and white. lowest, highest: of all images.

    That is 0 and the largest number of that many bits, such as 4095; of floats 1, 255 or highest.
    But it is the values themselves if some are negative or they fill less than a quarter of that.
    """
    white = 2 ** math.ceil(math.log2(max(highest, 1) + 1)) - 1
    if is_float:  # resizing and noise may exceed 1 and 255
        white = 1 if highest <= 1.25 else 255 if 128 <= highest <= 320 else highest
    if lowest >= 0 and (highest == lowest or highest - lowest >= white / 4):
        return 0, white
    return lowest, highest if highest > lowest else lowest + 1


def scale(values: np.ndarray, value_range: Range) -> np.ndarray:
    """Scales values to uint8, clipped; raises ValueError for NaN and infinity."""
    if not np.isfinite(values).all():
        raise ValueError("has values that are not finite")
    low, high = value_range
    scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
    return scaled.clip(0, 255).round().astype(np.uint8)


def convert(image: Image.Image, channels: int, value_range: Range | None = None) -> Image.Image:
    """Converts a Pillow image to gray, RGB or RGBA; in gray and RGB, transparency is on white.

    channels: 1, 3 or 4. value_range: of images with more than 8 bits; None: found from this one.
    Raises ValueError for values that are not finite and for what Pillow cannot convert.
    """
    if is_deep(image.mode):
        values = np.asarray(image)
        if not value_range and np.isfinite(values).all():  # else scale says so
            value_range = find_range(float(values.min()), float(values.max()), image.mode == "F")
        gray = Image.fromarray(scale(values, value_range or (0, 1)))
        if image.has_transparency_data:
            is_opaque = values != image.info["transparency"]
            gray.putalpha(Image.fromarray(np.where(is_opaque, 255, 0).astype(np.uint8)))
        image = gray
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if channels != 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(MODES[channels])


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any Pillow image to RGB, as convert does."""
    return convert(image, 3)


def center_square(image: Image.Image, size: int) -> np.ndarray:
    """Resizes the center square of an image, antialiased: uint8 (C, size, size)."""
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    box = (left, top, left + side, top + side)
    resized = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box))
    return resized.reshape(size, size, -1).transpose(2, 0, 1)


def iterate_frames(image: Image.Image, all_frames: bool) -> Iterator[Image.Image]:
    """Yields an open image at its first frame, or at each of them in turn."""
    yield image
    for number in range(1, getattr(image, "n_frames", 1) if all_frames else 1):
        image.seek(number)
        yield image


def read_pixels(
    image: Image.Image, size: int, channels: int, value_range: Range | None = None,
    all_frames: bool = False,
) -> np.ndarray:  # fmt: skip
    """Decodes center squares of an image's frames: uint8 (frames, C, size, size)."""
    with _large_image_lock if math.prod(image.size) > LARGE_IMAGE else nullcontext():
        image.draft(None, (2 * size, 2 * size))  # decodes a JPEG at low resolution
        frames = (ImageOps.exif_transpose(f) for f in iterate_frames(image, all_frames))
        return np.stack([center_square(convert(f, channels, value_range), size) for f in frames])
