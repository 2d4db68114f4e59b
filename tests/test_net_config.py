"""The wiring of the configuration: who wins, what a name implies, what a size is kept for."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import config
import train
import train_optimized
import train_stl10_optimized
import train_true_high_res
from config import DDPMConfig, Tier, from_command_line, resolve
from engine import checkpoints, fitting
from tests.test_high_res import Here, tiny_config

CPU = Tier("CPU", 32, 0.0)
LARGE = Tier("Large", 256, 80.0)
SWITCHES = ("USE_AMP", "COMPILE_MODEL", "CUDA_GRAPH", "FIT_MEMORY")


# --- going on with a run

RUN = {"LEARNING_RATE": 0.0125, "DIM": 16, "DIM_MULTS": (1, 2), "IMAGE_SIZE": 8, "MAX_STEPS": 77}
RUN |= {"BATCH_SIZE": 6, "GRADIENT_ACCUMULATION": 4, "SEED": 3, "RUN_NAME": "mine"}


@pytest.fixture
def run(tmp_path, monkeypatch) -> dict:
    """The configuration of a run `mine` of train_optimized.py, which has saved a checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "detect_tier", lambda: CPU)
    made = resolve("shapes", CPU, train_optimized.DEFAULTS, flags=RUN).as_dict()
    empty = {key: {} for key in ("model", "ema", "optimizer", "progress")}
    checkpoints.save(Path("checkpoints/mine/last.pt"), {**empty, "run": "mine", "config": made})
    return made


@pytest.mark.parametrize("tier", [CPU, Tier("Tiny", 8, 0.01)])
@pytest.mark.parametrize("script", [train, train_stl10_optimized])
def test_resume_keeps_every_setting_of_the_run_whichever_script_and_machine(
    script, tier, run, monkeypatch
):
    monkeypatch.setattr(config, "detect_tier", lambda: tier)
    made, options = from_command_line("", script.DEFAULTS, ["--resume", "mine"])
    assert made.as_dict() == run
    assert (made.LR_SCHEDULE, made.origin["LR_SCHEDULE"]) == ("cosine", "checkpoint")
    assert options.resume == Path("checkpoints/mine/last.pt")


def test_resume_takes_what_is_named_now_and_nothing_else(run, tmp_path):
    (tmp_path / "own.py").write_text(
        "from config import DDPMConfig\nclass Own(DDPMConfig):\n    EMA_DECAY = 0.5\n"
    )
    flags = ["--learning_rate", "0.5", "--minutes", "3", "--config", "own.py:Own"]
    made, _ = from_command_line("", train.DEFAULTS, ["--resume", "mine", *flags])
    changed = {"LEARNING_RATE": 0.5, "MINUTES": 3.0, "MAX_STEPS": 0, "EMA_DECAY": 0.5}
    assert made.as_dict() == run | changed


def test_resume_trains_on_the_data_and_with_the_model_of_the_run(run, monkeypatch):
    """What train.py hands on, up to the training itself."""
    asked, handed = [], []
    images = np.zeros((40, 3, 8, 8), np.uint8)
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "mine"])
    monkeypatch.setattr(train, "load_images", lambda *what, **_: asked.append(what) or images)
    monkeypatch.setattr(train, "train", lambda *what: handed.append(what))
    train.main()
    assert asked == [("shapes", 8, Path("data"))]
    ((model, given, made, path),) = handed
    assert given is images and made.as_dict() == run
    assert path == Path("checkpoints/mine/last.pt")
    assert model.architecture["dim"] == 16 and model.image_size == 8


# --- what a machine or a name implies


@pytest.mark.parametrize("script", [train_optimized, train_stl10_optimized, train_true_high_res])
def test_a_cpu_has_every_switch_off_that_a_script_sets_unless_it_is_named(script):
    everything = script.DEFAULTS | dict.fromkeys(SWITCHES, True)
    for given in (script.DEFAULTS, everything):
        made = resolve("shapes", CPU, given)
        assert [name for name in SWITCHES if getattr(made, name)] == []
    assert all(made.origin[name] == "tier CPU" for name in SWITCHES)
    for name in SWITCHES:
        named = resolve("shapes", CPU, everything, flags={name: True})
        assert [other for other in SWITCHES if getattr(named, other)] == [name]
    made = resolve("shapes", LARGE, everything)
    assert [name for name in SWITCHES if getattr(made, name)] == list(SWITCHES)


class OwnBatch(DDPMConfig):
    BATCH_SIZE = 20


class OwnAccumulation(DDPMConfig):
    GRADIENT_ACCUMULATION = 2


