"""The wiring of the model and inference.py: which weights, noise level, half and seed."""

import json
import math
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import inference
from config import Tier, resolve
from ddpm_model import DDPMModel
from engine import checkpoints, plots
from engine.command_line import run
from engine.samplers import SAMPLERS, noise_level

SMALL = {"image_size": 8, "dim": 8, "dim_mults": (1, 2), "timesteps": 40, "sampling_timesteps": 5}
HALF = SMALL["image_size"] // 2


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More than one only wait for each other where networks are this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(seed: int = 0, **changes) -> DDPMModel:
    torch.manual_seed(seed)
    return DDPMModel(**(SMALL | changes)).eval()


def guided(**changes) -> DDPMModel:
    """A model with a guide of other weights."""
    model = small(**changes)
    model.keep_guide()
    for p in model.unet.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


class Exact(nn.Module):
    """Predicts x_0 as is right for images whose every pixel is N(mean, deviation^2), in [-1, 1].

    `asked` has the timestep and x of every call.
    """

    self_condition = False

    def __init__(self, alpha_bar: list[float], mean: float, deviation: float):
        super().__init__()
        self.alpha_bar, self.mean, self.variance = alpha_bar, mean, deviation**2
        self.asked: list[tuple[int, Tensor]] = []

    def forward(self, x: Tensor, times: Tensor, previous: Tensor | None = None) -> Tensor:
        t = int(times[0])
        self.asked.append((t, x))
        a = self.alpha_bar[t]
        gain = math.sqrt(a) * self.variance / (a * self.variance + 1 - a)
        return self.mean + gain * (x - math.sqrt(a) * self.mean)


def exact(mean: float, deviation: float = 0.0, **changes) -> DDPMModel:
    model = small(objective="pred_x0", **changes)
    model.diffusion.model = Exact(model.denoiser().alpha_bar, mean, deviation)
    return model


# --- which weights


@pytest.mark.parametrize("with_guide", [False, True])
def test_load_model_takes_the_averaged_weights_of_a_run(tmp_path, with_guide):
    raw, average = small(seed=1), guided() if with_guide else small()
    state = {
        "architecture": raw.architecture,
        "model": raw.state_dict(),
        "ema": average.state_dict(),
    }
    checkpoints.save(tmp_path / "final.pt", state | {"config": {"DIM": 8}, "progress": {"step": 3}})
    loaded = small(seed=2).load_model(tmp_path / "final.pt").eval()
    assert loaded.state_dict().keys() == average.state_dict().keys()
    for name, value in average.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded.sample(1, seed=0), average.sample(1, seed=0))
    assert loaded.provenance == {"config": {"DIM": 8}, "progress": {"step": 3}}


def test_load_model_forgets_the_provenance_of_the_file_before(tmp_path):
    model = small()
    model.provenance = {"config": {"DIM": 8}, "progress": {"step": 3}}
    small(seed=1).save_model(tmp_path / "other.safetensors")
    assert model.load_model(tmp_path / "other.safetensors").provenance == {
        "config": {},
        "progress": {},
    }


def test_from_config_gives_each_setting_to_what_it_is_for():
    flags = {"IMAGE_SIZE": 16, "DIM": 8, "DIM_MULTS": (1, 2, 3), "TIMESTEPS": 30, "DROPOUT": 0.3}
    flags |= {"SAMPLING_TIMESTEPS": 7, "OBJECTIVE": "pred_x0", "BETA_SCHEDULE": "sigmoid"}
    flags |= {"LOSS_WEIGHTING": "min_snr", "MIN_SNR_GAMMA": 4.0, "SCHEDULE_SIZE": 32}
    flags |= {"GUIDANCE": 1.7, "ATTENTION_HEADS": (1, 2, 3), "ATTENTION_DIM": (8, 16, 24)}
    flags |= {"FULL_ATTENTION_SIZE": 8, "GRADIENT_CHECKPOINTING": True, "SEED": 5}
    config = resolve("folder", Tier("CPU", 32, 0.0), flags=flags)
    model = DDPMModel.from_config(config)
    assert model.architecture == {
        "image_size": 16, "dim": 8, "dim_mults": [1, 2, 3], "channels": 3, "timesteps": 30,
        "sampling_timesteps": 7, "objective": "pred_x0", "beta_schedule": "sigmoid",
        "loss_weighting": "min_snr", "min_snr_gamma": 4.0, "schedule_size": 32, "guidance": 1.7,
        "dropout": 0.3, "full_attn": [False, True, True], "attn_heads": [1, 2, 3],
        "attn_dim_head": [8, 16, 24],
    }  # fmt: skip
    assert model.unet.checkpointing
    again = DDPMModel.from_config(config)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


