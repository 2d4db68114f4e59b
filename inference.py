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
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.cli import Parser, run_script  # first: sets what torch reads

import numpy as np
import torch
from torch import Tensor

from ddpm_model import DDPMModel
from engine import checkpoints, distributed, plots
from engine import inference_jobs as jobs
from engine.denoiser import GUIDANCE_OPTIONS
from engine.devices import default_device
from engine.errors import RenamedWarning, UserError
from engine.gpu_memory import OomBatcher
from engine.inference_modes import MODES
from engine.labels import parse_classes
from engine.sampling_settings import (
    SamplingSettings,
    choose_sampling,
    guidance_kwargs,
    plan_kwargs,
    sampling_name,
)
from engine.settings import Setting

MODES_OF_FLAGS = {  # the modes that use a flag; all others are for every mode
    "columns": ("progressive", "interpolate"), "format": ("batch",),
    "image": ("vary", "inpaint"), "image1": ("interpolate",), "image2": ("interpolate",),
    "mask": ("inpaint",), "num_steps": ("interpolate",), "resamples": ("inpaint",),
    "strength": ("vary",),
}  # fmt: skip
# The encoder of interpolate has its own steps, nothing is guided, and DDIM decodes without noise.
IGNORED_BY_INTERPOLATE = {*GUIDANCE_OPTIONS, "spacing", "sampler", "eta"}
# Modes that do not run a whole sampling plan once: its NFE is not theirs.
PARTIAL_MODES = ("interpolate", "vary", "inpaint")
MAX_DEFAULT_IMAGES = 64  # of all classes, if neither --seeds nor --num_samples is given


