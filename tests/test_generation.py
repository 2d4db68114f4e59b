"""Image generation: seeds, sampling plans, interpolation, variation, inpainting."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm_model import DDPMModel
from engine.errors import UserError
from engine.samplers import (
    CONSISTENCY_LEVELS,
    SAMPLERS,
    choose_timesteps,
    consistency,
    ddim,
    timesteps_from_sigmas,
)

SMALL = {"image_size": 8, "dim": 8, "dim_mults": (1, 2), "timesteps": 40, "sampling_timesteps": 10}
RIGHT_HALF = (torch.arange(8) >= 4).expand(8, 8)


def small(**changes) -> DDPMModel:
    torch.manual_seed(0)
    return DDPMModel(**(SMALL | changes)).eval()


class Exact(nn.Module):
    """Predicts x_0 exactly for images whose every pixel is N(mean, std^2), in [-1, 1].

    `calls` has the timestep and x of every call.
    """

    self_condition = False

    def __init__(self, alpha_bar: list[float], mean: float, std: float):
        super().__init__()
        self.alpha_bar = alpha_bar
        self.mean = mean
        self.variance = std**2
        self.calls: list[tuple[int, Tensor]] = []

    def forward(self, x: Tensor, times: Tensor, previous: Tensor | None = None) -> Tensor:
        t = int(times[0])
        self.calls.append((t, x))
        a = self.alpha_bar[t]
        gain = math.sqrt(a) * self.variance / (a * self.variance + 1 - a)
        return self.mean + gain * (x - math.sqrt(a) * self.mean)


def exact(mean: float, std: float = 0.0, **changes) -> DDPMModel:
    model = small(objective="pred_x0", **changes)
    model.diffusion.model = Exact(model.alpha_bar, mean, std)
    return model


def test_sample_depends_on_its_seed_alone():
    model = small()
    options = {"sampler": "ddpm", "steps": 40}
    images = model.sample(5, seed=10, **options)
    alone = model.sample(1, seed=13, **options)[0]
    torch.testing.assert_close(alone, images[3], atol=1e-5, rtol=0)
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(model.sample(1), model.sample(1))


def test_sample_returns_all_timesteps_from_noise_to_image():
    model = small()
    frames = model.sample(2, return_all_timesteps=True, seed=0)
    assert frames.shape == (2, 11, 3, 8, 8)
    assert torch.equal(frames[:, -1], model.sample(2, seed=0))
    noise = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(frames[0, 0], ((noise + 1) / 2).clamp(0, 1))


def test_sample_runs_in_evaluation_mode_and_restores_training_mode():
    model = small(dropout=0.5)
    expected = model.sample(1, seed=0)
    model.train()
    assert torch.equal(model.sample(1, seed=0), expected)
    assert model.training and model.unet.training


def test_schedule_is_that_of_the_weights_and_is_read_without_a_denoiser(monkeypatch):
    model = small()
    state = model.state_dict()
    state["diffusion.alphas_cumprod"] = state["diffusion.alphas_cumprod"] / 2
    model.load_state_dict(state)
    expected = state["diffusion.alphas_cumprod"].tolist()
    assert model.alpha_bar == model.denoiser().alpha_bar == expected
    monkeypatch.setattr(DDPMModel, "denoiser", None)
    assert model.sampling_plan("ddim", 2, "uniform")[1] == [39, 19, -1]


@pytest.mark.parametrize("sampler", ["heun", SAMPLERS["heun"]])
def test_sample_takes_sampler_steps_and_spacing(sampler):
    model = small(timesteps=200)
    calls = []
    model.unet.register_forward_hook(lambda *_: calls.append(1))
    options = {"sampler": sampler, "steps": 9, "seed": 0}
    uniform = model.sample(1, spacing="uniform", **options)
    karras = model.sample(1, spacing="karras", **options)
    assert len(calls) == 18 and not torch.equal(uniform, karras)


def tuned_model(**changes) -> DDPMModel:
    return small(consistency=True, sampling_timesteps=2, **changes)


@pytest.mark.parametrize("base_size", [8, 32])
def test_noise_levels_decide_the_timesteps(base_size):
    model = tuned_model(timesteps=1000, schedule_base_size=base_size)
    alpha_bar = model.alpha_bar

    def at(levels: tuple[float, ...]) -> list[int]:
        # At a quarter of the size a quarter of the noise hides as much of an image.
        return timesteps_from_sigmas(alpha_bar, [level * 8 / base_size for level in levels])

    # The measured ones by default, spaced ones for other counts and where a spacing is named.
    for steps in range(1, 9):
        spaced = choose_timesteps(consistency, alpha_bar, steps, "karras")
        measured = CONSISTENCY_LEVELS.get(steps)
        assert model.sampling_plan(steps=steps)[1] == (at(measured) if measured else spaced)
        for spacing in ("karras", "logsnr"):
            spaced = choose_timesteps(consistency, alpha_bar, steps, spacing)
            assert model.sampling_plan(steps=steps, spacing=spacing)[1] == spaced

    # Any others.
    timesteps = at((80, 2, 0.2))
    plan = model.sampling_plan(noise_levels=(80, 2, 0.2))
    assert plan == (consistency, timesteps) and model.count_nfe(*plan) == 3
    x, randn = model.noise([5, 6])
    *_, (_, expected, _) = model.trajectory(x, timesteps, consistency, randn)
    images = model.sample(2, seed=5, noise_levels=(80, 2, 0.2))
    torch.testing.assert_close(images, ((expected + 1) / 2).clamp(0, 1))
    image, mask = images[0], torch.ones(8, 8)
    for edit in (partial(model.vary, image, 0.9), partial(model.inpaint, image, mask)):
        levels = ((80, 2, 0.2), (80, 1, 0.2))
        assert not torch.equal(*(edit(batch_size=1, seed=0, noise_levels=one) for one in levels))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m.sample(1, steps=41), "steps is 41, but must be between 1 and 40 for this"),
        (
            lambda m, x: m.sample(1, sampler="euler"),
            "unknown sampler euler; choose from ddpm, ddim",
        ),
        (
            lambda m, x: m.sample(1, spacing="even"),
            "unknown spacing even; choose from uniform, trailing, logsnr, karras",
        ),
        (lambda m, x: m.sample(1, sampler=lambda *a: a[1]), "the sampler <lambda> must yield"),
        (lambda m, x: m.sample(1, sampler=lambda *a: iter(a[1])), r"must yield \(x_s, x_0\), o"),
        (lambda m, x: m.sample(1, sampler=lambda *a: iter([(a[1], a[1])])), "once for each interv"),
        (
            lambda m, x: m.sample(1, sampler=lambda *a: ((a[1], a[1]) for _ in a[2])),
            "once for each interv",
        ),
        (lambda m, x: m.sample(1, sampler=partial(ddim, eta=2)), "eta is 2, but must be between 0"),
        (lambda m, x: m.sample(1, eta=0.5), "the sampler unipc cannot run .*'eta'"),
        (lambda m, x: m.sample(1, seed=3.5), "seed is 3.5, but must be an integer"),
        (lambda m, x: m.sample(1, seed=2**64), "a seed has more than 64 bits"),
        (lambda m, x: m.vary((x * 255).byte()), r"must have floats in \[0, 1\]"),
        (lambda m, x: m.vary(x * 255), r"must have floats in \[0, 1\]"),
        (lambda m, x: m.sample(2, seed=[1]), "there are 1 seeds for 2 images"),
        (lambda m, x: m.vary(x, strength=0), "strength is 0"),
        (lambda m, x: m.vary(x[:, :4]), "the image is .* but must be"),
        (lambda m, x: m.interpolate(x, x, 1), "num_steps is 1"),
        (lambda m, x: m.interpolate(x.repeat(1, 2, 2), x), "the image is .3, 16, 16., but must be"),
        (lambda m, x: m.inpaint(x, torch.ones(4, 4)), "the mask is .4, 4., but must be .8, 8."),
        (lambda m, x: m.inpaint(x, torch.ones(8, 8), resamples=0), "resamples is 0"),
        (lambda m, x: m.inpaint(x, torch.ones(3, 8, 8)), "the mask is .3, 8, 8., but must be"),
    ],
)
def test_generation_rejects_wrong_arguments(call, message):
    with pytest.raises(UserError, match=message):
        call(small(), torch.rand(3, 8, 8))


def test_seeds_may_be_integers_of_numpy_and_torch():
    model = small()
    expected = model.sample(2, seed=[1, 2])
    for seed in (np.int64(1), np.array([1, 2]), torch.tensor([1, 2]), range(1, 3), iter([1, 2])):
        assert torch.equal(model.sample(2, seed=seed), expected)


def test_interpolate_disables_guidance():
    model = small(guidance=3.0)
    model.snapshot_guide()
    for p in model.unet.parameters():
        p.data += 0.05 * torch.randn_like(p)
    pair = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    images = model.interpolate(*pair, 4, steps=10)
    model.guide = None
    assert torch.equal(images, model.interpolate(*pair, 4, steps=10))


def test_interpolate_does_not_clip_predictions():
    """Images around 3 make the network predict more than 1; the ends still match."""
    model = exact(mean=3.0, std=1.0, timesteps=400)
    pair = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = model.interpolate(*pair, 3, steps=400)
    assert images.shape == (3, 3, 8, 8)
    torch.testing.assert_close(images[[0, -1]], pair, atol=0.02, rtol=0)


@pytest.mark.parametrize("strength", [0.02, 0.5, 1.0])
@pytest.mark.parametrize("is_tuned", [False, True])
def test_vary_starts_from_the_image_noised_to_its_first_timestep(strength, is_tuned):
    model = exact(mean=0.4, consistency=is_tuned)
    plan = {"steps": 2} if is_tuned else {"sampler": "ddim", "steps": 20, "spacing": "uniform"}
    model.vary(torch.full((3, 8, 8), 0.7), strength, 2, seed=5, **plan)
    start = max(1, round(strength * 40)) - 1
    below = [t for t in model.sampling_plan(**plan)[1] if 0 <= t <= start]
    if is_tuned or not below:
        below = sorted({start, *below}, reverse=True)
    last_usable = model.denoiser().last_usable_t
    assert [t for t, _ in model.unet.calls] == [min(t, last_usable) for t in below]
    noise, _ = model.noise([5, 6])
    for t, (_, x) in zip(below[: 1 if is_tuned else None], model.unet.calls, strict=False):
        a = model.alpha_bar[t]
        torch.testing.assert_close(x, math.sqrt(a) * 0.4 + math.sqrt(1 - a) * noise)


@pytest.mark.parametrize("steps", [1, 2])
def test_inpaint_of_a_tuned_model_agrees_with_the_known_part(steps):
    """Images have one gray value each, which the known half tells."""

    class Gray(Exact):
        def forward(self, x: Tensor, times: Tensor, previous: Tensor | None = None) -> Tensor:
            super().forward(x, times)
            a = self.alpha_bar[int(times[0])]
            return x.mean(dim=(1, 2, 3), keepdim=True).expand_as(x) / math.sqrt(a)

    model = exact(mean=0.0, consistency=True, timesteps=400)
    model.diffusion.model = Gray(model.alpha_bar, 0.0, 1.0)
    images = model.inpaint(torch.full((3, 8, 8), 0.6), RIGHT_HALF, 32, steps=steps, seed=0)
    torch.testing.assert_close(images, torch.full((32, 3, 8, 8), 0.6), atol=0.15, rtol=0)
    timesteps = [t for t, _ in model.unet.calls]
    assert len(set(timesteps)) >= 4 and all(timesteps.count(t) == 5 for t in timesteps)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "unipc"])
def test_inpaint_gives_the_network_the_noise_level_of_its_timestep(sampler):
    """If all images are 0.4, x_t is N(sqrt(a_t) 0.4, 1 - a_t) in both halves."""
    model = exact(mean=0.4)
    image = torch.full((3, 8, 8), 0.7)
    options = {"steps": 8, "seed": 0, "spacing": "uniform", "resamples": 3}
    images = model.inpaint(image, RIGHT_HALF, 64, sampler, **options)
    torch.testing.assert_close(images, image.expand(64, 3, 8, 8))

    timesteps = model.sampling_plan(sampler, 8, "uniform")[1][:-1]
    expected = [t for t in timesteps for _ in range(3 if t != timesteps[-1] else 1)]
    assert [t for t, _ in model.unet.calls] == expected
    for t, x in model.unet.calls:
        a = model.unet.alpha_bar[t]
        for half in (x[..., :4], x[..., 4:]):
            assert half.mean().item() == pytest.approx(math.sqrt(a) * 0.4, abs=0.06), t
            assert half.std().item() == pytest.approx(math.sqrt(1 - a), rel=0.05), t
    first, second = [x for t, x in model.unet.calls if t == timesteps[0]][:2]
    assert not torch.allclose(first, second, atol=0.5)  # other noise


def test_inpaint_keeps_what_the_mask_does_not_mark():
    model = small()
    image = torch.rand(3, 8, 8)
    images = model.inpaint(image, RIGHT_HALF, 2, steps=4, seed=0, resamples=2)
    torch.testing.assert_close(images[..., :4], image[..., :4].expand(2, -1, -1, -1))
    assert (images[..., 4:] - image[..., 4:]).abs().mean() > 0.05
    assert (images[0, ..., 4:] - images[1, ..., 4:]).abs().mean() > 0.01
