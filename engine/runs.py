"""What belongs to one run: its folders, its log, its clock, and the wish to stop."""

import json
import signal
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from engine import checkpoints, plots
from engine.errors import UserError

SAMPLES = Path("samples")
LOG_EVERY = 10  # steps: the only times the host waits for the device


def new_name(config: Any) -> str:
    """The configured name, or one of data set, size and date; raises UserError if the name asked for is taken."""

    def taken(name: str) -> bool:
        return (checkpoints.FOLDER / name).exists() or (SAMPLES / name).exists()

    if config.RUN_NAME:
        if taken(config.RUN_NAME):
            raise UserError(
                f"there is a run {config.RUN_NAME} already: go on with it (--resume {config.RUN_NAME}) "
                "or choose another --run_name"
            )
        return config.RUN_NAME
    base = f"{config.DATASET}-{config.IMAGE_SIZE}px-{datetime.now():%Y%m%d-%H%M%S}"
    return next(name for name in (base, *(f"{base}-{i}" for i in range(2, 1000))) if not taken(name))


class Clock:
    """How far a run is, in steps or in minutes, over all its sessions.

    progress: the run's `step` and `seconds`, kept up to date here. With several processes the first one's clock
    counts for all, read every LOG_EVERY steps, so that all stop at the same step.
    """

    def __init__(self, config: Any, steps_per_epoch: int, progress: dict[str, Any], processes: PartialState):
        self.steps = config.MAX_STEPS or config.EPOCHS * steps_per_epoch
        self.limit = 60 * config.MINUTES
        self.progress, self.processes = progress, processes
        self.started = time.monotonic() - progress["seconds"]

    def tick(self) -> None:
        """Counts a step that has been done."""
        self.progress["step"] += 1
        if self.processes.num_processes == 1:
            self.progress["seconds"] = time.monotonic() - self.started
        elif self.progress["step"] % LOG_EVERY == 0:
            seconds = torch.tensor(time.monotonic() - self.started, device=self.processes.device)
            torch.distributed.broadcast(seconds, src=0)
            self.progress["seconds"] = seconds.item()

    def fraction(self) -> float:
        """Share of the run that is over, 0 to 1 or more."""
        if self.limit:
            return self.progress["seconds"] / self.limit
        return self.progress["step"] / self.steps

    def finished(self) -> bool:
        """Whether the run is as long as it should be."""
        return self.fraction() >= 1

    def total(self) -> int:
        """Steps of the whole run; in minutes, as many as the speed so far foretells."""
        return self.steps or round(self.progress["step"] / max(self.fraction(), 1e-9))


class Interrupt:
    """Ctrl-C and SIGTERM, turned into a question that the loop asks after a step; a second one ends at once."""

    def __init__(self, processes: PartialState):
        self.processes, self.number, self.before = processes, 0, {}

    def __enter__(self) -> "Interrupt":
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _frame: object) -> None:
        self.number = number
        signal.signal(number, self.before[number])

    def wanted(self, step: int) -> bool:
        """Whether any process was asked to stop; several processes ask each other every LOG_EVERY steps."""
        if self.processes.num_processes > 1:
            if step % LOG_EVERY:
                return False
            number = torch.tensor(self.number, device=self.processes.device)
            torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
            self.number = int(number.item())
        return self.number > 0


class Log:
    """Writes every scalar to TensorBoard and metrics.jsonl, and pictures beside them, in samples/<run>/."""

    def __init__(self, folder: Path, progress: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.metrics = folder, folder / "metrics.jsonl"
        # what an earlier session did after its last checkpoint is done again
        kept = [row for row in plots.read_metrics(self.metrics) if row["step"] <= progress["step"]]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        checkpoints.write_atomically(self.metrics, lambda file: file.write(text.encode()))
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=progress["step"] + 1)
        self.last = (time.monotonic(), progress["images"])

    def scalars(self, progress: dict[str, Any], **values: float) -> None:
        """Logs values at the current step."""
        row = {key: progress[key] for key in ("step", "epoch", "images")} | {"seconds": round(progress["seconds"], 3)}
        with open(self.metrics, "a") as file:
            file.write(json.dumps(row | values) + "\n")
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, progress["step"])

    def speed(self, images: int) -> float:
        """Images per second since the last call, given the number seen so far."""
        now, (then, before) = time.monotonic(), self.last
        self.last = (now, images)
        return (images - before) / (now - then)

    def grid(self, images: Tensor, step: int, name: str) -> None:
        """Writes sample images (B, C, H, W) in [0, 1] as a grid, and brings the loss curve up to date."""
        plots.save_image(plots.grid(images), self.folder / name)
        plots.save_loss_curve(self.metrics, self.folder / "loss.png")
        self.tensorboard.add_images("samples", images.clamp(0, 1), step)

    def close(self) -> None:
        """Flushes TensorBoard and draws the loss curve."""
        self.tensorboard.close()
        plots.save_loss_curve(self.metrics, self.folder / "loss.png")
