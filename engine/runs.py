"""What belongs to one run: its folders, its log, its clock, and the wish to stop."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from engine import checkpoints, plots
from engine.errors import UserError
from engine.locks import lock

SAMPLES = Path("samples")
LOG_EVERY = 10  # steps: the only times the host waits for the device


claims: dict[Path, int] = {}  # folders of runs that this process is at, with a handle that holds a lock on each


def claim(name: str) -> bool:
    """Makes the folder of a run this process's own until it ends or gives it back; False if another one has it.

    Raises OSError if nothing can be written there. Where folders cannot be locked nobody is kept out.
    """
    folder = (checkpoints.FOLDER / name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.check_writable(folder)
    if folder not in claims and os.name != "nt":  # where folders cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        if lock(handle) is False:
            os.close(handle)
            return False
        claims[folder] = handle
    return True


def give_back(name: str) -> None:
    """Ends what claim began."""
    if (handle := claims.pop((checkpoints.FOLDER / name).resolve(), None)) is not None:
        os.close(handle)


if hasattr(os, "register_at_fork"):  # a data worker must not keep the lock of its dead parent
    os.register_at_fork(after_in_child=lambda: [os.close(handle) for handle in claims.values()])


def new_name(config: Any) -> str:
    """The configured name, or one of data set, size and date; its folder is claimed.

    Raises UserError if the name asked for is taken or leads elsewhere.
    """

    def taken(name: str) -> bool:  # one that ended before it saved anything may start again
        return checkpoints.has_saved(name) or (SAMPLES / name / "final.png").exists()

    if config.RUN_NAME:
        asked = Path(config.RUN_NAME)
        if asked.is_absolute() or ".." in asked.parts or not asked.parts:
            raise UserError(f"--run_name is {config.RUN_NAME}, but must name a folder below {checkpoints.FOLDER}/")
        if taken(config.RUN_NAME) or not claim(config.RUN_NAME):
            raise UserError(
                f"there is a run {config.RUN_NAME} already: go on with it (--resume {config.RUN_NAME}) "
                "or choose another --run_name"
            )
        return config.RUN_NAME
    base = f"{config.DATASET}-{config.IMAGE_SIZE}px-{datetime.now():%Y%m%d-%H%M%S}"
    return next(name for name in (base, *(f"{base}-{i}" for i in range(2, 1000))) if not taken(name) and claim(name))


class Clock:
    """How far a run is, in epochs, steps or minutes, over all its sessions.

    progress: the run's `step` and `seconds`, kept up to date here, and `epoch` and `position` in it, in steps. With
    several processes the first one's clock counts for all, read every LOG_EVERY steps, so that all stop at the same
    step.
    """

    def __init__(self, config: Any, steps_per_epoch: int, progress: dict[str, Any], processes: PartialState):
        self.epochs, self.steps, self.limit = config.EPOCHS, config.MAX_STEPS, 60 * config.MINUTES
        self.steps_per_epoch = steps_per_epoch
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
        if self.steps:
            return self.progress["step"] / self.steps
        # earlier sessions may have had another batch, and so other steps
        return (self.progress["epoch"] + self.progress["position"] / self.steps_per_epoch) / self.epochs

    def finished(self) -> bool:
        """Whether the run is as long as it should be."""
        return self.fraction() >= 1

    def total(self) -> int:
        """Steps of the whole run; in minutes, as many as the speed so far foretells."""
        step = self.progress["step"]
        if self.limit:
            return round(step / max(self.fraction(), 1e-9))
        return self.steps or step + round((1 - self.fraction()) * self.epochs * self.steps_per_epoch)


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


def quiet_writer(failure: threading.ExceptHookArgs) -> None:
    """Leaves out the traceback of TensorBoard's thread for a full disk, of which Log.or_without hears too."""
    if type(failure.thread).__module__.startswith("tensorboard") and isinstance(failure.exc_value, OSError):
        return
    threading.__excepthook__(failure)


class Log:
    """Writes every scalar to TensorBoard and metrics.jsonl, and pictures beside them, in samples/<run>/.

    A disk that is full costs rows and pictures, which one line says, and TensorBoard for the rest of the session.
    """

    def __init__(self, folder: Path, progress: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.metrics = folder, folder / "metrics.jsonl"
        # what an earlier session did after its last checkpoint is done again
        kept = [row for row in plots.read_metrics(self.metrics) if row["step"] <= progress["step"]]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        checkpoints.write_atomically(self.metrics, lambda file: file.write(text.encode()))
        self.tensorboard: SummaryWriter | None = SummaryWriter(
            str(folder / "tensorboard"), purge_step=progress["step"] + 1
        )
        threading.excepthook = quiet_writer
        self.last, self.full = (time.monotonic(), progress["images"]), False

    @contextlib.contextmanager
    def or_without(self, what: str) -> Iterator[None]:
        """A block that writes, and that a run can do without."""
        try:
            yield
            self.full = False
        except OSError as problem:
            if not self.full:
                why = f"COULD NOT BE WRITTEN ({problem.strerror})"
                print(f"{self.folder / what} {why}: free some space; training goes on")
            self.full, tensorboard, self.tensorboard = True, self.tensorboard, None
            with contextlib.suppress(OSError):
                if tensorboard:
                    tensorboard.close()

    def scalars(self, progress: dict[str, Any], **values: float) -> None:
        """Logs values at the current step."""
        row = {key: progress[key] for key in ("step", "epoch", "images")} | {"seconds": round(progress["seconds"], 3)}
        with self.or_without("metrics.jsonl"):
            with open(self.metrics, "a") as file:
                file.write(json.dumps(row | values) + "\n")
            for name, value in values.items() if self.tensorboard else ():
                self.tensorboard.add_scalar(name, value, progress["step"])

    def speed(self, images: int) -> float:
        """Images per second since the last call, given the number seen so far."""
        now, (then, before) = time.monotonic(), self.last
        self.last = (now, images)
        return (images - before) / (now - then)

    def grid(self, images: Tensor, step: int, name: str) -> None:
        """Writes sample images (B, C, H, W) in [0, 1] as a grid, and brings the loss curve up to date."""
        with self.or_without(name):
            plots.save_image(plots.grid(images), self.folder / name)
            plots.save_loss_curve(self.metrics, self.folder / "loss.png")
            if self.tensorboard:
                self.tensorboard.add_images("samples", images.clamp(0, 1), step)

    def close(self) -> None:
        """Flushes TensorBoard and draws the loss curve."""
        with self.or_without("loss.png"):
            if self.tensorboard:
                self.tensorboard.close()
            plots.save_loss_curve(self.metrics, self.folder / "loss.png")
