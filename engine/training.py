"""The training loop, from the first step to the last checkpoint."""

import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine import checkpoints
from engine.batches import Batches
from engine.errors import UserError
from engine.processes import from_first, join, together
from engine.runs import LOG_EVERY, SAMPLES, Clock, Interrupt, Log, claim, give_back, new_name
from engine.step import Step, learning_rate

MOST_SKIPPED_IN_A_ROW = 20
VERSION = 2  # of the layout of a checkpoint
ASIDE = 0.02  # share of the time that validation, and keeping what it found best, may take...
ALWAYS = 5  # ...after so many epochs
CHANGEABLE = {"sampling_timesteps", "guidance", "dropout"}  # of a model's architecture, when a run goes on


def train(model: nn.Module, images: np.ndarray, config: Any, resume: Path | None = None) -> Path:
    """Trains until the configured length is reached and returns the final checkpoint.

    model: called as model(images, t, noise), with `sample`, `architecture`, `timesteps_at`, `guide` and `keep_guide`.
    images: uint8 (N, C, H, W). config: the attributes of DDPMConfig. resume: a checkpoint to go on from. Under
    `accelerate launch` or torchrun every process calls this and only the first writes. Raises UserError for data that
    does not fit or a loss that stays non-finite, and SystemExit, with everything saved, on Ctrl-C or SIGTERM.
    """
    processes = join()
    main, device = processes.is_main_process, processes.device
    rank, world = processes.process_index, processes.num_processes
    torch.backends.cudnn.benchmark = True
    seed(config.SEED + rank)
    effective_batch = config.BATCH_SIZE * config.GRADIENT_ACCUMULATION
    batches = Batches(images, effective_batch, config.SEED, device, config.NUM_WORKERS, rank, world)
    step = Step(model.to(device).train(), config, rank, world)
    data = {"dataset": config.DATASET, "images": len(images), "shape": list(images.shape[1:])}
    progress: dict[str, Any] = {"step": 0, "epoch": 0, "position": 0, "images": 0, "seconds": 0.0, "best": None}
    name = ""
    if resume:
        name, progress = go_on_from(resume, data, step, batches)
    clock = Clock(config, len(batches), progress, processes)
    over = clock.finished()  # be it that it was stopped between its last step and the final checkpoint
    if over and from_first(checkpoints.is_finished(checkpoints.FOLDER / name, progress["step"]) if main else None):
        raise UserError(f"{resume} is a finished run: lengthen it with --epochs, --max_steps or --minutes")
    name = name or from_first(new_name(config) if main else None)
    if main:
        print(f"run {name}: {len(batches.training)} images, {describe(step)}", flush=True)
    record = Record(name, data, step, batches, clock) if main else None

    with together(lambda: how_to_go_on(name)), Interrupt(processes) as interrupt:
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
                if step.ema.guide is None and guide_is_due(config, progress["step"], clock.fraction()):
                    step.ema.keep_guide()
                if progress["step"] % LOG_EVERY == 0 or clock.finished():
                    stop_if_broken(step, progress["step"], name)
                    if main:
                        record.log_step(loss, norm, rate)
                if main:
                    record.show(before)
                if interrupt.wanted(progress["step"]) and not clock.finished():
                    if main:
                        record.interrupted()
                    raise SystemExit(128 + interrupt.number)
                if main:
                    record.save_if_due()
                if clock.finished():
                    break
            if progress["position"] == len(batches):
                progress["epoch"], progress["position"] = progress["epoch"] + 1, 0
            if main:
                record.validate_if_due()
                record.keep_epoch_if_due()
    if main:
        if over:
            record.validate_if_due()
        record.finished()
        give_back(name)
    return checkpoints.FOLDER / name / "final.pt"


