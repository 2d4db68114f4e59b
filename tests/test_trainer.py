"""Runs of the real scripts: interrupted, resumed, out of disk space, given bad input."""

import contextlib
import importlib
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from config import Config, resolve
from ddpm_model import DDPMModel
from engine import checkpoints, plots, progress, run, run_names, trainer
from engine.checkpoints import TrainingCheckpoint
from engine.dataloader import BatchLoader, ImageDataset
from engine.errors import FallbackWarning, RenamedWarning, UserError
from engine.image_source import ReadOptions
from engine.progress import Progress
from engine.run import VERSION
from engine.shapes import SHAPE_KINDS
from engine.train_step import TrainStep
from engine.trainer import (
    abort_if_diverged,
    estimate,
    format_duration,
    restore,
    set_up,
    should_snapshot_guide,
    train,
    warn_if_short,
)
from tests.forked_script import ForkedScript
from tests.helpers import (
    CPU,
    CPU_TIER,
    ROOT,
    TINY_FLAGS,
    FakeTime,
    checkpoint_weights,
    max_checkpoint_difference,
    max_weight_difference,
    random_images,
    run_script_ok,
    write_changed_training,
)

API_FLAGS = {
    "IMAGE_SIZE": 8, "DIM": 8, "DIM_MULTS": (1, 2), "ATTENTION_HEADS": (1,), "ATTENTION_DIM": (16,),
    "TIMESTEPS": 40, "SAMPLING_TIMESTEPS": 4, "BATCH_SIZE": 16, "WARMUP_STEPS": 1,
    "LEARNING_RATE": 0.03, "GUIDE_FRACTION": 0.5, "LR_SCHEDULE": "cosine", "CHECKPOINT_EVERY": 0,
    "NUM_SAMPLE_GRIDS": 0, "GRID_IMAGES": 4,
}  # fmt: skip


