"""The training loop, from the first step to the last checkpoint."""

import statistics
import time
import warnings
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from engine import checkpoints, distributed, run_names
from engine.checkpoints import TrainingCheckpoint
from engine.dataloader import Batch, BatchLoader, ImageDataset
from engine.denoiser import GUIDANCE_OPTIONS
from engine.devices import default_device, device_name
from engine.errors import FallbackWarning, UserError
from engine.labels import check_classes_on_resume
from engine.progress import Progress, StopSignal, format_duration
from engine.randomness import seed_everything
from engine.run import VERSION, NullRun, Run, checkpoint_bytes, format_bytes, max_checkpoints
from engine.train_step import TrainableModel, TrainStep, learning_rate

MAX_NONFINITE_STEPS = 20  # in a row
# The guide is an earlier copy of the network, which samples are moved away from (autoguidance). It
# is not saved before this many times WARMUP_STEPS:
GUIDE_WARMUPS = 5  # in the first half of a run
LATE_GUIDE_WARMUPS = 2  # in the second
# A shorter step's time is not proportional to its images, of which estimate then takes more.
SHORT_STEP_SECONDS = 0.5
# Of the architecture; check_classes_on_resume says which classes may change.
MUTABLE_ON_RESUME = {*GUIDANCE_OPTIONS, "sampling_timesteps", "dropout", "class_counts"}


def train(
    model: TrainableModel, data: ImageDataset | np.ndarray, config: Any,
    resume: TrainingCheckpoint | Path | str | None = None,
) -> Path:  # fmt: skip
    """Trains until the configured length is reached and returns the final checkpoint.

    data: a data set, or uint8 images (N, C, H, W). config: the attributes of DDPMConfig. Under
    torchrun or `accelerate launch` every rank calls this; rank 0 writes the files. Raises UserError
    for data that does not fit or a loss that stays non-finite, and SystemExit, with everything
    saved, on SIGINT or SIGTERM.
    """
    # Setup: ranks, batches, model with its optimizer.
    dist = distributed.init()
    data = data if isinstance(data, ImageDataset) else ImageDataset(data)
    loader, train_step = set_up(model, data, config, dist)

    # A new run, or one that continues from a checkpoint.
    is_path = isinstance(resume, (str, Path))
    checkpoint = checkpoints.load_training(Path(resume)) if is_path else resume
    data_info = {
        "dataset": config.DATASET, "images": len(data), "shape": [*data.images.shape[1:]],
        "fingerprint": data.fingerprint(),
    }  # fmt: skip
    name, progress = start_or_resume(checkpoint, data_info, train_step, loader, dist)
    run = (Run if dist.is_main_process else NullRun)(name, data_info, train_step, loader, progress)
    hint = partial(run_names.resume_hint, name)

    with distributed.session(hint), StopSignal(dist, hint) as stop, closing(run):
        while not progress.is_finished:
            for batch in loader.epoch(progress.epoch, start=progress.epoch_step):
                # Gradient, optimizer, EMA.
                lr = learning_rate(
                    config.LEARNING_RATE, config.LR_SCHEDULE, progress.step, config.WARMUP_STEPS,
                    progress.fraction,
                )  # fmt: skip
                train_step.set_fraction(progress.fraction)
                loss, grad_norm = train_step(batch, progress.step, lr)
                progress.advance(loader.effective_batch)
                if should_snapshot_guide(train_step, progress):
                    train_step.ema.snapshot_guide()

                # Metrics, sample grid, last.pt: each if due.
                if progress.is_log_step:
                    abort_if_diverged(train_step, progress.step, name)
                run.after_step(loss, grad_norm, lr)

                # Stop on SIGINT, SIGTERM or the end.
                if progress.is_finished:
                    break
                if stop.requested(progress.step):
                    run.on_interrupt()
                    # Wait for rank 0, which may be writing: the launcher ends all once one exits.
                    distributed.broadcast_object(None)
                    raise SystemExit(128 + stop.number)
            # Validation, best.pt, the epoch's checkpoint: if due, also after part of an epoch.
            progress.end_epoch()
            run.after_epoch()
        if config.MINUTES and dist.is_main_process:
            warn_if_short(config, progress.step)
        run.on_finish()
    return checkpoints.CHECKPOINT_DIR / name / "final.pt"


