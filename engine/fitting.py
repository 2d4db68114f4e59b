"""How many images fit into the GPU's memory at once, found by trying; and a table of it for several configurations.

Trials run in a process of their own: its memory is its own too, and one that crashes or hangs takes nothing with it.
"""

import copy
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.batches import fit_on_gpu
from engine.checkpoints import write_atomically
from engine.errors import UserError
from engine.measuring import FellBack, Job, Processes, device_name, nothing_given_up, prepare, wait
from engine.memory import cap_memory, memory_limit
from engine.step import Step

REMEMBERED = Path("data/cache/memory.json")
HEADROOM = 0.05  # share of the memory that trials leave free, for what a long run does to it
DOUBT = 0.1  # share by which a straight line may foretell too much: a size is tried all the same
SECONDS = 300  # that trials may take; a compiled model needs minutes
# what a configuration's memory depends on, beside the effective batch
DECISIVE = (
    "IMAGE_SIZE", "DIM", "DIM_MULTS", "ATTENTION_HEADS", "ATTENTION_DIM", "FULL_ATTENTION_SIZE", "DROPOUT", "USE_AMP",
    "OPTIMIZER", "COMPILE_MODEL", "CUDA_GRAPH", "GRADIENT_CHECKPOINTING", "NUM_SAMPLES",
)  # fmt: skip


def fit(make: Callable[[Any], nn.Module], config: Any, images: np.ndarray, remembered: Path = REMEMBERED) -> int:
    """The largest micro-batch that fits on this GPU: a divisor of the effective batch, found by trying.

    make(config) gives the model; it and config must be picklable. images: uint8 (N, C, H, W), which take memory too if
    they are held on the GPU. Says in one line what was found, and remembers it for the configuration and the card in
    the file `remembered`; if trials fail, the configured micro-batch stays. Raises UserError if one image is too many.
    """
    batch = config.BATCH_SIZE * config.GRADIENT_ACCUMULATION
    held = images.nbytes if fit_on_gpu(images) else 0
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()  # others may be on the card
    gib_free = (min(memory_limit(), free) - held) / 2**30
    room = math.floor(2 * gib_free) / 2  # to the half, since it is never quite the same
    settings = " ".join(f"{name}={getattr(config, name)}" for name in DECISIVE) + f" guide={config.GUIDE_AT > 0}"
    key = f"{torch.cuda.get_device_name()}, {room:g} GiB, torch {torch.__version__}: batch={batch} {settings}"
    known = json.loads(remembered.read_text()) if remembered.exists() else {}
    how = f"as {remembered} remembers"
    if key not in known:
        start = time.monotonic()
        print(f"trying how many of {batch} images fit into {room:g} GiB at once (or --no-fit_memory)", flush=True)
        job = Job({}, "memory", search, {"make": make, "config": config, "room": room}, SECONDS)
        with Processes() as processes:
            ((_, found),) = processes.measured([job])
        if (reason := found.get("failed", "")).startswith("UserError: "):
            raise UserError(reason.removeprefix("UserError: "))
        if reason:
            print(f"it could not be tried ({reason}): micro-batches of {config.BATCH_SIZE}, as estimated")
            return config.BATCH_SIZE
        known[key] = found
        text = json.dumps(known, indent=1) + "\n"
        write_atomically(remembered, lambda file: file.write(text.encode()))
        how = f"tried in {time.monotonic() - start:.0f} s, remembered in {remembered}"
    micro, peak = known[key]["micro_batch"], known[key]["peak_gib"]
    print(f"micro-batches of {micro} in a batch of {batch}, {peak:.1f} of {room:g} GiB ({how})", flush=True)
    return micro


