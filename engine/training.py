"""The training loop, from the first step to the last checkpoint."""

import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from engine import checkpoints
from engine.batches import Batches
from engine.errors import UserError
from engine.processes import from_first, join, together
from engine.runs import LOG_EVERY, SAMPLES, Clock, Interrupt, Log, new_name
from engine.samplers import groups
from engine.step import Step, learning_rate

MOST_SKIPPED_IN_A_ROW = 20
VERSION = 2  # of the layout of a checkpoint
ASIDE = 0.02  # share of the time that validation, and keeping what it found best, may take...
ALWAYS = 5  # ...after so many epochs


def train(model: nn.Module, images: np.ndarray, config: Any, resume: Path | None = None) -> Path:
    """Trains until the configured length is reached and returns the final checkpoint.

    model: called as model(images, t, noise), with `sample`, `architecture`, `timesteps_at`, `guide` and `keep_guide`.
    images: uint8 (N, C, H, W). config: the attributes of DDPMConfig. resume: a checkpoint to go on from. Under
    `accelerate launch` or torchrun every process calls this and only the first writes. Raises UserError for data that
    does not fit or a loss that stays non-finite, and SystemExit, with everything saved, on Ctrl-C or SIGTERM.
    """
    processes = join()
    main, device, rank = processes.is_main_process, processes.device, processes.process_index
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(config.SEED + rank)  # dropout; what else is random is drawn in engine.step
    random.seed(config.SEED + rank)
    effective_batch = config.BATCH_SIZE * config.GRADIENT_ACCUMULATION
    batches = Batches(
        images, effective_batch, config.SEED, device, config.NUM_WORKERS, rank, processes.num_processes
    )  # fmt: skip
    step = Step(model.to(device).train(), config, rank, processes.num_processes)
    data = {"dataset": config.DATASET, "images": len(images), "shape": list(images.shape[1:])}
    progress: dict[str, Any] = {"step": 0, "epoch": 0, "position": 0, "images": 0, "seconds": 0.0, "best": None}
    if resume:
        state = checkpoints.load_training(resume)
        if state["version"] != VERSION:
            raise UserError(f"{resume} was written by another version of this project and cannot be resumed")
        if state["data"] != data:
            raise UserError(f"{resume} was trained on {state['data']}, but what is here is {data}")
        step.load_state_dict(state)
        progress = state["progress"]
        before = state["config"]["BATCH_SIZE"] * state["config"]["GRADIENT_ACCUMULATION"]
        progress["position"] = min(progress["position"] * before // effective_batch, len(batches) - 1)
        if rank == 0:
            set_rng(state["rng"])
    clock = Clock(config, len(batches), progress, processes)
    if clock.finished():
        raise UserError(f"{resume} is a finished run: lengthen it with --epochs, --max_steps or --minutes")
    name = state["run"] if resume else from_first(new_name(config) if main else None)
    folder, log = checkpoints.FOLDER / name, Log(SAMPLES / name, progress) if main else None

    def save(file: str) -> None:
        state = {"version": VERSION, "run": name, "architecture": model.architecture, "config": config.as_dict()}
        state |= {"data": data, "progress": progress, "rng": rng(), **step.state_dict()}
        try:
            checkpoints.save(folder / file, state)
        except OSError as problem:
            if file == "final.pt":
                raise
            print(f"{folder / file} COULD NOT BE SAVED ({problem.strerror}): free some space; training goes on")

    def how_to_go_on() -> str:
        saved = (folder / "last.pt").exists()
        return f"go on with --resume {name}" if saved else f"run {name} had saved nothing yet, start again"

    def draw_grid(file: str) -> None:
        some = groups(range(config.NUM_SAMPLES), step.micro_batch)
        images = torch.cat([step.ema.sample(len(seeds), seed=seeds).cpu() for seeds in some])
        log.grid(images, progress["step"], file)

    if main:
        print(f"run {name}: {len(batches.training)} images, {describe(step)}", flush=True)
    held_out, saved_at, validation = batches.validation(), time.monotonic(), float("nan")
    validate_at = time.monotonic()
    bar = tqdm(disable=not main, initial=progress["step"], unit="step", mininterval=1, dynamic_ncols=True)
    with together(how_to_go_on), Interrupt(processes) as interrupt:
        while not clock.finished():
            for batch in batches.epoch(progress["epoch"], progress["position"]):
                before = clock.fraction()
                rate = learning_rate(
                    config.LEARNING_RATE, config.LR_SCHEDULE, progress["step"], config.WARMUP_STEPS, before
                )
                loss, norm = step(batch, progress["step"], rate)
                progress["position"] += 1
                progress["images"] += effective_batch
                clock.tick()
                bar.update()
                if progress["step"] % LOG_EVERY == 0 or clock.finished():
                    if step.skipped_in_a_row.item() >= MOST_SKIPPED_IN_A_ROW:
                        raise UserError(
                            f"{MOST_SKIPPED_IN_A_ROW} updates in a row were not finite; stopped at step "
                            f"{progress['step']}. The checkpoints in {folder}/ are good: --resume {name} with a lower "
                            "--learning_rate or --no-use_amp",
                            exit_code=1,
                        )
                    if main:
                        speed = log.speed(progress["images"])
                        log.scalars(
                            progress, loss=loss.item(), learning_rate=rate, gradient_norm=norm.item(),
                            images_per_second=speed, skipped=step.skipped.item(),
                        )  # fmt: skip
                        bar.total = clock.total()
                        bar.set_postfix_str(f"loss {loss.item():.4f}, {speed:.0f} images/s", refresh=False)
                if step.ema.guide is None and guide_is_due(config, progress["step"], clock.fraction()):
                    step.ema.keep_guide()
                grids = config.SAMPLE_GRIDS
                if main and int(before * grids) < int(clock.fraction() * grids) < grids:
                    draw_grid(f"step_{progress['step']:07d}.png")
                if interrupt.wanted(progress["step"]):
                    if main:
                        save("last.pt")
                        log.close()
                        bar.close()
                        print(f"interrupted and saved at step {progress['step']}: go on with --resume {name}")
                    raise SystemExit(128 + interrupt.number)
                if main and time.monotonic() - saved_at >= 60 * config.SAVE_MINUTES:
                    save("last.pt")
                    saved_at = time.monotonic()
                if clock.finished():
                    break
            if progress["position"] == len(batches):
                progress["epoch"], progress["position"] = progress["epoch"] + 1, 0
            due = progress["epoch"] <= ALWAYS or time.monotonic() >= validate_at
            if main and (due or clock.finished()):
                start = time.monotonic()
                validation = step.validate(held_out)
                log.scalars(progress, validation_loss=validation)
                if progress["best"] is None or validation < progress["best"]:
                    progress["best"] = validation
                    save("best.pt")
                # where epochs are short, not after each of them
                validate_at = start + (time.monotonic() - start) / ASIDE
            if main:
                every = config.CHECKPOINT_EVERY
                if every and progress["position"] == 0 and progress["epoch"] % every == 0:
                    save(f"epoch_{progress['epoch']:04d}.pt")
    bar.close()
    final = folder / "final.pt"
    if main:
        save("final.pt")
        checkpoints.publish(final, folder / "last.pt")
        checkpoints.publish(final, checkpoints.FOLDER / "ddpm_final.pt")
        draw_grid("final.png")
        log.close()
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
        print(
            f"done: {progress['images']:,} images in {progress['seconds']:.0f} s{memory}, "
            f"validation loss {validation:.4f}\n"
            f"  model     {checkpoints.FOLDER / 'ddpm_final.pt'} (checkpoints of the run: {folder}/)\n"
            f"  pictures  {log.folder / 'final.png'}, loss.png, grids along the way\n"
            f"  scalars   tensorboard --logdir {log.folder}\n"
            f"  next      python inference.py"
        )
    return final


def guide_is_due(config: Any, step: int, fraction: float) -> bool:
    """Whether the averaged weights are now what samples shall be led away from.

    Twice the warm-up at least must be over: an average of the first weights is no guide, with it samples became worse
    than without (docs/recipe.md).
    """
    return 0 < config.GUIDE_AT <= fraction and step >= 2 * config.WARMUP_STEPS


def describe(step: Step) -> str:
    """Size, batch, precision and device of a training step, in one line."""
    config, parameters = step.config, sum(p.numel() for p in step.parameters)
    name = torch.cuda.get_device_name(step.device) if step.device.type == "cuda" else "CPU"
    parts = [
        f"{parameters / 1e6:.1f} M parameters",
        f"batch {config.BATCH_SIZE * config.GRADIENT_ACCUMULATION}"
        + (f" = {config.GRADIENT_ACCUMULATION} x {config.BATCH_SIZE}" if config.GRADIENT_ACCUMULATION > 1 else ""),
        str(step.dtype).removeprefix("torch.") if config.USE_AMP else "float32",
        *(["compiled"] if config.COMPILE_MODEL else []),
        *(["CUDA graphs"] if step.graphs is not None else []),
        *(["gradient checkpointing"] if config.GRADIENT_CHECKPOINTING else []),
        name if step.world == 1 else f"{step.world} x {name}",
    ]
    return ", ".join(parts)


def rng() -> dict[str, Any]:
    """State of the global random generators, which dropout and self-conditioning use."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng(state: dict[str, Any]) -> None:
    """Takes back what rng gave."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def estimate(model: nn.Module, count: int, config: Any, memory_gib: float) -> str:
    """What a run on `count` images would take: parameters, memory, steps and time.

    The time comes from a few real forward and backward passes on this machine; on a GPU the memory does too, and
    memory_gib stands in for it elsewhere.
    """
    processes = join()
    device, micro = processes.device, config.BATCH_SIZE
    step = Step(model.to(device).train(), config)
    if device.type == "cpu":
        micro = min(micro, 8)  # seconds, not minutes; on a CPU the time goes with the number of images
    shape = (micro, model.channels, model.image_size, model.image_size)
    fake = torch.randint(256, shape, dtype=torch.uint8, device=device)
    seconds = []
    for i in range(4):
        start = time.perf_counter()
        step(fake, i, 0.0)[0].item()
        seconds.append(time.perf_counter() - start)
    batch = config.BATCH_SIZE * config.GRADIENT_ACCUMULATION
    per_step = statistics.median(seconds[1:]) * batch / micro / processes.num_processes
    batches = Batches(np.empty((count, 1, 1, 1), np.uint8), batch, 0, torch.device("cpu"), 1)
    if config.MINUTES:
        length = f"about {60 * config.MINUTES / per_step:,.0f} steps in {config.MINUTES:g} minutes"
    else:
        steps = config.MAX_STEPS or config.EPOCHS * len(batches)
        length = f"{steps:,} steps, {steps / len(batches):.1f} epochs, about {duration(steps * per_step)}"
    if device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB (measured)"
    else:
        memory = f"{memory_gib:.1f} GiB (estimated)"
    return f"{describe(step)}\nmemory {memory}\n{length} (measured just now: {per_step:.3f} s a step)"


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
