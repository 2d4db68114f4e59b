"""Image grids, GIFs and loss curves, written atomically."""

import base64
import contextlib
import io
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.utils import make_grid

from engine.checkpoints import write_atomically
from engine.errors import UserError

if TYPE_CHECKING:  # most commands plot nothing, and importing it takes half a second
    from matplotlib.figure import Figure

PNG_DATA_URI = "data:image/png;base64,"
PNG_METADATA_KEY = "ddpm"  # of the PNG text chunk that stores how an image was made
MIN_TILE = 64  # pixels; grids enlarge smaller images
POINTS = {"marker": "o", "markersize": 3}
Curves = Mapping[str, Sequence[float]]  # values by name
FILE_CHANNELS = (1, 3, 4)  # gray, RGB, RGBA
Line = tuple[Sequence[float], Sequence[float], dict[str, Any]]  # x, y, style


def to_bytes(images: Tensor) -> np.ndarray:
    """Images (..., C, H, W) in [0, 1], clipped and rounded: uint8 (..., H, W, C)."""
    return (images.detach().cpu().float().clamp(0, 1) * 255).round().byte().movedim(-3, -1).numpy()


def check_file_channels(channels: int) -> None:
    """Raises UserError for a number of channels that no image file has."""
    if channels not in FILE_CHANNELS:
        raise UserError(f"no image file has {channels} channels. Use --mode batch --format npz")


def to_image(image: Tensor) -> Image.Image:
    """A tensor (1, 3 or 4, H, W) in [0, 1] as a Pillow image: gray, RGB or RGBA.

    Raises UserError for another number of channels.
    """
    pixels = to_bytes(image)
    channels = pixels.shape[2]
    check_file_channels(channels)
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


def grid(
    images: Tensor, columns: int | None = None, smallest: int = MIN_TILE, padding: int = 2
) -> Image.Image:
    """Images (B, C, H, W) in [0, 1] as a grid, by default nearly square."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    # Of gray, it makes RGB.
    tiled = make_grid(enlarge(images, smallest), columns, padding, pad_value=1.0)
    return to_image(tiled[: images.shape[1]])


def table(
    images: Tensor, rows: Sequence[str], columns: Sequence[str], smallest: int = MIN_TILE
) -> Image.Image:
    """Images (rows * columns, C, H, W) in [0, 1] as a grid, rows and columns named."""
    font = ImageFont.load_default(12)
    tiles = grid(images, len(columns), smallest)
    left = math.ceil(max(map(font.getlength, rows))) + 8
    top = 20
    sheet = Image.new("RGB", (left + tiles.width, top + tiles.height), "white")
    sheet.paste(tiles, (left, top), tiles if tiles.mode == "RGBA" else None)
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(rows):
        middle = top + tiles.height * (i + 0.5) / len(rows)
        draw.text((left - 6, middle), name, "black", font, anchor="rm")
    for i, name in enumerate(columns):
        middle = left + tiles.width * (i + 0.5) / len(columns)
        draw.text((middle, top - 4), name, "black", font, anchor="ms")
    return sheet


def on_white(images: Tensor) -> Tensor:
    """Puts RGBA images (B, 4, H, W) in [0, 1] on white, as RGB; others stay."""
    if images.shape[1] != 4:
        return images
    alpha = images[:, 3:]
    return images[:, :3] * alpha + 1 - alpha


def enlarge(images: Tensor, smallest: int = MIN_TILE) -> Tensor:
    """Enlarges images (..., H, W) by the largest integer factor up to `smallest` pixels."""
    factor = max(1, smallest // images.shape[-1])
    return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def captioned_grid(
    images: Tensor, captions: Sequence[str], columns: int | None = None, title: str = "",
    smallest: int = MIN_TILE,
) -> Image.Image:  # fmt: skip
    """Images (B, C, H, W) in [0, 1] as a grid with title and captions."""
    # Sizes.
    font = ImageFont.load_default(11)
    tiles = [to_image(image) for image in enlarge(images, smallest)]
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    gap = 4
    title_height = 22 if title else 0
    lines = [caption.split("\n") for caption in captions]
    caption_widths = (math.ceil(font.getlength(line)) for line in itertools.chain(*lines))
    content_width = max(tiles[0].width, *caption_widths)
    column_width = content_width + gap
    row_height = tiles[0].height + 14 * max(map(len, lines)) + gap
    height = title_height + math.ceil(len(tiles) / columns) * row_height + gap
    width = max(columns * column_width, math.ceil(font.getlength(title)) + gap) + gap

    # Title, tiles and captions.
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, gap), title, "black", font)
    for i, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        x = gap + i % columns * column_width
        y = gap + title_height + i // columns * row_height
        tile_x = x + (content_width - tile.width) // 2
        sheet.paste(tile, (tile_x, y), tile if tile.mode == "RGBA" else None)
        position = (x + content_width // 2, y + tile.height)
        draw.text(position, caption, "black", font, anchor="ma", align="center", spacing=3)
    return sheet


def encode_png(image: Image.Image, metadata: str = "") -> bytes:
    """Returns a PNG with text that read_png_metadata returns."""
    info = PngInfo()
    info.add_text(PNG_METADATA_KEY, metadata)
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def png_data_uri(content: bytes) -> str:
    """Returns a PNG file as a data URI."""
    return PNG_DATA_URI + base64.b64encode(content).decode()


def save_image(image: Image.Image, path: Path, metadata: str = "") -> None:
    """Writes a PNG with text that read_png_metadata returns."""
    write_atomically(path, lambda file: file.write(encode_png(image, metadata)))


def read_png_metadata(path: Path) -> str:
    """Returns the text that save_image stored; UserError if this is not an image."""
    try:
        with Image.open(path) as image:
            return image.info.get(PNG_METADATA_KEY, "")
    except Exception as error:  # Pillow raises nearly anything on a broken file
        raise UserError(f"{path} is missing or not an image") from error


def save_gif(frames: Sequence[Image.Image], path: Path, milliseconds: int = 80) -> None:
    """Writes a looping GIF that pauses on the last frame."""
    durations = [milliseconds] * (len(frames) - 1) + [1500]
    options = {"save_all": True, "append_images": frames[1:], "loop": 0, "duration": durations}
    write_atomically(path, lambda file: frames[0].save(file, format="GIF", **options))


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a matplotlib figure as PNG."""
    write_atomically(path, lambda file: figure.savefig(file, dpi=120, bbox_inches="tight"))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl, without damaged lines."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            is_row = isinstance(row, dict) and "step" in row
            if is_row and all(isinstance(value, (int, float)) for value in row.values()):
                rows.append(row)
    return rows


