"""Noise schedule: shifted log-SNR, loss weights, distribution of the timesteps."""

import math

import torch
import torch.nn.functional as F
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from torch import Tensor

OBJECTIVES = ("pred_v", "pred_noise", "pred_x0")
BETA_SCHEDULES = ("cosine", "linear", "sigmoid")

EDM_P_STD = 1.2  # of log(sigma) in training; EDM, Karras et al. (arXiv:2206.00364), table 1
SIGMA_DATA = 0.5
SIGMA_MAX = 80.0  # above it an image is noise alone


def sigma_of(alpha_bar: float) -> float:
    """Returns EDM's sigma, the noise level of x / sqrt(alpha_bar); inf at 0."""
    return math.sqrt((1 - alpha_bar) / alpha_bar) if alpha_bar > 0 else math.inf


def half_log_snr(alpha_bar: float) -> float:
    """Returns DPM-Solver's lambda, which is -log(sigma); -inf at 0 and inf at 1."""
    if alpha_bar in (0, 1):
        return math.inf if alpha_bar else -math.inf
    return math.log(alpha_bar / (1 - alpha_bar)) / 2


def diffuse(x: Tensor, noise: Tensor, alpha_bar: float) -> Tensor:
    """Samples q(x_t | x_s) for a timestep t noisier than s.

    alpha_bar: alpha_bar_t / alpha_bar_s, which is alpha_bar_t where x is a clean image.
    """
    return math.sqrt(alpha_bar) * x + math.sqrt(1 - alpha_bar) * noise


def shift_sigma(sigma: float, shift: float) -> float:
    """Returns the noise level that a process has after a shift of its log-SNR."""
    return sigma * math.exp(-shift / 2)


def shift_log_snr(process: GaussianDiffusion, shift: float, min_snr_gamma: float) -> None:
    """Shifts the log-SNR at every timestep and recomputes the derived buffers.

    Neighboring pixels of a larger image are more alike, so the same noise hides less of it. For
    images of size n, a schedule designed for size s is as hard after a shift by 2 log(s / n):
    Hoogeboom et al. (arXiv:2301.11093).
    """
    # The shifted process, in double precision.
    alpha_bar = (1 - process.betas.double()).cumprod(0)
    alpha_bar = torch.sigmoid(alpha_bar.logit() + shift)
    alpha_bar_prev = F.pad(alpha_bar[:-1], (1, 0), value=1.0)
    alpha = alpha_bar / alpha_bar_prev
    posterior_variance = (1 - alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar)

    # Min-SNR loss weights, Hang et al. (arXiv:2303.09556).
    snr = alpha_bar / (1 - alpha_bar)
    clipped = snr.clamp(max=min_snr_gamma) if min_snr_gamma > 0 else snr
    weights = {"pred_noise": clipped / snr, "pred_x0": clipped, "pred_v": clipped / (snr + 1)}

    buffers = {
        "betas": 1 - alpha, "alphas_cumprod": alpha_bar, "alphas_cumprod_prev": alpha_bar_prev,
        "sqrt_alphas_cumprod": alpha_bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alpha_bar).log(),
        "sqrt_recip_alphas_cumprod": alpha_bar.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": snr.rsqrt(),
        "posterior_variance": posterior_variance,
        "posterior_log_variance_clipped": posterior_variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": (1 - alpha) * alpha_bar_prev.sqrt() / (1 - alpha_bar),
        "posterior_mean_coef2": (1 - alpha_bar_prev) * alpha.sqrt() / (1 - alpha_bar),
        "loss_weight": weights[process.objective],
    }  # fmt: skip
    for name, values in buffers.items():
        getattr(process, name).copy_(values)


def timestep_probabilities(process: GaussianDiffusion, mean: float, std: float) -> Tensor:
    """Returns the probabilities of the timesteps, (T,), that make log(sigma) ~ N(mean, std^2)."""
    alpha_bar = process.alphas_cumprod.double()
    log_sigma = ((1 - alpha_bar) / alpha_bar.clamp(min=1e-12)).log() / 2
    # A normal density in log(sigma), times how much of log(sigma) each timestep covers.
    density = torch.exp(-((log_sigma - mean) ** 2) / (2 * std**2))
    probabilities = density * torch.gradient(log_sigma)[0].abs()
    return probabilities / probabilities.sum()


def edm_weighting(process: GaussianDiffusion, mean: float) -> tuple[Tensor, Tensor]:
    """Returns EDM's probabilities of the training timesteps and its loss weights, both (T,).

    log(sigma) is normal around `mean`. EDM weighs the squared error of x_0, for images in [-1, 1],
    by (sigma^2 + s^2) / (sigma s)^2, s = SIGMA_DATA; here the weight is converted to the error of
    what the process predicts. The weights have mean 1 under the probabilities.
    """
    alpha_bar = process.alphas_cumprod.double()
    sigma_squared = (1 - alpha_bar) / alpha_bar.clamp(min=1e-12)
    probabilities = timestep_probabilities(process, mean, EDM_P_STD)
    weight = (sigma_squared + SIGMA_DATA**2) / (sigma_squared * SIGMA_DATA**2)
    if process.objective == "pred_v":
        weight = weight * sigma_squared / (1 + sigma_squared)
    elif process.objective == "pred_noise":
        weight = weight * sigma_squared
    return probabilities, weight / (weight * probabilities).sum()


def upstream_betas(schedule: str, timesteps: int) -> Tensor:
    """Returns the betas of one of lucidrains' schedules, float32 (T,)."""
    smallest = Unet(8, dim_mults=(1,))
    process = GaussianDiffusion(smallest, image_size=8, timesteps=timesteps, beta_schedule=schedule)
    return process.betas
