"""The denoiser: objectives, guidance, clipping, labels, counting."""

import warnings

import pytest
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from torch import Tensor

from ddpm_model import DDPMModel
from engine.denoiser import ModelDenoiser
from engine.errors import UserError
from engine.noise_schedule import BETA_SCHEDULES, OBJECTIVES, sigma_of
from engine.samplers import SAMPLERS, SPACINGS

SMALL = {
    "image_size": 8, "dim": 8, "dim_mults": (1,), "attn_heads": 1, "attn_dim_head": 8,
    "timesteps": 40, "sampling_timesteps": 10,
}  # fmt: skip


def small(**changes) -> DDPMModel:
    torch.manual_seed(0)
    return DDPMModel(**(SMALL | changes)).eval()


def guided(**changes) -> DDPMModel:
    """A model with a guide of other weights, both unlike those of `small`."""
    model = small(**changes)
    for _ in range(2):
        model.snapshot_guide()
        for p in model.unet.parameters():
            p.data += 0.05 * torch.randn_like(p)
    return model


class Constant:
    """A network that predicts one value everywhere, and the arguments of its calls."""

    def __init__(self, value: float):
        self.value = value
        self.calls: list[tuple[int, Tensor | None, Tensor | None]] = []

    def __call__(
        self, x: Tensor, times: Tensor, previous: Tensor | None, labels: Tensor | None
    ) -> Tensor:
        assert (times == times[0]).all()
        self.calls.append((int(times[0]), previous, labels))
        return torch.full_like(x, self.value)


def make_denoiser(diffusion: GaussianDiffusion, *args, **kwargs) -> ModelDenoiser:
    return ModelDenoiser(diffusion, diffusion.alphas_cumprod.tolist(), *args, **kwargs)


