"""The modes of inference.py: what each makes of a model, as images and figures in a folder."""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.utils import make_grid
from tqdm import tqdm

from engine import checkpoints, distributed, plots
from engine.errors import UserError
from engine.generation import unnormalize
from engine.inference_jobs import InferenceJob, compile_networks, has_other_settings, psnr
from engine.input_images import read_mask, resolve_input
from engine.samplers import batched
from engine.sampling_settings import guidance_kwargs

MAX_GRID_IMAGES = 100  # images in grid.png, or classes if it has a row for each
MAX_GRID_COLUMNS = 16  # seeds in grid.png if it has a row for each class
CONTACT_SHEET_ASPECT = 1.6  # columns by rows
MAX_EDITED_TILES = 16  # tiles in the figures of vary and inpaint, the original included
MAX_FIGURE_SEEDS = 4  # seeds that progressive and compare sample
MAX_FRAMES = 60  # frames in a GIF
INVERSION_STEPS = 100  # at least; with fewer, DDIM inversion does not reproduce the given images
COMPARED_STEPS = (5, 10, 20, 50)
CONSISTENCY_STEPS = (1, 2, 4, 8)  # compared if the model is consistency-tuned
CHUNK_IMAGES = 256  # images that mode batch samples and saves at a time


def generate_samples(job: InferenceJob) -> str:
    """Single images, a grid (with classes, a row for each) and a contact sheet."""
    seeds = job.settings["seeds"]
    names = job.model.class_names
    class_indices = job.requested_labels or range(len(names))
    labels = np.repeat(class_indices, len(seeds)).tolist() if names else None
    every_seed = seeds * max(len(class_indices), 1)
    images = job.run_batched(job.model.sample, every_seed, labels=labels)
    job.save_each(images, every_seed, labels=labels)
    columns = round((CONTACT_SHEET_ASPECT * len(images)) ** 0.5)
    if len(class_indices) > 1:
        columns = len(seeds)
        by_class = images.unflatten(0, (len(class_indices), columns))
        shown = by_class[:MAX_GRID_IMAGES, :MAX_GRID_COLUMNS].flatten(0, 1)
        row_names = [names[index] for index in class_indices[:MAX_GRID_IMAGES]]
        headings = [f"seed {seed}" for seed in seeds[:MAX_GRID_COLUMNS]]
        figure = plots.table(shown, row_names, headings, job.settings["tile"])
        job.save(figure, "grid.png", seeds=seeds[:MAX_GRID_COLUMNS])
    else:
        job.save_grid("grid.png", images[:MAX_GRID_IMAGES], seeds[:MAX_GRID_IMAGES])
    job.save(plots.grid(images, columns, smallest=1, padding=1), "contact_sheet.png")
    return f"{len(images)} images, grid.png, contact_sheet.png"


def show_trajectory(job: InferenceJob) -> str:
    """x_t and the x_0 predicted from it: a strip of some timesteps and a GIF of all."""
    # Trajectory: pairs of t and [x_t, x_0].
    seeds = job.settings["seeds"][:MAX_FIGURE_SEEDS]
    states = job.model.sample_states(seeds, labels=job.labels_of(seeds), **job.sampler_kwargs)
    trajectory = [(t, unnormalize(torch.stack([x_t, x_0])).float().cpu()) for t, x_t, x_0 in states]

    # Strip: for each seed a row of x_t and a row of x_0.
    shown = np.linspace(0, len(trajectory) - 1, job.settings["columns"]).round().astype(int)
    columns = [trajectory[i] for i in np.unique(shown)]
    tiles = torch.stack([pair for _, pair in columns], dim=2).transpose(0, 1).flatten(0, 2)
    captions = []
    for seed in seeds:  # t < 0 is the final image
        captions += [f"x_t, t = {t}" if t >= 0 else f"seed {seed}" for t, _ in columns]
        captions += ["predicted x_0"] * len(columns)
    job.save_grid("progressive.png", tiles, seeds, captions, columns=len(columns))

    # GIF: at most MAX_FRAMES, always with the last; x_t above x_0.
    frames = trajectory[:: -math.ceil(len(trajectory) / MAX_FRAMES)][::-1]
    tiles = (plots.on_white(pair.flatten(0, 1)) for _, pair in frames)
    grids = [plots.grid(each, columns=len(seeds)) for each in tiles]
    plots.save_gif(grids, job.folder / "progressive.gif")
    rows = "upper row x_t, lower row the predicted x_0"
    return f"progressive.png ({rows}), progressive.gif, of seeds {', '.join(map(str, seeds))}"


