"""DDPMModel and the samplers, against the library's own code and closed forms."""

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet
from PIL import Image

from ddpm_model import BETA_SCHEDULES, OBJECTIVES, DDPMModel
from engine import samplers
from engine.errors import UserError

SMALL = {"image_size": 8, "dim": 8, "dim_mults": (1, 2), "timesteps": 40, "sampling_timesteps": 10}


def small(**changes) -> DDPMModel:
    torch.manual_seed(0)
    return DDPMModel(**(SMALL | changes)).eval()


@pytest.mark.parametrize("gamma", [0.0, 5.0])
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_is_the_librarys(objective, schedule, gamma):
    model = small(objective=objective, beta_schedule=schedule, min_snr_gamma=gamma)
    images, noise, t = torch.rand(6, 3, 8, 8), torch.randn(6, 3, 8, 8), torch.tensor([0, 3, 10, 20, 35, 39])
    theirs = model.diffusion.p_losses(images * 2 - 1, t, noise=noise)
    torch.testing.assert_close(model(images, t, noise), theirs)


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("sampler", "steps", "eta"), [("ddpm", 40, None), ("ddim", 10, 0.0), ("ddim", 10, 0.7)])
def test_samplers_agree_with_the_library(sampler, steps, eta, objective, schedule, self_condition):
    model = small(objective=objective, beta_schedule=schedule, sampling_timesteps=steps, self_condition=self_condition)
    torch.manual_seed(1)
    if sampler == "ddim":
        model.diffusion.ddim_sampling_eta = eta
    theirs = model.diffusion.sample(2, return_all_timesteps=True)

    torch.manual_seed(1)
    x, options = torch.randn(2, 3, 8, 8), {} if eta is None else {"eta": eta}
    timesteps = samplers.uniform(model.denoiser().alpha_bar, steps)
    with torch.no_grad():
        ours = [x] + [
            x for x, _ in samplers.SAMPLERS[sampler](model.denoiser(), x, timesteps, torch.randn_like, **options)
        ]
    torch.testing.assert_close((torch.stack(ours, dim=1) + 1) / 2, theirs, atol=1e-4, rtol=0)


class Gaussian:
    """The exact denoiser of images whose every pixel is N(mean, deviation^2)."""

    def __init__(self, mean: float, deviation: float):
        self.mean, self.variance = mean, deviation**2
        betas = np.linspace(1e-4, 0.02, 1000)
        self.alpha_bar = np.cumprod(1 - betas).tolist()

    def __call__(self, x: torch.Tensor, t: int) -> torch.Tensor:
        a = self.alpha_bar[t]
        gain = math.sqrt(a) * self.variance / (a * self.variance + 1 - a)
        return self.mean + gain * (x - math.sqrt(a) * self.mean)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_exact_denoiser_gives_the_exact_distribution(sampler):
    denoiser, generator = Gaussian(0.3, 0.2), torch.Generator().manual_seed(0)
    x = torch.randn(64, 1, 32, 32, generator=generator)
    timesteps = samplers.uniform(denoiser.alpha_bar, 1000)
    randn = lambda x: torch.randn(x.shape, generator=generator)  # noqa: E731
    *_, (sample, _) = samplers.SAMPLERS[sampler](denoiser, x, timesteps, randn)
    assert sample.mean().item() == pytest.approx(0.3, abs=0.004)
    assert sample.std().item() == pytest.approx(0.2, rel=0.02)


def test_ddim_run_backwards_finds_the_noise_at_first_order():
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (250, 500, 1000):
        timesteps = samplers.uniform(Gaussian(0.3, 0.2).alpha_bar, steps)
        *_, (image, _) = samplers.ddim(Gaussian(0.3, 0.2), noise, timesteps, torch.randn_like)
        errors.append((samplers.ddim_encode(Gaussian(0.3, 0.2), image, timesteps) - noise).abs().max().item())
    assert errors[2] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.3) and errors[1] / errors[2] == pytest.approx(2, rel=0.3)


def test_slerp_keeps_the_norm_and_the_ends():
    a, b = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    between = samplers.slerp(a, b, torch.linspace(0, 1, 5))
    torch.testing.assert_close(between[0], a)
    torch.testing.assert_close(between[-1], b)
    assert between[2].norm() == pytest.approx((a.norm() + b.norm()).item() / 2, rel=0.02)
    torch.testing.assert_close(samplers.slerp(a, a, torch.tensor([0.5]))[0], a)


def test_an_image_depends_on_its_seed_alone():
    model = small()
    many = model.sample(5, seed=10, sampler="ddpm", steps=40)
    torch.testing.assert_close(model.sample(1, seed=13, sampler="ddpm", steps=40)[0], many[3], atol=1e-5, rtol=0)
    assert not torch.equal(many[0], many[1])
    assert not torch.equal(model.sample(1), model.sample(1))  # no seed: a new one each time


