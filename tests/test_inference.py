"""inference.py: every mode, images reproduced from their PNG, resumed batches, bad input."""

import json
import os
import runpy
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from PIL import Image
from torch import Tensor, nn
from torchvision.utils import make_grid

import inference
from ddpm_model import DDPMModel
from engine import checkpoints, inference_jobs, inference_modes, plots
from engine.errors import FallbackWarning, UserError
from engine.image_source import ReadOptions
from engine.inference_jobs import InferenceJob
from engine.labels import labels_in_proportion
from engine.samplers import SAMPLERS
from engine.shapes import SHAPE_KINDS
from tests.helpers import ROOT, exit_code

NARROW = {"dim": 8, "attn_heads": 1, "attn_dim_head": 16}
SMALL = NARROW | {"image_size": 8, "dim_mults": (1,), "timesteps": 40, "sampling_timesteps": 5}
HALF = SMALL["image_size"] // 2
CUSTOM_SAMPLER = """
from engine.samplers import alpha_bar_at

def plain(denoiser, x, timesteps, randn):
    for t, s in zip(timesteps, timesteps[1:]):
        a_t, a_s = alpha_bar_at(denoiser, t), alpha_bar_at(denoiser, s)
        x_0 = denoiser(x, t)
        noise = (x - a_t**0.5 * x_0) / (1 - a_t) ** 0.5
        x = a_s**0.5 * x_0 + (1 - a_s) ** 0.5 * noise
        yield x, x_0
"""


def small_model(seed: int = 0) -> DDPMModel:
    torch.manual_seed(seed)
    return DDPMModel(**SMALL).eval()


def guided_model() -> DDPMModel:
    """A model with a guide of other weights."""
    model = small_model()
    model.snapshot_guide()
    for p in model.unet.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def load_model() -> DDPMModel:
    return small_model(seed=2).load_model("checkpoints/ddpm_final.pt").eval()


@pytest.fixture
def infer(monkeypatch):
    """Runs an inference script in this process; returns its exit code."""

    def infer(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["inference.py", *arguments])
        return exit_code(inference.main)

    return infer


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with a small model in checkpoints/."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"image_size": 16, "dim_mults": (1, 2), "timesteps": 60, "sampling_timesteps": 6}
    DDPMModel(**NARROW, **sizes).save_model("checkpoints/ddpm_final.pt")
    return tmp_path


@pytest.fixture
def guided(tmp_path, monkeypatch) -> Path:
    """A working folder with a smaller model that has a guide, and an image a.png."""
    monkeypatch.chdir(tmp_path)
    guided_model().save_model("checkpoints/ddpm_final.pt")
    rows = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(rows).save("a.png")
    return tmp_path


@pytest.fixture
def grids(monkeypatch) -> list[Tensor]:
    """The images of each labeled grid or table that is made."""
    made = []

    def record(function: Callable, images: Tensor, *args, **kwargs) -> Image.Image:
        made.append(images)
        return function(images, *args, **kwargs)

    for name in ("captioned_grid", "table"):
        monkeypatch.setattr(plots, name, partial(record, getattr(plots, name)))
    return made


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), int)


def only(pattern: str, folder: str | Path = "inference_results") -> Path:
    (path,) = Path(folder).glob(pattern)
    return path


def is_image(path: Path, image: Tensor) -> bool:
    """Whether a file shows an image, up to rounding."""
    return np.abs(pixels(path) - plots.to_bytes(image).astype(int)).max() <= 1


# --- modes


@pytest.mark.parametrize("sampler", ["ddim", "mine.py:plain"])
def test_modes_work_with_built_in_and_custom_samplers(folder, infer, monkeypatch, sampler):
    (folder / "mine.py").write_text(CUSTOM_SAMPLER)
    monkeypatch.setattr(inference_modes, "COMPARED_STEPS", (2, 3))
    flags = ["--mode", "all", "--sampler", sampler, "--num_samples", "3", "--resamples", "2"]
    assert infer(*flags) == 0
    expected = {
        "samples": {"grid.png", "contact_sheet.png", "000000.png", "000001.png", "000002.png"},
        "interpolate": {"interpolation.png", "interpolation.gif"},
        "progressive": {"progressive.png", "progressive.gif"},
        "batch": {"images", "settings.json"},
        "compare": {"compare.png"},
        "vary": {"variations.png", "variations"},
        "inpaint": {"inpainted.png", "inpainted"},
    }
    for mode, names in expected.items():
        results = only(f"{mode}-*")
        assert {path.name for path in results.iterdir()} == names | {"summary.json"}
        summary = json.loads((results / "summary.json").read_text())
        assert summary["mode"] == mode and summary["sampler"] == sampler
        assert summary["seeds"] == [0, 1, 2]
        assert summary["sha256"] == checkpoints.sha256(folder / "checkpoints/ddpm_final.pt")
        assert summary["seconds"] > 0 and torch.__version__.startswith(summary["versions"]["torch"])
        for path in results.rglob("*.png"):
            assert pixels(path).std() > 1, path
    assert Image.open(only("progressive-*") / "progressive.gif").n_frames == 7


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_modes_of_gray_and_rgba_models_keep_their_channels(
    folder, infer, monkeypatch, channels, mode
):
    sizes = SMALL | {"channels": channels}
    monkeypatch.setattr(inference_modes, "COMPARED_STEPS", (2,))
    DDPMModel(**sizes).save_model("checkpoints/own.pt")
    Image.new("RGB", (20, 9), (200, 100, 0)).save("color.png")
    flags = ["--checkpoint", "checkpoints/own.pt", "--num_samples", "2", "--steps", "2"]
    inputs = ["--image", "color.png", "--image1", "color.png", "--resamples", "1"]
    assert infer(*flags, *inputs, "--mode", "all") == 0
    for name in ("samples-*/000001", "samples-*/contact_sheet", "batch-*/images/000001",
                 "vary-*/variations/000001", "inpaint-*/inpainted/000001"):  # fmt: skip
        assert Image.open(only(f"{name}.png")).mode == mode
    for name in ("samples-*/grid", "interpolate-*/interpolation", "progressive-*/progressive",
                 "compare-*/compare", "vary-*/variations"):  # fmt: skip
        assert Image.open(only(f"{name}.png")).mode == "RGB"
    assert Image.open(only("progressive-*/progressive.gif")).n_frames == 3
    assert infer(*flags, "--mode", "batch", "--format", "npz", "--output_dir", "arrays") == 0
    assert np.load(only("*/images.npz", "arrays"))["images"].shape == (2, 8, 8, channels)
    path = only("samples-*/000001.png")
    assert infer("--from_png", str(path), "--output_dir", "again") == 0
    again = np.asarray(Image.open(only("*/000001.png", "again")), int)
    assert np.abs(again - np.asarray(Image.open(path))).max() <= 1


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
def test_samples_are_those_of_the_model(guided, infer, flags, options):
    assert infer("--seeds", "7,3", *flags) == 0
    images = load_model().sample(2, seed=[7, 3], **options)
    assert is_image(only("*/000007.png"), images[0]) and is_image(only("*/000003.png"), images[1])


