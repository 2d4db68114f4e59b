"""The noise schedule: shifts against upstream, EDM's weights against the paper."""

import math

import pytest
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet, denoising_diffusion_pytorch

from ddpm_model import DDPMModel
from engine.noise_schedule import BETA_SCHEDULES, OBJECTIVES, diffuse, sigma_of


def evenly_spaced(count: int) -> torch.Tensor:
    """Numbers spread over [0, 1)."""
    return (torch.arange(count) + 0.5) / count


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_shift_log_snr_shifts_every_timestep(beta_schedule):
    logs = []
    for base_size in (0, 32, 96):
        model = DDPMModel(
            96, 8, (1,), beta_schedule=beta_schedule, schedule_base_size=base_size
        )  # fmt: skip
        alpha_bar = (1 - model.diffusion.betas.double()).cumprod(0)  # as read from the betas
        logs.append((alpha_bar / (1 - alpha_bar)).log())
        stored = model.diffusion.alphas_cumprod.double()
        assert torch.allclose(alpha_bar, stored, rtol=1e-3, atol=1e-7)
    inner = slice(5, -1)  # at the ends single precision is coarse
    expected = torch.full_like(logs[0], 2 * math.log(32 / 96))
    torch.testing.assert_close((logs[1] - logs[0])[inner], expected[inner], atol=5e-3, rtol=0)
    torch.testing.assert_close(logs[2], logs[0], atol=2e-3, rtol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_shift_log_snr_derives_what_upstream_derives(objective, gamma, monkeypatch):
    model = DDPMModel(
        64, 8, (1,), objective=objective, loss_weighting="min_snr", min_snr_gamma=gamma,
        schedule_base_size=32,
    )  # fmt: skip
    original = denoising_diffusion_pytorch.cosine_beta_schedule(1000)
    alpha_bar = (1 - original).cumprod(0)
    shifted = alpha_bar / (alpha_bar + 4 * (1 - alpha_bar))  # the SNR divided by (64 / 32)^2
    betas = 1 - shifted / torch.cat([torch.ones(1, dtype=torch.double), shifted[:-1]])
    monkeypatch.setattr(denoising_diffusion_pytorch, "cosine_beta_schedule", lambda _: betas)
    upstream = GaussianDiffusion(
        Unet(8, dim_mults=(1,)), image_size=64, objective=objective, beta_schedule="cosine",
        min_snr_loss_weight=gamma > 0, min_snr_gamma=gamma,
    )  # fmt: skip
    for name, values in upstream.named_buffers():
        if "." not in name:
            # Upstream stores its betas in single precision, and we start from those.
            ours = getattr(model.diffusion, name)
            torch.testing.assert_close(ours, values, rtol=2e-3, atol=2e-6, msg=name)


def test_shifted_model_is_loaded_by_upstream():
    torch.manual_seed(0)
    model = DDPMModel(64, 8, (1, 2), schedule_base_size=32)
    upstream = GaussianDiffusion(Unet(8, dim_mults=(1, 2)), image_size=64, beta_schedule="cosine")
    upstream.load_state_dict(model.diffusion.state_dict())
    x = torch.rand(2, 3, 64, 64)
    noise = torch.randn(2, 3, 64, 64)
    for t in (10, 500, 990):
        times = torch.full((2,), t)
        expected = upstream.p_losses(x * 2 - 1, times, noise)
        # 1, since the weights are part of the state.
        weight = model.diffusion.loss_weight[t] / upstream.loss_weight[t]
        torch.testing.assert_close(model(x, times, noise), expected * weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_edm_weighting_is_the_papers(objective):
    model = DDPMModel(8, 8, (1, 2), objective=objective, loss_weighting="edm", p_mean=-1.2)
    t = model.timesteps_from_uniform(evenly_spaced(100_000))
    alpha_bar = model.diffusion.alphas_cumprod
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt().double()
    assert sigma[t].log().mean().item() == pytest.approx(-1.2, abs=0.02)
    assert sigma[t].log().std().item() == pytest.approx(1.2, abs=0.03)  # sigma ends at 0.006

    # Table 1: lambda weighs the error of x_0, which is this factor times the objective's.
    factor = {
        "pred_v": sigma / (1 + sigma**2).sqrt(),
        "pred_noise": sigma,
        "pred_x0": torch.ones_like(sigma),
    }[objective]
    expected = factor**2 * (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    ratio = (model.diffusion.loss_weight / expected)[50:950]
    torch.testing.assert_close(ratio, ratio.mean().expand(900), rtol=1e-3, atol=0)
    assert model.diffusion.loss_weight[t].mean().item() == pytest.approx(1, rel=1e-2)

    images = torch.rand(2, 3, 8, 8)
    noise = torch.randn(2, 3, 8, 8)
    t = torch.tensor([100, 600])
    errors = model.mse_per_image(images, t, noise)
    expected = (model.diffusion.loss_weight[t] * errors).mean()
    torch.testing.assert_close(model(images, t, noise), expected)


@pytest.mark.parametrize("schedule_base_size", [0, 32])
def test_edm_weighting_shifts_with_the_schedule(schedule_base_size):
    model = DDPMModel(
        96, 8, (1,), timesteps=4000, schedule_base_size=schedule_base_size, p_mean=-0.5
    )  # fmt: skip
    t = model.timesteps_from_uniform(evenly_spaced(10_000))
    alpha_bar = model.diffusion.alphas_cumprod.double()[t]
    log_sigma = ((1 - alpha_bar) / alpha_bar).log() / 2
    shift = math.log(96 / 32) if schedule_base_size else 0
    assert log_sigma.mean().item() == pytest.approx(-0.5 + shift, abs=0.03)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.03)


def test_timesteps_are_uniform_without_edm():
    model = DDPMModel(
        8, 8, (1, 2), timesteps=50, sampling_timesteps=10, loss_weighting="min_snr"
    )  # fmt: skip
    t = model.timesteps_from_uniform(evenly_spaced(200))
    assert torch.equal(t, torch.arange(50).repeat_interleave(4))


def test_diffuse_twice_is_once_with_the_product():
    x = torch.full((100_000,), 2.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, len(x), generator=generator, dtype=torch.float64)
    twice = diffuse(diffuse(x, first, 0.8), second, 0.5)
    assert twice.mean().item() == pytest.approx(2 * math.sqrt(0.4), abs=0.01)
    assert twice.var().item() == pytest.approx(0.6, rel=0.02)


def test_sigma_of_inverts_alpha_bar():
    for sigma in (0.01, 1.0, 80.0):
        assert sigma_of(1 / (1 + sigma**2)) == pytest.approx(sigma)
    assert sigma_of(0.0) == math.inf
