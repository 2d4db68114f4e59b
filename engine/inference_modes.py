"""The modes of inference.py: what each makes of a model, as images and figures in a folder."""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.utils import make_grid
from tqdm import tqdm

from engine import checkpoints, distributed, plots
from engine.errors import UserError
from engine.generation import unnormalize
from engine.inference_jobs import InferenceJob, compile_networks, has_other_settings, psnr
from engine.input_images import open_input, read_mask
from engine.samplers import batched

MAX_GRID_COLUMNS = 16  # seeds in the grid of a model with classes
FIGURE_TILES = 16  # of vary and inpaint
MAX_FRAMES = 60  # of a GIF
COMPARED_STEPS = (5, 10, 20, 50)
CONSISTENCY_STEPS = (1, 2, 4, 8)  # compared of a tuned model
CHUNK_IMAGES = 256  # images that mode batch samples and saves at a time


def generate_samples(job: InferenceJob) -> str:
    """Single images, a grid (with classes, a row for each) and a contact sheet."""
    seeds = job.settings["seeds"]
    names = job.model.class_names
    row_labels = job.given_labels or range(len(names))
    labels = np.repeat(row_labels, len(seeds)).tolist() if names else None
    every_seed = seeds * max(len(row_labels), 1)
    images = job.run_batched(job.model.sample, every_seed, labels=labels)
    job.save_each(images, every_seed, labels=labels)
    columns = round((1.6 * len(images)) ** 0.5)
    if len(row_labels) > 1:
        columns = len(seeds)
        shown = images.unflatten(0, (len(row_labels), columns))[:100, :MAX_GRID_COLUMNS]
        rows = [names[label] for label in row_labels[:100]]
        headings = [f"seed {seed}" for seed in seeds[:MAX_GRID_COLUMNS]]
        figure = plots.table(shown.flatten(0, 1), rows, headings, job.settings["tile"])
        job.save(figure, "grid.png", seeds=seeds[:MAX_GRID_COLUMNS])
    else:
        job.save_grid("grid.png", images[:100], seeds[:100])
    job.save(plots.grid(images, columns, smallest=1, padding=1), "contact_sheet.png")
    return f"{len(images)} images, grid.png, contact_sheet.png"


def show_trajectory(job: InferenceJob) -> str:
    """x_t and the x_0 predicted from it: a strip of some timesteps and a GIF of all."""
    # Trajectory of (t, [x_t, x_0]).
    seeds = job.settings["seeds"][:4]
    states = job.model.sample_states(seeds, labels=job.labels_of(seeds), **job.sampler_kwargs)
    trajectory = [(t, unnormalize(torch.stack([x_t, x_0])).float().cpu()) for t, x_t, x_0 in states]

    # Strip: for each seed a row of x_t and a row of x_0.
    shown = np.linspace(0, len(trajectory) - 1, job.settings["columns"]).round().astype(int)
    steps = [trajectory[i] for i in np.unique(shown)]
    tiles = torch.stack([pair for _, pair in steps], dim=2).transpose(0, 1).flatten(0, 2)
    captions = []
    for seed in seeds:
        captions += [f"x, t = {t}" if t >= 0 else f"seed {seed}" for t, _ in steps]
        captions += ["predicted x_0"] * len(steps)
    job.save_grid("progressive.png", tiles, seeds, captions, columns=len(steps))

    # GIF: at most MAX_FRAMES, always with the last; x_t above x_0.
    frames = trajectory[:: -math.ceil(len(trajectory) / MAX_FRAMES)][::-1]
    tiles = (plots.on_white(pair.flatten(0, 1)) for _, pair in frames)
    grids = [plots.grid(each, columns=len(seeds)) for each in tiles]
    plots.save_gif(grids, job.folder / "progressive.gif")
    return "progressive.png (upper row x_t, lower row the predicted x_0), progressive.gif"


