"""The samplers, against the diffusers library's and against a distribution whose exact answer is known."""

import math
import warnings
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from ddpm_model import BETA_SCHEDULES, OBJECTIVES, DDPMModel
from engine.errors import UserError
from engine.samplers import SAMPLERS, SPACINGS, intervals, noise_level, uniform

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")

PREDICTION = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
SCHEDULERS = {
    "dpmpp_2m": partial(DPMSolverMultistepScheduler, solver_order=2),
    "unipc": partial(UniPCMultistepScheduler, solver_order=2),
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
}


def small(**changes) -> DDPMModel:
    torch.manual_seed(0)
    sizes = {"image_size": 8, "dim": 8, "dim_mults": (1, 2), "timesteps": 200, "sampling_timesteps": 20}
    return DDPMModel(**(sizes | changes)).eval()


def draw(name: str, denoiser, x: torch.Tensor, timesteps: list[int]) -> torch.Tensor:
    """The sample, with fresh noise of its own seed where the sampler takes any."""
    torch.manual_seed(1)
    with torch.no_grad():
        *_, (sample, _) = SAMPLERS[name](denoiser, x, timesteps, torch.randn_like)
    return sample


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps", [2, 10])
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_samplers_agree_with_diffusers(name, objective, schedule, steps, clip):
    model, noise = small(objective=objective, beta_schedule=schedule), torch.randn(2, 3, 8, 8)
    clipping = {"clip_sample": clip} if name in ("ddim", "ddpm") else {"thresholding": clip, "sample_max_value": 1.0}
    theirs = SCHEDULERS[name](
        num_train_timesteps=200,
        trained_betas=model.diffusion.betas.numpy(),
        prediction_type=PREDICTION[objective],
        timestep_spacing="trailing",
        **clipping,
    )
    theirs.set_timesteps(steps)
    timesteps = SPACINGS["trailing"](model.denoiser().alpha_bar, steps)
    assert timesteps == [*theirs.timesteps.tolist(), -1]
    torch.manual_seed(1)
    x, options = noise, {"use_clipped_model_output": True} if name == "ddim" else {}
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(model.unet(x, t.expand(2)), t, x, **options).prev_sample
    # an x_0 that is not clipped can be large: noise over sqrt(alpha_bar)
    off = (draw(name, model.denoiser(clip), noise, timesteps) - x).abs().max() / x.abs().max().clamp(min=1)
    assert off < 1e-4


class Mixture:
    """The exact denoiser of images whose every pixel is, alike often, N(-0.3, 0.3^2) or N(0.4, 0.2^2)."""

    means, variances = torch.tensor([[-0.3], [0.4]]).double(), torch.tensor([[0.09], [0.04]]).double()

    def __init__(self, alpha_bar: list[float]):
        self.alpha_bar, self.evaluations = alpha_bar, 0

    def __call__(self, x: torch.Tensor, t: int) -> torch.Tensor:
        self.evaluations += 1
        a = self.alpha_bar[t]
        variance = a * self.variances + 1 - a
        off = x.flatten() - math.sqrt(a) * self.means
        share = torch.softmax(-(off**2) / variance / 2 - variance.log() / 2, dim=0)
        return (share * (self.means + math.sqrt(a) * self.variances / variance * off)).sum(0).view_as(x)

    def below(self, x: torch.Tensor, a: float) -> torch.Tensor:
        """The probability that a pixel of x_t is below x, where alpha_bar is a."""
        off = x.flatten() - math.sqrt(a) * self.means
        return torch.special.ndtr(off / (a * self.variances + 1 - a).sqrt()).mean(0).view_as(x)

    def flow(self, x: torch.Tensor) -> torch.Tensor:
        """Where the probability flow takes x_T: in one dimension it keeps the order, so to the same quantile."""
        low, high = torch.full_like(x, -3), torch.full_like(x, 3)
        for _ in range(60):
            middle = (low + high) / 2
            is_low = self.below(middle, 1.0) < self.below(x, self.alpha_bar[-1])
            low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
        return middle


# 65536 timesteps, so that powers of 2 divide them, even in log-SNR up to sigma 6, where steps in sigma are still short
SMOOTH = (1 / (1 + np.geomspace(1e-5, 6, 65536) ** 2)).tolist()


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpmpp_2m", 2), ("heun", 2), ("unipc", 3)])
def test_samplers_converge_to_the_exact_image_at_their_order(name, order):
    denoiser = Mixture(SMOOTH)
    x = torch.linspace(-2.5, 2.5, 64, dtype=torch.float64).view(1, 1, 8, 8)
    steps, exact = [64, 128, 256, 512], denoiser.flow(x)
    errors = [(draw(name, denoiser, x, uniform(SMOOTH, n)) - exact).square().mean().sqrt().item() for n in steps]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders == pytest.approx([order] * 3, abs=0.06), f"errors {errors}, orders {orders}"
    assert errors[-1] < {1: 5e-3, 2: 5e-5, 3: 1e-6}[order]