def batch_generate(
    model: DDPMModel, total_samples: int = 1000, batch_size: int = 32, seed: int = 0,
    sampler: str | Callable | None = None, steps: int | None = None,
    labels: int | Sequence[int] | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """Samples many images with a progress bar: (N, C, H, W) in [0, 1] on the CPU.

    Image i has seed + i at any batch size. sampler, labels and others as in DDPMModel.sample.
    In a distributed run every rank must call this: they share the work, and all get all images.
    """
    # This rank's seeds.
    dist = distributed.init()
    rank_part = slice(dist.process_index, None, dist.num_processes)
    seeds = range(seed, seed + total_samples)[rank_part]
    options |= {"sampler": sampler, "steps": steps}
    if labels is not None:
        labels = torch.as_tensor(labels).cpu().numpy()
        if labels.size not in (1, total_samples):
            raise UserError(f"there are {labels.size} labels for {total_samples} images")
        options["labels"] = np.broadcast_to(labels, total_samples)[rank_part].tolist()

    # All images on all ranks.
    images = torch.zeros(total_samples, *model.image_shape)
    if seeds:
        batcher = OomBatcher(batch_size)
        images[rank_part] = jobs.run_batched(model.sample, seeds, batcher, "sampling", **options)
    if dist.num_processes > 1:
        for part in images.split(1024):  # images of other ranks are 0
            on_device = part.to(model.device)
            distributed.all_reduce(on_device)
            part.copy_(on_device)
    return images


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
        "classes together have at most 64 or one each", min=1, max=10_000_000,
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
    tile = Setting(plots.MIN_TILE, "size up to which figures enlarge images, pixels", 1, 4096)
    columns = Setting(10, "images in a row of progressive and interpolate", 1, 1000)


def settings_from_command_line(
    description: str | None, defaults: Mapping
) -> tuple[dict[str, Any], Path, bool]:
    """Returns the settings, the output folder, and whether seeds were given."""
    # Flags.
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
        for name in sorted(given.keys() - {"sampler"}):
            raise UserError(f"--from_png takes all settings from the image. Drop --{name}")
        settings = jobs.settings_from_png(options.from_png, InferenceSettings, given.get("sampler"))
        return settings, options.output_dir, True
    settings = InferenceSettings(**{**defaults, **given}).as_dict()
    if settings["mode"] == "compare":
        for name in sorted(given.keys() & {"steps", "noise_levels", "sampler"}):
            if ":" not in str(given[name]):  # a sampler of the user's is compared, too
                reason = "compare tries every sampler of the model at several numbers of steps"
                raise UserError(f"--{name} has no effect: {reason}. Drop it")
    for name in sorted(given.keys() & MODES_OF_FLAGS.keys()):
        modes = MODES_OF_FLAGS[name]
        if settings["mode"] not in (*modes, "all"):
            named = " and ".join(modes)
            distributed.print0(f"note: --{name} is for {named}; {settings['mode']} ignores it")
    if settings["mode"] == "interpolate":
        for name in sorted(given.keys() & IGNORED_BY_INTERPOLATE):
            if ":" not in str(given[name]):  # a sampler of the user's decodes
                use = "is for ends that are seeds"
                distributed.print0(f"note: --{name} {use}; interpolate itself ignores it")

    # Seeds and checkpoints.
    if "seeds" in given and "num_samples" in given:
        raise UserError("--seeds names the images, so --num_samples has no effect. Drop one")
    count = settings.pop("num_samples")
    settings["seeds"] = jobs.parse_seeds(settings["seeds"] or f"0-{count - 1}")
    path = checkpoints.resolve_checkpoint(settings["checkpoint"])
    settings["checkpoint"] = str(path)
    settings["sha256"] = checkpoints.sha256(path) if path.is_file() else ""
    if settings["compare_with"] is not None:
        if settings["mode"] != "compare":
            raise UserError("--compare_with is for --mode compare. Drop it, or choose that mode")
        other = checkpoints.resolve_checkpoint(settings["compare_with"], "--compare_with")
        settings["compare_with"] = str(other)
    has_given_seeds = bool(given.keys() & {"seeds", "num_samples"})
    settings = jobs.complete_settings(settings)
    settings["input_sha256"] = jobs.input_digests(settings)
    return settings, options.output_dir, has_given_seeds


def load_model(path: str | Path, image_size: int) -> DDPMModel:
    """Loads a model; image_size: of lucidrains' checkpoints, 0 for others. UserError if wrong."""
    model = DDPMModel.from_file(path, image_size or None)
    if image_size not in (0, model.image_size):
        advice = f"Drop --image_size {image_size}"
        raise UserError(f"{path} is for images of {model.image_size} px. {advice}")
    return model


def load_for_sampling(settings: dict[str, Any], device: torch.device) -> DDPMModel:
    """Loads the checkpoint; sets how to sample and the batch size to what suits it."""
    model = load_model(settings["checkpoint"], settings["image_size"]).to(device)
    settings |= choose_sampling(model, settings)
    if not settings["batch_size"]:
        settings["batch_size"] = jobs.auto_batch_size(model, settings["use_amp"])
    if settings["compile_model"]:
        jobs.compile_networks(model)
    return model


def note_unguided(
    model: DDPMModel, plan: tuple, guidance: Mapping[str, Any], edits_without_class: bool = False
) -> None:
    """Prints which of the given options of guidance change nothing, if no step is guided."""
    if model.count_nfe(*plan, **guidance) == model.count_nfe(*plan, 1):
        reason = why_unguided(model, guidance)
        effect = "changes nothing"
    elif edits_without_class and (guidance["guidance_mode"] or model.guidance_mode) == "cfg":
        reason = "cfg needs --classes to edit an image"
        effect = "guides only an original that is a seed"
    else:
        return
    given = {k: v for k, v in guidance.items() if v is not None and (k, v) != ("guidance", 1)}
    if given:
        values = {k: f"{v:g}" if isinstance(v, float) else v for k, v in given.items()}
        flags = " ".join(f"--{name} {value}" for name, value in values.items())
        distributed.print0(f"note: {reason}, so {flags} {effect}")


def why_unguided(model: DDPMModel, guidance: Mapping[str, Any]) -> str:
    """Returns why no step of a sampling plan is guided; guidance: from guidance_kwargs."""
    weight = guidance["guidance"]
    if model.is_consistency_tuned:
        return "guidance is in the weights of a consistency-tuned model"
    if (model.guidance if weight is None else weight) == 1:
        return "the weight of guidance is 1"
    if model.guide is None and (guidance["guidance_mode"] or model.guidance_mode) != "cfg":
        return "this model has no guide"
    return "no step is at a noise level that is guided"


def folder_name(settings: Mapping[str, Any]) -> str:
    """Returns the name of a mode's results: model, sampler, classes and seeds."""
    seeds = settings["seeds"]
    first_and_last = "-".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
    model = checkpoints.display_name(Path(settings["checkpoint"]))
    sampling = sampling_name(settings, settings["classes"])
    return f"{settings['mode']}-{model}-{sampling}-seeds-{first_and_last}"


def main(description: str | None = __doc__, defaults: Mapping[str, Any] | None = None) -> None:
    """Runs an inference script. The ranks share mode batch; rank 0 alone runs the others."""
    settings, output_dir, has_given_seeds = settings_from_command_line(description, defaults or {})
    with distributed.session(lambda: "Start the same command again") as dist:
        # Model and sampler, validated before any image is made; rank 0 says which is the newest.
        settings = distributed.broadcast_object(settings)
        path = settings["checkpoint"]
        guidance = guidance_kwargs(settings)
        given_spacing = settings["spacing"]
        model = load_for_sampling(settings, default_device())
        sampler = jobs.load_sampler(settings["sampler"])
        plan = model.sampling_plan(**plan_kwargs(settings, sampler))
        num_classes = len(model.class_names)
        if settings["classes"] is not None:
            num_classes = len(parse_classes(settings["classes"], model.class_names))
        checkpoints.check_writable(output_dir)

        # What is about to be done, and flags that have no effect.
        sampling = f"{settings['sampler']}, {settings['steps']} steps"
        if settings["mode"] not in PARTIAL_MODES:
            sampling += f", {model.count_nfe(*plan, **guidance)} NFE per image"
        distributed.print0(f"{path}: {model.image_size} px, {sampling}, {model.device.type}")
        if settings["mode"] != "interpolate":
            is_edit = settings["mode"] in ("vary", "inpaint")
            note_unguided(model, plan, guidance, is_edit and settings["classes"] is None)
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
            if mode == "batch":  # rank 0 may be in another mode for longer than a collective waits
                distributed.wait_for_rank0("mode batch")
            folder = output_dir / folder_name(mode_settings)
            job = jobs.InferenceJob(model, mode_settings, folder, sampler)
            with jobs.autocast(model, settings["use_amp"]):
                results = MODES[mode](job)
            seconds = time.perf_counter() - start
            if dist.is_main_process:
                job.write_summary(seconds)
            distributed.print0(f"{mode}: {results} ({seconds:.1f} s) in {job.folder}/")


if __name__ == "__main__":
    run_script(main)