def search(make: Callable[[Any], nn.Module], config: Any, room: float) -> dict[str, Any]:
    """The largest micro-batch that trains within `room` GiB, and its peak memory in GiB; runs in a child process.

    Raises UserError if one image at a time is too many.
    """
    limit = (1 - HEADROOM) * room
    if torch.cuda.is_available():
        cap_memory(limit)
    batch, fitted = config.BATCH_SIZE * config.GRADIENT_ACCUMULATION, False

    def peak(micro: int) -> float | None:
        nonlocal fitted
        try:
            tried = trial(make, split(config, micro, min(batch, 2 * micro)), steps=2)
        except (RuntimeError, FellBack):
            if not fitted and (micro < batch or batch == 1):
                raise
            tried = None  # a lack of memory that was reported as something else; if not, a smaller one tells
        fitted = fitted or tried is not None
        print(f"  {micro} at once: {'too many' if tried is None else gib(tried['peak_gib'])}", file=sys.stderr)
        return None if tried is None else tried["peak_gib"] or 0.0

    micro, taken = largest_micro_batch(peak, batch, limit, whole_first=batch == config.BATCH_SIZE)
    return {"micro_batch": micro, "peak_gib": round(taken, 3)}


def largest_micro_batch(
    peak: Callable[[int], float | None], batch: int, limit: float, whole_first: bool = False
) -> tuple[int, float]:
    """The largest divisor of `batch` that fits, and its peak memory.

    peak(micro) tries one: the memory that it took, or None if it did not fit. Two small ones foretell, by a straight
    line, which is the largest within `limit` or a little above, lines being what they are; that is tried, and from
    there it goes up or down. whole_first: the batch itself is expected to fit, so that one trial may do. Raises
    UserError if not even 1 fits.
    """
    sizes = [size for size in range(1, batch + 1) if batch % size == 0]
    fitting: dict[int, float] = {}
    too_large = batch + 1
    if whole_first:
        taken = peak(batch)
        if taken is not None:
            return batch, taken
        too_large = batch
    wanted = [size for size in sizes if size <= 8 and size < too_large][-2:]
    while wanted:
        size = wanted.pop(0)
        taken = peak(size)
        if taken is not None:
            fitting[size] = taken
        elif size < too_large:
            too_large, wanted = size, []
        if not wanted:
            between = [size for size in sizes if max(fitting, default=0) < size < too_large]
            wanted = [size for size in between if foretell(fitting, size) <= (1 + DOUBT) * limit][-1:]
    if not fitting:
        raise UserError(
            "not even one image at a time fits into the GPU's memory: lower --dim or --image_size, or use "
            "--gradient_checkpointing"
        )
    return max(fitting), fitting[max(fitting)]


def foretell(known: Mapping[int, float], size: int) -> float:
    """The value at `size` on the straight line through the two largest known; 0 if there are fewer."""
    if len(known) < 2:
        return 0.0
    (a, at_a), (b, at_b) = sorted(known.items())[-2:]
    return at_b + max(at_b - at_a, 0.0) / (b - a) * (size - b)


def split(config: Any, micro_batch: int, batch: int) -> Any:
    """The configuration with another batch, in micro-batches."""
    changed = copy.copy(config)
    changed.BATCH_SIZE, changed.GRADIENT_ACCUMULATION = micro_batch, batch // micro_batch
    return changed


def trial(make: Callable[[Any], nn.Module], config: Any, steps: int) -> dict[str, Any] | None:
    """What a run does to memory, done with random images: `steps` updates, a validation, a few samples.

    Returns the GPU's peak memory (`peak_gib`, None on a CPU), `images_per_second` without the first two steps, if there
    are more, and the last `loss`; or None if it did not fit. Raises FellBack if a step gave up what is configured. The
    peak leaves out the first time of everything: cuDNN tries kernels then, with workspaces as large as memory is free.
    """
    device = prepare()
    micro, batch = config.BATCH_SIZE, config.BATCH_SIZE * config.GRADIENT_ACCUMULATION
    try:
        with nothing_given_up():
            model = make(config).to(device).train()
            step = Step(model, config)
            if config.GUIDE_AT:
                step.ema.keep_guide()
            shape = (batch, model.channels, model.image_size, model.image_size)
            images = torch.randint(256, shape, dtype=torch.uint8, device=device)

            def show() -> None:
                step.validate(images[:micro].cpu())
                step.ema.sample(min(micro, config.NUM_SAMPLES), steps=3, seed=0)  # one of them asks the guide

            for number in range(steps):
                if number == 1:
                    show()
                    prepare()
                if number == min(2, steps - 1):
                    wait(device)
                    start = time.perf_counter()
                loss, _ = step(images, number, 1e-4)
            loss = loss.item()
            seconds = time.perf_counter() - start
            show()
    except torch.OutOfMemoryError:
        return None
    except (FellBack, UserError) as problem:
        if "out of GPU memory" not in str(problem):  # as a step says, be it that it goes on with less or that it cannot
            raise
        return None
    return {
        "peak_gib": torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else None,
        "images_per_second": batch * (steps - min(2, steps - 1)) / seconds,
        "loss": loss,
    }