def test_guidance_0_is_the_models_own_with_a_warning(guided, infer, capsys):
    assert infer("--seeds", "7", "--guidance", "0") == 0
    assert "warning: --guidance 0 is deprecated" in capsys.readouterr().err
    assert is_image(only("*/000007.png"), load_model().sample(1, seed=7)[0])
    assert json.loads(only("*/summary.json").read_text())["guidance"] is None


@pytest.mark.parametrize("flag", ["--channels_last", "--no-channels_last"])
def test_channels_last_flag_is_ignored_with_a_warning(guided, infer, capsys, flag):
    assert infer("--num_samples", "1", "--steps", "1", flag) == 0
    assert "warning: --channels_last is always on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "steps"),
    [([], 5), (["--sampler", "ddpm"], 40), (["--sampler", "ddpm", "--steps", "3"], 3)],
)
def test_steps_default_to_all_timesteps_for_ddpm_only(guided, infer, capsys, flags, steps):
    assert infer("--num_samples", "1", *flags) == 0
    assert json.loads(only("samples-*/summary.json").read_text())["steps"] == steps
    model, sampler = load_model(), "ddpm" if flags else None
    nfe = model.count_nfe(*model.sampling_plan(sampler, steps))
    assert f"{steps} steps, {nfe} NFE" in capsys.readouterr().out


def test_use_amp_samples_in_mixed_precision(guided, infer, monkeypatch):
    found, sample = [], DDPMModel.sample

    def record(*args, **kwargs) -> Tensor:
        found.append(torch.is_autocast_enabled("cpu"))
        return sample(*args, **kwargs)

    monkeypatch.setattr(DDPMModel, "sample", record)
    for flags in ([], ["--use_amp"]):
        assert infer("--num_samples", "1", "--steps", "1", *flags) == 0
    assert found == [False, True]


def test_image_size_is_that_of_the_librarys_checkpoint(guided, infer, capsys):
    process = GaussianDiffusion(Unet(8, dim_mults=(1, 2)), image_size=12, timesteps=30)
    torch.save({"model": process.state_dict()}, "library.pt")
    flags = ["--num_samples", "1", "--steps", "1"]
    assert infer(*flags, "--checkpoint", "library.pt") == 2
    assert infer(*flags, "--image_size", "12") == 2
    error = capsys.readouterr().err
    assert "not store its image size" in error and "of 8 px. Drop --image_size 12" in error
    assert infer(*flags, "--checkpoint", "library.pt", "--image_size", "12") == 0
    assert Image.open(only("*/000000.png")).size == (12, 12)


def test_compile_model_compiles_the_guide_too(guided, infer, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda network: compiled.append(network))
    assert infer("--num_samples", "1", "--compile_model") == 0
    assert len(compiled) == 2 and compiled[0] is not compiled[1]
    monkeypatch.setattr(inference_modes, "COMPARED_STEPS", (2,))
    compare = ["--mode", "compare", "--compare_with", "checkpoints/ddpm_final.pt"]
    assert infer("--num_samples", "1", "--compile_model", *compare) == 0
    assert len(set(compiled)) == 6  # both models, or their times could not be compared


def test_progressive_shows_the_trajectory_of_the_first_seeds(
    guided, infer, grids, monkeypatch, capsys
):
    monkeypatch.setattr(inference_modes, "MAX_FIGURE_SEEDS", 2)
    assert infer("--mode", "progressive", "--seeds", "3,7,9", "--steps", "4") == 0
    assert "progressive.gif, of seeds 3, 7 (" in capsys.readouterr().out
    x_t = load_model().sample(2, return_all_timesteps=True, seed=[3, 7], steps=4)
    tiles = grids[0].view(2, 2, 5, 3, 8, 8)  # by seed, row and timestep
    torch.testing.assert_close(tiles[:, 0], x_t)
    torch.testing.assert_close(tiles[:, 1, -1], x_t[:, -1])
    assert (tiles[:, 0, 0] - tiles[:, 1, 0]).abs().mean() > 0.05  # x_T and the x_0 predicted


def test_gif_of_many_steps_has_few_frames(folder, infer, monkeypatch):
    monkeypatch.setattr(inference_modes, "MAX_FRAMES", 6)
    gifs: list[list] = []
    monkeypatch.setattr(inference_modes.plots, "save_gif", lambda frames, _: gifs.append(frames))
    # Of x_T and a state for each step: all, every second or every third.
    for steps, frames in ((4, 5), (5, 6), (6, 4), (11, 6), (12, 5)):
        assert infer("--mode", "progressive", "--seeds", "0", "--steps", str(steps)) == 0
        assert len(gifs.pop()) == frames


