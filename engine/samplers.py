"""Samplers: plain functions over a denoiser, and the timesteps they go through.

A sampler is a generator over decreasing `timesteps` that end in -1, the clean image. For each
interval from t to s it yields (x_s, x_0), x_0 as predicted at t; the last x_s is the sample. Images
are in [-1, 1]. x is x_T; randn(x) returns further noise of its shape. a_t is alpha_bar at t, the
cumulative product of 1 - beta, a Python float so that the host never waits for the GPU; it may be 0
at T - 1. ddim (eta 0), dpmpp_2m, heun and unipc solve one ODE, the probability flow of Song et al.
(arXiv:2011.13456), with order 1, 2, 2 and 3, and converge to one image as steps increase. ddpm,
ddim with eta above 0 and consistency add noise at each step.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.errors import RenamedWarning, UserError
from engine.noise_schedule import SIGMA_MAX, half_log_snr, sigma_of

Randn = Callable[[Tensor], Tensor]
Timesteps = Sequence[int]
SamplerOutput = Iterator[tuple[Tensor, Tensor]]  # (x_s, x_0) of each interval
MAX_HEUN_RATIO = 30  # of the last two sigmas; at 43 images have specks, at 490 they are noise


class Denoiser(Protocol):
    """Predicts x_0 from x_t, both (B, C, H, W), for t in [0, T), T = len(alpha_bar)."""

    alpha_bar: Sequence[float]

    def __call__(self, x: Tensor, t: int) -> Tensor: ...


def alpha_bar_at(denoiser: Denoiser, t: int) -> float:
    """Returns alpha_bar at timestep t, 1 for the clean image (t = -1)."""
    return denoiser.alpha_bar[t] if t >= 0 else 1.0


def intervals(denoiser: Denoiser, timesteps: Timesteps) -> Iterator[tuple[int, int, float, float]]:
    """Yields (t, s, a_t, a_s) for each interval from t to s."""
    for t, s in pairwise(timesteps):
        yield t, s, alpha_bar_at(denoiser, t), alpha_bar_at(denoiser, s)


def ddpm(denoiser: Denoiser, x: Tensor, timesteps: Timesteps, randn: Randn) -> SamplerOutput:
    """DDPM with posterior variance: algorithm 2 of Ho et al. (arXiv:2006.11239)."""
    for t, s, a_t, a_s in intervals(denoiser, timesteps):
        alpha = a_t / a_s
        beta = 1 - alpha
        x_0 = denoiser(x, t)
        mean = (math.sqrt(a_s) * beta * x_0 + math.sqrt(alpha) * (1 - a_s) * x) / (1 - a_t)
        variance = (1 - a_s) / (1 - a_t) * beta
        x = mean + math.sqrt(variance) * randn(x) if s >= 0 else mean
        yield x, x_0


def ddim(
    denoiser: Denoiser, x: Tensor, timesteps: Timesteps, randn: Randn, eta: float = 0.0
) -> SamplerOutput:
    """DDIM, as DDPM if eta is 1: Song et al. (arXiv:2010.02502), equations 12 and 16."""
    if not 0 <= eta <= 1:
        raise UserError(f"eta is {eta}, but must be between 0 and 1")
    for t, s, a_t, a_s in intervals(denoiser, timesteps):
        x_0 = denoiser(x, t)
        epsilon = (x - math.sqrt(a_t) * x_0) / math.sqrt(1 - a_t)
        # sigma_t^2 as a fraction of 1 - a_s, so that rounding cannot make it larger than that
        noise_fraction = eta**2 * (1 - a_t / a_s) / (1 - a_t)
        x = math.sqrt(a_s) * x_0 + math.sqrt((1 - a_s) * (1 - noise_fraction)) * epsilon
        if eta > 0 and s >= 0:
            x = x + math.sqrt((1 - a_s) * noise_fraction) * randn(x)
        yield x, x_0


def ddim_step(x: Tensor, x_0: Tensor, a_t: float, a_s: float) -> Tensor:
    """Moves x from a_t to a_s: the exact solution of the probability flow for a constant x_0."""
    ratio = math.sqrt((1 - a_s) / (1 - a_t))
    return ratio * x + (math.sqrt(a_s) - ratio * math.sqrt(a_t)) * x_0


def dpmpp_2m(denoiser: Denoiser, x: Tensor, timesteps: Timesteps, randn: Randn) -> SamplerOutput:
    """DPM-Solver++(2M): algorithm 2 of Lu et al. (arXiv:2211.01095).

    The first step has no earlier one to use, and for the last h is inf: both have order 1.
    """
    interval_before = None  # its x_0 and h
    for t, s, a_t, a_s in intervals(denoiser, timesteps):
        h = half_log_snr(a_s) - half_log_snr(a_t)
        x_0 = denoiser(x, t)
        D = x_0
        if interval_before and s >= 0:
            x_0_before, h_before = interval_before
            D = x_0 + h / (2 * h_before) * (x_0 - x_0_before)  # the paper's r is h_before / h
        interval_before = x_0, h
        x = ddim_step(x, D, a_t, a_s)
        yield x, x_0


def unipc(denoiser: Denoiser, x: Tensor, timesteps: Timesteps, randn: Randn) -> SamplerOutput:
    """UniPC of order 2 with B_2(h) = exp(h) - 1: Zhao et al. (arXiv:2302.04867).

    The predictor, UniP-2, is the step of DPM-Solver++(2M). The evaluation at its end also corrects
    the interval that led there (UniC-2); the last interval stays uncorrected.
    """
    interval = None  # from r to t: x_r, x_0 predicted at r, a_r, h
    interval_before = None  # that ended at r: change of x_0, h
    for t, s, a_t, a_s in intervals(denoiser, timesteps):
        h = half_log_snr(a_s) - half_log_snr(a_t)
        x_0 = denoiser(x, t)
        D = x_0
        if interval:
            # Correct the step from r to t; g is -1 / r_1 of the paper.
            x_r, x_0_r, a_r, h_r = interval
            change = x_0 - x_0_r
            corrected = x_0_r + change / 2  # UniC-1, without an earlier interval
            if interval_before:
                change_before, h_before = interval_before
                g = h_r / h_before
                b_1 = -1 / math.expm1(-h_r) - 1 / h_r
                b_2 = -1 / math.expm1(-h_r) - 2 * b_1 / h_r
                weighted = (b_1 + b_2 * g) * change + (b_1 - b_2) * g**2 * change_before
                corrected = x_0_r + weighted / (1 + g)
            interval_before = change, h_r
            x = ddim_step(x_r, corrected, a_r, a_t)
            if s >= 0:
                D = x_0 + h / (2 * h_r) * change
        # Predict the step from t to s.
        interval = x, x_0, a_t, h
        x = ddim_step(x, D, a_t, a_s)
        yield x, x_0


def heun(denoiser: Denoiser, x: Tensor, timesteps: Timesteps, randn: Randn) -> SamplerOutput:
    """Heun's method in sigma: algorithm 1 of EDM (arXiv:2206.00364) for sigma(t) = t.

    The paper's x is y = x / sqrt(alpha_bar) here, its d = dy / dsigma the predicted noise. A step
    from above SIGMA_MAX applies the trapezoidal rule to y / sigma as a function of 1 / sigma, whose
    derivative is x_0: both are finite where sigma is not.
    """
    for t, s, a_t, a_s in intervals(denoiser, timesteps):
        sigma_t = sigma_of(a_t)
        sigma_s = sigma_of(a_s)
        x_0 = denoiser(x, t)
        d = (x - math.sqrt(a_t) * x_0) / math.sqrt(1 - a_t)
        y = x_0 + sigma_s * d  # Euler's step, y_t + (sigma_s - sigma_t) d
        x = math.sqrt(a_s) * y
        if s >= 0:
            d_s = (y - denoiser(x, s)) / sigma_s
            step = sigma_s - sigma_t if sigma_t <= SIGMA_MAX else (sigma_s / sigma_t - 1) * sigma_s
            x = math.sqrt(a_s) * (y + step / 2 * (d_s - d))
        yield x, x_0


def consistency(denoiser: Denoiser, x: Tensor, timesteps: Timesteps, randn: Randn) -> SamplerOutput:
    """Multistep consistency sampling: algorithm 1 of Song et al. (arXiv:2303.01469).

    For a denoiser whose x_0 is where the probability flow ends: noise is added to it again.
    """
    for t, s, _, a_s in intervals(denoiser, timesteps):
        x_0 = denoiser(x, t)
        x = math.sqrt(a_s) * x_0 + math.sqrt(1 - a_s) * randn(x) if s >= 0 else x_0
        yield x, x_0


def ddim_encode(denoiser: Denoiser, x: Tensor, timesteps: Timesteps) -> Tensor:
    """Runs ddim backwards, from image x to its x_T; exact in the limit of many steps."""
    for _, s, a_t, a_s in reversed(list(intervals(denoiser, timesteps))):
        t_in = max(s, 0)  # there is no timestep of the clean image
        a_in = denoiser.alpha_bar[t_in]
        epsilon = (x - math.sqrt(a_in) * denoiser(x, t_in)) / math.sqrt(1 - a_in)
        x_0 = (x - math.sqrt(1 - a_s) * epsilon) / math.sqrt(a_s)
        x = math.sqrt(a_t) * x_0 + math.sqrt(1 - a_t) * epsilon
    return x


def slerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Interpolates from a to b (C, H, W) on a sphere by weight (N,): (N, C, H, W)."""
    cos = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1)
    angle = torch.arccos(cos)
    w = weight.view(-1, 1, 1, 1)
    if angle < 1e-4:  # the same point
        return (1 - w) * a + w * b
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)