def read_rows(folder: Path, name: str) -> list[dict]:
    lines = (folder / "samples" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def logged_steps(folder: Path, name: str, key: str = "loss") -> list[int]:
    return [row["step"] for row in read_rows(folder, name) if key in row]


def configure(**changes) -> Config:
    return resolve("folder", CPU_TIER, flags=API_FLAGS | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a finished run `whole` of 40 steps."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--run_name", "whole", "--max_steps", "40"]
    run_script_ok(folder, "train_optimized.py", *TINY_FLAGS, *flags)
    return folder


@pytest.fixture
def trained_copy(trained, tmp_path) -> Path:
    """A folder with that run, which a test may change."""
    return shutil.copytree(trained, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """A folder with the image cache of `trained`, which takes a second to build."""
    shutil.copytree(trained / "data", tmp_path / "data")
    return tmp_path


@pytest.fixture(scope="module")
def trained_by_api(tmp_path_factory) -> Path:
    """A folder with a finished run `whole` of 4 steps, which are an epoch."""
    folder = tmp_path_factory.mktemp("trained_by_api")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = configure(MAX_STEPS=4, RUN_NAME="whole")
        train(DDPMModel.from_config(config), random_images(80, 8), config)
    return folder


@pytest.fixture
def run_here(monkeypatch, capsys):
    """run_here(folder, script, *arguments) is run_script_ok in this process, and faster."""

    def call(folder: Path, script: str, *arguments: str, code: int = 0) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        printed = capsys.readouterr()
        assert stopped.value.code == code, printed
        return printed.err if code else printed.out

    return call


@pytest.fixture
def script_error(run_here):
    """script_error(folder, script, *arguments) runs a script that must fail; returns its error."""

    def call(folder: Path, script: str, *arguments: str) -> str:
        errors = run_here(folder, script, *arguments, code=2).splitlines()
        lines = [line for line in errors if line.startswith("error: ")]
        assert len(lines) == 1 and errors[-1] == lines[0]
        return lines[0]

    return call


def test_train_refuses_images_that_do_not_fit_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configure(MAX_STEPS=1)
    model = DDPMModel.from_config(config)
    for images in (random_images(40, 8, channels=1), random_images(40, 16)):
        with pytest.raises(
            UserError, match=r"the images are .* but the model's must be \(3, 8, 8\)"
        ):
            train(model, images, config)
    with pytest.raises(UserError, match="the images are float32, but must be uint8"):
        train(model, random_images(40, 8) / np.float32(255), config)
    assert not Path("checkpoints").exists()


# --- what a run writes


def test_train_writes_checkpoints_grids_and_metrics(trained):
    folder, samples = trained / "checkpoints", trained / "samples" / "whole"
    files = {path.name for path in (folder / "whole").iterdir()} - {".lock"}
    assert files == {"last.pt", "best.pt", "final.pt"}
    assert (folder / "ddpm_final.pt").read_bytes() == (folder / "whole/final.pt").read_bytes()
    names = {path.name for path in samples.iterdir()}
    assert names == {"step_0000020.png", "final.png", "loss.png", "metrics.jsonl", "tensorboard"}
    assert list((samples / "tensorboard").glob("events*"))
    for name in ("final.png", "loss.png"):
        assert np.asarray(Image.open(samples / name).convert("L")).std() > 5
    assert logged_steps(trained, "whole") == [10, 20, 30, 40]
    assert logged_steps(trained, "whole", "validation_loss") == [40]
    assert read_rows(trained, "whole")[-1]["images"] == 640


@pytest.mark.parametrize("file", ["ddpm_final.pt", "whole/final.pt", "whole/last.pt"])
def test_train_samples_with_the_ema_weights(trained_by_api, file):
    path = trained_by_api / "checkpoints" / file
    state, model = checkpoints.load(path), DDPMModel.from_file(path)
    assert state["ema"].keys() > state["model"].keys()  # the guide is in addition
    for name, value in model.state_dict().items():
        assert torch.equal(value, state["ema"][name]), name
    grid = np.asarray(Image.open(trained_by_api / "samples" / "whole" / "final.png"))
    assert np.array_equal(grid, plots.grid(model.sample(4, seed=range(4))))
    model.load_state_dict(state["model"])
    assert not np.array_equal(grid, plots.grid(model.sample(4, seed=range(4))))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_train_on_gray_and_rgba_images_samples_the_like(channels, mode, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configure(MAX_STEPS=2, RUN_NAME="run", CHANNELS=channels, NUM_SAMPLE_GRIDS=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        path = train(DDPMModel.from_config(config), random_images(40, 8, channels), config)
    model = DDPMModel.from_file(path)
    assert (model.channels, model.training_info["config"]["CHANNELS"]) == (channels, channels)
    for name in ("step_0000001.png", "final.png"):
        assert Image.open(tmp_path / "samples/run" / name).mode == mode
    events = EventAccumulator(str(tmp_path / "samples/run/tensorboard")).Reload()
    assert {event.step for event in events.Images("samples")} == {1, 2}


def test_train_keeps_every_tenth_epoch_if_asked_to(run_here, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(40):
        Image.new("RGB", (8, 8), (6 * i, 255 - 6 * i, 128)).save(tmp_path / "images" / f"{i}.png")
    flags = ["--dataset", "folder", "--data_dir", "images", *TINY_FLAGS[2:], "--run_name", "kept"]
    flags += ["--epochs", "20", "--ema_decay", "0.9", "--checkpoint_every", "10"]
    run_here(tmp_path, "train.py", *flags)
    names = {path.name for path in (tmp_path / "checkpoints/kept").glob("epoch*")}
    assert names == {"epoch_0010.pt", "epoch_0020.pt"}
    # Epochs are so short that later not each of them is validated.
    validated = logged_steps(tmp_path, "kept", "validation_loss")
    assert validated[:5] == list(range(2, 12, 2)) and validated[-1] == 40
    rows = read_rows(tmp_path, "kept")
    lowest = min(row["validation_loss"] for row in rows if "validation_loss" in row)
    best = torch.load(tmp_path / "checkpoints/kept/best.pt", weights_only=True)
    assert best["progress"]["best"] == lowest


def test_train_snapshots_the_guide_from_the_ema_of_that_step(run_here, folder):
    flags = [*TINY_FLAGS, "--run_name"]
    run_here(folder, "train.py", *flags, "whole", "--max_steps", "8")
    run_here(folder, "train.py", *flags, "part", "--max_steps", "4", "--guide_fraction", "0")
    whole, part = (
        torch.load(folder / f"checkpoints/{name}/final.pt", weights_only=True)["ema"]
        for name in ("whole", "part")
    )
    guide = {k.removeprefix("guide."): v for k, v in whole.items() if k.startswith("guide.")}
    ema = {k: v for k, v in part.items() if k.startswith("diffusion.model.")}
    assert len(guide) == len(ema) and not any(name.startswith("guide.") for name in part)
    for name, value in guide.items():
        assert torch.equal(value, ema[f"diffusion.model.{name}"])
        assert value.ndim == 0 or not torch.equal(value, whole[f"diffusion.model.{name}"])


def test_should_snapshot_guide_waits_for_its_fraction_and_the_warm_up():
    def is_due(step: int, fraction: float, guide_fraction: float = 0.125, guide=None) -> bool:
        config = SimpleNamespace(GUIDE_FRACTION=guide_fraction, WARMUP_STEPS=10)
        made = SimpleNamespace(config=config, ema=SimpleNamespace(guide=guide))
        return should_snapshot_guide(made, SimpleNamespace(step=step, fraction=fraction))

    assert is_due(50, 0.125)
    assert not is_due(49, 0.49)
    assert is_due(20, 0.5)
    assert not is_due(19, 0.99)
    assert is_due(20, 0.99) and not is_due(20, 1.0)
    assert not is_due(50, 0.125, guide="exists")
    assert not is_due(1000, 0.124)
    assert not is_due(1000, 0.99, guide_fraction=0)


def test_train_in_minutes_ends_with_the_schedule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clock = FakeTime()
    monkeypatch.setattr(progress, "time", clock)
    update = TrainStep.update

    def update_in_1_5_s(step: TrainStep, loss: torch.Tensor) -> torch.Tensor:
        clock.now += 1.5
        return update(step, loss)

    monkeypatch.setattr(TrainStep, "update", update_in_1_5_s)
    config = configure(MINUTES=1, RUN_NAME="timed")
    train(DDPMModel.from_config(config), random_images(80, 8), config)
    rows = read_rows(tmp_path, "timed")
    rates = [row["learning_rate"] for row in rows if "learning_rate" in row]
    assert rates[-1] < 0.05 * max(rates)
    assert rows[-1]["seconds"] == 60 and rows[-1]["step"] == 40


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


def test_run_of_little_but_warm_up_warns_at_its_start_and_in_an_estimate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configure(WARMUP_STEPS=5, EPOCHS=2)
    line = "^only 8 steps, with a warm-up of 5; continuing without a guide. Set --minutes"
    with pytest.warns(FallbackWarning, match=line):
        train(DDPMModel.from_config(config), random_images(80, 8), config)
    with pytest.warns(FallbackWarning, match=line):
        estimate(DDPMModel.from_config(config), 80, config, 0.0)
    config = configure(WARMUP_STEPS=5, MINUTES=1e-9)
    with pytest.warns(FallbackWarning, match="with a warm-up of 5; continuing"):
        estimate(DDPMModel.from_config(config), 80, config, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the number of steps is not known at the start
        train(DDPMModel.from_config(config), random_images(80, 8), config)


def test_warn_if_short_is_silent_for_long_runs_and_for_a_set_number_of_steps():
    without_guide = configure(WARMUP_STEPS=5, EPOCHS=2, GUIDE_FRACTION=0.0)
    with pytest.warns(FallbackWarning, match="^only 8 steps, with a warm-up of 5. Set --minutes"):
        warn_if_short(without_guide, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_short(configure(WARMUP_STEPS=5, EPOCHS=3), 12)
        warn_if_short(configure(WARMUP_STEPS=5, MAX_STEPS=8), 8)


def test_estimate_divides_a_step_among_the_ranks(monkeypatch):
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    config = configure(MAX_STEPS=9)
    for count in (1, 2):
        dist = SimpleNamespace(num_processes=count, device=CPU)
        monkeypatch.setattr(trainer.distributed, "init", lambda dist=dist: dist)
        printed = estimate(DDPMModel.from_config(config), 80, config, 0.0)
        # 8 of 16 images took a second.
        assert f"({2 / count:.3f} s per step, measured)" in printed


@pytest.mark.parametrize(("dataset", "steps"), [("stl10", "13,060"), ("celeba", "25,260")])
def test_dry_run_downloads_nothing(dataset, steps, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.load_dataset", lambda *_, **__: pytest.fail("loaded"))
    flags = ["--dataset", dataset, "--epochs", "2", "--dry_run"]
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY_FLAGS[2:], *flags])
    importlib.import_module("train").main()
    assert f"{steps} steps, 2.0 epochs" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(119, "119 seconds"), (150, "2.5 minutes"), (9000, "2.5 hours"), (216_000, "2.5 days")],
)
def test_format_duration_uses_the_unit_that_a_person_would(seconds, text):
    assert format_duration(seconds) == text


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


# --- resuming


def block_after_17_calls(loss, calls):
    while calls > 17:
        time.sleep(1)
    return loss


def test_train_killed_in_a_step_resumes_to_the_same_weights(trained, folder):
    flags = [*TINY_FLAGS, "--run_name", "killed", "--max_steps", "40", "--save_every_minutes", "0"]
    script = write_changed_training(folder, block_after_17_calls, "train_optimized.py")
    process = ForkedScript(folder, script, *flags)
    last = folder / "checkpoints" / "killed" / "last.pt"
    while not last.exists() or torch.load(last, weights_only=True)["progress"]["step"] < 17:
        assert process.returncode is None
        time.sleep(0.01)
    process.kill()
    flags = ["--resume", "killed", "--save_every_minutes", "2"]
    run_script_ok(folder, "train_optimized.py", *flags)
    final = folder / "checkpoints" / "killed" / "final.pt"
    whole = trained / "checkpoints" / "whole" / "final.pt"
    assert max_checkpoint_difference(final, whole) == 0
    assert logged_steps(folder, "killed") == [10, 20, 30, 40]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_train_saves_on_a_signal(number, folder):
    flags = [*TINY_FLAGS, "--run_name", "stopped", "--max_steps", "100000"]
    process = ForkedScript(folder, "train.py", *flags)
    metrics = folder / "samples" / "stopped" / "metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        assert process.returncode is None
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    line = r"interrupted at step (\d+)\. Resume with --resume stopped"
    step = int(re.search(line, output).group(1))
    state = torch.load(folder / "checkpoints/stopped/last.pt", weights_only=True)
    assert state["progress"]["step"] == step >= 10


def make_state(position: int = 0) -> dict:
    """A checkpoint of a run on no data in batches of 16."""
    progress = {"step": 4, "epoch": 0, "images": 64, "seconds": 1.0, "best": None}
    return {
        "version": VERSION, "data": {}, "run": "ended", "architecture": {},
        "progress": progress | {"position": position},
        "config": {"BATCH_SIZE": 16, "GRADIENT_ACCUMULATION": 1},
    }  # fmt: skip


def restore_stub(state: dict, architecture: dict, upgrade=dict) -> tuple[Progress, BatchLoader]:
    """Restores a state into a step that does nothing."""
    loader = BatchLoader(ImageDataset(np.zeros((80, 3, 8, 8), np.uint8)), 16, 0, CPU, 1)
    model = SimpleNamespace(architecture=architecture, upgrade_architecture=upgrade)
    step = SimpleNamespace(
        rank=1, world_size=2, model=model, config=configure(MAX_STEPS=9),
        load_state_dict=lambda state: None,
    )  # fmt: skip
    checkpoint = TrainingCheckpoint(Path("last.pt"), state)
    return restore(checkpoint, {"fingerprint": ""}, step, loader, dist=None), loader


def test_restore_at_the_end_of_an_epoch_continues_with_the_next():
    progress, loader = restore_stub(make_state(position=4), {})
    assert progress.epoch_step == len(loader) and not list(loader.epoch(0, progress.epoch_step))
    assert (progress.step, progress.images, progress.seconds) == (4, 64, 1.0)


def test_restore_continues_after_the_same_images_of_an_accumulated_batch():
    state = make_state(position=1)
    state["config"] = {"BATCH_SIZE": 8, "GRADIENT_ACCUMULATION": 4}
    progress, _ = restore_stub(state, {})
    assert progress.epoch_step == 2


def test_ranks_draw_other_numbers_from_the_start_and_after_each_resume(monkeypatch):
    seeds = []
    monkeypatch.setattr(trainer, "seed_everything", seeds.append)
    monkeypatch.setattr(trainer, "TrainStep", lambda *_: None)
    config = configure(MAX_STEPS=9, SEED=5)
    model = DDPMModel.from_config(config)
    for rank in (0, 1):
        dist = SimpleNamespace(process_index=rank, num_processes=2)
        loader, _ = set_up(model, ImageDataset(random_images(80, 8)), config, dist)
        assert (loader.seed, loader.rank, loader.world_size) == (5, rank, 2)
    state = make_state()
    for step in (4, 5):  # the stub is rank 1
        state["progress"]["step"] = step
        restore_stub(state, {})
    assert len(set(seeds)) == 4


@pytest.mark.parametrize(
    "name",
    ["sampling_timesteps", "guidance", "guidance_mode", "guidance_max_sigma", "dropout"],
)
def test_restore_lets_settings_change_that_are_no_weights(name):
    restore_stub(make_state() | {"architecture": {name: 1}}, {name: 2})


def test_restore_compares_the_upgraded_architecture():
    def upgrade(architecture: dict) -> dict:
        return {"width" if key == "dim" else key: v for key, v in architecture.items()}

    state = make_state()
    state["architecture"] = {"dim": 8, "dropout": 0.0}
    restore_stub(state, {"width": 8, "dropout": 0.1, "new": 1}, upgrade)
    with pytest.raises(UserError, match="trained with width 8, which cannot become 16"):
        restore_stub(state, {"width": 16}, upgrade)
    with pytest.raises(UserError, match="another version"):
        restore_stub(state | {"version": 1}, {}, upgrade)


def test_train_resumes_from_any_file_of_a_run_and_with_another_batch(
    run_here, trained_copy, tmp_path
):
    flags = ["--resume", "checkpoints/ddpm_final.pt", "--batch_size", "8", "--max_steps", "50"]
    run_here(tmp_path, "train.py", *flags)
    state = torch.load(tmp_path / "checkpoints/whole/final.pt", weights_only=True)
    progress = state["progress"]
    assert (state["run"], progress["step"]) == ("whole", 50)
    assert (progress["images"], progress["position"]) == (40 * 16 + 10 * 8, 40 * 2 + 10)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"whole", "ddpm_final.pt"}


def test_train_resumes_a_copy_of_a_run_as_a_separate_run(
    run_here, script_error, trained_copy, tmp_path
):
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "whole", folder / "copy")
    (folder / "copy" / ".last.pt.4711.tmp").write_text("of a process killed while saving")
    (tmp_path / "samples" / "copy").mkdir()
    (tmp_path / "samples" / "copy" / ".loss.png.4711.tmp").write_text("likewise")
    run_here(tmp_path, "train.py", "--resume", "copy", "--max_steps", "42")
    steps = {
        name: checkpoints.load(folder / name / "final.pt")["progress"]["step"]
        for name in ("whole", "copy")
    }
    assert steps == {"whole": 40, "copy": 42}
    assert not list((tmp_path / "samples" / "copy").glob(".*"))
    files = {path.name for path in (folder / "copy").iterdir()} - {".lock"}
    assert files == {"last.pt", "best.pt", "final.pt"}
    shutil.copy(folder / "whole" / "last.pt", tmp_path / "elsewhere.pt")
    line = script_error(tmp_path, "train.py", "--resume", "elsewhere.pt", "--max_steps", "42")
    assert "of run whole, which exists in checkpoints/, too. Copy it to" in line


def stop_at_call_12(loss, calls):
    if calls == 12:
        os.kill(os.getpid(), signal.SIGTERM)
    return loss


def test_train_stopped_at_its_last_step_is_finished(run_here, trained, folder):
    code, output, _ = run_changed(folder, stop_at_call_12, "--max_steps", "12")
    assert code == 0 and "done: 192 images" in output
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    final = folder / "checkpoints" / "whole" / "final.pt"
    final.unlink()  # as if killed before it was written
    output = run_here(folder, "train_optimized.py", "--resume", "whole")
    assert re.search(r"done: 640 images in .* validation loss \d", output)
    assert max_checkpoint_difference(final, trained / "checkpoints/whole/final.pt") == 0


def test_train_resumes_with_the_remaining_minutes(trained_by_api, tmp_path, monkeypatch):
    shutil.copytree(trained_by_api, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    clock = FakeTime()
    for module in (run, progress):
        monkeypatch.setattr(module, "time", clock)
    last = Path("checkpoints/whole/last.pt")
    state = checkpoints.load(last)
    state["progress"]["seconds"] = 57.0
    checkpoints.save(last, state)
    config = configure(MINUTES=1)
    model = DDPMModel.from_config(config)

    def pass_time(module, *_):
        clock.now += 2 * module.training

    model.register_forward_hook(pass_time)
    stored = checkpoints.load(train(model, random_images(80, 8), config, last))["progress"]
    assert (stored["step"], stored["seconds"], stored["images"]) == (6, 61, 96)
    rows = plots.read_metrics(Path("samples/whole/metrics.jsonl"))
    rates = [row["learning_rate"] for row in rows if "learning_rate" in row and row["step"] > 4]
    assert len(rates) == 1 and 0 < rates[0] < 0.01 * 0.03  # the schedule is at its end


@pytest.fixture
def resumable(trained_by_api, tmp_path, monkeypatch) -> Callable[..., Path]:
    """A working folder with the run `whole`; resumable(file, ...) resumes it by the API."""
    shutil.copytree(trained_by_api, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def resume(file: str = "last.pt", seed: int = 0, **changes) -> Path:
        config = configure(**({"MAX_STEPS": 4} | changes))
        images = random_images(80, 8, seed=seed)
        return train(DDPMModel.from_config(config), images, config, f"checkpoints/whole/{file}")

    return resume


def test_train_resumes_with_the_same_images_only(resumable, capsys):
    with pytest.raises(UserError, match="start a new run with --init_from checkpoints/whole/last"):
        resumable(MAX_STEPS=5, seed=1)
    last = Path("checkpoints/whole/last.pt")
    state = checkpoints.load(last)
    del state["data"]["fingerprint"]  # as earlier versions wrote it
    checkpoints.save(last, state)
    resumable(MAX_STEPS=5)
    assert "last.pt does not say which images it was trained on" in capsys.readouterr().out


def test_train_continues_an_older_checkpoint_as_another_run(resumable, capsys):
    older = checkpoints.load(Path("checkpoints/whole/best.pt"))
    resumable(MAX_STEPS=8)
    checkpoints.save(Path("checkpoints/whole/older.pt"), older)
    files = [*Path("checkpoints/whole").glob("*.pt"), Path("samples/whole/metrics.jsonl")]
    before = {file: file.read_bytes() for file in files}
    for name in ("whole-from-4", "whole-from-4-2"):
        assert resumable("older.pt", MAX_STEPS=8) == Path("checkpoints", name, "final.pt")
        line = (
            f"run whole is at step 8 already: continuing checkpoints/whole/older.pt as run {name}"
        )
        assert line in capsys.readouterr().out
    assert {file: file.read_bytes() for file in files} == before
    difference = max_checkpoint_difference(
        Path("checkpoints/whole/final.pt"), Path("checkpoints/whole-from-4/final.pt")
    )
    assert difference == 0


def test_train_removes_leftovers_of_a_finished_run(resumable):
    dead = Path("samples/whole/.loss.png.999999999.tmp")
    live = Path(f"samples/whole/.loss.png.{os.getppid()}.tmp")
    for changes in ({}, {"MAX_STEPS": 5}):
        dead.touch()
        live.touch()
        with contextlib.suppress(UserError):
            resumable(**changes)
        assert live.exists() and not dead.exists()


def test_train_publishes_what_a_killed_process_did_not(resumable, capsys):
    with pytest.raises(UserError, match=r"is of a finished run\. Raise --epochs"):
        resumable()
    final, grid = Path("checkpoints/ddpm_final.pt"), Path("samples/whole/final.png")
    for file in (final, grid):
        file.unlink()
    resumable()
    assert "done: 64 images" in capsys.readouterr().out
    assert final.read_bytes() == Path("checkpoints/whole/final.pt").read_bytes() and grid.exists()
    # Nor is validation repeated, or logged twice.
    assert logged_steps(Path(), "whole", "validation_loss") == [4]
    grid_time = Path("checkpoints/whole/final.pt").stat().st_mtime - 1
    os.utime(grid, (grid_time, grid_time))  # of an earlier, shorter run
    resumable()


@pytest.mark.parametrize("reference", ["newest", "whole", "checkpoints/whole"])
def test_resolve_checkpoint_finds_what_a_run_saved_before_its_first_last(resumable, reference):
    folder = Path("checkpoints/whole")
    for file in ("last.pt", "final.pt"):
        (folder / file).unlink()
    assert run_names.resume_hint("whole") == "Resume with --resume whole"
    assert checkpoints.resolve_checkpoint(reference) == folder / "best.pt"
    (folder / "last.pt").write_text("damaged")
    assert checkpoints.resolve_checkpoint(reference) == folder / "best.pt"


def test_validation_is_logged_once_if_a_killed_process_has(resumable):
    # Killed after the validation of an epoch whose last step is last.pt's.
    last = Path("checkpoints/whole/last.pt")
    state = checkpoints.load(last)
    state["progress"] |= {"epoch": 0, "position": 4}
    checkpoints.save(last, state)
    Path("checkpoints/whole/final.pt").unlink()
    resumable(MAX_STEPS=8)
    assert logged_steps(Path(), "whole", "validation_loss") == [4, 8]


def test_train_rebuilds_damaged_metrics(resumable):
    metrics, before = Path("samples/whole/metrics.jsonl"), read_rows(Path(), "whole")
    metrics.write_bytes(metrics.read_bytes() + b'3\n{"step": "4"}\n[]\n\xff{"step": 4, "loss"')
    resumable(MAX_STEPS=5)
    rows = read_rows(Path(), "whole")
    assert len(before) >= 2 and rows[: len(before)] == before
    assert {row["step"] for row in rows[len(before) :]} == {5}


@pytest.mark.parametrize("change", [{"optimizer": {}}, {"rng": {"torch": 3}}, {"model": {"a": 1}}])
def test_train_refuses_damaged_parts(resumable, change):
    last = Path("checkpoints/whole/last.pt")
    checkpoints.save(last, checkpoints.load(last) | change)
    with pytest.raises(UserError, match=r"last\.pt does not fit this model, or is .*. Use another"):
        resumable(MAX_STEPS=5)


def test_train_takes_a_checkpoint_that_was_read_already(trained_by_api, tmp_path, monkeypatch):
    shutil.copytree(trained_by_api, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    checkpoint = checkpoints.load_training(Path("checkpoints/whole/last.pt"))
    monkeypatch.setattr(checkpoints, "load", None)  # read once
    data = ImageDataset(random_images(80, 8))
    config = configure(MAX_STEPS=6)
    final = train(DDPMModel.from_config(config), data, config, checkpoint)
    assert torch.load(final, weights_only=True)["progress"]["step"] == 6


def test_train_continues_an_unconditional_run_with_classes(trained_by_api, tmp_path, monkeypatch):
    shutil.copytree(trained_by_api, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    grids = []
    save = plots.save_image
    monkeypatch.setattr(
        plots, "save_image", lambda image, *a: grids.append(image) or save(image, *a)
    )
    labels = np.arange(80) % 2
    data = ImageDataset(random_images(80, 8), labels, ("a", "b"))
    config = configure(MAX_STEPS=8, CLASS_CONDITIONAL=True)
    model = DDPMModel.from_config(config, data.class_counts)
    final = train(model, data, config, Path("checkpoints/whole/last.pt"))
    trained = DDPMModel.from_file(final)
    assert trained.architecture["class_counts"] == {"a": 40, "b": 40}
    assert trained.unet.class_embedding.weight.abs().min() > 0
    images = trained.sample(4, seed=[0, 1, 0, 1], labels=[0, 0, 1, 1])
    assert np.array_equal(grids[-1], plots.table(images, ["a", "b"], ["seed 0", "seed 1"]))
    before, after = (
        checkpoint_weights(f / "checkpoints/whole/final.pt") for f in (trained_by_api, tmp_path)
    )
    new = after.keys() - before.keys()
    assert {name.split(".")[-2] for name in new} == {"class_embedding"} and len(new) == 3

    # The other way, or with other labels, it does not.
    config.MAX_STEPS = 12
    for changed, message in (
        (ImageDataset(data.images), "Resume with --class_conditional"),
        (ImageDataset(data.images, labels * 0, ("a", "b")), "a: 40, now 80; b: 40, now 0"),
    ):
        model = DDPMModel.from_config(config, changed.class_counts)
        with pytest.raises(UserError, match=message):
            train(model, changed, config, final)


# --- starting from the weights of another run


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
        {"guidance_max_sigma": 3.0},
    ],
)  # fmt: skip
def test_init_weights_ignores_settings_that_are_no_weights(change):
    small = {"image_size": 8, "dim": 8, "dim_mults": (1, 2), "full_attn": (False, True)}
    source = DDPMModel(**small)
    model = DDPMModel(**small | change)
    importlib.import_module("train").init_weights(model, source, Path("source.pt"))
    assert torch.equal(model.unet.init_conv.weight, source.unet.init_conv.weight)


# --- what stops a run


def run_changed(
    folder: Path, change: Callable[[torch.Tensor, int], torch.Tensor], *flags: str
) -> tuple[int, str, str]:
    """Runs train.py with change(loss, n) as its n-th loss; returns exit code, stdout and stderr."""
    process = ForkedScript(folder, write_changed_training(folder, change), *TINY_FLAGS, *flags)
    output, errors = process.communicate()
    return process.returncode, output, errors


def nan_after_5_calls(loss, calls):
    return loss if calls <= 5 else loss * float("nan")


def test_train_stops_at_a_loss_that_stays_nan_and_keeps_finite_weights(folder):
    flags = ["--run_name", "bad", "--max_steps", "100", "--save_every_minutes", "0"]
    code, _, errors = run_changed(folder, nan_after_5_calls, *flags)
    assert code == 1 and "Traceback" not in errors
    line = "20 updates in a row were not finite; stopped at step 30. Resume with --resume bad with"
    assert line in errors
    weights = checkpoint_weights(folder / "checkpoints/bad/last.pt")
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_abort_if_diverged_counts_updates_skipped_in_a_row():
    config = configure(MAX_STEPS=100)
    step = TrainStep(DDPMModel.from_config(config).train(), config)

    def update(loss: float, times: int = 1) -> None:
        for _ in range(times):
            step.update(torch.tensor(loss))

    for _ in range(3):
        update(1.0)
        update(float("nan"), 19)
        abort_if_diverged(step, 20, "mine")
    assert step.skipped_updates.item() == 57
    update(float("inf"))
    with pytest.raises(UserError, match=r"step 61\. .* saved nothing .* --learning_rate$"):
        abort_if_diverged(step, 61, "mine")


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


# --- disks


def limit_file_size_at_first_call(loss, calls):
    """From the first step on: importing torch may write files."""
    import resource

    if calls == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
    return loss


def test_train_on_a_full_disk_ends_with_an_error_and_leaves_no_partial_file(folder):
    flags = ["--run_name", "full", "--max_steps", "40"]
    code, _, errors = run_changed(folder, limit_file_size_at_first_call, *flags)
    line = "warning: writing samples/full failed (File too large); continuing without it"
    assert errors.count(line) == errors.count("warning: writing samples") == 1
    assert "warning: writing checkpoints/full/best.pt failed" in errors
    assert code == 2 and "Traceback" not in errors
    assert "error: File too large (checkpoints/full/final.pt). Free some space" in errors
    rows = plots.read_metrics(folder / "samples/full/metrics.jsonl")
    assert rows[0]["step"] == 10 and len(rows) < 4
    assert {path.name for path in (folder / "checkpoints").rglob("*.*")} == {".lock"}


def test_train_reports_before_the_first_step_that_it_cannot_write(script_error, folder):
    (folder / "checkpoints").write_text("a file")
    flags = [*TINY_FLAGS, "--run_name", "none", "--max_steps", "40"]
    assert "checkpoints" in script_error(folder, "train.py", *flags)
    assert not plots.read_metrics(folder / "samples/none/metrics.jsonl")


# --- the trained model


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


def test_training_module_is_the_old_import_path(monkeypatch):
    monkeypatch.delitem(sys.modules, "engine.training", raising=False)
    with pytest.warns(RenamedWarning, match="engine.training is now engine.trainer"):
        module = importlib.import_module("engine.training")
    assert module.train is train
