"""Measures this machine: training, sampling, the data path, and whether the fast path learns what plain fp32 does.

    python benchmark.py                                everything: about nine minutes on a GPU (estimated)
    python benchmark.py --quick --only training        a minute; two without --only
    python benchmark.py --dim 64 --dim_mults 1,2,4,8 --full_attention_size 0     another network than the preset's
    python benchmark.py --estimate                     how long each preset would take here, and with what batch
    python benchmark.py --memory                       what trains on cards of 3, 6, 12 and 24 GiB: 13 minutes

Of them training takes 4.5 (1 to 2 a compilation, most of the rest cuDNN's search for fp32 kernels), sampling 1, data 1
and curves 2. What matters most comes first, the library's step and our fast path, and each part is written as soon as
it is measured.

The peers, in the same run: the step of the library's Trainer and the library's 1000 ancestral steps and, where
diffusers is installed, its UNet2DModel with as many parameters, to 10 %. What hangs or dies costs its own row alone.
Writes results/benchmark-<device>.json and .png; `--readme` puts all of results/ into the README's tables.
"""

import argparse
import copy
import datetime
import functools
import importlib.util
import itertools
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from ema_pytorch import EMA
from torch import nn
from tqdm import tqdm

import train_optimized
from config import PRESETS, DDPMConfig, Resolved, detect_tier, resolve, tier_of
from ddpm_model import DDPMModel, full_attention, per_level
from engine import batches, measuring, report
from engine.checkpoints import write_atomically
from engine.command_line import Parser, Setting, run
from engine.errors import UserError
from engine.fitting import memory_table
from engine.measuring import Job, Processes
from engine.samplers import SAMPLER
from engine.sources import SHAPES_COUNT, load_images
from engine.step import Step, amp_dtype
from engine.training import duration

NETWORK = ("IMAGE_SIZE", "DIM", "DIM_MULTS", "FULL_ATTENTION_SIZE")  # the attributes that say which network it is
RESULTS, README = Path("results"), Path("README.md")
IMAGES = {"cifar10": 50_000, "celeba": 202_599, "stl10": 105_000, "shapes": SHAPES_COUNT}
SAMPLERS = (("ddim", 50), ("dpmpp_2m", 20), ("heun", 19), ("ddpm", 50))  # beside the default with its own steps
DIFFUSERS = "diffusers' UNet2DModel"
ALIKE = 0.1  # how much diffusers' network may have more or fewer parameters than ours
LIMIT, CPU_LIMIT = 120.0, 900.0  # seconds that a variant may take on a GPU (compiled: twice that) and elsewhere
CAPS = (3.0, 6.0, 12.0, 24.0)  # GiB: a card of each tier
PRESET_OF = {32: "cifar10", 64: "celeba", 96: "stl10", 128: "folder"}  # data set whose preset is for this image size
SETTINGS: dict[str, tuple[type, Setting, Any]] = {
    "PRESET": (str, Setting("whose model to measure", choices=tuple(PRESETS)), "cifar10; without a GPU shapes"),
    "IMAGE_SIZE": (int, Setting("side of the square images, pixels", 4, 1024), "the preset's"),
    "DIM": (*DDPMConfig.settings()["DIM"], "the preset's for the image size"),
    "DIM_MULTS": (*DDPMConfig.settings()["DIM_MULTS"], ("the preset's for the image size",)),
    "FULL_ATTENTION_SIZE": (*DDPMConfig.settings()["FULL_ATTENTION_SIZE"], "the preset's for the image size"),
    "BATCH": (
        tuple,
        Setting("images in a training step; on a GPU those between the first and the last have our fast path alone", 1),
        ("128,256,512; above 32 px the preset's; fewer on a CPU",),
    ),
    "THREADS": (int, Setting("CPU threads of what is not said to have 1", 1, 1024), "all cores"),
    "CURVE_STEPS": (
        int,
        Setting("steps of a learning curve", 1),
        "500; above 32 px 100; on a CPU 200; with --quick a fifth",
    ),
}