def test_all_timesteps_lead_from_noise_to_the_sample():
    model = small()
    frames = model.sample(2, return_all_timesteps=True, seed=0)
    assert frames.shape == (2, 11, 3, 8, 8)
    assert torch.equal(frames[:, -1], model.sample(2, seed=0))
    assert torch.equal(
        frames[0, 0], ((torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)) + 1) / 2).clamp(0, 1)
    )


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_load_model_needs_to_be_told_nothing(tmp_path, suffix):
    model = small(objective="pred_x0", dropout=0.1, attn_heads=2, full_attn=(True, False))
    model.save_model(tmp_path / f"model{suffix}")
    loaded = DDPMModel().load_model(tmp_path / f"model{suffix}")
    assert torch.equal(loaded.sample(2, seed=0), model.sample(2, seed=0))
    assert [path.name for path in tmp_path.iterdir()] == [f"model{suffix}"]


@pytest.mark.parametrize(
    ("unet", "process"),
    [
        ({}, {"objective": "pred_v", "beta_schedule": "sigmoid"}),
        ({"full_attn": (False, True, False)}, {"objective": "pred_noise", "min_snr_loss_weight": True}),
        ({"self_condition": True}, {"objective": "pred_x0", "beta_schedule": "linear"}),
    ],
)  # fmt: skip
def test_a_checkpoint_of_the_librarys_trainer_draws_the_same_images(tmp_path, unet, process):
    for i in range(100):
        Image.new("RGB", (16, 16), (i, 2 * i, 100)).save(tmp_path / f"{i}.png")
    theirs = GaussianDiffusion(
        Unet(8, dim_mults=(1, 2, 2), **unet), image_size=16, timesteps=30, sampling_timesteps=10, **process
    )
    trainer = Trainer(theirs, str(tmp_path), results_folder=str(tmp_path), train_num_steps=2, calculate_fid=False)
    trainer.train()
    trainer.save(1)
    model = DDPMModel(image_size=16).load_model(tmp_path / "model-1.pt")
    assert model.architecture["objective"] == process["objective"]
    torch.manual_seed(3)
    expected = trainer.ema.ema_model.eval().sample(2)
    torch.manual_seed(3)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        denoiser = model.denoiser()
        *_, (ours, _) = samplers.ddim(denoiser, x, samplers.uniform(denoiser.alpha_bar, 10), torch.randn_like)
    torch.testing.assert_close((ours + 1) / 2, expected, atol=1e-4, rtol=0)


class Unpickled:
    """Leaves a mark if it is ever unpickled."""

    def __reduce__(self):
        return (Path("unpickled").touch, ())


def broken_files(folder: Path) -> dict[str, Path]:
    good = small()
    good.save_model(folder / "good.pt")
    good.save_model(folder / "good.safetensors")
    files = {name: folder / name for name in ("cut.pt", "cut.safetensors", "text.pt", "evil.pt", "list.pt", "other.pt")}
    files["cut.pt"].write_bytes((folder / "good.pt").read_bytes()[:-5000])
    files["cut.safetensors"].write_bytes((folder / "good.safetensors").read_bytes()[:-5000])
    files["text.pt"].write_text("not a checkpoint")
    files["evil.pt"].write_bytes(pickle.dumps(Unpickled()))
    torch.save([1, 2], files["list.pt"])
    torch.save({"model": {"weight": torch.zeros(2)}}, files["other.pt"])
    return files | {"missing.pt": folder / "missing.pt", "missing.safetensors": folder / "missing.safetensors"}


def test_files_that_are_no_model_are_named_and_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, path in broken_files(tmp_path).items():
        with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
            DDPMModel().load_model(path)
        assert "\n" not in str(caught.value)
    assert not Path("unpickled").exists()


