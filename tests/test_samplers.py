"""The samplers against upstream's, diffusers' and exactly solved distributions."""

import math
from functools import cache, partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from ddpm_model import DDPMModel
from engine import samplers
from engine.denoiser import ModelDenoiser
from engine.errors import RenamedWarning, UserError
from engine.noise_schedule import BETA_SCHEDULES, OBJECTIVES, SIGMA_MAX, sigma_of
from engine.samplers import (
    CONSISTENCY_LEVELS,
    MAX_CONSISTENCY_STEPS,
    SAMPLERS,
    SPACINGS,
    alpha_bar_at,
    check_noise_levels,
    choose_timesteps,
    consistency,
    num_intervals,
    timesteps_from_sigmas,
    uniform,
)
from tests.helpers import Mixture

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning:diffusers"
)

PREDICTION_TYPE = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
SCHEDULERS = {
    "dpmpp_2m": partial(DPMSolverMultistepScheduler, solver_order=2),
    "unipc": partial(UniPCMultistepScheduler, solver_order=2),
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
}


def small(timesteps: int = 200, **changes) -> DDPMModel:
    torch.manual_seed(0)
    network = {"image_size": 8, "dim": 8, "dim_mults": (1,), "attn_heads": 1, "attn_dim_head": 8}
    model = DDPMModel(**network, timesteps=timesteps, sampling_timesteps=10, **changes)
    return model.eval()


@torch.no_grad()
def run_sampler(name: str, denoiser, x: Tensor, timesteps: list[int], **options) -> list[Tensor]:
    """Every x of a sampler, with torch's global generator as its noise."""
    outputs = SAMPLERS[name](denoiser, x, timesteps, torch.randn_like, **options)
    return [x for x, _ in outputs]


class Gaussian:
    """The exact denoiser of images whose every pixel is N(0.3, 0.2^2)."""

    mean = 0.3
    std = 0.2
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)).tolist()

    def __call__(self, x: Tensor, t: int) -> Tensor:
        a = self.alpha_bar[t]
        gain = math.sqrt(a) * self.std**2 / (a * self.std**2 + 1 - a)
        return self.mean + gain * (x - math.sqrt(a) * self.mean)


# Powers of 2 divide the timesteps; sigma stops at 6, where steps in sigma are still short.
SMOOTH = (1 / (1 + np.geomspace(1e-5, 6, 65536) ** 2)).tolist()


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [("ddpm", 40, {}), ("ddim", 10, {"eta": 0.0}), ("ddim", 10, {"eta": 0.7})],
)  # fmt: skip
def test_ddpm_and_ddim_match_upstream(name, steps, options, objective, schedule, self_condition):
    model = small(40, objective=objective, beta_schedule=schedule, self_condition=self_condition)
    model.diffusion.sampling_timesteps = steps
    model.diffusion.is_ddim_sampling = name == "ddim"
    model.diffusion.ddim_sampling_eta = options.get("eta", 0.0)
    torch.manual_seed(1)
    expected = model.diffusion.sample(2, return_all_timesteps=True)

    torch.manual_seed(1)
    x = torch.randn(2, 3, 8, 8)
    timesteps = uniform(model.alpha_bar, steps)
    states = [x, *run_sampler(name, model.denoiser(), x, timesteps, **options)]
    torch.testing.assert_close((torch.stack(states, dim=1) + 1) / 2, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps", [2, 10])
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_samplers_match_diffusers(name, objective, schedule, steps, clip):
    model = small(objective=objective, beta_schedule=schedule)
    noise = torch.randn(2, 3, 8, 8)
    clipping = {"thresholding": clip, "sample_max_value": 1.0}
    options = {}
    if name in ("ddim", "ddpm"):
        clipping = {"clip_sample": clip}
    if name == "ddim":
        options = {"use_clipped_model_output": True}
    scheduler = SCHEDULERS[name](
        num_train_timesteps=200,
        trained_betas=model.diffusion.betas.numpy(),
        prediction_type=PREDICTION_TYPE[objective],
        timestep_spacing="trailing",
        **clipping,
    )
    scheduler.set_timesteps(steps)
    timesteps = SPACINGS["trailing"](model.alpha_bar, steps)
    assert timesteps == [*scheduler.timesteps.tolist(), -1]

    torch.manual_seed(1)
    expected = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = model.unet(expected, t.expand(2))
            expected = scheduler.step(output, t, expected, **options).prev_sample
    torch.manual_seed(1)
    sample = run_sampler(name, model.denoiser(clip), noise, timesteps)[-1]
    # An x_0 that is not clipped can be large: noise over sqrt(alpha_bar).
    assert (sample - expected).abs().max() < 1e-4 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_reach_the_exact_distribution(name):
    torch.manual_seed(0)
    x = torch.randn(64, 1, 32, 32)
    sample = run_sampler(name, Gaussian(), x, uniform(Gaussian.alpha_bar, 1000))[-1]
    assert sample.mean().item() == pytest.approx(0.3, abs=0.004)
    assert sample.std().item() == pytest.approx(0.2, rel=0.02)


@pytest.mark.parametrize(
    ("name", "order"), [("ddim", 1), ("dpmpp_2m", 2), ("heun", 2), ("unipc", 3)]
)
def test_samplers_converge_to_the_exact_image_at_their_order(name, order):
    denoiser = Mixture(SMOOTH)
    x = torch.linspace(-2.5, 2.5, 64, dtype=torch.float64).view(1, 1, 8, 8)
    exact = denoiser.flow(x)
    errors = []
    for steps in (64, 128, 256, 512):
        sample = run_sampler(name, denoiser, x, uniform(SMOOTH, steps))[-1]
        errors.append((sample - exact).square().mean().sqrt().item())
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders == pytest.approx([order] * 3, abs=0.06), f"errors {errors}, orders {orders}"
    assert errors[-1] < {1: 5e-3, 2: 5e-5, 3: 1e-6}[order]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_have_a_limit_at_zero_terminal_snr(name, spacing):
    x = torch.linspace(-2, 2, 64, dtype=torch.float64).view(1, 1, 8, 8)

    def sample(last: float) -> Tensor:
        denoiser = Mixture(alpha_bar_of("cosine", 200, last))
        timesteps = SPACINGS[spacing](denoiser.alpha_bar, num_intervals(SAMPLERS[name], 19))
        torch.manual_seed(1)
        return run_sampler(name, denoiser, x, timesteps)[-1]

    limit = sample(0.0)
    errors = [(sample(last) - limit).abs().max() for last in (1e-12, 1e-75, 1e-150, 1e-300)]
    assert limit.isfinite().all() and errors[-1] < 1e-5
    if name in ("dpmpp_2m", "unipc"):
        # Multistep weights go as the ratio of steps in log-SNR: errors as 1 / log(alpha_bar).
        assert errors[-1] < 0.6 * errors[-2] < 0.36 * errors[-3]
    else:
        assert errors[0] < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 9, 10])
