"""Measuring: rates, memory and arithmetic of whatever is repeated, in processes of their own that may fail or hang."""

import contextlib
import gc
import io
import multiprocessing
import os
import platform
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROUNDS = 3
WARM_UP = 3  # steps after the first one that are not timed


class FellBack(Exception):
    """What was to be measured gave up and went on with something else."""


@dataclass(frozen=True)
class Job:
    """Something to be measured: `measure(**options)`, in the process of that name, completes the row of a table.

    measure: a function of a module, so that another process finds it; returns a dict. limit: seconds.
    """

    row: dict[str, Any]
    process: str
    measure: Callable[..., dict[str, Any]]
    options: dict[str, Any]
    limit: float = 150.0


class Child:
    """A new process that does one job after the other."""

    def __init__(self, name: str):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,))
        self.process.start()
        theirs.close()

    def ask(self, job: Job) -> None:
        """Has the process begin a job."""
        self.pipe.send(job)

    def answer(self, job: Job) -> dict[str, Any]:
        """The row of the job that was asked for: what was measured, or why that failed under `failed`.

        After a failure the process is of no use any more, since it may leave the device in any state.
        """
        try:
            came = self.pipe.poll(job.limit)
            answer = self.pipe.recv() if came else f"nothing came back within {job.limit:g} s"
        except (EOFError, ConnectionResetError):
            self.process.join(10)
            answer = f"its process died (exit code {self.process.exitcode})"
        return job.row | ({"failed": answer} if isinstance(answer, str) else answer)

    def end(self) -> None:
        """Stops the process, whatever it is doing."""
        self.pipe.close()
        self.process.kill()
        self.process.join(10)


def serve(pipe: Connection) -> None:
    """The loop of a Child's process: answers each job with a dict, or with the reason for its failure."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    multiprocessing.set_start_method(None, force=True)  # what a job starts, it starts as a training run would
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            with nothing_given_up():
                answer = job.measure(**job.options)
        except Exception as problem:
            answer = f"{type(problem).__name__}: {str(problem).strip().splitlines()[0] if str(problem) else ''}"
        pipe.send(answer)


class Processes:
    """Has jobs done one after the other, each in the process that it names; `with` ends the last one."""

    def __init__(self):
        self.child: Child | None = None

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.child:
            self.child.end()
        self.child = None

    def measured(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Each job with its completed row. Successive jobs that name the same process share it.

        A job that fails, dies or takes too long costs itself only: the next one gets a new process.
        """
        for job in jobs:
            if self.child and self.child.name != job.process:
                self.__exit__()
            self.child = self.child or Child(job.process)
            self.child.ask(job)
            row = self.child.answer(job)
            if "failed" in row:
                self.__exit__()
            yield job, row


def measured_at_once(jobs: Sequence[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Each job with its completed row, all done at the same time in a process each: for what no clock is held to."""
    children = [Child(job.process) for job in jobs]
    try:
        for child, job in zip(children, jobs, strict=True):
            child.ask(job)
        for child, job in zip(children, jobs, strict=True):
            yield job, child.answer(job)
    finally:
        for child in children:
            child.end()


@contextlib.contextmanager
def nothing_given_up() -> Iterator[None]:
    """Raises FellBack if a block prints that it goes on without something, or with a smaller micro-batch.

    A training step and a sampler say so in a line and carry on, which must not be measured under the name of what
    failed. Other lines are left out.
    """
    with contextlib.redirect_stdout(io.StringIO()) as said:
        yield
    for line in said.getvalue().splitlines():
        if "FAILED" in line or "out of GPU memory" in line:
            raise FellBack(line)


def prepare(threads: int | None = None) -> torch.device:
    """The device that is measured, with nothing of an earlier job left on it; on a CPU with so many threads."""
    gc.collect()
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.device("cuda")
    if threads:
        torch.set_num_threads(threads)
    return torch.device("cpu")


def wait(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_gib(device: torch.device) -> float | None:
    """Most GPU memory that tensors took since `prepare`, GiB."""
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None


def step_rates(make: Callable[[], Callable[[], Any]], batch: int, device: torch.device, round_seconds: float) -> dict:
    """Speed of the step that make() gives: images/s (the median of ROUNDS rounds), ms, and memory in GiB.

    `first_step` is the seconds from make() to the end of the first step.
    """
    start = time.perf_counter()
    step = make()
    step()
    wait(device)
    first = time.perf_counter() - start
    for _ in range(WARM_UP):
        start = time.perf_counter()
        step()
        wait(device)
    count = max(1, round(round_seconds / (time.perf_counter() - start)))
    rates = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(count):
            step()
        wait(device)
        rates.append(count * batch / (time.perf_counter() - start))
    rate = statistics.median(rates)
    return {
        "images_per_second": rate, "rounds": rates, "ms": 1000 * batch / rate, "first_step": first,
        "peak_gib": peak_gib(device),
    }  # fmt: skip


def draw_rates(draw: Callable[[], Tensor], batch: int, rounds: int = ROUNDS) -> dict:
    """Speed of draw(), which gives `batch` images and was warmed up: images/s, the median of some rounds."""
    rates = []
    for _ in range(rounds):
        start = time.perf_counter()
        draw().cpu()
        rates.append(batch / (time.perf_counter() - start))
    return {"images_per_second": statistics.median(rates), "rounds": rates}


def training_flops(make: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> int:
    """Floating-point operations of a network's forward and backward pass on inputs of these shapes; none is done.

    The backward pass does each product of the forward pass twice: for the inputs and for the weights.
    """
    with torch.device("meta"):
        network, inputs = make(), [torch.zeros(shape) for shape in shapes]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    return 3 * counter.get_total_flops()


def matmul_rate(size: int, dtype: torch.dtype, threads: int | None = None) -> dict:
    """What the device does at most, as {"flops_per_second"}: the product of two random matrices of size x size."""
    device = prepare(threads)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    (a @ b)[0, 0].cpu()
    products = draw_rates(lambda: (a @ b)[0, 0], 1, 10)
    return {"flops_per_second": 2 * size**3 * products["images_per_second"]}


def utilisation(images_per_second: float, flops_per_image: float, flops_per_second: float) -> float:
    """Model FLOPs utilisation (MFU, arXiv:2204.02311): arithmetic that the model needs over what the device can do."""
    return images_per_second * flops_per_image / flops_per_second


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_info(key: str) -> str:
    """A line of Linux' /proc/cpuinfo, such as `model name` or `flags`; empty elsewhere."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.split("\t")[0].strip() == key), "")


def has_cpu_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself, as far as Linux says so."""
    features = f"{cpu_info('flags')} {cpu_info('Features')}".split()
    return any(name in features for name in ("avx512_bf16", "amx_bf16", "bf16"))


def device_name() -> str:
    """The GPU, or the CPU with its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{cpu_info('model name') or platform.processor() or 'CPU'}, {cores()} cores"