class SeededNoise:
    """Gaussian noise with a CPU generator per image; the same on any device, in any batch."""

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the next noise of each seed, with the shape of x, (B, C, H, W)."""
        noise = torch.empty(x.shape, pin_memory=x.is_cuda)
        for image, generator in zip(noise, self.generators, strict=True):
            image.normal_(generator=generator)
        return noise.to(x.device, non_blocking=x.is_cuda)


def batched(seeds: Sequence[int], size: int) -> list[list[int]]:
    """Splits seeds into batches of `size`; the last may be smaller."""
    return [list(seeds[start : start + size]) for start in range(0, len(seeds), size)]


def num_intervals(sampler: Callable[..., SamplerOutput], steps: int) -> int:
    """Returns the intervals of `steps` network evaluations; heun takes 2 in all but the last."""
    return (steps + 1) // 2 if sampler is heun else steps


def uniform(alpha_bar: Sequence[float], steps: int) -> list[int]:
    """Spaces timesteps evenly, rounded down, as upstream's DDIM does."""
    return torch.linspace(-1, len(alpha_bar) - 1, steps + 1).int().flip(0).tolist()


def trailing(alpha_bar: Sequence[float], steps: int) -> list[int]:
    """Spaces timesteps evenly from the last: table 2 of Lin et al. (arXiv:2305.08891)."""
    return [round(len(alpha_bar) * i / steps) - 1 for i in range(steps, -1, -1)]


