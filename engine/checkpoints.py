"""Checkpoints: written whole or not at all, and read without unpickling."""

import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from engine.errors import UserError
from engine.processes import say_once

FOLDER = Path("checkpoints")
SHIPPED = Path(__file__).resolve().parent.parent / "weights"  # come with the project


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Calls `write` with a temporary file in the same folder, flushes it to disk and renames it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as problem:
        problem.filename = problem.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raises OSError if no file can be made in a folder, or, where it is not there yet, the folder; leaves nothing."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    with tempfile.TemporaryFile(dir=there):
        pass


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint; a crash or a full disk leaves the old file, never half of a new one."""

    def write(file: BinaryIO) -> None:
        try:
            torch.save(state, file)
        except RuntimeError as problem:  # torch closes its archive after a full disk, and fails at that instead
            if isinstance(problem.__context__, OSError):
                raise problem.__context__ from None
            raise

    write_atomically(path, write)


def publish(path: Path, name: Path) -> None:
    """Makes `name` another name of the finished file `path`, replacing what it named before."""
    temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    try:
        os.link(path, temporary)
        os.replace(temporary, name)
    except OSError:  # a file system without hard links
        with open(path, "rb") as source:
            write_atomically(name, lambda file: shutil.copyfileobj(source, file))


def load(path: Path) -> dict[str, Any]:
    """Reads a .pt file onto the CPU with `weights_only=True`.

    Raises UserError if it is missing, cut short, or holds more than tensors and plain values.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a checkpoint in it, such as {path / 'final.pt'}")
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: train one with `python train_optimized.py`")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        raise UserError(f"{path} is not a checkpoint of plain tensors and is not opened") from problem
    except (RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError) as problem:
        raise UserError(f"{path} is damaged or cut short: use another checkpoint of the run") from problem
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a checkpoint")
    return state


def load_training(path: Path) -> dict[str, Any]:
    """Reads a checkpoint that a run can go on from."""
    state = load(path)
    if missing := {"model", "ema", "optimizer", "progress", "config", "run"} - state.keys():
        raise UserError(f"{path} cannot be resumed: it holds no {', '.join(sorted(missing))}")
    return state


def find(what: str) -> Path:
    """The checkpoint meant by `what`: a file, a run's folder or name (its last.pt), or `newest` for any run's."""
    if not what:
        raise UserError("--resume is given an empty name: name a run or a checkpoint, or nothing for the newest run")
    if what == "newest":
        found = sorted(FOLDER.rglob("last.pt"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise UserError(f"there is no last.pt in {FOLDER}/ to resume: train without --resume first")
        return found[-1]
    for path in (Path(what), Path(what) / "last.pt", FOLDER / what / "last.pt"):
        if path.is_file():
            return path
    raise UserError(f"--resume names {what}, but there is neither such a file nor a run with a last.pt")


def has_saved(run: str) -> bool:
    """Whether there is a run of this name with at least one checkpoint."""
    return any((FOLDER / run).glob("*.pt"))


def run_of(path: Path, name: str) -> str:
    """The run that goes on from a checkpoint: that of its folder, which may be another one's copy.

    name: what the checkpoint says, which counts for one from elsewhere. Raises UserError if there is such a run too.
    """
    folder, runs = path.resolve().parent, FOLDER.resolve()
    if runs in folder.parents:
        return folder.relative_to(runs).as_posix()
    if folder != runs and has_saved(name):
        raise UserError(
            f"{path} is of a run {name}, which {FOLDER}/ has too: copy it to {FOLDER}/NEW/last.pt, and --resume NEW"
        )
    return name


def is_finished(run: Path, step: int) -> bool:
    """Whether the run in the folder `run` has a final.pt, of this step or a later one."""
    final = run / "final.pt"
    return final.exists() and load_training(final)["progress"]["step"] >= step


def newest() -> Path:
    """The checkpoint written last, of any run, or weights that come with the project: the default of inference."""
    found = [path for path in FOLDER.rglob("*") if path.suffix in (".pt", ".safetensors") and path.name[0] != "."]
    if not found:
        say_once(f"nothing was trained in {FOLDER}/ yet: here is the model that comes with the project")
        return SHIPPED / "cifar10.safetensors"
    # a finished run's final.pt is also called ddpm_final.pt: the shorter name is the one to show
    return max(found, key=lambda path: (path.stat().st_mtime_ns, -len(path.parts)))


def name_of(path: Path) -> str:
    """What to call a checkpoint in names of results: run and file, or the file alone if it belongs to no run."""
    run = path.resolve().parent.name
    return path.stem if run == FOLDER.name else f"{run}-{path.stem}"
