"""What a training run writes: folder and lock, metrics, checkpoints, sample grids, progress bar."""

import contextlib
import json
import math
import shutil
import time
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from engine import checkpoints, plots
from engine.dataloader import BatchLoader
from engine.errors import FallbackWarning, UserError, warn_fallback
from engine.progress import Progress
from engine.run_names import SAMPLES_DIR, resume_hint
from engine.trackers import VIEWERS, Tracker
from engine.train_step import TrainStep

VERSION = 2  # of the layout of a checkpoint
ALWAYS_VALIDATE_EPOCHS = 5
VALIDATION_TIME_FRACTION = 0.02  # of the time, after those epochs
GRID_TIME_FRACTION = 0.1  # of the time of a --minutes run; on a CPU a grid may take half a minute


class MetricsLog:
    """Writes metrics to metrics.jsonl and a tracker, and sample grids; write errors only warn."""

    def __init__(self, folder: Path, progress: Progress, tracker: Tracker):
        self.folder = folder
        self.metrics_file = folder / "metrics.jsonl"
        # Steps after the resumed checkpoint are done, and logged, again.
        kept = [
            row for row in plots.read_metrics(self.metrics_file) if row["step"] <= progress.step
        ]
        checkpoints.write_text(self.metrics_file, "".join(json.dumps(row) + "\n" for row in kept))
        self.validation_losses = {
            row["step"]: row["validation_loss"] for row in kept if "validation_loss" in row
        }
        self.tracker = tracker

    def write_scalars(self, progress: Progress, **values: float) -> None:
        """Logs values at the current step."""
        row = {"step": progress.step, "epoch": progress.epoch, "images": progress.images}
        row |= {"seconds": round(progress.seconds, 3), **values}
        with tolerate_write_errors(self.folder), open(self.metrics_file, "a") as file:
            file.write(json.dumps(row) + "\n")
        self.tracker.log(values, progress.step)

    def write_validation_loss(self, progress: Progress, loss: float) -> None:
        """Logs the validation loss of a step, unless the session that was resumed has."""
        if progress.step not in self.validation_losses:
            self.validation_losses[progress.step] = loss
            self.write_scalars(progress, validation_loss=loss)

    def write_grid(self, grid: Image.Image, step: int, file: str) -> None:
        """Writes a grid of samples and updates the loss curve."""
        with tolerate_write_errors(self.folder):
            plots.save_image(grid, self.folder / file)
            plots.save_loss_curve(self.metrics_file, self.folder / "loss.png")
        self.tracker.log_grid(self.folder / file, step)

    def close(self) -> None:
        """Closes the tracker and updates the loss curve."""
        self.tracker.close()
        with tolerate_write_errors(self.folder):
            plots.save_loss_curve(self.metrics_file, self.folder / "loss.png")


@contextlib.contextmanager
def tolerate_write_errors(path: Path, errors: Any = Exception) -> Iterator[None]:
    """Turns an error of writing or plotting in the block into a warning."""
    try:
        yield
    except errors as error:  # what a plot raises must not end a run either
        reason = f"writing {path} failed ({getattr(error, 'strerror', None) or repr(error)})"
        warnings.warn(f"{reason}; continuing without it", FallbackWarning, stacklevel=2)


def checkpoint_bytes(train_step: TrainStep) -> int:
    """Returns the size of a checkpoint, with the guide that it will have."""
    state = train_step.state_dict()
    parts = state["model"], state["ema"], *state["optimizer"].values()
    values = [value for part in parts for value in part.values() if isinstance(value, Tensor)]
    sizes = {value.data_ptr(): value.nbytes for value in values}  # what they share is held once
    needs_guide = 0 < train_step.config.GUIDE_FRACTION < 1 and train_step.ema.guide is None
    return sum(sizes.values()) + (train_step.params.nbytes if needs_guide else 0)