def interpolate(job: InferenceJob) -> str:
    """Images between two given ones, and maybe two classes: a strip and a GIF."""
    labels = (job.given_labels[0], job.given_labels[-1]) if job.given_labels else None
    image1, title1 = job.load_input_image("image1", labels and labels[0])
    image2, title2 = job.load_input_image("image2", labels and labels[1])
    # The encoder is DDIM's, so DDIM decodes unless there is a custom sampler.
    sampler = job.sampler if callable(job.sampler) else "ddim"
    steps = min(max(100, job.settings["steps"]), job.model.num_timesteps)
    count = job.settings["num_steps"]
    images = job.model.interpolate(image1, image2, count, sampler, steps, labels).float().cpu()

    # Figures.
    captions = [title1, *(f"{i / (count - 1):.2f}" for i in range(count)), title2]
    tiles = torch.cat([image1[None].cpu(), images, image2[None].cpu()])
    columns = min(len(tiles), job.settings["columns"] + 2)
    job.save_grid("interpolation.png", tiles, job.settings["seeds"], captions, columns=columns)
    frames = plots.enlarge(plots.on_white(torch.cat([images, images.flip(0)[1:-1]])), 128)
    plots.save_gif(list(map(plots.to_image, frames)), job.folder / "interpolation.gif")

    psnr_of_ends = [round(psnr(images[i], tiles[i]), 1) for i in (0, -1)]
    name = job.settings["sampler"] if callable(job.sampler) else sampler
    job.results = {"psnr": psnr_of_ends, "decoder": {"sampler": name, "steps": steps}}
    quality = "PSNR of the ends {} and {} dB".format(*psnr_of_ends)
    return f"interpolation.png, interpolation.gif; {quality}"


def generate_batch(job: InferenceJob) -> str:
    """Many images straight to disk, shared by the ranks; those that exist are kept."""
    # The files of each chunk: PNGs, or a part of the npz.
    dist = distributed.init()
    seeds = job.settings["seeds"]
    is_npz = job.settings["format"] == "npz"
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
            save = partial(np.save, arr=plots.to_bytes(images))
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
            save = partial(np.savez, **arrays)
            checkpoints.write_atomically(job.folder / "images.npz", save)
    job.results = {"processes": dist.num_processes}
    return f"{len(seeds)} images: {'images.npz' if is_npz else 'images/'}"


def read_part(file: Path) -> np.ndarray:
    """Reads a chunk of an unfinished .npz; raises UserError if it is damaged."""
    try:
        return np.load(file)
    except (ValueError, EOFError) as error:
        raise UserError(f"{file} is damaged. Delete it and run this again") from error


def vary(job: InferenceJob) -> str:
    """Variations of an image."""
    seeds = job.settings["seeds"][: FIGURE_TILES - 1]  # and the original
    image, _ = job.load_input_image("image")
    kwargs = {"strength": job.settings["strength"], "labels": job.labels_if_asked(seeds)}
    images = job.run_batched(job.model.vary, seeds, image=image, **kwargs)
    job.save_grid("variations.png", torch.cat([image[None].cpu(), images]), seeds, ["original"])
    job.save_each(images, seeds, "variations")
    return "variations.png, single images in variations/"


