"""Benchmarks: jobs in worker processes, timing, and files, tables and plots of results.

A results file is {network: {section: result}} or, as scaling.py writes it, a single result, which
is {"device", "torch", "date", "command", ..., "rows": [{...}, ...]}.
"""

import datetime
import gc
import json
import multiprocessing
import os
import re
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from engine import distributed
from engine.checkpoints import write_text
from engine.errors import FallbackWarning, UserError, type_and_message
from engine.plots import save_figure
from engine.train_step import amp_dtype

RESULTS = Path("results")
ROUNDS = 3
WARM_UP = 3  # steps after the first that are not timed
SECTIONS = {
    "training": "Training step", "sampling": "Sampling", "data": "Data path",
    "curves": "Learning curves", "memory": "GPU memory", "scaling": "Scaling over GPUs",
}  # fmt: skip
# Keys of rows and their headings, in the order of a table's columns.
HEADINGS = {
    "what": "variant", "kind": "kind", "preset": "preset", "image_size": "px", "cap_gib": "cap GiB",
    "dim": "dim", "dim_mults": "dim_mults", "sampler": "sampler", "steps": "steps", "seed": "seed",
    "nfe": "NFE", "processes": "ranks", "batch": "batch", "micro_batch": "micro-batch",
    "images_per_second": "images/s", "ms": "ms", "peak_gib": "peak GiB", "mfu": "MFU",
    "over_library": "speedup", "efficiency": "efficiency", "validation_loss": "validation loss",
    "final_loss": "final loss", "fp32_gib": "fp32 GiB", "amp_gib": "mixed precision GiB",
    "failed": "failed",
}  # fmt: skip
INTRODUCTION = """# Benchmarks

Written by `python benchmark.py --docs` from [results/](../results/).

The library is denoising-diffusion-pytorch; speedup is over its row: the fp32 step of its Trainer
with the same batch, or its 1000 ancestral steps. NFE: network evaluations of an image, the guide's
included. MFU: the model's arithmetic over what the device does when it multiplies two large
matrices. Peak: GPU memory. Batch: of each rank. Efficiency: images/s over N times those of a GPU.
bf16: mixed precision, with fp16 on GPUs without bf16.
"""


class BenchmarkJob(NamedTuple):
    """A row of a table, and the call `measure(device=...)` that completes it."""

    row: dict[str, Any]
    measure: Callable[..., dict[str, Any]]
    limit: float = 300.0  # seconds


def run_job(job: BenchmarkJob) -> dict[str, Any]:
    """Runs a job in a new process; its row says under `failed` why there is no result."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=worker_main, args=(job, sender))
    process.start()
    sender.close()
    result = {"failed": f"no result within {job.limit:g} s"}
    try:
        if receiver.poll(job.limit):
            result = receiver.recv()
    except EOFError:
        process.join(10)
        result = {"failed": f"the process died (exit code {process.exitcode})"}
    finally:
        process.kill()
        process.join()
    return job.row | result


def worker_main(job: BenchmarkJob, sender: Connection) -> None:
    """Runs a job and sends its result; a fallback, which measures another thing, fails."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which kills this one
    multiprocessing.set_start_method(None, force=True)  # of a job's own processes, as in training
    warnings.simplefilter("error", FallbackWarning)
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        result = job.measure(device=device)
    except Exception as error:
        result = {"failed": type_and_message(error)}
    sender.send(result)


