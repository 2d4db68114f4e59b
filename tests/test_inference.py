"""inference.py and inference_high_res.py: every mode, drawn again from its own PNG, killed and ill-treated."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import inference
from ddpm_model import DDPMModel
from engine import checkpoints, drawing, plots
from engine.command_line import run
from engine.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
CUSTOM = """
from engine.samplers import level

def plain(denoiser, x, timesteps, randn):
    for t, s in zip(timesteps, timesteps[1:]):
        a_t, a_s = level(denoiser, t), level(denoiser, s)
        x_0 = denoiser(x, t)
        noise = (x - a_t**0.5 * x_0) / (1 - a_t) ** 0.5
        x = a_s**0.5 * x_0 + (1 - a_s) ** 0.5 * noise
        yield x, x_0
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with a small model in checkpoints/."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = DDPMModel(image_size=16, dim=8, dim_mults=(1, 2), timesteps=60, sampling_timesteps=6)
    model.save_model("checkpoints/ddpm_final.pt")
    return tmp_path


def infer(monkeypatch, *arguments: str, script=inference.main) -> int:
    """Runs the script in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["inference.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run(script)
    return stopped.value.code


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), int)


def only(pattern: str) -> Path:
    (found,) = Path("inference_results").glob(pattern)
    return found


@pytest.mark.parametrize("sampler", ["ddim", "mine.py:plain"])
def test_every_mode_works_with_every_kind_of_sampler(folder, monkeypatch, sampler):
    (folder / "mine.py").write_text(CUSTOM)
    monkeypatch.setattr(inference, "COMPARED_STEPS", (2, 3))
    assert infer(monkeypatch, "--mode", "all", "--sampler", sampler, "--num_samples", "3", "--resamples", "2") == 0
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
        assert summary["mode"] == mode and summary["sampler"] == sampler and summary["seeds"] == [0, 1, 2]
        assert summary["sha256"] == drawing.digest(folder / "checkpoints/ddpm_final.pt")
        assert summary["seconds"] > 0 and torch.__version__.startswith(summary["versions"]["torch"])
        for picture in results.rglob("*.png"):
            assert pixels(picture).std() > 1, picture
    assert Image.open(only("progressive-*") / "progressive.gif").n_frames == 7


def test_a_picture_is_drawn_again_from_itself(folder, monkeypatch):
    flags = ["--seeds", "3-9", "--sampler", "ddim", "--eta", "0.5", "--steps", "7"]
    assert infer(monkeypatch, *flags) == 0
    picture = shutil.copy(only("samples-*") / "000005.png", folder / "five.png")
    assert infer(monkeypatch, "--from_png", "five.png", "--output_dir", "again") == 0
    (again,) = (folder / "again").rglob("000005.png")
    assert np.abs(pixels(again) - pixels(picture)).max() <= 1  # the batch is another one
    grid = only("samples-*") / "grid.png"
    assert infer(monkeypatch, "--from_png", str(grid), "--output_dir", "grid") == 0
    assert np.array_equal(pixels(next((folder / "grid").rglob("grid.png"))), pixels(grid))
    os.rename("checkpoints/ddpm_final.pt", "checkpoints/renamed.pt")  # found by its content
    assert infer(monkeypatch, "--from_png", "five.png", "--output_dir", "renamed") == 0
    os.remove("checkpoints/renamed.pt")
    assert infer(monkeypatch, "--from_png", "five.png") == 2


def test_a_variation_is_drawn_again_from_the_same_original(folder, monkeypatch):
    assert infer(monkeypatch, "--mode", "vary", "--seeds", "4-6") == 0
    picture = only("vary-*") / "variations" / "000006.png"
    assert infer(monkeypatch, "--from_png", str(picture), "--output_dir", "again") == 0
    (again,) = (folder / "again").rglob("variations/000006.png")
    assert np.abs(pixels(again) - pixels(picture)).max() <= 1


def test_results_of_other_settings_stay(folder, monkeypatch, capsys):
    flags = ["--mode", "vary", "--seeds", "4-5", "--batch_size", "1"]
    for more in ([], ["--guidance", "1"], ["--image", "9"], ["--image", "4", "--batch_size", "2"]):
        assert infer(monkeypatch, *flags, *more) == 0
    folders = sorted(Path("inference_results").glob("vary-*"))
    assert [path.name.removeprefix(folders[0].name) for path in folders] == ["", "_2", "_3"]  # the last is the first
    assert infer(monkeypatch, *flags, "--guidance", "3") == 0
    assert "this model has no guide, so --guidance 3 changes nothing" in capsys.readouterr().out


def test_the_batch_does_not_matter(folder, monkeypatch):
    for size, name in (("1", "ones"), ("5", "fives")):
        arguments = ["--num_samples", "5", "--sampler", "ddpm", "--batch_size", size, "--output_dir", name]
        assert infer(monkeypatch, *arguments) == 0
    for one in (folder / "ones").rglob("0000*.png"):
        (five,) = (folder / "fives").rglob(one.name)
        assert np.abs(pixels(one) - pixels(five)).max() <= 1


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_a_killed_batch_goes_on_and_ends_with_the_same_set(folder, monkeypatch, kind):
    monkeypatch.setattr(inference, "CHUNK", 4)
    arguments = ["--mode", "batch", "--num_samples", "12", "--format", kind]
    assert infer(monkeypatch, *arguments, "--output_dir", "whole") == 0
    drawn = []
    real = DDPMModel.sample

    def sample(model, *a, **k):
        if len(drawn) == 2:
            drawn.append("killed")
            raise KeyboardInterrupt
        drawn.append(k["seed"])
        return real(model, *a, **k)

    monkeypatch.setattr(DDPMModel, "sample", sample)
    assert infer(monkeypatch, *arguments, "--output_dir", "killed") == 130
    assert not list((folder / "killed").rglob("images.npz"))
    assert infer(monkeypatch, *arguments, "--output_dir", "killed") == 0
    assert drawn == [[0, 1, 2, 3], [4, 5, 6, 7], "killed", [8, 9, 10, 11]]
    if kind == "npz":
        whole, killed = (np.load(next((folder / name).rglob("images.npz"))) for name in ("whole", "killed"))
        assert whole["images"].shape == (12, 16, 16, 3) and whole["images"].dtype == np.uint8
        assert np.array_equal(whole["images"], killed["images"]) and np.array_equal(whole["seeds"], np.arange(12))
    else:
        names = sorted((folder / "whole").rglob("images/*.png"))
        assert len(names) == 12
        for name in names:
            assert name.read_bytes() == (folder / "killed" / name.relative_to(folder / "whole")).read_bytes()


def test_a_batch_of_other_settings_is_not_mixed_in(folder, monkeypatch, capsys):
    arguments = ["--mode", "batch", "--num_samples", "2"]
    assert infer(monkeypatch, *arguments) == 0
    assert infer(monkeypatch, *arguments, "--eta", "0.3") == 2
    assert "holds images of other settings" in capsys.readouterr().err


def test_interpolation_between_files_reproduces_them(folder, monkeypatch):
    image = np.full((20, 20, 3), 120, np.uint8)
    image[5:15, 5:15] = (140, 110, 120)
    Image.fromarray(image).save("a.png")
    Image.fromarray(image[:, ::-1] + 5).save("b.png")
    assert (
        infer(monkeypatch, "--mode", "interpolate", "--image1", "a.png", "--image2", "b.png", "--num_steps", "4") == 0
    )
    summary = json.loads((only("interpolate-*") / "summary.json").read_text())
    assert min(summary["psnr"]) > 30
    assert Image.open(only("interpolate-*") / "interpolation.gif").n_frames == 6  # there and back


def test_training_images_are_those_of_the_checkpoint_which_is_read_once(folder, monkeypatch):
    (folder / "real").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (40 * i + 60, 128, 128)).save(folder / "real" / f"{i}.png")
    path, read, load = Path("checkpoints/ddpm_final.pt"), [], checkpoints.load
    config = {"DATASET": "folder", "IMAGE_SIZE": 16, "DATA_DIR": "real"}
    checkpoints.save(path, load(path) | {"config": config})
    monkeypatch.setattr(checkpoints, "load", lambda path: read.append(path) or load(path))
    given, interpolate = [], DDPMModel.interpolate
    monkeypatch.setattr(
        DDPMModel, "interpolate", lambda model, *ends: given.extend(ends[:2]) or interpolate(model, *ends)
    )
    assert infer(monkeypatch, "--mode", "interpolate", "--image1", "data:1", "--image2", "data:3") == 0
    assert [round(255 * image[0].mean().item()) for image in given] == [100, 180] and read == [path]


def test_vary_stays_nearer_the_less_it_goes_back():
    torch.manual_seed(0)
    model = DDPMModel(image_size=16, dim=8, dim_mults=(1, 2))
    image = torch.full((3, 16, 16), 0.6)
    far = [
        (model.vary(image, strength, 4, seed=0, steps=50) - image).abs().mean().item() for strength in (0.02, 0.2, 0.9)
    ]
    assert far[0] < far[1] < far[2] and far[0] < 0.05
    with pytest.raises(UserError, match="strength is 0"):
        model.vary(image, 0.0)


def test_inpaint_keeps_what_is_not_masked_and_paints_the_rest():
    torch.manual_seed(0)
    model = DDPMModel(image_size=16, dim=8, dim_mults=(1, 2))
    image, mask = torch.rand(3, 16, 16), torch.zeros(16, 16)
    mask[:, 8:] = 1
    painted = model.inpaint(image, mask, batch_size=2, seed=0, steps=10, resamples=2)
    torch.testing.assert_close(painted[..., :8], image[..., :8].expand(2, 3, 16, 8))
    assert (painted[0, ..., 8:] - image[..., 8:]).abs().mean() > 0.05
    assert (painted[0, ..., 8:] - painted[1, ..., 8:]).abs().mean() > 0.01
    with pytest.raises(UserError, match=r"the mask is \(8, 8\)"):
        model.inpaint(image, torch.ones(8, 8))


def test_out_of_memory_halves_the_batch_and_draws_the_same(folder, monkeypatch, capsys):
    real = DDPMModel.sample

    def small(model, *a, **k):
        if k["batch_size"] > 2:
            raise torch.OutOfMemoryError("too many")
        return real(model, *a, **k)

    assert infer(monkeypatch, "--num_samples", "5", "--output_dir", "whole") == 0
    monkeypatch.setattr(DDPMModel, "sample", small)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert infer(monkeypatch, "--num_samples", "5", "--output_dir", "halved") == 0
    assert "going on with batches of 2" in capsys.readouterr().out
    for one in (folder / "halved").rglob("0000*.png"):
        (other,) = (folder / "whole").rglob(one.name)
        assert np.abs(pixels(one) - pixels(other)).max() <= 1


def test_high_res_lays_its_figures_out_larger(folder):
    torch.manual_seed(0)
    narrow = {"dim": 8, "dim_mults": (1, 2), "attn_heads": 1, "attn_dim_head": 8}
    DDPMModel(image_size=64, timesteps=8, sampling_timesteps=3, **narrow).save_model("checkpoints/large.pt")
    arguments = [sys.executable, str(ROOT / "inference_high_res.py"), "--checkpoint", "checkpoints/large.pt"]
    result = subprocess.run([*arguments, "--mode", "all", "--resamples", "1"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {path.name.split("-")[0] for path in Path("inference_results").iterdir()} == {*inference.MODES}
    assert len(json.loads((only("samples-*") / "summary.json").read_text())["seeds"]) == 9
    assert Image.open(only("samples-*") / "grid.png").width > 3 * 192
    assert Image.open(only("interpolate-*") / "interpolation.png").width < 8 * 200


def test_a_process_killed_in_a_batch_leaves_no_half_image(folder):
    arguments = [sys.executable, str(ROOT / "inference.py"), "--mode", "batch", "--num_samples", "2000", "--steps", "2"]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(Path("inference_results").rglob("images/*.png")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for picture in Path("inference_results").rglob("images/*.png"):
        if not picture.name.startswith("."):
            Image.open(picture).load()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere.pt"], "there is no checkpoint nowhere.pt: train one"),
        (["--checkpoint", "text.pt"], "text.pt is"),
        (["--checkpoint", "cut.pt"], "cut.pt is damaged or cut short"),
        (["--checkpoint", "other.pt"], "other.pt does not fit DDPMModel"),
        (["--steps", "61"], "steps is 61, but this model has between 1 and 60"),
        (["--sampler", "euler"], "there is no sampler euler"),
        (["--sampler", "nowhere.py:mine"], "nowhere.py, which does not exist"),
        (["--spacing", "wide"], "--spacing is 'wide'"),
        (["--seeds", "9-3"], "--seeds is '9-3', but must look like"),
        (["--seeds", "9" * 23], "but seeds have at most 18 digits"),
        (["--seeds", "0-99999999999"], "but at most 10,000,000 images can be drawn"),
        (["--checkpoint", "checkpoints"], "checkpoints is a folder: name a checkpoint in it"),
        (["--output_dir", "a.png"], "choose a folder that can be written to"),
        (["--output_dir", "/proc/there"], "choose a folder that can be written to"),
        (["--mode", "vary", "--image", "text.pt"], "text.pt cannot be read as an image"),
        (["--mode", "vary", "--image", "cut.png"], "cut.png cannot be read as an image"),
        (["--mode", "vary", "--image", "nowhere.png"], "nowhere.png cannot be read as an image"),
        (["--mode", "inpaint", "--image", "a.png", "--mask", "small.png"], "small.png is 9x9, but the image is 20x20"),
        (["--mode", "vary", "--image", "data:3"], "ddpm_final.pt does not say what it was trained on"),
        (["--from_png", "other.png"], "other.png does not say how it was made, or another version wrote it"),
        (["--from_png", "a.png"], "a.png does not say how it was made"),
        (["--from_png", "a.png", "--steps", "3"], "draws a picture as it was drawn: leave out --steps"),
        (["--checkpoint", ""], "--checkpoint is given an empty name"),
        (["--from_png", "text.pt"], "text.pt is missing or not a picture"),
    ],
)
def test_bad_input_gets_one_line(folder, monkeypatch, capsys, arguments, message):
    good = (folder / "checkpoints/ddpm_final.pt").read_bytes()
    (folder / "cut.pt").write_bytes(good[:-4000])
    (folder / "text.pt").write_text("nothing")
    state = torch.load("checkpoints/ddpm_final.pt", weights_only=True)
    torch.save(state | {"architecture": state["architecture"] | {"dim": 16}}, "other.pt")
    Image.new("RGB", (20, 20), "red").save("a.png")
    Image.new("L", (9, 9)).save("small.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:-30])
    plots.save_image(Image.new("RGB", (9, 9)), Path("other.png"), "{}")
    assert infer(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and message in error and "Traceback" not in error
    assert not list(Path(".").rglob("*.tmp"))


def test_an_image_of_another_size_and_mode_is_taken_with_a_notice(folder, monkeypatch, capsys):
    Image.new("LA", (30, 20), (90, 128)).save("grey.png")
    assert infer(monkeypatch, "--mode", "vary", "--image", "grey.png", "--num_samples", "2") == 0
    assert "grey.png: 30x20 LA, cropped and resized to 16x16 RGB" in capsys.readouterr().out


def test_a_photograph_is_turned_as_its_camera_says(folder):
    picture, exif = Image.new("RGB", (20, 20), "black"), Image.Exif()
    picture.paste("white", (0, 0, 20, 10))
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    picture.save("photo.png", exif=exif)
    image = drawing.read_picture(Path("photo.png"), 20)
    assert image[:, :, 15].min() == 1 and image[:, :, 5].max() == 0


def test_a_full_disk_leaves_nothing_half_written(folder, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots.Image.Image, "save", full)
    assert infer(monkeypatch, "--num_samples", "1") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not [path for path in Path("inference_results").rglob("*") if path.is_file()]
