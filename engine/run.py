"""What a training run writes: folder and lock, metrics, checkpoints, sample grids, progress bar."""

import contextlib
import itertools
import json
import math
import time
import warnings
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from engine import checkpoints, plots
from engine.dataloader import BatchLoader
from engine.datasets import file_label
from engine.errors import FallbackWarning, UserError
from engine.progress import Progress, format_duration
from engine.trackers import VIEWERS, Tracker
from engine.train_step import TrainStep

SAMPLES_DIR = Path("samples")
MAX_GRIDS = 24  # that are read again
MAX_SILENCE = 60.0  # seconds without a logged step after which a run may have stopped
VERSION = 2  # of the layout of a checkpoint
ALWAYS_VALIDATE_EPOCHS = 5
VALIDATION_TIME_FRACTION = 0.02  # of the time, after those epochs


def new_run_name(config: Any) -> str:
    """Returns RUN_NAME, or a new name of data set, size and date.

    Raises UserError if RUN_NAME is taken or names no folder below the checkpoints'.
    """
    name = config.RUN_NAME
    folder = checkpoints.CHECKPOINT_DIR
    if name:
        if folder.resolve() not in (folder / name).resolve().parents:
            raise UserError(f"--run_name is {name}, but must name a folder below {folder}/")
        # A run that ended before it saved anything may start again.
        if checkpoints.run_exists(name) or (SAMPLES_DIR / name / "final.png").exists():
            advice = f"resume it (--resume {name}) or choose another --run_name"
            raise UserError(f"there is a run {name} already: {advice}")
        return name
    base = f"{file_label(config.DATASET)}-{config.IMAGE_SIZE}px-{datetime.now():%Y%m%d-%H%M%S}"
    for suffix in itertools.chain([""], (f"-{number}" for number in itertools.count(2))):
        with contextlib.suppress(FileExistsError):  # of a run that started in the same second
            (folder / (base + suffix)).mkdir(parents=True)
            return base + suffix


def resume_hint(name: str) -> str:
    """Returns what to do after a run has ended too early."""
    if (checkpoints.CHECKPOINT_DIR / name / "last.pt").exists():
        return f"resume with --resume {name}"
    return f"run {name} has saved nothing yet, start it again"


class MetricsLog:
    """Writes metrics to metrics.jsonl and a tracker, and sample grids; a full disk costs some."""

    def __init__(self, folder: Path, progress: Progress, tracker: Tracker):
        self.folder = folder
        self.metrics = folder / "metrics.jsonl"
        # Steps after the resumed checkpoint are done, and logged, again.
        kept = [row for row in plots.read_metrics(self.metrics) if row["step"] <= progress.step]
        checkpoints.write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        self.tracker = tracker

    def scalars(self, progress: Progress, **values: float) -> None:
        """Logs values at the current step."""
        row = {"step": progress.step, "epoch": progress.epoch, "images": progress.images}
        row |= {"seconds": round(progress.seconds, 3), **values}
        with tolerate_write_errors(self.folder), open(self.metrics, "a") as file:
            file.write(json.dumps(row) + "\n")
        self.tracker.log(values, progress.step)

    def grid(self, images: Tensor, step: int, file: str, columns: int | None = None) -> None:
        """Writes sample images (B, C, H, W) in [0, 1] as a grid and updates the loss curve."""
        with tolerate_write_errors(self.folder):
            plots.save_image(plots.grid(images, columns), self.folder / file)
            plots.save_loss_curve(self.metrics, self.folder / "loss.png")
        self.tracker.log_grid(self.folder / file, step)

    def close(self) -> None:
        """Closes the tracker and updates the loss curve."""
        self.tracker.close()
        with tolerate_write_errors(self.folder):
            plots.save_loss_curve(self.metrics, self.folder / "loss.png")


@contextlib.contextmanager
def tolerate_write_errors(path: Path) -> Iterator[None]:
    """Turns an OSError in the block into a warning."""
    try:
        yield
    except OSError as error:
        reason = f"writing {path} failed ({error.strerror})"
        warnings.warn(f"{reason}; continuing without it", FallbackWarning, stacklevel=2)


class NullRun:
    """Stands in for Run on ranks above 0 and does nothing."""

    def ignore(self, *_: object) -> None:
        pass

    __init__ = after_step = after_epoch = on_interrupt = on_finish = close = ignore