def go_on_from(path: Path, data: dict[str, Any], step: Step, batches: Batches) -> tuple[str, dict[str, Any]]:
    """Puts a checkpoint's state back; returns the run's name and progress.

    data: what is trained on now. Raises UserError if the checkpoint was trained on other data, is of a model with
    another architecture, or has another layout.
    """
    state = checkpoints.load_training(path)
    if state["version"] != VERSION:
        raise UserError(f"{path} was written by another version of this project and cannot be resumed")
    if state["data"] != data:
        raise UserError(f"{path} was trained on {state['data']}, but what is here is {data}")
    for key, value in step.model.architecture.items():
        was = state["architecture"].get(key, value)
        if was != value and key not in CHANGEABLE:
            raise UserError(f"{path} was trained with {key} {was}, which cannot become {value}: start another run")
    step.load_state_dict(state)
    progress = state["progress"]
    if step.rank == 0:
        set_rng(state["rng"])
    else:  # whose state nobody kept: dropout that was not used yet
        seed(step.config.SEED + step.rank + step.world * progress["step"])
    before = state["config"]["BATCH_SIZE"] * state["config"]["GRADIENT_ACCUMULATION"]
    progress["position"] = min(progress["position"] * before // batches.batch_size, len(batches))
    return checkpoints.run_of(path, state["run"]), progress


def how_to_go_on(name: str) -> str:
    """What to do after a run of this name has ended too early."""
    saved = (checkpoints.FOLDER / name / "last.pt").exists()
    return f"go on with --resume {name}" if saved else f"run {name} had saved nothing yet, start again"


def stop_if_broken(step: Step, number: int, name: str) -> None:
    """Raises UserError if the updates before step `number` were not finite, too many in a row."""
    if step.skipped_in_a_row.item() >= MOST_SKIPPED_IN_A_ROW:
        raise UserError(
            f"{MOST_SKIPPED_IN_A_ROW} updates in a row were not finite; stopped at step {number}. The checkpoints in "
            f"{checkpoints.FOLDER / name}/ are good: --resume {name} with a lower --learning_rate or --no-use_amp",
            exit_code=1,
        )


def guide_is_due(config: Any, step: int, fraction: float) -> bool:
    """Whether the averaged weights are now what samples shall be led away from.

    Twice the warm-up at least must be over: an average of the first weights is no guide, with it samples became worse
    than without (docs/recipe.md).
    """
    return 0 < config.GUIDE_AT <= fraction and step >= 2 * config.WARMUP_STEPS


class Record:
    """What a run leaves behind, checkpoints, scalars and pictures, and shows meanwhile: the first process has it.

    data: what is trained on, as a checkpoint says it. step and clock: those of the run, read whenever it is saved.
    """

    def __init__(self, name: str, data: dict[str, Any], step: Step, batches: Batches, clock: Clock):
        self.name, self.data, self.step, self.clock = name, data, step, clock
        self.config, self.progress = step.config, clock.progress
        self.folder = checkpoints.FOLDER / name
        if not claim(name):  # and if nothing can be written there, that is noticed now, not after hours
            raise UserError(f"run {name} is going on in another process: wait for it, or stop it")
        for left_over in self.folder.glob(".*.tmp"):  # by a process that was killed while it saved
            left_over.unlink()
        self.log = Log(SAMPLES / name, self.progress)
        self.held_out, self.validation = batches.validation(), float("nan")
        self.saved_at = self.validate_at = time.monotonic()
        self.bar = tqdm(initial=self.progress["step"], unit="step", mininterval=1, dynamic_ncols=True)

    def log_step(self, loss: Tensor, norm: Tensor, rate: float) -> None:
        """Logs the step just done; its loss and the speed stay at the bar until the next that is logged."""
        speed = self.log.speed(self.progress["images"])
        self.log.scalars(
            self.progress, loss=loss.item(), learning_rate=rate, gradient_norm=norm.item(), images_per_second=speed,
            skipped=self.step.skipped.item(),
        )  # fmt: skip
        self.bar.total = self.clock.total()
        self.bar.set_postfix_str(f"loss {loss.item():.4f}, {speed:.0f} images/s", refresh=False)

    def show(self, before: float) -> None:
        """Moves the bar on, and draws a grid if the step done led over the end of one of SAMPLE_GRIDS parts of the run.

        before: the fraction of the run that was over before that step.
        """
        self.bar.update()
        grids = self.config.SAMPLE_GRIDS
        if int(before * grids) < int(self.clock.fraction() * grids) < grids:
            self.draw_grid(f"step_{self.progress['step']:07d}.png")

    def draw_grid(self, file: str) -> None:
        """Draws with the averaged weights; no picture is worth a run."""
        seeds, ema = list(range(self.config.NUM_SAMPLES)), self.step.ema

        def some(part: slice) -> Tensor:
            return ema.sample(len(seeds[part]), seed=seeds[part]).cpu()

        try:
            images = torch.cat(self.step.beside(len(seeds), some))
        except UserError as problem:
            print(f"{file} COULD NOT BE DRAWN ({problem}); training goes on")
            return
        self.log.grid(images, self.progress["step"], file)

    def save(self, file: str, otherwise: str = "training goes on") -> bool:
        """Writes a checkpoint; a full disk is fatal to the final one alone.

        Returns whether that worked, and prints what happens otherwise.
        """
        state = {"version": VERSION, "run": self.name, "architecture": self.step.model.architecture}
        state |= {"config": self.config.as_dict(), "data": self.data, "progress": self.progress, "rng": rng()}
        try:
            checkpoints.save(self.folder / file, state | self.step.state_dict())
        except OSError as problem:
            if file == "final.pt":
                raise
            print(f"{self.folder / file} COULD NOT BE SAVED ({problem.strerror}): free some space; {otherwise}")
            return False
        return True

    def save_if_due(self) -> None:
        """Saves every SAVE_MINUTES."""
        if time.monotonic() - self.saved_at >= 60 * self.config.SAVE_MINUTES:
            self.save("last.pt")
            self.saved_at = time.monotonic()

    def validate_if_due(self) -> None:
        """Validates, where epochs are short not after each of them, and saves what is the best so far."""
        start = time.monotonic()
        if self.progress["epoch"] > ALWAYS and start < self.validate_at and not self.clock.finished():
            return
        self.validation = self.step.validate(self.held_out)
        self.log.scalars(self.progress, validation_loss=self.validation)
        if self.progress["best"] is None or self.validation < self.progress["best"]:
            self.progress["best"] = self.validation
            self.save("best.pt")
        self.validate_at = start + (time.monotonic() - start) / ASIDE

    def keep_epoch_if_due(self) -> None:
        """Keeps a checkpoint of every CHECKPOINT_EVERY-th epoch."""
        every, epoch = self.config.CHECKPOINT_EVERY, self.progress["epoch"]
        if every and self.progress["position"] == 0 and epoch % every == 0:
            self.save(f"epoch_{epoch:04d}.pt")

    def interrupted(self) -> None:
        """Saves a run that shall stop here."""
        saved = self.save("last.pt", otherwise="the run stops here")
        self.log.close()
        self.bar.close()
        state = f"interrupted {'and saved' if saved else 'and NOT saved'} at step {self.progress['step']}"
        print(f"{state}: {how_to_go_on(self.name)}")

    def finished(self) -> None:
        """Saves and publishes the final checkpoint, draws with it and says where everything is."""
        self.bar.close()
        final, published = self.folder / "final.pt", checkpoints.FOLDER / "ddpm_final.pt"
        self.save("final.pt")
        checkpoints.publish(final, self.folder / "last.pt")
        checkpoints.publish(final, published)
        self.draw_grid("final.png")
        self.log.close()
        on_gpu = self.step.device.type == "cuda"
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if on_gpu else ""
        print(
            f"done: {self.progress['images']:,} images in {self.progress['seconds']:.0f} s{memory}, "
            f"validation loss {self.validation:.4f}\n"
            f"  model     {published} (checkpoints of the run: {self.folder}/)\n"
            f"  pictures  {self.log.folder / 'final.png'}, loss.png, grids along the way\n"
            f"  scalars   tensorboard --logdir {self.log.folder}\n"
            f"  next      python inference.py"
        )


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


def seed(number: int) -> None:
    """Seeds the global random generators; what else is random is drawn in engine.step."""
    torch.manual_seed(number)
    random.seed(number)


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
