"""Measures this machine: training, sampling, the data path, and whether the fast path learns what plain fp32 does.

    python benchmark.py                                everything: some five minutes on a GPU
    python benchmark.py --quick --only training        two minutes at most without --only
    python benchmark.py --estimate                     how long each preset would take here, and with what batch
    python benchmark.py --memory                       what trains on cards of 3, 6, 12 and 24 GiB: ten minutes

The peers, in the same run: the step of the library's Trainer and the library's 1000 ancestral steps and, where
diffusers is installed, its UNet2DModel with as many parameters. Each variant that could hang runs in a process of its
own. Writes results/benchmark-<device>.json and .png; `--readme` puts all of results/ into the README's tables.
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
from config import PRESETS, Resolved, detect_tier, resolve, tier_of
from ddpm_model import DDPMModel, full_attention, per_level
from engine import batches, measuring, report
from engine.checkpoints import write_atomically
from engine.command_line import Parser, Setting, run
from engine.errors import UserError
from engine.fitting import memory_table
from engine.measuring import Job, Processes
from engine.sources import SHAPES_COUNT, load_images
from engine.step import Step, amp_dtype
from engine.training import duration

RESULTS, README = Path("results"), Path("README.md")
IMAGES = {"cifar10": 50_000, "celeba": 202_599, "stl10": 105_000, "shapes": SHAPES_COUNT}
SAMPLERS = (("unipc", 10), ("ddim", 50), ("dpmpp_2m", 20), ("heun", 19), ("ddpm", 50))
DIFFUSERS = "diffusers' UNet2DModel"
LIMIT, CPU_LIMIT = 120.0, 900.0  # seconds that a variant may take on a GPU (compiled: twice that) and elsewhere
CAPS = (3.0, 6.0, 12.0, 24.0)  # GiB: a card of each tier
PRESET_OF = {32: "cifar10", 64: "celeba", 96: "stl10", 128: "folder"}  # data set whose preset is for this image size
SETTINGS: dict[str, tuple[type, Setting, Any]] = {
    "PRESET": (str, Setting("whose model to measure", choices=tuple(PRESETS)), "cifar10; without a GPU shapes"),
    "IMAGE_SIZE": (int, Setting("side of the square images, pixels", 4, 1024), "the preset's"),
    "DIM": (int, Setting("width of the Unet's first level, channels", 8, 1024), "the preset's"),
    "BATCH": (tuple, Setting("images in a training step", 1), ("128,512; above 32 px the preset's; fewer on a CPU",)),
    "THREADS": (int, Setting("CPU threads of what is not said to have 1", 1, 1024), "all cores"),
    "CURVE_STEPS": (
        int,
        Setting("steps of a learning curve", 1),
        "500; above 32 px 100; on a CPU 200; with --quick a fifth",
    ),
}


@dataclass(frozen=True)
class Subject:
    """The model that is measured: a preset's, perhaps of another size."""

    preset: str
    image_size: int
    dim: int

    def config(self, **flags: Any) -> Resolved:
        """Its configuration with the given attributes."""
        return resolve(self.preset, detect_tier(), flags={"IMAGE_SIZE": self.image_size, "DIM": self.dim, **flags})

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
        """diffusers' network, laid out as Ho et al.'s for CIFAR-10, of the width that gives it as many parameters."""
        from diffusers import UNet2DModel

        plain, attention = ("DownBlock2D", "UpBlock2D"), ("AttnDownBlock2D", "AttnUpBlock2D")
        down, up = zip(plain, attention, plain, plain, strict=True)
        return UNet2DModel(
            sample_size=self.image_size, block_out_channels=tuple(2 * self.dim * m for m in (1, 2, 2, 2)),
            down_block_types=down, up_block_types=up[::-1], layers_per_block=2, attention_head_dim=None,
        )  # fmt: skip


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
    """A model with new weights, on the device."""
    return DDPMModel.from_config(subject.config()).to(device).eval()


def our_sampling(
    subject: Subject, batch: int, sampler: str, steps: int, amp: bool, graph: bool, threads: int | None, rounds: int
) -> dict:
    """DDPMModel.sample as a user calls it."""
    device = measuring.prepare(threads)
    model = untrained(subject, device)
    model.cuda_graph = graph
    with torch.autocast(device.type, amp_dtype(device), enabled=amp):
        return measuring.draw_rates(lambda: model.sample(batch, sampler=sampler, steps=steps, seed=0), batch, rounds)


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
    return {"images_per_second": rate, "rounds": [rate]}


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
    subject = Subject(preset, config.IMAGE_SIZE, config.DIM)
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