def evenly_spaced_in(transform: Callable, alpha_bar: Sequence[float], steps: int) -> list[int]:
    """Spaces transform(sigma), which increases, evenly down to timestep 0; adds -1.

    Sigma is limited to SIGMA_MAX, so that steps are not spent on noise alone. Where two timesteps
    would be equal, the later one moves down, or up where there is no room below.
    """
    values = np.array([transform(min(sigma_of(a), SIGMA_MAX)) for a in alpha_bar])
    targets = np.linspace(values[-1], values[0], steps)[1:]
    timesteps = [len(values) - 1]
    for remaining, target in zip(range(steps - 2, -1, -1), targets, strict=True):
        nearest = int(np.abs(values - target).argmin())
        timesteps.append(max(min(nearest, timesteps[-1] - 1), remaining))
    return [*timesteps, -1]


SAMPLERS = {sampler.__name__: sampler for sampler in (ddpm, ddim, dpmpp_2m, heun, unipc)}
DEFAULT_SAMPLER = "unipc"
CONSISTENCY_SAMPLERS = {"consistency": consistency}  # of consistency-tuned models
MAX_CONSISTENCY_STEPS = 8
# Sigmas by steps, measured as best, as at an image size that shifts nothing; noise alone is first.
CONSISTENCY_LEVELS = {1: (SIGMA_MAX,), 2: (SIGMA_MAX, 0.8), 4: (SIGMA_MAX, 8.0, 2.0, 0.6)}
# (alpha_bar, steps) to steps + 1 timesteps that decrease from T - 1 to -1; steps in [1, T]
SPACINGS: dict[str, Callable[[Sequence[float], int], list[int]]] = {
    "uniform": uniform,
    "trailing": trailing,
    "logsnr": partial(evenly_spaced_in, math.log),  # Lu et al. (arXiv:2206.00927)
    "karras": partial(evenly_spaced_in, lambda sigma: sigma ** (1 / 7)),  # EDM, equation 5
}
DEFAULT_SPACING = "karras"


