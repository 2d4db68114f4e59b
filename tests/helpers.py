"""What several test files use: running the scripts, comparing checkpoints, small settings."""

import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from config import Tier
from tests.forked_script import ForkedScript

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
CPU_TIER = Tier("CPU", 32, 0.0)
LARGE_TIER = Tier("Large", 256, 80.0)

# Flags of a model that trains in seconds, with dropout and a guide.
TINY_FLAGS = [
    "--dataset", "shapes", "--image_size", "8", "--dim", "8", "--dim_mults", "1,2",
    "--attention_heads", "1", "--attention_dim", "16", "--batch_size", "16",
    "--sampling_timesteps", "4", "--grid_images", "4", "--num_sample_grids", "2",
    "--dropout", "0.1", "--warmup_steps", "2", "--guide_fraction", "0.5", "--keep", "0",
]  # fmt: skip

# The settings that a TrainStep reads.
STEP_SETTINGS = {
    "BATCH_SIZE": 32,
    "GRADIENT_ACCUMULATION": 1,
    "OPTIMIZER": "adam",
    "WEIGHT_DECAY": 0.1,
    "GRAD_CLIP": 1.0,
    "EMA_DECAY": 0.9,
    "HORIZONTAL_FLIP": True,
    "LABEL_DROPOUT": 0.0,
    "USE_AMP": False,
    "GRADIENT_CHECKPOINTING": False,
    "COMPILE_MODEL": False,
    "CUDA_GRAPH": False,
    "SEED": 0,
}

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_no_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="runs on machines without a GPU"
)


def run_script_ok(folder: Path, script: str, *arguments: str) -> str:
    """Runs a script that must succeed and returns what it prints."""
    process = ForkedScript(folder, script, *arguments)
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    return output


CHANGED_TRAINING = """
import functools
import os
import runpy
import signal
import time

from engine import cli  # first: sets what torch reads

from ddpm_model import DDPMModel

forward = DDPMModel.forward
calls = 0


@functools.wraps(forward)
def changed_forward(*args, **kwargs):
    global calls
    calls += 1
    return {function}(forward(*args, **kwargs), calls)


DDPMModel.forward = changed_forward
"""


def write_changed_training(
    folder: Path, change: Callable[[Tensor, int], Tensor], script: str = "train.py"
) -> Path:
    """Writes a script like one of the repository, but its n-th loss is change(loss, n).

    change: a function of a module, which may use os, signal and time.
    """
    path = folder / "changed_training.py"
    start = CHANGED_TRAINING.format(function=change.__name__)
    end = f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    path.write_text(f"{start}\n\n{inspect.getsource(change)}\n\n{end}\n")
    return path


def checkpoint_weights(path: Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint, raw and EMA."""
    state = torch.load(path, weights_only=True)
    return state["model"] | {f"ema.{name}": value for name, value in state["ema"].items()}


def max_checkpoint_difference(a: Path, b: Path) -> float:
    """The largest difference between the weights of two checkpoints."""
    a, b = checkpoint_weights(a), checkpoint_weights(b)
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def max_weight_difference(a: torch.nn.Module, b: torch.nn.Module) -> float:
    """The largest difference between the parameters of two models."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """The norm of the difference over the norm of b."""
    return ((a - b).double().norm() / b.double().norm()).item()


def random_images(count: int, size: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Random uint8 images (count, channels, size, size)."""
    shape = (count, channels, size, size)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


class FakeTime:
    """Stands in for the module `time`; its clock is set by the test."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now
