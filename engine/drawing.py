"""What the inference scripts share: batches that fit, pictures that say how they were made, runs that go on."""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

from engine import plots
from engine.checkpoints import FOLDER, write_atomically
from engine.command_line import load_from_file, nearest
from engine.errors import UserError
from engine.memory import AtOnce
from engine.processes import join
from engine.samplers import SAMPLERS
from engine.sources import center_square, to_rgb
from engine.step import amp_dtype

MOST_SEEDS = 10_000_000
PACKAGES = ("torch", "denoising-diffusion-pytorch", "numpy", "pillow")


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def parse_seeds(text: str) -> list[int]:
    """`0-63`, `7` or `1,5,10-12` as a list; raises UserError for anything else."""
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        last = last or first
        if max(len(first), len(last)) > 18:
            raise UserError(f"--seeds is {text!r}, but seeds have at most 18 digits")
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise UserError(f"--seeds is {text!r}, but must look like 7, 0-63 or 1,5,10-12")
        if int(last) - int(first) >= MOST_SEEDS:
            raise UserError(f"--seeds is {text!r}, but at most {MOST_SEEDS:,} images can be drawn")
        seeds += range(int(first), int(last) + 1)
    return seeds


def load_sampler(name: str) -> str | Callable:
    """A sampler by name, or a function of one's own by `file.py:function`."""
    if name in SAMPLERS:
        return name
    if ":" not in name:
        raise UserError(f"there is no sampler {name}{nearest(name, SAMPLERS)}; there are {', '.join(SAMPLERS)}")
    module, function = load_from_file(name, "--sampler", "my_sampler.py:my_function")
    if not callable(getattr(module, function, None)):
        raise UserError(f"{module.__file__} has no function {function}")
    return getattr(module, function)


def read_picture(path: Path, size: int) -> Tensor:
    """An image file as the model takes it: (3, size, size) in [0, 1]; says so if it had to be resized or converted."""
    try:
        with Image.open(path) as image:
            picture = to_rgb(ImageOps.exif_transpose(image))
            if image.size != (size, size) or image.mode != "RGB":
                print(f"{path}: {image.width}x{image.height} {image.mode}, cropped and resized to {size}x{size} RGB")
    except Exception as problem:  # Pillow's decoders raise nearly anything on a broken file
        raise UserError(f"{path} cannot be read as an image: {problem}") from problem
    return torch.from_numpy(center_square(picture, size).copy()) / 255


def read_mask(path: Path, image: Path, size: int) -> Tensor:
    """A mask, white where something new is painted: bool (size, size).

    It must be as large as the file that `image` names, or as the model's images if it names none.
    """
    try:
        with Image.open(path) as file:
            mask = ImageOps.exif_transpose(file).convert("RGB")
    except Exception as problem:
        raise UserError(f"{path} cannot be read as a mask: {problem}") from problem
    expected = (size, size)
    if image.is_file():
        with Image.open(image) as picture:
            expected = ImageOps.exif_transpose(picture).size
    if mask.size != expected:
        raise UserError(f"{path} is {mask.width}x{mask.height}, but the image is {expected[0]}x{expected[1]}")
    return torch.from_numpy(center_square(mask, size)[0] > 127)


def precision(model: nn.Module, use_amp: bool) -> torch.autocast:
    """Mixed precision on the model's device, or none."""
    return torch.autocast(model.device.type, amp_dtype(model.device), enabled=use_amp)