def save_loss_curve(metrics: Path, path: Path) -> None:
    """Plots training loss, its running mean and validation loss by optimizer steps."""
    rows = read_metrics(metrics)
    training = np.array([(row["step"], row["loss"]) for row in rows if "loss" in row])
    validation = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    lines: list[Line] = []
    width = max(1, len(training) // 40)
    if len(training):
        style = {"color": "tab:blue", "alpha": 0.25 if width > 1 else 1, "linewidth": 0.8}
        lines.append((*training.T, style | {"label": "training"}))
    if width > 1:
        means = np.convolve(training[:, 1], np.full(width, 1 / width), mode="valid")
        style = {"color": "tab:blue", "label": f"training, mean of {width} values"}
        lines.append((training[width - 1 :, 0], means, style))
    if validation:
        style = {"color": "tab:orange", "label": "validation, EMA weights"}
        lines.append((*np.array(validation).T, POINTS | style))
    _save_plot(lines, "optimizer step", "loss (weighted squared error)", path)


def save_fd_over_time(minutes: Sequence[float], distances: Curves, path: Path) -> None:
    """Plots Fréchet distances, by name, against minutes of training, in any order."""
    order = np.argsort(minutes)
    x = np.array(minutes)[order]
    lines = [(x, np.array(y)[order], POINTS | {"label": name}) for name, y in distances.items()]
    _save_plot(lines, "minutes of training", "distance (scales differ)", path, integer_x=False)


def save_loss_by_timestep(timesteps: Sequence[int], losses: Curves, path: Path) -> None:
    """Plots the loss at each timestep, a line for each model by name."""
    lines = [(timesteps, y, POINTS | {"label": name}) for name, y in losses.items()]
    _save_plot(lines, "timestep (0: nearly clean)", "squared error, unweighted", path)


def _save_plot(
    lines: Sequence[Line], x_label: str, y_label: str, path: Path, integer_x: bool = True
) -> None:
    """Plots lines on a log axis whose ticks are plain numbers, not powers of ten."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for x, y, style in lines:
        axes.plot(x, y, **style)
    axes.set(xlabel=x_label, ylabel=y_label, yscale="log")
    if integer_x:
        integers = MaxNLocator(8, steps=(1, 2, 5, 10), integer=True, min_n_ticks=1)
        axes.xaxis.set_major_locator(integers)
    # Within a factor of ten, 1, 2 and 5 times a power of ten are too few: equal distances.
    low, high = axes.get_ylim()
    locator = LogLocator(subs=(1, 2, 5) if high / low < 1e4 else (1,))
    if high / low < 10:
        locator = MaxNLocator(8, steps=(1, 2, 5, 10))
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_major_formatter("{x:.10g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    if lines:
        axes.legend()
    save_figure(figure, path)