def training_jobs(subject: Subject, sizes: Sequence[int], threads: int, quick: bool, gpu: bool) -> Iterator[Job]:
    """Peers and ours by precision, launching, threads and batch; the library comes first, since it is the measure."""
    low, amp, graph, compiled = low_precision(), {"USE_AMP": True}, {"CUDA_GRAPH": True}, {"COMPILE_MODEL": True}
    peers, own = ("peers", "ours") if gpu else ("eager", "eager")
    # name, process (None: one for each batch), function, options, in which runs: all, full, or once (full, first batch)
    variants: list[tuple[str, str | None, Callable[..., dict], dict, str]] = [
        ("library's Trainer, fp32", peers, library_training, {"amp": False}, "all"),
        (f"{DIFFUSERS}, fp32", peers, diffusers_training, {"amp": False}, "full"),
    ]
    if gpu:
        variants += [
            (f"{DIFFUSERS}, {low}", peers, diffusers_training, {"amp": True}, "all"),
            ("library's Trainer, fp16", None, library_training, {"amp": True}, "once"),
            ("ours, fp32", own, our_training, {"flags": {}}, "all"),
            (f"ours, {low}", own, our_training, {"flags": amp}, "all"),
            ("ours, fp32, CUDA graph", None, our_training, {"flags": graph}, "full"),
            (f"ours, {low}, CUDA graph", None, our_training, {"flags": amp | graph}, "all"),
            (f"ours, {low}, compiled", None, our_training, {"flags": amp | compiled}, "once"),
            (f"ours, {low}, compiled, CUDA graph", None, our_training, {"flags": amp | compiled | graph}, "once"),
        ]
    else:
        variants += [
            ("ours, fp32", own, our_training, {"flags": {}}, "all"),
            *[(f"ours, {low}", own, our_training, {"flags": amp}, "all")] * measuring.has_cpu_bf16(),
            ("ours, fp32, compiled", None, our_training, {"flags": compiled}, "full"),
        ]
        one = [(f"{n}, 1 thread", p, f, o | {"threads": 1}, "full") for n, p, f, o, _ in variants if n.endswith("fp32")]
        variants += one if threads > 1 else []
    # as large as ours with these levels only, and made of groups of 32 channels
    comparable = subject.config().DIM_MULTS == (1, 2, 4, 8) and subject.dim % 16 == 0
    comparable = comparable and importlib.util.find_spec("diffusers")
    for name, process, function, options, runs in variants:
        if (quick and runs != "all") or (name.startswith(DIFFUSERS) and not comparable):
            continue
        for batch in sizes[:1] if runs == "once" else sizes:
            common = {"subject": subject, "batch": batch, "threads": threads, "round_seconds": 0.5}
            limit = LIMIT * (2 if "compiled" in name else 1) if gpu else CPU_LIMIT
            yield Job({"what": name, "batch": batch}, process or f"{name} {batch}", function, common | options, limit)


def sampling_jobs(subject: Subject, threads: int, quick: bool, gpu: bool) -> Iterator[Job]:
    """The library's 1000 ancestral steps, then ours by precision, launching, batch, sampler and steps."""
    low, few = low_precision(), SAMPLERS[:2]
    small, large = (64, 256) if gpu else (4, 16)
    done = (50 if quick else 1000) if gpu else 5
    common = {"subject": subject, "threads": threads}
    limit = LIMIT if gpu else CPU_LIMIT
    row = {"what": "library, fp32", "sampler": "ddpm", "steps": 1000, "batch": small}
    row["what"] += f" ({done} of 1000 steps)" if done < 1000 else ""
    yield Job(row, "eager", library_sampling, common | {"batch": small, "done": done}, limit)
    # name, process, mixed precision, CUDA graph, batch, samplers
    variants: list[tuple[str, str, bool, bool, int, Sequence[tuple[str, int]]]] = [
        ("ours, fp32", "eager", False, False, small, few),
    ]
    if gpu:
        variants += [
            (f"ours, {low}", "eager", True, False, small, few),
            ("ours, fp32, CUDA graph", "fp32", False, True, small, few),
            (f"ours, {low}, CUDA graph", "small", True, True, small, SAMPLERS),
            (f"ours, {low}, CUDA graph", "large", True, True, large, SAMPLERS),
        ]
        variants = [variants[0], (*variants[-1][:5], few)] if quick else variants
    elif not quick:
        variants += [("ours, fp32", "eager", False, False, large, SAMPLERS)]
        variants += [(f"ours, {low}", "eager", True, False, large, few)] * measuring.has_cpu_bf16()
    for name, process, amp, graph, batch, samplers in variants:
        for sampler, steps in samplers:
            row = {"what": name, "sampler": sampler, "steps": steps, "batch": batch}
            options = {"batch": batch, "sampler": sampler, "steps": steps, "amp": amp, "graph": graph}
            yield Job(
                row, process, our_sampling, common | options | {"rounds": 1 if quick else measuring.ROUNDS}, limit
            )