# --- which noise level


@pytest.mark.parametrize(
    ("size", "schedule_size", "times"), [(64, 32, 2), (16, 64, 0.25), (8, 0, 1)]
)
def test_the_guide_is_asked_at_noise_levels_that_grow_with_the_image(size, schedule_size, times):
    model = guided(image_size=size, schedule_size=schedule_size, timesteps=200)
    assert model.guided == pytest.approx((0.2 * times, 5 * times))
    denoiser, plain = model.denoiser(), guided(timesteps=200).denoiser()
    asked = [t for t in range(200) if denoiser.asks_guide(t)]
    assert asked == [t for t in range(200) if plain.asks_guide(t)]  # the same share of the process
    levels = [noise_level(denoiser.alpha_bar[t]) for t in asked]
    assert 0.2 * times <= levels[0] < 0.22 * times and 4.5 * times < levels[-1] <= 5 * times


@pytest.mark.parametrize("chosen", [1, 0])  # random.seed that does and does not self-condition
@pytest.mark.parametrize("objective", ["pred_v", "pred_noise", "pred_x0"])
def test_the_loss_with_self_conditioning_is_the_librarys(objective, chosen):
    model = small(objective=objective, self_condition=True)
    images, noise, t = (
        torch.rand(4, 3, 8, 8),
        torch.randn(4, 3, 8, 8),
        torch.tensor([0, 10, 20, 35]),
    )
    calls = []
    model.unet.register_forward_hook(lambda *_: calls.append(1))
    losses, gradients = [], []
    for loss_of in (model, lambda x, t, noise: model.diffusion.p_losses(x * 2 - 1, t, noise=noise)):
        random.seed(chosen)
        loss = loss_of(images, t, noise)
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, model.unet.init_conv.weight)[0])
    assert len(calls) == 2 * (1 + chosen)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "unipc"])
def test_inpaint_hands_the_network_what_has_the_noise_of_its_timestep(sampler):
    """Of images that are all 0.4: at t both halves have mean sqrt(a_t) 0.4 and variance 1 - a_t."""
    model, image = exact(mean=0.4), torch.full((3, 8, 8), 0.7)
    mask = (torch.arange(8) >= HALF).expand(8, 8)
    painted = model.inpaint(
        image, mask, 64, sampler, steps=8, seed=0, spacing="uniform", resamples=3
    )
    torch.testing.assert_close(painted, image.expand(64, 3, 8, 8))
    timesteps = model.plan(sampler, 8, "uniform")[1][:-1]
    last = timesteps[-1]
    expected = [t for t in timesteps for _ in range(3 if t != last else 1)]
    assert [t for t, _ in model.unet.asked] == expected
    for t, x in model.unet.asked:
        a = model.unet.alpha_bar[t]
        for half in (x[..., :HALF], x[..., HALF:]):
            assert half.mean().item() == pytest.approx(math.sqrt(a) * 0.4, abs=0.06), t
            assert half.std().item() == pytest.approx(math.sqrt(1 - a), rel=0.05), t
    repeats = [x for t, x in model.unet.asked if t == timesteps[0]]
    assert not torch.allclose(repeats[0], repeats[1], atol=0.5)  # with other noise


