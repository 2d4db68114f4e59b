"""Measures speed and memory, next to lucidrains' denoising-diffusion-pytorch.

    python benchmark.py                         everything; about ten minutes on a GPU
    python benchmark.py --quick --only training
    python benchmark.py --dim 64 --dim_mults 1,2,4,8 --full_attention_max_size 0
    python benchmark.py --memory                what fits on GPUs of 3, 6, 12 and 24 GiB
    python benchmark.py --docs                  writes docs/benchmarks.md from results/

The baselines are the step of its Trainer and its 1000 ancestral steps. A variant that fails, hangs
or dies costs its own row only. Writes results/benchmark-<device>.json, again after each row.
"""

import copy
import gc
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from engine.cli import Parser, run_script  # first: sets what torch reads

import numpy as np
import torch
from accelerate import Accelerator
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from ema_pytorch import EMA
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import train_optimized
from config import DATASET_PRESETS, Config, DDPMConfig, detect_tier, resolve, tier_for_memory
from ddpm_model import DDPMModel
from engine import benchmarking, dataloader, devices, distributed
from engine.benchmarking import BenchmarkJob, Row, run_section, time_steps
from engine.checkpoints import write_text
from engine.dataloader import BatchLoader, ImageDataset, as_batch, train_val_split
from engine.datasets import load_dataset
from engine.errors import FallbackWarning, UserError
from engine.gpu_memory import cap_memory
from engine.micro_batch import find_micro_batch
from engine.samplers import DEFAULT_SAMPLER
from engine.settings import Setting, Settings
from engine.train_step import TrainStep, learning_rate
from engine.unet import full_attention_levels, per_level

SAMPLERS = (("ddim", 50), ("dpmpp_2m", 20), ("heun", 19), ("ddpm", 50))  # next to the default
EPOCH_STEPS = 40  # steps in an epoch of random images
CAPS = (3.0, 6.0, 12.0, 24.0)  # GiB: a GPU of each tier
SECTIONS = ("training", "sampling", "curves", "data")
NETWORK = ("IMAGE_SIZE", "DIM", "DIM_MULTS", "FULL_ATTENTION_MAX_SIZE")
# Parts of a mode, and what they switch on.
SWITCHES = {"bf16": "USE_AMP", "compiled": "COMPILE_MODEL", "CUDA graph": "CUDA_GRAPH"}


class BenchmarkSettings(Settings):
    """What to measure."""

    PRESET = Setting("", "preset", choices=tuple(DATASET_PRESETS), auto="cifar10; shapes on a CPU")
    IMAGE_SIZE, DIM, DIM_MULTS, FULL_ATTENTION_MAX_SIZE = map(DDPMConfig.settings().get, NETWORK)
    BATCH = Setting((), "batches of a training step; upstream has the first and the last", min=1,
        auto="128,256,512; at 64 px and above, or on a CPU, the preset's")  # fmt: skip
    THREADS = Setting(0, "CPU threads; 0 leaves the choice to PyTorch", min=0, max=1024)
    QUICK = Setting(False, "fewer variants and steps")
    ONLY = Setting("", "section to measure", choices=SECTIONS, auto="all")
    MEMORY = Setting(False, "measure what fits on GPUs of 3, 6, 12 and 24 GiB")
    DOCS = Setting(False, "write docs/benchmarks.md, measuring nothing", old_name="README")


def upstream_diffusion(config: Config) -> GaussianDiffusion:
    """Returns upstream's diffusion process, with a network as large as ours."""
    full_attn = full_attention_levels(
        config.IMAGE_SIZE, config.DIM_MULTS, config.FULL_ATTENTION_MAX_SIZE
    )
    network = Unet(
        config.DIM, dim_mults=config.DIM_MULTS, dropout=config.DROPOUT, full_attn=tuple(full_attn),
        attn_heads=tuple(per_level(config.ATTENTION_HEADS, config.DIM_MULTS)),
        attn_dim_head=tuple(per_level(config.ATTENTION_DIM, config.DIM_MULTS)),
    )  # fmt: skip
    return GaussianDiffusion(network, image_size=config.IMAGE_SIZE, objective=config.OBJECTIVE)


def compute_mfu(config: Config, images_per_second: float, device: torch.device) -> float:
    """Returns the MFU (arXiv:2204.02311) of training: its FLOP/s over those of a large matmul.

    The backward pass does each product of the forward pass twice: for inputs and for weights. The
    matmul is 16-bit on a GPU.
    """
    inputs = (1, 3, config.IMAGE_SIZE, config.IMAGE_SIZE), (1,)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        upstream_diffusion(config).model(*map(torch.zeros, inputs))
    gc.collect()  # what was timed may hold the memory
    size = 8192 if device.type == "cuda" else 2048
    dtype = devices.amp_dtype(device) if device.type == "cuda" else torch.float32
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    matmuls_per_second = time_steps(lambda: a @ b, 1, device)["images_per_second"]
    return 3 * counter.get_total_flops() * images_per_second / (2 * size**3 * matmuls_per_second)


