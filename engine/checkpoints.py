"""Checkpoint files: written atomically, read without unpickling, found by run name."""

import contextlib
import functools
import hashlib
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from math import inf, isfinite
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import psutil
import safetensors.torch
import torch
from torch import Tensor

from engine.distributed import print0
from engine.errors import UserError, short_reason
from engine.noise_schedule import BETA_SCHEDULES, OBJECTIVES, upstream_betas
from engine.settings import suggest

CHECKPOINT_DIR = Path("checkpoints")
PRETRAINED_DIR = Path(__file__).resolve().parent.parent / "weights"
TRAINING_KEYS = {
    "version": int, "run": str, "data": dict, "architecture": dict, "config": dict,
    "progress": dict, "model": dict, "ema": dict, "optimizer": dict, "rng": dict,
}  # fmt: skip
MAX_WEIGHT = 1e6  # above any that training leads to
UNSET_SHA256 = "0" * 64  # in place of the checksum, in the bytes that it covers


class ModelFile(NamedTuple):
    """A model as read from a file. training_info: `config`, `progress`, `data` of a run, if any."""

    path: Path
    architecture: dict[str, Any]
    weights: dict[str, Tensor]
    training_info: dict[str, dict[str, Any]]


class TrainingCheckpoint(NamedTuple):
    """A checkpoint that a run can resume from, as read from `path`."""

    path: Path
    state: dict[str, Any]


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Calls `write` with a temporary file next to `path`, flushes and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Deletes temporary files below a folder, except those of live processes."""
    for file in folder.rglob(".*.tmp"):
        pid = file.name.split(".")[-2]
        if pid == str(os.getpid()) or not (pid.isdigit() and psutil.pid_exists(int(pid))):
            file.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))


def check_writable(folder: Path) -> None:
    """Raises OSError if no file can be written to a folder, which may not exist yet."""
    existing_parent = next(path for path in (folder, *folder.parents) if path.exists())
    tempfile.TemporaryFile(dir=existing_parent).close()


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint atomically: a crash or a full disk leaves the old file."""
    try:
        write_atomically(path, lambda file: torch.save(state, file))
    except RuntimeError as error:
        # On a full disk torch fails at closing its archive, which hides the OSError.
        if isinstance(error.__context__, OSError):
            error.__context__.filename = str(path)
            raise error.__context__ from None
        raise


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` a hard link to the file `source`, or a copy where links fail."""
    # In the folder of `source`, which a run locks and cleans.
    temporary = source.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        os.link(source, temporary)
        os.replace(temporary, target)
    except OSError:  # also of another file system
        with open(source, "rb") as file:
            write_atomically(target, lambda copy: shutil.copyfileobj(file, copy))
    finally:
        temporary.unlink(missing_ok=True)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder. Name a checkpoint in it, e.g. {path / 'final.pt'}")
    if not path.is_file():
        raise UserError(f"no checkpoint {path}. Train one with `python train_optimized.py`")


def check_architecture(
    path: Path, saved: Mapping[str, Any], expected: Mapping[str, Any], mutable: Collection[str],
    advice: str,
) -> None:  # fmt: skip
    """Raises UserError if a checkpoint's architecture differs; `mutable` entries may."""
    for key, value in expected.items():
        if saved.get(key, value) != value and key not in mutable:
            change = f"{key} {saved[key]}, which cannot become {value}"
            raise UserError(f"{path} was trained with {change}. {advice}")


def check_weights(named_weights: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Raises UserError if weights are not those that training can lead to."""
    for name, weight in named_weights:
        if not weight.abs().max() <= MAX_WEIGHT:  # NaN, too
            reason = f"holds weights that are not finite or above {MAX_WEIGHT:g} ({name})"
            raise UserError(f"{path} {reason}. Use another checkpoint")


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def refuse_damaged(path: Path, problem: str = "is damaged") -> Iterator[None]:
    """Turns any error of a block that reads a file into a UserError of one line.

    torch, zipfile and safetensors raise nearly anything on a damaged file.
    """
    try:
        yield
    except (UserError, PermissionError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = short_reason(error, 150)
        raise UserError(f"{path} {problem} ({reason}). Use another checkpoint") from error


def load(path: Path) -> dict[str, Any]:
    """Reads a .pt file onto the CPU with `weights_only=True`.

    Raises UserError if it is missing or damaged, or holds more than tensors and plain values.
    """
    _check_file(path)
    with refuse_damaged(path):
        # torch stores a checksum of each part, but does not compare it.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if part := archive.testzip():
                    raise zipfile.BadZipFile(f"checksum mismatch in {part}")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            reason = "is no checkpoint, or contains pickled objects"
            raise UserError(f"{path} {reason}; refusing to load it") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a checkpoint")
    return state


def load_training(path: Path) -> TrainingCheckpoint:
    """Reads a checkpoint that a run can resume from; raises UserError if it cannot."""
    state = load(path)
    missing = [k for k, type_ in TRAINING_KEYS.items() if not isinstance(state.get(k), type_)]
    if missing:
        advice = "Start a new run from its weights with --init_from"
        raise UserError(f"{path} has no valid {', '.join(missing)} to resume with. {advice}")
    progress = state["progress"]
    best = progress.pop("best", None)
    is_valid = all(type(v) in (int, float) and 0 <= v < inf for v in progress.values())
    if not is_valid or type(best) not in (int, float, type(None)):
        raise UserError(f"{path} has a progress of {progress}, best {best}, and cannot be resumed")
    progress["best"] = best if isfinite(best or 0) else None  # earlier versions stored NaN
    if not all(type(name) is str for name in state["config"]):
        raise UserError(f"{path} has a configuration without names and cannot be resumed")
    return TrainingCheckpoint(path, state)


def save_safetensors(path: Path, architecture: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Writes architecture, weights and a checksum of the other bytes, atomically."""
    metadata = {"format": "pt", "architecture": json.dumps(architecture), "sha256": UNSET_SHA256}
    content = safetensors.torch.save(state, metadata)
    checksum = hashlib.sha256(content).hexdigest()
    content = content.replace(UNSET_SHA256.encode(), checksum.encode(), 1)
    write_atomically(path, lambda file: file.write(content))


def load_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads architecture and weights that save_safetensors wrote; UserError if it cannot."""
    _check_file(path)
    with refuse_damaged(path, "is damaged, or not a .safetensors file of this project"):
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        architecture = json.loads(metadata["architecture"])

    expected = metadata.get("sha256", "")
    content = path.read_bytes().replace(expected.encode(), UNSET_SHA256.encode(), 1)
    if not expected:
        print0(f"note: {path} was written before files had checksums: it cannot be checked")
    elif hashlib.sha256(content).hexdigest() != expected:
        raise UserError(f"{path} is damaged (checksum mismatch). Use another checkpoint")
    return architecture, state


def load_model_file(path: Path, image_size: int | None) -> ModelFile:
    """Reads a model from any file that holds one: of a run, save_model or lucidrains' Trainer.

    A run's weights are the EMA. image_size: required for lucidrains' files.
    """
    if path.suffix == ".safetensors":
        return ModelFile(path, *load_safetensors(path), {"config": {}, "progress": {}})
    file = load(path)
    training_info = {name: file.get(name, {}) for name in ("config", "progress")}
    if isinstance(file.get("data"), dict):
        training_info["data"] = file["data"]
    if file.get("architecture") is None:
        return ModelFile(path, *import_lucidrains_checkpoint(file, image_size, path), training_info)
    weights = file.get("model") if file.get("ema") is None else file["ema"]
    return ModelFile(path, file["architecture"], weights, training_info)


def step_of(path: Path) -> int:
    """Returns a checkpoint's step without reading its weights, -1 if unreadable."""
    return _read_step(path, path.stat().st_mtime_ns) if path.exists() else -1


@functools.cache  # the page asks every few seconds
def _read_step(path: Path, modified: int) -> int:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return int(state["progress"]["step"])
    except Exception:  # torch raises nearly anything on a damaged file
        return -1


def resolve_checkpoint(reference: str | None, flag: str = "--checkpoint") -> Path:
    """Returns the checkpoint that a reference means.

    It may be a file, a run's folder or name, or "newest", the run saved last. Of a run, it means
    the one with most steps, which a killed process may have saved under any name. None means
    newest_checkpoint().
    """
    if reference is None:
        return newest_checkpoint()
    if not reference:
        raise UserError(f"{flag} is empty. Name a run or a checkpoint, or drop the value")
    if reference == "newest":
        if not (found := _run_files()):
            raise UserError(f"no run in {CHECKPOINT_DIR}/. Train without {flag} first")
        reference = str(max(found, key=lambda path: path.stat().st_mtime).parent)
    if Path(reference).is_file():
        return Path(reference)
    for folder in (Path(reference), CHECKPOINT_DIR / reference):
        # last.pt first: max takes the first of those with equal steps.
        files = sorted(folder.glob("[!.]*.pt"), key=lambda path: path.name != "last.pt")
        if files:
            return max(files, key=step_of)
    runs = {file.parent.relative_to(CHECKPOINT_DIR).as_posix() for file in _run_files()}
    reason = "no such checkpoint, and no run with one"
    raise UserError(f"{flag} {reference}: {reason}{suggest(reference, runs)}")


def _run_files() -> list[Path]:
    """Returns the checkpoints in the folders of runs."""
    return [file for file in CHECKPOINT_DIR.rglob("[!.]*.pt") if file.parent != CHECKPOINT_DIR]


def newest_checkpoint(notify: bool = True) -> Path:
    """Returns the newest checkpoint of any run, or the pretrained one; notify: and says so."""
    found = [*CHECKPOINT_DIR.rglob("[!.]*.pt"), *CHECKPOINT_DIR.rglob("[!.]*.safetensors")]
    if not found:
        file = PRETRAINED_DIR / "cifar10.safetensors"
        if notify:
            print0(f"no checkpoint in {CHECKPOINT_DIR}/ yet; using the pretrained {file.name}")
        return file
    # A finished run's final.pt is also ddpm_final.pt, whose shorter path is the one to show.
    return max(found, key=lambda path: (path.stat().st_mtime_ns, -len(path.parts)))


def run_exists(run_name: str) -> bool:
    """Whether there is a run of this name with at least one checkpoint."""
    return any((CHECKPOINT_DIR / run_name).glob("*.pt"))


def is_run_name(name: str) -> bool:
    """Whether a name is that of a folder below CHECKPOINT_DIR."""
    if "\0" in name:
        return False
    return CHECKPOINT_DIR.resolve() in (CHECKPOINT_DIR / name).resolve().parents


def run_name_of(checkpoint: TrainingCheckpoint) -> str:
    """Returns the run that resumes from a checkpoint: its folder's, so that a copy is its own run.

    Outside CHECKPOINT_DIR it is the name in the file; UserError if there is such a run already.
    """
    folder = checkpoint.path.resolve().parent
    runs = CHECKPOINT_DIR.resolve()
    name = checkpoint.state["run"]
    if runs in folder.parents:
        return folder.relative_to(runs).as_posix()
    if not is_run_name(name):
        raise UserError(f"{checkpoint.path} is of a run {name!r}, which is no name of a run")
    if folder != runs and run_exists(name):
        advice = f"Copy it to {CHECKPOINT_DIR}/NEW/last.pt and --resume NEW"
        exists = f"is of run {name}, which exists in {CHECKPOINT_DIR}/, too"
        raise UserError(f"{checkpoint.path} {exists}. {advice}")
    return name


def display_name(path: Path) -> str:
    """Returns a checkpoint's name for result files: run and file, or the file alone."""
    path = path.resolve()
    if path.is_relative_to(CHECKPOINT_DIR.resolve()):
        path = path.relative_to(CHECKPOINT_DIR.resolve())
        return "-".join([*path.parent.parts, path.stem])
    folder = path.parent.name
    return path.stem if folder == CHECKPOINT_DIR.name else f"{folder}-{path.stem}"


def import_lucidrains_checkpoint(
    file: dict[str, Any], image_size: int | None, path: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns architecture and weights (EMA if any) from lucidrains' Trainer.

    Width, levels, attention and channels follow from the shapes of the weights, the schedule from
    the betas, and the objective from the loss weights stored next to them. path: for messages.
    Raises UserError without the image size, of which the file has no trace.
    """
    # Weights of the EMA copy, by the names that GaussianDiffusion and Unet give them.
    prefix = "ema_model." if file.get("ema") else ""
    source = file.get("ema") or file.get("model")
    if not isinstance(source, dict) or f"{prefix}model.init_conv.weight" not in source:
        raise UserError(f"{path} is neither of this project nor of lucidrains' Trainer")
    if image_size is None:
        advice = "Say it with --image_size, or from_file(path, image_size=...)"
        reason = "is of lucidrains' Trainer and does not store its image size"
        raise UserError(f"{path} {reason}. {advice}")
    state = {name.removeprefix(prefix): v for name, v in source.items() if name.startswith(prefix)}
    unet = {name.removeprefix("model."): v for name, v in state.items()}

    # Network.
    dim = unet["time_mlp.1.weight"].shape[1]
    levels = 1 + max(int(name.split(".")[1]) for name in unet if name.startswith("downs."))
    last = levels - 1
    widths = [unet[f"downs.{i}.3.{'1.' if i < last else ''}weight"].shape[0] for i in range(levels)]
    channels = unet["final_conv.weight"].shape[0]
    init_dim, init_channels = unet["init_conv.weight"].shape[:2]
    # Linear attention has a norm after its projection.
    full = [f"downs.{i}.2.to_out.weight" in unet for i in range(levels)]
    memory = [unet[f"downs.{i}.2.mem_kv"].shape for i in range(levels)]  # (2, heads, ...)
    head_dims = [s[3] if is_full else s[2] for s, is_full in zip(memory, full, strict=True)]

    # Diffusion process.
    alpha_bar = state["alphas_cumprod"].double()
    timesteps = len(alpha_bar)
    snr = alpha_bar / (1 - alpha_bar)
    base_weight = {"pred_noise": 1 / snr, "pred_x0": torch.ones_like(snr), "pred_v": 1 / (snr + 1)}
    weights = {(o, g): base_weight[o] * snr.clamp(max=g) for o in OBJECTIVES for g in (inf, 5.0)}
    found = state["loss_weight"].double()
    matches = (k for k, v in weights.items() if torch.allclose(found, v, rtol=1e-2, atol=1e-6))
    objective, gamma = next(matches, (None, 0.0))
    betas = ((s, upstream_betas(s, timesteps)) for s in BETA_SCHEDULES)
    schedule = next((s for s, values in betas if torch.allclose(values, state["betas"])), None)
    if not objective or not schedule:
        raise UserError(f"{path} has an objective or beta schedule that this project does not know")

    architecture = {
        "image_size": image_size, "channels": channels, "objective": objective,
        "beta_schedule": schedule, "timesteps": timesteps, "sampling_timesteps": min(20, timesteps),
        "loss_weighting": "min_snr", "min_snr_gamma": 0.0 if gamma == inf else gamma,
        "dim": dim, "dim_mults": [width // dim for width in widths], "init_dim": init_dim,
        "self_condition": init_channels == 2 * channels, "full_attn": full,
        "attn_heads": [shape[1] for shape in memory], "attn_dim_head": head_dims,
    }  # fmt: skip
    return architecture, {f"diffusion.{name}": value for name, value in state.items()}
