"""Samplers: plain functions over a denoiser.

A denoiser D(x, t) predicts the clean image x_0 from x_t and carries `alpha_bar`, the cumulative product of
1 - beta as a list of T floats, the last of which may be 0. Images are in [-1, 1]. A sampler is a generator over
`timesteps`, which fall and end in -1, the clean image: for each interval between two of them it yields (x, x_0),
x_0 as predicted at its upper end and x at its lower; the last x is the sample. All randomness is handed in: x_T as
`x`, and `randn(x)` for fresh noise, so that a sampler is a function that can be tested. Coefficients are Python
floats, so a GPU is never waited for.

The deterministic samplers all solve one ODE, the probability flow of Song et al. (arXiv:2011.13456), and converge to
the same image as their steps grow: DDIM at first order, DPM-Solver++(2M) and Heun at second, UniPC at third.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

Randn = Callable[[Tensor], Tensor]
Step = tuple[Tensor, Tensor]

SIGMA_MAX = 80.0  # the largest noise level of Karras et al. (arXiv:2206.00364): above it an image is noise alone


class Denoiser(Protocol):
    """What a sampler needs of a model."""

    alpha_bar: Sequence[float]

    def __call__(self, x: Tensor, t: int) -> Tensor:
        """x_0 predicted from x_t, both (B, C, H, W); t in [0, T)."""
        ...


def level(denoiser: Denoiser, t: int) -> float:
    """alpha_bar at timestep t, 1 for the clean image (t = -1)."""
    return denoiser.alpha_bar[t] if t >= 0 else 1.0


def half_log_snr(a: float) -> float:
    """lambda = log(alpha / sigma) of DPM-Solver, where a is alpha_bar in [0, 1]: from -inf to inf."""
    if a in (0, 1):
        return math.inf if a else -math.inf
    return math.log(a / (1 - a)) / 2


def noise_level(a: float) -> float:
    """sigma of Karras et al. (arXiv:2206.00364): of the noise in x / sqrt(a), alpha_bar a in [0, 1]; inf at 0."""
    return math.sqrt((1 - a) / a) if a > 0 else math.inf


def ddpm(denoiser: Denoiser, x: Tensor, timesteps: Sequence[int], randn: Randn) -> Iterator[Step]:
    """Ancestral sampling, algorithm 2 of Ho et al. (arXiv:2006.11239), with the posterior's own variance.

    If some timesteps are left out, the posterior of those that remain is used.
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
    """DDIM, equations 12 and 16 of Song et al. (arXiv:2010.02502); eta 0 is deterministic, 1 as noisy as DDPM."""
    for t, s in pairwise(timesteps):
        a_t, a_s = level(denoiser, t), level(denoiser, s)
        x_0 = denoiser(x, t)
        noise = (x - math.sqrt(a_t) * x_0) / math.sqrt(1 - a_t)
        fresh = eta**2 * (1 - a_t / a_s) / (1 - a_t)  # sigma^2 as a share of 1 - a_s: rounding keeps it within 1
        x = math.sqrt(a_s) * x_0 + math.sqrt((1 - a_s) * (1 - fresh)) * noise
        if eta > 0 and s >= 0:
            x = x + math.sqrt((1 - a_s) * fresh) * randn(x)
        yield x, x_0


def advance(x: Tensor, x_0: Tensor, a_t: float, a_s: float) -> Tensor:
    """x moved from alpha_bar a_t to a_s by the probability flow if x_0 stays as it is: one step of DDIM.

    In the terms of DPM-Solver++ it is (sigma_s / sigma_t) x - alpha_s (exp(-h) - 1) x_0. A sampler of higher order
    makes this step with a better average of x_0 over the interval.
    """
    shrink = math.sqrt((1 - a_s) / (1 - a_t))
    return shrink * x + (math.sqrt(a_s) - shrink * math.sqrt(a_t)) * x_0


def dpm_solver_pp_2m(denoiser: Denoiser, x: Tensor, timesteps: Sequence[int], randn: Randn) -> Iterator[Step]:
    """DPM-Solver++(2M), algorithm 2 of Lu et al. (arXiv:2211.01095): x_0 extrapolated from the last two evaluations.

    The first step, which has only one, and the last, which is infinitely long in lambda, are of first order.
    """
    before = None  # x_0 and h of the step before
    for t, s in pairwise(timesteps):
        a_t, a_s = level(denoiser, t), level(denoiser, s)
        h = half_log_snr(a_s) - half_log_snr(a_t)
        x_0 = average = denoiser(x, t)
        if before and s >= 0:
            x_0_before, h_before = before
            average = x_0 + h / (2 * h_before) * (x_0 - x_0_before)  # the paper's D, its r is h_before / h
        x = advance(x, average, a_t, a_s)
        before = x_0, h
        yield x, x_0


def unipc(denoiser: Denoiser, x: Tensor, timesteps: Sequence[int], randn: Randn) -> Iterator[Step]:
    """UniPC-2 with B_2(h) = exp(h) - 1, predicting x_0: Zhao et al. (arXiv:2302.04867).

    Its predictor (UniP-2) is the step of DPM-Solver++(2M). The evaluation at its end then also corrects the interval
    that led there (UniC-2), at no further cost; the last interval, to the clean image, has none to be corrected by.
    """
    interval = before = None  # from r to t: x, x_0 and alpha_bar at r, length h; the change of x_0 over it, and h
    for t, s in pairwise(timesteps):
        a_t, a_s = level(denoiser, t), level(denoiser, s)
        h = half_log_snr(a_s) - half_log_snr(a_t)
        x_0 = average = denoiser(x, t)
        if interval:
            x_r, x_0_r, a_r, h_r = interval
            change = x_0 - x_0_r
            corrected = x_0_r + change / 2
            if before:
                change_before, h_before = before
                g = h_r / h_before
                b_1 = -1 / math.expm1(-h_r) - 1 / h_r
                b_2 = -1 / math.expm1(-h_r) - 2 * b_1 / h_r
                corrected = x_0_r + ((b_1 + b_2 * g) * change + (b_1 - b_2) * g**2 * change_before) / (1 + g)
            x = advance(x_r, corrected, a_r, a_t)
            before = change, h_r
            if s >= 0:
                average = x_0 + h / (2 * h_r) * change
        interval = x, x_0, a_t, h
        x = advance(x, average, a_t, a_s)
        yield x, x_0