@dataclass(frozen=True)
class Subject:
    """The model that is measured: a preset's, perhaps with another network."""

    preset: str
    image_size: int
    dim: int
    dim_mults: tuple[int, ...]
    full_attention_size: int

    @classmethod
    def of(cls, config: Resolved) -> "Subject":
        """The one that a configuration describes."""
        return cls(config.DATASET, config.IMAGE_SIZE, config.DIM, config.DIM_MULTS, config.FULL_ATTENTION_SIZE)

    def network(self) -> dict[str, Any]:
        """The attributes of the network."""
        return {name: getattr(self, name.lower()) for name in NETWORK}

    def config(self, **flags: Any) -> Resolved:
        """Its configuration with the given attributes."""
        return resolve(self.preset, detect_tier(), flags=self.network() | flags)

    def key(self) -> str:
        """What its results are filed under: the preset's name where the network is the preset's, else all of it."""
        if self == Subject.of(resolve(self.preset, detect_tier())):
            return self.preset
        mults = ",".join(map(str, self.dim_mults))
        return f"{self.preset}-{self.image_size}px-dim{self.dim}-{mults}-full{self.full_attention_size}"

    def library_unet(self) -> Unet:
        """The library's own network of this size."""
        c = self.config()
        heads, width = (tuple(per_level(v, c.DIM_MULTS)) for v in (c.ATTENTION_HEADS, c.ATTENTION_DIM))
        return Unet(
            c.DIM, dim_mults=c.DIM_MULTS, dropout=c.DROPOUT, full_attn=tuple(full_attention(c)), attn_heads=heads,
            attn_dim_head=width,
        )  # fmt: skip

    def library_process(self) -> GaussianDiffusion:
        """The library's own diffusion process around its network."""
        objective = self.config().OBJECTIVE
        return GaussianDiffusion(self.library_unet(), image_size=self.image_size, objective=objective)

    def diffusers_unet(self) -> nn.Module:
        """diffusers' network of the width at which it comes nearest to our parameters."""
        ours, widths = parameters_of(self.library_unet), range(64, 1025, 32)  # it normalises groups of 32 channels
        return ho_unet(self.image_size, min(widths, key=lambda width: abs(ho_parameters(width) - ours)))

    def without_diffusers(self) -> str:
        """Why diffusers' network is no peer of ours here; empty if it is one."""
        if not importlib.util.find_spec("diffusers"):
            return "it is not installed"
        if self.image_size % 8:
            return f"its four levels need a multiple of 8 pixels, not {self.image_size}"
        theirs, ours = parameters_of(self.diffusers_unet), parameters_of(self.library_unet)
        if abs(theirs / ours - 1) > ALIKE:
            return f"the width nearest to ours has {theirs / 1e6:.2f} M parameters, ours {ours / 1e6:.2f} M"
        return ""


def ho_unet(image_size: int, width: int) -> nn.Module:
    """diffusers' network with the levels of Ho et al. (arXiv:2006.11239): half of the width at full size, then all."""
    from diffusers import UNet2DModel

    plain, attention = ("DownBlock2D", "UpBlock2D"), ("AttnDownBlock2D", "AttnUpBlock2D")
    down, up = zip(plain, attention, plain, plain, strict=True)
    return UNet2DModel(
        sample_size=image_size, block_out_channels=(32 * round(width / 64), width, width, width),
        down_block_types=down, up_block_types=up[::-1], layers_per_block=2, attention_head_dim=None,
    )  # fmt: skip


@functools.cache
def ho_parameters(width: int) -> int:
    """Parameters of ho_unet, whatever the size of the images."""
    return parameters_of(lambda: ho_unet(32, width))


