"""Measures training and sampling on this machine, next to other implementations.

    python benchmark.py                         everything; about ten minutes on a GPU
    python benchmark.py --quick --only training
    python benchmark.py --dim 64 --dim_mults 1,2,4,8 --full_attention_max_size 0
    python benchmark.py --memory                what fits on cards of 3, 6, 12 and 24 GiB
    python benchmark.py --docs                  writes docs/benchmarks.md from results/

Compared are the step of denoising-diffusion-pytorch's Trainer, its 1000 ancestral steps, and
diffusers' UNet2DModel with the same number of parameters, within 10 %. A variant that fails, hangs
or dies costs its own row only. Writes results/benchmark-<device>.json and .png.
"""

import copy
import itertools
import math
import os
import tempfile
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
from torch import Tensor, nn

import train_optimized
from config import DATASET_PRESETS, Config, DDPMConfig, detect_tier, resolve, tier_for_memory
from ddpm_model import DDPMModel, full_attention_levels, per_level
from engine import benchmarking, dataloader
from engine.benchmarking import BenchmarkJob, time_steps
from engine.checkpoints import write_text
from engine.dataloader import Batch, BatchLoader, ImageDataset
from engine.datasets import load_dataset
from engine.errors import FallbackWarning, UserError
from engine.gpu_memory import cap_memory
from engine.micro_batch import HEADROOM, probe_micro_batch
from engine.samplers import DEFAULT_SAMPLER
from engine.settings import Setting, Settings
from engine.train_step import TrainStep, amp_dtype, learning_rate

DOCS = Path("docs/benchmarks.md")
MAX_PARAM_DIFFERENCE = 0.1  # of diffusers' network to ours
SAMPLERS = (("ddim", 50), ("dpmpp_2m", 20), ("heun", 19), ("ddpm", 50))  # next to the default
CAPS = (3.0, 6.0, 12.0, 24.0)  # GiB: a card of each tier
SECTIONS = ("training", "sampling", "curves", "data")
NETWORK = ("IMAGE_SIZE", "DIM", "DIM_MULTS", "FULL_ATTENTION_MAX_SIZE")
FAST = "bf16, CUDA graph"
Row = dict[str, Any]  # of a table of results
MODES = {
    "fp32": {}, "bf16": {"USE_AMP": True}, "fp32, CUDA graph": {"CUDA_GRAPH": True},
    FAST: {"USE_AMP": True, "CUDA_GRAPH": True},
    "bf16, compiled, CUDA graph": {"USE_AMP": True, "COMPILE_MODEL": True, "CUDA_GRAPH": True},
}  # fmt: skip


class BenchmarkSettings(Settings):
    """What to measure."""

    PRESET = Setting(
        "", "preset to benchmark", choices=tuple(DATASET_PRESETS), auto="cifar10; shapes on a CPU"
    )
    IMAGE_SIZE, DIM, DIM_MULTS, FULL_ATTENTION_MAX_SIZE = map(DDPMConfig.settings().get, NETWORK)
    BATCH = Setting(
        (), "batches of a training step; those between the first and the last with our fast path "
        "only", min=1, auto="128,256,512; at 64 px and above, or on a CPU, the preset's",
    )  # fmt: skip
    THREADS = Setting(0, "CPU threads; 0 leaves the choice to PyTorch", min=0, max=1024)
    QUICK = Setting(False, "fewer variants and steps")
    ONLY = Setting("", "section to measure", choices=SECTIONS, auto="all")
    MEMORY = Setting(False, "measure what fits on cards of 3, 6, 12 and 24 GiB")
    DOCS = Setting(False, f"write {DOCS}, measuring nothing", old_name="README")


