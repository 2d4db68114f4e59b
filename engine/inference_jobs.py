"""Shared by the scripts that sample: batching, output folders, PNG metadata."""

import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.cli import import_from_file  # first: sets what torch reads

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from engine import distributed, plots
from engine.checkpoints import CHECKPOINT_DIR, sha256, write_text
from engine.datasets import load_dataset
from engine.denoiser import GUIDANCE_OPTIONS
from engine.devices import amp_dtype, device_name
from engine.errors import UserError
from engine.gpu_memory import OomBatcher
from engine.image_source import ReadOptions
from engine.input_images import is_embedded, read_image_for, resolve_input
from engine.labels import labels_in_proportion, parse_classes
from engine.sampling_settings import guidance_kwargs, plan_kwargs
from engine.settings import Settings

MAX_SEEDS = 10_000_000
SUMMARY_FILE = "summary.json"  # of an output folder; at first it has the settings alone
PACKAGES = ("torch", "denoising-diffusion-pytorch", "numpy", "pillow")
# Settings that do not change the images; the checkpoint counts by its content, sha256.
NOT_COMPARED = {"checkpoint", "batch_size", "compile_model"}
INPUTS = ("image", "image1", "image2", "mask", "compare_with")  # settings that may name a file
# Settings that images of earlier versions lack, with what they were then.
ADDED_LATER = dict.fromkeys(
    ("classes", *GUIDANCE_OPTIONS[1:], "noise_levels", "compare_with", "input_sha256")
)
ADDED_LATER["image_size"] = 0


