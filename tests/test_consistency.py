"""engine/consistency.py: the loss, its timesteps, and what it converges to."""

import math

import pytest
import torch
import torch.nn.functional as F
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from torch import Tensor, nn

from ddpm_model import DDPMModel
from engine.consistency import ConsistencyLoss
from tests.helpers import Mixture
from train_consistency import ConsistencyModel

SMALL = {"image_size": 8, "dim": 8, "dim_mults": (1, 2), "timesteps": 40, "sampling_timesteps": 2}


def make_process(timesteps: int = 1000) -> GaussianDiffusion:
    unet = Unet(8, dim_mults=(1,))
    return GaussianDiffusion(unet, image_size=8, timesteps=timesteps, objective="pred_v")


def tuned_model(**changes) -> ConsistencyModel:
    torch.manual_seed(0)
    return ConsistencyModel(**SMALL | changes).eval()


def test_clean_image_is_its_own_x_0_exactly():
    model = tuned_model()
    x = torch.randn(4, 3, 8, 8)
    clean = torch.full((4,), -1)
    assert torch.equal(model.loss.predict_x_0(model.unet, x, clean), x)
    assert torch.equal(model.loss.diffuse(x, clean, torch.randn_like(x)), x)
    # At other timesteps, what the samplers' denoiser predicts.
    for t in (0, 17, 35):
        expected = model.denoiser(clip=False)(x, t)
        x_0 = model.loss.predict_x_0(model.unet, x, torch.full((4,), t))
        torch.testing.assert_close(x_0, expected, atol=1e-5, rtol=1e-5)


def guided_source(**changes) -> DDPMModel:
    """A model whose guide differs from its network."""
    torch.manual_seed(1)
    source = DDPMModel(**SMALL | {"guidance": 2.0} | changes).eval()
    source.snapshot_guide()
    for p in source.guide.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return source


@pytest.mark.parametrize("mode", ["none", "autoguidance", "cfg", "both"])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_loss_is_that_of_a_plain_second_implementation(fraction, mode):
    options = {"timesteps": 1000, "class_counts": {"cat": 1, "dog": 1}}
    options |= {"guidance": 1.0} if mode == "none" else {"guidance": 2.0, "guidance_mode": mode}
    source = guided_source(**options)
    source.unet.class_embedding.weight.data.normal_()
    model = tuned_model(**options)
    model.start_from(source)
    assert (model.teacher.unet is None) == (mode == "none")
    model.unet.final_conv.bias.data += 0.3  # tuned a little, unlike the teacher
    model.set_fraction(fraction)
    images, noise = torch.rand(6, 3, 8, 8), torch.randn(6, 3, 8, 8)
    t = torch.tensor([0, 1, 60, 300, 700, 990])
    labels = torch.tensor([0, 1, -1, 0, 1, 0])
    loss = model(images, t, noise, labels)

    # One image after the other, in sigma, with numbers; timestep -1 is the clean image.
    alpha_bar = [*model.diffusion.alphas_cumprod.double().tolist(), 1.0]
    sigmas = [math.sqrt((1 - a) / a) for a in alpha_bar]

    def lower_timestep(step: int) -> int:
        sigma = sigmas[step]
        lower = sigma - sigma * (1 + 8 / (1 + math.exp(sigma))) / 2 ** (3 + 5 * fraction)
        return max((k for k in range(step) if sigmas[k] <= lower), default=-1)

    def predict_x_0(clean: Tensor, added: Tensor, step: int, label: Tensor) -> Tensor:
        a = alpha_bar[step]
        x = math.sqrt(a) * clean + math.sqrt(1 - a) * added
        v = model.unet(x[None], torch.tensor([max(step, 0)]), None, label)[0]
        return math.sqrt(a) * x - math.sqrt(1 - a) * v

    def by_teacher(clean: Tensor, added: Tensor, step: int, label: Tensor) -> tuple[Tensor, Tensor]:
        """The image and the noise that the guided model predicts, by its samplers' code."""
        a = alpha_bar[step]
        x = math.sqrt(a) * clean + math.sqrt(1 - a) * added
        predicted = source.denoiser(labels=label)(x[None], step)[0]
        return predicted, (x - math.sqrt(a) * predicted) / math.sqrt(1 - a)

    losses = []
    for clean, added, step, label in zip(2 * images - 1, noise, t.tolist(), labels, strict=True):
        s, label = lower_timestep(step), label[None]
        target = (clean, added) if mode == "none" else by_teacher(clean, added, step, label)
        difference = predict_x_0(clean, added, step, label) - predict_x_0(*target, s, label)
        distance = math.sqrt(difference.square().mean().item() + 0.00054**2) - 0.00054
        losses.append(distance / (sigmas[step] - sigmas[s]))
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-3)


