"""Measures how training scales over the GPUs of this machine.

    python scaling.py                          on 1, 2, 4 and 8 GPUs, as far as there are
    python scaling.py --ranks 1,8 --steps 0    speed only, on 1 and on 8
    python scaling.py --dim 8 --image_size 16 --batches 8 --large_batch 4 --effective_batch 16 \\
        --steps 20 --seconds 0.2                   runs everything, also without a GPU

Weak scaling keeps the batch of each GPU, strong scaling the effective batch; efficiency is images/s
over N times those of one GPU. Last, the same training runs on each number of GPUs: validation
losses should differ by no more than those of three seeds. Writes results/scaling-<device>.json,
again after each row.
"""

from functools import partial

from engine.cli import Parser, run_script  # first: sets what torch reads

import torch

from benchmark import learning_curve, measure_training
from config import resolve, tier_for_memory
from engine.benchmarking import BenchmarkJob, run_section
from engine.errors import UserError
from engine.settings import Setting, Settings

SEEDS = (0, 1, 2)


class ScalingSettings(Settings):
    """What to measure."""

    RANKS = Setting((), "numbers of ranks, one a GPU", auto="1,2,4,8", old_name="PROCESSES")
    BATCHES = Setting((128, 512), "images a GPU in weak scaling of the cifar10 preset")
    LARGE_BATCH = Setting(64, "images a GPU at a time with the stl10 preset", min=1)
    EFFECTIVE_BATCH = Setting(512, "images a step in strong scaling and in training", min=1)
    STEPS = Setting(500, "steps before validation losses are compared; 0 skips this", min=0)
    SECONDS = Setting(1.5, "length of each of 3 rounds", min=0)
    TIME_LIMIT = Setting(300.0, "seconds for each row", min=1)
    DIM = Setting(128, "base channel width of both models", min=8, max=1024)
    IMAGE_SIZE = Setting(0, "image size of both; 0: the presets'", min=0, max=1024)


def jobs_on_ranks(settings: ScalingSettings, ranks: int) -> list[BenchmarkJob]:
    """Returns what is measured on a number of ranks."""
    # Speed, and validation losses of three seeds on one GPU: (kind, preset, local batch, seed).
    local_batch = settings.EFFECTIVE_BATCH // ranks
    plan = [("weak", "cifar10", batch, None) for batch in settings.BATCHES]
    plan += [("weak", "stl10", settings.LARGE_BATCH, None)]
    plan += [("strong", preset, local_batch, None) for preset in ("cifar10", "stl10")]
    seeds = SEEDS if ranks == 1 else SEEDS[:1]
    plan += [("loss", "cifar10", local_batch, seed) for seed in seeds if settings.STEPS]
    jobs = []
    for kind, preset, batch, seed in plan:
        fewest = -(-batch // settings.LARGE_BATCH) if preset == "stl10" else 1
        parts = next(n for n in range(fewest, batch + 1) if batch % n == 0)
        flags = {"BATCH_SIZE": batch // parts, "GRADIENT_ACCUMULATION": parts, "DIM": settings.DIM}
        flags |= dict.fromkeys(("USE_AMP", "CUDA_GRAPH"), torch.cuda.is_available())
        flags |= {"IMAGE_SIZE": settings.IMAGE_SIZE} if settings.IMAGE_SIZE else {}
        config = resolve(preset, tier_for_memory(1000.0), flags=flags)
        row = {"kind": kind, "preset": preset, "image_size": config.IMAGE_SIZE, "dim": config.DIM}
        row |= {"dim_mults": config.DIM_MULTS, "ranks": ranks, "batch": batch}
        measure = partial(measure_training, config, seconds=settings.SECONDS)
        if kind == "loss":
            row |= {"seed": seed, "steps": settings.STEPS}
            measure = partial(learning_curve, config, steps=settings.STEPS, seed=seed)
        work = (kind, preset, batch if kind == "weak" else 0)
        jobs.append(BenchmarkJob(row, measure, work, ranks == 1, ranks, settings.TIME_LIMIT))
    return jobs


def main() -> None:
    """Measures with each number of ranks."""
    parser = Parser(__doc__)
    ScalingSettings.add_flags(parser)
    settings = ScalingSettings(**ScalingSettings.given(parser.parse_args()))

    # Numbers of ranks.
    gpus = torch.cuda.device_count()
    counts = sorted(settings.RANKS or [n for n in (1, 2, 4, 8) if n <= (gpus or 2)])
    if 1 not in counts:
        print("note: without 1 in --ranks there is no efficiency, and no loss to compare with")
    for count in counts:
        if (batch := settings.EFFECTIVE_BATCH) % count:
            raise UserError(f"--effective_batch {batch} cannot be divided by {count} ranks")
        if gpus and count > gpus:
            raise UserError(f"--ranks asks for {count}, but there are {gpus} GPUs")

    jobs = [job for count in counts for job in jobs_on_ranks(settings, count)]
    rows = run_section("scaling", "", "scaling", {}, jobs, "efficiency")
    if failed := sum("failed" in row for row in rows):
        raise UserError(f"{failed} of {len(rows)} rows have no result", 1)


if __name__ == "__main__":
    run_script(main)
