"""train.py: its command line, data, dry runs, resuming, --init_from, and what stops it."""

import importlib
import os
import re
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from PIL import Image

import train
import train_stl10_optimized
import train_true_high_res
from config import Tier
from ddpm_model import DDPMModel
from engine import checkpoints, plots
from engine.datasets import ARCHIVES
from engine.errors import FallbackWarning, UserError
from engine.image_source import ReadOptions
from engine.input_images import read_image_for
from tests.forked_script import ForkedScript, write_changed_training
from tests.helpers import (
    CPU_TIER,
    LARGE_TIER,
    TINY_FLAGS,
    checkpoint_weights,
    configure,
    logged_steps,
    max_checkpoint_difference,
    max_weight_difference,
    run_script_ok,
)

pytestmark = pytest.mark.usefixtures("on_a_cpu")


# Command line.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batchsize", "3"], "unknown flag --batchsize; did you mean --batch_size"),
        (["--dim", "wide"], "--dim: invalid int value: 'wide'"),
        (["--dim", "4"], "DIM is 4, but must be at least 8"),
        (["--dropout", "1.5"], "DROPOUT is 1.5, but must be at most 0.9"),
        (["--learning_rate", "nan"], "LEARNING_RATE is nan, but must be at least"),
        (["--dim_mults", "1,-2"], "DIM_MULTS is"),
        (["--objective", "pred_vv"],
         "OBJECTIVE is 'pred_vv'; choose from pred_v, pred_noise, pred_x0; did you mean pred_v?"),
        (["--dataset", "cifar"], "did you mean cifar10"),
        (["--image_size", "30"], "need a multiple of"),
        (["--timesteps", "10"], "SAMPLING_TIMESTEPS is 14, but must be at most TIMESTEPS, 10"),
        (["--timesteps", "20", "--sampling_timesteps", "5", "--beta_schedule", "linear"],
         "needs at least 21"),
        (["--dim", "9"], "DIM is 9, but must be even"),
        (["--dim_mults", "1,x"], "--dim_mults: expected integers like 1,2,4,8, got '1,x'"),
        (["--image_size", "16", "--schedule_base_size", "257"],
         "SCHEDULE_BASE_SIZE is 257, but must be at most 16 times"),
        (["--class_conditional", "--label_dropout", "0", "--guidance_mode", "both"],
         "LABEL_DROPOUT is 0.0, but GUIDANCE_MODE both needs a network trained with"),
        (["--guidance_max_sigma", "0.1"],
         "GUIDANCE_MIN_SIGMA is 0.2, but must be at most GUIDANCE_MAX_SIGMA, 0.1"),
        (["--guidance_mode", "cfg", "--no-class_conditional"],
         "GUIDANCE_MODE is cfg, but needs --class_conditional"),
        (["--minutes", "0"], "Set one of them"),
        (["--minutes", "inf"], "MINUTES is inf, but must be at most 1000000000"),
        (["--epochs", "9" * 400], "but must be at most 1000000000"),
        (["--config", "nowhere.py:Mine"], "nowhere.py, which does not exist"),
        (["--config", "Mine"], "must look like my_config.py:MyConfig"),
        (["--config", "mine.py:Yours"],
         "has no subclass of DDPMConfig named Yours; did you mean Ours"),
        (["--config", "typo.py:Typo"],
         "LEARNING_RAT, which does not exist; did you mean LEARNING_RATE"),
        (["--config", "typo.py:Type"], "DIM is '64', but must be an integer"),
        (["--config", "syntax.py:Mine"], "cannot be loaded: SyntaxError"),
        (["--resume", "no-such-run"], "--resume no-such-run: no such checkpoint"),
        (["--resume", ""], "--resume is empty"),
        (["--resume", "a", "--run_name", "b"], "--run_name is for a new run"),
    ],
)  # fmt: skip
def test_bad_command_line_gets_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    imports = "from config import DDPMConfig\n"
    (tmp_path / "mine.py").write_text(f"{imports}class Ours(DDPMConfig):\n    DIM = 16\n")
    typo = "class Typo(DDPMConfig):\n    LEARNING_RAT = 1\n"
    (tmp_path / "typo.py").write_text(f"{imports}{typo}class Type(DDPMConfig):\n    DIM = '64'\n")
    (tmp_path / "syntax.py").write_text("class Mine(\n")
    dataset = [] if "--dataset" in arguments else ["--dataset", "shapes"]
    with pytest.raises(UserError) as caught:
        configure(*dataset, *arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_value_range_may_be_negative():
    config = configure("--dataset", "folder", "--value_range", "-1000,400")
    assert config.VALUE_RANGE == "-1000,400"


def test_target_size_is_the_image_size():
    flags = ["--dataset", "folder", "--target_size", "128", "--max_memory_gib", "6"]
    with pytest.warns(FallbackWarning, match="no GPU to cap at 6 GiB; continuing without"):
        config = configure(*flags, script=train_true_high_res.DEFAULTS)
    assert (config.IMAGE_SIZE, config.MAX_MEMORY_GIB) == (128, 6.0)


def test_subclass_from_a_file_is_overridden_by_a_flag(tmp_path):
    file = tmp_path / "mine.py"
    base = "class Base(DDPMConfig):\n    DIM = 16\n"
    file.write_text(f"from config import DDPMConfig\n{base}class Ours(Base):\n    EPOCHS = 3\n")
    config = configure("--dataset", "shapes", "--config", f"{file}:Ours", "--epochs", "4")
    assert (config.DIM, config.set_by["DIM"]) == (16, "Ours")
    assert (config.EPOCHS, config.MINUTES) == (4, 0)


def test_explicit_settings_without_effect_are_named():
    explicit = {"CUDA_GRAPH": True, "AUTO_MICRO_BATCH": False, "MIN_SNR_GAMMA": 1.0}
    config = configure("--dataset", "folder", "--label_dropout", "0.2")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train.warn_of_unused(explicit | {"LABEL_DROPOUT": 0.2}, config, False, 1)
    assert [str(warning.message).split(";")[0] for warning in caught] == [
        "cuda_graph is for a GPU", "label_dropout is for class_conditional",
        "min_snr_gamma is for loss_weighting min_snr",
    ]  # fmt: skip
    labeled = configure("--dataset", "folder", "--class_conditional", "--loss_weighting", "min_snr")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train.warn_of_unused(explicit | {"LABEL_DROPOUT": 0.2}, labeled, True, 1)
        train.warn_of_unused({}, config, False, 2)


def test_guidance_without_a_guide_and_keep_beside_an_interval_are_named():
    def warnings_of(*flags: str, **options: bool) -> list[str]:
        flags = ("--dataset", "folder", "--guide_fraction", "0", *flags)
        explicit = train.parse_command_line("", {}, flags).explicit
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train.warn_of_unused(explicit, configure(*flags), False, 1, **options)
        return [str(warning.message).split(" is for ")[0] for warning in caught]

    interval = ["--guidance_min_sigma", "0.3", "--guidance_max_sigma", "3"]
    guided = ["--class_conditional", "--guidance", "3", *interval, "--guidance_mode"]
    names = ["guidance", "guidance_mode", "guidance_min_sigma", "guidance_max_sigma"]
    assert warnings_of(*guided, "both") == names
    assert warnings_of("--guidance", "1") == warnings_of(*guided, "cfg") == []
    assert warnings_of(*guided, "both", has_weaker=True) == []
    assert warnings_of(*guided, "both", "--guide_fraction", "0.2") == []
    assert warnings_of(*guided, "cfg", is_tuning=True) == names
    assert warnings_of(*guided, "both", has_weaker=True, is_tuning=True) == []
    assert warnings_of("--p_mean", "-1") == []
    assert warnings_of("--p_mean", "-1", "--loss_weighting", "min_snr") == ["p_mean"]
    mean = warnings_of("--p_mean", "-1", "--loss_weighting", "edm", is_tuning=True)
    assert mean[1:] == ["p_mean is not for tuning; continuing without it"]
    weighting = warnings_of("--loss_weighting", "min_snr", is_tuning=True)
    assert weighting == ["loss_weighting is not for tuning; continuing without it"]
    assert warnings_of("--keep", "2") == warnings_of("--checkpoint_every", "3") == []
    assert warnings_of("--keep", "2", "--checkpoint_every", "3") == ["keep"]


@pytest.mark.parametrize(("dataset", "is_used"), [("shapes", 0), ("hf:x", 0), ("stl10", 1)])
def test_folder_of_data_that_is_in_none_is_named(dataset, is_used):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train.warn_of_unused({"DATA_DIR": "x"}, configure("--dataset", dataset), False, 1)
    assert len(caught) == 1 - is_used
    assert all(str(warning.message).startswith("data_dir is not for") for warning in caught)


def test_ways_to_read_other_images_are_named():
    ways = {"VALUE_RANGE": "0,9", "FRAMES": "all"}
    for dataset, used, is_used in (
        ("folder", ways, True), ("folder", {}, False), ("shapes", ways, False),
    ):  # fmt: skip
        config = configure("--dataset", dataset)
        config.override(used, "data")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train.warn_of_unused(ways, config, False, 1)
        names = [str(warning.message).split(" is for ")[0] for warning in caught]
        assert names == ([] if is_used else ["value_range", "frames"])


# Data.


def test_data_dir_without_a_data_set_must_hold_the_default_one(saved_run, tmp_path):
    data = ["--data_dir", str(tmp_path)]
    for script, default, result in (
        (train.DEFAULTS, "cifar10", "shapes"),
        (train_stl10_optimized.DEFAULTS, "stl10", "stl10"),
    ):
        advice = (
            f"has no {default}. Add --dataset folder for your own images, or --dataset {default}"
        )
        with pytest.raises(UserError, match=advice):
            configure(*data, script=script)
        (tmp_path / ARCHIVES[default].path).touch()
        assert configure(*data, script=script).DATASET == result
    assert configure(*data, "--dataset", "folder").DATASET == "folder"
    assert configure(*data, script={"DATASET": "folder"}).DATASET == "folder"

    # A run names its data set.
    last = Path("checkpoints/mine/last.pt")
    state = checkpoints.load(last)
    checkpoints.save(last, state | {"config": saved_run | {"DATASET": "cifar10"}})
    assert configure("--data_dir", "elsewhere", "--resume", "mine").DATASET == "cifar10"


def test_train_reads_images_by_its_settings(tmp_path, monkeypatch):
    def load_dataset(name, size, folder, **options) -> None:
        read.append((name, size, folder, options))
        raise UserError("stop")

    read = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.load_dataset", load_dataset)
    flags = ["--dataset", "folder", "--data_dir", "photos", "--image_size", "8", "--channels", "1"]
    flags += ["--value_range", "0,4095", "--frames", "all", "--num_workers", "2"]
    for switch in ([], ["--use_upsampling", "--class_conditional"]):
        monkeypatch.setattr(sys, "argv", ["train.py", *TINY_FLAGS[4:], *flags, *switch])
        with pytest.raises(UserError, match="stop"):
            importlib.import_module("train").main()
        options = {"workers": 2, "progress": True, "options": ReadOptions(1, "0,4095", "all")}
        options |= dict.fromkeys(("upsampling", "use_labels"), bool(switch))
        assert read.pop() == ("folder", 8, Path("photos"), options)


def test_train_takes_the_channels_of_a_folder(run_here, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(20):
        Image.new("L", (8, 8), 12 * i).save(tmp_path / "images" / f"{i}.png")
    flags = ["--dataset", "folder", "--data_dir", "images", *TINY_FLAGS[2:], "--max_steps", "1"]
    run_here(tmp_path, "train.py", *flags)
    state = checkpoints.load(tmp_path / "checkpoints/ddpm_final.pt")
    assert (state["architecture"]["channels"], state["config"]["CHANNELS"]) == (1, 1)


def test_train_stores_the_range_of_images_of_16_bits(run_here, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for i in range(20):
        Image.new("I;16", (8, 8), 200 * i).save(tmp_path / "images" / f"{i}.png")
    flags = ["--dataset", "folder", "--data_dir", "images", *TINY_FLAGS[2:], "--run_name", "deep"]
    run_here(tmp_path, "train.py", *flags, "--frames", "all", "--max_steps", "1")
    output = run_here(tmp_path, "train.py", "--resume", "deep", "--max_steps", "2")
    assert "read as" not in output  # from the cache
    monkeypatch.chdir(tmp_path)
    model = DDPMModel.from_file("checkpoints/ddpm_final.pt")
    config = model.training_info["config"]
    assert (config["VALUE_RANGE"], config["FRAMES"], config["MAX_STEPS"]) == ("0,4095", "first", 2)
    Image.new("I;16", (8, 8), 819).save("dark.png")
    assert read_image_for(model, Path("dark.png")).mean() == pytest.approx(0.2)


# Dry runs.


def test_dry_run_prints_an_estimate_and_leaves_nothing(run_here, trained_copy):
    flags = [*TINY_FLAGS, "--epochs", "2", "--dry_run", "--run_name", "dry"]
    output = run_here(trained_copy, "train_optimized.py", *flags)
    assert re.search(r"^DIM +8 +flag$", output, re.MULTILINE)
    assert re.search(r"^USE_AMP +(True +script|False +tier CPU)$", output, re.MULTILINE)
    assert "0.1 M parameters" in output and "memory" in output
    size = float(re.search(r"^disk .* MB at most \(3 x (.*) MB\)$", output, re.MULTILINE)[1])
    written = (trained_copy / "checkpoints/whole/last.pt").stat().st_size / 1e6
    assert size == pytest.approx(written, rel=0.15)
    assert "2,496 steps, 2.0 epochs" in output
    assert (
        not (trained_copy / "checkpoints/dry").exists()
        and not (trained_copy / "samples/dry").exists()
    )


@pytest.mark.parametrize(("dataset", "steps"), [("stl10", "13,060"), ("celeba", "25,260")])
def test_dry_run_downloads_nothing(dataset, steps, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.load_dataset", lambda *_, **__: pytest.fail("loaded"))
    flags = ["--dataset", dataset, "--epochs", "2", "--dry_run"]
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY_FLAGS[2:], *flags])
    importlib.import_module("train").main()
    assert f"{steps} steps, 2.0 epochs" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_dry_run_downloads_no_default_data_set(monkeypatch):
    asked = []
    monkeypatch.setattr(train, "choose_default_dataset", lambda *a: asked.append(a) or "cifar10")
    for tier, has_gpu in ((CPU_TIER, False), (LARGE_TIER, True)):
        monkeypatch.setattr(train, "detect_tier", lambda tier=tier: tier)
        for flags in ([], ["--dry_run"]):
            configure(*flags)
            assert asked.pop() == (Path("data"), has_gpu, not flags)


# Resuming.


@pytest.mark.parametrize("tier", [CPU_TIER, Tier("Tiny", 8, 0.01)])
@pytest.mark.parametrize("script", [train, train_stl10_optimized])
def test_resume_keeps_every_setting_of_the_run(script, tier, saved_run, monkeypatch):
    monkeypatch.setattr(train, "detect_tier", lambda: tier)
    config = configure("--resume", "mine", script=script.DEFAULTS)
    assert config.as_dict() == saved_run
    assert (config.LR_SCHEDULE, config.set_by["LR_SCHEDULE"]) == ("cosine", "checkpoint")


def test_resume_is_overridden_by_explicit_settings_only(saved_run, tmp_path):
    code = "from config import DDPMConfig\nclass Own(DDPMConfig):\n    EMA_DECAY = 0.5\n"
    (tmp_path / "own.py").write_text(code)
    flags = ["--learning_rate", "0.5", "--minutes", "3", "--config", "own.py:Own"]
    config = configure("--resume", "mine", *flags, script=train.DEFAULTS)
    changed = {"LEARNING_RATE": 0.5, "MINUTES": 3.0, "MAX_STEPS": 0, "EMA_DECAY": 0.5}
    assert config.as_dict() == saved_run | changed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "is of a finished run"),
        (["--image_size", "16", "--max_steps", "99"], "was trained on"),
        (
            ["--objective", "pred_noise"],
            "with objective pred_v, which cannot become pred_noise",
        ),
        (["--dim", "16", "--max_steps", "99"], "with dim 8, which cannot become 16"),
    ],
)
def test_resume_refuses_what_a_run_cannot_become(trained_copy, script_error, flags, message):
    assert message in script_error(trained_copy, "train.py", "--resume", "whole", *flags)


