"""Samples images from a trained model.

    python inference.py                                    of the newest checkpoint
    python inference.py --classes cat,dog                  if the model has such classes
    python inference.py --mode all                         one of each mode below
    python inference.py --sampler dpmpp_2m --steps 15 --seeds 0-3
    python inference.py --from_png inference_results/.../000007.png      reproduces that image
    torchrun --nproc_per_node=4 inference.py --mode batch --num_samples 50000      on 4 GPUs

Modes: samples; interpolate (between two images); progressive (the trajectory from noise to image);
batch (thousands; resumes where it was killed); compare (samplers by steps, two models); vary
(variations of an image); inpaint (a masked region). Results: inference_results/<mode>-.../, with
all settings.
"""

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from engine.cli import Parser, run_script  # first: sets what torch reads

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ddpm_model import DDPMModel, unnormalize
from engine import checkpoints, distributed, plots
from engine import inference_jobs as jobs
from engine.comparison import compare_samplers
from engine.devices import default_device
from engine.errors import RenamedWarning, UserError
from engine.gpu_memory import OomBatcher
from engine.labels import parse_classes
from engine.samplers import batched
from engine.sampling_settings import SamplingSettings, choose_sampling, plan_kwargs, sampling_label
from engine.settings import Setting

MAX_DEFAULT_IMAGES = 64  # of all classes, if neither --seeds nor --num_samples is given
MAX_GRID_COLUMNS = 16  # seeds in the grid of a model with classes
FIGURE_TILES = 16  # of vary and inpaint
MAX_FRAMES = 60  # of a GIF
CHUNK_IMAGES = 256  # images that mode batch samples and saves at a time