@dataclass
class InferenceJob:
    """One mode of an inference script with its model, settings and output folder."""

    model: nn.Module
    settings: dict[str, Any]  # plain values by name, stored with every image
    base_folder: Path
    sampler: str | Callable
    results: dict[str, Any] = field(default_factory=dict)  # what a mode adds to summary.json

    def __post_init__(self) -> None:
        self.batcher = OomBatcher(self.settings["batch_size"])
        text = self.settings["classes"]
        # The labels of the classes in --classes, empty without it.
        names = self.model.class_names
        self.requested_labels = [] if text is None else parse_classes(text, names)

    @cached_property
    def folder(self) -> Path:
        """The output folder: base_folder, or the next one without images of other settings.

        Claimed when it is first needed, so that a mode that fails before leaves nothing. Mode batch
        resumes in its folder.
        """
        if self.settings["mode"] == "batch":
            return self.base_folder
        return claim_output_dir(self.base_folder, self.settings)

    @property
    def sampler_kwargs(self) -> dict[str, Any]:
        """Arguments of sampling_plan, and guidance, as DDPMModel's methods take them."""
        eta = {"eta": self.settings["eta"]} if self.sampler == "ddim" else {}
        return plan_kwargs(self.settings, self.sampler) | guidance_kwargs(self.settings) | eta

    def labels_of(self, seeds: Sequence[int]) -> list[int] | None:
        """Returns each seed's class, of those in --classes; None if the model has no classes."""
        if not self.model.class_names:
            return None
        counts = [*self.model.class_counts.values()]
        if self.requested_labels:
            chosen = set(self.requested_labels)
            counts = [max(1, n) if label in chosen else 0 for label, n in enumerate(counts)]
        return labels_in_proportion(seeds, counts).tolist()

    def run_batched(self, function: Callable, seeds: Sequence[int], **kwargs: Any) -> Tensor:
        """Calls the function run_batched with the job's sampler, guidance and batch size."""
        kwargs |= self.sampler_kwargs
        return run_batched(function, seeds, self.batcher, self.settings["mode"], **kwargs)

    def load_input_image(self, name: str, label: int | None = None) -> tuple[Tensor, str]:
        """Returns the image that a setting names, (C, H, W) in [0, 1], and its title.

        label: the class to sample if the setting is a seed; by default a function of the seed.
        """
        # A seed, whose image is sampled.
        source = self.settings[name]
        if not source:
            raise UserError(f"--{name} is empty. Name a file, a seed or data:INDEX")
        if source.isdecimal():
            labels = None if label is None else [label]
            images = self.run_batched(self.model.sample, parse_seeds(source), labels=labels)
            return images[0], f"seed {source}"

        # A file, or a PNG as a data URI, which the page stores for an upload.
        data = re.fullmatch(r"data:(\d{1,18})", source)
        if not data:
            file = resolve_input(source)
            title = file.name if isinstance(file, Path) else "original"
            return read_image_for(self.model, file), title

        # data:N, a training image.
        config = self.model.training_info["config"]
        if not config:
            raise UserError(f"--{name} {source}: the checkpoint does not name its training images")
        dataset, size, folder = (config[key] for key in ("DATASET", "IMAGE_SIZE", "DATA_DIR"))
        options = ReadOptions.from_config(config)
        images = load_dataset(dataset, size, Path(folder), options=options).images
        index = int(data[1])
        if index >= len(images):
            raise UserError(f"--{name} {source}: {dataset} has {len(images)} images")
        return torch.from_numpy(images[index].copy()) / 255, source

    def save(self, image: Image.Image, name: str, **changes: Any) -> None:
        """Writes a PNG with the settings that reproduce it: the job's with changes."""
        plots.save_image(image, self.folder / name, json.dumps(self.settings | changes))

    def image_paths(self, seeds: Sequence[int], labels: Sequence[int] | None) -> list[str]:
        """Returns names of single images: <seed>.png, with labels <class>/<seed>.png."""
        names = [f"{seed:06d}.png" for seed in seeds]
        if labels is None:
            return names
        folders = [self.model.class_names[label] for label in labels]
        return [f"{folder}/{name}" for folder, name in zip(folders, names, strict=True)]

    def save_each(
        self, images: Tensor, seeds: Sequence[int], folder: str = ".",
        labels: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """Writes each image to <folder>/<seed>.png, with labels <folder>/<class>/..."""
        # Mode samples reproduces a single image of mode batch.
        mode = self.settings["mode"].replace("batch", "samples")
        for i, (seed, path) in enumerate(zip(seeds, self.image_paths(seeds, labels), strict=True)):
            changes = {"mode": mode, "seeds": [seed]}
            if labels is not None:
                changes["classes"] = self.model.class_names[labels[i]]
            self.save(plots.to_image(images[i]), f"{folder}/{path}", **changes)

    def save_grid(
        self, name: str, images: Tensor, seeds: Sequence[int], captions: Sequence[str] = (),
        **layout: Any,
    ) -> None:  # fmt: skip
        """Writes a figure; images without a caption have their seeds."""
        captions = [*captions, *(f"seed {seed}" for seed in seeds)][: len(images)]
        grid = plots.captioned_grid(images, captions, smallest=self.settings["tile"], **layout)
        self.save(grid, name, seeds=seeds)

    def write_summary(self, seconds: float) -> None:
        """Writes summary.json: settings, results, time, device and versions."""
        machine = {"device": device_name(self.model.device), "versions": package_versions(PACKAGES)}
        summary = self.settings | self.results | {"seconds": round(seconds, 2)} | machine
        write_text(self.folder / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")


def run_batched(
    function: Callable[..., Tensor], seeds: Sequence[int], batcher: OomBatcher, description: str,
    labels: Sequence[int] | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Calls function(batch_size=, seed=, ...) for all seeds: (N, C, H, W) on the CPU.

    labels: the class of each seed, passed on if there are any.
    """

    def run_slice(part: slice) -> Tensor:
        part_seeds = list(seeds[part])
        if labels is not None:
            kwargs["labels"] = labels[part]
        images = function(batch_size=len(part_seeds), seed=part_seeds, **kwargs).float().cpu()
        bar.update(len(part_seeds))
        return images

    options = {"leave": False, "disable": distributed.launched_rank() > 0}
    with tqdm(total=len(seeds), unit="image", desc=description, **options) as bar:
        return torch.cat(list(batcher.map(len(seeds), run_slice)))


def complete_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings of any version with what they lack; input images default to the seeds."""
    complete = {name: value for name, value in settings.items() if name != "channels_last"}
    for name, index in (("image", 0), ("image1", 0), ("image2", -1)):
        given = settings.get(name)
        complete[name] = str(settings["seeds"][index]) if given is None else given
    complete = ADDED_LATER | complete
    if complete["noise_levels"]:  # in place of a spacing, which earlier images store as well
        complete["spacing"] = None
    return complete | {"guidance": settings.get("guidance") or None}  # 0 meant None


def input_digests(settings: Mapping[str, Any]) -> dict[str, str] | None:
    """Returns the SHA-256 of each input file by setting; None without any.

    Another file may take an input's name: its results are others.
    """
    sources = {name: settings[name] for name in INPUTS}
    digests = {
        name: sha256(Path(source))
        for name, source in sources.items()
        if source and not is_embedded(source) and not source.isdecimal() and os.path.isfile(source)
    }
    return digests or None


def has_other_settings(file: Path, settings: Mapping[str, Any]) -> bool:
    """Whether `file`, a settings.json or summary.json, has other settings.

    A damaged file counts as other: what made the images next to it is unknown.
    """
    if not file.exists():
        return False
    try:
        stored = complete_settings(json.loads(file.read_text()))
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return True
    return any(stored.get(name) != settings[name] for name in settings.keys() - NOT_COMPARED)


def numbered(path: Path) -> Iterator[Path]:
    """Yields path, path_2, path_3 and so on."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}_{number}")


def claim_output_dir(folder: Path, settings: Mapping[str, Any]) -> Path:
    """Creates and returns the first of folder, folder_2, ... without images of other settings.

    Its summary.json has the settings before any image is saved: other processes leave it alone.
    """

    def is_ours(path: Path) -> bool:
        path.mkdir(parents=True, exist_ok=True)
        summary = path / SUMMARY_FILE
        try:
            with contextlib.suppress(FileExistsError), summary.open("x") as file:
                json.dump(settings, file, indent=2)
        except OSError as error:  # a full disk: without settings, it would count as another's
            summary.unlink(missing_ok=True)
            error.filename = str(summary)
            raise
        return not has_other_settings(summary, settings)

    return next(filter(is_ours, numbered(folder)))


def settings_from_png(
    path: Path, declared: type[Settings], sampler: str | None = None
) -> dict[str, Any]:
    """Returns the settings stored in a PNG, with a checkpoint of the same content.

    sampler: from the command line, which alone may name a file with code; None if not given.
    Raises UserError as read_png_settings does, and if the checkpoint is gone or an input changed.
    """
    settings = read_png_settings(path, declared)
    # The sampler: ours, or a file that the command line names too.
    name = settings["sampler"]
    if ":" in name and sampler is None:
        reason = f"was made with the sampler {name!r}, and an image may not choose what is run"
        raise UserError(f"{path} {reason}. If you trust that file, add --sampler {name}")
    if sampler not in (None, name):
        raise UserError(f"{path} was made with the sampler {name!r}. Drop --sampler {sampler}")

    # Input files as they were.
    stored = settings["input_sha256"] or {}
    settings["input_sha256"] = input_digests(settings)
    for name, digest in (settings["input_sha256"] or {}).items():
        if stored.get(name, digest) != digest:
            changed = f"was made with {settings[name]}, which has changed since"
            raise UserError(f"{path} {changed}. Put the file of then in its place")

    # A checkpoint that was renamed is found by its content.
    name = settings["checkpoint"]
    digest = settings["sha256"]
    found = [file for kind in ("*.pt", "*.safetensors") for file in CHECKPOINT_DIR.rglob(kind)]
    for file in (Path(name or ""), *found):
        if file.is_file() and sha256(file) == digest:
            return settings | {"checkpoint": str(file)}
    state = "has changed since" if Path(name or "").is_file() else "is gone"
    reason = f"was made with {name} (SHA-256 {digest!s:.12}...), which {state}"
    raise UserError(f"{path} {reason}. Put a copy of that file into {CHECKPOINT_DIR}/")


def read_png_settings(path: Path, declared: type[Settings]) -> dict[str, Any]:
    """Returns the settings stored in a PNG, checked as those of a command line are.

    Raises UserError if a setting is missing or has a value that is not allowed.
    """
    # Settings that are not declared: seeds as numbers, and what files contained.
    try:
        stored = json.loads(plots.read_png_metadata(path) or "{}")
        known = {"num_samples", *ADDED_LATER, *stored.keys()}  # the number is that of the seeds
        missing = {*declared.settings(), "sha256"} - known
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"the settings in {path} are damaged. Use another image") from error
    if missing:
        raise UserError(f"{path} does not contain all settings of inference.py (no {min(missing)})")
    seeds = stored["seeds"]
    is_list = isinstance(seeds, list) and 0 < len(seeds) <= MAX_SEEDS
    if not is_list or not all(type(seed) is int and 0 <= seed < 10**18 for seed in seeds):
        raise UserError(f"{path} sets seeds to what inference.py never stores. Use another image")
    values = complete_settings(stored)
    if not isinstance(values["input_sha256"], dict | None):
        raise UserError(f"the settings in {path} are damaged. Use another image")
    undeclared = {name: values.pop(name) for name in ("seeds", "sha256", "input_sha256")}
    return declared.check(values, str(path)) | undeclared


def parse_seeds(text: str, limit: int = MAX_SEEDS) -> list[int]:
    """Parses `7`, `0-63` or `1,5,10-12`; UserError for anything else, repeated or too many."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part.strip())
        if not match:
            examples = "7, 0-63 or 1,5,10-12, with at most 18 digits each"
            raise UserError(f"seeds is {text!r}, but must look like {examples}")
        first = match[1]
        last = match[2] or first
        span = range(int(first), int(last) + 1)
        if not span:
            raise UserError(f"seeds has the reversed range {first}-{last}. Write {last}-{first}")
        if len(seeds) + len(span) > limit:
            raise UserError(f"seeds is {text!r}, but at most {limit:,} images are possible")
        seeds += span
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds is {text!r}, but names a seed twice")
    return seeds


def load_sampler(name: str) -> str | Callable:
    """Returns a sampler's name as it is, or the function of `file.py:function`."""
    if ":" not in name:
        return name
    module, function = import_from_file(name, "--sampler", "my_sampler.py:my_function")
    if not callable(getattr(module, function, None)):
        raise UserError(f"{module.__file__} has no function {function}")
    return getattr(module, function)


def autocast(model: nn.Module, use_amp: bool) -> torch.autocast:
    """Mixed precision on the model's device, or none."""
    return torch.autocast(model.device.type, amp_dtype(model.device), enabled=use_amp)


def compile_networks(model: nn.Module) -> None:
    """Compiles a model's network and guide; without CUDA graphs, which cannot capture them then."""
    model.cuda_graph = False
    model.unet.compile()
    if model.guide is not None:
        model.guide.compile()


def auto_batch_size(model: nn.Module, use_amp: bool) -> int:
    """Returns a batch size for sampling that fits, at most 256. Every rank calls this."""
    if model.device.type != "cuda":
        return max(1, min(64, 64 * 32**2 // model.image_size**2))
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    with autocast(model, use_amp):
        model.sample(4, steps=1, seed=0)
    bytes_per_image = max(1, (torch.cuda.max_memory_allocated() - allocated) // 4)
    return distributed.broadcast_object(max(1, min(256, int(0.7 * free / bytes_per_image))))


def psnr(a: Tensor, b: Tensor) -> float:
    """Returns the peak signal-to-noise ratio of two images in [0, 1], dB."""
    return -10 * (a.cpu() - b.cpu()).square().mean().log10().item()


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Returns the versions of Python and packages, `not installed` for missing ones."""
    versions = {"python": platform.python_version(), **dict.fromkeys(names, "not installed")}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