class UpstreamDiffusion(GaussianDiffusion):
    """Upstream's diffusion process around its network."""

    def __init__(self, config: Config):
        levels = config.DIM_MULTS
        network = Unet(
            config.DIM, dim_mults=levels, dropout=config.DROPOUT,
            full_attn=tuple(full_attention_levels(config)),
            attn_heads=tuple(per_level(config.ATTENTION_HEADS, levels)),
            attn_dim_head=tuple(per_level(config.ATTENTION_DIM, levels)),
        )  # fmt: skip
        super().__init__(network, image_size=config.IMAGE_SIZE, objective=config.OBJECTIVE)


class DiffusersDiffusion(nn.Module):
    """diffusers' schedule and network (Ho et al., arXiv:2006.11239), about as large as ours.

    Raises UserError if the number of parameters differs by more than MAX_PARAM_DIFFERENCE.
    """

    def __init__(self, config: Config):
        from diffusers import DDPMScheduler, UNet2DModel

        super().__init__()
        # The network has 545 width^2 parameters and normalizes groups of 32 channels.
        ours = count_parameters(config)
        width = 32 * max(2, round(math.sqrt(ours / 545) / 32))
        self.schedule = DDPMScheduler()
        self.model = UNet2DModel(
            config.IMAGE_SIZE, block_out_channels=(32 * round(width / 64), width, width, width),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None,
        )  # fmt: skip
        theirs = sum(p.numel() for p in self.model.parameters())
        if abs(theirs / ours - 1) > MAX_PARAM_DIFFERENCE:
            raise UserError(f"the closest width has {theirs:,} parameters, our network {ours:,}")

    def forward(self, images: Tensor) -> Tensor:
        """Returns the loss of images (B, 3, H, W) in [-1, 1]."""
        noise = torch.randn_like(images)
        t = torch.randint(1000, (len(images),), device=images.device)
        predicted = self.model(self.schedule.add_noise(images, noise, t), t).sample
        return nn.functional.mse_loss(predicted.float(), noise)


def count_parameters(config: Config) -> int:
    """Counts the parameters of our (and upstream's) network, allocating nothing."""
    with torch.device("meta"):
        return sum(p.numel() for p in UpstreamDiffusion(config).model.parameters())


def upstream_step(config: Config, device: torch.device) -> Callable[[], None]:
    """Returns the step of upstream's Trainer, on images already on the device."""
    model = UpstreamDiffusion(config).to(device)
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

    return step


def diffusers_step(config: Config, device: torch.device) -> Callable[[], None]:
    """Returns diffusers' step: fused Adam, no loss.item(), the EMA updated every time."""
    model = DiffusersDiffusion(config).to(device)
    parameters = list(model.parameters())
    ema_parameters = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=1e-4, betas=(0.9, 0.99), fused=True)
    shape = (config.BATCH_SIZE, 3, config.IMAGE_SIZE, config.IMAGE_SIZE)
    images = 2 * torch.rand(shape, device=device) - 1

    def step() -> None:
        with torch.autocast(device.type, amp_dtype(device), enabled=config.USE_AMP):
            loss = model(images)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(ema_parameters, parameters, 1e-3)

    return step


def our_step(
    config: Config, device: torch.device, rank: int = 0, world_size: int = 1,
    batches: Iterator[Batch] | None = None,
) -> Callable[[], Any]:  # fmt: skip
    """Returns our step on batches, by default the same random one on each rank."""
    step = TrainStep(DDPMModel.from_config(config).to(device).train(), config, rank, world_size)
    count = config.BATCH_SIZE * config.GRADIENT_ACCUMULATION
    shape = (count, 3, config.IMAGE_SIZE, config.IMAGE_SIZE)
    images = torch.randint(256, shape, dtype=torch.uint8, device=device)
    batches = batches or itertools.repeat(Batch(images))
    numbers = itertools.count()
    return lambda: step(next(batches), next(numbers), 1e-4)


