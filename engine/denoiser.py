"""Denoiser: predicts the clean image with networks of any objective, guided."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from denoising_diffusion_pytorch import GaussianDiffusion
from torch import Tensor, nn

from engine.errors import UserError
from engine.labels import UNCONDITIONAL_ERROR
from engine.noise_schedule import SIGMA_MAX, sigma_of

GUIDANCE_MODES = ("autoguidance", "cfg", "both")
# Arguments of DDPMModel.denoiser that say how to guide. A model stores its own; each is a setting.
GUIDANCE_OPTIONS = ("guidance", "guidance_mode", "guidance_min_sigma", "guidance_max_sigma")
Network = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def call_network(
    network: nn.Module, x: Tensor, t: Tensor, previous: Tensor | None, labels: Tensor | None
) -> Tensor:
    """Calls a network; raises UserError for labels that an unconditional one is given."""
    if labels is None:
        return network(x, t, previous)
    if not getattr(network, "num_classes", 0):
        raise UserError(UNCONDITIONAL_ERROR)
    return network(x, t, previous, labels)


def predicted_start(
    objective: str, output: Tensor, x: Tensor, signal: float | Tensor, noise: float | Tensor
) -> Tensor:
    """Returns x_0 from a network's output for x_t, (B, C, H, W), x_t = signal x_0 + noise eps."""
    if objective == "pred_noise":
        return (x - noise * output) / signal
    if objective == "pred_v":
        return signal * x - noise * output
    return output


def apply_guidance(x_0: Tensor, x_0_weaker: Tensor, weight: float | Tensor) -> Tensor:
    """Moves x_0 away from a weaker network's: Karras et al. (arXiv:2406.02507)."""
    return x_0_weaker + weight * (x_0 - x_0_weaker)


def weaker_network(
    mode: str, network: Any, guide: Any, labels: Tensor | None
) -> tuple[Any, Tensor | None]:
    """Returns the network that samples are moved away from, and its labels.

    mode: one of GUIDANCE_MODES. It is the guide, an earlier snapshot of the network, or in
    classifier-free guidance, Ho and Salimans (arXiv:2207.12598), the network itself without labels.
    """
    weaker = network if mode == "cfg" else guide
    return weaker, labels if mode == "autoguidance" else None


@dataclass(eq=False)
class ModelDenoiser:
    """The denoiser that samplers call (engine.samplers.Denoiser), made of networks.

    alpha_bar: of each timestep of `process`, read from the device once.
    network, weaker: called as network(x, t, previous, labels), x and previous (B, C, H, W), t and
    labels (B,); return what the objective of `process` says. previous is the last x_0, for
    self-conditioning: it is state, so create a denoiser per sample. guidance: the weight of
    apply_guidance; 1 disables it. weaker, weaker_labels: from weaker_network. interval: lowest and
    highest sigma to guide, Kynkäänniemi et al. (arXiv:2404.07724).
    """

    process: GaussianDiffusion
    alpha_bar: Sequence[float]
    network: Network
    clip: bool
    weaker: Network | None = None
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, math.inf)
    labels: Tensor | None = None
    weaker_labels: Tensor | None = None
    is_consistency_tuned: bool = False
    previous: Tensor | None = None

    def __post_init__(self) -> None:
        usable = range(len(self.alpha_bar))
        if self.process.objective == "pred_noise":  # does not determine x_0 where alpha_bar is 0
            usable = [t for t in usable if self.alpha_bar[t] > 0]
        if self.is_consistency_tuned:  # tuned up to SIGMA_MAX
            usable = [t for t in usable if t == 0 or sigma_of(self.alpha_bar[t]) <= SIGMA_MAX]
        self.last_usable_t = max(usable)

    def __call__(self, x: Tensor, t: int) -> Tensor:
        """Predicts x_0 (B, C, H, W) from x_t, t in [0, T); clipped to [-1, 1] if `clip`."""
        t = min(t, self.last_usable_t)  # beyond it, x is pure noise, hardly different
        x_0 = self._predict(self.network, x, t, self.labels)
        if self.is_guided(t):
            x_0_weaker = self._predict(self.weaker, x, t, self.weaker_labels)
            x_0 = apply_guidance(x_0, x_0_weaker, self.guidance)
        if self.clip:
            x_0 = x_0.clamp(-1, 1)
        if self.process.self_condition:
            self.previous = x_0
        return x_0

    def is_guided(self, t: int) -> bool:
        """Whether both networks are evaluated at timestep t."""
        if self.weaker is None or self.guidance == 1:
            return False
        lowest, highest = self.interval
        return lowest <= sigma_of(self.alpha_bar[min(t, self.last_usable_t)]) <= highest

    def _predict(self, network: Network, x: Tensor, t: int, labels: Tensor | None) -> Tensor:
        """Predicts x_0 with one network."""
        signal = math.sqrt(self.alpha_bar[t])
        noise = math.sqrt(1 - self.alpha_bar[t])
        times = torch.full((len(x),), t, device=x.device, dtype=torch.long)
        output = network(x, times, self.previous, labels).to(x.dtype)
        return predicted_start(self.process.objective, output, x, signal, noise)


class NFECounter:
    """Counts the network evaluations (NFE) of a denoiser without running any."""

    def __init__(self, denoiser: ModelDenoiser):
        self.denoiser = denoiser
        self.alpha_bar = denoiser.alpha_bar
        self.count = 0

    def __call__(self, x: Tensor, t: int) -> Tensor:
        """Returns x, and counts 1, or 2 where both networks are evaluated."""
        self.count += 1 + self.denoiser.is_guided(t)
        return x