def interpolate(job: InferenceJob) -> str:
    """Images between two given ones, and maybe two classes: a strip and a GIF."""
    requested = job.requested_labels
    labels = (requested[0], requested[-1]) if requested else None
    image1, title1 = job.load_input_image("image1", labels and labels[0])
    image2, title2 = job.load_input_image("image2", labels and labels[1])
    # The encoder is DDIM's, so DDIM decodes unless there is a custom sampler.
    sampler = job.sampler if callable(job.sampler) else "ddim"
    steps = min(max(INVERSION_STEPS, job.settings["steps"]), job.model.num_timesteps)
    num_images = job.settings["num_steps"]
    images = job.model.interpolate(image1, image2, num_images, sampler, steps, labels)
    images = images.float().cpu()

    # Figures.
    captions = [title1, *(f"{i / (num_images - 1):.2f}" for i in range(num_images)), title2]
    tiles = torch.cat([image1[None].cpu(), images, image2[None].cpu()])
    columns = min(len(tiles), job.settings["columns"] + 2)
    job.save_grid("interpolation.png", tiles, job.settings["seeds"], captions, columns=columns)
    frames = plots.enlarge(plots.on_white(torch.cat([images, images.flip(0)[1:-1]])), 128)
    plots.save_gif(list(map(plots.to_image, frames)), job.folder / "interpolation.gif")

    psnr_of_ends = [round(psnr(images[i], tiles[i]), 1) for i in (0, -1)]
    name = job.settings["sampler"] if callable(job.sampler) else sampler
    job.results = {"psnr": psnr_of_ends, "decoder": {"sampler": name, "steps": steps}}
    quality = "PSNR of the ends {} and {} dB".format(*psnr_of_ends)
    return f"interpolation.png, interpolation.gif, by {steps} steps of {name}; {quality}"


def generate_batch(job: InferenceJob) -> str:
    """Many images straight to disk, shared by the ranks; those that exist are kept."""
    # The files of each chunk: PNGs, or a part of the npz.
    dist = distributed.init()
    seeds = job.settings["seeds"]
    is_npz = job.settings["format"] == "npz"
    if not is_npz:
        plots.check_file_channels(job.model.channels)
    folder = job.folder / ("parts" if is_npz else "images")
    chunks = batched(seeds, CHUNK_IMAGES)

    def files(chunk: list[int]) -> list[Path]:
        if is_npz:
            return [folder / f"{chunk[0]:08d}.npy"]
        return [folder / path for path in job.image_paths(chunk, job.labels_of(chunk))]

    def missing_chunks() -> list[list[int]]:
        return [chunk for chunk in chunks if not all(file.exists() for file in files(chunk))]

    # The settings of what is in the folder.
    settings_file = job.folder / "settings.json"
    if has_other_settings(settings_file, job.settings):
        raise UserError(f"{job.folder} holds other images. Remove it or change --output_dir")
    if dist.is_main_process:
        checkpoints.remove_leftovers(job.folder)
        checkpoints.write_text(settings_file, json.dumps(job.settings, sort_keys=True))

    # This rank's chunks; the files do not depend on the number of ranks.
    missing = distributed.broadcast_object(missing_chunks())
    rank_chunks = missing[dist.process_index :: dist.num_processes]
    for chunk in tqdm(rank_chunks, unit="chunk", desc="batch", disable=not dist.is_main_process):
        labels = job.labels_of(chunk)
        images = job.run_batched(job.model.sample, chunk, labels=labels)
        if is_npz:
            save = partial(write_array, plots.to_bytes(images))
            checkpoints.write_atomically(files(chunk)[0], save)
        else:
            job.save_each(images, chunk, "images", labels)
    dist.wait_for_everyone()

    # All chunks, in one file if it is an npz.
    if dist.is_main_process:
        if missing := missing_chunks():
            reason = f"lacks the images from seed {missing[0][0]} on"
            raise UserError(f"{folder} {reason} (can all machines write there?). Run it again", 1)
        if is_npz:
            parts = [read_part(file) for chunk in chunks for file in files(chunk)]
            arrays = {"images": np.concatenate(parts), "seeds": np.array(seeds)}
            if job.model.class_names:
                arrays["labels"] = np.array(job.labels_of(seeds))
                arrays["class_names"] = np.array(job.model.class_names)
            save = partial(np.savez, **arrays)
            checkpoints.write_atomically(job.folder / "images.npz", save)
    job.results = {"processes": dist.num_processes}
    return f"{len(seeds)} images: {'images.npz' if is_npz else 'images/'}"