@pytest.mark.parametrize("strength", [0.02, 0.5, 1.0])
def test_vary_starts_from_the_image_noised_to_its_first_timestep(strength):
    model, image = exact(mean=0.4), torch.full((3, 8, 8), 0.7)
    model.vary(image, strength, 2, "ddim", steps=20, seed=5, spacing="uniform")
    whole = model.plan("ddim", 20, "uniform")[1][:-1]
    below = [t for t in whole if t < strength * 40]
    assert [t for t, _ in model.unet.asked] == (below or whole[-1:])
    noise, _ = model.noise([5, 6])
    for t, x in model.unet.asked:
        a = model.unet.alpha_bar[t]
        torch.testing.assert_close(x, math.sqrt(a) * 0.4 + math.sqrt(1 - a) * noise)


def test_interpolate_goes_without_the_guide_both_ways():
    model = guided(guidance=3.0)
    ends = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    images = model.interpolate(*ends, 4, steps=10)
    model.guide = None
    assert torch.equal(images, model.interpolate(*ends, 4, steps=10))


def test_interpolate_limits_no_prediction():
    """Of images around 3 the network predicts more than 1; the ends are still those given."""
    model = exact(mean=3.0, deviation=1.0, timesteps=400)
    ends = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = model.interpolate(*ends, 3, steps=400)
    torch.testing.assert_close(images[[0, -1]], ends, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("seen", "guides", "led"), [(0.9, 0.2, 1.6), (1.4, 1.5, 1.3), (0.9, 1.5, 0.3)]
)
def test_a_prediction_is_limited_once_it_was_led_away_from_the_guide(seen, guides, led):
    model = exact(mean=seen, guidance=2.0)
    model.guide = exact(mean=guides).unet
    t = next(t for t in range(40) if model.denoiser().asks_guide(t))
    for clip, expected in ((True, min(led, 1.0)), (False, led)):
        x_0 = model.denoiser(clip)(torch.zeros(1, 3, 8, 8), t)
        torch.testing.assert_close(x_0, torch.full((1, 3, 8, 8), expected))
    assert [asked for asked, _ in model.guide.asked] == [t, t]


def test_a_model_in_training_draws_as_in_evaluation_and_trains_on():
    model = small(dropout=0.5)
    expected = model.sample(1, seed=0)
    model.train()
    assert torch.equal(model.sample(1, seed=0), expected)
    assert model.training and model.unet.training


