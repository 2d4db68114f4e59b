"""Consistency tuning: the x_0 predicted at two noise levels become equal, so one step is enough.

Easy Consistency Tuning, Geng et al. (arXiv:2406.14548), of a network that predicts v. The target at
timestep t is what the network predicts from x_s at a lower noise level; if that is zero, x_s
itself. A DDIM step of a teacher, the guided model before it was tuned, leads from x_t to x_s, as in
consistency distillation, Song et al. (arXiv:2303.01469). Without a teacher, x_s is made of the same
image and noise as x_t.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from denoising_diffusion_pytorch import GaussianDiffusion
from torch import Tensor, nn

from engine.denoiser import apply_guidance
from engine.noise_schedule import SIGMA_MAX, timestep_probabilities

VPredictor = Callable[[Tensor, Tensor], Tensor]  # x_t (B, C, H, W) and t (B,) to v (B, C, H, W)

# log(sigma) ~ N(ECT_P_MEAN, ECT_P_STD^2): wider than EDM's, as samples start from noise alone.
ECT_P_MEAN = -1.1
ECT_P_STD = 2.0
HUBER = 5.4e-4  # c of the pseudo-Huber distance of a value (arXiv:2310.14189)
GAP_EXPONENTS = 3, 8  # k of earlier_timesteps, at the start of a run and at its end


class ConsistencyLoss(nn.Module):
    """The distance between x_0 at neighboring timesteps of a process.

    shift: of the process's log-SNR, which the distribution of the timesteps follows. fraction: how
    much of the run is done, by which the neighbors come closer; 1, the end, unless it is set.
    """

    def __init__(self, process: GaussianDiffusion, shift: float = 0.0):
        super().__init__()
        # At index -1 is the clean image.
        alpha_bar = F.pad(process.alphas_cumprod.double(), (0, 1), value=1.0)
        sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
        probabilities = timestep_probabilities(process, ECT_P_MEAN - shift / 2, ECT_P_STD)
        probabilities = probabilities * (sigma[:-1] <= SIGMA_MAX)
        buffers = {
            "alpha_bar": alpha_bar, "sigma": sigma, "fraction": torch.ones(()),
            "timestep_cdf": (probabilities / probabilities.sum()).cumsum(0),
        }  # fmt: skip
        for name, values in buffers.items():
            self.register_buffer(name, values.float(), persistent=False)

    def forward(
        self, network: VPredictor, x_0: Tensor, t: Tensor, noise: Tensor,
        teacher: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Returns the mean distance, a scalar.

        x_0, noise: (B, C, H, W), x_0 in [-1, 1]. t: timesteps (B,). teacher: x_t and t to x_0.
        """
        s = self.earlier_timesteps(t)
        x_t = self.diffuse(x_0, t, noise)
        prediction = self.predict_x_0(network, x_t, t)
        # After the prediction: autocast would reuse weights that it casts here, without gradient.
        with torch.no_grad():
            if teacher:  # a step of DDIM
                signal_scale, noise_scale = self.scales(t)
                x_0 = teacher(x_t, t)
                noise = (x_t - signal_scale * x_0) / noise_scale
            target = self.predict_x_0(network, self.diffuse(x_0, s, noise), s)
        mse = (prediction - target).square().mean(dim=(1, 2, 3))
        huber = (mse + HUBER**2).sqrt() - HUBER
        return (huber / (self.sigma[t] - self.sigma[s])).mean()  # ECT's weight

    def earlier_timesteps(self, t: Tensor) -> Tensor:
        """Returns the timesteps (B,), from -1 to t - 1, whose x_0 is the target at t (B,).

        sigma_s = sigma_t (1 - n / 2^k), n = 1 + 8 sigmoid(-sigma_t), ECT's mapping, where k grows
        with the fraction of the run.
        """
        sigma_t = self.sigma[t]
        first, last = GAP_EXPONENTS
        k = first + (last - first) * self.fraction
        n = 1 + 8 * torch.sigmoid(-sigma_t)
        sigma_s = sigma_t * (1 - n * torch.exp2(-k)).clamp(min=0)
        s = torch.searchsorted(self.sigma[:-1], sigma_s, right=True) - 1  # rounded down
        return torch.minimum(s, t - 1)

    def diffuse(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Returns x_t, (B, C, H, W); x_0 at t = -1."""
        signal_scale, noise_scale = self.scales(t)
        return signal_scale * x_0 + noise_scale * noise

    def predict_x_0(self, network: VPredictor, x: Tensor, t: Tensor) -> Tensor:
        """Predicts x_0 from x_t (B, C, H, W); at t = -1, the clean image, returns x itself."""
        signal_scale, noise_scale = self.scales(t)
        v = network(x, t.clamp(min=0)).float()
        return signal_scale * x - noise_scale * v

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the factors of x_0 and of the noise in x_t, each (B, 1, 1, 1)."""
        alpha_bar = self.alpha_bar[t][:, None, None, None]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def predict_guided(
        self, network: VPredictor, weaker: VPredictor, x: Tensor, t: Tensor, guidance: float,
        interval: tuple[float, float],
    ) -> Tensor:  # fmt: skip
        """Predicts x_0 in [-1, 1] from x_t with guidance.

        As ModelDenoiser does, which takes a single t. The weaker network runs outside the interval
        too: a CUDA graph cannot branch.
        """
        x_0 = self.predict_x_0(network, x, t)
        x_0_weaker = self.predict_x_0(weaker, x, t)
        lowest, highest = interval
        is_guided = (self.sigma[t] >= lowest) & (self.sigma[t] <= highest)
        weight = torch.where(is_guided, guidance, 1.0)[:, None, None, None]
        return apply_guidance(x_0, x_0_weaker, weight).clamp(-1, 1)


def without_teacher(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of a model that sampling needs."""
    return {k: v for k, v in state_dict.items() if not k.startswith("teacher.")}


class Teacher(nn.Module):
    """The frozen networks of the model that is tuned: its own and, if it has one, its guide.

    It has none until `set_networks`. A copy of a model has the same teacher, which never changes:
    so the EMA weights share it with the model, in memory and in files.
    """

    def __init__(self):
        super().__init__()
        self.set_networks(None, None)

    def set_networks(self, unet: nn.Module | None, guide: nn.Module | None) -> None:
        """Takes networks and freezes them."""
        self.unet = unet
        self.guide = guide
        self.requires_grad_(False).eval()

    def __deepcopy__(self, memo: dict) -> "Teacher":
        return self
