"""engine/inference_jobs.py: seeds, classes, input images, batches; settings stored with images."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import inference
from ddpm_model import DDPMModel
from engine import checkpoints, inference_jobs, inference_modes, plots
from engine.errors import FallbackWarning, UserError
from engine.image_source import ReadOptions
from engine.inference_jobs import InferenceJob
from tests.small_models import CUSTOM_SAMPLER, guided_model, load_model, only, pixels, small_model

# Seeds and classes.


def test_parse_seeds_takes_numbers_and_ranges_without_repeats():
    assert inference_jobs.parse_seeds("7") == [7]
    assert inference_jobs.parse_seeds("1,5, 10-12") == [1, 5, 10, 11, 12]
    for text in ("", "3-", "-3", "1.5", "1,,2", "²"):
        with pytest.raises(UserError, match="must look like"):
            inference_jobs.parse_seeds(text)
    with pytest.raises(UserError, match="'3-5,4', but names a seed twice"):
        inference_jobs.parse_seeds("3-5,4")


def test_class_without_training_images_may_be_asked_for():
    model = DDPMModel(8, dim=8, dim_mults=(1,), class_counts={"cat": 3, "dog": 0})
    job = InferenceJob(model, {"batch_size": 1, "classes": "dog"}, Path(), "ddim")
    assert job.labels_of(range(4)) == [1] * 4


# Input images, batches and files.


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


def test_compile_model_compiles_the_guide_too(guided, infer, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda network: compiled.append(network))
    assert infer("--num_samples", "1", "--compile_model") == 0
    assert len(compiled) == 2 and compiled[0] is not compiled[1]
    monkeypatch.setattr(inference_modes, "COMPARED_STEPS", (2,))
    compare = ["--mode", "compare", "--compare_with", "checkpoints/ddpm_final.pt"]
    assert infer("--num_samples", "1", "--compile_model", *compare) == 0
    assert len(set(compiled)) == 6  # both models, or their times could not be compared


def test_full_disk_leaves_no_partial_file(folder, infer, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots.Image.Image, "save", full)
    assert infer("--num_samples", "1") == 1
    assert "No space left on device" in capsys.readouterr().err
    files = [path.name for path in Path("inference_results").rglob("*") if path.is_file()]
    assert files == ["summary.json"]


def test_output_folder_on_a_full_disk_is_named_and_stays_free(folder, infer, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(json, "dump", full)
        assert infer("--num_samples", "1") == 1
    assert re.search(r"error: No space .* \(.*/summary.json\)", capsys.readouterr().err)
    assert infer("--num_samples", "1") == 0
    assert len(list(Path("inference_results").iterdir())) == 1


# Stored settings.


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
    "guidance": (1, 10, None), "guidance_mode": ("cfg", None),
    "guidance_min_sigma": (0.0, None), "guidance_max_sigma": (2.0, None),
    "spacing": ("karras", None), "classes": ("1", None), "use_amp": (True, False),
    "image1": ("data:3",),
}  # fmt: skip
REFUSED_VALUES = {
    "mode": ("x", 1, None), "seeds": ([], "3", 3, [-1], [10**18], [True], [0.5], [None], None),
    "steps": (-1, 0.5, True, "3", [], NAN, None), "eta": (-0.1, 1.1, NAN, INF, True, "0", 10**400),
    "image_size": (-1, 1025), "num_steps": (1, 1001, 2.0), "strength": (0, 1.1, NAN, [], None),
    "format": ("gif", [], None), "resamples": (0, 101), "tile": (0, 4097), "columns": (0, 1001),
    "batch_size": (-1,), "guidance": (0.9, 10.1, NAN, "1", [1]), "guidance_mode": ("x", 1),
    "guidance_min_sigma": (-0.1, "1"), "guidance_max_sigma": (-0.1, "2"),
    "spacing": ("x", []), "classes": (1, [1]), "use_amp": (1, "true", None), "image1": (3, [1]),
    "sha256": ([], {}, "x", None), "checkpoint": ([], 3), "input_sha256": ("x", [], 1),
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


def test_noise_levels_of_earlier_versions_need_no_spacing():
    stored = {"seeds": [3], "spacing": "karras"}
    for levels, spacing in (("80,3", None), (None, "karras")):
        complete = inference_jobs.complete_settings(stored | {"noise_levels": levels})
        assert complete["spacing"] == spacing


# Folders of other settings.


def test_results_of_other_settings_are_kept(folder, infer, capsys):
    flags = ["--mode", "vary", "--seeds", "4-5", "--batch_size", "1"]
    for more in ([], ["--guidance", "1"], ["--image", "9"], ["--image", "4", "--batch_size", "2"]):
        assert infer(*flags, *more) == 0
    folders = sorted(Path("inference_results").glob("vary-*"))
    suffixes = [path.name.removeprefix(folders[0].name) for path in folders]
    assert suffixes == ["", "_2", "_3"]  # the last is the first
    assert infer(*flags, "--guidance", "3", "--guidance_min_sigma", "1") == 0
    expected = "this model has no guide, so --guidance 3 --guidance_min_sigma 1 changes nothing"
    output = capsys.readouterr().out
    assert expected in output and "NFE per image" not in output  # vary runs a part of the plan


def test_input_that_was_replaced_counts_as_another(folder, infer, capsys):
    flags = ["--mode", "vary", "--seeds", "4", "--image", "photo.png", "--steps", "2"]
    for color in ("red", "blue"):
        Image.new("RGB", (8, 8), color).save("photo.png")
        assert infer(*flags) == 0
    first, second = sorted(Path("inference_results").glob("vary-*"))
    assert infer("--from_png", str(second / "variations.png"), "--output_dir", "again") == 0
    capsys.readouterr()
    assert infer("--from_png", str(first / "variations.png")) == 2
    expected = "was made with photo.png, which has changed since. Put the file of then"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({}, (None, None), "no step is at a noise level that is guided"),
        ({}, (1.0, "cfg"), "the weight of guidance is 1"),
        ({"guide": None}, (2.0, "both"), "this model has no guide"),
        ({"guide": None}, (2.0, "cfg"), "no step is at a noise level that is guided"),
        ({"is_consistency_tuned": True}, (2.0, None), "guidance is in the weights of a consis"),
    ],
)
def test_notes_say_why_guidance_changes_nothing(change, options, reason):
    model = guided_model(guidance=2.0)
    for name, value in change.items():
        setattr(model, name, value)
    guidance = dict(zip(("guidance", "guidance_mode"), options, strict=True))
    assert inference.why_unguided(model, guidance).startswith(reason)


def test_flags_that_interpolate_ignores_are_noted(folder, infer, capsys):
    Path("mine.py").write_text(CUSTOM_SAMPLER)
    flags = ["--mode", "interpolate", "--num_steps", "2", "--steps", "2", "--seeds", "0-1"]
    assert infer(*flags, "--sampler", "heun", "--guidance", "3") == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "interpolate itself" in line]
    ignored = "is for ends that are seeds; interpolate itself ignores it"
    assert notes == [f"note: --{name} {ignored}" for name in ("guidance", "sampler")]
    assert infer(*flags, "--sampler", "mine.py:plain") == 0
    assert "interpolate itself" not in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["vary", "inpaint"])
def test_edits_by_cfg_without_classes_are_noted_as_unguided(conditional, infer, capsys, mode):
    flags = ["--mode", mode, "--seeds", "0", "--steps", "8", "--resamples", "1"]
    expected = "note: cfg needs --classes to edit an image, so --guidance 3 --guidance_mode cfg "
    for more, is_noted in (([], True), (["--classes", "cat"], False)):
        assert infer(*flags, "--guidance", "3", "--guidance_mode", "cfg", *more) == 0
        output = capsys.readouterr().out
        assert (expected + "guides only an original that is a seed\n" in output) == is_noted
    assert infer(*flags, "--guidance", "3") == 0
    assert "cfg" not in capsys.readouterr().out  # the guide needs no class


def test_flags_of_other_modes_are_noted_and_batch_waits_for_rank_0(
    folder, infer, capsys, monkeypatch
):
    waits = []
    monkeypatch.setattr(inference.distributed, "wait_for_rank0", waits.append)
    flags = ["--num_samples", "1", "--steps", "2"]
    assert infer(*flags, "--mode", "progressive", "--strength", "0.9", "--columns", "3") == 0
    output = capsys.readouterr().out
    assert output.count("note: ") == 1
    assert "note: --strength is for vary; progressive ignores it" in output and not waits
    assert infer(*flags, "--mode", "batch") == 0 and waits == ["mode batch"]


def test_output_folder_belongs_to_the_first_process_that_claims_it(tmp_path):
    settings = {"seeds": [0], "guidance": 2.0}
    others = settings | {"guidance": 3.0}
    folder = tmp_path / "samples"
    assert inference_jobs.claim_output_dir(folder, settings) == folder
    assert inference_jobs.claim_output_dir(folder, others) == tmp_path / "samples_2"
    assert inference_jobs.claim_output_dir(folder, settings) == folder


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