def test_interpolation_begins_and_ends_at_the_images():
    model = small()
    a, b = torch.rand(2, 3, 8, 8) * 0.2 + 0.4
    images = model.interpolate(a, b, num_steps=6)
    assert images.shape == (6, 3, 8, 8)
    torch.testing.assert_close(images[0], a, atol=0.1, rtol=0)
    torch.testing.assert_close(images[-1], b, atol=0.1, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DDPMModel(image_size=30), "image_size 30"),
        (lambda: DDPMModel(timesteps=10, sampling_timesteps=20), "sampling_timesteps is 20"),
        (lambda: small().sample(1, steps=41), "steps is 41"),
        (lambda: small().sample(1, sampler="euler"), "no sampler euler"),
        (lambda: small().interpolate(torch.rand(3, 8, 8), torch.rand(3, 8, 8), 1), "num_steps is 1"),
        (lambda: small().interpolate(torch.rand(3, 16, 16), torch.rand(3, 16, 16)), "this model draws"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.fixture
def guided() -> DDPMModel:
    """A model with a guide of other weights, both of which change what is drawn."""
    model = small(guidance=2.0)
    for _ in range(2):
        model.keep_guide()
        for p in model.unet.parameters():
            p.data += 0.05 * torch.randn_like(p)
    return model


def test_samples_are_led_away_from_the_guide_at_its_noise_levels(guided):
    main, worse, x = small(), small(), torch.randn(2, 3, 8, 8)
    main.unet.load_state_dict(guided.unet.state_dict())
    worse.unet.load_state_dict(guided.guide.state_dict())
    sigma = [math.sqrt(1 / a - 1) for a in guided.denoiser().alpha_bar]
    asked = [t for t in range(40) if guided.guided[0] <= sigma[t] <= guided.guided[1]]
    assert 5 < len(asked) < 35
    for t in (0, asked[0], asked[-1], 39):
        a, b = (model.denoiser(clip=False)(x, t) for model in (main, worse))
        expected = b + 2 * (a - b) if t in asked else a
        torch.testing.assert_close(guided.denoiser(clip=False)(x, t), expected)
        torch.testing.assert_close(guided.denoiser(clip=False, guidance=1)(x, t), a)
        assert not torch.allclose(a, b, atol=1e-3)
    assert torch.equal(guided.sample(1, seed=0, guidance=1), main.sample(1, seed=0))
    assert not torch.allclose(guided.sample(1, seed=0), main.sample(1, seed=0), atol=1e-3)


@pytest.mark.parametrize("sampler", ["unipc", "heun", "ddim"])
def test_evaluations_count_both_networks(guided, sampler):
    calls = []
    for network in (guided.unet, guided.guide):
        network.register_forward_hook(lambda *_: calls.append(1))
    plan = guided.plan(sampler, 9)
    guided.sample(1, sampler=sampler, steps=9, seed=0)
    assert 9 < len(calls) == guided.evaluations(*plan)
    assert guided.evaluations(*plan, guidance=1) == 9


@pytest.mark.parametrize(
    ("name", "half"), [("model.pt", False), ("model.safetensors", False), ("model.safetensors", True)]
)
def test_the_guide_is_saved_with_the_model(guided, name, half, tmp_path):
    guided.save_model(tmp_path / name, half)
    other = DDPMModel().load_model(tmp_path / name).eval()
    assert other.guidance == 2.0
    torch.testing.assert_close(other.sample(2, seed=0), guided.sample(2, seed=0), atol=0.02 if half else 0, rtol=0)
    small().save_model(tmp_path / name)
    assert other.load_model(tmp_path / name).guide is None


@pytest.mark.parametrize("objective", ["pred_v", "pred_noise", "pred_x0"])
def test_edm_weighting_is_the_papers(objective):
    model = DDPMModel(image_size=8, dim=8, dim_mults=(1, 2), objective=objective, loss_weighting="edm")
    t = model.timesteps_at((torch.arange(100_000) + 0.5) / 100_000)
    sigma = ((1 - model.diffusion.alphas_cumprod) / model.diffusion.alphas_cumprod).sqrt().double()
    assert sigma[t].log().mean().item() == pytest.approx(-1.2, abs=0.02)
    assert sigma[t].log().std().item() == pytest.approx(1.2, abs=0.03)  # the schedule ends at a sigma of 0.006
    # table 1: lambda weighs the error of x_0, which is sigma or sigma / sqrt(1 + sigma^2) times that of noise or v
    of_x_0 = {"pred_v": sigma / (1 + sigma**2).sqrt(), "pred_noise": sigma, "pred_x0": torch.ones_like(sigma)}
    expected = of_x_0[objective] ** 2 * (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    ratio = (model.diffusion.loss_weight / expected)[50:950]
    torch.testing.assert_close(ratio, ratio.mean().expand(900), rtol=1e-3, atol=0)
    assert model.diffusion.loss_weight[t].mean().item() == pytest.approx(1, rel=1e-2)
    images, noise = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    loss = model(images, torch.tensor([100, 600]), noise)
    errors = model.squared_error(images, torch.tensor([100, 600]), noise)
    torch.testing.assert_close(loss, (model.diffusion.loss_weight[[100, 600]] * errors).mean())


def test_timesteps_are_uniform_without_edm():
    model = DDPMModel(image_size=8, dim=8, dim_mults=(1, 2), timesteps=50, sampling_timesteps=10)
    assert torch.equal(model.timesteps_at((torch.arange(200) + 0.5) / 200), torch.arange(50).repeat_interleave(4))
