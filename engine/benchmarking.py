"""Benchmarks: rows measured in worker processes, results files and tables.

A results file is {network: {section: result}}, where a result is {"device", "torch", "date",
"command", ..., "rows": [{...}, ...]}; earlier ones are a single result.
"""

import datetime
import json
import multiprocessing
import os
import re
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.utils.benchmark import Timer

from engine import distributed
from engine.checkpoints import write_text
from engine.errors import FallbackWarning, UserError, type_and_message

RESULTS = Path("results")
DOCS = Path("docs/benchmarks.md")
ROUNDS = 3
SECTIONS = {
    "training": "Training step", "sampling": "Sampling", "data": "Data path",
    "curves": "Learning curves", "memory": "GPU memory", "scaling": "Scaling over GPUs",
}  # fmt: skip
# Keys of rows and their headings, in the order of a table's columns.
HEADINGS = {
    "what": "variant", "kind": "kind", "preset": "preset", "image_size": "px", "cap_gib": "cap GiB",
    "dim": "dim", "dim_mults": "dim_mults", "sampler": "sampler", "steps": "steps", "seed": "seed",
    "nfe": "NFE", "ranks": "ranks", "batch": "batch", "micro_batch": "micro-batch",
    "images_per_second": "images/s", "ms": "ms", "peak_gib": "peak GiB", "mfu": "MFU",
    "speedup": "speedup", "efficiency": "efficiency", "validation_loss": "validation loss",
    "loss_difference": "difference", "final_loss": "final loss", "fp32_gib": "fp32 GiB",
    "amp_gib": "mixed precision GiB", "failed": "failed",
}  # fmt: skip
RENAMED_KEYS = {"evaluations": "nfe", "processes": "ranks", "over_library": "speedup"}
Row = dict[str, Any]  # of a table of results


class BenchmarkJob(NamedTuple):
    """A row of a table, and the call that completes it on each rank, measure(device=)."""

    row: Row
    measure: Callable[..., Row]
    work: tuple = ()  # rows of the same work are listed together and compared with its baseline
    is_baseline: bool = False
    ranks: int = 1
    limit: float = 300.0  # seconds


def run_job(job: BenchmarkJob) -> Row:
    """Runs a job in new processes; its row says under `failed` why there is no result."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    shared = (job, str(get_free_port()), sender)
    ranks = [context.Process(target=worker_main, args=(n, *shared)) for n in range(job.ranks)]
    result = {"failed": f"no result within {job.limit:g} s"}
    try:
        for process in ranks:
            process.start()
        ended = wait([receiver, *(process.sentinel for process in ranks)], job.limit)
        if receiver.poll():
            result = receiver.recv()
        elif ended:
            dead = next(process for process in ranks if process.sentinel in ended)
            dead.join(10)
            result = {"failed": f"the process died (exit code {dead.exitcode})"}
    except Exception as error:  # of starting a process, or of what one sent
        result = {"failed": type_and_message(error)}
    finally:
        for process in ranks:
            if process.pid is not None:
                process.kill()
                process.join()
    return job.row | result


def worker_main(rank: int, job: BenchmarkJob, port: str, sender: Connection) -> None:
    """Measures as a rank of a job. Rank 0 sends the result, any rank a failure or fallback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which kills this one
    multiprocessing.set_start_method(None, force=True)  # of a job's own processes, as in training
    warnings.simplefilter("error", FallbackWarning)
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        if job.ranks > 1:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank)}
            os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.ranks)}
            distributed.init()
        result = job.measure(device=device)
    except Exception as error:
        result = {"failed": type_and_message(error)}
    if rank == 0 or "failed" in result:
        sender.send(result)
    else:
        time.sleep(job.limit)  # a rank that ends before it is killed has died


def time_steps(
    step: Callable[[], Any], batch: float, device: torch.device, round_seconds: float = 0.5
) -> Row:
    """Times a step: images/s (median of ROUNDS rounds), ms, and peak memory in GiB.

    batch: images in a step, of all ranks.
    """
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    # Each call first takes two steps or more: kernels are chosen, graphs are captured.
    count = distributed.broadcast_object(max(1, round(round_seconds / timer.timeit(1).mean)))
    rates = [batch / timer.timeit(count).mean for _ in range(ROUNDS)]
    rate = statistics.median(rates)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {"images_per_second": rate, "rounds": rates, "ms": 1000 * batch / rate, "peak_gib": peak}


