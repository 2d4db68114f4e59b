"""A run: who may train it, what is due when, and what it writes."""

import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from config import Config, resolve
from ddpm_model import DDPMModel
from engine import checkpoints, plots, progress, run
from engine.dataloader import Batch, BatchLoader, ImageDataset
from engine.errors import FallbackWarning, UserError
from engine.progress import Progress
from engine.run import MetricsLog, Run
from engine.trackers import Tracker
from engine.train_step import TrainStep
from tests.forked_script import ForkedScript
from tests.helpers import (
    ALONE,
    CPU,
    CPU_TIER,
    ROOT,
    TINY_FLAGS,
    FakeTime,
    hold_lock,
    logged_steps,
    random_images,
    read_rows,
)

FLAGS = {
    "IMAGE_SIZE": 8, "DIM": 8, "DIM_MULTS": (1, 2), "TIMESTEPS": 40, "SAMPLING_TIMESTEPS": 4,
    "BATCH_SIZE": 16, "WARMUP_STEPS": 1, "CHECKPOINT_EVERY": 0, "NUM_SAMPLE_GRIDS": 0,
    "GRID_IMAGES": 4,
}  # fmt: skip
IMAGES = random_images(80, 8)
SCALAR = torch.tensor(0.5)
NO_TRACKER = Tracker("none", "", Path(), {})


def configure(**changes) -> Config:
    return resolve("folder", CPU_TIER, flags=FLAGS | changes)


def make_step() -> TrainStep:
    config = configure(MAX_STEPS=100)
    return TrainStep(DDPMModel.from_config(config).train(), config)


@pytest.fixture
def clock(monkeypatch) -> FakeTime:
    fake = FakeTime()
    for module in (run, progress):
        monkeypatch.setattr(module, "time", fake)
    return fake


# Locks.


def make_run(name: str, **progress) -> Run:
    step = make_step()
    loader = BatchLoader(ImageDataset(IMAGES), 16, 0, CPU, 1)
    return Run(name, {}, step, loader, Progress(step.config, len(loader), ALONE, **progress))


def test_run_belongs_to_one_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handle = hold_lock("mine")
    with pytest.raises(UserError, match="run mine is being trained by another process"):
        make_run("mine")
    os.close(handle)
    make_run("mine").close()
    make_run("mine").close()


