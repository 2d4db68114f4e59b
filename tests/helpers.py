"""What several test files use: running the scripts, comparing checkpoints, small settings."""

import io
import json
import math
import os
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

from engine.cli import run_script

import numpy as np
import psutil
import pytest
import torch
from denoising_diffusion_pytorch import Unet
from PIL import Image
from torch import Tensor, nn

import train
from config import Config, Tier
from engine import checkpoints
from engine.dataloader import Batch
from engine.datasets import ARCHIVES
from engine.unet import FastUnet
from tests.forked_script import ForkedScript

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
CPU_TIER = Tier("CPU", 32, 0.0)
LARGE_TIER = Tier("Large", 256, 80.0)

ALONE = SimpleNamespace(num_processes=1, process_index=0, device=CPU)  # a single rank

# Flags of a model that trains in seconds, with dropout and a guide.
TINY_FLAGS = [
    "--dataset", "shapes", "--image_size", "8", "--dim", "8", "--dim_mults", "1,2",
    "--attention_heads", "1", "--attention_dim", "16", "--batch_size", "16",
    "--sampling_timesteps", "4", "--grid_images", "4", "--num_sample_grids", "2",
    "--dropout", "0.1", "--warmup_steps", "2", "--guide_fraction", "0.5", "--keep", "0",
]  # fmt: skip

# Settings of a model that learns in four steps, for tests that call engine.trainer.train.
API_FLAGS = {
    "IMAGE_SIZE": 8, "DIM": 8, "DIM_MULTS": (1, 2), "ATTENTION_HEADS": (1,), "ATTENTION_DIM": (16,),
    "TIMESTEPS": 40, "SAMPLING_TIMESTEPS": 4, "BATCH_SIZE": 16, "WARMUP_STEPS": 1,
    "LEARNING_RATE": 0.03, "GUIDE_FRACTION": 0.5, "LR_SCHEDULE": "cosine", "CHECKPOINT_EVERY": 0,
    "NUM_SAMPLE_GRIDS": 0, "GRID_IMAGES": 4,
}  # fmt: skip

# Flags of a model that several ranks train: no dropout, whose masks differ by rank.
RANK_FLAGS = {
    "IMAGE_SIZE": 8, "DIM": 8, "DIM_MULTS": (1, 2), "ATTENTION_HEADS": (1,), "ATTENTION_DIM": (16,),
    "BATCH_SIZE": 32, "WARMUP_STEPS": 5, "LR_SCHEDULE": "constant", "KEEP": 0,
    "SAMPLING_TIMESTEPS": 4, "GRID_IMAGES": 4, "NUM_SAMPLE_GRIDS": 2,
}  # fmt: skip

# The settings that a TrainStep reads.
STEP_SETTINGS = {
    "BATCH_SIZE": 32, "GRADIENT_ACCUMULATION": 1, "OPTIMIZER": "adam", "WEIGHT_DECAY": 0.1,
    "GRAD_CLIP": 1.0, "EMA_DECAY": 0.9, "HORIZONTAL_FLIP": True, "LABEL_DROPOUT": 0.0,
    "USE_AMP": False, "GRADIENT_CHECKPOINTING": False, "COMPILE_MODEL": False, "CUDA_GRAPH": False,
    "SEED": 0,
}  # fmt: skip

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_no_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="runs on machines without a GPU"
)


def exit_code(main: Callable[[], None]) -> int:
    """Runs a script's main in this process, as the script does; returns its exit code."""
    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    return stopped.value.code


def run_script_ok(folder: Path, script: str, *arguments: str) -> str:
    """Runs a script that must succeed and returns what it prints."""
    process = ForkedScript(folder, script, *arguments)
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    return output


def configure(*argv: str, script: dict | None = None) -> Config:
    """The configuration that a training script gets with this command line."""
    request = train.parse_command_line("", script or {}, argv)
    checkpoint = checkpoints.load_training(request.resume) if request.resume else None
    return train.configure(request, checkpoint)