def fitting_batch(model: nn.Module, use_amp: bool) -> int:
    """How many images to draw at a time: what the memory that a try of four takes leaves room for, at most 256."""
    if model.device.type != "cuda":
        return max(1, min(64, 64 * 32**2 // model.image_size**2))
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with precision(model, use_amp):
        model.sample(4, steps=1, seed=0)
    each = max(1, (torch.cuda.max_memory_allocated() - before) // 4)
    return max(1, min(256, int(0.7 * free / each)))


@dataclass
class Job:
    """One call of an inference script: a model, what was asked for, and where the results go."""

    model: nn.Module
    settings: dict[str, Any]
    folder: Path
    sampler: str | Callable
    started: float = field(default_factory=time.perf_counter)
    at_once: AtOnce = field(init=False)

    def __post_init__(self) -> None:
        self.at_once = AtOnce(self.settings["batch_size"])

    @property
    def how(self) -> dict[str, Any]:
        """Sampler, steps, spacing and guidance as DDPMModel's methods take them."""
        eta = {"eta": self.settings["eta"]} if self.sampler == "ddim" else {}
        steps, spacing, guidance = (self.settings[name] for name in ("steps", "spacing", "guidance"))
        return {"sampler": self.sampler, "steps": steps, "spacing": spacing, "guidance": guidance or None} | eta

    def precision(self) -> contextlib.AbstractContextManager:
        """Mixed precision, if it was asked for."""
        return precision(self.model, self.settings["use_amp"])

    def draw(self, function: Callable[..., Tensor], seeds: Sequence[int], *arguments: Any, **options: Any) -> Tensor:
        """Calls function(..., batch_size=, seed=) for all seeds, batch by batch: (len(seeds), C, H, W) on the CPU.

        Out of GPU memory halves the batch and goes on; the images are the same, since each has its own seed.
        """

        def some(part: slice) -> Tensor:
            group = list(seeds[part])
            with self.precision():
                return function(*arguments, batch_size=len(group), seed=group, **options).float().cpu()

        parts, quiet = [], not join().is_main_process
        with tqdm(total=len(seeds), unit="image", desc=self.settings["mode"], leave=False, disable=quiet) as bar:
            for images in self.at_once.parts(len(seeds), some):
                parts.append(images)
                bar.update(len(images))
        return torch.cat(parts)

    def path(self, name: str) -> Path:
        """Where a result of this job goes."""
        return self.folder / name

    def save(self, picture: Image.Image, name: str, **changes: Any) -> None:
        """Writes a picture that says how it was made; `changes` to the settings draw just this one again."""
        plots.save_image(picture, self.path(name), json.dumps(self.settings | changes))

    def save_singles(self, images: Tensor, seeds: Sequence[int], folder: str = ".", mode: str = "samples") -> None:
        """Writes each image as <folder>/<seed>.png."""
        for image, seed in zip(images, seeds, strict=True):
            self.save(plots.to_image(image), f"{folder}/{seed:06d}.png", mode=mode, seeds=[seed])

    def finish(self, **more: Any) -> None:
        """Writes summary.json."""
        summary = self.settings | more
        summary["seconds"] = round(time.perf_counter() - self.started, 2)
        device = self.model.device
        summary["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        summary["versions"] = {"python": platform.python_version()}
        summary["versions"] |= {name: importlib.metadata.version(name) for name in PACKAGES}
        text = json.dumps(summary, indent=2) + "\n"
        write_atomically(self.path("summary.json"), lambda file: file.write(text.encode()))


def own_folder(folder: Path, settings: Mapping[str, Any]) -> Path:
    """`folder`, or, where other settings' results lie in it, the first of `folder`_2, _3 ... where none do."""
    seeds = settings["seeds"]
    usual = {"image": str(seeds[0]), "image1": str(seeds[0]), "image2": str(seeds[-1])}  # as a job notes them down
    speed = {"checkpoint", "batch_size", "compile_model", "channels_last"}  # the checkpoint counts by its content

    def holds_others(path: Path) -> bool:
        try:
            found = json.loads((path / "summary.json").read_text())
        except (OSError, ValueError):
            return False
        return not isinstance(found, dict) or any(
            found.get(name) not in (value, usual.get(name) if value is None else value)
            for name, value in settings.items()
            if name not in speed
        )

    numbered = (folder.with_name(f"{folder.name}_{i}") for i in itertools.count(2))
    return next(path for path in itertools.chain([folder], numbered) if not holds_others(path))


def settings_of(picture: Path, needed: set[str]) -> dict[str, Any]:
    """How a picture was made: at least the settings `needed`.

    Its checkpoint is looked for by name and then by content in checkpoints/.
    """
    try:
        settings = json.loads(plots.read_text(picture))
        missing = needed - settings.keys()
    except (ValueError, AttributeError):
        missing = needed
    if missing:
        raise UserError(f"{picture} does not say how it was made, or another version wrote it: no {sorted(missing)[0]}")
    there = Path(settings["checkpoint"])
    candidates = [there, *FOLDER.rglob("*.pt"), *FOLDER.rglob("*.safetensors")]
    for path in candidates:
        if path.is_file() and digest(path) == settings["sha256"]:
            return settings | {"checkpoint": str(path)}
    raise UserError(
        f"{picture} was drawn by {there} (SHA-256 {settings['sha256'][:12]}...), which is not here any more"
    )


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of two images in [0, 1], dB."""
    return -10 * torch.log10((a.cpu() - b.cpu()).square().mean()).item()
