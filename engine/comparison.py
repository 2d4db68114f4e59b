"""Comparison of samplers, numbers of steps and models: images of the same seeds, timed."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid

from engine import plots
from engine.checkpoints import display_name
from engine.errors import UserError
from engine.inference_jobs import InferenceJob, compile_networks

COMPARED_STEPS = (5, 10, 20, 50)
CONSISTENCY_STEPS = (1, 2, 4, 8)


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
        name = display_name(candidate.path)
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