def hold_lock(name: str) -> int:
    """Locks a run's folder as another process would; returns the handle."""
    fcntl = pytest.importorskip("fcntl")
    folder = Path("checkpoints", name)
    folder.mkdir(parents=True)
    handle = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def read_rows(folder: Path, name: str) -> list[dict]:
    """The metrics of a run in a folder."""
    lines = (folder / "samples" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def logged_steps(folder: Path, name: str, key: str = "loss") -> list[int]:
    """The steps of a run that have a metric."""
    return [row["step"] for row in read_rows(folder, name) if key in row]


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


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random values in channels-last memory."""
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def compare_gradients(
    kernel: Callable, formula: Callable, inputs: Sequence[torch.Tensor | None],
    dy: torch.Tensor, limit: float = 1e-5,
) -> None:  # fmt: skip
    """Asserts that both have the same output and gradients."""
    found = []
    for function in (kernel, formula):
        leaves = [x if x is None else x.detach().clone().requires_grad_() for x in inputs]
        y = function(*leaves)
        y.backward(dy)
        found.append([y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)])
    for a, b in zip(*found, strict=True):
        assert relative_error(a, b) < limit


def make_batch(count: int = 32) -> Batch:
    """Random images of 8 px to train on."""
    generator = torch.Generator().manual_seed(1)
    return Batch(torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator))


def random_images(count: int, size: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Random uint8 images (count, channels, size, size)."""
    shape = (count, channels, size, size)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_gray(path: Path, value: int, size: tuple[int, int] = (4, 4)) -> None:
    """Writes an image file of one gray value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)


def png(image: np.ndarray) -> bytes:
    """A PNG file of an image (H, W) or (H, W, C)."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


class FakeTime:
    """Stands in for the module `time`; its clock is set by the test."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


# Networks.

UNET_ARCHITECTURES = [
    dict(dim=32, dim_mults=(1, 2, 4)),
    dict(
        dim=24, dim_mults=(1, 2), attn_heads=(1, 4), attn_dim_head=(16, 32), full_attn=(True, False)
    ),
    dict(dim=16, dim_mults=(1, 2, 2), self_condition=True, learned_sinusoidal_cond=True),
]


def unet_pair(device: str = "cpu", **architecture) -> tuple[Unet, FastUnet]:
    """Upstream's Unet and a FastUnet with the same random weights."""
    torch.manual_seed(0)
    reference = Unet(**architecture)
    fast = FastUnet(**architecture)
    for parameter in reference.parameters():  # gains and biases other than 1 and 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    fast.load_state_dict(reference.state_dict())
    return reference.to(device), fast.to(device, memory_format=torch.channels_last)


def outputs_and_gradients(
    network: nn.Module, autocast: bool = False, size: int = 16
) -> list[torch.Tensor]:
    """Output, gradient of the input, and the gradients of all weights in one vector."""
    generator = torch.Generator().manual_seed(1)
    device = next(network.parameters()).device
    x, dy = (torch.randn(3, 3, size, size, generator=generator).to(device) for _ in range(2))
    x.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        y = network(x, torch.tensor([0, 400, 999], device=device))
    (y.float() * dy).sum().backward()
    parameters = sorted(dict(network.named_parameters()).items())
    return [y.detach().float(), x.grad, torch.cat([p.grad.flatten() for _, p in parameters])]


# Archives.


def change_archive(monkeypatch, dataset: str, **changes) -> None:
    """Replaces fields of a data set's archive."""
    changed = replace(ARCHIVES[dataset], **changes)
    monkeypatch.setitem(ARCHIVES, dataset, changed)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    """Writes a .tar.gz of files by name."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    """Writes a .zip of files by name."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


# Stand-ins.


class MeanColors(torch.nn.Module):
    """A feature network whose features are the mean colors."""

    title = "FD-Colors"

    def __init__(self, name: str = "colors"):
        super().__init__()
        self.name = name
        self.batch_sizes = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.batch_sizes.append(len(images))
        return images.float().mean(dim=(2, 3))


class Mixture:
    """The exact denoiser of pixels that are N(-0.3, 0.3^2) or N(0.4, 0.2^2)."""

    means = torch.tensor([[-0.3], [0.4]]).double()
    variances = torch.tensor([[0.09], [0.04]]).double()

    def __init__(self, alpha_bar: list[float]):
        self.alpha_bar = alpha_bar
        self.nfe = 0

    def __call__(self, x: Tensor, t: int) -> Tensor:
        self.nfe += 1
        a = self.alpha_bar[t]
        variance = a * self.variances + 1 - a
        offset = x.flatten() - math.sqrt(a) * self.means
        weight = torch.softmax(-(offset**2) / variance / 2 - variance.log() / 2, dim=0)
        x_0 = weight * (self.means + math.sqrt(a) * self.variances / variance * offset)
        return x_0.sum(0).view_as(x)

    def cdf(self, x: Tensor, a: float) -> Tensor:
        """The probability that a pixel of x_t is below x, where alpha_bar is a."""
        offset = x.flatten() - math.sqrt(a) * self.means
        std = (a * self.variances + 1 - a).sqrt()
        return torch.special.ndtr(offset / std).mean(0).view_as(x)

    def flow(self, x: Tensor) -> Tensor:
        """The image of x_T by the probability flow, which keeps a pixel's quantile."""
        low = torch.full_like(x, -3)
        high = torch.full_like(x, 3)
        for _ in range(60):
            middle = (low + high) / 2
            is_low = self.cdf(middle, 1.0) < self.cdf(x, self.alpha_bar[-1])
            low = torch.where(is_low, middle, low)
            high = torch.where(is_low, high, middle)
        return middle


class RecordedStep:
    """Stands in for TrainStep: records how it is made and called."""

    made: ClassVar[list["RecordedStep"]] = []

    def __init__(self, model, config, rank, world_size):
        RecordedStep.made.append(self)
        self.config = config
        self.ranks = (rank, world_size)
        self.calls: list[tuple[Batch, int, float]] = []

    def __call__(self, batch, number, lr):
        self.calls.append((batch, number, lr))
        return torch.tensor(number / 7), None

    def validate(self, batch):
        return batch.images.flatten().tolist()


# Ranks.


def torchrun(folder: Path, script: str, *arguments: str, count: int = 2) -> subprocess.Popen:
    """Starts `count` ranks of a script in the folder, or else of the repository."""
    path = folder / script if (folder / script).exists() else ROOT / script
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [*launcher, f"--nproc_per_node={count}", str(path), *arguments], cwd=folder, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def save_images(folder: Path) -> None:
    """Writes 200 images of two classes to folder/images."""
    for i, pixels in enumerate(random_images(200, 8).transpose(0, 2, 3, 1)):
        path = folder / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def training_arguments(*arguments: str) -> list[str]:
    """A command line that trains on what save_images wrote."""
    flags = ["--dataset", "folder", "--data_dir", "images"]
    for name, value in RANK_FLAGS.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        flags += [f"--{name.lower()}", text]
    return [*flags, *arguments]


def error_lines(errors: str) -> list[str]:
    """The lines `error: ...` that a script printed."""
    return re.findall(r"^error: .*", errors, re.MULTILINE)


def kill_one_rank(launcher: subprocess.Popen, run_name: str) -> None:
    """Kills rank 1 once something is saved; all must end and say so in one line."""
    while not Path(f"checkpoints/{run_name}/last.pt").exists():
        assert launcher.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(launcher.pid).children()
    (victim,) = [worker for worker in workers if worker.environ().get("RANK") == "1"]
    victim.kill()
    _, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 1
    (line,) = error_lines(errors)
    assert "another rank may have died: " in line or "is stuck" in line
    assert line.endswith(f". Resume with --resume {run_name}")
    assert errors.count("Traceback (most") == 1  # the launcher's