def test_compare_samples_with_every_sampler_and_the_given_guidance(guided, infer, monkeypatch):
    monkeypatch.setattr(inference_modes, "COMPARED_STEPS", (2, 3))
    monkeypatch.setattr(inference_modes, "MAX_FIGURE_SEEDS", 2)
    calls, sample = [], DDPMModel.sample
    monkeypatch.setattr(
        DDPMModel, "sample", lambda model, *a, **k: calls.append(k) or sample(model, *a, **k)
    )
    flags = ["--seeds", "5-7", "--guidance", "3", "--spacing", "uniform"]
    assert infer("--mode", "compare", *flags) == 0
    same = {"seed": [5, 6], "guidance": 3.0, "spacing": "uniform"}
    same |= {"guidance_mode": None, "labels": None}
    expected = [same | {"sampler": name, "steps": steps} for name in SAMPLERS for steps in (2, 3)]
    assert calls[1:] == expected  # after the warm-up


def test_compare_counts_the_nfe_of_the_given_spacing():
    model = guided_model()
    counts = []
    for spacing in ("uniform", "karras"):
        candidate = inference_modes.Candidate(model, Path(), None, ["ddim"], [9], spacing, 3.0)
        ((_, _, nfe, _),) = candidate.sample([0])
        counts.append(nfe)
        assert nfe == model.count_nfe(*model.sampling_plan("ddim", 9, spacing), 3.0)
    assert len(set(counts)) == 2


def test_compare_with_adds_another_model_with_its_own_settings(conditional, infer, grids):
    names = {"cow": 1, "dog": 1, "cat": 1}  # of the same classes in another order
    torch.manual_seed(1)
    other = DDPMModel(**SMALL, class_counts=names).eval()
    other.unet.class_embedding.weight.data.normal_()
    other.save_model("other/final.pt")
    tuned = DDPMModel(**SMALL, class_counts={"cat": 1, "dog": 1, "cow": 1}, consistency=True).eval()
    tuned.save_model("tuned/final.pt")
    flags = ["--mode", "compare", "--checkpoint", "tuned/final.pt", "--classes", "dog"]
    assert infer(*flags, "--num_samples", "4", "--compare_with", "other/final.pt") == 0
    summary = json.loads(only("compare-*/summary.json").read_text())
    names = [f"consistency {steps}" for steps in (1, 2, 4, 8)]
    assert [*summary["seconds_by_sampler"]] == [*names, "other-final unipc 5"]
    for tile, model, options in ((grids[0][1], tuned, {"steps": 2}), (grids[0][-1], other, {})):
        images = model.sample(4, seed=0, labels=model.class_names.index("dog"), **options)
        expected = make_grid(plots.enlarge(images, 80), 2, padding=1, pad_value=1.0)
        torch.testing.assert_close(tile, expected, atol=1e-4, rtol=0)


def test_compare_with_an_unfit_model_is_one_error(guided, infer, capsys):
    DDPMModel(**SMALL | {"image_size": 16}).save_model("large.pt")
    compare = ["--mode", "compare", "--compare_with"]
    for flags, message in (
        ([*compare, "large.pt"], "large.pt is for images of 16 px"),
        ([*compare, "none.pt"], "none.pt: no such checkpoint"),
        ([*compare, ""], "--compare_with is empty"),
        (["--compare_with", "large.pt"], "--compare_with is for --mode compare"),
    ):
        assert infer(*flags) == 2
        assert message in capsys.readouterr().err
        assert not list(Path("inference_results").rglob("*.png"))


def test_interpolate_reproduces_the_given_files(folder, infer, capsys):
    image = np.full((20, 20, 3), 120, np.uint8)
    image[5:15, 5:15] = (140, 110, 120)
    Image.fromarray(image).save("a.png")
    Image.fromarray(image[:, ::-1] + 5).save("b.png")
    flags = ["--image1", "a.png", "--image2", "b.png", "--num_steps", "4"]
    assert infer("--mode", "interpolate", "--steps", "3", *flags) == 0
    assert "interpolation.gif, by 60 steps of ddim; PSNR" in capsys.readouterr().out
    summary = json.loads((only("interpolate-*") / "summary.json").read_text())
    assert min(summary["psnr"]) > 30
    assert summary["decoder"] == {"sampler": "ddim", "steps": 60}
    assert Image.open(only("interpolate-*") / "interpolation.gif").n_frames == 6  # there and back


def test_input_images_default_to_the_first_and_the_last_seed(guided, infer, grids):
    for mode in ("interpolate", "vary"):
        assert infer("--mode", mode, "--seeds", "3-5", "--num_steps", "2") == 0
    given = torch.stack([grids[0][0], grids[0][-1], grids[1][0]])
    torch.testing.assert_close(given, load_model().sample(3, seed=[3, 5, 3]))


def test_training_images_come_from_the_checkpoint_which_is_read_once(
    folder, infer, grids, monkeypatch
):
    (folder / "real").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (40 * i + 60, 128, 128)).save(folder / "real" / f"{i}.png")
    path, read, load = Path("checkpoints/ddpm_final.pt"), [], checkpoints.load
    config = {"DATASET": "folder", "IMAGE_SIZE": 16, "DATA_DIR": "real"}
    checkpoints.save(path, load(path) | {"config": config})
    monkeypatch.setattr(checkpoints, "load", lambda path: read.append(path) or load(path))
    few = ("--num_steps", "2", "--steps", "2")
    assert infer("--mode", "interpolate", "--image1", "data:1", "--image2", "data:3", *few) == 0
    assert [round(255 * image[0].mean().item()) for image in grids[0][[0, -1]]] == [100, 180]
    assert read == [path]
    assert infer("--mode", "vary", "--image", "data:4") == 2


def test_training_image_is_read_as_the_run_reads_it(folder, infer, monkeypatch):
    def load_dataset(*_, options) -> None:
        read.append(options)
        raise UserError("stop")

    read = []
    monkeypatch.setattr(inference_jobs, "load_dataset", load_dataset)
    config = {"DATASET": "folder", "IMAGE_SIZE": 16, "DATA_DIR": "real"}
    config |= {"CHANNELS": 1, "VALUE_RANGE": "0,4095", "FRAMES": "all"}
    path = Path("checkpoints/ddpm_final.pt")
    checkpoints.save(path, checkpoints.load(path) | {"config": config})
    assert infer("--mode", "vary", "--image", "data:1") == 2
    assert read == [ReadOptions(1, "0,4095", "all")]