HOLDER = f"""
import sys
import time
from pathlib import Path

from torch.utils.data import DataLoader

sys.path.insert(0, {str(ROOT)!r})
from tests.test_run import make_run

run = make_run("mine")
batches = iter(DataLoader(range(10**9), num_workers=1, multiprocessing_context="fork"))
next(batches)
Path("training").touch()
time.sleep(1000)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_run_is_not_locked_by_a_data_worker_of_a_killed_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("holder.py").write_text(HOLDER)
    holder = ForkedScript(tmp_path, tmp_path / "holder.py")
    while not Path("training").exists():
        assert holder.returncode is None, holder.communicate()
        time.sleep(0.02)
    with pytest.raises(UserError, match="being trained by another process"):
        make_run("mine")
    holder.kill()
    # Before version 4 of filelock, the lock is free once the worker has noticed, after 5 seconds.
    deadline = time.monotonic() + 240
    while True:
        try:
            make_run("mine").close()
            break
        except UserError:
            assert time.monotonic() < deadline


# What is due.


@pytest.fixture
def made_run(tmp_path, monkeypatch, clock):
    """A run of 100 steps that notes in `files` what it would save or sample."""
    monkeypatch.chdir(tmp_path)
    made = make_run("mine")
    made.files = []
    for method in ("save", "sample_grid"):
        monkeypatch.setattr(made, method, lambda file, **_: made.files.append(file))
    yield made
    made.close()


def test_run_saves_last_every_few_minutes(made_run, clock):
    assert made_run.config.SAVE_EVERY_MINUTES == 2
    due = []
    for second in range(1, 301):
        clock.now = 1000.0 + second
        made_run.after_step(SCALAR, SCALAR, 1e-3)
        due += [second] * (len(made_run.files) - len(due))
    assert due == [120, 240] and made_run.files == ["last.pt", "last.pt"]


def test_run_validates_a_fiftieth_of_the_time_once_epochs_are_many(made_run, clock, monkeypatch):
    validated = []

    def validate(batch: Batch) -> float:
        assert torch.equal(batch.images, torch.from_numpy(IMAGES[::20]))
        validated.append(clock.now - 1000)
        clock.now += 1
        return 0.5

    monkeypatch.setattr(made_run.train_step, "validate", validate)
    for epoch, second in [(1, 10), (5, 20), (6, 69), (7, 70), (8, 119), (9, 121)]:
        made_run.progress.epoch, clock.now = epoch, 1000.0 + second
        made_run.after_epoch()
    assert validated == [10, 20, 70, 121]
    made_run.progress.step = 100  # the run is finished
    made_run.after_epoch()
    assert len(validated) == 5


def test_run_saves_as_best_the_lowest_validation_loss(made_run, monkeypatch):
    losses, best, saves = [-math.inf, 0.5, 0.6, 0.4, 0.4, -0.1], [], []
    for loss in losses:
        monkeypatch.setattr(made_run.train_step, "validate", lambda _, loss=loss: loss)
        made_run.progress.step += 1
        made_run.after_epoch()
        best.append(made_run.progress.best)
        saves.append(len(made_run.files))
    assert best == [None, 0.5, 0.5, 0.4, 0.4, -0.1] and saves == [0, 1, 1, 2, 2, 3]
    assert set(made_run.files) == {"best.pt"}
    rows = plots.read_metrics(Path("samples/mine/metrics.jsonl"))
    assert [row["validation_loss"] for row in rows] == losses


def take_100_steps(made_run: Run, clock: FakeTime) -> None:
    for step in range(1, 101):
        clock.now += 1
        made_run.progress.step = step
        made_run.after_step(SCALAR, SCALAR, 1e-3)


def test_run_keeps_every_few_epochs_when_they_are_complete(made_run, monkeypatch):
    monkeypatch.setattr(made_run, "validate", lambda: None)
    made_run.config.CHECKPOINT_EVERY = 3
    for epoch, epoch_step in [(1, 0), (3, 2), (3, 0), (4, 0), (6, 0)]:
        made_run.progress.epoch = epoch
        made_run.progress.epoch_step = epoch_step
        made_run.after_epoch()
    assert made_run.files == ["epoch_0003.pt", "epoch_0006.pt"]


def test_run_keeps_checkpoints_at_the_ends_of_equal_parts_but_the_last(made_run, clock):
    made_run.config.CHECKPOINT_EVERY = None
    made_run.config.KEEP = 3
    take_100_steps(made_run, clock)
    assert made_run.files == [f"step_{step:07d}.pt" for step in (25, 50, 75)]


def test_run_warns_of_a_disk_that_is_too_small(made_run, monkeypatch):
    made_run.config.CHECKPOINT_EVERY = None
    made_run.config.KEEP = 3
    size = run.checkpoint_bytes(made_run.train_step)
    usage = SimpleNamespace(free=6 * size)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: usage)
    made_run.warn_of_small_disk()  # 3 and last, best and one being written
    usage.free -= 1
    with pytest.warns(FallbackWarning, match=r"may need .* has only .* free \(lower --keep, or"):
        made_run.warn_of_small_disk()
    made_run.config.CHECKPOINT_EVERY = 1
    with pytest.warns(FallbackWarning, match=r"\(raise --checkpoint_every, or free some\); cont"):
        made_run.warn_of_small_disk()


def test_checkpoint_bytes_is_the_size_of_a_file(tmp_path):
    step = make_step()
    expected = run.checkpoint_bytes(step)
    step.ema.snapshot_guide()
    torch.save(step.state_dict(), tmp_path / "last.pt")
    assert 0.7 < expected / (tmp_path / "last.pt").stat().st_size < 1  # names add most


def test_run_whose_weights_are_useless_is_not_published(made_run):
    made_run.validation_loss = math.inf
    with pytest.raises(UserError, match=r"the validation loss is inf\. Start again with a lower"):
        made_run.on_finish()
    assert made_run.files == ["final.pt"] and not Path("checkpoints/ddpm_final.pt").exists()


@pytest.mark.parametrize("end, file", [("on_finish", "final.pt"), ("on_interrupt", "last.pt")])
def test_run_whose_last_checkpoint_does_not_fit_saves_its_weights(
    end, file, made_run, monkeypatch, capsys
):
    def full(path: Path, state: dict) -> None:
        raise OSError(28, "No space left on device", str(path))

    made_run.validation_loss = 0.5
    monkeypatch.setattr(run.checkpoints, "save", full)
    monkeypatch.setattr(made_run, "save", Run.save.__get__(made_run))
    with pytest.raises(OSError, match=file):
        getattr(made_run, end)()
    model = DDPMModel.from_file("checkpoints/mine/weights.safetensors")
    expected = made_run.train_step.ema.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    printed = capsys.readouterr().out
    assert "the weights alone are in checkpoints/mine/weights.safetensors" in printed
    assert "could not be saved. Start it again (run mine has saved nothing yet)" in printed


def test_run_samples_grids_at_the_ends_of_equal_parts_but_the_last(made_run, clock):
    made_run.config.NUM_SAMPLE_GRIDS = 4
    take_100_steps(made_run, clock)
    assert made_run.files == [f"step_{step:07d}.png" for step in (25, 50, 75)]


def test_run_in_minutes_spends_a_tenth_of_its_time_on_grids(made_run, clock, monkeypatch):
    started = []

    def sample_grid(file: str) -> None:
        started.append(clock.now - 1000)
        clock.now += 2

    monkeypatch.setattr(made_run, "sample_grid", sample_grid)
    made_run.config.NUM_SAMPLE_GRIDS = 10
    made_run.config.MAX_STEPS, made_run.config.MINUTES = 0, 100 / 60
    for step in range(1, 101):
        clock.now = max(clock.now, 1000.0 + step)
        made_run.progress.step, made_run.progress.seconds = step, clock.now - 1000
        made_run.after_step(SCALAR, SCALAR, 1e-3)
    assert started == [10, 30, 50, 70, 90]


def test_run_logs_the_speed_since_the_last_line(made_run, clock):
    for seconds, images, step in [(5, 50, 10), (1, 20, 20)]:
        clock.now += seconds
        made_run.progress.step = step
        made_run.progress.images += images
        made_run.after_step(SCALAR, SCALAR, 1e-3)
    rows = plots.read_metrics(Path("samples/mine/metrics.jsonl"))
    assert [row["images_per_second"] for row in rows] == [10, 20]


def test_run_continues_parts_speed_and_tracker_from_its_checkpoint(tmp_path, monkeypatch, clock):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(FLAGS, "LOG_WITH", "none")
    trackers = []
    monkeypatch.setattr(run, "Tracker", lambda *a: trackers.append(a) or NO_TRACKER)
    made = make_run("mine", step=59, images=59 * 16)
    assert (trackers[0][0], trackers[0][-1]) == ("none", 59)
    made.config.CHECKPOINT_EVERY = None
    made.config.NUM_SAMPLE_GRIDS = 4
    for method in ("save", "sample_grid"):  # neither is due at 60 %
        monkeypatch.setattr(made, method, pytest.fail)
    made.progress.advance(16)
    clock.now += 2
    made.config.KEEP = 3
    made.after_step(SCALAR, SCALAR, 1e-3)
    made.close()
    (row,) = plots.read_metrics(Path("samples/mine/metrics.jsonl"))
    assert (row["step"], row["images_per_second"]) == (60, 8)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, ValueError, IndexError])
def test_run_continues_without_a_grid_that_fails(error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = make_run("mine")

    def fail(*_, **__):
        raise error("no grid")

    monkeypatch.setattr(made.train_step.ema, "sample", fail)
    with pytest.warns(FallbackWarning, match=r"step.png failed \(.*\); continuing"):
        made.sample_grid("step.png")
    made.close()


@pytest.mark.parametrize(
    ("num_classes", "grid_images", "shown", "columns"),
    [
        (30, 64, range(0, 30, 3), 6), (10, 64, range(10), 6), (2, 9, (0, 1), 4), (3, 4, (0, 1), 2),
        (5, 1, (0,), 1),
    ],
)  # fmt: skip
def test_sample_grid_spreads_readable_rows_over_the_classes(
    num_classes, grid_images, shown, columns, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    made = make_run("mine")
    made.config.GRID_IMAGES = grid_images
    pairs, tables = [], []

    def sample(count, *, seed, labels):
        pairs.extend(zip(labels, seed, strict=True))
        return torch.zeros(count, 3, 8, 8)

    def table(images, rows, headings):
        tables.append((rows, headings))
        return Image.new("L", (1, 1))

    made.train_step.ema.class_names = [f"class {label}" for label in range(num_classes)]
    monkeypatch.setattr(made.train_step.ema, "sample", sample)
    monkeypatch.setattr(plots, "table", table)
    made.sample_grid("step.png")
    made.close()
    assert pairs == [(label, seed) for label in shown for seed in range(columns)]
    headings = [f"seed {seed}" for seed in range(columns)]
    assert tables == [([f"class {label}" for label in shown], headings)]


# Metrics.


def test_metrics_log_hands_rows_and_grids_to_its_tracker(tmp_path):
    calls = []
    tracker = SimpleNamespace(
        log=lambda values, step: calls.append((values, step)),
        log_grid=lambda path, step: calls.append((path.is_file(), path.name, step)),
        close=lambda: calls.append("closed"),
    )
    reached = Progress(None, 4, ALONE, step=20)
    log = MetricsLog(tmp_path, reached, tracker)
    log.write_scalars(reached, loss=1.0)
    log.write_grid(Image.new("RGB", (8, 8)), 20, "grid.png")
    log.close()
    assert calls == [({"loss": 1.0}, 20), (True, "grid.png", 20), "closed"]


def test_metrics_log_drops_rows_after_the_resumed_checkpoint(tmp_path):
    for step in (10, 20, 30):
        reached = Progress(None, 4, ALONE, step=step)
        log = MetricsLog(tmp_path, reached, NO_TRACKER)
        log.write_scalars(reached, loss=1.0)
        log.close()
    MetricsLog(tmp_path, Progress(None, 4, ALONE, step=20), NO_TRACKER).close()
    assert [row["step"] for row in plots.read_metrics(tmp_path / "metrics.jsonl")] == [10, 20]


def test_train_rebuilds_damaged_metrics(resumable):
    metrics, before = Path("samples/whole/metrics.jsonl"), read_rows(Path(), "whole")
    metrics.write_bytes(metrics.read_bytes() + b'3\n{"step": "4"}\n[]\n\xff{"step": 4, "loss"')
    resumable(MAX_STEPS=5)
    rows = read_rows(Path(), "whole")
    assert len(before) >= 2 and rows[: len(before)] == before
    assert {row["step"] for row in rows[len(before) :]} == {5}


def test_validation_is_logged_once_if_a_killed_process_has(resumable):
    # Killed after the validation of an epoch whose last step is last.pt's.
    last = Path("checkpoints/whole/last.pt")
    state = checkpoints.load(last)
    state["progress"] |= {"epoch": 0, "position": 4}
    checkpoints.save(last, state)
    Path("checkpoints/whole/final.pt").unlink()
    resumable(MAX_STEPS=8)
    assert logged_steps(Path(), "whole", "validation_loss") == [4, 8]


# All files of a run.


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