class OwnWidth(DDPMConfig):
    DIM = 48


@pytest.mark.parametrize(
    ("subclass", "flags", "searched"),
    [
        (None, {}, True),
        (None, {"DIM": 32}, True),
        (OwnWidth, {}, True),
        (None, {"BATCH_SIZE": 16}, False),
        (None, {"GRADIENT_ACCUMULATION": 2}, False),
        (OwnBatch, {}, False),
        (OwnAccumulation, {}, False),
        (None, {"BATCH_SIZE": 16, "FIT_MEMORY": True}, True),
        (OwnAccumulation, {"FIT_MEMORY": True}, True),
    ],
)
def test_naming_batch_or_accumulation_stops_the_search_for_another(subclass, flags, searched):
    made = resolve("stl10", LARGE, {"FIT_MEMORY": True}, subclass, flags)
    assert made.FIT_MEMORY is searched
    assert (made.origin["FIT_MEMORY"] == "batch named") is not searched


@pytest.mark.parametrize(
    ("subclass", "flags", "batch"),
    [
        (OwnBatch, {}, (20, 1)),
        (OwnBatch, {"GRADIENT_ACCUMULATION": 3}, (20, 3)),
        (OwnAccumulation, {"BATCH_SIZE": 16}, (16, 2)),
        (None, {"BATCH_SIZE": 16}, (16, 1)),
    ],
)
def test_a_named_batch_is_that_batch_and_a_named_accumulation_stays(subclass, flags, batch):
    small = Tier("Small", 64, 3.0)  # which would split the preset's batch
    made = resolve("stl10", small, {"GRADIENT_ACCUMULATION": 5}, subclass, flags)
    found = made.BATCH_SIZE, made.GRADIENT_ACCUMULATION
    assert found == batch


# --- what fits


@pytest.fixture
def fitted(tmp_path, monkeypatch):
    """fitted(**changes): how many sizes are tried for a configuration, on a GPU that is made up."""
    trials = []

    def trial(make, config, steps):
        trials.append(config.BATCH_SIZE)
        return {"peak_gib": 1.0}

    monkeypatch.setattr(fitting, "Processes", Here)
    monkeypatch.setattr(fitting, "trial", trial)
    monkeypatch.setattr(fitting, "memory_limit", lambda: 24 * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 * 2**30, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "card")
    images = np.zeros((1, 3, 16, 16), np.uint8)

    def count(**changes) -> int:
        trials.clear()
        fitting.fit(None, tiny_config(**changes), images, tmp_path / "memory.json")
        return len(trials)

    return count


@pytest.mark.parametrize(
    "changes",
    [
        {"GUIDE_AT": 0.0},
        {"IMAGE_SIZE": 32},
        {"DIM": 16},
        {"DIM_MULTS": (1, 2, 2, 2)},
        {"ATTENTION_HEADS": (2,)},
        {"ATTENTION_DIM": (16,)},
        {"FULL_ATTENTION_SIZE": 8},
        {"DROPOUT": 0.0},
        {"USE_AMP": True},
        {"OPTIMIZER": "adam"},
        {"COMPILE_MODEL": True},
        {"CUDA_GRAPH": True},
        {"GRADIENT_CHECKPOINTING": True},
        {"NUM_SAMPLES": 3},
        {"BATCH_SIZE": 8},
        {"BATCH_SIZE": 4, "GRADIENT_ACCUMULATION": 2},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_fit_tries_again_for_whatever_takes_memory(changes, fitted):
    assert fitted() > 0 and fitted() == 0
    assert fitted(**changes) > 0 and fitted(**changes) == 0
    assert fitted() == 0


def test_fit_remembers_a_size_whatever_takes_no_memory(fitted):
    assert fitted() > 0
    assert fitted(SEED=5, LEARNING_RATE=0.25, RUN_NAME="other", MAX_STEPS=9) == 0
    assert fitted(GUIDE_AT=0.75) == 0  # a guide is a guide, whenever it is kept
    assert fitted(BATCH_SIZE=2, GRADIENT_ACCUMULATION=2) == 0  # the same effective batch


def test_search_leaves_some_of_the_room_free(monkeypatch):
    capped, limits = [], []

    def largest(peak, batch, limit, whole_first):
        limits.append(limit)
        return 2, 1.0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fitting, "cap_memory", capped.append)
    monkeypatch.setattr(fitting, "largest_micro_batch", largest)
    found = fitting.search(None, tiny_config(), 20.0)
    assert found == {"micro_batch": 2, "peak_gib": 1.0}
    assert capped == limits == [pytest.approx(19.0)]