def write_array(array: np.ndarray, file: BinaryIO) -> None:
    """Writes an .npy. Into a plain file numpy writes by tofile, whose errors have no errno."""
    np.save(SimpleNamespace(write=file.write), array)


def read_part(file: Path) -> np.ndarray:
    """Reads a chunk of an unfinished .npz; raises UserError if it is damaged."""
    try:
        return np.load(file)
    except (ValueError, EOFError) as error:
        raise UserError(f"{file} is damaged. Delete it and run this again") from error


def vary(job: InferenceJob) -> str:
    """Variations of an image."""
    image, _ = job.load_input_image("image")
    strength = job.settings["strength"]
    return edit_image(job, job.model.vary, {"original": image}, "variations", strength=strength)


def inpaint(job: InferenceJob) -> str:
    """An image with new content where a mask is white, by default in the right half."""
    image, _ = job.load_input_image("image")
    size = job.model.image_size
    mask = (torch.arange(size) >= size // 2).expand(size, size)
    if job.settings["mask"] is not None:
        mask = read_mask(*(resolve_input(job.settings[name]) for name in ("mask", "image")), size)
    shown = {"original": image, "masked": image.masked_fill(mask, 0.5)}
    options = {"mask": mask, "resamples": job.settings["resamples"]}
    return edit_image(job, job.model.inpaint, shown, "inpainted", **options)


def edit_image(
    job: InferenceJob, function: Callable, shown: dict[str, Tensor], name: str, **options: Any
) -> str:
    """Saves what a method of the model makes of the original image, from each seed.

    shown: by caption, what the figure begins with. No labels without --classes: the original's
    class is unknown.
    """
    seeds = job.settings["seeds"]
    options["labels"] = job.labels_of(seeds) if job.requested_labels else None
    images = job.run_batched(function, seeds, image=shown["original"], **options)
    tiles = torch.cat([torch.stack([*shown.values()]), images])[:MAX_EDITED_TILES]
    job.save_grid(f"{name}.png", tiles, seeds[: len(tiles) - len(shown)], [*shown])
    job.save_each(images, seeds, name)
    return f"{name}.png, {len(images)} single images in {name}/"


@dataclass
class Candidate:
    """A model that is compared, and how it samples."""

    model: nn.Module
    path: Path
    labels: list[int] | None  # the label of each seed
    samplers: Sequence[str | Callable]
    step_counts: Sequence[int]  # each sampler takes each of these
    spacing: str | None = None
    guidance: Mapping[str, Any] = field(default_factory=dict)  # from guidance_kwargs

    def sample(self, seeds: Sequence[int]) -> Iterator[tuple[str, Tensor, int, float]]:
        """Yields method, tile (C, H, W), NFE per image and seconds for all images.

        The method is the sampler and its number of steps, such as `ddim 20`.
        """
        options = {"spacing": self.spacing, "labels": self.labels, **self.guidance}
        self.model.sample(len(seeds), seed=seeds, **options)  # warm-up, with guidance
        for sampler, steps in itertools.product(self.samplers, self.step_counts):
            start = time.perf_counter()
            sampling = options | {"sampler": sampler, "steps": steps}
            images = self.model.sample(len(seeds), seed=seeds, **sampling).float().cpu()
            seconds = time.perf_counter() - start
            plan = self.model.sampling_plan(sampler, steps, self.spacing)
            nfe = self.model.count_nfe(*plan, **self.guidance)
            tile = make_grid(plots.enlarge(images, 80), 2, padding=1, pad_value=1.0)
            yield f"{getattr(sampler, '__name__', sampler)} {steps}", tile, nfe, seconds


def compare_samplers(job: InferenceJob) -> str:
    """Every sampler at several step counts, and maybe another model, timed."""
    # What is compared; checked before anything is sampled.
    model = job.model
    seeds = job.settings["seeds"][:MAX_FIGURE_SEEDS]
    samplers = [*model.supported_samplers, *([job.sampler] if callable(job.sampler) else [])]
    compared = CONSISTENCY_STEPS if model.is_consistency_tuned else COMPARED_STEPS
    counts = [count for count in compared if count <= model.num_timesteps]
    step_counts = counts or [model.num_timesteps]
    sampling = {"spacing": job.settings["spacing"], "guidance": guidance_kwargs(job.settings)}
    path = Path(job.settings["checkpoint"])
    candidates = [Candidate(model, path, job.labels_of(seeds), samplers, step_counts, **sampling)]
    if job.settings["compare_with"]:
        candidates.append(load_other(job, seeds))

    # Images.
    tiles = []
    captions = []
    seconds_by_sampler = {}
    for candidate in candidates:
        model_name = checkpoints.display_name(candidate.path)
        for method, tile, nfe, seconds in candidate.sample(seeds):
            tiles.append(tile)
            caption = f"{method}: {nfe} NFE, {seconds:.3f} s"
            captions.append(f"{model_name}\n{caption}" if len(candidates) > 1 else caption)
            key = method if candidate is candidates[0] else f"{model_name} {method}"
            seconds_by_sampler[key] = round(seconds, 3)

    # Figure: a row for each sampler, or a single row if there is only one.
    columns = len(step_counts) if len(samplers) > 1 else len(tiles)
    numbers = f"network evaluations (NFE) per image, seconds for {len(seeds)} images"
    names = f"seeds {', '.join(map(str, seeds))}"
    title = f"{names}; sampler, steps: {numbers}"
    job.save_grid("compare.png", torch.stack(tiles), seeds, captions, columns=columns, title=title)
    job.results = {"seconds_by_sampler": seconds_by_sampler}
    return f"compare.png, of {names}"


def load_other(job: InferenceJob, seeds: Sequence[int]) -> Candidate:
    """Returns the model of --compare_with, with its own sampler, steps and guidance.

    Classes are those of the job's model, by name. Raises UserError if images or classes differ.
    """
    # The model, of the same image size and channels.
    path = Path(job.settings["compare_with"])
    model = type(job.model).from_file(path, job.model.image_size).to(job.model.device)
    sizes = [f"{m.image_size} px with {m.channels} channels" for m in (model, job.model)]
    if sizes[0] != sizes[1]:
        advice = "Compare models of the same image size and channels"
        raise UserError(f"{path} is for images of {sizes[0]}, not {sizes[1]}. {advice}")
    if job.settings["compile_model"]:
        compile_networks(model)

    # The labels of the same classes, if both models have any.
    labels = job.labels_of(seeds) if model.class_names else None
    if labels is not None:
        names = [job.model.class_names[label] for label in labels]
        if unknown := set(names) - set(model.class_names):
            advice = "Choose others with --classes"
            raise UserError(f"{path} has no class {', '.join(sorted(unknown))}. {advice}")
        labels = [model.class_names.index(name) for name in names]
    return Candidate(model, path, labels, [model.default_sampler], [model.sampling_timesteps])


MODES: dict[str, Callable[[InferenceJob], str]] = {
    "samples": generate_samples, "interpolate": interpolate, "progressive": show_trajectory,
    "batch": generate_batch, "compare": compare_samplers, "vary": vary, "inpaint": inpaint,
}  # fmt: skip