def batch_generate(
    model: DDPMModel, total_samples: int = 1000, batch_size: int = 32, seed: int = 0,
    sampler: str | Callable | None = None, steps: int | None = None,
    labels: int | Sequence[int] | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """Samples many images with a progress bar: (N, C, H, W) in [0, 1] on the CPU.

    Image i has seed + i at any batch size. sampler, labels and others as in DDPMModel.sample.
    In a distributed run every rank must call this: they share the work, and all get all images.
    """
    dist = distributed.init()
    own = slice(dist.process_index, None, dist.num_processes)
    seeds = range(seed, seed + total_samples)[own]
    options |= {"sampler": sampler, "steps": steps}
    if labels is not None:
        options["labels"] = np.broadcast_to(labels, total_samples)[own].tolist()
    images = torch.zeros(total_samples, model.channels, model.image_size, model.image_size)
    if seeds:
        batcher = OomBatcher(batch_size)
        images[own] = jobs.run_batched(model.sample, seeds, batcher, "sampling", **options)
    if dist.num_processes > 1:
        for part in images.split(1024):  # small enough for the GPU; images of other ranks are 0
            on_device = part.to(model.device)
            distributed.all_reduce(on_device)
            part.copy_(on_device)
    return images


def generate_samples(job: jobs.InferenceJob) -> str:
    """Single images, a grid (with classes, a row for each) and a contact sheet."""
    seeds = job.settings["seeds"]
    names = job.model.class_names
    classes = job.classes or range(len(names))
    labels = np.repeat(classes, len(seeds)).tolist() if names else None
    every_seed = seeds * max(len(classes), 1)
    images = job.run_batched(job.model.sample, every_seed, labels=labels)
    job.save_each(images, every_seed, labels=labels)
    columns = round((1.6 * len(images)) ** 0.5)
    if len(classes) > 1:
        columns = len(seeds)
        shown = images.unflatten(0, (len(classes), columns))[:100, :MAX_GRID_COLUMNS]
        rows = [names[label] for label in classes[:100]]
        headings = [f"seed {seed}" for seed in seeds[:MAX_GRID_COLUMNS]]
        figure = plots.table(shown.flatten(0, 1), rows, headings, job.settings["tile"])
        job.save(figure, "grid.png", seeds=seeds[:MAX_GRID_COLUMNS])
    else:
        job.save_grid("grid.png", images[:100], seeds[:100])
    job.save(plots.grid(images, columns, smallest=1, padding=1), "contact_sheet.png")
    return f"{len(images)} images, grid.png, contact_sheet.png"


def show_trajectory(job: jobs.InferenceJob) -> str:
    """x_t and the x_0 predicted from it: a strip of some timesteps and a GIF of all."""
    # Trajectory of (t, [x_t, x_0]).
    seeds = job.settings["seeds"][:4]
    states = job.model.sample_states(seeds, labels=job.labels_of(seeds), **job.sampler_kwargs)
    trajectory = [(t, unnormalize(torch.stack([x_t, x_0])).float().cpu()) for t, x_t, x_0 in states]

    # Strip: for each seed a row of x_t and a row of x_0.
    shown = np.linspace(0, len(trajectory) - 1, job.settings["columns"]).round().astype(int)
    steps = [trajectory[i] for i in np.unique(shown)]
    tiles = torch.stack([pair for _, pair in steps], dim=2).transpose(0, 1).flatten(0, 2)
    labels = []
    for seed in seeds:
        labels += [f"x, t = {t}" if t >= 0 else f"seed {seed}" for t, _ in steps]
        labels += ["predicted x_0"] * len(steps)
    job.save_grid("progressive.png", tiles, seeds, labels, columns=len(steps))

    # GIF: at most MAX_FRAMES, always with the last; x_t above x_0.
    frames = trajectory[:: -math.ceil(len(trajectory) / MAX_FRAMES)][::-1]
    tiles = (plots.on_white(pair.flatten(0, 1)) for _, pair in frames)
    plots.save_gif(
        [plots.grid(each, columns=len(seeds)) for each in tiles], job.folder / "progressive.gif"
    )
    return "progressive.png (upper row x_t, lower row the predicted x_0), progressive.gif"


def interpolate(job: jobs.InferenceJob) -> str:
    """Images between two given ones, and maybe two classes: a strip and a GIF."""
    ends = (job.classes[0], job.classes[-1]) if job.classes else None
    image1, title1 = job.load_input_image("image1", ends and ends[0])
    image2, title2 = job.load_input_image("image2", ends and ends[1])
    # The encoder is DDIM's, so DDIM decodes unless there is a custom sampler.
    sampler = job.sampler if callable(job.sampler) else "ddim"
    steps = min(max(100, job.settings["steps"]), job.model.num_timesteps)
    count = job.settings["num_steps"]
    images = job.model.interpolate(image1, image2, count, sampler, steps, ends).float().cpu()

    # Figures.
    labels = [title1, *(f"{i / (count - 1):.2f}" for i in range(count)), title2]
    tiles = torch.cat([image1[None].cpu(), images, image2[None].cpu()])
    columns = min(len(tiles), job.settings["columns"] + 2)
    job.save_grid("interpolation.png", tiles, job.settings["seeds"], labels, columns=columns)
    frames = plots.enlarge(plots.on_white(torch.cat([images, images.flip(0)[1:-1]])), 128)
    plots.save_gif(list(map(plots.to_image, frames)), job.folder / "interpolation.gif")

    psnr = [round(jobs.psnr(images[i], tiles[i]), 1) for i in (0, -1)]
    name = job.settings["sampler"] if callable(job.sampler) else sampler
    job.results = {"psnr": psnr, "decoder": {"sampler": name, "steps": steps}}
    return f"interpolation.png, interpolation.gif; PSNR of the ends {psnr[0]} and {psnr[1]} dB"


def generate_batch(job: jobs.InferenceJob) -> str:
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
    if jobs.has_other_settings(settings_file, job.settings):
        raise UserError(f"{job.folder} holds other images. Remove it or change --output_dir")
    if dist.is_main_process:
        checkpoints.remove_leftovers(job.folder)
        checkpoints.write_text(settings_file, json.dumps(job.settings, sort_keys=True))

    # This rank's chunks; the files do not depend on the number of ranks.
    missing = distributed.broadcast_object(missing_chunks())
    own = missing[dist.process_index :: dist.num_processes]
    for chunk in tqdm(own, unit="chunk", desc="batch", disable=not dist.is_main_process):
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
            parts = [jobs.read_part(file) for chunk in chunks for file in files(chunk)]
            arrays = {"images": np.concatenate(parts), "seeds": np.array(seeds)}
            if job.model.class_names:
                arrays["labels"] = np.array(job.labels_of(seeds))
            save = partial(np.savez, **arrays)
            checkpoints.write_atomically(job.folder / "images.npz", save)
    job.results = {"processes": dist.num_processes}
    return f"{len(seeds)} images: {'images.npz' if is_npz else 'images/'}"


def vary(job: jobs.InferenceJob) -> str:
    """Variations of an image."""
    seeds = job.settings["seeds"][: FIGURE_TILES - 1]  # and the original
    image, _ = job.load_input_image("image")
    kwargs = {"strength": job.settings["strength"], "labels": job.labels_if_asked(seeds)}
    images = job.run_batched(job.model.vary, seeds, image=image, **kwargs)
    job.save_grid("variations.png", torch.cat([image[None].cpu(), images]), seeds, ["original"])
    job.save_each(images, seeds, "variations")
    return "variations.png, single images in variations/"


def inpaint(job: jobs.InferenceJob) -> str:
    """An image with new content where a mask is white."""
    seeds = job.settings["seeds"][: FIGURE_TILES - 2]  # and the original, and it masked
    image, _ = job.load_input_image("image")
    size = job.model.image_size
    mask = (torch.arange(size) >= size // 2).expand(size, size)
    if job.settings["mask"]:
        given_mask = jobs.open_input(job.settings["mask"])
        mask = jobs.read_mask(given_mask, jobs.open_input(job.settings["image"]), size)
    kwargs = {"resamples": job.settings["resamples"], "labels": job.labels_if_asked(seeds)}
    images = job.run_batched(job.model.inpaint, seeds, image=image, mask=mask, **kwargs)
    original = image[None].cpu()
    tiles = torch.cat([original, original.masked_fill(mask, 0.5), images])
    job.save_grid("inpainted.png", tiles, seeds, ["original", "masked"])
    job.save_each(images, seeds, "inpainted")
    return "inpainted.png, single images in inpainted/"


MODES: dict[str, Callable[[jobs.InferenceJob], str]] = {
    "samples": generate_samples, "interpolate": interpolate, "progressive": show_trajectory,
    "batch": generate_batch, "compare": compare_samplers, "vary": vary, "inpaint": inpaint,
}  # fmt: skip
INPUT = "a file, a seed or data:INDEX of the training images"


class InferenceSettings(SamplingSettings):
    """What is made, and from what; stored with every image."""

    mode = Setting("samples", "what to make", choices=(*MODES, "all"))
    checkpoint = Setting(None, "a .pt or .safetensors file, or a run", type_=str, auto="the newest")
    compare_with = Setting(
        None, "for compare: another model, a file or a run, sampled from the same seeds", type_=str
    )
    image_size = Setting(0, "side of the images of lucidrains' checkpoints, pixels", 0, 1024)
    seeds = Setting("", "seeds like 0-63 or 3,7", auto="the first --num_samples")
    classes = Setting(
        None, "class names or numbers like cat,dog or 0-4", type_=str, auto="all of the model"
    )
    num_samples = Setting(
        16, "number of images; in mode samples: of each class, by default fewer, so that all "
        "classes together have at most 64", min=1, max=10_000_000,
    )  # fmt: skip
    eta = Setting(0.0, "noise that ddim adds: 0 none, 1 as much as ddpm", min=0, max=1)
    image = Setting(None, f"for vary and inpaint: {INPUT}", type_=str, auto="the first seed")
    image1 = Setting(None, f"for interpolate: {INPUT}", type_=str, auto="the first seed")
    image2 = Setting(None, f"for interpolate: {INPUT}", type_=str, auto="the last seed")
    mask = Setting(None, "for inpaint: white where to inpaint", type_=str, auto="the right half")
    num_steps = Setting(10, "images of interpolate, both ends included", min=2, max=1000)
    strength = Setting(0.5, "noise strength of vary", min=0.001, max=1)
    resamples = Setting(5, "times that inpaint repeats each step", min=1, max=100)
    format = Setting("png", "files of batch", choices=("png", "npz"))
    compile_model = Setting(False, "compile the network; pays off for thousands of images")
    tile = Setting(plots.MIN_TILE, "size to which figures enlarge smaller images, pixels", 1, 4096)
    columns = Setting(10, "images in a row of progressive and interpolate", 1, 1000)


def settings_from_command_line(
    description: str | None, defaults: Mapping
) -> tuple[dict[str, Any], Path, bool]:
    """Returns settings as stored with each image, output folder, and whether seeds were given."""
    parser = Parser(description)
    parser.add_argument("--from_png", type=Path, help="reproduce an image of this script")
    folder = "inference_results"
    parser.add_argument("--output_dir", type=Path, default=folder, help=f"(default: {folder})")
    ignored = {"action": argparse.BooleanOptionalAction, "help": argparse.SUPPRESS}
    parser.add_argument("--channels_last", **ignored)
    InferenceSettings.add_flags(parser, defaults)
    options = parser.parse_args()
    given = InferenceSettings.given(options)
    if options.channels_last is not None:
        warnings.warn("--channels_last is always on; ignoring the flag", RenamedWarning, 2)

    # Settings of an existing image, or of the command line.
    if options.from_png:
        for name in given.keys() - {"sampler"}:
            raise UserError(f"--from_png takes all settings from the image. Drop --{name}")
        sampler = given.get("sampler")
        settings = jobs.settings_from_png(options.from_png, InferenceSettings, sampler)
        return settings, options.output_dir, True
    settings = InferenceSettings(**{**defaults, **given}).as_dict()
    if settings["mode"] == "compare":
        for name in given.keys() & {"steps", "noise_levels", "sampler"}:
            if ":" not in str(given[name]):  # a sampler of the user's is compared, too
                reason = "compare tries every sampler of the model at several numbers of steps"
                raise UserError(f"--{name} has no effect: {reason}. Drop it")
    count = settings.pop("num_samples")
    settings["seeds"] = jobs.parse_seeds(settings["seeds"] or f"0-{count - 1}")
    path = checkpoints.resolve_checkpoint(settings["checkpoint"])
    settings["checkpoint"] = str(path)
    settings["sha256"] = jobs.sha256(path) if path.is_file() else ""
    if settings["compare_with"] is not None:
        if settings["mode"] != "compare":
            raise UserError("--compare_with is for --mode compare. Drop it, or choose that mode")
        other = checkpoints.resolve_checkpoint(settings["compare_with"], "--compare_with")
        settings["compare_with"] = str(other)
    has_given_seeds = bool(given.keys() & {"seeds", "num_samples"})
    return jobs.complete_settings(settings), options.output_dir, has_given_seeds


def load_for_sampling(settings: dict[str, Any], device: torch.device) -> DDPMModel:
    """Loads the checkpoint; sets how to sample and the batch size to what suits it."""
    path = settings["checkpoint"]
    size = settings["image_size"]
    model = DDPMModel.from_file(path, size or None).to(device)
    if size not in (0, model.image_size):
        raise UserError(f"{path} is for images of {model.image_size} px: drop --image_size {size}")
    settings |= choose_sampling(model, settings)
    if not settings["batch_size"]:
        settings["batch_size"] = jobs.auto_batch_size(model, settings["use_amp"])
    if settings["compile_model"]:
        jobs.compile_networks(model)
    return model


def folder_name(settings: Mapping[str, Any]) -> str:
    """Returns the name of a mode's results: model, sampler, classes and seeds."""
    seeds = settings["seeds"]
    ends = "-".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
    model = checkpoints.display_name(Path(settings["checkpoint"]))
    label = sampling_label(settings, settings["classes"])
    return f"{settings['mode']}-{model}-{label}-seeds-{ends}"


def main(description: str | None = __doc__, defaults: Mapping[str, Any] | None = None) -> None:
    """Runs an inference script. The ranks share mode batch; rank 0 alone runs the others."""
    settings, output_dir, has_given_seeds = settings_from_command_line(description, defaults or {})
    with distributed.session(lambda: "start the same command again") as dist:
        # Model and sampler, validated before any image is made; rank 0 says which is the newest.
        settings = distributed.broadcast_object(settings)
        path = settings["checkpoint"]
        guidance = settings["guidance"], settings["guidance_mode"]
        given_spacing = settings["spacing"]
        model = load_for_sampling(settings, default_device())
        sampler = jobs.load_sampler(settings["sampler"])
        plan = model.sampling_plan(**plan_kwargs(settings, sampler))
        nfe = model.count_nfe(*plan, *guidance)
        num_classes = len(model.class_names)
        if settings["classes"] is not None:
            num_classes = len(parse_classes(settings["classes"], model.class_names))
        checkpoints.check_writable(output_dir)

        # What is about to be done, and flags that have no effect.
        how = f"{settings['sampler']}, {settings['steps']} steps, {nfe} NFE per image"
        distributed.print0(f"{path}: {model.image_size} px, {how}, {model.device.type}")
        is_unguided = nfe == model.count_nfe(*plan, 1)  # no step evaluates a second network
        if is_unguided and guidance[0] not in (None, 1):
            flag = f"--guidance {guidance[0]:g}"
            distributed.print0(f"note: this model has no guide, so {flag} changes nothing")
        if settings["eta"] and sampler != "ddim":
            distributed.print0(f"note: --eta is for ddim; {settings['sampler']} ignores it")
        modes = list(MODES if settings["mode"] == "all" else [settings["mode"]])
        if model.is_consistency_tuned and len(modes) > 1:
            modes.remove("interpolate")
            distributed.print0("note: a consistency-tuned model cannot interpolate: left out")
        if dist.num_processes > 1 and settings["mode"] not in ("batch", "all"):
            distributed.print0("note: rank 0 works alone; the ranks share --mode batch only")

        # Modes.
        for mode in modes:
            if mode != "batch" and not dist.is_main_process:
                continue
            start = time.perf_counter()
            mode_settings = settings | {"mode": mode}
            if mode == "compare":  # unless one is given, each sampler has its own
                mode_settings["spacing"] = given_spacing
            if mode == "samples" and num_classes and not has_given_seeds:
                count = max(1, MAX_DEFAULT_IMAGES // num_classes)
                mode_settings["seeds"] = settings["seeds"][:count]
            folder = output_dir / folder_name(mode_settings)
            if mode != "batch":  # which resumes
                folder = jobs.unique_output_dir(folder, mode_settings)
            job = jobs.InferenceJob(model, mode_settings, folder, sampler)
            with jobs.autocast(model, settings["use_amp"]):
                results = MODES[mode](job)
            seconds = time.perf_counter() - start
            if dist.is_main_process:
                job.write_summary(seconds)
            distributed.print0(f"{mode}: {results} ({seconds:.1f} s) in {folder}/")


if __name__ == "__main__":
    run_script(main)