def measure_training(
    config: Config, device: torch.device, peer: type[nn.Module] | None = None
) -> Row:
    """Times a training step, ours or a peer's, and computes its MFU."""
    steps = {None: our_step, UpstreamDiffusion: upstream_step, DiffusersDiffusion: diffusers_step}
    row = time_steps(partial(steps[peer], config, device), config.BATCH_SIZE, device)
    with torch.device("meta"):
        network = (peer or UpstreamDiffusion)(config).model
    flops = benchmarking.training_flops(network, config.IMAGE_SIZE)
    return row | {"mfu": row["images_per_second"] * flops / benchmarking.matmul_flops(device)}


def measure_sampling(config: Config, device: torch.device, sampler: str, steps: int) -> Row:
    """Times DDPMModel.sample, with a guide if training would make one."""
    model = DDPMModel.from_config(config)
    if config.GUIDE_FRACTION:
        model.snapshot_guide()  # untrained, it costs the same
    model.to(device).eval().cuda_graph = config.CUDA_GRAPH

    def sample() -> None:
        with torch.autocast(device.type, amp_dtype(device), enabled=config.USE_AMP):
            model.sample(config.BATCH_SIZE, sampler=sampler, steps=steps, seed=0)

    nfe = model.count_nfe(*model.sampling_plan(sampler, steps))
    return time_steps(lambda: sample, config.BATCH_SIZE, device) | {"nfe": nfe}


def measure_upstream_sampling(config: Config, device: torch.device) -> Row:
    """Times 25 of upstream's 1000 ancestral steps, which all take the same time."""
    process = UpstreamDiffusion(config).to(device).eval()
    x = torch.randn(config.BATCH_SIZE, 3, config.IMAGE_SIZE, config.IMAGE_SIZE, device=device)
    sample = lambda: [process.p_sample(x, t) for t in range(0, 1000, 40)]  # noqa: E731
    row = time_steps(lambda: sample, config.BATCH_SIZE * 25 / 1000, device)
    return row | {"ms": 40 * row["ms"], "sampler": "ddpm", "steps": 1000, "nfe": 1000}


def measure_data_path(config: Config, device: torch.device, on_gpu: bool) -> Row:
    """Times our step on images on the GPU, or read by threads from a memory map."""
    dataloader.MAX_GPU_FRACTION = 1.0 if on_gpu else 0.0
    shape = (300 * config.BATCH_SIZE, 3, config.IMAGE_SIZE, config.IMAGE_SIZE)
    with tempfile.NamedTemporaryFile() as file:
        images = np.memmap(file.name, np.uint8, "w+", shape=shape)
        loader = BatchLoader(ImageDataset(images), config.BATCH_SIZE, 0, device, workers=8)
        batches = itertools.chain.from_iterable(map(loader.epoch, itertools.count()))
        make_step = partial(our_step, config, device, batches=batches)
        # A round is much longer than what the threads read ahead.
        return time_steps(make_step, config.BATCH_SIZE, device, round_seconds=2.0)


def measure_memory(config: Config, device: torch.device) -> Row:
    """Finds the micro-batch that fits a preset under its cap, and times that step."""
    cap_memory(config.MAX_MEMORY_GIB)
    limit = (1 - HEADROOM) * config.MAX_MEMORY_GIB
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)  # at each halving of the micro-batch
        micro, _ = probe_micro_batch(DDPMModel.from_config(config), config, limit)
    config.split_batch(micro)
    make_step = partial(our_step, config, device)
    row = time_steps(make_step, micro * config.GRADIENT_ACCUMULATION, device)
    return row | {"micro_batch": micro, "peak_gib": torch.cuda.max_memory_reserved() / 2**30}