def set_up(
    model: TrainableModel, data: ImageDataset, config: Any, dist: PartialState
) -> tuple[BatchLoader, TrainStep]:
    """Returns this rank's batches, and the training step on this rank's device.

    Raises UserError if the images are not uint8, do not fit the model or are fewer than a batch.
    """
    rank = dist.process_index
    world_size = dist.num_processes
    device = default_device()
    torch.backends.cudnn.benchmark = True
    seed_everything(config.SEED + rank)
    shape = (model.channels, model.image_size, model.image_size)
    if data.images.dtype != np.uint8:
        raise UserError(f"the images are {data.images.dtype}, but must be uint8, 0 to 255")
    if data.images.shape[1:] != shape:
        raise UserError(f"the images are {data.images.shape[1:]}, but the model's must be {shape}")
    if getattr(model, "class_names", ()) and data.labels is None:
        reason = "the model has classes, but the images have no labels"
        warnings.warn(f"{reason}; continuing without labels", FallbackWarning, stacklevel=3)
    if not (config.MINUTES or config.MAX_STEPS or config.EPOCHS):
        raise UserError("the run has no length. Set EPOCHS, MAX_STEPS or MINUTES")
    effective_batch = config.BATCH_SIZE * config.GRADIENT_ACCUMULATION
    loader = BatchLoader(
        data, effective_batch, config.SEED, device, config.NUM_WORKERS, rank, world_size
    )
    return loader, TrainStep(model.to(device).train(), config, rank, world_size)


def start_or_resume(
    checkpoint: TrainingCheckpoint | None, data_info: dict[str, Any], train_step: TrainStep,
    loader: BatchLoader, dist: PartialState,
) -> tuple[str, Progress]:  # fmt: skip
    """Returns the name of the run, a new one without a checkpoint, and its progress.

    Prints the name. Raises UserError if that run is finished, or as restore does.
    """
    if checkpoint:
        problem = "does not fit this model, or is damaged"
        with checkpoints.refuse_damaged(checkpoint.path, problem):
            progress = restore(checkpoint, data_info, train_step, loader, dist)
        name = run_names.resumed_run_name(checkpoint) if dist.is_main_process else ""
    else:
        name = run_names.new_run_name(train_step.config) if dist.is_main_process else ""
        progress = Progress(train_step.config, len(loader), dist)
    name = distributed.broadcast_object(name)
    if progress.is_finished and run_names.is_complete(name, progress.step):
        # Temporary files of a process that was killed while it plotted.
        checkpoints.remove_leftovers(run_names.SAMPLES_DIR / name)
        advice = "Raise --epochs, --max_steps or --minutes to continue it"
        raise UserError(f"{checkpoint.path} is of a finished run. {advice}")
    count = len(loader.train_indices)
    distributed.print0(f"run {name}: {count} images, {describe_step(train_step)}")
    if progress.config.EPOCHS and dist.is_main_process:
        warn_if_short(progress.config, progress.estimated_steps)
    return name, progress


def warn_if_short(config: Any, steps: float) -> None:
    """Warns if most of a run is warm-up, unless it was limited to a number of steps.

    should_snapshot_guide saves no guide before LATE_GUIDE_WARMUPS times the warm-up.
    """
    if steps <= LATE_GUIDE_WARMUPS * config.WARMUP_STEPS and not config.MAX_STEPS:
        found = f"only {steps:,.0f} steps, with a warm-up of {config.WARMUP_STEPS:,}"
        without = "; continuing without a guide" if config.GUIDE_FRACTION else ""
        advice = "Train longer (--minutes or --epochs), or lower --warmup_steps"
        warnings.warn(f"{found}{without}. {advice}", FallbackWarning, stacklevel=3)


def restore(
    checkpoint: TrainingCheckpoint, data_info: dict[str, Any], train_step: TrainStep,
    loader: BatchLoader, dist: PartialState,
) -> Progress:  # fmt: skip
    """Restores model, optimizer and random state; returns the progress.

    Raises UserError if the checkpoint is of other data or another architecture.
    """
    # What must be the same as before.
    path = checkpoint.path
    state = checkpoint.state
    if state["version"] != VERSION:
        raise UserError(f"{path} was written by another version of this project. Start another run")
    old_data = state["data"]
    if "fingerprint" not in old_data:
        distributed.print0(f"note: {path} does not say which images it was trained on")
        old_data = old_data | {"fingerprint": data_info["fingerprint"]}
    if old_data != data_info:
        advice = f"To train on other data from its weights, start a new run with --init_from {path}"
        raise UserError(f"{path} was trained on {old_data}, but the data is {data_info}. {advice}")
    saved = state["architecture"]
    if hasattr(train_step.model, "upgrade_architecture"):
        saved = train_step.model.upgrade_architecture(saved)
    expected = train_step.model.architecture
    checkpoints.check_architecture(path, saved, expected, MUTABLE_ON_RESUME, "Start another run")
    counts = (architecture.get("class_counts", {}) for architecture in (saved, expected))
    check_classes_on_resume(path, *counts)

    # Progress; with another batch size an epoch continues after the same number of images.
    fields = dict(state["progress"])
    previous_batch = state["config"]["BATCH_SIZE"] * state["config"]["GRADIENT_ACCUMULATION"]
    position = fields.pop("position") * previous_batch // loader.effective_batch
    fields["epoch_step"] = min(position, len(loader))
    progress = Progress(train_step.config, len(loader), dist, **fields)

    train_step.load_state_dict(state)
    if train_step.rank > 0:  # only rank 0's random state is stored: take a seed not used yet
        offset = train_step.rank + train_step.world_size * progress.step
        seed_everything(train_step.config.SEED + offset)
    return progress