def run_section(
    name: str, network: str, section: str, about: Row, jobs: Sequence[BenchmarkJob], ratio: str
) -> list[Row]:  # fmt: skip
    """Runs jobs and returns their rows, each printed and written when measured.

    The section replaces the earlier one of the same network in results/<name>-<device>.json.
    ratio: the key of a row's speed, by rank, over that of its baseline, which is measured before.
    """
    # Where the results come from, and where they go.
    is_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if is_gpu else f"CPU, {os.cpu_count()} cores"
    command = " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    result = {"device": device, "torch": torch.__version__, "command": command}
    result |= {"date": datetime.date.today().isoformat()} | about
    path = RESULTS / f"{name}-{re.sub('[^A-Za-z0-9]+', '-', device).strip('-')}.json"
    report = read_report(path)
    report.setdefault(network, {})[section] = result

    measured: list[tuple[tuple, Row]] = []
    baselines: dict[tuple, float] = {}
    losses: list[float] = []
    for job in jobs:
        row = run_job(job)
        speed = row.get("images_per_second", 0.0) / job.ranks
        if speed and job.is_baseline:
            baselines[job.work] = speed
        if speed and job.work in baselines:
            row[ratio] = speed / baselines[job.work]
        if "validation_loss" in row:
            losses.append(row["validation_loss"])
            row["loss_difference"] = losses[-1] - losses[0]
        (_, label), *figures = zip(*table_cells([row]), strict=True)
        print(f"{section}: {label}: {', '.join(map(' '.join, figures))}", flush=True)
        measured.append((job.work, row))
        result["rows"] = [row for _, row in sorted(measured, key=lambda pair: pair[0])]
        text = json.dumps(report, indent=1)  # with each list of numbers on one line:
        text = re.sub(r"\[\n[-+.\deE,\s]+\]", lambda m: f"[{' '.join(m[0][1:-1].split())}]", text)
        write_text(path, f"{text}\n")
    print(f"written: {path}")
    return result["rows"]


def read_report(path: Path) -> dict[str, dict[str, Row]]:
    """Reads a results file; empty if there is none. Raises UserError if it is damaged."""
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        report = json.loads(re.sub(r"\w+(?=\":)", lambda m: RENAMED_KEYS.get(m[0], m[0]), text))
        report = {"": {path.name.split("-")[0]: report}} if "rows" in report else report
        [markdown_section("", each) for sections in report.values() for each in sections.values()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}). Delete it and measure again") from error
    return report


def format_value(key: str, value: Any) -> str:
    """Formats a value of a row by its key and type; nothing for None."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    if isinstance(value, float) and key in ("mfu", "efficiency"):
        return f"{value:.1%}"
    if isinstance(value, float):
        digits = ".5f" if "loss" in key else ",.0f" if value >= 100 else ".3g"
        return f"{value:{digits}}"
    return f"{value:,}" if isinstance(value, int) else value or ""


def table_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Returns the cells of a table of rows: a line of headings, and a line for each row."""
    keys = [key for key in HEADINGS if any(row.get(key) is not None for row in rows)]
    cells = [[format_value(key, row.get(key)) for key in keys] for row in rows]
    return [[HEADINGS[key] for key in keys], *cells]


def markdown_section(network: str, result: Row) -> str:
    """Returns a result as Markdown: a heading, how it was measured, and its table."""
    hidden = ("rows", "device", "command")
    about = {key: format_value(key, value) for key, value in result.items() if key not in hidden}
    how = [f"`{result['command']}`", *(f"{key.replace('_', ' ')}: {about[key]}" for key in about)]
    headings, *rows = table_cells(result["rows"])
    lines = [headings, ["---"] * len(headings), *rows]
    lines = [" | ".join(cell.replace("|", "/") for cell in line) for line in lines]
    heading = ", ".join(filter(None, (network, result["device"])))
    return f"### {heading}\n\n{'; '.join(how)}\n\n" + "".join(f"| {line} |\n" for line in lines)


def docs_page(folder: Path = RESULTS) -> str:
    """Returns docs/benchmarks.md: its introduction, and all results in a folder by section."""
    page = DOCS.read_text(encoding="utf-8") if DOCS.exists() else ""
    parts = [page.split("\n## ")[0]]
    reports = [read_report(path) for path in sorted(folder.glob("*.json"))]
    for section, title in SECTIONS.items():
        results = [
            markdown_section(network, sections[section])
            for report in reports for network, sections in report.items() if section in sections
        ]  # fmt: skip
        parts += [f"## {title}\n", *results] if results else []
    return "\n".join(parts)
