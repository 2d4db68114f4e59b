"""Samplers: plain functions over a denoiser.

A denoiser D(x, t) predicts the clean image x_0 from x_t and carries `alpha_bar`, the cumulative product of
1 - beta as a list of T floats. Images are in [-1, 1]. A sampler is a generator: it yields (x, x_0) after each
network evaluation, where x is the image at the next timestep; the last x is the sample. All randomness is
handed in: x_T as `x`, and `randn(x)` for fresh noise, so that a sampler is a function that can be tested.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

Randn = Callable[[Tensor], Tensor]
Step = tuple[Tensor, Tensor]


class Denoiser(Protocol):
    """What a sampler needs of a model."""

    alpha_bar: Sequence[float]

    def __call__(self, x: Tensor, t: int) -> Tensor:
        """x_0 predicted from x_t, both (B, C, H, W); t in [0, T)."""
        ...


def uniform_timesteps(timesteps: int, steps: int) -> list[int]:
    """steps + 1 timesteps from T - 1 down to -1, evenly spaced; -1 stands for the clean image."""
    return [int(t) for t in torch.linspace(-1, timesteps - 1, steps + 1).int().flip(0)]


def level(denoiser: Denoiser, t: int) -> float:
    """alpha_bar at timestep t, 1 for the clean image (t = -1)."""
    return denoiser.alpha_bar[t] if t >= 0 else 1.0


def ddpm(denoiser: Denoiser, x: Tensor, timesteps: Sequence[int], randn: Randn) -> Iterator[Step]:
    """Ancestral sampling, algorithm 2 of Ho et al. (arXiv:2006.11239), with the posterior's own variance.

    timesteps: from high to low, ending in -1. If some are left out, the posterior of the steps that remain is used.
    """
    for t, s in pairwise(timesteps):
        a_t, a_s = level(denoiser, t), level(denoiser, s)
        alpha, beta = a_t / a_s, 1 - a_t / a_s
        x_0 = denoiser(x, t)
        mean = (math.sqrt(a_s) * beta * x_0 + math.sqrt(alpha) * (1 - a_s) * x) / (1 - a_t)
        variance = (1 - a_s) / (1 - a_t) * beta
        x = mean + math.sqrt(variance) * randn(x) if s >= 0 else mean
        yield x, x_0


def ddim(denoiser: Denoiser, x: Tensor, timesteps: Sequence[int], randn: Randn, eta: float = 0.0) -> Iterator[Step]:
    """DDIM, equation 12 of Song et al. (arXiv:2010.02502); eta 0 is deterministic, 1 as noisy as DDPM."""
    for t, s in pairwise(timesteps):
        a_t, a_s = level(denoiser, t), level(denoiser, s)
        x_0 = denoiser(x, t)
        noise = (x - math.sqrt(a_t) * x_0) / math.sqrt(1 - a_t)
        sigma = eta * math.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
        x = math.sqrt(a_s) * x_0 + math.sqrt(1 - a_s - sigma**2) * noise
        if sigma > 0:
            x = x + sigma * randn(x)
        yield x, x_0


def ddim_encode(denoiser: Denoiser, x: Tensor, timesteps: Sequence[int]) -> Tensor:
    """Runs DDIM backwards, from a clean image to the x_T that DDIM would draw it from.

    timesteps as for `ddim`. Exact only in the limit of many steps: each step takes the noise predicted at its
    lower end for the noise at its upper end.
    """
    rising = list(reversed(timesteps))
    for s, t in pairwise(rising):
        a_s, a_t = level(denoiser, s), level(denoiser, t)
        here = max(s, 0)  # the network knows no timestep of the clean image
        x_0 = denoiser(x, here)
        a_here = denoiser.alpha_bar[here]
        noise = (x - math.sqrt(a_here) * x_0) / math.sqrt(1 - a_here)
        clean = (x - math.sqrt(1 - a_s) * noise) / math.sqrt(a_s)
        x = math.sqrt(a_t) * clean + math.sqrt(1 - a_t) * noise
    return x


def slerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Spherical interpolation: `weight` (N,) in [0, 1] between a and b, each (C, H, W); returns (N, C, H, W).

    Keeps the norm that x_T has under the model; a straight line would lose it half-way.
    """
    cos = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1)
    angle = torch.arccos(cos)
    w = weight.view(-1, 1, 1, 1)
    if angle < 1e-4:  # the same point twice
        return (1 - w) * a + w * b
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)


class SeededNoise:
    """Gaussian noise in which each image has a generator of its own, so that it does not depend on the batch.

    The generators run on the CPU: a seed means the same noise on every device.
    """

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Noise (B, *shape), B the number of seeds."""
        rows = [torch.randn(tuple(shape), generator=generator) for generator in self.generators]
        return torch.stack(rows).to(device, non_blocking=True)

    def __call__(self, x: Tensor) -> Tensor:
        """Noise like x, (B, C, H, W)."""
        return self.draw(x.shape[1:], x.device)


SAMPLERS: dict[str, Callable[..., Iterator[Step]]] = {"ddpm": ddpm, "ddim": ddim}
