"""engine/inference_modes.py: what each mode makes, of classes too; batches that resume."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid

from ddpm_model import DDPMModel
from engine import checkpoints, inference_modes, plots
from engine.inference_jobs import InferenceJob
from engine.labels import labels_in_proportion
from engine.samplers import SAMPLERS
from tests.small_models import (
    CUSTOM_SAMPLER,
    SMALL,
    guided_model,
    is_image,
    load_model,
    only,
    pixels,
)

HALF = SMALL["image_size"] // 2


# All modes.


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


# Figures.


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
    same |= dict.fromkeys(("guidance_mode", "guidance_min_sigma", "guidance_max_sigma", "labels"))
    expected = [same | {"sampler": name, "steps": steps} for name in SAMPLERS for steps in (2, 3)]
    assert calls[1:] == expected  # after the warm-up


def test_compare_takes_all_steps_of_a_model_with_few(folder, infer):
    DDPMModel(8, dim=8, dim_mults=(1, 2), timesteps=3, sampling_timesteps=3).save_model("few.pt")
    assert infer("--checkpoint", "few.pt", "--mode", "compare", "--seeds", "0") == 0


def test_compare_counts_the_nfe_of_the_given_spacing():
    model = guided_model()
    counts = []
    for spacing in ("uniform", "karras"):
        arguments = model, Path(), None, ["ddim"], [9], spacing, {"guidance": 3.0}
        candidate = inference_modes.Candidate(*arguments)
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


# Batches.


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_part_of_an_npz_on_a_full_disk_is_an_error_with_its_reason():
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "wb") as file:
        inference_modes.write_array(np.zeros(100_000, np.uint8), file)


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


# Classes.


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
        assert tuple(file["class_names"]) == conditional.class_names
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