def learning_curve(
    config: Config, device: torch.device, steps: int, seed: int, rank: int = 0, world_size: int = 1
) -> Row:
    """Trains on the built-in shapes; returns the losses and the final validation loss."""
    config.override({"SEED": seed, "HORIZONTAL_FLIP": False}, "benchmark")
    data = load_dataset("shapes", config.IMAGE_SIZE, Path("data"), progress=False)
    batch_size = config.BATCH_SIZE * config.GRADIENT_ACCUMULATION * world_size
    loader = BatchLoader(data, batch_size, seed, device, 1, rank, world_size)
    batches = itertools.chain.from_iterable(map(loader.epoch, itertools.count()))
    step = TrainStep(DDPMModel.from_config(config).to(device).train(), config, rank, world_size)
    losses = []
    for number, batch in enumerate(itertools.islice(batches, steps)):
        lr = learning_rate(config.LEARNING_RATE, "cosine", number, steps // 5, number / steps)
        losses.append(step(batch, number, lr)[0].clone())
    losses = [round(loss, 6) for loss in torch.stack(losses).tolist()]
    return {"losses": losses, "validation_loss": step.validate(loader.validation())}


def make_jobs(
    section: str, config: Config, batches: Sequence[int], quick: bool, is_gpu: bool
) -> list[BenchmarkJob]:
    """Returns the jobs of a section, the most important first."""

    def job(what: str, mode: str, batch: int, measure: Callable, **options: Any) -> BenchmarkJob:
        variant = copy.deepcopy(config)
        values = {"BATCH_SIZE": batch, "GRADIENT_ACCUMULATION": 1} | MODES[mode]
        variant.override(values, "benchmark")
        shown = {key: options[key] for key in ("sampler", "steps", "seed") if key in options}
        row = {"what": f"{what}, {mode}"} | shown | {"batch": batch}
        return BenchmarkJob(row, partial(measure, variant, **options))

    fast = FAST if is_gpu else "bf16"
    first = batches[0]
    # Each section plans what to measure, in which mode and batch.
    if section == "training":
        ends = dict.fromkeys((first, batches[-1]))
        plan = [("library's Trainer", "fp32", n, UpstreamDiffusion) for n in ends]
        plan += [("ours", fast, n, None) for n in batches]
        plan += [("ours", "bf16" if is_gpu else "fp32", first, None)]
        if not quick:
            plan += [("diffusers' UNet2DModel", "bf16", n, DiffusersDiffusion) for n in ends]
            others = ("fp32", "bf16, compiled, CUDA graph") if is_gpu else ()
            plan += [("ours", mode, first, None) for mode in others]
        return [job(what, mode, n, measure_training, peer=peer) for what, mode, n, peer in plan]
    if section == "sampling":
        small = 64 if is_gpu else 4
        large = 256 if is_gpu else 16
        default = (DEFAULT_SAMPLER, config.SAMPLING_TIMESTEPS)
        plan = [(fast, large, each) for each in ([default] if quick else [default, *SAMPLERS])]
        if is_gpu and not quick:
            plan += [(mode, small, default) for mode in (FAST, "fp32, CUDA graph", "bf16", "fp32")]
        ours = [
            job("ours", mode, batch, measure_sampling, sampler=sampler, steps=steps)
            for mode, batch, (sampler, steps) in plan
        ]
        return [job("library", "fp32", small, measure_upstream_sampling), *ours]
    if section == "curves":
        steps = (500 if is_gpu else 100) // (5 if quick else 1)
        plan = (("fp32", 0), (fast, 0), ("fp32", 1), ("fp32", 2))
        return [job("ours", m, first, learning_curve, steps=steps, seed=seed) for m, seed in plan]
    plan = (("images on the GPU", True), ("images from 8 workers", False))
    return [job(what, fast, batches[-1], measure_data_path, on_gpu=gpu) for what, gpu in plan]


def memory_jobs(preset: str, flags: dict[str, Any]) -> list[BenchmarkJob]:
    """Returns a preset's step on a card of each tier."""
    jobs = []
    for cap in CAPS:
        cap_flags = flags | {"MAX_MEMORY_GIB": cap}
        config = resolve(preset, tier_for_memory(cap), train_optimized.DEFAULTS, flags=cap_flags)
        batch = config.BATCH_SIZE * config.GRADIENT_ACCUMULATION
        row = {"image_size": config.IMAGE_SIZE, "cap_gib": cap, "dim": config.DIM, "batch": batch}
        jobs.append(BenchmarkJob(row, partial(measure_memory, config)))
    return jobs


def add_speedup(row: Row, rows: list[Row]) -> None:
    """Adds a row's speed over upstream's: in training that of the same batch."""
    for peer in rows if "images_per_second" in row else ():
        is_upstream = "images_per_second" in peer and peer.get("what", "").startswith("library")
        if is_upstream and ("sampler" in row or peer["batch"] == row["batch"]):
            row["over_library"] = row["images_per_second"] / peer["images_per_second"]


def result_key(config: Config) -> str:
    """Returns the key of results: the preset, and the network if it is another."""
    preset = resolve(config.DATASET, detect_tier())
    if all(getattr(config, name) == getattr(preset, name) for name in NETWORK):
        return config.DATASET
    mults = ",".join(map(str, config.DIM_MULTS))
    full = config.FULL_ATTENTION_MAX_SIZE
    return f"{config.DATASET}-{config.IMAGE_SIZE}px-dim{config.DIM}-{mults}-full{full}"


def main() -> None:
    """Measures section by section; prints each row and writes each section."""
    parser = Parser(__doc__)
    BenchmarkSettings.add_flags(parser, dict.fromkeys(NETWORK, "the preset's"))
    given = BenchmarkSettings.given(parser.parse_args())
    settings = BenchmarkSettings(**given)
    if settings.DOCS:
        write_text(DOCS, benchmarking.docs_page())
        print(f"written: {DOCS}")
        return

    # What to measure.
    is_gpu = torch.cuda.is_available()
    preset = settings.PRESET or ("cifar10" if is_gpu else "shapes")
    flags = {name: given[name] for name in NETWORK if name in given}
    config = resolve(preset, detect_tier(), flags=flags)
    batches = settings.BATCH or (config.BATCH_SIZE * config.GRADIENT_ACCUMULATION,)
    if is_gpu and config.IMAGE_SIZE <= 32 and not settings.BATCH:
        batches = (128,) if settings.QUICK else (128, 256, 512)
    sections = SECTIONS if is_gpu and not settings.QUICK else SECTIONS[:-1]
    if settings.ONLY or settings.MEMORY:
        sections = (settings.ONLY or "memory",)
    if not is_gpu and sections[0] in ("data", "memory"):
        raise UserError(f"the section {sections[0]} needs a GPU (there is none)")
    if settings.THREADS:
        os.environ["OMP_NUM_THREADS"] = str(settings.THREADS)  # of the worker processes

    # Measure; a section replaces the earlier one of the same network.
    about = benchmarking.describe_origin() | {"parameters": count_parameters(config)}
    about |= {name.lower(): getattr(config, name) for name in NETWORK}
    path = benchmarking.results_path("benchmark", about["device"])
    for section in sections:
        jobs = make_jobs(section, config, batches, settings.QUICK, is_gpu)
        rows: list[Row] = []
        for job in memory_jobs(preset, flags) if section == "memory" else jobs:
            rows.append(benchmarking.run_job(job))
            add_speedup(rows[-1], rows)
            print(f"{section}: {benchmarking.format_row(rows[-1])}", flush=True)
        if section == "training":
            rows.sort(key=lambda row: row["batch"])
        result = about | {"rows": rows}
        if section == "curves":
            losses = [(row["what"], row["validation_loss"]) for row in rows if "losses" in row]
            result["agreement"] = benchmarking.compare_losses(losses, "ours, fp32")
            print(result["agreement"])
        report = benchmarking.read_report(path)
        report.setdefault(result_key(config), {})[section] = result
        benchmarking.write_report(path, report)
    print(f"written: {path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    run_script(main)