def measure_upstream_training(config: Config, device: torch.device) -> Row:
    """Times the step of upstream's Trainer, on images already on the device."""
    model = upstream_diffusion(config).to(device)
    accelerator = Accelerator(mixed_precision="no")
    ema = EMA(model, beta=0.995, update_every=10).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.99))
    model, optimizer = accelerator.prepare(model, optimizer)
    images = torch.rand(config.BATCH_SIZE, 3, config.IMAGE_SIZE, config.IMAGE_SIZE, device=device)

    def step() -> None:
        with accelerator.autocast():
            loss = model(images)
        loss.item()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    row = time_steps(step, len(images), device)
    return row | {"mfu": compute_mfu(config, row["images_per_second"], device)}


def train_loop(
    config: Config, device: torch.device, data: ImageDataset, steps: int
) -> Iterator[tuple[TrainStep, Tensor]]:
    """Trains on this rank's part of each batch; yields the TrainStep and the loss, each step."""
    ranks = (distributed.launched_rank(), distributed.launched_world_size())
    effective_batch = config.BATCH_SIZE * config.GRADIENT_ACCUMULATION * ranks[1]
    loader = BatchLoader(data, effective_batch, config.SEED, device, 8, *ranks)
    train_step = TrainStep(DDPMModel.from_config(config).to(device).train(), config, *ranks)
    batches = itertools.chain.from_iterable(map(loader.epoch, itertools.count()))
    for number, batch in enumerate(itertools.islice(batches, steps)):
        lr = learning_rate(config.LEARNING_RATE, "cosine", number, steps // 5, number / steps)
        yield train_step, train_step(batch, number, lr)[0]


def measure_training(
    config: Config, device: torch.device, on_gpu: bool = True, seconds: float = 0.5
) -> Row:
    """Times our step on all ranks, and computes its MFU.

    on_gpu: whether the images, random ones, are held on the GPU, or else read by threads.
    """
    dataloader.MAX_GPU_FRACTION = 1.0 if on_gpu else 0.0
    ranks = distributed.launched_world_size()
    batch = config.BATCH_SIZE * config.GRADIENT_ACCUMULATION * ranks
    shape = (EPOCH_STEPS * batch, 3, config.IMAGE_SIZE, config.IMAGE_SIZE)
    data = ImageDataset(np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8))
    row = time_steps(partial(next, train_loop(config, device, data, 10**6)), batch, device, seconds)
    return row | {"mfu": compute_mfu(config, row["images_per_second"] / ranks, device)}


def measure_sampling(config: Config, device: torch.device, sampler: str, steps: int) -> Row:
    """Times DDPMModel.sample, with a guide if training would make one."""
    model = DDPMModel.from_config(config)
    if config.GUIDE_FRACTION:
        model.snapshot_guide()  # untrained, it costs the same
    model.to(device).eval().cuda_graph = config.CUDA_GRAPH

    def sample() -> None:
        with torch.autocast(device.type, devices.amp_dtype(device), enabled=config.USE_AMP):
            model.sample(config.BATCH_SIZE, sampler=sampler, steps=steps, seed=0)

    nfe = model.count_nfe(*model.sampling_plan(sampler, steps))
    return time_steps(sample, config.BATCH_SIZE, device) | {"nfe": nfe}


def measure_upstream_sampling(config: Config, device: torch.device) -> Row:
    """Times 25 of upstream's 1000 ancestral steps, which all take the same time."""
    process = upstream_diffusion(config).to(device).eval()
    x = torch.randn(config.BATCH_SIZE, 3, config.IMAGE_SIZE, config.IMAGE_SIZE, device=device)
    sample = lambda: [process.p_sample(x, t) for t in range(0, 1000, 40)]  # noqa: E731
    row = time_steps(sample, config.BATCH_SIZE * 25 / 1000, device)
    return row | {"ms": 40 * row["ms"], "sampler": "ddpm", "steps": 1000, "nfe": 1000}


def measure_memory(config: Config, device: torch.device, cap: float) -> Row:
    """Times a preset's step with what training takes under a memory cap."""
    flags = {name: getattr(config, name) for name in NETWORK if config.set_by[name] == "flag"}
    tier = tier_for_memory(cap)
    cap_memory(cap)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)  # at each halving of the micro-batch
        config = resolve(config.DATASET, tier, train_optimized.DEFAULTS, flags=flags)
        batch = config.BATCH_SIZE * config.GRADIENT_ACCUMULATION
        micro = find_micro_batch(DDPMModel.from_config(config), config, np.empty(0, np.uint8))
    config.split_batch(micro)
    row = {"image_size": config.IMAGE_SIZE, "dim": config.DIM, "batch": batch, "micro_batch": micro}
    return row | measure_training(config, device, on_gpu=False)


def learning_curve(config: Config, device: torch.device, steps: int, seed: int) -> Row:
    """Trains on the built-in shapes; returns the losses and the final validation loss."""
    config.override({"SEED": seed, "HORIZONTAL_FLIP": False}, "benchmark")
    data = load_dataset("shapes", config.IMAGE_SIZE, Path("data"), progress=False)
    results = [(step, loss.clone()) for step, loss in train_loop(config, device, data, steps)]
    losses = [round(loss.item(), 6) for _, loss in results]
    validation = as_batch(data[train_val_split(len(data))[1]])
    return {"losses": losses, "validation_loss": results[-1][0].validate(validation)}


