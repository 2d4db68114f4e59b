"""The wiring of a run: which weights are published, which clock counts, what is due and when."""

import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from config import Resolved, Tier, resolve
from ddpm_model import DDPMModel
from engine import checkpoints, plots, runs, training
from engine.batches import Batches
from engine.errors import UserError
from engine.runs import Clock, Log, give_back
from engine.step import Step
from engine.training import Record, duration, guide_is_due, rng, set_rng, stop_if_broken, train

FLAGS = {"IMAGE_SIZE": 8, "DIM": 8, "DIM_MULTS": (1, 2), "TIMESTEPS": 40, "SAMPLING_TIMESTEPS": 4}
FLAGS |= {"BATCH_SIZE": 16, "WARMUP_STEPS": 1, "LEARNING_RATE": 0.03, "GUIDE_AT": 0.5}
FLAGS |= {"CHECKPOINT_EVERY": 0, "SAMPLE_GRIDS": 0, "NUM_SAMPLES": 4}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More than one only wait for each other where networks are this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def configure(**changes) -> Resolved:
    return resolve("folder", Tier("CPU", 32, 0.0), flags=FLAGS | changes)


def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (80, 3, 8, 8), np.uint8)


def make_step() -> Step:
    config = configure(MAX_STEPS=100)
    return Step(DDPMModel.from_config(config).train(), config)