def parameters_of(make: Callable[[], nn.Module]) -> int:
    """Parameters of the network that make() gives, which takes no memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


def library_training(subject: Subject, batch: int, amp: bool, threads: int | None, round_seconds: float) -> dict:
    """The step of the library's Trainer, on images that are on the device already."""
    device = measuring.prepare(threads)

    def make() -> Callable[[], None]:
        process = subject.library_process().to(device)
        accelerator = Accelerator(mixed_precision="fp16" if amp else "no")
        average = EMA(process, beta=0.995, update_every=10).to(device)
        optimizer = torch.optim.Adam(process.parameters(), lr=1e-4, betas=(0.9, 0.99))
        process, optimizer = accelerator.prepare(process, optimizer)
        images = torch.rand(batch, 3, subject.image_size, subject.image_size, device=device)

        def step() -> None:
            with accelerator.autocast():
                loss = process(images)
            loss.item()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(process.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.update()

        return step

    return measuring.step_rates(make, batch, device, round_seconds)


def diffusers_training(subject: Subject, batch: int, amp: bool, threads: int | None, round_seconds: float) -> dict:
    """The same step (clipping, fused Adam, EMA) with diffusers' network and schedule."""
    from diffusers import DDPMScheduler

    device = measuring.prepare(threads)

    def make() -> Callable[[], None]:
        network, schedule = subject.diffusers_unet().to(device), DDPMScheduler()
        average = copy.deepcopy(network).requires_grad_(False)
        parameters, averaged = list(network.parameters()), list(average.parameters())
        optimizer = torch.optim.Adam(parameters, lr=1e-4, betas=(0.9, 0.99), fused=True)
        images = torch.rand(batch, 3, subject.image_size, subject.image_size, device=device) * 2 - 1

        def step() -> None:
            noise, t = torch.randn_like(images), torch.randint(1000, (batch,), device=device)
            with torch.autocast(device.type, amp_dtype(device), enabled=amp):
                predicted = network(schedule.add_noise(images, noise, t), t).sample
            nn.functional.mse_loss(predicted.float(), noise).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(averaged, parameters, 1e-3)

        return step

    return measuring.step_rates(make, batch, device, round_seconds)


def our_training(
    subject: Subject, batch: int, flags: dict[str, bool], threads: int | None, round_seconds: float
) -> dict:
    """Our step with the given switches."""
    device = measuring.prepare(threads)

    def make() -> Callable[[], Any]:
        step, number = make_step(subject, device, BATCH_SIZE=batch, **flags), itertools.count()
        shape = (batch, 3, subject.image_size, subject.image_size)
        images = torch.randint(256, shape, dtype=torch.uint8, device=device)
        return lambda: step(images, next(number), 1e-4)

    return measuring.step_rates(make, batch, device, round_seconds)


def make_step(subject: Subject, device: torch.device, **flags: Any) -> Step:
    """Our step of a new model."""
    config = subject.config(**flags)
    return Step(DDPMModel.from_config(config).to(device).train(), config)


@functools.lru_cache(maxsize=1)  # one model, and so one CUDA graph, for all samplers that a process measures
def untrained(subject: Subject, device: torch.device) -> DDPMModel:
    """A model with new weights, on the device; with a guide, which costs the same, if training would keep one."""
    config = subject.config()
    model = DDPMModel.from_config(config)
    if config.GUIDE_AT:
        model.keep_guide()
    return model.to(device).eval()


def our_sampling(
    subject: Subject, batch: int, sampler: str, steps: int, amp: bool, graph: bool, threads: int | None, rounds: int
) -> dict:
    """DDPMModel.sample as a user calls it."""
    device = measuring.prepare(threads)
    model = untrained(subject, device)
    model.cuda_graph = graph

    def draw() -> torch.Tensor:
        with torch.autocast(device.type, amp_dtype(device), enabled=amp):
            return model.sample(batch, sampler=sampler, steps=steps, seed=0)

    draw().cpu()
    return measuring.draw_rates(draw, batch, rounds) | {"evaluations": model.evaluations(*model.plan(sampler, steps))}


def library_sampling(subject: Subject, batch: int, done: int, threads: int | None) -> dict:
    """The library's ancestral steps: `done` of them, spread evenly, each of which takes as long as any other."""
    device = measuring.prepare(threads)
    process = subject.library_process().to(device).eval()
    shape = (batch, 3, subject.image_size, subject.image_size)

    def draw(steps: int) -> torch.Tensor:
        x = torch.randn(shape, device=device)
        for t in torch.linspace(process.num_timesteps - 1, 0, steps).long().tolist():
            x, _ = process.p_sample(x, t)
        return x

    draw(1).cpu()
    rate = measuring.draw_rates(lambda: draw(done), batch, 1)["images_per_second"] * done / process.num_timesteps
    return {"images_per_second": rate, "rounds": [rate], "evaluations": process.num_timesteps}


def data_path(subject: Subject, batch: int, resident: bool) -> dict:
    """The fast step on the GPU, its images there too or brought by 8 workers from a memory map."""
    device = measuring.prepare()
    batches.GPU_SHARE = 1.0 if resident else 0.0
    step, rates = make_step(subject, device, BATCH_SIZE=batch, USE_AMP=True, CUDA_GRAPH=True), []
    with tempfile.TemporaryDirectory() as folder:
        path, shape = Path(folder) / "images.npy", (110 * batch, 3, subject.image_size, subject.image_size)
        np.save(path, np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
        source = batches.Batches(np.load(path, mmap_mode="r"), batch, 0, device, 8)
        for epoch in range(measuring.ROUNDS + 1):
            for number, images in enumerate(source.epoch(epoch)):
                step(images, number, 1e-4)
                if number == 3:  # workers have started
                    measuring.wait(device)
                    start = time.perf_counter()
            measuring.wait(device)
            rates.append(batch * (len(source) - 4) / (time.perf_counter() - start))
    rates = rates[1:]  # in the first epoch the step was captured
    return {"images_per_second": statistics.median(rates), "rounds": rates}


def learning_curve(subject: Subject, batch: int, seed: int, steps: int, flags: dict, threads: int) -> dict:
    """Losses of our step on the built-in shapes, from weights and with noise of the given seed."""
    device = measuring.prepare(threads)
    images = load_images("shapes", subject.image_size, Path("data"))[: min(100, SHAPES_COUNT // batch) * batch]
    images = torch.from_numpy(np.array(images)).to(device).split(batch)
    step = make_step(subject, device, BATCH_SIZE=batch, SEED=seed, HORIZONTAL_FLIP=False, **flags)
    losses = [step(images[i % len(images)], i, min(1, i / 100) * 4e-4)[0].clone() for i in range(steps)]
    return {"losses": [round(loss, 6) for loss in torch.stack(losses).tolist()]}


def preset_speed(preset: str, threads: int) -> dict:
    """How fast the optimised step of a preset is here and, on a GPU, how many images `fit` into one (a power of 2)."""
    config = resolve(preset, detect_tier(), train_optimized.DEFAULTS)
    subject = Subject.of(config)
    flags = {name: getattr(config, name) for name in ("USE_AMP", "COMPILE_MODEL", "CUDA_GRAPH")}
    gpu = torch.cuda.is_available()
    batch = config.BATCH_SIZE if gpu else cpu_batch(config.IMAGE_SIZE)
    result = our_training(subject, batch, flags, threads, 1.0)
    if not gpu:
        return result

    def gib(batch: int) -> float:
        """Memory of some steps without a CUDA graph, which needs no more; raises FellBack if they do not fit."""
        with measuring.nothing_given_up():
            return our_training(subject, batch, flags | {"CUDA_GRAPH": False}, None, 0.0)["peak_gib"]

    small, large = gib(16), gib(64)
    measuring.prepare()
    free = 0.95 * torch.cuda.mem_get_info()[0] / 2**30
    fit = 2 ** int(math.log2(max(1, 16 + 48 * (free - small) / max(large - small, 0.01))))
    while fit > 1:
        try:
            gib(fit)
            break
        except (measuring.FellBack, torch.OutOfMemoryError):
            fit //= 2
    return result | {"fit": fit}


def cpu_batch(image_size: int) -> int:
    """Images in a training step that take a CPU a second or so."""
    return max(2, 32 * 16**2 // image_size**2)


def training_jobs(
    subject: Subject, sizes: Sequence[int], threads: int, quick: bool, gpu: bool, diffusers: bool
) -> list[Job]:
    """Peers and ours by precision, launching, threads and batch.

    The library comes first, since it is the measure, and beside it our fast path, lest a run that is cut off lack it.
    """
    low, amp, graph, compiled = low_precision(), {"USE_AMP": True}, {"CUDA_GRAPH": True}, {"COMPILE_MODEL": True}
    limit = LIMIT if gpu else CPU_LIMIT

    def ours(what: str, batch: int, flags: dict[str, bool], process: str = "steps", threads: int = threads) -> Job:
        options = {"subject": subject, "batch": batch, "flags": flags, "threads": threads, "round_seconds": 0.5}
        allowed = limit * (2 if "COMPILE_MODEL" in flags else 1)
        return Job({"what": f"ours, {what}", "batch": batch}, process, our_training, options, allowed)

    def peer(what: str, batch: int, amp: bool = False, threads: int = threads) -> Job:
        measure = diffusers_training if what.startswith(DIFFUSERS) else library_training
        options = {"subject": subject, "batch": batch, "amp": amp, "threads": threads, "round_seconds": 0.5}
        return Job({"what": what, "batch": batch}, "steps", measure, options, limit)

    library, fast = "library's Trainer, fp32", f"{low}, CUDA graph"
    if not gpu:
        jobs = []
        for batch in sizes:
            jobs += [peer(library, batch), ours("fp32", batch, {})]
            jobs += [ours(low, batch, amp)] * measuring.has_cpu_bf16()
            if quick:
                continue
            jobs += [peer(f"{DIFFUSERS}, fp32", batch)] * diffusers
            if threads > 1:
                jobs += [peer(f"{library}, 1 thread", batch, threads=1), ours("fp32, 1 thread", batch, {}, threads=1)]
            jobs += [ours("fp32, compiled", batch, compiled, f"compiled {batch}")]
        return jobs
    first, ends = sizes[0], dict.fromkeys((sizes[0], sizes[-1]))
    jobs = [job for batch in ends for job in (peer(library, batch), ours(fast, batch, amp | graph))]
    jobs += [ours(fast, batch, amp | graph) for batch in sizes[1:-1]]
    jobs += [ours(low, first, amp)]
    if quick:
        return jobs
    jobs += [ours("fp32", first, {})]
    jobs += [peer(f"{DIFFUSERS}, {low}", batch, amp=True) for batch in ends if diffusers]
    return [*jobs, ours(f"{low}, compiled, CUDA graph", first, amp | compiled | graph, "compiled")]


def sampling_jobs(subject: Subject, threads: int, quick: bool, gpu: bool) -> Iterator[Job]:
    """The library's 1000 ancestral steps, then ours: first as DDPMModel.sample draws unless told otherwise."""
    low, default = low_precision(), [(SAMPLER, subject.config().SAMPLING_TIMESTEPS)]
    samplers = default if quick else [*default, *SAMPLERS]
    small, large = (64, 256) if gpu else (4, 16)
    done = (50 if quick else 250) if gpu else 5
    common = {"subject": subject, "threads": threads}
    limit = LIMIT if gpu else CPU_LIMIT
    row = {"what": f"library, fp32 ({done} of 1000 steps)", "sampler": "ddpm", "steps": 1000, "batch": small}
    yield Job(row, "samples", library_sampling, common | {"batch": small, "done": done}, limit)
    # name, mixed precision, CUDA graph, batch, samplers
    variants: list[tuple[str, bool, bool, int, Sequence[tuple[str, int]]]]
    if gpu:
        variants = [
            (f"ours, {low}, CUDA graph", True, True, large, samplers),
            (f"ours, {low}, CUDA graph", True, True, small, default),
            ("ours, fp32, CUDA graph", False, True, small, default),
            (f"ours, {low}", True, False, small, default),
            ("ours, fp32", False, False, small, default),
        ][: 1 if quick else None]
    else:
        variants = [("ours, fp32", False, False, small, default)]
        if not quick:
            variants += [("ours, fp32", False, False, large, samplers)]
            variants += [(f"ours, {low}", True, False, large, default)] * measuring.has_cpu_bf16()
    for name, amp, graph, batch, drawn in variants:
        for sampler, steps in drawn:
            row = {"what": name, "sampler": sampler, "steps": steps, "batch": batch}
            options = {"batch": batch, "sampler": sampler, "steps": steps, "amp": amp, "graph": graph}
            options["rounds"] = 1 if quick else measuring.ROUNDS
            yield Job(row, "samples", our_sampling, common | options, limit)


def data_jobs(subject: Subject, batch: int) -> Iterator[Job]:
    """The two ways in which images reach a GPU."""
    for name, resident in (("on the GPU", True), ("from 8 workers", False)):
        options = {"subject": subject, "batch": batch, "resident": resident}
        yield Job({"what": name, "batch": batch}, "data", data_path, options, LIMIT)


def curve_jobs(subject: Subject, batch: int, steps: int, threads: int, gpu: bool) -> list[Job]:
    """The fast path (on a CPU: bf16) and plain fp32 from the same seed, and fp32 from two others."""
    fast = {"USE_AMP": True, "CUDA_GRAPH": gpu}
    runs = [("fp32", 0, {}), ("fast", 0, fast), ("fp32", 1, {}), ("fp32", 2, {})]
    names = {"fp32": "fp32", "fast": f"fast path ({low_precision()}{', CUDA graph' if gpu else ''})"}
    common = {"subject": subject, "batch": batch, "steps": steps, "threads": threads}
    return [
        Job(
            {"what": f"{names[kind]}, seed {seed}", "kind": kind, "seed": seed, "batch": batch}, "eager",
            learning_curve, common | {"seed": seed, "flags": flags}, CPU_LIMIT,
        )
        for kind, seed, flags in runs
    ]  # fmt: skip


def low_precision() -> str:
    """What mixed precision is here: bf16, or fp16 on a GPU without it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "fp16" if amp_dtype(device) == torch.float16 else "bf16"


def in_words(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    size = "  ".join(f"{row[key]!s:>9}" for key in ("sampler", "steps", "evaluations", "batch") if key in row)
    head = f"{row['what']:36} {size}  "
    if "failed" in row:
        return f"{head}FAILED: {row['failed']}"
    if "losses" in row:
        return f"{head}mean loss at the end {report.tail(row['losses']):.5f}"
    words = f"{row['images_per_second']:10,.2f} images/s ({min(row['rounds']):,.2f} to {max(row['rounds']):,.2f})"
    more = {"ms": "{:.2f} ms", "over_library": "{:.2f} x", "mfu": "{:.1%} MFU", "peak_gib": "{:.2f} GiB"}
    more["first_step"] = "first step after {:.1f} s"
    return head + ", ".join([words, *(text.format(row[key]) for key, text in more.items() if row.get(key))])


def complete(row: dict[str, Any], rows: list[dict[str, Any]], flops: dict[str, int], peak: float | None) -> None:
    """Adds to a row what it is over the library's row of its batch, or the only one, and its MFU."""
    library = [r for r in rows if r["what"].startswith("library") and "images_per_second" in r]
    reference = next((r for r in library if r["batch"] == row["batch"] or "sampler" in row), None)
    if reference:
        row["over_library"] = row["images_per_second"] / reference["images_per_second"]
    if peak and flops:
        work = flops["diffusers" if row["what"].startswith(DIFFUSERS) else "library"]
        row["mfu"] = measuring.utilisation(row["images_per_second"], work, peak)


def measure(
    part: str, subject: Subject, options: argparse.Namespace, gpu: bool, processes: Processes
) -> list[dict[str, Any]]:
    """The rows of a part, each printed as it comes."""
    flops, peak = {}, None
    if part == "training":
        without = "--quick" if options.quick else subject.without_diffusers()
        if without:
            print(f"{DIFFUSERS} is left out: {without}", flush=True)
        jobs = training_jobs(subject, options.batch, options.threads, options.quick, gpu, diffusers=not without)
        flops = work_of(subject, diffusers=not without)
        size, dtype = (8192, amp_dtype(torch.device("cuda"))) if gpu else (2048, torch.float32)
        product = {"size": size, "dtype": dtype, "threads": options.threads}
        jobs.insert(0, Job({}, jobs[0].process, measuring.matmul_rate, product, LIMIT))
    elif part == "sampling":
        jobs = list(sampling_jobs(subject, options.threads, options.quick, gpu))
    elif part == "data":
        jobs = list(data_jobs(subject, options.batch[-1]))
    else:
        load_images("shapes", subject.image_size, Path("data"))  # drawn once, not by every process
        jobs = curve_jobs(subject, options.batch[0], options.curve_steps, options.threads, gpu)
    rows: list[dict[str, Any]] = []
    at_once = part == "curves" and detect_tier().memory > 40  # GiB: four runs fit at the same time
    measured = measuring.measured_at_once if at_once else processes.measured
    with tqdm(total=len(jobs), desc=part, unit="variant", mininterval=1, dynamic_ncols=True) as bar:
        for job, row in measured(jobs):
            bar.update()
            if job.measure is measuring.matmul_rate:
                peak = row.get("flops_per_second")
                words = f"{peak / 1e12:.2f} TFLOP/s" if peak else f"FAILED: {row['failed']}"
                bar.write(f"product of two large matrices, what MFU is measured by: {words}")
            else:
                rows.append(row)
                if "images_per_second" in row:
                    complete(row, rows, flops, peak)
                bar.write(in_words(row))
            sys.stdout.flush()
    return sorted(rows, key=lambda row: row["batch"]) if part == "training" else rows


def work_of(subject: Subject, diffusers: bool) -> dict[str, int]:
    """FLOPs that an image takes in training, as the library's network does it and as diffusers' does."""
    shapes = (1, 3, subject.image_size, subject.image_size), (1,)
    work = {"library": measuring.training_flops(subject.library_unet, *shapes)}
    return work | ({"diffusers": measuring.training_flops(subject.diffusers_unet, *shapes)} if diffusers else {})


def estimate(threads: int) -> None:
    """Prints for each preset how long its training takes on this machine and what batch fits."""
    limit = LIMIT if torch.cuda.is_available() else CPU_LIMIT
    jobs = [Job({"preset": name}, name, preset_speed, {"preset": name, "threads": threads}, limit) for name in PRESETS]
    bar = tqdm(total=len(jobs), desc="presets", unit="preset", mininterval=1, dynamic_ncols=True)
    with bar, Processes() as processes:
        for job, row in processes.measured(jobs):
            bar.update()
            bar.write(in_time(job.row["preset"], row))
            sys.stdout.flush()


def in_time(preset: str, row: dict[str, Any]) -> str:
    """The estimate for a preset in one line."""
    config = resolve(preset, detect_tier(), train_optimized.DEFAULTS)
    if "failed" in row:
        return f"{preset:8} FAILED: {row['failed']}"
    batch, rate = config.BATCH_SIZE * config.GRADIENT_ACCUMULATION, row["images_per_second"]
    steps = config.MAX_STEPS or config.EPOCHS * (len(batches.split(IMAGES[preset])[0]) // batch)
    seconds = 60 * config.MINUTES or steps * batch / rate
    images = rate * seconds
    how = f"{config.MINUTES:g} minutes" if config.MINUTES else f"{config.EPOCHS} epochs"
    fit = f"; up to {row['fit']} images fit into a step (measured)" if "fit" in row else ""
    return (
        f"{preset:8} {config.IMAGE_SIZE} px, dim {config.DIM}: {duration(seconds)} ({how}, {images / 1e6:.2f} M images "
        f"at {rate:,.0f} images/s), batch {config.BATCH_SIZE} x {config.GRADIENT_ACCUMULATION}{fit}"
    )


def memory_cases(sizes: Sequence[int]) -> dict[str, Resolved]:
    """The presets for images of these sizes on cards of each tier."""
    return {
        f"{size} px, {cap:g} GiB": resolve(
            PRESET_OF[size], tier_of(cap), train_optimized.DEFAULTS, flags={"IMAGE_SIZE": size, "MEMORY_GIB": cap},
        )
        for size in sizes
        for cap in CAPS
    }  # fmt: skip


def options_of(arguments: argparse.Namespace, gpu: bool) -> argparse.Namespace:
    """The command line with what it leaves open filled in from preset and machine."""
    for name, (kind, setting, _) in SETTINGS.items():
        given = getattr(arguments, name, None)
        setattr(arguments, name.lower(), None if given is None else setting.check(f"--{name.lower()}", given, kind))
    arguments.preset = arguments.preset or ("cifar10" if gpu else "shapes")
    given = {name: getattr(arguments, name.lower()) for name in NETWORK}
    flags = {name: value for name, value in given.items() if value is not None}
    config = resolve(arguments.preset, detect_tier(), flags=flags)
    arguments.subject = Subject.of(config)
    if not arguments.batch:
        small = config.IMAGE_SIZE <= 32
        usual = (128, 256, 512) if small else (config.BATCH_SIZE * config.GRADIENT_ACCUMULATION,)
        arguments.batch = usual[: 1 if arguments.quick else None] if gpu else (cpu_batch(config.IMAGE_SIZE),)
    arguments.threads = arguments.threads or measuring.cores()
    whole = (500 if config.IMAGE_SIZE <= 32 else 100) if gpu else 200
    arguments.curve_steps = arguments.curve_steps or whole // (5 if arguments.quick else 1)
    return arguments


def main() -> None:
    """Measures, prints as it goes, and writes after each part."""
    parser = Parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer variants, fewer steps: some two minutes")
    parser.add_argument("--only", choices=report.PARTS, help="measure one part and keep the others of the last report")
    parser.add_argument(
        "--estimate", action="store_true", help="how long each preset would train here; measures a minute"
    )
    parser.add_argument(
        "--readme", action="store_true", help="write the README's tables from results/, measuring nothing"
    )
    parser.add_argument(
        "--memory", nargs="?", const="all", choices=("all", *map(str, PRESET_OF)),
        help="what trains on cards of 3, 6, 12 and 24 GiB at this image size, pixels: 3 minutes a size",
    )  # fmt: skip
    for name, (kind, setting, default) in SETTINGS.items():
        parser.add_setting(name, kind, setting, default)
    gpu = torch.cuda.is_available()
    options = options_of(parser.parse_args(), gpu)
    if options.readme:
        report.write_readme(README, RESULTS)
        print(f"written: {README}")
        return
    name = measuring.device_name()
    print(f"{name}, torch {torch.__version__}", flush=True)
    file = re.sub("[^A-Za-z0-9]+", "-", name).strip("-")
    if options.memory:
        if not gpu:
            raise UserError("--memory measures a GPU's memory, and there is no GPU here")
        sizes = list(PRESET_OF) if options.memory == "all" else [int(options.memory)]
        path = RESULTS / f"memory-{file}.json"
        rows = memory_table(DDPMModel.from_config, memory_cases(sizes), path)
        print(f"written: {path}")
        if any("failed" in row for row in rows):
            raise UserError("not all of them train: see above", exit_code=1)
        return
    if options.estimate:
        estimate(options.threads)
        return
    subject, key = options.subject, options.subject.key()
    network = {name.lower(): value for name, value in subject.network().items()}
    network["parameters"] = parameters_of(subject.library_unet)
    print(f"{subject.preset}: {report.network_in_words(network)}", flush=True)
    path = RESULTS / f"benchmark-{file}.json"
    if options.only == "data" and not gpu:
        raise UserError("--only data compares images on the GPU with images from workers, and there is no GPU here")
    parts = [part for part in report.PARTS if part != "data" or (gpu and not options.quick)]
    with Processes() as processes:
        for part in [options.only] if options.only else parts:
            rows = measure(part, subject, options, gpu, processes)
            result = {"device": name, "torch": torch.__version__, "date": datetime.date.today().isoformat()}
            whole = report.merge(path, key, part, result | {"quick": options.quick} | network | {"rows": rows})
            write_atomically(path.with_suffix(".png"), lambda file, whole=whole: file.write(report.picture(whole)))
            if part == "curves":
                print(report.verdict(rows))
    print(f"written: {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    run(main)
