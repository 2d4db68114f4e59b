"""Images and masks that a user hands over: files, or PNGs inside of stored settings."""

import base64
import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from engine.errors import UserError
from engine.pixels import MODES, center_square, convert, is_deep, parse_range
from engine.plots import PNG_DATA_URI


def is_embedded(source: str | None) -> bool:
    """Whether a setting contains an image, as a data URI, instead of naming one."""
    return (source or "").startswith(PNG_DATA_URI)


def resolve_input(source: str) -> Path | io.BytesIO:
    """Returns what a setting names: a file's path, or the PNG of its data URI."""
    if not is_embedded(source):
        return Path(source)
    try:
        return io.BytesIO(base64.b64decode(source.removeprefix(PNG_DATA_URI), validate=True))
    except ValueError as error:
        raise UserError(f"the image in the settings is damaged: {error}") from error


def read_image(file: Path | io.BytesIO, size: int, channels: int, value_range: str = "") -> Tensor:
    """Reads an image as a model takes it, with a notice: (C, size, size) in [0, 1].

    value_range: VALUE_RANGE of the model's run, for images with more than 8 bits; "": their own.
    """
    name = _name_of(file)
    if channels not in MODES:
        raise UserError(f"no image file has {channels} channels. Name a seed instead of {name}")
    image, mode = _open_image(file, "an image", channels, value_range)
    changes = []
    if is_deep(mode):
        changes.append(f"scaled from {value_range}" if value_range else "scaled by its own values")
    if image.width != image.height:
        changes.append("cropped")
    if min(image.size) != size:
        changes.append("resized")
    if changes or mode != image.mode:
        change = " and ".join(changes) or "converted"
        found = f"{image.width}x{image.height} {mode}"
        print(f"{name}: {found}, {change} to {size}x{size} {image.mode}")
    return torch.from_numpy(center_square(image, size).copy()) / 255


def read_image_for(model: Any, file: Path | io.BytesIO) -> Tensor:
    """Reads an image as read_image does, with a model's size and channels and its run's range."""
    value_range = model.training_info["config"].get("VALUE_RANGE", "")
    return read_image(file, model.image_size, model.channels, value_range)


def read_mask(path: Path | io.BytesIO, image: Path | io.BytesIO, size: int) -> Tensor:
    """Reads a mask of the image's size: bool (size, size), true where to inpaint.

    That is where any of its color channels is bright; what is transparent counts as black.
    """
    mask, _ = _open_image(path, "a mask", channels=4)
    # The image may also be a seed or data:INDEX.
    expected = (size, size)
    if isinstance(image, io.BytesIO) or image.is_file():
        expected = _open_image(image, "an image")[0].size
    if mask.size != expected:
        mask_size, image_size = ("x".join(map(str, each)) for each in (mask.size, expected))
        raise UserError(f"{_name_of(path)} is {mask_size}, but the image is {image_size}")
    *colors, alpha = torch.from_numpy(center_square(mask, size).copy()) / 255
    return torch.stack(colors).amax(0) * alpha > 0.5


def _name_of(file: Path | io.BytesIO) -> str:
    return str(file) if isinstance(file, Path) else "the image in the settings"


def _open_image(
    file: Path | io.BytesIO, kind: str, channels: int | None = None, value_range: str = ""
) -> tuple[Image.Image, str]:
    """Returns an image with `channels`, rotated by its EXIF data, and its former mode."""
    black_and_white = parse_range(value_range)
    try:
        with Image.open(file) as image:
            rotated = ImageOps.exif_transpose(image)
            if channels:
                return convert(rotated, channels, black_and_white), image.mode
            return rotated, image.mode
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        raise UserError(f"{_name_of(file)} cannot be read as {kind}: {error}") from error