def block_after_17_calls(loss, calls):
    while calls > 17:
        time.sleep(1)
    return loss


def test_train_killed_in_a_step_resumes_to_the_same_weights(trained, run_folder):
    flags = [*TINY_FLAGS, "--run_name", "killed", "--max_steps", "40", "--save_every_minutes", "0"]
    script = write_changed_training(run_folder, block_after_17_calls, "train_optimized.py")
    process = ForkedScript(run_folder, script, *flags)
    last = run_folder / "checkpoints" / "killed" / "last.pt"
    while not last.exists() or torch.load(last, weights_only=True)["progress"]["step"] < 17:
        assert process.returncode is None
        time.sleep(0.01)
    process.kill()
    flags = ["--resume", "killed", "--save_every_minutes", "2"]
    run_script_ok(run_folder, "train_optimized.py", *flags)
    final = run_folder / "checkpoints" / "killed" / "final.pt"
    whole = trained / "checkpoints" / "whole" / "final.pt"
    assert max_checkpoint_difference(final, whole) == 0
    assert logged_steps(run_folder, "killed") == [10, 20, 30, 40]


def run_changed(
    folder: Path, change: Callable[[torch.Tensor, int], torch.Tensor], *flags: str
) -> tuple[int, str, str]:
    """Runs train.py with change(loss, n) as its n-th loss; returns exit code, stdout and stderr."""
    process = ForkedScript(folder, write_changed_training(folder, change), *TINY_FLAGS, *flags)
    output, errors = process.communicate()
    return process.returncode, output, errors


