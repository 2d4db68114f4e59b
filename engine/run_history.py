"""Runs as they are read again, while they train or later: metrics, curve, sample grids."""

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from engine import plots
from engine.progress import format_duration
from engine.run_names import SAMPLES_DIR

MAX_GRIDS = 24  # of a run that are shown
LOGGED = {"step", "epoch", "images", "seconds", "loss", "images_per_second"}  # of a step
MAX_SILENCE = 60.0  # seconds without a logged step after which a run may have stopped


def find_runs() -> list[str]:
    """Returns the names of the runs that have logged anything, the newest first."""
    files = sorted(SAMPLES_DIR.rglob("metrics.jsonl"), key=lambda file: -file.stat().st_mtime)
    return [file.parent.relative_to(SAMPLES_DIR).as_posix() for file in files]


def run_version(name: str) -> tuple[Any, ...]:
    """Returns a run's name and what changes with its metrics."""
    status = (SAMPLES_DIR / name / "metrics.jsonl").stat()
    return name, status.st_mtime_ns, status.st_size


def grids_version(name: str) -> list[tuple[int, bool, Path]]:
    """Returns the grids of a run, the newest last: time, whether it is final, path."""
    folder = SAMPLES_DIR / name
    paths = [*folder.glob("step_*.png"), *folder.glob("final.png")]
    return sorted((path.stat().st_mtime_ns, path.stem == "final", path) for path in paths)


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
    """Returns (data URI, caption) of a run's sample grids by age, MAX_GRIDS at most."""
    paths = [path for *_, path in grids_version(name)]
    every = -(-len(paths) // MAX_GRIDS) or 1
    shown = paths[::-every][::-1]  # with the newest
    return [(plots.png_data_uri(path.read_bytes()), caption_of(path)) for path in shown]


def caption_of(grid: Path) -> str:
    """Returns `step 1,200` for step_0001200.png, else the name."""
    name, _, step = grid.stem.partition("_")
    return f"{name} {int(step):,}" if step.isdecimal() else grid.stem


def summarize_run(version: tuple[Any, ...], now: float) -> dict[str, str]:
    """Returns the state of a run: numbers by name, formatted. now: seconds since the epoch."""
    folder = SAMPLES_DIR / version[0]
    rows = read_run(version)
    steps = [row for row in rows if row.keys() >= LOGGED]
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
        state = "finished"
        left = "-"
    counts = {name: f"{last[name]:,}" for name in ("step", "epoch", "images")}
    return {
        "state": state, "time left": left, "trained for": format_duration(last["seconds"]),
        "speed": f"{sum(speeds) / len(speeds):,.0f} images/s", **counts,
        "loss": f"{last['loss']:.4f}",
        "validation loss": f"{validations[-1]:.4f}" if validations else "-",
    }  # fmt: skip