def inpaint(job: InferenceJob) -> str:
    """An image with new content where a mask is white."""
    seeds = job.settings["seeds"][: FIGURE_TILES - 2]  # and the original, and it masked
    image, _ = job.load_input_image("image")
    size = job.model.image_size
    mask = (torch.arange(size) >= size // 2).expand(size, size)
    if job.settings["mask"]:
        mask = read_mask(open_input(job.settings["mask"]), open_input(job.settings["image"]), size)
    kwargs = {"resamples": job.settings["resamples"], "labels": job.labels_if_asked(seeds)}
    images = job.run_batched(job.model.inpaint, seeds, image=image, mask=mask, **kwargs)
    original = image[None].cpu()
    tiles = torch.cat([original, original.masked_fill(mask, 0.5), images])
    job.save_grid("inpainted.png", tiles, seeds, ["original", "masked"])
    job.save_each(images, seeds, "inpainted")
    return "inpainted.png, single images in inpainted/"


@dataclass
class Candidate:
    """A model that is compared, and how it samples."""

    model: nn.Module
    path: Path
    labels: list[int] | None  # of the seeds
    samplers: Sequence[str | Callable]
    steps: Sequence[int]  # by each sampler
    spacing: str | None = None
    guidance: float | None = None
    guidance_mode: str | None = None

    def sample(self, seeds: Sequence[int]) -> Iterator[tuple[str, Tensor, int, float]]:
        """Yields sampler and steps, a tile (C, H, W), NFE of an image and seconds of all."""
        guidance = {"guidance": self.guidance, "guidance_mode": self.guidance_mode}
        options = {"spacing": self.spacing, "labels": self.labels, **guidance}
        self.model.sample(len(seeds), seed=seeds, **options)  # warm-up, of guidance, too
        for sampler, steps in itertools.product(self.samplers, self.steps):
            start = time.perf_counter()
            sampling = options | {"sampler": sampler, "steps": steps}
            images = self.model.sample(len(seeds), seed=seeds, **sampling).float().cpu()
            seconds = time.perf_counter() - start
            plan = self.model.sampling_plan(sampler, steps, self.spacing)
            nfe = self.model.count_nfe(*plan, **guidance)
            tile = make_grid(plots.enlarge(images, 80), 2, padding=1, pad_value=1.0)
            yield f"{getattr(sampler, '__name__', sampler)} {steps}", tile, nfe, seconds


def compare_samplers(job: InferenceJob) -> str:
    """Every sampler at several step counts, and maybe another model, timed."""
    # What is compared; checked before anything is sampled.
    model = job.model
    seeds = job.settings["seeds"][:4]
    samplers = [*model.samplers, *([job.sampler] if callable(job.sampler) else [])]
    compared = CONSISTENCY_STEPS if model.is_consistency_tuned else COMPARED_STEPS
    steps = [count for count in compared if count <= model.num_timesteps]
    sampling = {name: job.settings[name] for name in ("spacing", "guidance", "guidance_mode")}
    path = Path(job.settings["checkpoint"])
    candidates = [Candidate(model, path, job.labels_of(seeds), samplers, steps, **sampling)]
    if job.settings["compare_with"]:
        candidates.append(load_other(job, seeds))

    # Images.
    tiles = []
    captions = []
    seconds_by_sampler = {}
    for candidate in candidates:
        name = checkpoints.display_name(candidate.path)
        for sampler, tile, nfe, seconds in candidate.sample(seeds):
            tiles.append(tile)
            caption = f"{sampler}: {nfe} NFE, {seconds:.3f} s"
            captions.append(f"{name}\n{caption}" if len(candidates) > 1 else caption)
            key = sampler if candidate is candidates[0] else f"{name} {sampler}"
            seconds_by_sampler[key] = round(seconds, 3)

    # Figure: a row for each sampler, or all in one.
    columns = len(steps) if len(samplers) > 1 else len(tiles)
    of = f"network evaluations (NFE) of an image, seconds for {len(seeds)} images"
    title = f"seeds {', '.join(map(str, seeds))}; sampler, steps: {of}"
    job.save_grid("compare.png", torch.stack(tiles), seeds, captions, columns=columns, title=title)
    job.results = {"seconds_by_sampler": seconds_by_sampler}
    return "compare.png"


def load_other(job: InferenceJob, seeds: Sequence[int]) -> Candidate:
    """Returns the model of --compare_with, with its own sampler, steps and guidance.

    Classes are those of the job's model, by name. Raises UserError if images or classes differ.
    """
    # Of the same image size and channels.
    path = Path(job.settings["compare_with"])
    model = type(job.model).from_file(path, job.model.image_size).to(job.model.device)
    sizes = [f"{m.image_size} px with {m.channels} channels" for m in (model, job.model)]
    if sizes[0] != sizes[1]:
        advice = "Compare models of the same image size and channels"
        raise UserError(f"{path} is for images of {sizes[0]}, not {sizes[1]}. {advice}")
    if job.settings["compile_model"]:
        compile_networks(model)

    # With the same classes, if both have any.
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