def stop_at_call_12(loss, calls):
    if calls == 12:
        os.kill(os.getpid(), signal.SIGTERM)
    return loss


def test_train_stopped_at_its_last_step_is_finished(run_here, trained, run_folder):
    code, output, _ = run_changed(run_folder, stop_at_call_12, "--max_steps", "12")
    assert code == 0 and "192 images in" in output
    shutil.copytree(trained, run_folder, dirs_exist_ok=True)
    final = run_folder / "checkpoints" / "whole" / "final.pt"
    final.unlink()  # as if killed before it was written
    output = run_here(run_folder, "train_optimized.py", "--resume", "whole")
    assert re.search(r"done: \d+ steps, 640 images in .* validation loss \d", output)
    assert max_checkpoint_difference(final, trained / "checkpoints/whole/final.pt") == 0


# Starting from the weights of another run.


def test_init_from_starts_a_new_run_from_ema_weights(trained_by_api, tmp_path, monkeypatch):
    shutil.copytree(trained_by_api, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for i in range(20):
        Image.new("RGB", (16, 16), (9 * i, 255 - 9 * i, 128)).save(f"images/{i}.png")

    def start(*flags: str) -> None:
        small = ["--batch_size", "4", "--grid_images", "4", "--sampling_timesteps", "2"]
        data = ["--dataset", "folder", "--data_dir", "images", *small, "--max_steps", "1"]
        monkeypatch.setattr(sys, "argv", ["train.py", *data, *flags])
        importlib.import_module("train").main()

    source = DDPMModel.from_file("checkpoints/whole/final.pt")
    source.save_model("source.safetensors")
    for name, reference in (("run", "whole"), ("file", "source.safetensors")):
        size = ["--image_size", "16", "--learning_rate", "1e-8", "--guide_fraction", "0"]
        start("--init_from", reference, "--run_name", name, *size)
        tuned = DDPMModel.from_file(f"checkpoints/{name}/final.pt")
        assert tuned.image_size == 16
        assert max_weight_difference(tuned.unet, source.unet) < 1e-6
    theirs = GaussianDiffusion(Unet(8, dim_mults=(1, 2)), image_size=16, timesteps=30)
    torch.save({"step": 1, "model": theirs.state_dict()}, "model-1.pt")
    start("--init_from", "model-1.pt", "--run_name", "upstream", "--image_size", "16")
    with pytest.raises(UserError, match="trained with dim 8, which cannot become 16"):
        start("--init_from", "whole", "--dim", "16")
    with pytest.raises(UserError, match="--init_from is for a new run and --resume continues one"):
        start("--init_from", "whole", "--resume", "whole")
    with pytest.raises(UserError, match="--init_from nothing: no such checkpoint"):
        start("--init_from", "nothing")


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 16}, {"sampling_timesteps": 3}, {"loss_weighting": "min_snr"},
        {"min_snr_gamma": 2.0}, {"schedule_base_size": 16}, {"guidance": 1.5}, {"dropout": 0.2},
        {"guidance_mode": "cfg"}, {"class_counts": {"a": 1, "b": 1}}, {"consistency": True},
        {"guidance_min_sigma": 0.1}, {"guidance_max_sigma": 3.0}, {"p_mean": 0.5},
    ],
)  # fmt: skip
def test_init_weights_ignores_settings_that_are_no_weights(change):
    small = {"image_size": 8, "dim": 8, "dim_mults": (1, 2), "full_attn": (False, True)}
    source = DDPMModel(**small)
    model = DDPMModel(**small | change)
    importlib.import_module("train").init_weights(model, source, Path("source.pt"))
    assert torch.equal(model.unet.init_conv.weight, source.unet.init_conv.weight)


