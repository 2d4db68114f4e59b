"""Experiment trackers, by accelerate: TensorBoard, Weights & Biases, Trackio and MLflow."""

import importlib.util
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import tracking
from PIL import Image

from engine.errors import UserError, short_reason, warn_fallback
from engine.pixels import to_rgb

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "none")
PROJECT = "ddpm"  # what trackers call all runs together
ADVICE = {"wandb": "Log in with `wandb login`, or set WANDB_MODE=offline"}
VIEWERS = {
    "tensorboard": "tensorboard --logdir samples",
    "wandb": "https://wandb.ai, or `wandb sync` after WANDB_MODE=offline",
    "trackio": f"trackio show --project {PROJECT}",
    "mlflow": "mlflow ui",
    "none": "metrics.jsonl",
}


def check_installed(name: str) -> None:
    """Raises UserError if a tracker's package is missing."""
    if name != "none" and not importlib.util.find_spec(name):
        raise UserError(f"--log_with {name} needs a package. Run `pip install {name}`")


class Tracker:
    """A run in a tracker, or in none; what it cannot log costs a warning, never the run.

    folder: where TensorBoard and W&B write. step: an earlier session's last, or 0 in a new run.
    Raises UserError if the tracker cannot start.
    """

    def __init__(
        self, name: str, run_name: str, folder: Path, config: Mapping[str, Any], step: int = 0
    ):
        self.name = name
        if name == "none":
            return
        check_installed(name)
        threading.excepthook = ignore_tensorboard_disk_errors
        try:
            self.tracker = create_tracker(name, run_name, folder, config, step)
        except Exception as error:  # each tracker raises its own
            reason = f"--log_with {name} cannot start ({short_reason(error)})"
            advice = ADVICE.get(name, "Choose another tracker, or none")
            raise UserError(f"{reason}. {advice}") from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Logs values at a step."""
        self._try(lambda: self.tracker.log(values, step=step))

    def log_grid(self, path: Path, step: int) -> None:
        """Logs a grid of samples, an image file, at a step."""

        def log() -> None:
            if self.name == "mlflow":
                return self.tracker.log_artifact(str(path))
            if self.name == "trackio":
                import trackio

                return self.tracker.log({"samples": trackio.Image(path)}, step=step)
            layout = {"dataformats": "NHWC"} if self.name == "tensorboard" else {}
            pixels = np.asarray(to_rgb(Image.open(path)))[None]
            return self.tracker.log_images({"samples": pixels}, step=step, **layout)

        self._try(log)

    def close(self) -> None:
        """Sends what is pending."""
        self._try(lambda: self.tracker.finish())

    def _try(self, log: Callable[[], None]) -> None:
        if self.name == "none":
            return
        try:
            log()
        except Exception as error:  # a full disk, a lost connection: each tracker raises its own
            warn_fallback(f"logging to {self.name}", error)


def create_tracker(
    name: str, run_name: str, folder: Path, config: Mapping[str, Any], step: int
) -> tracking.GeneralTracker:
    """Starts a run in one of accelerate's trackers; all but MLflow resume one of its name."""
    values = {key: v if isinstance(v, (int, float)) else str(v) for key, v in config.items()}
    if name == "tensorboard":  # drops what an earlier session logged after `step`
        arguments = {"logging_dir": folder, "purge_step": step + 1}
        tracker = tracking.TensorBoardTracker("tensorboard", **arguments)
    elif name == "mlflow":
        tracker = tracking.MLflowTracker(PROJECT, run_name=run_name)
    else:
        arguments = {"name": run_name, "resume": "allow" if step else "never", "config": values}
        if name == "wandb":
            # "allow" at step 0, too: a run that ended before it saved anything starts again.
            arguments |= {"id": run_name.replace("/", "-"), "dir": folder, "resume": "allow"}
        tracker = tracking.LOGGER_TYPE_TO_CLASS[name](PROJECT, **arguments)
    tracker.start()
    if name == "mlflow":
        tracker.store_init_configuration(values)
    return tracker


def ignore_tensorboard_disk_errors(failure: threading.ExceptHookArgs) -> None:
    """Hides the traceback of TensorBoard's thread on a full disk; Tracker warns of it."""
    is_tensorboard = type(failure.thread).__module__.startswith("tensorboard")
    if not (is_tensorboard and isinstance(failure.exc_value, OSError)):
        threading.__excepthook__(failure)