def test_loss_has_no_gradient_through_the_target_and_one_in_mixed_precision():
    model = tuned_model(timesteps=1000)
    inputs = torch.rand(8, 3, 8, 8), torch.arange(8) * 120 + 60, torch.randn(8, 3, 8, 8)
    gradients = []
    for use_amp in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=use_amp):
            model(*inputs).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.unet.parameters()]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.9
    weights = [torch.ones((), requires_grad=True) for _ in range(2)]
    weight = iter(weights)  # one at the noisier timesteps, the other at the target's
    model.loss(lambda x, t: next(weight) * x, *inputs).backward()
    assert weights[0].grad != 0 and weights[1].grad is None


@pytest.mark.parametrize("base_size", [0, 16])
def test_timesteps_are_distributed_up_to_sigma_max(base_size):
    model = tuned_model(timesteps=1000, schedule_base_size=base_size)
    shift = math.log(8 / base_size) if base_size else 0.0
    t = model.timesteps_from_uniform(torch.rand(100_000))
    log_sigma = model.loss.sigma[t].log()
    assert model.loss.sigma[t].max() <= 80 < model.loss.sigma[t.max() + 1]
    assert log_sigma.mean().item() == pytest.approx(-1.1 + shift, abs=0.1)
    assert log_sigma.std().item() == pytest.approx(1.9, abs=0.1)


class TinyNetwork(nn.Module):
    """v of pixels (B, 1, 1, 1), from x and the noise level."""

    def __init__(self, sigma: Tensor):
        super().__init__()
        self.log_sigma = sigma[:-1].log()
        layers = nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.log_sigma[t][:, None] / 4
        waves = [f(c * k) for k in (3, 6) for f in (torch.sin, torch.cos)]
        level = [c, c * c, torch.sigmoid(4 * c)]
        return self.layers(torch.cat([x.flatten(1), *level, *waves], 1))[:, :, None, None]


def test_tuning_approaches_the_exact_flow_of_a_mixture():
    torch.manual_seed(0)
    process = make_process()
    loss = ConsistencyLoss(process)
    last = int((loss.sigma[:-1] <= 80).sum()) - 1
    mixture = Mixture(process.alphas_cumprod[: last + 1].tolist())
    network = TinyNetwork(loss.sigma)
    optimizer = torch.optim.Adam(network.parameters())
    points = torch.linspace(-2.2, 2.2, 64)[:, None, None, None]
    exact = mixture.flow(points.double().flatten()).float()

    def error() -> float:
        with torch.no_grad():
            x_0 = loss.predict_x_0(network, points, torch.full((64,), last)).flatten()
        return (x_0 - exact).square().mean().sqrt().item()

    def update(step: int, steps: int, lr: float, tuning: bool) -> None:
        component = torch.rand(256, 1, 1, 1) < 0.5
        x_0 = torch.where(
            component, -0.3 + 0.3 * torch.randn(256, 1, 1, 1), 0.4 + 0.2 * torch.randn(256, 1, 1, 1)
        )
        noise = torch.randn_like(x_0)
        t = torch.searchsorted(loss.timestep_cdf, (torch.arange(256) + torch.rand(256)) / 256)
        t = t.clamp(max=last)
        if tuning:
            loss.fraction.fill_(step / steps)
            value = loss(network, x_0, t, noise)
        else:
            v = process.predict_v(x_0, t, noise)
            value = (network(loss.diffuse(x_0, t, noise), t) - v).square().mean()
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    for step in range(300):
        update(step, 300, 4e-3, tuning=False)
    errors = [error()]  # of diffusion training: the mean image, whatever the noise
    for step in range(800):
        update(step, 800, 6e-3, tuning=True)
        if step in (399, 799):
            errors.append(error())
    assert errors[0] > 0.4
    assert errors[1] < 0.7 * errors[0] and errors[2] < 0.15, errors