def memory_table(
    make: Callable[[Any], nn.Module], cases: Mapping[str, Any], path: Path, steps: int = 50, seconds: float = 240
) -> list[dict[str, Any]]:
    """For each configuration, by name: the micro-batch that fits, peak memory and speed over `steps` steps.

    A case's memory is capped at its MEMORY_GIB; each has a process of its own and so many seconds. Prints a line for
    each as it comes and writes all to the JSON file `path`, where cases of the same name are replaced and others stay.
    Returns the rows; one that failed says why under `failed`.
    """
    kept = {row["case"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    jobs = []
    for case, config in cases.items():
        row = {"case": case, "cap_gib": config.MEMORY_GIB, "image_size": config.IMAGE_SIZE, "dim": config.DIM}
        row |= {"batch": config.BATCH_SIZE * config.GRADIENT_ACCUMULATION}
        jobs.append(Job(row, case, measure, {"make": make, "config": config, "steps": steps}, seconds))
    with Processes() as processes:
        for _, row in processes.measured(jobs):
            print(in_words(row), flush=True)
            kept[row["case"]] = row
            report = {"device": device_name(), "torch": torch.__version__, "steps": steps, "rows": list(kept.values())}
            text = json.dumps(report, indent=1) + "\n"
            write_atomically(path, lambda file, text=text: file.write(text.encode()))
    return [kept[case] for case in cases]


def in_words(row: dict[str, Any]) -> str:
    """A row of memory_table in one line."""
    start = f"memory {row['case']:20} dim {row['dim']:3}"
    if "failed" in row:
        return f"{start} FAILED: {row['failed']}"
    more = f"; {gib(row['fp32_gib'])} in fp32 and {gib(row['amp_gib'])} in mixed precision" if row["fp32_gib"] else ""
    return (
        f"{start} {row['micro_batch']:4} x {row['accumulation']:<3} {gib(row['peak_gib'])}, "
        f"{row['images_per_second']:8.1f} images/s, loss {row['loss']:.3f}{more}"
    )


def gib(value: float | None) -> str:
    """Memory as printed."""
    return "memory not measured" if value is None else f"{value:.2f} GiB"


def measure(make: Callable[[Any], nn.Module], config: Any, steps: int) -> dict[str, Any]:
    """A row of memory_table; runs in a child process."""
    batch = config.BATCH_SIZE * config.GRADIENT_ACCUMULATION
    micro = search(make, config, config.MEMORY_GIB)["micro_batch"]
    if torch.cuda.is_available():
        cap_memory(config.MEMORY_GIB)
    row = {"micro_batch": micro, "accumulation": batch // micro}
    tried = trial(make, split(config, micro, batch), steps)
    if tried is None:
        raise UserError(f"{steps} steps in micro-batches of {micro} ran out of memory, a few did not", exit_code=1)
    row |= tried
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0)  # to compare precisions, of which one may need more
    for column, amp in (("fp32_gib", False), ("amp_gib", True)):
        changed = split(config, micro, min(batch, 2 * micro))
        changed.USE_AMP = amp
        tried = trial(make, changed, steps=2)
        row[column] = tried and tried["peak_gib"]
    return row