def data_jobs(subject: Subject, batch: int) -> Iterator[Job]:
    """The two ways in which images reach a GPU."""
    for name, resident in (("on the GPU", True), ("from 8 workers", False)):
        options = {"subject": subject, "batch": batch, "resident": resident}
        yield Job({"what": name, "batch": batch}, name, data_path, options, LIMIT)


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
    size = "  ".join(f"{row[key]!s:>9}" for key in ("sampler", "steps", "batch") if key in row)
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
        jobs = list(training_jobs(subject, options.batch, options.threads, options.quick, gpu))
        flops = work_of(subject, diffusers=any(job.measure is diffusers_training for job in jobs))
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


def memory_cases(sizes: Sequence[int], gpu: bool) -> dict[str, Resolved]:
    """The presets for images of these sizes on cards of each tier; without a GPU toys of them, which need none."""
    toy = {"DIM": 8, "ATTENTION_HEADS": (1,), "BATCH_SIZE": 4, "NUM_SAMPLES": 2, "USE_AMP": False, "CUDA_GRAPH": False}
    return {
        f"{size} px, {cap:g} GiB": resolve(
            PRESET_OF[size], tier_of(cap), train_optimized.DEFAULTS,
            flags={"IMAGE_SIZE": size, "MEMORY_GIB": cap, **({} if gpu else toy)},
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
    config = resolve(arguments.preset, detect_tier())
    arguments.image_size = arguments.image_size or config.IMAGE_SIZE
    arguments.dim = arguments.dim or config.DIM
    resolve(arguments.preset, detect_tier(), flags={"IMAGE_SIZE": arguments.image_size, "DIM": arguments.dim})
    if arguments.dim % 2:
        raise UserError(f"--dim is {arguments.dim}, but must be even")
    if not arguments.batch:
        of_preset = (128, 512) if arguments.image_size <= 32 else (config.BATCH_SIZE * config.GRADIENT_ACCUMULATION,)
        arguments.batch = of_preset[: 1 if arguments.quick else None] if gpu else (cpu_batch(arguments.image_size),)
    arguments.threads = arguments.threads or measuring.cores()
    whole = (500 if arguments.image_size <= 32 else 100) if gpu else 200
    arguments.curve_steps = arguments.curve_steps or whole // (5 if arguments.quick else 1)
    return arguments


def main() -> None:
    """Measures, prints as it goes, and writes after each part."""
    parser = Parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer variants, fewer steps: two minutes at most")
    parser.add_argument("--only", choices=report.PARTS, help="measure one part and keep the others of the last report")
    parser.add_argument(
        "--estimate", action="store_true", help="how long each preset would train here; measures a minute"
    )
    parser.add_argument(
        "--readme", action="store_true", help="write the README's tables from results/, measuring nothing"
    )
    parser.add_argument(
        "--memory", nargs="?", const="all", choices=("all", *map(str, PRESET_OF)),
        help="what trains on cards of 3, 6, 12 and 24 GiB at this image size, pixels: half a minute a case",
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
        sizes = list(PRESET_OF) if options.memory == "all" else [int(options.memory)]
        path = RESULTS / f"memory-{file}.json"
        rows = memory_table(DDPMModel.from_config, memory_cases(sizes, gpu), path, steps=50 if gpu else 3)
        print(f"written: {path}")
        if any("failed" in row for row in rows):
            raise UserError("not all of them train: see above", exit_code=1)
        return
    if options.estimate:
        estimate(options.threads)
        return
    subject = Subject(options.preset, options.image_size, options.dim)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in subject.library_unet().parameters())
    sizes = f"{subject.image_size} px, dim {subject.dim}, {parameters / 1e6:.1f} M parameters"
    print(f"{subject.preset}: {sizes}", flush=True)
    preset = resolve(subject.preset, detect_tier())
    own = (subject.image_size, subject.dim) == (preset.IMAGE_SIZE, preset.DIM)
    key = subject.preset if own else f"{subject.preset}-{subject.image_size}px-dim{subject.dim}"
    path = RESULTS / f"benchmark-{file}.json"
    if options.only == "data" and not gpu:
        raise UserError("--only data compares images on the GPU with images from workers, and there is no GPU here")
    parts = [part for part in report.PARTS if part != "data" or (gpu and not options.quick)]
    with Processes() as processes:
        for part in [options.only] if options.only else parts:
            rows = measure(part, subject, options, gpu, processes)
            result = {"device": name, "torch": torch.__version__, "date": datetime.date.today().isoformat()}
            result |= {"quick": options.quick, "image_size": subject.image_size, "dim": subject.dim}
            whole = report.merge(path, key, part, result | {"parameters": parameters, "rows": rows})
            write_atomically(path.with_suffix(".png"), lambda file, whole=whole: file.write(report.picture(whole)))
            if part == "curves":
                print(report.verdict(rows))
    print(f"written: {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    run(main)
