"""Measures how training scales over the GPUs of this machine, against one of them in the same run.

    python scaling.py                                      on 1, 2, 4 ... GPUs, up to what is there
    python scaling.py --processes 1,8 --steps 0            on 1 and on 8, the speed alone
    python scaling.py --dim 8 --image_size 16 --batches 8 --large_batch 4 --effective_batch 16 --steps 20 --seconds 0.2

Weak scaling: the batch of each GPU stays, so perfect is N times the images/s. Strong scaling: the effective batch stays
and is shared out. Efficiency is images/s over N times those of one GPU. Last, the same seed and effective batch are
trained on the built-in shapes with each number of GPUs; the validation losses should differ no more than those of three
seeds on one GPU do. The third command tries all of it without a GPU. Writes results/scaling-<device>.json and .png,
from which `python benchmark.py --readme` makes the table in the README.
"""

import argparse
import gc
import io
import itertools
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from matplotlib.figure import Figure

from config import Resolved, resolve, tier_of
from ddpm_model import DDPMModel
from engine.batches import Batches
from engine.checkpoints import write_atomically
from engine.command_line import Parser, run, whole_numbers
from engine.errors import UserError
from engine.processes import from_first, together
from engine.sources import load_images
from engine.step import Step, learning_rate

RESULTS = Path("results")
ROUNDS = 3
SEEDS = (0, 1, 2)
TITLES = {
    "weak": "weak scaling: each GPU's batch stays",
    "strong": "strong scaling: effective batch stays",
    "loss": "validation loss of the same training",
}
WARM_UP = 3  # steps before the clock starts: kernels are chosen and the graph is captured


def configuration(options: argparse.Namespace, preset: str, micro_batch: int, seed: int = 0) -> Resolved:
    """A preset as train_optimized.py trains it, with the width and size that the command line may have set."""
    gpu = torch.cuda.is_available()
    flags = {"BATCH_SIZE": micro_batch, "SEED": seed, "USE_AMP": gpu, "CUDA_GRAPH": gpu, "HORIZONTAL_FLIP": False}
    flags |= {"DIM": options.dim} if options.dim else {}
    flags |= {"IMAGE_SIZE": options.image_size} if options.image_size else {}
    return resolve(preset, tier_of(1000.0), flags=flags)


def make_step(config: Resolved, processes: PartialState) -> Step:
    """A training step of the whole effective batch, of which this process computes its share."""
    model = DDPMModel.from_config(config).to(processes.device).train()
    return Step(model, config, processes.process_index, processes.num_processes)


def wait(processes: PartialState) -> None:
    """Until every process and its device have done everything."""
    if processes.device.type == "cuda":
        torch.cuda.synchronize()
    processes.wait_for_everyone()


def measure(options: argparse.Namespace, preset: str, share: int, processes: PartialState) -> dict[str, Any]:
    """Images/s of all processes together in ROUNDS rounds, `share` images a step in each process."""
    config = configuration(options, preset, min(share, options.large_batch) if preset == "stl10" else share)
    step, number = make_step(config, processes), itertools.count()
    shape = (share, 3, config.IMAGE_SIZE, config.IMAGE_SIZE)
    images = torch.randint(256, shape, dtype=torch.uint8, device=processes.device)
    for _ in range(WARM_UP):
        step(images, next(number), 1e-4)
    wait(processes)
    start = time.perf_counter()
    step(images, next(number), 1e-4)
    wait(processes)
    count = from_first(max(1, round(options.seconds / (time.perf_counter() - start))))
    rates = []
    for _ in range(ROUNDS):
        wait(processes)
        start = time.perf_counter()
        for _ in range(count):
            step(images, next(number), 1e-4)
        wait(processes)
        rates.append(count * share * processes.num_processes / (time.perf_counter() - start))
    return {
        "preset": preset, "image_size": config.IMAGE_SIZE, "dim": config.DIM,
        "dim_mults": list(config.DIM_MULTS), "batch": share,
        "images_per_second": statistics.median(rates), "rounds": rates, "steps_a_round": count,
    }  # fmt: skip