def heun(denoiser: Denoiser, x: Tensor, timesteps: Sequence[int], randn: Randn) -> Iterator[Step]:
    """Heun's method in sigma, algorithm 1 of Karras et al. (arXiv:2206.00364), without their fresh noise.

    The paper's variable is y = x / sqrt(alpha_bar), its d = dy / dsigma the predicted noise. Two evaluations an
    interval but the last: 2n - 1 for n. Above their largest sigma the same rule is used in 1 / sigma: in sigma it
    grows without bound, in 1 / sigma it can start from infinity.
    """
    for t, s in pairwise(timesteps):
        a_t, a_s = level(denoiser, t), level(denoiser, s)
        sigma_t, sigma_s = noise_level(a_t), noise_level(a_s)
        x_0 = denoiser(x, t)
        d = (x - math.sqrt(a_t) * x_0) / math.sqrt(1 - a_t)
        y = x_0 + sigma_s * d  # Euler's step, y + (sigma_s - sigma_t) d, without the infinity it may begin at
        x = math.sqrt(a_s) * y
        if s >= 0:
            d_s = (y - denoiser(x, s)) / sigma_s
            length = sigma_s - sigma_t if sigma_t <= SIGMA_MAX else (sigma_s / sigma_t - 1) * sigma_s
            x = math.sqrt(a_s) * (y + length / 2 * (d_s - d))  # its mean with the step that d_s would make
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
        noise = torch.stack([torch.randn(tuple(shape), generator=generator) for generator in self.generators])
        if device.type == "cuda":  # from pinned memory the copy waits for nothing
            noise = noise.pin_memory()
        return noise.to(device, non_blocking=True)

    def __call__(self, x: Tensor) -> Tensor:
        """Noise like x, (B, C, H, W)."""
        return self.draw(x.shape[1:], x.device)


def groups(seeds: Sequence[int], size: int) -> list[list[int]]:
    """Seeds in groups of `size`, the last of what remains: what is drawn at a time."""
    return [list(seeds[start : start + size]) for start in range(0, len(seeds), size)]


SAMPLERS: dict[str, Callable[..., Iterator[Step]]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmpp_2m": dpm_solver_pp_2m,
    "heun": heun,
    "unipc": unipc,
}


def intervals(sampler: Callable[..., Iterator[Step]], steps: int) -> int:
    """Intervals that a sampler crosses in `steps` network evaluations; Heun takes an odd number, so it may save one."""
    return (steps + 1) // 2 if sampler is heun else steps


def uniform(alpha_bar: Sequence[float], steps: int) -> list[int]:
    """Evenly spaced timesteps, rounded down: those of the library's DDIM."""
    return torch.linspace(-1, len(alpha_bar) - 1, steps + 1).int().flip(0).tolist()


def trailing(alpha_bar: Sequence[float], steps: int) -> list[int]:
    """Evenly spaced timesteps counted from the last, rounded: table 2 of Lin et al. (arXiv:2305.08891)."""
    return [round(len(alpha_bar) * i / steps) - 1 for i in range(steps, -1, -1)]


def logsnr(alpha_bar: Sequence[float], steps: int) -> list[int]:
    """Evenly spaced log-SNR, from noise to the first timestep: Lu et al. (arXiv:2206.00927)."""
    return evenly_in(math.log, alpha_bar, steps)


def karras(alpha_bar: Sequence[float], steps: int) -> list[int]:
    """Evenly spaced sigma^(1/7), from noise to the first timestep: equation 5 of Karras et al. (arXiv:2206.00364)."""
    return evenly_in(lambda sigma: sigma ** (1 / 7), alpha_bar, steps)


def evenly_in(measure: Callable[[float], float], alpha_bar: Sequence[float], steps: int) -> list[int]:
    """Timesteps that come nearest to being evenly spaced in measure(sigma), which rises with sigma.

    The range ends at SIGMA_MAX, lest most steps be spent on noise alone, or at the last timestep's sigma if that is
    lower. Where two would be the same timestep, the later one moves down, or up where there is no room below.
    """
    at = np.array([measure(min(noise_level(a), SIGMA_MAX)) for a in alpha_bar])
    timesteps = [len(at) - 1]
    for left, wanted in zip(range(steps - 2, -1, -1), np.linspace(at[-1], at[0], steps)[1:], strict=True):
        nearest = int(np.abs(at - wanted).argmin())
        timesteps.append(max(min(nearest, timesteps[-1] - 1), left))
    return [*timesteps, -1]


# (alpha_bar, steps) to steps + 1 timesteps: from T - 1, each lower than the one before, to -1; steps in [1, T]
SPACINGS: dict[str, Callable[[Sequence[float], int], list[int]]] = {
    "uniform": uniform,
    "trailing": trailing,
    "logsnr": logsnr,
    "karras": karras,
}

SAMPLER, SPACING = "unipc", "karras"  # unless told otherwise: docs/recipe.md has the distances of all