@pytest.mark.parametrize("name", SAMPLERS)
def test_num_intervals_has_steps_nfe(name, steps):
    denoiser = Mixture(SMOOTH)
    timesteps = uniform(SMOOTH, num_intervals(SAMPLERS[name], steps))
    run_sampler(name, denoiser, torch.randn(1, 1, 2, 2).double(), timesteps)
    assert denoiser.nfe == steps - (name == "heun" and steps % 2 == 0)


def test_heun_leaves_out_the_lowest_sigma_only_where_it_is_far_below_the_one_before():
    alpha_bar = alpha_bar_of("cosine", 1000)
    plans = {n: choose_timesteps(SAMPLERS["heun"], alpha_bar, n, "karras") for n in (5, 11, 19)}
    assert plans[5] == [999, 941, 377, -1]
    for steps in (11, 19):  # as before
        assert plans[steps] == SPACINGS["karras"](alpha_bar, (steps + 1) // 2)
    assert choose_timesteps(SAMPLERS["unipc"], alpha_bar, 3, "karras") == [999, 802, 0, -1]


def test_timesteps_from_sigmas_are_those_of_the_nearest():
    sigmas = [0.1, 0.5, 1.0, 2.0, 40.0, 200.0]
    alpha_bar = [1 / (1 + sigma**2) for sigma in sigmas]
    assert timesteps_from_sigmas(alpha_bar, (80,)) == [5, -1]  # noise alone, where sigma is above
    assert timesteps_from_sigmas([*alpha_bar[:-1], 0.0], (80, 2, 0.4)) == [5, 3, 1, -1]
    with pytest.raises(UserError, match="two of the noise_levels have timestep 2"):
        timesteps_from_sigmas(alpha_bar, (80, 1.1, 0.9))
    for levels in ((0.5, 0.8), (80, 0.8, 0.8), (80, 0), (80, -1), (80, math.nan), (79, 0.8)):
        with pytest.raises(UserError, match="must decrease from 80"):
            check_noise_levels(levels, consistency, None)


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_measured_noise_levels_have_timesteps_of_their_own(schedule):
    for steps, levels in CONSISTENCY_LEVELS.items():
        assert len(levels) == steps <= MAX_CONSISTENCY_STEPS and levels[0] == SIGMA_MAX
        for timesteps in (40, 1000):
            alpha_bar = alpha_bar_of(schedule, timesteps)
            assert len(timesteps_from_sigmas(alpha_bar, levels)) == steps + 1


def make_process(timesteps: int = 1000) -> GaussianDiffusion:
    unet = Unet(8, dim_mults=(1,))
    return GaussianDiffusion(unet, image_size=8, timesteps=timesteps, objective="pred_v")


def test_sampler_goes_back_to_lower_noise_levels():
    class Exact:
        """Knows where each point of a flow ends: at 0.5."""

        def __init__(self):
            self.alpha_bar = make_process().alphas_cumprod.tolist()
            self.seen: list[tuple[int, Tensor]] = []

        def __call__(self, x: Tensor, t: int) -> Tensor:
            self.seen.append((t, x))
            return torch.full_like(x, 0.5)

    denoiser = Exact()
    timesteps = choose_timesteps(consistency, denoiser.alpha_bar, 3, "logsnr")
    torch.manual_seed(0)
    outputs = list(consistency(denoiser, torch.randn(1, 1, 64, 64), timesteps, torch.randn_like))
    assert len(outputs) == 3 and torch.equal(outputs[-1][0], torch.full((1, 1, 64, 64), 0.5))
    assert [t for t, _ in denoiser.seen] == timesteps[:-1] and timesteps[-2] > 0
    for t, x in denoiser.seen[1:]:
        a = alpha_bar_at(denoiser, t)
        assert x.mean().item() == pytest.approx(0.5 * math.sqrt(a), abs=0.05)
        assert x.std().item() == pytest.approx(math.sqrt(1 - a), rel=0.05)


def test_ddim_encode_finds_the_noise_at_order_1():
    torch.manual_seed(0)
    noise = torch.randn(1, 1, 8, 8)
    errors = []
    for steps in (250, 500, 1000):
        timesteps = uniform(Gaussian.alpha_bar, steps)
        image = run_sampler("ddim", Gaussian(), noise, timesteps)[-1]
        code = samplers.ddim_encode(Gaussian(), image, timesteps)
        errors.append((code - noise).abs().max().item())
    assert errors[2] < 0.05
    assert [a / b for a, b in pairwise(errors)] == pytest.approx([2, 2], rel=0.3)


def test_slerp_keeps_the_norm_and_the_ends():
    a, b = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    between = samplers.slerp(a, b, torch.linspace(0, 1, 5))
    torch.testing.assert_close(between[0], a)
    torch.testing.assert_close(between[-1], b)
    assert between[2].norm() == pytest.approx((a.norm() + b.norm()).item() / 2, rel=0.02)
    torch.testing.assert_close(samplers.slerp(a, a, torch.tensor([0.5]))[0], a)


@cache
def denoiser_of(schedule: str, timesteps: int) -> ModelDenoiser:
    return small(timesteps, beta_schedule=schedule).denoiser()


def alpha_bar_of(schedule: str, timesteps: int, last: float | None = None) -> list[float]:
    """alpha_bar of a schedule, with another last value if given."""
    alpha_bar = denoiser_of(schedule, timesteps).alpha_bar
    return alpha_bar if last is None else [*alpha_bar[:-1], last]


@pytest.mark.parametrize("last", [None, 0.0])
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacings_decrease_from_the_last_timestep_to_the_clean_image(spacing, schedule, last):
    alpha_bar = alpha_bar_of(schedule, 200, last)
    for steps in range(1, 201):
        timesteps = SPACINGS[spacing](alpha_bar, steps)
        assert all(type(t) is int for t in timesteps) and len(timesteps) == steps + 1
        assert timesteps[0] == 199 and timesteps[-1] == -1
        assert all(t > s for t, s in pairwise(timesteps)), timesteps
    assert timesteps == list(range(199, -2, -1))


@pytest.mark.parametrize(
    ("spacing", "transform"), [("logsnr", math.log), ("karras", lambda sigma: sigma ** (1 / 7))]
)
def test_spacings_are_even_in_their_variable(spacing, transform):
    alpha_bar = alpha_bar_of("linear", 100_000)
    timesteps = SPACINGS[spacing](alpha_bar, 12)[:-1]
    assert timesteps[-1] == 0
    values = [transform(80.0)] + [transform(sigma_of(alpha_bar[t])) for t in timesteps[1:]]
    np.testing.assert_allclose(np.diff(values), (values[-1] - values[0]) / 11, rtol=0.02)


def test_uniform_and_trailing_spacings_have_the_published_timesteps():
    assert SPACINGS["uniform"]([0.5] * 1000, 6) == [999, 832, 665, 499, 332, 165, -1]
    assert SPACINGS["trailing"]([0.5] * 1000, 6) == [999, 832, 666, 499, 332, 166, -1]


def test_samplers_module_finds_former_names_with_a_warning():
    with pytest.warns(RenamedWarning, match="level is now alpha_bar_at"):
        from engine.samplers import level
    with pytest.warns(RenamedWarning, match="advance is now ddim_step"):
        from engine.samplers import advance
    assert level is samplers.alpha_bar_at and advance is samplers.ddim_step
    with pytest.raises(ImportError, match="nothing"):
        from engine.samplers import nothing  # noqa: F401
