"""Random inputs of a training step, and the state of the global random generators."""

import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class StepRandomness(NamedTuple):
    """Random inputs of a step on an effective batch of B images."""

    timestep_u: Tensor  # (B,), uniform in [0, 1], mapped to timesteps
    noise: Tensor  # (B, C, H, W), standard normal
    mirror: Tensor  # bool (B,), which images HORIZONTAL_FLIP mirrors
    label_u: Tensor  # (B,), uniform in [0, 1); below LABEL_DROPOUT, an image loses its label


def step_randomness(
    seed: int, step: int, shape: torch.Size, device: torch.device
) -> StepRandomness:
    """Returns the random inputs of a step, for an effective batch (B, C, H, W).

    A function of (seed, step), so accumulation, ranks and resuming change nothing (dropout uses
    the global generators). timestep_u is stratified: one value in each of B equal parts of [0, 1],
    in ascending order, Kingma et al. (arXiv:2107.00630).
    """
    # Neighboring seeds are more steps apart than any run has, so no two runs share noise.
    generator = torch.Generator(device).manual_seed(seed * 0x9E3779B1 + step)
    offset = torch.rand(shape[:1], generator=generator, device=device)
    return StepRandomness(
        timestep_u=(offset + torch.arange(shape[0], device=device)) / shape[0],
        noise=torch.randn(shape, generator=generator, device=device),
        mirror=torch.rand(shape[:1], generator=generator, device=device) < 0.5,
        label_u=torch.rand(shape[:1], generator=generator, device=device),
    )


def seed_everything(seed: int) -> None:
    """Seeds the global generators of torch and Python; dropout and self-conditioning use them."""
    torch.manual_seed(seed)
    random.seed(seed)


def get_rng_state(device: torch.device) -> dict[str, Any]:
    """Returns the state of the global generators; a GPU's by the name of its backend."""
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restores what get_rng_state returned."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type])
