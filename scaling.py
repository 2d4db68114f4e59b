"""Measures how training scales over the GPUs of this machine.

    python scaling.py                              on 1, 2, 4 and 8 GPUs, as far as there are
    python scaling.py --processes 1,8 --steps 0    speed only, on 1 and on 8
    python scaling.py --dim 8 --image_size 16 --batches 8 --large_batch 4 --effective_batch 16 \\
        --steps 20 --seconds 0.2                   runs everything, also without a GPU

Weak scaling keeps the batch of each GPU, strong scaling the effective batch; efficiency is images/s
over N times those of one GPU. Last, the same training runs on each number of GPUs: validation
losses should differ by no more than those of three seeds. Writes results/scaling-<device>.json and
.png, from which `python benchmark.py --docs` makes the table in docs/benchmarks.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from engine.cli import Parser, run_script  # first: sets what torch reads

import torch
from accelerate import PartialState

from benchmark import learning_curve, our_step
from config import Config, resolve, tier_for_memory
from engine import benchmarking
from engine.distributed import session
from engine.errors import UserError
from engine.settings import Setting, Settings

SEEDS = (0, 1, 2)


class ScalingSettings(Settings):
    """What to measure."""

    PROCESSES = Setting((), "numbers of processes, one a GPU", auto="1,2,4,8 up to the GPUs")
    BATCHES = Setting((128, 512), "images a GPU in weak scaling of the cifar10 preset")
    LARGE_BATCH = Setting(64, "images a GPU at a time with the stl10 preset", min=1)
    EFFECTIVE_BATCH = Setting(512, "images a step in strong scaling and in training", min=1)
    STEPS = Setting(500, "steps before validation losses are compared; 0 skips this", min=0)
    SECONDS = Setting(1.5, "length of each of 3 rounds", min=0)
    TIME_LIMIT = Setting(300.0, "seconds for each number of processes", min=1)
    DIM = Setting(128, "base channel width of both models", min=8, max=1024)
    IMAGE_SIZE = Setting(0, "image size of both; 0: the presets'", min=0, max=1024)


def preset_config(settings: ScalingSettings, preset: str, local_batch: int) -> Config:
    """Returns a preset of train_optimized.py with `local_batch` images on each rank."""
    is_gpu = torch.cuda.is_available()
    parts = -(-local_batch // settings.LARGE_BATCH) if preset == "stl10" else 1
    flags = {"BATCH_SIZE": local_batch // parts, "GRADIENT_ACCUMULATION": parts}
    flags |= {"USE_AMP": is_gpu, "CUDA_GRAPH": is_gpu, "DIM": settings.DIM}
    flags |= {"IMAGE_SIZE": settings.IMAGE_SIZE} if settings.IMAGE_SIZE else {}
    return resolve(preset, tier_for_memory(1000.0), flags=flags)


def run_measurements(settings: ScalingSettings, dist: PartialState) -> Iterator[dict[str, Any]]:
    """Yields the rows of this number of ranks."""
    ranks = (dist.process_index, dist.num_processes)
    local_batch = settings.EFFECTIVE_BATCH // dist.num_processes

    # Speed: (kind, preset, images on each rank).
    plan = [("weak", "cifar10", batch) for batch in settings.BATCHES]
    plan += [("weak", "stl10", settings.LARGE_BATCH)]
    plan += [("strong", preset, local_batch) for preset in ("cifar10", "stl10")]
    for kind, preset, batch in plan:
        config = preset_config(settings, preset, batch)
        make_step = partial(our_step, config, dist.device, *ranks)
        images = batch * dist.num_processes
        row = {"kind": kind, "preset": preset, "image_size": config.IMAGE_SIZE, "dim": config.DIM}
        row |= {"dim_mults": config.DIM_MULTS, "batch": batch}
        yield row | benchmarking.time_steps(make_step, images, dist.device, settings.SECONDS)

    # Validation loss: of all seeds on one GPU, of the first on more.
    for seed in (SEEDS if dist.num_processes == 1 else SEEDS[:1]) if settings.STEPS else ():
        config = preset_config(settings, "cifar10", local_batch)
        curve = learning_curve(config, dist.device, settings.STEPS, seed, *ranks)
        row = {"kind": "loss", "seed": seed, "steps": settings.STEPS}
        row |= {"effective_batch": settings.EFFECTIVE_BATCH}
        yield row | {"validation_loss": curve["validation_loss"]}


def run_rank(settings: ScalingSettings, path: Path) -> None:
    """Measures as one of the ranks; rank 0 appends each row to a file as JSON."""
    torch.backends.cudnn.benchmark = True
    with session(lambda: "start scaling.py again") as dist:
        for row in run_measurements(settings, dist):
            row |= {"processes": dist.num_processes}
            if dist.is_main_process:
                print(benchmarking.format_row(row), flush=True)
                with path.open("a") as file:
                    print(json.dumps(row), file=file)


def launch(count: int, limit: float) -> tuple[list[dict[str, Any]], str]:
    """Runs this script on `count` ranks; returns the rows and, if that failed, why."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.touch()
        worker = [__file__, *sys.argv[1:], "--worker", str(path)]
        process = subprocess.Popen([*torchrun, f"--nproc_per_node={count}", *worker])
        try:
            problem = f"{count} processes failed" if process.wait(limit) else ""
        except subprocess.TimeoutExpired:
            problem = f"{count} processes took more than {limit:.0f} s"
        finally:
            process.terminate()  # the launcher ends its workers
            process.wait()
        return [json.loads(line) for line in path.read_text().splitlines()], problem