def alpha_bar_of(schedule: str, timesteps: int, last: float | None = None) -> list[float]:
    alpha_bar = small(beta_schedule=schedule, timesteps=timesteps).denoiser().alpha_bar
    return alpha_bar if last is None else [*alpha_bar[:-1], last]


@pytest.mark.parametrize("last", [None, 0.0])
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacings_fall_from_the_last_timestep_to_the_clean_image(spacing, schedule, last):
    alpha_bar = alpha_bar_of(schedule, 200, last)
    for steps in range(1, 201):
        timesteps = SPACINGS[spacing](alpha_bar, steps)
        assert all(type(t) is int for t in timesteps) and len(timesteps) == steps + 1
        assert timesteps[0] == 199 and timesteps[-1] == -1
        assert all(t > s for t, s in pairwise(timesteps)), timesteps
    assert timesteps == list(range(199, -2, -1))


@pytest.mark.parametrize(("spacing", "measure"), [("logsnr", math.log), ("karras", lambda sigma: sigma ** (1 / 7))])
def test_spacings_are_even_in_what_they_say(spacing, measure):
    alpha_bar = alpha_bar_of("linear", 100_000)
    timesteps = SPACINGS[spacing](alpha_bar, 12)[:-1]
    assert timesteps[-1] == 0
    at = [measure(80.0)] + [measure(noise_level(alpha_bar[t])) for t in timesteps[1:]]
    np.testing.assert_allclose(np.diff(at), (at[-1] - at[0]) / 11, rtol=0.02)


def test_uniform_and_trailing_are_what_they_were_and_what_the_paper_has():
    assert SPACINGS["uniform"]([0.5] * 1000, 6) == [999, 832, 665, 499, 332, 165, -1]
    assert SPACINGS["trailing"]([0.5] * 1000, 6) == [999, 832, 666, 499, 332, 166, -1]


@pytest.mark.parametrize("steps", [1, 2, 9, 10])
@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_are_network_evaluations(name, steps):
    denoiser = Mixture(SMOOTH)
    timesteps = uniform(SMOOTH, intervals(SAMPLERS[name], steps))
    draw(name, denoiser, torch.randn(1, 1, 2, 2).double(), timesteps)
    assert denoiser.evaluations == steps - (name == "heun" and steps % 2 == 0)


@pytest.mark.parametrize("sampler", ["heun", SAMPLERS["heun"]])
def test_the_model_counts_evaluations_and_takes_a_spacing(sampler):
    model, calls = small(), []
    model.unet.register_forward_hook(lambda *_: calls.append(1))
    even, karras = (model.sample(1, sampler=sampler, steps=9, seed=0, spacing=name) for name in ("uniform", "karras"))
    assert len(calls) == 18 and not torch.equal(even, karras)
    with pytest.raises(UserError, match="no spacing even; there are uniform, trailing, logsnr, karras"):
        model.sample(1, spacing="even")


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_snr_is_the_limit(name, spacing):
    x = torch.linspace(-2, 2, 64, dtype=torch.float64).view(1, 1, 8, 8)

    def sample(last: float) -> torch.Tensor:
        denoiser = Mixture(alpha_bar_of("cosine", 200, last))
        return draw(name, denoiser, x, SPACINGS[spacing](denoiser.alpha_bar, intervals(SAMPLERS[name], 19)))

    # multistep weights go as the ratio of steps in log-SNR: their limit is approached as 1 / log(alpha_bar)
    limit, errors = sample(0.0), [(sample(last) - sample(0.0)).abs().max() for last in (1e-12, 1e-75, 1e-150, 1e-300)]
    assert limit.isfinite().all() and errors[-1] < 1e-5
    if name in ("dpmpp_2m", "unipc"):
        assert errors[-1] < 0.6 * errors[-2] < 0.36 * errors[-3]
    else:
        assert errors[0] < 1e-5


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_zero_terminal_snr_of_a_model(schedule, objective):
    model = small(objective=objective, beta_schedule=schedule)
    model.diffusion.alphas_cumprod[-1] = 0
    x = torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        for clip in (False, True):
            assert model.denoiser(clip)(x, 199).isfinite().all()
        for name in SAMPLERS:
            for spacing in SPACINGS:
                for options in [{}, {"eta": 1.0}] if name == "ddim" else [{}]:
                    assert model.sample(2, sampler=name, steps=5, spacing=spacing, seed=0, **options).isfinite().all()
        at_zero = model.denoiser(clip=False)(x, 199)
        if objective == "pred_noise":
            torch.testing.assert_close(at_zero, model.denoiser(clip=False)(x, 198))
        else:
            model.diffusion.alphas_cumprod[-1] = 1e-12
            torch.testing.assert_close(at_zero, model.denoiser(clip=False)(x, 199), atol=1e-5, rtol=0)