def test_inpaint_changes_the_image_where_the_mask_is_white(guided, infer, grids):
    mask = np.zeros((8, 8), np.uint8)
    mask[:HALF] = 255
    Image.fromarray(mask).save("mask.png")
    default = mask.T[:, ::-1] == 255  # the right half
    given = pixels(Path("a.png"))
    flags = ["--mode", "inpaint", "--image", "a.png", "--seeds", "0", "--resamples", "1"]
    for more, is_masked in (([], default), (["--mask", "mask.png"], mask == 255)):
        assert infer(*flags, *more, "--output_dir", f"results{len(more)}") == 0
        inpainted = pixels(only("inpaint-*/inpainted/000000.png", f"results{len(more)}"))
        assert np.array_equal(inpainted[~is_masked], given[~is_masked])
        assert np.abs(inpainted - given)[is_masked].mean() > 10
        original, masked, _ = grids[-1]
        assert np.array_equal(plots.to_bytes(original), given)
        assert torch.equal(masked, original.masked_fill(torch.tensor(is_masked), 0.5))


@pytest.mark.parametrize(("mode", "name"), [("vary", "variations"), ("inpaint", "inpainted")])
def test_each_seed_has_an_image_and_the_figure_some(guided, infer, grids, monkeypatch, mode, name):
    monkeypatch.setattr(inference_modes, "MAX_EDITED_TILES", 4)
    assert infer("--mode", mode, "--seeds", "0-4", "--steps", "2", "--resamples", "1") == 0
    assert len(list(Path("inference_results").glob(f"*/{name}/*.png"))) == 5
    seeds = json.loads(plots.read_png_metadata(only(f"*/{name}.png")))["seeds"]
    assert len(grids[0]) == 4 and seeds == ([0, 1, 2] if mode == "vary" else [0, 1])
    for file in (f"{name}.png", f"{name}/000004.png"):
        path = only(f"*/{file}")
        assert infer("--from_png", str(path), "--output_dir", file) == 0
        assert np.abs(pixels(only(f"*/{file}", file)) - pixels(path)).max() <= 1


# --- output folders and PNG metadata


def test_image_is_reproduced_from_its_png(folder, infer):
    assert infer("--seeds", "3-9", "--sampler", "ddim", "--eta", "0.5", "--steps", "7") == 0
    image = shutil.copy(only("samples-*") / "000005.png", folder / "five.png")
    assert infer("--from_png", "five.png", "--output_dir", "again") == 0
    again = only("*/000005.png", "again")
    assert np.abs(pixels(again) - pixels(image)).max() <= 1  # the batch is another one
    grid = only("samples-*") / "grid.png"
    assert infer("--from_png", str(grid), "--output_dir", "grid") == 0
    assert np.array_equal(pixels(only("*/grid.png", "grid")), pixels(grid))
    os.rename("checkpoints/ddpm_final.pt", "checkpoints/renamed.pt")  # found by its content
    assert infer("--from_png", "five.png", "--output_dir", "renamed") == 0
    os.remove("checkpoints/renamed.pt")
    assert infer("--from_png", "five.png") == 2