def abort_if_diverged(train_step: TrainStep, step: int, name: str) -> None:
    """Raises UserError if the last MAX_NONFINITE_STEPS updates were not finite."""
    if train_step.consecutive_skips.item() >= MAX_NONFINITE_STEPS:
        reason = f"{MAX_NONFINITE_STEPS} updates in a row were not finite; stopped at step {step}"
        advice = f"{run_names.resume_hint(name)} with a lower --learning_rate"
        advice += " or --no-use_amp" if train_step.config.USE_AMP else ""
        raise UserError(f"{reason}. {advice}", exit_code=1)


def should_snapshot_guide(train_step: TrainStep, progress: Progress) -> bool:
    """Whether the EMA weights are now to be saved as the guide: at GUIDE_FRACTION of the run.

    But not before GUIDE_WARMUPS times the warm-up: a guide that knows little makes samples worse
    than none does. From half of the run on, LATE_GUIDE_WARMUPS are enough.
    """
    config = train_step.config
    is_due = 0 < config.GUIDE_FRACTION <= progress.fraction < 1  # at 1 it would be the model
    warmups = LATE_GUIDE_WARMUPS if progress.fraction >= 0.5 else GUIDE_WARMUPS
    is_trained = progress.step >= warmups * config.WARMUP_STEPS
    return train_step.ema.guide is None and is_due and is_trained


def describe_step(train_step: TrainStep) -> str:
    """Returns size, batch, precision and device of a training step in one line."""
    config = train_step.config
    accumulation = config.GRADIENT_ACCUMULATION
    split = f" = {accumulation} x {config.BATCH_SIZE}" if accumulation > 1 else ""
    options = {
        "compiled": config.COMPILE_MODEL, "CUDA graphs": train_step.graphs is not None,
        "gradient checkpointing": config.GRADIENT_CHECKPOINTING,
    }  # fmt: skip
    device = device_name(train_step.device)
    parts = [
        f"{sum(p.numel() for p in train_step.param_views) / 1e6:.1f} M parameters",
        f"batch {config.BATCH_SIZE * accumulation}{split}",
        str(train_step.amp_dtype).removeprefix("torch.") if config.USE_AMP else "float32",
        *(name for name, is_on in options.items() if is_on),
        device if train_step.world_size == 1 else f"{train_step.world_size} x {device}",
    ]
    return ", ".join(parts)


def measure_step(train_step: TrainStep, count: int) -> float:
    """Returns the seconds of a step on `count` random images."""
    model = train_step.model
    shape = (count, model.channels, model.image_size, model.image_size)
    batch = Batch(torch.randint(256, shape, dtype=torch.uint8, device=train_step.device))
    times = []
    for number in range(4):
        start = time.perf_counter()
        train_step(batch, number, 0.0)[0].item()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def estimate(model: TrainableModel, num_images: int, config: Any, memory_gib: float) -> str:
    """Measures a few steps on random images; returns a run's memory, steps and time.

    memory_gib: an estimate, returned instead of the peak where there is no GPU.
    """
    # Time of a rank's step. On a CPU a large one takes minutes, so it starts with few images.
    dist = distributed.init()
    device = default_device()
    train_step = TrainStep(model.to(device).train(), config)
    is_cuda = device.type == "cuda"
    effective_batch = config.BATCH_SIZE * config.GRADIENT_ACCUMULATION
    local_batch = -(-effective_batch // dist.num_processes)
    limit = min(config.BATCH_SIZE, local_batch)
    count = limit if is_cuda else min(limit, 8)
    seconds = measure_step(train_step, count)
    while count < limit and seconds < SHORT_STEP_SECONDS:
        count = min(limit, 2 * count)
        seconds = measure_step(train_step, count)
    seconds *= effective_batch / count / dist.num_processes

    # Length of the run. Too few images are an error, as in the run itself.
    fake = ImageDataset(np.empty((num_images, 1, 1, 1), np.uint8))
    steps_per_epoch = len(BatchLoader(fake, effective_batch, 0, torch.device("cpu"), 1))
    steps = Progress(config, steps_per_epoch, dist).estimated_steps
    steps = 60 * config.MINUTES / seconds if config.MINUTES else steps
    warn_if_short(config, steps)
    duration = format_duration(steps * seconds)
    length = f"{steps:,.0f} steps, {steps / steps_per_epoch:.1f} epochs, about {duration}"
    peak = torch.cuda.max_memory_allocated() / 2**30 if is_cuda else memory_gib
    how = "measured, without the data and what CUDA itself takes" if is_cuda else "estimated"
    memory = f"memory {peak:.1f} GiB ({how})"
    num_files = max_checkpoints(config, steps / steps_per_epoch)
    size = checkpoint_bytes(train_step)
    disk = f"disk {format_bytes(num_files * size)} at most ({num_files} x {format_bytes(size)})"
    measured = f"({seconds:.3f} s per step, measured)"
    return f"{describe_step(train_step)}\n{memory}\n{disk}\n{length} {measured}"