def validation_loss(options: argparse.Namespace, seed: int, processes: PartialState) -> dict[str, Any]:
    """The cifar10 preset trained on the shapes; the first process's row says the loss on those that were held out."""
    share = options.effective_batch // processes.num_processes
    config = configuration(options, "cifar10", share, seed)
    with processes.local_main_process_first():
        images = load_images("shapes", config.IMAGE_SIZE, Path("data"), progress=False)
    batches = Batches(
        images, options.effective_batch, seed, processes.device, 1, processes.process_index, processes.num_processes
    )
    step, start, warm_up = make_step(config, processes), time.perf_counter(), options.steps // 5
    endless = (batch for epoch in itertools.count() for batch in batches.epoch(epoch))
    for number, batch in enumerate(itertools.islice(endless, options.steps)):
        rate = learning_rate(config.LEARNING_RATE, "cosine", number, warm_up, number / options.steps)
        step(batch, number, rate)
    wait(processes)
    row = {"seed": seed, "steps": options.steps, "effective_batch": options.effective_batch}
    row["seconds"] = time.perf_counter() - start
    if processes.is_main_process:
        row["validation_loss"] = step.validate(batches.validation())
    return row


def rows_of(options: argparse.Namespace, processes: PartialState) -> Iterator[dict[str, Any]]:
    """Everything that is measured with this number of processes."""
    shares = [("weak", "cifar10", batch) for batch in options.batches] + [("weak", "stl10", options.large_batch)]
    strong = options.effective_batch // processes.num_processes
    shares += [("strong", "cifar10", strong), ("strong", "stl10", strong)]
    for kind, preset, share in shares:
        yield {"kind": kind} | measure(options, preset, share, processes)
    for seed in (SEEDS if processes.num_processes == 1 else SEEDS[:1]) if options.steps else ():
        yield {"kind": "loss"} | validation_loss(options, seed, processes)


def work(options: argparse.Namespace) -> None:
    """What each process of one number of processes does: measures; the first prints each row as JSON."""
    torch.backends.cudnn.benchmark = True
    with together(lambda: "start again") as processes:
        for row in rows_of(options, processes):
            if processes.is_main_process:
                print(json.dumps(row | {"processes": processes.num_processes}), flush=True)
            gc.collect()
            if processes.device.type == "cuda":
                torch.cuda.empty_cache()


def launch(count: int, limit: float) -> Iterator[dict[str, Any]]:
    """The rows of `count` processes as they come; raises UserError if they fail or take more than `limit` seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    process = subprocess.Popen([*command, __file__, *sys.argv[1:], "--worker"], stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(limit, process.terminate)  # the launcher ends its workers
    timer.start()
    try:
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
            else:
                print(line, end="", flush=True)
        if process.wait():
            raise UserError(f"{count} processes {'failed' if timer.is_alive() else f'took more than {limit:.0f} s'}", 1)
    finally:
        timer.cancel()
        process.terminate()


def with_efficiency(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row with its images/s over those of as many processes as single ones, if one was measured before."""
    same = ("kind", "preset", "batch") if row["kind"] == "weak" else ("kind", "preset")
    alone = [r for r in [*rows, row] if r["processes"] == 1 and all(r.get(key) == row[key] for key in same)]
    if not alone:
        return row | {"efficiency": None}
    return row | {"efficiency": row["images_per_second"] / row["processes"] / alone[0]["images_per_second"]}


def told(row: dict[str, Any]) -> str:
    """A row for people."""
    count = row["processes"]
    if row["kind"] == "loss":
        return (
            f"loss   {count} x {row['effective_batch'] // count:4}, seed {row['seed']}: {row['validation_loss']:.5f} "
            f"after {row['steps']} steps, {row['seconds']:.1f} s"
        )
    efficiency = f", efficiency {100 * row['efficiency']:.1f} %" if row["efficiency"] else ""
    return (
        f"{row['kind']:6} {count} x {row['batch']:4}, {row['image_size']} px, dim {row['dim']}: "
        f"{row['images_per_second']:9.1f} images/s ({min(row['rounds']):.1f} to {max(row['rounds']):.1f}){efficiency}"
    )


def agreement(rows: list[dict[str, Any]]) -> str:
    """Whether more processes differ from one by no more than seeds differ from each other."""
    losses = [row for row in rows if row["kind"] == "loss"]
    alone = {row["seed"]: row["validation_loss"] for row in losses if row["processes"] == 1}
    others = {row["processes"]: row["validation_loss"] for row in losses if row["processes"] > 1}
    if len(alone) < len(SEEDS) or not others:
        return "validation losses: too few to compare"
    spread = max(alone.values()) - min(alone.values())
    gaps = {count: abs(loss - alone[SEEDS[0]]) for count, loss in others.items()}
    text = ", ".join(f"{gap:.5f} on {count}" for count, gap in gaps.items())
    verdict = "within" if max(gaps.values()) <= spread else "NOT within"
    return f"validation losses differ from one process's by {text}: {verdict} the spread of three seeds, {spread:.5f}"


