"""What runs are called: new ones, those that resume, and those that branch off."""

import contextlib
import itertools
from datetime import datetime
from pathlib import Path
from typing import Any

from engine import checkpoints
from engine.checkpoints import TrainingCheckpoint
from engine.datasets import file_slug
from engine.errors import UserError

SAMPLES_DIR = Path("samples")


def new_run_name(config: Any) -> str:
    """Returns RUN_NAME, or a new name of data set, size and date.

    Raises UserError if RUN_NAME is taken or names no folder below the checkpoints'.
    """
    name = config.RUN_NAME
    if not name:
        base = f"{file_slug(config.DATASET)}-{config.IMAGE_SIZE}px-{datetime.now():%Y%m%d-%H%M%S}"
        return create_run_folder(base)
    is_reserved = name == "newest" or Path(name).suffix in (".pt", ".safetensors")
    if is_reserved or not checkpoints.is_run_name(name):
        expected = f"name a folder below {checkpoints.CHECKPOINT_DIR}/"
        others = "newest, and names that end in .pt or .safetensors, mean something else"
        raise UserError(f"--run_name is {name}, but must {expected} ({others})")
    # A run that ended before it saved anything may start again.
    can_resume = checkpoints.run_exists(name)
    if can_resume or (SAMPLES_DIR / name / "final.png").exists():
        resume = f"Resume it (--resume {name}), or choose" if can_resume else "Choose"
        raise UserError(f"there is a run {name} already. {resume} another --run_name")
    return name


def create_run_folder(base: str) -> str:
    """Creates a new run's folder, called `base` or, if that is taken, `base-2`..."""
    for suffix in itertools.chain([""], (f"-{number}" for number in itertools.count(2))):
        with contextlib.suppress(FileExistsError):  # of a run that started in the same second
            (checkpoints.CHECKPOINT_DIR / (base + suffix)).mkdir(parents=True)
            return base + suffix


def resumed_run_name(checkpoint: TrainingCheckpoint) -> str:
    """Returns the run that resumes from a checkpoint: a new one if its own is ahead."""
    name = checkpoints.run_name_of(checkpoint)
    step = checkpoint.state["progress"]["step"]
    folder = checkpoints.CHECKPOINT_DIR / name
    reached = max(checkpoints.step_of(folder / file) for file in ("last.pt", "final.pt"))
    if reached <= step:
        return name
    branch = create_run_folder(f"{name}-from-{step}")
    print(f"run {name} is at step {reached} already: continuing {checkpoint.path} as run {branch}")
    return branch


def is_complete(name: str, step: int) -> bool:
    """Whether a run has a final.pt of at least this step, and its samples."""
    final = checkpoints.CHECKPOINT_DIR / name / "final.pt"
    grid = SAMPLES_DIR / name / "final.png"  # the last file that a run writes
    if not (final.exists() and grid.exists()):
        return False
    is_newer = grid.stat().st_mtime_ns >= final.stat().st_mtime_ns
    return is_newer and checkpoints.step_of(final) >= step


def resume_hint(name: str) -> str:
    """Returns what to do after a run has ended too early."""
    if checkpoints.run_exists(name):
        return f"Resume with --resume {name}"
    return f"Start it again (run {name} has saved nothing yet)"