def choose_timesteps(
    sampler: Callable[..., SamplerOutput], alpha_bar: Sequence[float], steps: int, spacing: str
) -> list[int]:
    """Returns a sampler's timesteps for a number of steps.

    spacing: one of SPACINGS. Heun corrects its second-last step by the noise predicted at the
    lowest sigma. That prediction is poor, and the correction multiplies it by half of the sigma
    before. Where that is more than MAX_HEUN_RATIO times the lowest, samples would be noisy, so the
    lowest timestep is left out. For consistency it always is: the network is the identity there.
    """
    count = num_intervals(sampler, steps)
    timesteps = SPACINGS[spacing](alpha_bar, count)
    skip_lowest = sampler is consistency
    if sampler is heun and count > 1:
        high, low = (min(sigma_of(alpha_bar[t]), SIGMA_MAX) for t in timesteps[-3:-1])
        skip_lowest = high > MAX_HEUN_RATIO * low
    return [*SPACINGS[spacing](alpha_bar, count + 1)[:-2], -1] if skip_lowest else timesteps


def check_noise_levels(levels: Sequence[float], sampler: Callable, steps: int | None) -> None:
    """Raises UserError for noise levels, or steps, that a sampler cannot have.

    levels: decreasing sigmas, as in CONSISTENCY_LEVELS; the first, noise alone, is at least
    SIGMA_MAX.
    """
    if sampler is not consistency:
        reason = "noise_levels is for consistency-tuned models and their sampler"
        raise UserError(f"{reason}. Set steps and spacing instead")
    count = len(levels)
    if steps not in (None, count):
        raise UserError(f"noise_levels has {count}, but steps is {steps}. Set one of the two")
    if not 1 <= count <= MAX_CONSISTENCY_STEPS:
        raise UserError(f"noise_levels has {count}, but must have 1 to {MAX_CONSISTENCY_STEPS}")
    is_decreasing = all(a > b for a, b in pairwise([*levels, 0]))  # False for NaN, too
    if not is_decreasing or levels[0] < SIGMA_MAX:
        shown = ",".join(f"{level:g}" for level in levels)
        needed = f"decrease from {SIGMA_MAX:g} (noise alone) or more, and stay above 0"
        raise UserError(f"noise_levels is {shown}, but must {needed}")


def timesteps_from_sigmas(alpha_bar: Sequence[float], sigmas: Sequence[float]) -> list[int]:
    """Returns the last timestep, those nearest to the further sigmas, and -1.

    sigmas: decreasing; the first stands for noise alone. UserError if two have one timestep.
    """
    log_sigma = np.array([-half_log_snr(a) for a in alpha_bar])
    nearest = [int(np.abs(log_sigma - math.log(sigma)).argmin()) for sigma in sigmas[1:]]
    timesteps = [len(alpha_bar) - 1, *nearest, -1]
    for t, s in pairwise(timesteps):
        if t <= s:
            raise UserError(f"two of the noise_levels have timestep {s}. Drop one")
    return timesteps


RENAMED = {"level": alpha_bar_at, "advance": ddim_step}


def __getattr__(name: str) -> Callable:
    """Returns functions by their former names, with a warning."""
    if name not in RENAMED:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    warnings.warn(f"{name} is now {RENAMED[name].__name__}", RenamedWarning, stacklevel=2)
    return RENAMED[name]
