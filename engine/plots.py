"""Pictures: sample grids and loss curves, written whole or not at all."""

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import LogFormatter
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.utils import make_grid

from engine.checkpoints import write_atomically
from engine.errors import UserError

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TEXT_KEY = "ddpm"  # of the PNG chunk that says how a picture was made
SMALLEST_TILE = 64  # pixels: smaller images are enlarged by a whole factor so that they can be judged by eye


def to_bytes(images: Tensor) -> np.ndarray:
    """Images (..., C, H, W) in [0, 1] as uint8 (..., H, W, C); what lies outside is clipped."""
    return (images.detach().cpu().float().clamp(0, 1) * 255).round().byte().movedim(-3, -1).numpy()


def to_image(image: Tensor) -> Image.Image:
    """A float tensor (C, H, W) in [0, 1], C 1 or 3, as a picture."""
    pixels = to_bytes(image)
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """Images (B, C, H, W) in [0, 1] side by side, as near to a square as they go unless `columns` is given."""
    return to_image(make_grid(enlarge(images), columns or math.ceil(math.sqrt(len(images))), padding=2, pad_value=1.0))


def enlarge(images: Tensor, smallest: int = SMALLEST_TILE) -> Tensor:
    """Images (..., H, W) enlarged by a whole factor to at least `smallest` pixels, if they are below it."""
    factor = max(1, smallest // images.shape[-1])
    return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def labelled_grid(
    images: Tensor, labels: Sequence[str], columns: int | None = None, title: str = "", smallest: int = SMALLEST_TILE
) -> Image.Image:
    """Images (B, C, H, W) in [0, 1] side by side, a line of text below each and one above all."""
    tiles = [to_image(image) for image in enlarge(images, smallest)]
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    size, text, gap, head = tiles[0].width, 14, 4, 22 if title else 0
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (columns * (size + gap) + gap, rows * (size + text + gap) + gap + head), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    pen.text((gap, gap), title, "black", font)
    for i, (tile, label) in enumerate(zip(tiles, labels, strict=True)):
        x, y = gap + i % columns * (size + gap), head + gap + i // columns * (size + text + gap)
        sheet.paste(tile, (x, y))
        pen.text((x + size // 2, y + size), label, "black", font, anchor="ma")
    return sheet


def save_image(image: Image.Image, path: Path, text: str = "") -> None:
    """Writes a picture as PNG, with `text` in a chunk of its own (see read_text) if there is any."""
    chunk = PngInfo()
    if text:
        chunk.add_text(TEXT_KEY, text)
    write_atomically(path, lambda file: image.save(file, format="PNG", pnginfo=chunk))


def read_text(path: Path) -> str:
    """What save_image put beside a picture; raises UserError if it is no PNG or has none."""
    try:
        with Image.open(path) as image:
            text = image.info.get(TEXT_KEY)
    except OSError as problem:
        raise UserError(f"{path} is missing or not a picture") from problem
    if not isinstance(text, str):
        raise UserError(f"{path} does not say how it was made: it is not a PNG of inference.py, or was edited since")
    return text


def save_gif(frames: Sequence[Image.Image], path: Path, milliseconds: int = 80) -> None:
    """Writes frames as an endless GIF that rests on the last."""
    durations = [milliseconds] * (len(frames) - 1) + [1500]
    write_atomically(
        path,
        lambda file: frames[0].save(
            file, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
        ),
    )


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Writes a matplotlib figure as PNG and closes it."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120, bbox_inches="tight"))
    plt.close(figure)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; those that a crash or a full disk cut short are left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def save_loss_curve(metrics: Path, path: Path) -> None:
    """Draws training loss (faint, and its running mean) and validation loss against optimiser steps."""
    rows = read_metrics(metrics)
    steps, losses = (np.array([row[key] for row in rows if "loss" in row]) for key in ("step", "loss"))
    at, validation = (
        np.array([row[key] for row in rows if "validation_loss" in row]) for key in ("step", "validation_loss")
    )
    figure, axes = plt.subplots(figsize=(7, 4))
    if len(losses):
        width = max(1, len(losses) // 40)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25 if width > 1 else 1, linewidth=0.8, label="training")
        if width > 1:
            smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
            axes.plot(steps[width - 1 :], smooth, color="tab:blue", label=f"training, mean of {width} values")
    if len(validation):
        axes.plot(at, validation, "o-", color="tab:orange", markersize=3, label="validation, EMA weights")
    if len(losses) or len(validation):
        axes.set_yscale("log")
        axes.legend()
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (weighted squared error)")
    axes.grid(alpha=0.3, which="both")
    save_figure(figure, path)


def plain_log_scale(axes: plt.Axes) -> None:
    """A logarithmic vertical axis whose numbers are written out, not as powers of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))


def save_distance_curve(minutes: Sequence[float], distances: dict[str, Sequence[float]], path: Path) -> None:
    """Draws distances to a data set, by the name of each, against minutes of training."""
    figure, axes = plt.subplots(figsize=(7, 4))
    order = np.argsort(minutes)
    for name, values in distances.items():
        axes.plot(np.array(minutes)[order], np.array(values)[order], "o-", markersize=4, label=name)
    plain_log_scale(axes)
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("distance to the reference")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    save_figure(figure, path)


def save_loss_by_timestep(timesteps: Sequence[int], losses: dict[str, Sequence[float]], path: Path) -> None:
    """Draws the loss at each of some timesteps, a line for each model by its name."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, values in losses.items():
        axes.plot(timesteps, values, "o-", markersize=3, label=name)
    plain_log_scale(axes)
    axes.set_xlabel("timestep (0: nearly clean)")
    axes.set_ylabel("squared error, unweighted")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    save_figure(figure, path)