# --- inference.py


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with a small model that has a guide in checkpoints/, and a picture."""
    monkeypatch.chdir(tmp_path)
    guided().save_model("checkpoints/ddpm_final.pt")
    rows = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(rows).save("a.png")
    return tmp_path


@pytest.fixture
def infer(folder, monkeypatch):
    """Runs inference.py in this process; gives its exit code."""
    # what is replaced by the checkpoint's model would take most of the time
    monkeypatch.setattr(inference, "DDPMModel", small)

    def infer(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["inference.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            run(inference.main)
        return stopped.value.code

    return infer


@pytest.fixture
def figures(monkeypatch) -> list[Tensor]:
    """The tiles of each figure that is laid out."""
    tiles_of, lay_out = [], plots.labelled_grid

    def noted(tiles: Tensor, *arguments, **options) -> Image.Image:
        tiles_of.append(tiles)
        return lay_out(tiles, *arguments, **options)

    monkeypatch.setattr(plots, "labelled_grid", noted)
    return tiles_of


def load() -> DDPMModel:
    return small(seed=2).load_model("checkpoints/ddpm_final.pt").eval()


def only(pattern: str) -> Path:
    (found,) = Path("inference_results").glob(pattern)
    return found


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), int)


def is_drawn(path: Path, image: Tensor) -> bool:
    return np.abs(pixels(path) - plots.to_bytes(image[None])[0].astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {}),
        (["--guidance", "1"], {"guidance": 1}),
        (["--guidance", "4"], {"guidance": 4}),
        (["--steps", "3", "--spacing", "uniform"], {"steps": 3, "spacing": "uniform"}),
        (["--sampler", "ddim", "--eta", "0.8"], {"sampler": "ddim", "eta": 0.8}),
        (["--sampler", "ddpm"], {"sampler": "ddpm", "steps": 40}),
        (["--sampler", "heun", "--eta", "0.8"], {"sampler": "heun"}),
    ],
)
def test_the_command_draws_what_the_model_does(infer, flags, options):
    assert infer("--seeds", "7,3", *flags) == 0
    images = load().sample(2, seed=[7, 3], **options)
    assert is_drawn(only("*/000007.png"), images[0]) and is_drawn(only("*/000003.png"), images[1])


def test_the_guides_weights_that_the_command_is_given_make_a_difference():
    images = [guided().sample(1, seed=7, guidance=weight) for weight in (0, 1, 2, 4)]
    for i, image in enumerate(images):
        for other in images[:i]:
            assert (image - other).abs().max() > 0.02


def test_vary_and_inpaint_take_the_models_own_guidance(infer):
    image = torch.from_numpy(pixels(Path("a.png")).transpose(2, 0, 1)) / 255
    mask = (torch.arange(8) >= HALF).expand(8, 8)
    assert infer("--mode", "vary", "--image", "a.png", "--seeds", "4", "--strength", "0.7") == 0
    assert is_drawn(only("vary-*/variations/000004.png"), load().vary(image, 0.7, 1, seed=4)[0])
    assert infer("--mode", "inpaint", "--image", "a.png", "--seeds", "4", "--resamples", "2") == 0
    expected = load().inpaint(image, mask, seed=4, resamples=2)[0]
    assert is_drawn(only("inpaint-*/inpainted/000004.png"), expected)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [([], 5), (["--sampler", "ddpm"], 40), (["--sampler", "ddpm", "--steps", "3"], 3)],
)
def test_ddpm_goes_through_all_timesteps_unless_told(infer, capsys, flags, steps):
    assert infer("--num_samples", "1", *flags) == 0
    assert json.loads(only("samples-*/summary.json").read_text())["steps"] == steps
    model, sampler = load(), "ddpm" if flags else None
    evaluations = model.evaluations(*model.plan(sampler, steps))
    assert f"{steps} steps, {evaluations} network evaluations" in capsys.readouterr().out


def test_inpaint_hides_the_right_half_unless_told(infer, figures):
    assert infer("--mode", "inpaint", "--image", "a.png", "--seeds", "0", "--resamples", "1") == 0
    given, painted = pixels(Path("a.png")), pixels(only("inpaint-*/inpainted/000000.png"))
    assert np.array_equal(painted[:, :HALF], given[:, :HALF])
    assert np.abs(painted[:, HALF:] - given[:, HALF:]).mean() > 10
    original, hidden, _ = figures[0]
    assert np.array_equal(plots.to_bytes(original[None])[0], given)
    assert (
        torch.equal(hidden[..., :HALF], original[..., :HALF]) and (hidden[..., HALF:] == 0.5).all()
    )


def test_inpaint_paints_where_the_mask_is_white(infer):
    mask = np.zeros((8, 8), np.uint8)
    mask[:HALF] = 255
    Image.fromarray(mask).save("mask.png")
    flags = ["--mode", "inpaint", "--image", "a.png", "--mask", "mask.png", "--resamples", "1"]
    assert infer(*flags, "--seeds", "0") == 0
    given, painted = pixels(Path("a.png")), pixels(only("inpaint-*/inpainted/000000.png"))
    assert np.array_equal(painted[HALF:], given[HALF:])
    assert np.abs(painted[:HALF] - given[:HALF]).mean() > 10


def test_pictures_that_are_not_named_are_those_of_the_first_and_last_seed(infer, monkeypatch):
    given = []

    def interpolate(model: DDPMModel, first: Tensor, second: Tensor, *_) -> Tensor:
        given.extend([first, second])
        return torch.stack([first, second])

    def vary(model: DDPMModel, image: Tensor, *_, batch_size: int, **options) -> Tensor:
        given.append(image)
        return image.expand(batch_size, *image.shape)

    monkeypatch.setattr(DDPMModel, "interpolate", interpolate)
    monkeypatch.setattr(DDPMModel, "vary", vary)
    for mode in ("interpolate", "vary"):
        assert infer("--mode", mode, "--seeds", "3-5", "--num_steps", "2") == 0
    torch.testing.assert_close(torch.stack(given), load().sample(3, seed=[3, 5, 3]))


@pytest.mark.parametrize("lost", [0, 3, 5])
def test_a_batch_that_lacks_an_image_is_completed(infer, monkeypatch, lost):
    monkeypatch.setattr(inference, "CHUNK", 4)
    flags = ["--mode", "batch", "--num_samples", "6", "--steps", "2"]
    assert infer(*flags) == 0
    images = sorted(only("batch-*").glob("images/*.png"))
    before = [image.read_bytes() for image in images]
    images[lost].unlink()
    assert infer(*flags) == 0
    assert [image.read_bytes() for image in images] == before


def test_a_batch_whose_images_are_not_there_is_not_called_complete(infer, monkeypatch, capsys):
    monkeypatch.setattr(inference, "CHUNK", 2)
    save = inference.Job.save_singles
    monkeypatch.setattr(
        inference.Job,
        "save_singles",
        lambda job, images, seeds, *a: save(job, images[:1], seeds[:1], *a),
    )
    assert infer("--mode", "batch", "--num_samples", "4", "--steps", "2") == 1
    assert "lacks the images from seed 0 on" in capsys.readouterr().err
    assert not (only("batch-*") / "summary.json").exists()


def test_a_picture_is_drawn_again_by_its_own_model_or_not_at_all(infer, capsys):
    assert infer("--seeds", "0", "--steps", "3") == 0
    picture = shutil.copy(only("samples-*/000000.png"), "picture.png")
    os.makedirs("checkpoints/older")
    own = shutil.copy("checkpoints/ddpm_final.pt", "own.pt")
    small(seed=1).save_model("checkpoints/ddpm_final.pt")
    capsys.readouterr()
    assert infer("--from_png", picture) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "was drawn by checkpoints/ddpm_final.pt" in error
    os.replace(own, "checkpoints/older/last.pt")
    assert infer("--from_png", picture, "--output_dir", "again") == 0
    assert np.array_equal(pixels(next(Path("again").rglob("000000.png"))), pixels(Path(picture)))


def test_another_model_under_the_same_name_draws_into_another_folder(infer):
    flags = ["--seeds", "0", "--steps", "3"]
    assert infer(*flags) == 0
    first = only("samples-*")
    before = (first / "000000.png").read_bytes()
    small(seed=1).save_model("checkpoints/ddpm_final.pt")
    assert infer(*flags) == 0
    assert (first / "000000.png").read_bytes() == before
    assert first.with_name(f"{first.name}_2").is_dir()


def test_compare_draws_every_sampler_with_the_given_guidance(infer, monkeypatch):
    monkeypatch.setattr(inference, "COMPARED_STEPS", (2, 3))
    drawn, sample = [], DDPMModel.sample
    monkeypatch.setattr(
        DDPMModel, "sample", lambda model, *a, **k: drawn.append(k) or sample(model, *a, **k)
    )
    assert (
        infer("--mode", "compare", "--seeds", "5-6", "--guidance", "3", "--spacing", "uniform") == 0
    )
    same = {"seed": [5, 6], "guidance": 3.0, "spacing": "uniform"}
    expected = [same | {"sampler": name, "steps": steps} for name in SAMPLERS for steps in (2, 3)]
    assert drawn[1:] == expected  # after one to warm up


def test_progressive_shows_the_way_to_the_image_of_each_seed(infer, figures):
    assert infer("--mode", "progressive", "--seeds", "3,7", "--steps", "4") == 0
    way = load().sample(2, return_all_timesteps=True, seed=[3, 7], steps=4)
    tiles = figures[0].view(2, 2, 5, 3, 8, 8)  # by seed, row and moment
    torch.testing.assert_close(tiles[:, 0], way)
    torch.testing.assert_close(tiles[:, 1, -1], way[:, -1])
    assert (tiles[:, 0, 0] - tiles[:, 1, 0]).abs().mean() > 0.05  # x_T, and the x_0 seen in it


def test_the_guide_is_compiled_too(infer, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda network: compiled.append(network))
    assert infer("--num_samples", "1", "--compile_model") == 0
    assert len(compiled) == 2 and compiled[0] is not compiled[1]