def test_models_of_the_same_name_are_told_apart_by_their_content(guided, infer, capsys):
    flags = ["--seeds", "0", "--steps", "3"]
    assert infer(*flags) == 0
    first = only("samples-*/000000.png")
    path = shutil.copy(first, "image.png")
    os.makedirs("checkpoints/older")
    original = shutil.copy("checkpoints/ddpm_final.pt", "original.pt")
    small_model(seed=1).save_model("checkpoints/ddpm_final.pt")
    assert infer(*flags) == 0
    assert first.read_bytes() == Path(path).read_bytes()  # not overwritten
    assert first.parent.with_name(f"{first.parent.name}_2").is_dir()
    capsys.readouterr()
    assert infer("--from_png", path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "was made with checkpoints/ddpm_final.pt" in error
    os.replace(original, "checkpoints/older/last.pt")
    assert infer("--from_png", path, "--output_dir", "again") == 0
    assert np.array_equal(pixels(only("*/000000.png", "again")), pixels(Path(path)))


def test_from_png_runs_no_code_that_the_image_names(folder, infer, capsys):
    (folder / "mine.py").write_text(CUSTOM_SAMPLER + 'open("ran", "w")')
    flags = ["--sampler", "mine.py:plain"]
    assert infer("--seeds", "4", *flags) == 0
    path = shutil.copy(only("*/000004.png"), "four.png")
    os.remove("ran")
    assert infer("--from_png", path) == 2
    assert "an image may not choose what is run. If you trust that file, add --sampler mine.py" in (
        capsys.readouterr().err
    )
    assert infer("--from_png", path, "--sampler", "other.py:plain") == 2
    assert not Path("ran").exists()
    assert infer("--from_png", path, *flags, "--output_dir", "again") == 0
    assert np.array_equal(pixels(only("*/000004.png", "again")), pixels(Path(path)))


NAN, INF = float("nan"), float("inf")
ACCEPTED_VALUES = {
    "mode": ("batch", "all"), "seeds": ([0], [10**18 - 1, 3]), "steps": (0, 3), "eta": (0, 0.5, 1),
    "image_size": (0, 1024), "num_steps": (2, 1000), "strength": (0.001, 1), "format": ("npz",),
    "resamples": (1, 100), "tile": (1, 4096), "columns": (1, 1000), "batch_size": (0, 10**6),
    "guidance": (1, 10, None), "guidance_mode": ("cfg", None), "spacing": ("karras", None),
    "classes": ("1", None), "use_amp": (True, False), "image1": ("data:3",),
}  # fmt: skip
REFUSED_VALUES = {
    "mode": ("x", 1, None), "seeds": ([], "3", 3, [-1], [10**18], [True], [0.5], [None], None),
    "steps": (-1, 0.5, True, "3", [], NAN, None), "eta": (-0.1, 1.1, NAN, INF, True, "0", 10**400),
    "image_size": (-1, 1025), "num_steps": (1, 1001, 2.0), "strength": (0, 1.1, NAN, [], None),
    "format": ("gif", [], None), "resamples": (0, 101), "tile": (0, 4097), "columns": (0, 1001),
    "batch_size": (-1,), "guidance": (0.9, 10.1, NAN, "1", [1]), "guidance_mode": ("x", 1),
    "spacing": ("x", []), "classes": (1, [1]), "use_amp": (1, "true", None), "image1": (3, [1]),
    "sha256": ([], {}, "x", None), "checkpoint": ([], 3),
}  # fmt: skip


def test_from_png_accepts_only_values_that_the_command_line_accepts(guided, infer):
    assert infer("--seeds", "3", "--steps", "3") == 0
    stored = json.loads(plots.read_png_metadata(only("samples-*/000003.png")))

    def read(name: str, value: object) -> object:
        path = Path("changed.png")
        plots.save_image(Image.new("L", (1, 1)), path, json.dumps(stored | {name: value}))
        return inference_jobs.settings_from_png(path, inference.InferenceSettings)[name]

    for name, values in ACCEPTED_VALUES.items():
        for value in values:
            assert read(name, value) == value, name
    for name, values in REFUSED_VALUES.items():
        for value in values:
            with pytest.raises(UserError):
                pytest.fail(f"{name} is {read(name, value)!r}")


def previous_version(settings: dict) -> dict:
    """Settings of default guidance as the previous version stored them."""
    inputs = {"image": None, "image1": None, "image2": None, "mask": None}
    return settings | inputs | {"guidance": 0.0, "channels_last": False}


def test_png_of_the_previous_version_is_reproduced(guided, infer):
    assert infer("--seeds", "3", "--steps", "3") == 0
    path = only("samples-*/000003.png")
    settings = previous_version(json.loads(plots.read_png_metadata(path)))
    plots.save_image(Image.open(path), Path("old.png"), json.dumps(settings))
    assert infer("--from_png", "old.png", "--output_dir", "again") == 0
    assert np.array_equal(pixels(only("*/000003.png", "again")), pixels(path))


def test_results_of_other_settings_are_kept(folder, infer, capsys):
    flags = ["--mode", "vary", "--seeds", "4-5", "--batch_size", "1"]
    for more in ([], ["--guidance", "1"], ["--image", "9"], ["--image", "4", "--batch_size", "2"]):
        assert infer(*flags, *more) == 0
    folders = sorted(Path("inference_results").glob("vary-*"))
    suffixes = [path.name.removeprefix(folders[0].name) for path in folders]
    assert suffixes == ["", "_2", "_3"]  # the last is the first
    assert infer(*flags, "--guidance", "3") == 0
    assert "this model has no guide, so --guidance 3 changes nothing" in capsys.readouterr().out


# --- batches


def test_out_of_memory_halves_the_batch_and_keeps_the_images(folder, infer, monkeypatch, capsys):
    sample = DDPMModel.sample

    def limited(model, *args, batch_size, **kwargs):
        if batch_size > 2:
            raise torch.OutOfMemoryError("too many")
        return sample(model, *args, batch_size=batch_size, **kwargs)

    flags = ("--num_samples", "5", "--sampler", "ddpm", "--steps", "5", "--output_dir")
    assert infer(*flags, "at_once") == 0
    model = DDPMModel.from_file("checkpoints/ddpm_final.pt")
    expected = model.sample(5, seed=3, steps=2)
    monkeypatch.setattr(DDPMModel, "sample", limited)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert infer(*flags, "halved") == 0
    assert "continuing with batches of 2" in capsys.readouterr().err
    for path in (folder / "halved").rglob("0000*.png"):
        other = only(f"*/{path.name}", "at_once")
        assert np.abs(pixels(path) - pixels(other)).max() <= 1
    with pytest.warns(FallbackWarning, match="continuing with batches of 2"):
        images = inference.batch_generate(model, 5, 4, 3, steps=2)
    torch.testing.assert_close(images, expected)


@pytest.mark.parametrize("format_", ["png", "npz"])
def test_batch_resumes_after_an_interrupt_with_the_same_files(folder, infer, monkeypatch, format_):
    monkeypatch.setattr(inference_modes, "CHUNK_IMAGES", 4)
    flags = ["--mode", "batch", "--num_samples", "12", "--format", format_]
    assert infer(*flags, "--output_dir", "straight") == 0
    sampled, sample = [], DDPMModel.sample

    def interrupted_once(model, *args, **kwargs):
        if len(sampled) == 2:
            sampled.append("killed")
            raise KeyboardInterrupt
        sampled.append(kwargs["seed"])
        return sample(model, *args, **kwargs)

    monkeypatch.setattr(DDPMModel, "sample", interrupted_once)
    assert infer(*flags, "--output_dir", "killed") == 130
    assert not list((folder / "killed").rglob("images.npz"))
    assert infer(*flags, "--output_dir", "killed") == 0
    assert sampled == [[0, 1, 2, 3], [4, 5, 6, 7], "killed", [8, 9, 10, 11]]
    if format_ == "npz":
        straight, killed = (np.load(only("*/images.npz", name)) for name in ("straight", "killed"))
        assert straight["images"].shape == (12, 16, 16, 3) and straight["images"].dtype == np.uint8
        assert np.array_equal(straight["images"], killed["images"])
        assert np.array_equal(straight["seeds"], np.arange(12))
    else:
        paths = sorted((folder / "straight").rglob("images/*.png"))
        assert len(paths) == 12
        for path in paths:
            other = folder / "killed" / path.relative_to(folder / "straight")
            assert path.read_bytes() == other.read_bytes()


def test_batch_interrupted_while_writing_leaves_complete_images_only(guided, infer, monkeypatch):
    fsync, files = os.fsync, []

    def interrupted_at_the_third(file: int) -> None:
        files.append(file)
        if len(files) == 3:
            raise KeyboardInterrupt
        fsync(file)

    monkeypatch.setattr(os, "fsync", interrupted_at_the_third)
    assert infer("--mode", "batch", "--num_samples", "4", "--steps", "2") == 130
    written = {path.name for path in only("batch-*").rglob("*") if path.is_file()}
    assert written == {"settings.json", "000000.png"}
    Image.open(only("batch-*/images/000000.png")).load()


@pytest.mark.parametrize("lost", [0, 3, 5])
def test_batch_adds_missing_images(guided, infer, monkeypatch, lost):
    monkeypatch.setattr(inference_modes, "CHUNK_IMAGES", 4)
    flags = ["--mode", "batch", "--num_samples", "6", "--steps", "2"]
    assert infer(*flags) == 0
    images = sorted(only("batch-*").glob("images/*.png"))
    before = [image.read_bytes() for image in images]
    images[lost].unlink()
    assert infer(*flags) == 0
    assert [image.read_bytes() for image in images] == before


def test_batch_reports_images_that_are_not_there(guided, infer, monkeypatch, capsys):
    monkeypatch.setattr(inference_modes, "CHUNK_IMAGES", 2)
    save_each = InferenceJob.save_each
    monkeypatch.setattr(
        InferenceJob,
        "save_each",
        lambda job, images, seeds, *a: save_each(job, images[:1], seeds[:1], *a),
    )
    assert infer("--mode", "batch", "--num_samples", "4", "--steps", "2") == 1
    assert "lacks the images from seed 0 on" in capsys.readouterr().err
    assert not (only("batch-*") / "summary.json").exists()


def test_batch_names_a_damaged_part_of_an_npz(guided, infer, capsys):
    flags = ["--mode", "batch", "--num_samples", "2", "--steps", "1", "--format", "npz"]
    assert infer(*flags) == 0
    part = only("batch-*/parts/*.npy")
    for content in (b"", part.read_bytes()[:-30], b"nothing"):
        part.write_bytes(content)
        assert infer(*flags) == 2
        assert f"{part.name} is damaged. Delete it" in capsys.readouterr().err
    part.unlink()
    assert infer(*flags) == 0


def test_batch_refuses_a_folder_of_other_settings(folder, infer, capsys):
    flags = ["--mode", "batch", "--num_samples", "2"]
    assert infer(*flags) == 0
    assert infer(*flags, "--eta", "0.3") == 2
    assert "holds other images" in capsys.readouterr().err
    only("batch-*/settings.json").write_text('{"seeds": [0, 1')
    assert infer(*flags) == 2
    assert "holds other images" in capsys.readouterr().err


def test_batch_resumes_in_a_folder_of_the_previous_version(folder, infer):
    flags = ["--mode", "batch", "--num_samples", "2"]
    assert infer(*flags) == 0
    settings_file = only("batch-*/settings.json")
    settings = previous_version(json.loads(settings_file.read_text()))
    settings_file.write_text(json.dumps(settings, sort_keys=True))
    assert infer(*flags) == 0


def test_full_disk_leaves_no_partial_file(folder, infer, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots.Image.Image, "save", full)
    assert infer("--num_samples", "1") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not [path for path in Path("inference_results").rglob("*") if path.is_file()]


# --- inference_high_res.py


def test_high_res_figures_are_larger(folder, monkeypatch, capsys):
    torch.manual_seed(0)
    sizes = {"image_size": 64, "dim_mults": (1, 2), "timesteps": 8, "sampling_timesteps": 3}
    DDPMModel(**NARROW, **sizes).save_model("checkpoints/large.pt")
    for mode in ("samples", "interpolate"):
        flags = ["--checkpoint", "checkpoints/large.pt", "--mode", mode]
        monkeypatch.setattr("sys.argv", ["inference_high_res.py", *flags])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(ROOT / "inference_high_res.py"), run_name="__main__")
        assert exit_.value.code == 0 and "note" not in capsys.readouterr().out
    assert len(json.loads((only("samples-*") / "summary.json").read_text())["seeds"]) == 9
    assert Image.open(only("samples-*") / "grid.png").width > 3 * 192
    assert Image.open(only("interpolate-*") / "interpolation.png").width < 8 * 200