def process(self_condition: bool = False, **changes) -> GaussianDiffusion:
    unet = Unet(8, dim_mults=(1,), self_condition=self_condition)
    return GaussianDiffusion(
        unet, image_size=8, timesteps=40, **({"objective": "pred_x0"} | changes)
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_denoiser_recovers_x_0_from_a_perfect_prediction(objective):
    diffusion = process(objective=objective)
    x_0 = torch.rand(2, 3, 8, 8) * 2 - 1
    noise = torch.randn(2, 3, 8, 8)
    for t in (0, 20, 38):
        times = torch.full((2,), t)
        v = diffusion.predict_v(x_0, times, noise)
        output = {"pred_v": v, "pred_noise": noise, "pred_x0": x_0}[objective]
        denoiser = make_denoiser(diffusion, lambda *_, output=output: output, clip=False)
        prediction = denoiser(diffusion.q_sample(x_0, times, noise), t)
        torch.testing.assert_close(prediction, x_0, atol=1e-4, rtol=1e-3)


def test_guidance_applies_in_its_interval_only():
    model = guided(guidance=2.0)
    main = small()
    main.unet.load_state_dict(model.unet.state_dict())
    guide = small()
    guide.unet.load_state_dict(model.guide.state_dict())
    x = torch.randn(2, 3, 8, 8)
    low, high = model.guidance_interval
    inside = [t for t, a in enumerate(model.alpha_bar) if low <= sigma_of(a) <= high]
    assert 5 < len(inside) < 35
    for t in (0, inside[0], inside[-1], 39):
        x_0 = main.denoiser(clip=False)(x, t)
        x_0_guide = guide.denoiser(clip=False)(x, t)
        expected = x_0_guide + 2 * (x_0 - x_0_guide) if t in inside else x_0
        torch.testing.assert_close(model.denoiser(clip=False)(x, t), expected)
        torch.testing.assert_close(model.denoiser(clip=False, guidance=1)(x, t), x_0)
        assert not torch.allclose(x_0, x_0_guide, atol=1e-3)
    assert torch.equal(model.sample(1, seed=0, guidance=1), main.sample(1, seed=0))
    assert not torch.allclose(model.sample(1, seed=0), main.sample(1, seed=0), atol=1e-3)


@pytest.mark.parametrize(("size", "base_size", "factor"), [(64, 32, 2), (16, 64, 0.25), (8, 0, 1)])
def test_guidance_interval_shifts_with_the_schedule(size, base_size, factor):
    size_and_schedule = {"image_size": size, "schedule_base_size": base_size, "timesteps": 200}
    interval = {"guidance_min_sigma": 0.2, "guidance_max_sigma": 3.0}
    model = guided(**size_and_schedule, **interval)
    assert model.guidance_interval == pytest.approx((0.2 * factor, 3 * factor))
    denoiser = model.denoiser()
    unshifted = guided(timesteps=200, **interval).denoiser()
    inside = [t for t in range(200) if denoiser.is_guided(t)]
    wider = guided(**size_and_schedule, guidance_min_sigma=0.1, guidance_max_sigma=9.0)
    assert wider.denoiser(**interval).interval == denoiser.interval
    assert wider.denoiser().interval == pytest.approx((0.1 * factor, 9 * factor))
    assert inside == [t for t in range(200) if unshifted.is_guided(t)]
    lowest = sigma_of(denoiser.alpha_bar[inside[0]])
    highest = sigma_of(denoiser.alpha_bar[inside[-1]])
    assert 0.2 * factor <= lowest < 0.22 * factor
    assert 2.7 * factor < highest <= 3 * factor


@pytest.mark.parametrize(
    ("x_0", "x_0_guide", "expected"), [(0.9, 0.2, 1.6), (1.4, 1.5, 1.3), (0.9, 1.5, 0.3)]
)
def test_predictions_are_clipped_after_guidance(x_0, x_0_guide, expected):
    network = Constant(x_0)
    guide = Constant(x_0_guide)
    x = torch.zeros(1, 3, 8, 8)
    for clip in (True, False):
        denoiser = make_denoiser(process(), network, clip, guide, guidance=2.0)
        value = min(expected, 1.0) if clip else expected
        torch.testing.assert_close(denoiser(x, 20), torch.full_like(x, value))
    assert [t for t, _, _ in guide.calls] == [20, 20]


def test_denoiser_passes_each_network_its_labels():
    network = Constant(0.5)
    guide = Constant(0.1)
    labels = torch.tensor([3, 4])
    others = torch.tensor([-1, 4])
    denoiser = make_denoiser(
        process(), network, True, guide, 2.0, labels=labels, weaker_labels=others
    )
    denoiser(torch.zeros(2, 3, 8, 8), 7)
    assert network.calls[0][2] is labels and guide.calls[0][2] is others


def conditional(**changes) -> DDPMModel:
    """A model of three classes with a guide, whose class embeddings are not zero."""
    return guided(class_counts={"a": 1, "b": 1, "c": 2}, **changes)


def x_0_of(network: torch.nn.Module, x: Tensor, labels: Tensor | None) -> Tensor:
    """What one network predicts at timestep 20, unguided."""
    model = conditional()
    model.diffusion.model = network
    return model.denoiser(clip=False, guidance=1, labels=labels)(x, 20)


def test_guidance_modes_are_the_guide_no_label_or_both():
    model = conditional()
    x = torch.randn(2, 3, 8, 8)
    labels = torch.tensor([0, 2])
    x_0 = x_0_of(model.unet, x, labels)
    references = {
        "autoguidance": x_0_of(model.guide, x, labels),
        "cfg": x_0_of(model.unet, x, None),
        "both": x_0_of(model.guide, x, None),
    }
    for mode, reference in references.items():
        denoiser = model.denoiser(False, 3.0, labels, mode)
        torch.testing.assert_close(denoiser(x, 20), reference + 3 * (x_0 - reference))
        assert torch.equal(model.denoiser(False, 1.0, labels, mode)(x, 20), x_0)
        assert not torch.allclose(reference, x_0, atol=1e-3)


def test_guidance_mode_defaults_to_the_models_own_and_counts_all_nfe():
    model = conditional(guidance_mode="cfg", guidance=2.0)
    model.guide = None  # classifier-free guidance needs none
    calls = []
    model.unet.register_forward_hook(lambda *_: calls.append(1))
    plan = model.sampling_plan("unipc", 9)
    guided_image = model.sample(1, steps=9, seed=0)
    assert 9 < len(calls) == model.count_nfe(*plan)
    assert model.count_nfe(*plan, guidance_mode="autoguidance") == 9  # there is no guide
    assert torch.equal(
        model.sample(1, steps=9, seed=0, guidance=1),
        model.sample(1, steps=9, seed=0, guidance_mode="autoguidance"),
    )
    assert not torch.equal(guided_image, model.sample(1, steps=9, seed=0, guidance=1))
    # No label, no classifier-free guidance.
    calls.clear()
    model.vary(torch.rand(3, 8, 8), 1.0, 1, steps=9, seed=0)
    assert len(calls) == 9


def test_guidance_modes_that_do_not_exist_are_rejected():
    with pytest.raises(UserError, match="unknown guidance_mode cgf; choose from autoguidance, cfg"):
        conditional().denoiser(guidance_mode="cgf")
    with pytest.raises(UserError, match="guidance_mode cfg needs labels, but this model is uncond"):
        guided().denoiser(guidance_mode="cfg")


def test_denoiser_self_conditions_on_its_previous_prediction():
    network = Constant(0.5)
    denoiser = make_denoiser(process(self_condition=True), network, True)
    x = torch.zeros(2, 3, 8, 8)
    outputs = [denoiser(x, t) for t in (30, 20)]
    assert network.calls[0][1] is None and network.calls[1][1] is outputs[0]


@pytest.mark.parametrize("is_tuned", [True, False])
def test_tuned_network_is_asked_up_to_sigma_max_alone(is_tuned):
    model = small(timesteps=1000, consistency=is_tuned)
    asked = []
    model.unet.register_forward_hook(lambda _, arguments, __: asked.append(int(arguments[1][0])))
    model.denoiser()(torch.randn(1, 3, 8, 8), 999)
    within = [t for t, a in enumerate(model.alpha_bar) if not is_tuned or sigma_of(a) <= 80]
    assert asked == [within[-1]] and (within[-1] < 999) == is_tuned


def test_labels_are_rejected_by_unconditional_models():
    model = guided()
    labels = torch.zeros(2, dtype=torch.long)
    images = torch.rand(2, 3, 8, 8)
    calls = (
        lambda: model.sample(2, labels=labels),
        lambda: model.denoiser(labels=labels)(images, 3),
        lambda: model(images, labels, images, labels),
        lambda: model.mse_per_image(images, labels, images, labels=labels),
    )
    for call in calls:
        with pytest.raises(UserError, match="this model is unconditional: it takes no labels"):
            call()


@pytest.mark.parametrize("sampler", ["unipc", "heun", "ddim"])
def test_count_nfe_counts_both_networks(sampler):
    model = guided(guidance=2.0)
    calls = []
    for network in (model.unet, model.guide):
        network.register_forward_hook(lambda *_: calls.append(1))
    plan = model.sampling_plan(sampler, 9)
    model.sample(1, sampler=sampler, steps=9, seed=0)
    assert 9 < len(calls) == model.count_nfe(*plan)
    assert model.count_nfe(*plan, guidance=1) == 9


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_denoiser_handles_zero_terminal_snr(schedule, objective):
    model = small(objective=objective, beta_schedule=schedule, timesteps=200)
    model.alpha_bar[-1] = 0.0
    x = torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        for clip in (False, True):
            assert model.denoiser(clip)(x, 199).isfinite().all()
        for name in SAMPLERS:
            for spacing in SPACINGS:
                for options in [{}, {"eta": 1.0}] if name == "ddim" else [{}]:
                    options = options | {"sampler": name, "spacing": spacing}
                    assert model.sample(2, steps=5, seed=0, **options).isfinite().all()
        prediction = model.denoiser(clip=False)(x, 199)
        if objective == "pred_noise":
            torch.testing.assert_close(prediction, model.denoiser(clip=False)(x, 198))
        else:
            model.alpha_bar[-1] = 1e-12
            almost = model.denoiser(clip=False)(x, 199)
            torch.testing.assert_close(prediction, almost, atol=1e-5, rtol=0)
