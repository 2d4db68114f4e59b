"""inference.py: its flags, batch_generate and bad input; inference_high_res.py."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from PIL import Image

import inference
from ddpm_model import DDPMModel
from engine import plots
from engine.errors import UserError
from engine.shapes import SHAPE_KINDS
from tests.helpers import ROOT
from tests.small_models import NARROW, SMALL, only


@pytest.mark.parametrize("flag", ["--channels_last", "--no-channels_last"])
def test_channels_last_flag_is_ignored_with_a_warning(guided, infer, capsys, flag):
    assert infer("--num_samples", "1", "--steps", "1", flag) == 0
    assert "warning: --channels_last is always on" in capsys.readouterr().err


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


# Batch_generate.


def test_batch_generate_takes_labels(conditional):
    images = inference.batch_generate(conditional, 5, 2, labels=[0, 1, 2, 1, 0])
    expected = conditional.sample(5, seed=0, labels=[0, 1, 2, 1, 0])
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_batch_generate_refuses_wrong_numbers(conditional):
    with pytest.raises(UserError, match="there are 2 labels for 5 images"):
        inference.batch_generate(conditional, 5, 2, labels=[0, 1])
    with pytest.raises(UserError, match="batch_size is 0, but must be at least 1"):
        inference.batch_generate(conditional, 5, 0)


def test_batch_generate_takes_labels_of_torch(conditional):
    labels = torch.tensor([0, 1, 1])
    images = inference.batch_generate(conditional, 3, 2, labels=labels)
    torch.testing.assert_close(
        images, conditional.sample(3, seed=0, labels=labels), atol=1e-5, rtol=0
    )


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


# Inference_high_res.py.


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


# Input.


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
        (["--seeds", "0-3", "--num_samples", "9"], "so --num_samples has no effect. Drop one"),
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


# After training.


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