def format_bytes(count: float) -> str:
    """Returns a number of bytes in GB, or MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def max_checkpoints(config: Any, epochs: float) -> int:
    """Returns how many checkpoints a run of some epochs has on disk at the same time."""
    every = config.CHECKPOINT_EVERY
    of_epochs = epochs // every if every else 0
    kept = config.KEEP if every is None else of_epochs
    return int(kept) + 3  # last.pt (at the end a link to final.pt), best.pt, one being written


class NullRun:
    """Stands in for Run on ranks above 0 and does nothing."""

    def ignore(self, *_: object) -> None:
        pass

    __init__ = ignore
    after_step = ignore
    after_epoch = ignore
    on_interrupt = ignore
    on_finish = ignore
    close = ignore


class Run:
    """Folder, lock, log, checkpoints and progress bar of a run, on rank 0.

    data_info: what is trained on, stored in checkpoints. Raises UserError if another process trains
    this run, and OSError if nothing can be written: before the first step, not after hours.
    """

    def __init__(
        self, name: str, data_info: dict[str, Any], train_step: TrainStep,
        loader: BatchLoader, progress: Progress,
    ):  # fmt: skip
        self.name = name
        self.data_info = data_info
        self.train_step = train_step
        self.config = train_step.config
        self.progress = progress

        # The folders: locked by this process, without leftovers of a killed one.
        self.folder = checkpoints.CHECKPOINT_DIR / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / ".lock")
        try:
            self.lock.acquire(blocking=False)
        except Timeout:
            raise UserError(f"run {name} is being trained by another process") from None
        samples = SAMPLES_DIR / name
        samples.mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, samples):
            checkpoints.remove_leftovers(folder)
        self.warn_of_small_disk()

        tracker = Tracker(self.config.LOG_WITH, name, samples, self.config.as_dict(), progress.step)
        self.log = MetricsLog(samples, progress, tracker)
        self.bar = tqdm(initial=progress.step, unit="step", mininterval=1, dynamic_ncols=True)
        self.validation_split = loader.validation()
        self.validation_loss = self.log.validation_losses.get(progress.step, math.nan)
        self.last_fraction = progress.fraction
        self.last_log_time = time.monotonic()
        self.last_save_time = self.last_log_time
        self.next_validation_time = self.last_log_time
        self.next_grid_time = self.last_log_time
        self.logged_images = progress.images

    def after_step(self, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        """Logs metrics, samples a grid and saves checkpoints, each if it is due."""
        self.bar.update()
        if self.progress.is_log_step:
            self.log_step(loss, grad_norm, lr)
        start = time.monotonic()
        if self.ends_part(self.config.NUM_SAMPLE_GRIDS) and start >= self.next_grid_time:
            self.sample_grid(f"step_{self.progress.step:07d}.png")
            if self.config.MINUTES:  # where time for grids is taken from training
                self.next_grid_time = start + (time.monotonic() - start) / GRID_TIME_FRACTION
        if self.config.CHECKPOINT_EVERY is None and self.ends_part(self.config.KEEP + 1):
            self.save(f"step_{self.progress.step:07d}.pt")
        self.last_fraction = self.progress.fraction
        if time.monotonic() - self.last_save_time >= 60 * self.config.SAVE_EVERY_MINUTES:
            self.save("last.pt")
            self.last_save_time = time.monotonic()

    def after_epoch(self) -> None:
        """Validates and keeps a checkpoint of the epoch, each if it is due."""
        epoch = self.progress.epoch
        is_due = epoch <= ALWAYS_VALIDATE_EPOCHS or time.monotonic() >= self.next_validation_time
        if is_due or self.progress.is_finished:
            self.validate()
        every = self.config.CHECKPOINT_EVERY
        if every and self.config.MINUTES and epoch == 1:  # now it is known how many there will be
            self.warn_of_small_disk()
        if every and self.progress.epoch_step == 0 and epoch % every == 0:
            self.save(f"epoch_{epoch:04d}.pt")

    def on_interrupt(self) -> None:
        """Saves a run that stops here."""
        self.bar.close()
        self.save_at_the_end("last.pt")
        print(f"interrupted at step {self.progress.step}. {resume_hint(self.name)}")

    def on_finish(self) -> None:
        """Saves and publishes the final checkpoint, samples from it and prints the paths."""
        self.bar.close()
        if math.isnan(self.validation_loss):  # the last session ended after its last step
            self.validate()
        self.save_at_the_end("final.pt")
        if not math.isfinite(self.validation_loss):
            advice = "Start again with a lower --learning_rate"
            raise UserError(f"the validation loss is {self.validation_loss}. {advice}", exit_code=1)
        published = checkpoints.CHECKPOINT_DIR / "ddpm_final.pt"
        for path in (self.folder / "last.pt", published):
            checkpoints.link_or_copy(self.folder / "final.pt", path)
        self.sample_grid("final.png")
        print(
            f"done: {self.progress.step:,} steps, {self.progress.images:,} images in "
            f"{self.progress.seconds:.0f} s, "
            f"validation loss {self.validation_loss:.4f}\n"
            f"  model    {published} (other checkpoints: {self.folder}/)\n"
            f"  samples  {self.log.folder}/ (metrics: {VIEWERS[self.config.LOG_WITH]})\n"
            "  next     python inference.py"
        )

    def save_at_the_end(self, file: str) -> None:
        """Writes a checkpoint; if it does not fit, the EMA weights alone, and raises OSError."""
        try:
            self.save(file, tolerated=())
        except OSError:
            self.save_weights()
            print(f"step {self.progress.step} could not be saved. {resume_hint(self.name)}")
            raise

    def save_weights(self) -> None:
        """Writes the EMA weights alone, for which a disk that is too full for more may have room.

        A run cannot resume from them, but they can be sampled from.
        """
        path = self.folder / "weights.safetensors"
        with tolerate_write_errors(path):
            self.train_step.ema.save_model(path)
            print(f"the weights alone are in {path}, to sample from and for --init_from")

    def close(self) -> None:
        """Closes log and progress bar and unlocks the folder."""
        self.bar.close()
        self.log.close()
        self.lock.release()

    def log_step(self, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        """Logs a step; the bar shows its loss, and the speed since the last logged one."""
        progress = self.progress
        now = time.monotonic()
        speed = (progress.images - self.logged_images) / (now - self.last_log_time)
        self.last_log_time = now
        self.logged_images = progress.images
        self.log.write_scalars(
            progress, loss=loss.item(), learning_rate=lr, gradient_norm=grad_norm.item(),
            images_per_second=speed, skipped=self.train_step.skipped_updates.item(),
            fraction=min(1.0, progress.fraction),
        )  # fmt: skip
        self.bar.total = progress.estimated_steps
        self.bar.set_postfix_str(f"loss {loss.item():.4f}, {speed:.0f} images/s", refresh=False)

    def validate(self) -> None:
        """Validates, and saves best.pt if the loss is the lowest so far."""
        start = time.monotonic()
        self.validation_loss = self.train_step.validate(self.validation_split)
        self.log.write_validation_loss(self.progress, self.validation_loss)
        best = math.inf if self.progress.best is None else self.progress.best
        if -math.inf < self.validation_loss < best:  # NaN is neither
            self.progress.best = self.validation_loss
            self.save("best.pt")
        duration = time.monotonic() - start
        self.next_validation_time = start + duration / VALIDATION_TIME_FRACTION

    def ends_part(self, parts: int) -> bool:
        """Whether the last step crossed a boundary between `parts` equal parts of the run."""
        return int(self.last_fraction * parts) < int(self.progress.fraction * parts) < parts

    def warn_of_small_disk(self) -> None:
        """Warns if the run's checkpoints will not fit on the disk."""
        epochs = self.progress.estimated_steps / self.progress.steps_per_epoch
        needed = max_checkpoints(self.config, epochs) * checkpoint_bytes(self.train_step)
        needed -= sum(file.stat().st_size for file in self.folder.glob("*.pt"))
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            every = self.config.CHECKPOINT_EVERY
            advice = {None: "lower --keep, or ", 0: ""}.get(every, "raise --checkpoint_every, or ")
            need = f"the checkpoints may need {format_bytes(needed)}, but {self.folder}/ has only"
            reason = f"{need} {format_bytes(free)} free ({advice}free some)"
            warnings.warn(f"{reason}; continuing without what will not fit", FallbackWarning, 3)

    def sample_grid(self, file: str) -> None:
        """Samples with the EMA weights, a class in each row; no failure stops training."""
        # With classes, at most 1.6 times as many rows as columns, spread evenly over the classes.
        seeds = list(range(self.config.GRID_IMAGES))
        columns = None
        labels: list[int] = []
        class_names = getattr(self.train_step.ema, "class_names", ())
        if class_names:
            rows = min(len(class_names), int((1.6 * len(seeds)) ** 0.5))
            columns = len(seeds) // rows
            seeds = seeds[:columns] * rows
            labels = [row * len(class_names) // rows for row in range(rows) for _ in range(columns)]

        # One block of whole rows for each number of sampler steps.
        grid_steps = getattr(self.train_step.ema, "grid_steps", ())
        if grid_steps and not labels:
            columns = math.isqrt(len(seeds))
            seeds = seeds[: len(seeds) // columns * columns]

        def sample(steps: int | None, part: slice) -> Tensor:
            options = {"labels": labels[part]} if labels else {}
            options |= {"steps": steps} if steps else {}
            return self.train_step.ema.sample(len(seeds[part]), seed=seeds[part], **options).cpu()

        try:
            batches = (
                self.train_step.map_eval_batches(len(seeds), partial(sample, steps))
                for steps in grid_steps or (None,)
            )
            images = torch.cat(list(chain.from_iterable(batches)))
            if labels:
                names = [class_names[i] for i in labels[::columns]]
                if grid_steps:
                    steps = [f"{count} step{'s' * (count > 1)}" for count in grid_steps]
                    names = [f"{name}, {each}" for each in steps for name in names]
                grid = plots.table(images, names, [f"seed {i}" for i in range(columns)])
            else:
                grid = plots.grid(images, columns)
        except Exception as error:
            warn_fallback(file, error)
        else:
            self.log.write_grid(grid, self.progress.step, file)

    def save(self, file: str, tolerated: Any = OSError) -> None:
        """Writes a checkpoint. A tolerated error is a warning."""
        state = self.train_step.state_dict() | {
            "version": VERSION, "run": self.name, "data": self.data_info,
            "architecture": self.train_step.model.architecture, "config": self.config.as_dict(),
            "progress": self.progress.state_dict(),
        }  # fmt: skip
        with tolerate_write_errors(self.folder / file, tolerated):
            checkpoints.save(self.folder / file, state)
