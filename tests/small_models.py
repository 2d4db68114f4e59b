"""Small models to sample from, and what several test files do with them and their images."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddpm_model import DDPMModel
from engine import page, plots
from engine.page import Plan, Request, ServedModel
from inference import InferenceSettings

NARROW = {"dim": 8, "attn_heads": 1, "attn_dim_head": 16}
SMALL = NARROW | {"image_size": 8, "dim_mults": (1,), "timesteps": 40, "sampling_timesteps": 5}
CUSTOM_SAMPLER = """
from engine.samplers import alpha_bar_at

def plain(denoiser, x, timesteps, randn):
    for t, s in zip(timesteps, timesteps[1:]):
        a_t, a_s = alpha_bar_at(denoiser, t), alpha_bar_at(denoiser, s)
        x_0 = denoiser(x, t)
        noise = (x - a_t**0.5 * x_0) / (1 - a_t) ** 0.5
        x = a_s**0.5 * x_0 + (1 - a_s) ** 0.5 * noise
        yield x, x_0
"""


def small_model(seed: int = 0, **architecture) -> DDPMModel:
    torch.manual_seed(seed)
    return DDPMModel(**SMALL | architecture).eval()


def guided_model(seed: int = 0, **architecture) -> DDPMModel:
    """A model with a guide of other weights."""
    model = small_model(seed, **architecture)
    model.snapshot_guide()
    for p in model.unet.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def load_model() -> DDPMModel:
    return small_model(seed=2).load_model("checkpoints/ddpm_final.pt").eval()


# What inference.py writes.


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), int)


def only(pattern: str, folder: str | Path = "inference_results") -> Path:
    (path,) = Path(folder).glob(pattern)
    return path


def is_image(path: Path, image: Tensor) -> bool:
    """Whether a file shows an image, up to rounding."""
    return np.abs(pixels(path) - plots.to_bytes(image).astype(int)).max() <= 1


# What app.py shows.

CONTROLS = {"seeds": "3,7", "classes": [], "sampler": "ddim", "steps": 4, "guidance": 1.5}


def save_model(path: str, seed: int = 0, **architecture) -> Path:
    """Writes a guided model whose own number of steps is that of the controls."""
    guided_model(seed, sampling_timesteps=CONTROLS["steps"], **architecture).save_model(path)
    return Path(path)


def plan_of(served: ServedModel, request: Request | None = None, **controls) -> Plan:
    values = (CONTROLS | controls).values()
    return Plan.of_controls(served, request or Request(), InferenceSettings, *values)


def last_x_t(film: str) -> np.ndarray:
    """The last image of a trajectory's film, without the x_0 next to it."""
    last = film.split('src="')[-1].split('"')[0]
    return np.asarray(Image.open(page.resolve_input(last)), int)[:, :8]