def jobs_of_section(
    section: str, config: Config, batches: Sequence[int], quick: bool, is_gpu: bool
) -> list[BenchmarkJob]:
    """Returns the jobs of a section, the most important first."""

    def job(what: str, mode: tuple, batch: int, measure: Callable, **options: Any) -> BenchmarkJob:
        variant = copy.deepcopy(config)
        switches = {name: part in mode for part, name in SWITCHES.items()}
        variant.override({"BATCH_SIZE": batch, "GRADIENT_ACCUMULATION": 1} | switches, "benchmark")
        shown = {key: options[key] for key in ("sampler", "steps", "seed") if key in options}
        row = {"what": ", ".join((what, *mode))} | shown | {"batch": batch}
        work = (batch,) if section == "training" else ()
        is_baseline = measure in (measure_upstream_training, measure_upstream_sampling)
        return BenchmarkJob(row, partial(measure, variant, **options), work, is_baseline)

    # Each section plans what to measure, in which mode and batch.
    fp32 = ("fp32",)
    bf16 = ("bf16",)
    fast = (*bf16, "CUDA graph") if is_gpu else bf16
    first = batches[0]
    if section == "training":
        ends = dict.fromkeys((first, batches[-1]))
        jobs = [job("lucidrains' Trainer", fp32, n, measure_upstream_training) for n in ends]
        plan = [(fast, n) for n in batches] + [(bf16 if is_gpu else fp32, first)]
        if is_gpu and not quick:
            plan += [(fp32, first), (("bf16", "compiled", "CUDA graph"), first)]
        return jobs + [job("ours", mode, n, measure_training) for mode, n in plan]
    if section == "sampling":
        small = 64 if is_gpu else 4
        default = (DEFAULT_SAMPLER, config.SAMPLING_TIMESTEPS)
        plan = [(fast, 4 * small, *each) for each in ([default] if quick else [default, *SAMPLERS])]
        if is_gpu and not quick:
            plan += [(m, small, *default) for m in (fast, (*fp32, "CUDA graph"), bf16, fp32)]
        jobs = [job("lucidrains' sampler", fp32, small, measure_upstream_sampling)]
        return jobs + [
            job("ours", mode, batch, measure_sampling, sampler=sampler, steps=steps)
            for mode, batch, sampler, steps in plan
        ]
    if section == "curves":
        steps = (500 if is_gpu else 100) // (5 if quick else 1)
        plan = ((fp32, 0), (fast, 0), (fp32, 1), (fp32, 2))
        return [job("ours", m, first, learning_curve, steps=steps, seed=seed) for m, seed in plan]
    if section == "memory":
        return [BenchmarkJob({"cap_gib": n}, partial(measure_memory, config, cap=n)) for n in CAPS]
    # A round is much longer than what the threads read ahead.
    measure = partial(job, mode=fast, batch=batches[-1], measure=measure_training, seconds=2.0)
    return [measure("images on the GPU"), measure("images from 8 workers", on_gpu=False)]


def main() -> None:
    """Measures section by section."""
    parser = Parser(__doc__)
    BenchmarkSettings.add_flags(parser, dict.fromkeys(NETWORK, "the preset's"))
    given = BenchmarkSettings.given(parser.parse_args())
    settings = BenchmarkSettings(**given)
    if settings.DOCS:
        write_text(benchmarking.DOCS, benchmarking.docs_page())
        return print(f"written: {benchmarking.DOCS}")

    # What to measure.
    is_gpu = torch.cuda.is_available()
    preset = settings.PRESET or ("cifar10" if is_gpu else "shapes")
    flags = {name: given[name] for name in NETWORK if name in given}
    config = resolve(preset, detect_tier(), flags=flags)
    batches = settings.BATCH or (config.BATCH_SIZE * config.GRADIENT_ACCUMULATION,)
    if is_gpu and config.IMAGE_SIZE <= 32 and not settings.BATCH:
        batches = (128,) if settings.QUICK else (128, 256, 512)
    sections = [settings.ONLY] * bool(settings.ONLY) + ["memory"] * settings.MEMORY
    sections = sections or (SECTIONS if is_gpu and not settings.QUICK else SECTIONS[:-1])
    if not is_gpu and {"data", "memory"} & {*sections}:
        raise UserError("the sections data and memory need a GPU (there is none)")
    if settings.THREADS:
        os.environ["OMP_NUM_THREADS"] = str(settings.THREADS)  # of the worker processes

    about = {name.lower(): getattr(config, name) for name in NETWORK}
    size, dim, mults, full = map(partial(benchmarking.format_value, ""), about.values())
    network = f"{preset}-{size}px-dim{dim}-{mults}-full{full}"
    about["parameters"] = sum(p.numel() for p in upstream_diffusion(config).parameters())

    for section in sections:
        jobs = jobs_of_section(section, config, batches, settings.QUICK, is_gpu)
        run_section("benchmark", network, section, about, jobs, "speedup")


if __name__ == "__main__":
    run_script(main)