# --- input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere.pt"], "--checkpoint nowhere.pt: no such checkpoint"),
        (["--checkpoint", "text.pt"], "text.pt "),
        (["--checkpoint", "cut.pt"], "cut.pt is damaged"),
        (["--checkpoint", "other.pt"], "other.pt does not fit DDPMModel"),
        (["--checkpoint", ""], "--checkpoint is empty"),
        (["--steps", "61"], "steps is 61, but must be between 1 and 60 for this"),
        (["--sampler", "euler"], "unknown sampler euler"),
        (["--sampler", "nowhere.py:mine"], "nowhere.py, which does not exist"),
        (["--spacing", "wide"], "spacing is 'wide'"),
        (["--guidance", "-1"], "guidance is -1.0, but must be at least 1"),
        (["--guidance", "11"], "guidance is 11.0, but must be at most 10"),
        (["--seeds", "9-3"], "seeds has the reversed range 9-3. Write 3-9"),
        (["--seeds", "a-3"], "seeds is 'a-3', but must look like"),
        (["--seeds", "9" * 23], "at most 18 digits"),
        (["--seeds", "0-99999999999"], "at most 10,000,000 images"),
        (["--output_dir", "a.png"], "Choose a folder that can be written to"),
        (["--output_dir", "/proc/there"], "Choose a folder that can be written to"),
        (["--mode", "vary", "--image", "text.pt"], "text.pt cannot be read as an image"),
        (["--mode", "vary", "--image", "cut.png"], "cut.png cannot be read as an image"),
        (["--mode", "vary", "--image", "nowhere.png"], "nowhere.png cannot be read as an image"),
        (["--mode", "vary", "--image", "float.tiff"], "float.tiff cannot be read as an image"),
        (["--mode", "inpaint", "--mask", "text.pt"], "text.pt cannot be read as a mask"),
        (
            ["--mode", "inpaint", "--image", "a.png", "--mask", "small.png"],
            "small.png is 9x9, but the image is 20x20",
        ),
        (["--mode", "vary", "--image", "data:3"], "does not name its training images"),
        (["--from_png", "other.png"], "other.png does not contain all settings"),
        (["--from_png", "a.png"], "a.png does not contain all settings"),
        (["--from_png", "a.png", "--steps", "3"], "settings from the image. Drop --steps"),
        (["--from_png", "text.pt"], "text.pt is missing or not an image"),
        (["--checkpoint", "two.pt"], "no image file has 2 channels. Use --mode batch --format npz"),
        (["--from_png", "list.png"], "the settings in list.png are damaged"),
        (["--from_png", "half.png"], "the settings in half.png are damaged"),
        (["--mode", "vary", "--image", "9" * 30], "at most 18 digits"),
        (["--classes", "cat"], "is unconditional: it takes no labels, so --classes cannot be set"),
        (["--guidance_mode", "cfg"], "guidance_mode cfg needs labels"),
        (["--mode", "compare", "--steps", "3"], "--steps has no effect: compare tries"),
        (["--mode", "compare", "--noise_levels", "80,1"], "--noise_levels has no effect: compare"),
        (["--mode", "compare", "--sampler", "heun"], "--sampler has no effect: compare tries"),
    ],
)
def test_bad_input_is_reported_in_one_line(folder, infer, capsys, arguments, message):
    checkpoint = (folder / "checkpoints/ddpm_final.pt").read_bytes()
    (folder / "cut.pt").write_bytes(checkpoint[:-4000])
    (folder / "text.pt").write_text("nothing")
    state = torch.load("checkpoints/ddpm_final.pt", weights_only=True)
    torch.save(state | {"architecture": state["architecture"] | {"dim": 16}}, "other.pt")
    DDPMModel(**SMALL, channels=2).save_model("two.pt")
    Image.new("RGB", (20, 20), "red").save("a.png")
    Image.new("L", (9, 9)).save("small.png")
    Image.fromarray(np.full((9, 9), np.nan, np.float32)).save("float.tiff")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:-30])
    for name, metadata in (("other", "{}"), ("list", "[1]"), ("half", '{"seeds": [')):
        plots.save_image(Image.new("RGB", (9, 9)), Path(f"{name}.png"), metadata)
    assert infer(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and message in error and "Traceback" not in error
    assert not list(Path(".").rglob("*.tmp"))


# --- classes


@pytest.fixture
def conditional(tmp_path, monkeypatch) -> DDPMModel:
    """A small model of three classes in checkpoints/ of the working folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = DDPMModel(**SMALL, class_counts={"cat": 2, "dog": 1, "cow": 1}).eval()
    model.snapshot_guide()
    for network in (model.unet, model.guide):
        network.class_embedding.weight.data.normal_()
    model.save_model("checkpoints/ddpm_final.pt")
    return model


def test_samples_have_a_row_for_each_class(conditional, infer, grids):
    assert infer("--num_samples", "2") == 0
    folder = only("samples-*")
    for label, name in enumerate(conditional.class_names):
        images = conditional.sample(2, seed=0, labels=label)
        for seed in (0, 1):
            path = folder / name / f"{seed:06d}.png"
            assert is_image(path, images[seed])
            assert json.loads(plots.read_png_metadata(path))["classes"] == name
            torch.testing.assert_close(grids[0][2 * label + seed], images[seed])
    # A single image, again.
    path = folder / "dog/000001.png"
    assert infer("--from_png", str(path), "--output_dir", "again") == 0
    np.testing.assert_array_equal(pixels(only("samples-*/dog/000001.png", "again")), pixels(path))
    assert len(list(Path("again").rglob("0*.png"))) == 1


def test_samples_are_few_of_each_class_unless_a_number_is_named(
    conditional, infer, grids, monkeypatch
):
    monkeypatch.setattr(inference, "MAX_DEFAULT_IMAGES", 38)
    for flags, counts, last in (
        ([], {"cat": 12, "dog": 12, "cow": 12}, 11),
        (["--classes", "dog,cow"], {"dog": 16, "cow": 16}, 15),  # as without classes
        (["--num_samples", "13"], {"cat": 13, "dog": 13, "cow": 13}, 12),
        (["--seeds", "0-13"], {"cat": 14, "dog": 14, "cow": 14}, 13),
    ):
        output = f"of-{last}"
        assert infer("--steps", "1", "--output_dir", output, *flags) == 0
        folder = only(f"samples-*-seeds-0-{last}", output)
        found = {path.name: len(list(path.iterdir())) for path in folder.iterdir() if path.is_dir()}
        assert found == counts
        assert len(grids[-1]) == sum(counts.values())  # all that was sampled


def test_samples_of_the_classes_asked_for(conditional, infer):
    assert infer("--num_samples", "3", "--classes", "cow,1", "--guidance_mode", "cfg") == 0
    folder = only("samples-*")
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("0*.png"))
    assert found == [f"{name}/00000{seed}.png" for name in ("cow", "dog") for seed in range(3)]
    image = conditional.sample(1, seed=2, labels=2, guidance_mode="cfg")[0]
    assert is_image(folder / "cow/000002.png", image)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["classes"], summary["guidance_mode"]) == ("cow,1", "cfg")


def test_batch_samples_classes_in_proportion_by_seed(conditional, infer):
    flags = ("--mode", "batch", "--num_samples", "40")
    labels = labels_in_proportion(range(40), conditional.class_counts.values())
    counts = np.bincount(labels).tolist()
    assert counts == [21, 10, 9]
    expected = plots.to_bytes(conditional.sample(40, seed=0, labels=labels))
    assert infer(*flags, "--format", "npz", "--output_dir", "npz") == 0
    with np.load(only("*/images.npz", "npz")) as file:
        assert file["labels"].tolist() == labels.tolist()
        assert np.abs(file["images"].astype(int) - expected).max() <= 1
    for _ in range(2):  # the second time, all are there
        assert infer(*flags, "--output_dir", "png") == 0
    for name, count in zip(conditional.class_names, counts, strict=True):
        assert len(list(Path("png").glob(f"*/images/{name}/*.png"))) == count


def test_modes_take_classes(conditional, infer, grids, monkeypatch):
    monkeypatch.setattr(inference_modes, "COMPARED_STEPS", (2,))
    Image.new("RGB", (8, 8), "red").save("a.png")
    image = torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 8, 8)
    flags = ("--image", "a.png", "--num_samples", "2", "--resamples", "2", "--strength", "0.7")

    assert infer("--mode", "vary", "--classes", "dog", *flags) == 0
    expected = conditional.vary(image, 0.7, 2, seed=0, labels=1)
    torch.testing.assert_close(grids[-1][1:], expected, atol=1e-5, rtol=0)
    assert is_image(only("vary-*/variations/000001.png"), expected[1])
    assert infer("--mode", "vary", "--output_dir", "unlabeled", *flags) == 0
    expected = conditional.vary(image, 0.7, 2, seed=0)
    torch.testing.assert_close(grids[-1][1:], expected, atol=1e-5, rtol=0)

    assert infer("--mode", "inpaint", "--classes", "dog", *flags) == 0
    mask = torch.arange(8).expand(8, 8) >= HALF
    expected = conditional.inpaint(image, mask, 2, seed=0, resamples=2, labels=1)
    torch.testing.assert_close(grids[-1][2:], expected, atol=1e-5, rtol=0)

    assert infer("--mode", "interpolate", "--classes", "dog,cow", "--num_samples", "2") == 0
    ends = [conditional.sample(1, seed=i, labels=label)[0] for i, label in ((0, 1), (1, 2))]
    torch.testing.assert_close(grids[-1][0], ends[0], atol=1e-5, rtol=0)
    expected = conditional.interpolate(*ends, 10, steps=40, labels=(1, 2))
    torch.testing.assert_close(grids[-1][1:-1], expected, atol=1e-4, rtol=0)

    assert infer("--mode", "progressive", "--classes", "cow", "--num_samples", "1") == 0
    columns = len(grids[-1]) // 2
    expected = conditional.sample(1, seed=0, labels=2)[0]
    torch.testing.assert_close(grids[-1][columns - 1], expected, atol=1e-5, rtol=0)
    assert infer("--mode", "compare", "--classes", "cow", "--num_samples", "1") == 0
    summary = json.loads(only("compare-*/summary.json").read_text())
    assert summary["spacing"] is None  # each sampler has its own


def test_batch_generate_takes_labels(conditional):
    images = inference.batch_generate(conditional, 5, 2, labels=[0, 1, 2, 1, 0])
    expected = conditional.sample(5, seed=0, labels=[0, 1, 2, 1, 0])
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_ranks_sample_their_images_with_their_labels(conditional, monkeypatch):
    labels = [0, 1, 2, 1, 0]
    expected = conditional.sample(5, seed=0, labels=labels)
    monkeypatch.setattr(inference.distributed, "all_reduce", lambda _: None)
    for rank in range(2):
        dist = SimpleNamespace(process_index=rank, num_processes=2)
        monkeypatch.setattr(inference.distributed, "init", lambda dist=dist: dist)
        images = inference.batch_generate(conditional, 5, 2, labels=labels)
        torch.testing.assert_close(images[rank::2], expected[rank::2], atol=1e-5, rtol=0)
        assert not images[1 - rank :: 2].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--classes", "cta"],
            "unknown class 'cta'; choose from cat, dog, cow, or by number; did you mean cat?",
        ),
        (["--classes", "3"], "unknown class '3'; choose from cat, dog, cow, or by number"),
        (["--classes", ""], "unknown class ''"),
        (["--guidance_mode", "cgf"], "did you mean cfg?"),
    ],
)
def test_wrong_classes_are_reported_in_one_line(conditional, infer, capsys, arguments, message):
    assert infer(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and message in error
    assert not Path("inference_results").exists()


# --- after training


def test_inference_uses_the_newest_checkpoint(run_here, script_error, trained_copy):
    output = run_here(trained_copy, "inference.py", "--num_samples", "5", "--batch_size", "2")
    results = trained_copy / "inference_results"
    folder = results / "samples-ddpm_final-unipc-4-seeds-0-4"
    assert "ddpm_final.pt" in output and str(folder.relative_to(trained_copy)) in output
    names = {"grid.png", "contact_sheet.png", "summary.json", *SHAPE_KINDS}
    assert {path.name for path in folder.iterdir()} == names
    assert {path.name for path in (folder / "star").iterdir()} == {f"{i:06d}.png" for i in range(5)}
    best = ["--checkpoint", "checkpoints/whole/best.pt"]
    run_here(trained_copy, "inference.py", "--seeds", "3", *best)
    ends = ["--image1", "data:3", "--image2", "5", "--num_steps", "2"]
    run_here(trained_copy, "inference.py", "--mode", "interpolate", *ends)
    summary = results / "interpolate-ddpm_final-unipc-4-seeds-0-15" / "summary.json"
    assert json.loads(summary.read_text())["image1"] == "data:3"
    vary = ["--mode", "vary", "--image", "data:20480"]
    assert "data:20480" in script_error(trained_copy, "inference.py", *vary)
    alone = Image.open(results / "samples-whole-best-unipc-4-seeds-3" / "star/000003.png")
    assert alone.size == (8, 8)
    grouped = Image.open(folder / "star/000003.png")
    assert np.abs(np.asarray(alone, int) - np.asarray(grouped, int)).max() <= 1