def time_steps(
    make_step: Callable[[], Callable[[], Any]], batch: float, device: torch.device,
    round_seconds: float = 0.5,
) -> dict[str, Any]:  # fmt: skip
    """Times a step: images/s (median of ROUNDS rounds), ms, and peak memory in GiB.

    batch: images in a step, of all ranks. `first_step`: seconds to make the step and do it once.
    """
    is_gpu = device.type == "cuda"

    def seconds(work: Callable[[], Any], count: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(count):
            work()
        # Wait for this device and for every rank.
        if torch.distributed.is_initialized():
            distributed.all_reduce(torch.zeros((), device=device))
        if is_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    # Free what earlier measurements left on the device.
    gc.collect()
    if is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    # Warm up: kernels are chosen, graphs are captured. The last step says how long a round is.
    start = time.perf_counter()
    step = make_step()
    seconds(step)
    first_step = time.perf_counter() - start
    warm_up = [seconds(step) for _ in range(WARM_UP)]
    count = distributed.broadcast_object(max(1, round(round_seconds / warm_up[-1])))

    rates = [count * batch / seconds(step, count) for _ in range(ROUNDS)]
    rate = statistics.median(rates)
    row = {"images_per_second": rate, "rounds": rates, "ms": 1000 * batch / rate}
    peak = torch.cuda.max_memory_allocated() / 2**30 if is_gpu else None
    return row | {"first_step": first_step, "peak_gib": peak}


def training_flops(network: nn.Module, image_size: int) -> int:
    """Counts the FLOPs of an image in training; the network is on the meta device.

    The backward pass does each product of the forward pass twice: for inputs and for weights.
    """
    inputs = [torch.zeros(shape, device="meta") for shape in ((1, 3, image_size, image_size), (1,))]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    return 3 * counter.get_total_flops()


def matmul_flops(device: torch.device) -> float:
    """Measures the FLOP/s of a large matmul, 16-bit on a GPU: what MFU (arXiv:2204.02311) is of."""
    is_gpu = device.type == "cuda"
    size = 8192 if is_gpu else 2048
    dtype = amp_dtype(device) if is_gpu else torch.float32
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 * time_steps(lambda: lambda: a @ b, 1, device)["images_per_second"]


def describe_origin() -> dict[str, Any]:
    """Returns what every result says of its origin."""
    is_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if is_gpu else f"CPU, {os.cpu_count()} cores"
    command = " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    date = datetime.date.today().isoformat()
    return {"device": device, "torch": torch.__version__, "date": date, "command": command}


def results_path(script: str, device: str) -> Path:
    """Returns the results file of a script on a device."""
    return RESULTS / f"{script}-{re.sub('[^A-Za-z0-9]+', '-', device).strip('-')}.json"


def read_report(path: Path) -> dict[str, dict[str, Any]]:
    """Reads a results file, nested; empty if there is none. Raises UserError if it is damaged."""
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8").replace('"evaluations":', '"nfe":')  # its old name
        report = json.loads(text)
        nested = {"": {path.name.split("-")[0]: report}} if "rows" in report else report
        for result in (each for sections in nested.values() for each in sections.values()):
            if type(result["device"]) is not str or {*map(type, result["rows"])} - {dict}:
                raise ValueError("a result has no device or no rows")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}). Delete it and measure again") from error
    return nested


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Writes a results file, each list of numbers on one line, and its plot."""
    text = json.dumps(report, indent=1)
    numbers = r"\[\s+([-+.\deE,\s]+?)\s+\]"
    text = re.sub(numbers, lambda match: f"[{' '.join(match[1].split())}]", text)
    write_text(path, f"{text}\n")
    plot_report({"": {"scaling": report}} if "rows" in report else report, path.with_suffix(".png"))


def compare_losses(losses: list[tuple[str, float]], reference: str) -> str:
    """Says whether losses, by name, differ from the reference no more than its seeds do."""
    seeds = [loss for name, loss in losses if name == reference]
    others = {name: loss for name, loss in losses if name != reference}
    if len(seeds) < 3 or not others:
        return "validation losses: too few to compare"
    spread = max(seeds) - min(seeds)
    differences = {name: abs(loss - seeds[0]) for name, loss in others.items()}
    verdict = "within" if max(differences.values()) <= spread else "not within"
    text = ", ".join(f"{value:.5f} ({name})" for name, value in differences.items())
    return f"validation losses differ by {text}: {verdict} the spread of three seeds, {spread:.5f}"


def format_value(key: str, value: Any) -> str:
    """Formats a value of a row by its key and type; nothing for None."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    if isinstance(value, float) and key in ("mfu", "efficiency"):
        return f"{value:.1%}"
    if isinstance(value, float) and key.endswith("_loss"):
        return f"{value:.5f}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value or ""


def format_row(row: dict[str, Any]) -> str:
    """Formats a row as a line, each figure after its heading."""
    names = [key for key in HEADINGS if row.get(key) is not None]
    figures = [f"{HEADINGS[key]} {format_value(key, row[key])}" for key in names[1:]]
    return f"{row[names[0]]}: {', '.join(figures)}"


def markdown_section(key: str, result: dict[str, Any]) -> str:
    """Returns a result as Markdown: a heading, how it was measured, and its table."""
    rows = [row for row in result["rows"] if row.get("kind") != "loss"]
    keys = [key for key in HEADINGS if any(row.get(key) is not None for row in rows)]
    table = [[HEADINGS[key] for key in keys], ["---"] * len(keys)]
    table += [[format_value(key, row.get(key)) for key in keys] for row in rows]
    about = [
        f"{name.replace('_', ' ')}: {format_value(name, value)}" for name, value in result.items()
        if name not in ("rows", "device", "command")
    ]  # fmt: skip
    heading = ", ".join(filter(None, (key, result["device"])))
    how = "; ".join([f"`{result.get('command', '')}`", *about])
    lines = ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |\n" for line in table]
    return f"### {heading}\n\n{how}\n\n{''.join(lines)}"


def docs_page(folder: Path = RESULTS) -> str:
    """Returns docs/benchmarks.md: the results of all files in a folder, by section."""
    reports = [read_report(path) for path in sorted(folder.glob("*.json"))]
    parts = [INTRODUCTION]
    for section, title in SECTIONS.items():
        results = [
            markdown_section(key, sections[section])
            for report in reports for key, sections in report.items() if section in sections
        ]  # fmt: skip
        parts += [f"## {title}\n", *results] if results else []
    return "\n".join(parts)


def plot_report(report: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws a panel for each result: speeds as bars, learning curves as lines."""
    from matplotlib.figure import Figure

    panels = [(key, *item) for key, sections in report.items() for item in sections.items()]
    heights = [max(3.0, 1.2 + 0.27 * len(result["rows"])) for *_, result in panels]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    all_axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    shown = ("what", "kind", "preset", "sampler", "steps", "cap_gib", "processes", "batch")
    for (key, section, result), axes in zip(panels, all_axes, strict=True):
        axes.set_title(", ".join(filter(None, (SECTIONS[section], key, result["device"]))))
        for row in reversed(result["rows"]):  # bars go up
            if "losses" in row:
                axes.plot(row["losses"], label=f"{row['what']}, seed {row['seed']}", linewidth=0.5)
                axes.set(yscale="log", xlabel="step", ylabel="loss")
                axes.legend()
            elif "images_per_second" in row:
                label = format_row({name: row[name] for name in shown if name in row})
                bar = axes.barh(label, row["images_per_second"], color="tab:blue")
                axes.bar_label(bar, fmt=partial(format_value, "images_per_second"), padding=3)
                axes.set(xlabel="images/s", xmargin=0.15)
    save_figure(figure, path)