def picture(report: dict[str, Any]) -> bytes:
    """Efficiency by number of processes, weak and strong, and the validation losses, as far as measured: a PNG."""
    kinds = [kind for kind in TITLES if any(row["kind"] == kind for row in report["rows"])]
    counts = sorted({row["processes"] for row in report["rows"]})
    figure = Figure(figsize=(4.4 * max(1, len(kinds)), 4), layout="constrained")
    figure.suptitle(f"{report['device']}, torch {report['torch']}")
    for kind, panel in zip(kinds, figure.subplots(1, len(kinds), squeeze=False)[0] if kinds else (), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in (row for row in report["rows"] if row["kind"] == kind):
            if kind == "loss":
                lines.setdefault(f"seed {row['seed']}", []).append((row["processes"], row["validation_loss"]))
            elif row["efficiency"]:
                batch = row["batch"] if kind == "weak" else row["batch"] * row["processes"]
                label = f"{row['preset']} preset, {row['image_size']} px, batch {batch}"
                lines.setdefault(label, []).append((row["processes"], 100 * row["efficiency"]))
        for label, points in lines.items():
            panel.plot(*zip(*points, strict=True), marker="o", label=label)
        panel.set(xscale="log", xlabel="processes, one GPU each", title=TITLES[kind])
        panel.set_xticks(counts, map(str, counts))
        panel.minorticks_off()
        if kind != "loss":
            panel.axhline(100, color="grey", linewidth=0.8, linestyle=":")
            panel.set_ylim(0, 110)
            panel.set_ylabel("efficiency, %")
        if lines:
            panel.legend(loc="lower left" if kind != "loss" else "best", fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def main() -> None:
    """Measures with each number of processes, prints as it goes, writes after each."""
    gpus = torch.cuda.device_count()
    there = tuple(count for count in (1, 2, 4, 8) if count <= (gpus or 2))
    parser = Parser(__doc__)
    for name, kind, default, text in (
        ("processes", whole_numbers, there, "numbers of processes, one GPU each"),
        ("batches", whole_numbers, (128, 512), "images a GPU in weak scaling of the cifar10 preset"),
        ("large_batch", int, 64, "images a GPU at a time with the stl10 preset"),
        ("effective_batch", int, 512, "images a step in strong scaling and in the training that is compared"),
        ("steps", int, 500, "training steps before validation losses are compared, 0: none"),
        ("seconds", float, 1.5, "length of each of 3 rounds, seconds"),
        ("time_limit", float, 300.0, "for each number of processes, seconds"),
        ("dim", int, 0, "width of both models, channels, 0: the presets' 128"),
        ("image_size", int, 0, "size of the images of both, pixels, 0: the presets' 32 and 96"),
    ):
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: {shown})")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options)
    for count in options.processes:
        if options.effective_batch % count:
            raise UserError(f"an effective batch of {options.effective_batch} cannot be shared equally by {count}")
        if gpus and count > gpus:
            raise UserError(f"--processes asks for {count}, but there are {gpus} GPUs")
    name = torch.cuda.get_device_name() if gpus else platform.processor() or "CPU"
    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "rows": []}
    path = RESULTS / f"scaling-{name.replace(' ', '-')}.json"
    print(f"{max(options.processes)} x {name}, torch {torch.__version__}", flush=True)
    problems = []
    for count in options.processes:
        try:
            for row in launch(count, options.time_limit):
                report["rows"].append(row if row["kind"] == "loss" else with_efficiency(row, report["rows"]))
                print(told(report["rows"][-1]), flush=True)
        except UserError as problem:
            problems.append(str(problem))
            print(problem, flush=True)
        report["agreement"] = agreement(report["rows"])
        write_atomically(path, lambda file: file.write((json.dumps(report, indent=1) + "\n").encode()))
    print(report["agreement"])
    write_atomically(path.with_suffix(".png"), lambda file: file.write(picture(report)))
    print(f"written: {path}, {path.with_suffix('.png')}")
    if problems:
        raise UserError("; ".join(problems), 1)


if __name__ == "__main__":
    run(main)