class Time:
    """Stands in for the module time; passes when told."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch) -> Time:
    time = Time()
    for module in (runs, training):
        monkeypatch.setattr(module, "time", time)
    return time


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a finished run `whole` of 4 steps, which are an epoch."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = configure(MAX_STEPS=4, RUN_NAME="whole")
        train(DDPMModel.from_config(config), images(), config)
    return folder


@pytest.mark.parametrize("file", ["ddpm_final.pt", "whole/final.pt", "whole/last.pt"])
def test_a_run_is_drawn_with_its_averaged_weights(trained, file):
    path = trained / "checkpoints" / file
    state, model = checkpoints.load(path), DDPMModel().load_model(path)
    assert state["ema"].keys() > state["model"].keys()  # the guide's come on top
    for name, value in model.state_dict().items():
        assert torch.equal(value, state["ema"][name]), name
    picture = np.asarray(Image.open(trained / "samples" / "whole" / "final.png"))
    assert np.array_equal(picture, plots.grid(model.sample(4, seed=range(4))))
    model.load_state_dict(state["model"])
    assert not np.array_equal(picture, plots.grid(model.sample(4, seed=range(4))))


# --- which clock


def clock_of(seconds: float = 0.0, step: int = 0, **changes) -> Clock:
    progress = {"step": step, "epoch": 0, "position": 0, "images": 0, "seconds": seconds}
    return Clock(configure(**changes), 4, progress, SimpleNamespace(num_processes=1))


def test_a_clock_goes_on_with_the_seconds_of_earlier_sessions(time):
    clock = clock_of(seconds=30, step=10, MINUTES=1)
    assert clock.fraction() == 0.5
    time.now += 6
    clock.tick()
    assert (clock.progress["seconds"], clock.progress["step"]) == (36, 11)
    assert clock.fraction() == 0.6 and clock.total() == round(11 / 0.6)
    time.now += 23.9
    clock.tick()
    assert not clock.finished()
    time.now += 0.2
    clock.tick()
    assert clock.finished()


def test_a_run_of_steps_does_not_look_at_the_clock(time):
    clock = clock_of(seconds=1e6, step=98, MAX_STEPS=100)
    time.now += 1e6
    clock.tick()
    assert (clock.fraction(), clock.total(), clock.finished()) == (0.99, 100, False)


def test_a_resumed_run_has_what_is_left_of_its_minutes(trained, tmp_path, monkeypatch, time):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    last = Path("checkpoints/whole/last.pt")
    state = checkpoints.load(last)
    state["progress"]["seconds"] = 57.0
    checkpoints.save(last, state)
    config = configure(MINUTES=1)
    model = DDPMModel.from_config(config)

    def pass_time(module, *_):
        time.now += 2 * module.training

    model.register_forward_hook(pass_time)
    progress = checkpoints.load(train(model, images(), config, last))["progress"]
    assert (progress["step"], progress["seconds"], progress["images"]) == (6, 61, 96)
    rates = [row["learning_rate"] for row in plots.read_metrics(Path("samples/whole/metrics.jsonl"))
             if "learning_rate" in row and row["step"] > 4]  # fmt: skip
    assert (
        len(rates) == 1 and 0 < rates[0] < 0.01 * 0.03
    )  # the schedule is where it was, at its end


def test_the_speed_is_that_since_the_last_line(tmp_path, time):
    log = Log(tmp_path, {"step": 4, "images": 100})
    time.now += 5
    assert log.speed(150) == 10
    time.now += 1
    assert log.speed(170) == 20
    log.close()


# --- what stops a run


def test_only_updates_skipped_in_a_row_stop_a_run():
    step = make_step()

    def update(loss: float, times: int = 1) -> None:
        for _ in range(times):
            step.update(torch.tensor(loss))

    for _ in range(3):
        update(1.0)
        update(float("nan"), 19)
        stop_if_broken(step, 20, "mine")
    assert step.skipped.item() == 57
    update(float("inf"))
    with pytest.raises(UserError, match="20 updates in a row were not finite; stopped at step 61"):
        stop_if_broken(step, 61, "mine")


# --- what is due


def test_the_guide_waits_for_its_share_and_for_twice_the_warm_up():
    config = SimpleNamespace(GUIDE_AT=0.125, WARMUP_STEPS=10)
    assert not guide_is_due(config, 15, 0.5)
    assert not guide_is_due(config, 19, 1.0)
    assert guide_is_due(config, 20, 0.125)
    assert not guide_is_due(config, 1000, 0.124)
    assert not guide_is_due(SimpleNamespace(GUIDE_AT=0, WARMUP_STEPS=10), 1000, 1.0)


@pytest.fixture
def record(tmp_path, monkeypatch, time):
    """The record of a run of 100 steps that notes what it would save, in `saved`, or draw."""
    monkeypatch.chdir(tmp_path)
    step, batches = make_step(), Batches(images(), 16, 0, torch.device("cpu"), 1)
    progress = {"step": 0, "epoch": 0, "position": 0, "images": 0, "seconds": 0.0, "best": None}
    clock = Clock(step.config, len(batches), progress, SimpleNamespace(num_processes=1))
    record = Record("mine", {}, step, batches, clock)
    record.saved = []
    for method in ("save", "draw_grid"):
        monkeypatch.setattr(record, method, record.saved.append)
    yield record
    record.bar.close()
    record.log.close()
    give_back("mine")


def test_last_is_saved_every_so_many_minutes(record, time):
    assert record.config.SAVE_MINUTES == 2
    due = []
    for second in range(1, 301):
        time.now = 1000.0 + second
        record.save_if_due()
        due += [second] * (len(record.saved) - len(due))
    assert due == [120, 240] and record.saved == ["last.pt", "last.pt"]


def test_validation_takes_a_fiftieth_of_the_time_once_epochs_are_many(record, time, monkeypatch):
    validated = []

    def validate(held_out: torch.Tensor) -> float:
        assert torch.equal(held_out, torch.from_numpy(images()[::20]))
        validated.append(time.now - 1000)
        time.now += 1
        return 0.5

    monkeypatch.setattr(record.step, "validate", validate)
    for epoch, second in [(1, 10), (5, 20), (6, 69), (7, 70), (8, 119), (9, 121)]:
        record.progress["epoch"], time.now = epoch, 1000.0 + second
        record.validate_if_due()
    assert validated == [10, 20, 70, 121]
    record.progress["step"] = 100  # the run is over
    record.validate_if_due()
    assert len(validated) == 5


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(record, monkeypatch):
    losses, best, saves = [0.5, 0.6, 0.4, 0.4, 0.45], [], []
    for loss in losses:
        monkeypatch.setattr(record.step, "validate", lambda _, loss=loss: loss)
        record.validate_if_due()
        best.append(record.progress["best"])
        saves.append(len(record.saved))
    assert best == [0.5, 0.5, 0.4, 0.4, 0.4] and saves == [1, 1, 2, 2, 2]
    assert set(record.saved) == {"best.pt"}
    rows = plots.read_metrics(Path("samples/mine/metrics.jsonl"))
    assert [row["validation_loss"] for row in rows] == losses


def test_every_so_many_th_epoch_is_kept_when_it_is_over(record):
    record.config.CHECKPOINT_EVERY = 3
    for epoch, position in [(1, 0), (3, 2), (3, 0), (4, 0), (6, 0)]:
        record.progress |= {"epoch": epoch, "position": position}
        record.keep_epoch_if_due()
    assert record.saved == ["epoch_0003.pt", "epoch_0006.pt"]


def test_grids_are_drawn_at_the_ends_of_equal_parts_but_the_last(record):
    record.config.SAMPLE_GRIDS = 4
    for step in range(1, 101):
        before = record.clock.fraction()
        record.progress["step"] = step
        record.show(before)
    assert record.saved == [f"step_{step:07d}.png" for step in (25, 50, 75)]


def test_the_state_of_both_random_generators_is_put_back():
    state = rng()
    drawn = random.random(), torch.rand(1).item()
    set_rng(state)
    assert (random.random(), torch.rand(1).item()) == drawn


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(119, "119 seconds"), (150, "2.5 minutes"), (9000, "2.5 hours"), (216_000, "2.5 days")],
)
def test_duration_is_in_the_unit_that_a_person_would_use(seconds, text):
    assert duration(seconds) == text
