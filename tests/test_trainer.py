"""engine/trainer.py: the loop, its guide, lengths and estimates, resuming, what stops it."""

import contextlib
import importlib
import itertools
import os
import re
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from config import Config, resolve
from ddpm_model import DDPMModel
from engine import checkpoints, plots, progress, run, trainer
from engine.checkpoints import TrainingCheckpoint
from engine.dataloader import BatchLoader, ImageDataset
from engine.denoiser import GUIDANCE_OPTIONS
from engine.errors import FallbackWarning, RenamedWarning, UserError
from engine.progress import Progress
from engine.run import VERSION
from engine.train_step import TrainStep
from engine.trainer import (
    abort_if_diverged,
    estimate,
    restore,
    set_up,
    should_snapshot_guide,
    train,
    warn_if_short,
)
from tests.forked_script import ForkedScript
from tests.helpers import (
    API_FLAGS,
    CPU,
    CPU_TIER,
    TINY_FLAGS,
    FakeTime,
    logged_steps,
    random_images,
    read_rows,
)


def configure(**changes) -> Config:
    return resolve("folder", CPU_TIER, flags=API_FLAGS | changes)


def test_training_module_is_the_old_import_path(monkeypatch):
    monkeypatch.delitem(sys.modules, "engine.training", raising=False)
    with pytest.warns(RenamedWarning, match="engine.training is now engine.trainer"):
        module = importlib.import_module("engine.training")
    assert module.train is train


# What is trained.


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
    config.EPOCHS = config.MAX_STEPS = config.MINUTES = 0
    with pytest.raises(UserError, match=r"the run has no length\. Set EPOCHS, MAX_STEPS or MIN"):
        train(model, random_images(40, 8), config)
    assert not Path("checkpoints").exists()


def test_train_warns_of_images_without_labels_for_a_model_with_classes():
    config = configure(MAX_STEPS=1)
    model = DDPMModel.from_config(config, {"cat": 1, "dog": 1})
    with pytest.warns(FallbackWarning, match="has classes, but the images have no labels; contin"):
        trainer.set_up(model, ImageDataset(random_images(40, 8)), config, PartialState())


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


def test_train_snapshots_the_guide_from_the_ema_of_that_step(run_here, run_folder):
    flags = [*TINY_FLAGS, "--run_name"]
    run_here(run_folder, "train.py", *flags, "whole", "--max_steps", "8")
    run_here(run_folder, "train.py", *flags, "part", "--max_steps", "4", "--guide_fraction", "0")
    whole, part = (
        torch.load(run_folder / f"checkpoints/{name}/final.pt", weights_only=True)["ema"]
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


# Lengths and estimates.


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


def test_run_of_little_but_warm_up_warns_once_its_steps_are_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configure(WARMUP_STEPS=5, EPOCHS=2)
    line = "^only 8 steps, with a warm-up of 5; continuing without a guide. Train longer"
    with pytest.warns(FallbackWarning, match=line):
        train(DDPMModel.from_config(config), random_images(80, 8), config)
    with pytest.warns(FallbackWarning, match=line):
        estimate(DDPMModel.from_config(config), 80, config, 0.0)
    config = configure(WARMUP_STEPS=5, MINUTES=1e-9)
    with pytest.warns(FallbackWarning, match="with a warm-up of 5; continuing"):
        estimate(DDPMModel.from_config(config), 80, config, 0.0)
    with pytest.warns(FallbackWarning, match="^only 1 steps, with a warm-up of 5; continuing"):
        train(DDPMModel.from_config(config), random_images(80, 8), config)


def test_warn_if_short_is_silent_for_long_runs_and_for_a_set_number_of_steps():
    without_guide = configure(WARMUP_STEPS=5, EPOCHS=2, GUIDE_FRACTION=0.0)
    with pytest.warns(FallbackWarning, match="^only 8 steps, with a warm-up of 5. Train longer"):
        warn_if_short(without_guide, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_short(configure(WARMUP_STEPS=5, EPOCHS=3), 12)
        warn_if_short(configure(WARMUP_STEPS=5, MAX_STEPS=8), 8)


@pytest.mark.parametrize(("seconds", "images"), [(1, 8), (0.25, 32)])
def test_estimate_times_more_images_of_a_short_step_divided_among_ranks(
    seconds, images, monkeypatch
):
    clock = SimpleNamespace(perf_counter=itertools.count(step=seconds).__next__)
    monkeypatch.setattr(trainer, "time", clock)
    config = configure(MAX_STEPS=9, BATCH_SIZE=32)
    for ranks in (1, 2):
        dist = SimpleNamespace(num_processes=ranks, device=CPU)
        monkeypatch.setattr(trainer.distributed, "init", lambda dist=dist: dist)
        printed = estimate(DDPMModel.from_config(config), 80, config, 0.0)
        count = min(images, 32 // ranks)
        assert f"({seconds * 32 / count / ranks:.3f} s per step, measured)" in printed


# Resuming.


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


@pytest.mark.parametrize("name", [*GUIDANCE_OPTIONS, "sampling_timesteps", "dropout"])
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


def test_train_resumes_with_the_same_images_only(resumable, capsys):
    with pytest.raises(UserError, match="start a new run with --init_from checkpoints/whole/last"):
        resumable(MAX_STEPS=5, seed=1)
    last = Path("checkpoints/whole/last.pt")
    state = checkpoints.load(last)
    del state["data"]["fingerprint"]  # as earlier versions wrote it
    checkpoints.save(last, state)
    resumable(MAX_STEPS=5)
    assert "last.pt does not say which images it was trained on" in capsys.readouterr().out


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
    assert "64 images in" in capsys.readouterr().out
    assert final.read_bytes() == Path("checkpoints/whole/final.pt").read_bytes() and grid.exists()
    # Nor is validation repeated, or logged twice.
    assert logged_steps(Path(), "whole", "validation_loss") == [4]
    grid_time = Path("checkpoints/whole/final.pt").stat().st_mtime - 1
    os.utime(grid, (grid_time, grid_time))  # of an earlier, shorter run
    resumable()


def test_train_takes_a_checkpoint_that_was_read_already(trained_by_api, tmp_path, monkeypatch):
    shutil.copytree(trained_by_api, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    checkpoint = checkpoints.load_training(Path("checkpoints/whole/last.pt"))
    monkeypatch.setattr(checkpoints, "load", None)  # read once
    data = ImageDataset(random_images(80, 8))
    config = configure(MAX_STEPS=6)
    final = train(DDPMModel.from_config(config), data, config, checkpoint)
    assert torch.load(final, weights_only=True)["progress"]["step"] == 6


# What stops a run.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_train_saves_on_a_signal(number, run_folder):
    flags = [*TINY_FLAGS, "--run_name", "stopped", "--max_steps", "100000"]
    process = ForkedScript(run_folder, "train.py", *flags)
    metrics = run_folder / "samples" / "stopped" / "metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        assert process.returncode is None
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    line = r"interrupted at step (\d+)\. Resume with --resume stopped"
    step = int(re.search(line, output).group(1))
    state = torch.load(run_folder / "checkpoints/stopped/last.pt", weights_only=True)
    assert state["progress"]["step"] == step >= 10


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