# What stops a run.


def nan_after_5_calls(loss, calls):
    return loss if calls <= 5 else loss * float("nan")


def test_train_stops_at_a_loss_that_stays_nan_and_keeps_finite_weights(run_folder):
    flags = ["--run_name", "bad", "--max_steps", "100", "--save_every_minutes", "0"]
    code, _, errors = run_changed(run_folder, nan_after_5_calls, *flags)
    assert code == 1 and "Traceback" not in errors
    line = "20 updates in a row were not finite; stopped at step 30. Resume with --resume bad with"
    assert line in errors
    weights = checkpoint_weights(run_folder / "checkpoints/bad/last.pt")
    assert all(torch.isfinite(value).all() for value in weights.values())


def limit_file_size_at_first_call(loss, calls):
    """From the first step on: importing torch may write files."""
    import resource

    if calls == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
    return loss


def test_train_on_a_full_disk_ends_with_an_error_and_leaves_no_partial_file(run_folder):
    flags = ["--run_name", "full", "--max_steps", "40"]
    code, _, errors = run_changed(run_folder, limit_file_size_at_first_call, *flags)
    line = "warning: writing samples/full failed (File too large); continuing without it"
    assert errors.count(line) == errors.count("warning: writing samples") == 1
    assert "warning: writing checkpoints/full/best.pt failed" in errors
    assert code == 1 and "Traceback" not in errors
    assert "error: File too large (checkpoints/full/final.pt). Free some space" in errors
    rows = plots.read_metrics(run_folder / "samples/full/metrics.jsonl")
    assert rows[0]["step"] == 10 and len(rows) < 4
    assert {path.name for path in (run_folder / "checkpoints").rglob("*.*")} == {".lock"}


def test_train_reports_before_the_first_step_that_it_cannot_write(script_error, run_folder):
    (run_folder / "checkpoints").write_text("a file")
    flags = [*TINY_FLAGS, "--run_name", "none", "--max_steps", "40"]
    assert "checkpoints" in script_error(run_folder, "train.py", *flags)
    assert not plots.read_metrics(run_folder / "samples/none/metrics.jsonl")