class Run:
    """Folder, lock, log, checkpoints and progress bar of a run, on rank 0.

    data_info: what is trained on, stored in checkpoints. Raises UserError if another process trains
    this run, and OSError if nothing can be written: before the first step, not after hours.
    """

    def __init__(
        self, name: str, data_info: dict[str, Any], step: TrainStep, loader: BatchLoader,
        progress: Progress,
    ):  # fmt: skip
        self.name = name
        self.data_info = data_info
        self.step = step
        self.config = step.config
        self.progress = progress

        # The folder: locked by this process, without what a killed one left.
        self.folder = checkpoints.CHECKPOINT_DIR / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / ".lock")
        try:
            self.lock.acquire(blocking=False)
        except Timeout:
            raise UserError(f"run {name} is being trained by another process") from None
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink()

        samples = SAMPLES_DIR / name
        samples.mkdir(parents=True, exist_ok=True)
        tracker = Tracker(self.config.LOG_WITH, name, samples, self.config.as_dict(), progress.step)
        self.log = MetricsLog(samples, progress, tracker)
        self.bar = tqdm(initial=progress.step, unit="step", mininterval=1, dynamic_ncols=True)
        self.validation_split = loader.validation()
        self.validation_loss = math.nan
        self.num_grids = self.grids_due()
        self.save_time = self.validate_time = self.log_time = time.monotonic()
        self.logged_images = progress.images

    def after_step(self, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        """Logs metrics, samples a grid and saves last.pt, each if it is due."""
        self.bar.update()
        if self.progress.is_log_step:
            self.log_step(loss, grad_norm, lr)
        # A grid at the end of each of NUM_SAMPLE_GRIDS parts of the run but the last.
        if self.num_grids < self.grids_due() < self.config.NUM_SAMPLE_GRIDS:
            self.sample_grid(f"step_{self.progress.step:07d}.png")
        self.num_grids = self.grids_due()
        if time.monotonic() - self.save_time >= 60 * self.config.SAVE_EVERY_MINUTES:
            self.save("last.pt")
            self.save_time = time.monotonic()

    def after_epoch(self) -> None:
        """Validates and keeps a checkpoint of the epoch, each if it is due."""
        epoch = self.progress.epoch
        is_due = epoch <= ALWAYS_VALIDATE_EPOCHS or time.monotonic() >= self.validate_time
        if is_due or self.progress.is_finished:
            self.validate()
        every = self.config.CHECKPOINT_EVERY
        if every and self.progress.epoch_step == 0 and epoch % every == 0:
            self.save(f"epoch_{epoch:04d}.pt")

    def on_interrupt(self) -> None:
        """Saves a run that stops here."""
        self.bar.close()
        self.save("last.pt")
        print(f"interrupted at step {self.progress.step}: {resume_hint(self.name)}")

    def on_finish(self) -> None:
        """Saves and publishes the final checkpoint, samples with it and prints where all is."""
        self.bar.close()
        if math.isnan(self.validation_loss):  # the last session ended after its last step
            self.validate()
        self.save("final.pt")
        published = checkpoints.CHECKPOINT_DIR / "ddpm_final.pt"
        for path in (self.folder / "last.pt", published):
            checkpoints.link_or_copy(self.folder / "final.pt", path)
        self.sample_grid("final.png")
        print(
            f"done: {self.progress.images:,} images in {self.progress.seconds:.0f} s, "
            f"validation loss {self.validation_loss:.4f}\n"
            f"  model    {published} (other checkpoints: {self.folder}/)\n"
            f"  samples  {self.log.folder}/ (metrics: {VIEWERS[self.config.LOG_WITH]})\n"
            "  next     python inference.py"
        )

    def close(self) -> None:
        """Closes log and progress bar and unlocks the folder."""
        self.bar.close()
        self.log.close()
        self.lock.release()

    def log_step(self, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        """Logs a step; the bar shows its loss, and the speed since the last that was logged."""
        progress = self.progress
        now = time.monotonic()
        speed = (progress.images - self.logged_images) / (now - self.log_time)
        self.log_time = now
        self.logged_images = progress.images
        self.log.scalars(
            progress, loss=loss.item(), learning_rate=lr, gradient_norm=grad_norm.item(),
            images_per_second=speed, skipped=self.step.skipped_updates.item(),
            fraction=min(1.0, progress.fraction),
        )  # fmt: skip
        self.bar.total = progress.estimated_steps
        self.bar.set_postfix_str(f"loss {loss.item():.4f}, {speed:.0f} images/s", refresh=False)

    def validate(self) -> None:
        """Validates, and saves best.pt if the loss is the lowest so far."""
        start = time.monotonic()
        self.validation_loss = self.step.validate(self.validation_split)
        self.log.scalars(self.progress, validation_loss=self.validation_loss)
        if self.progress.best is None or self.validation_loss < self.progress.best:
            self.progress.best = self.validation_loss
            self.save("best.pt")
        self.validate_time = start + (time.monotonic() - start) / VALIDATION_TIME_FRACTION

    def grids_due(self) -> int:
        """Returns how many sample grids there should be by now."""
        return int(self.progress.fraction * self.config.NUM_SAMPLE_GRIDS)

    def sample_grid(self, file: str) -> None:
        """Samples with the EMA weights, a row for each class; lack of memory stops no training."""
        seeds = list(range(self.config.GRID_IMAGES))
        columns = None
        labels: list[int] = []
        if num_classes := len(getattr(self.step.ema, "class_names", ())):
            rows = min(num_classes, len(seeds))
            columns = len(seeds) // rows
            seeds = seeds[:columns] * rows
            labels = [row for row in range(rows) for _ in range(columns)]

        def sample(part: slice) -> Tensor:
            options = {"labels": labels[part]} if labels else {}
            return self.step.ema.sample(len(seeds[part]), seed=seeds[part], **options).cpu()

        try:
            images = torch.cat(self.step.map_eval_batches(len(seeds), sample))
        except UserError as error:
            warnings.warn(f"{file} failed ({error}); continuing without it", FallbackWarning, 2)
        else:
            self.log.grid(images, self.progress.step, file, columns)

    def save(self, file: str) -> None:
        """Writes a checkpoint; training continues if it cannot, but does not finish."""
        state = self.step.state_dict() | {
            "version": VERSION, "run": self.name, "data": self.data_info,
            "architecture": self.step.model.architecture, "config": self.config.as_dict(),
            "progress": self.progress.state_dict(),
        }  # fmt: skip
        is_final = file == "final.pt"
        with contextlib.nullcontext() if is_final else tolerate_write_errors(self.folder / file):
            checkpoints.save(self.folder / file, state)


# Runs as they are read again, while they train or later.


def find_runs() -> list[str]:
    """Returns the names of the runs that have logged anything, the newest first."""
    files = sorted(SAMPLES_DIR.rglob("metrics.jsonl"), key=lambda file: -file.stat().st_mtime)
    return [file.parent.relative_to(SAMPLES_DIR).as_posix() for file in files]


def run_version(name: str) -> tuple[Any, ...]:
    """Returns a run's name and what changes with its files."""
    folder = SAMPLES_DIR / name
    files = [folder / "metrics.jsonl", *sorted(folder.glob("*.png"))]
    return name, *((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)


@lru_cache(maxsize=8)
def read_run(version: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Returns the metrics of a run. version: its run_version."""
    return plots.read_metrics(SAMPLES_DIR / version[0] / "metrics.jsonl")


@lru_cache(maxsize=8)
def plot_run(version: tuple[Any, ...]) -> str:
    """Returns the loss curve of a run as a data URI. version: its run_version."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "loss.png"
        plots.save_loss_curve(SAMPLES_DIR / version[0] / "metrics.jsonl", path)
        return plots.png_data_uri(path.read_bytes())


def run_grids(name: str) -> list[tuple[str, str]]:
    """Returns (data URI, caption) of a run's sample grids in order, MAX_GRIDS at most."""
    folder = SAMPLES_DIR / name
    steps = sorted(folder.glob("step_*.png"), reverse=True)
    paths = [*folder.glob("final.png"), *steps]
    every = -(-len(paths) // MAX_GRIDS) or 1
    shown = paths[::every][::-1]  # with the newest
    return [(plots.png_data_uri(path.read_bytes()), caption_of(path)) for path in shown]


def caption_of(grid: Path) -> str:
    """Returns `step 1200` for step_0001200.png, else the name."""
    name, _, step = grid.stem.partition("_")
    return f"{name} {int(step):,}" if step.isdecimal() else grid.stem


def describe_run(version: tuple[Any, ...], now: float) -> dict[str, str]:
    """Returns the figures of a run by name, formatted. now: seconds since the epoch."""
    folder = SAMPLES_DIR / version[0]
    rows = read_run(version)
    steps = [row for row in rows if "loss" in row]
    validations = [row["validation_loss"] for row in rows if "validation_loss" in row]
    if not steps:
        return {"state": "starting"}
    last = steps[-1]
    speeds = [row["images_per_second"] for row in steps[-10:]]

    # Runs of earlier versions have no fraction.
    fraction = last.get("fraction")
    left = format_duration(last["seconds"] * (1 / fraction - 1)) if fraction else "-"
    silence = now - (folder / "metrics.jsonl").stat().st_mtime
    state = "training" if silence < MAX_SILENCE else f"silent for {format_duration(silence)}"
    if (folder / "final.png").exists() and (fraction or 1) >= 1:
        state, left = "finished", "-"
    return {
        "state": state,
        "time left": left,
        "trained for": format_duration(last["seconds"]),
        "speed": f"{sum(speeds) / len(speeds):,.0f} images/s",
        "step": f"{last['step']:,}",
        "epoch": f"{last['epoch']:,}",
        "images": f"{last['images']:,}",
        "loss": f"{last['loss']:.4f}",
        "validation loss": f"{validations[-1]:.4f}" if validations else "-",
    }