def summarize(rows: list[dict[str, Any]]) -> str:
    """Adds efficiencies, sorts the same work by ranks, compares validation losses."""

    def work(row: dict[str, Any]) -> tuple:
        return row["kind"], row.get("preset"), row["kind"] == "weak" and row["batch"]

    # Efficiency: images/s over those of N single GPUs, if they were measured.
    single = {work(row): row for row in rows if row["processes"] == 1}
    for row in rows:
        if row["kind"] != "loss" and work(row) in single:
            speed = row["images_per_second"] / row["processes"]
            row["efficiency"] = speed / single[work(row)]["images_per_second"]
    rows.sort(key=work)

    losses = [
        (f"{row['processes']} ranks", row["validation_loss"]) for row in rows
        if row["kind"] == "loss"
    ]  # fmt: skip
    return benchmarking.compare_losses(losses, "1 ranks")


def main() -> None:
    """Measures with each number of processes and writes the results after each."""
    # Settings; a worker measures and ends.
    parser = Parser(__doc__)
    ScalingSettings.add_flags(parser)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = ScalingSettings(**ScalingSettings.given(options))
    if options.worker:
        return run_rank(settings, options.worker)

    # Numbers of processes.
    gpus = torch.cuda.device_count()
    counts = settings.PROCESSES or [n for n in (1, 2, 4, 8) if n <= (gpus or 2)]
    for count in counts:
        if (batch := settings.EFFECTIVE_BATCH) % count:
            raise UserError(f"--effective_batch {batch} cannot be divided by {count} processes")
        if gpus and count > gpus:
            raise UserError(f"--processes asks for {count}, but there are {gpus} GPUs")

    # Measurements, written after each.
    report: dict[str, Any] = benchmarking.describe_origin() | {"rows": []}
    path = benchmarking.results_path("scaling", report["device"])
    problems = []
    for count in counts:
        rows, problem = launch(count, settings.TIME_LIMIT)
        report["rows"] += rows
        problems.append(problem)
        report["agreement"] = summarize(report["rows"])
        benchmarking.write_report(path, report)
    print(f"{report['agreement']}\nwritten: {path}, {path.with_suffix('.png')}")
    if any(problems):
        raise UserError("; ".join(filter(None, problems)), 1)


if __name__ == "__main__":
    run_script(main)
