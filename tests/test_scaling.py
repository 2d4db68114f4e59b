"""scaling.py: what each rank measures, how it is launched, and what the rows add up to."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import scaling
from engine import benchmarking
from engine.errors import UserError
from scaling import ScalingSettings
from tests.helpers import CPU


def settings(**values) -> ScalingSettings:
    small = {"DIM": 8, "IMAGE_SIZE": 16, "BATCHES": (3, 5), "LARGE_BATCH": 2}
    return ScalingSettings(**small | {"EFFECTIVE_BATCH": 16, "STEPS": 10, "SECONDS": 6.0} | values)


def ranks(count: int, index: int = 0) -> SimpleNamespace:
    """A PartialState of one of several ranks."""
    return SimpleNamespace(
        device=CPU, num_processes=count, process_index=index, is_main_process=index == 0
    )


# --- on each rank


def test_configuration_is_the_presets_with_the_local_batch():
    config = scaling.preset_config(settings(), "cifar10", 7)
    assert (config.BATCH_SIZE, config.GRADIENT_ACCUMULATION) == (7, 1)
    assert (config.DIM, config.IMAGE_SIZE, config.DATASET) == (8, 16, "cifar10")
    config = scaling.preset_config(settings(), "stl10", 8)
    assert (config.BATCH_SIZE, config.GRADIENT_ACCUMULATION) == (2, 4)
    config = scaling.preset_config(ScalingSettings(), "stl10", 64)
    assert (config.BATCH_SIZE, config.DIM, config.IMAGE_SIZE) == (64, 128, 96)


@pytest.fixture
def measured(monkeypatch) -> list[tuple]:
    """Replaces what is measured: records the arguments, returns rows."""
    calls = []

    def our_step(config, device, rank, world_size):
        calls.append((config, rank, world_size))

    def time_steps(make_step, images, device, seconds):
        make_step()
        calls[-1] += (images, seconds)
        return {"images_per_second": float(images), "rounds": [1.0]}

    def learning_curve(config, device, steps, seed, rank, world_size):
        calls.append((config, steps, seed, rank, world_size))
        return {"losses": [1.0] * steps, "validation_loss": 0.5}

    monkeypatch.setattr(scaling, "our_step", our_step)
    monkeypatch.setattr(scaling, "learning_curve", learning_curve)
    monkeypatch.setattr(benchmarking, "time_steps", time_steps)
    return calls


def test_work_is_divided_among_ranks(measured):
    def work(count: int, **values) -> list[tuple]:
        rows = scaling.run_measurements(settings(**values), ranks(count))
        return [(row["kind"], row.get("preset"), row.get("batch"), row.get("seed")) for row in rows]

    weak = [("weak", "cifar10", 3, None), ("weak", "cifar10", 5, None), ("weak", "stl10", 2, None)]
    strong = [("strong", "cifar10", 4, None), ("strong", "stl10", 4, None)]
    assert work(4) == [*weak, *strong, ("loss", None, None, 0)]
    assert work(1)[-3:] == [("loss", None, None, seed) for seed in scaling.SEEDS]
    assert work(4, STEPS=0) == [*weak, *strong]


def test_speed_is_that_of_all_ranks(measured):
    rows = list(scaling.run_measurements(settings(STEPS=0), ranks(4, index=3)))
    for row, (config, rank, world_size, images, seconds) in zip(rows, measured, strict=True):
        assert (rank, world_size, seconds) == (3, 4, 6.0)
        assert config.BATCH_SIZE * config.GRADIENT_ACCUMULATION == row["batch"]
        assert images == 4 * row["batch"] == row["images_per_second"]
        assert (config.DATASET, config.DIM) == (row["preset"], row["dim"])
        assert (row["image_size"], row["dim_mults"]) == (16, config.DIM_MULTS)


def test_loss_is_of_the_effective_batch(measured):
    *_, row = scaling.run_measurements(settings(), ranks(4, index=3))
    config, steps, seed, rank, world_size = measured[-1]
    assert (steps, seed, rank, world_size) == (10, 0, 3, 4)
    assert (config.BATCH_SIZE, config.DATASET) == (4, "cifar10")
    expected = {"kind": "loss", "seed": 0, "steps": 10, "effective_batch": 16}
    assert row == expected | {"validation_loss": 0.5}


@pytest.mark.parametrize("index", [0, 1])
def test_rank_0_writes_the_rows(monkeypatch, tmp_path, capsys, index):
    class Session(SimpleNamespace):
        def __enter__(self):
            return ranks(2, index)

        def __exit__(self, *_):
            return None

    rows = [{"kind": "weak", "batch": 3}, {"kind": "loss", "seed": 0}]
    monkeypatch.setattr(scaling, "session", lambda hint: Session())
    monkeypatch.setattr(scaling, "run_measurements", lambda settings, dist: map(dict, rows))
    path = tmp_path / "rows.jsonl"
    path.touch()
    scaling.run_rank(settings(), path)
    expected = [] if index else [row | {"processes": 2} for row in rows]
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected
    assert len(capsys.readouterr().out.splitlines()) == len(expected)


# --- launching


FAKE_SCRIPT = """
import json, os, sys, time
from pathlib import Path
rank = int(os.environ["RANK"])
if rank == 0:
    row = {"arguments": sys.argv[1:-1], "processes": int(os.environ["WORLD_SIZE"])}
    Path(sys.argv[-1]).write_text(json.dumps(row) + "\\n")
time.sleep(600 * ("hang" in sys.argv))
sys.exit(rank * ("fail" in sys.argv))
"""


@pytest.mark.parametrize(
    ("argument", "limit", "problem"),
    [
        ("succeed", 100.0, ""),
        ("fail", 100.0, "2 processes failed"),
        ("hang", 20.0, "2 processes took more than 20 s"),
    ],
)
def test_launch_returns_rows_and_what_failed(monkeypatch, tmp_path, argument, limit, problem):
    class Process(subprocess.Popen):
        """Takes too long once rank 0 has written its row."""

        def wait(self, timeout=None):
            assert timeout in (limit, None)
            while timeout == 20 and not Path(self.args[-1]).stat().st_size:
                time.sleep(0.01)
            if timeout == 20:
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Process)
    script = tmp_path / "fake.py"
    script.write_text(FAKE_SCRIPT)
    monkeypatch.setattr(scaling, "__file__", str(script))
    monkeypatch.setattr(sys, "argv", ["scaling.py", argument])
    rows, found = scaling.launch(2, limit)
    assert found == problem
    assert rows == [{"arguments": [argument, "--worker"], "processes": 2}]


# --- rows


def speed(kind: str, processes: int, batch: int, rate: float, preset: str = "cifar10") -> dict:
    row = {"kind": kind, "preset": preset, "processes": processes, "batch": batch}
    return row | {"images_per_second": rate, "image_size": 32, "dim": 64, "dim_mults": [1, 2]}


def loss(processes: int, seed: int, value: float) -> dict:
    return {"kind": "loss", "processes": processes, "seed": seed, "validation_loss": value}


def test_efficiency_is_over_single_gpus_with_the_same_work():
    rows = [
        speed("weak", 1, 128, 100.0), speed("weak", 1, 512, 300.0), speed("strong", 1, 512, 300.0),
        speed("strong", 1, 512, 10.0, "stl10"), speed("weak", 4, 128, 360.0),
        speed("weak", 4, 512, 600.0), speed("strong", 4, 128, 900.0),
        speed("strong", 4, 128, 38.0, "stl10"), speed("weak", 4, 64, 9.0, "stl10"),
    ]  # fmt: skip
    losses = [loss(1, seed, 0.1 + seed / 100) for seed in scaling.SEEDS] + [loss(4, 0, 0.11)]
    report = [*rows, *losses]
    assert "0.01000 (4 ranks): within" in scaling.summarize(report)
    efficiencies = [row.get("efficiency") for row in rows]
    assert efficiencies == [1, 1, 1, 1, 0.9, 0.5, 0.75, 0.95, None]

    result = {"device": "none", "torch": "0", "rows": report}
    table = benchmarking.markdown_section("", result).splitlines()[4:]
    assert table[0].endswith("| ranks | batch | images/s | efficiency |")
    assert len(table) == 2 + len(rows)  # the losses are in no row
    start = table.index("| weak | cifar10 | 32 | 64 | 1,2 | 1 | 128 | 100 | 100.0% |")
    assert table[start + 1 : start + 4] == [
        "| weak | cifar10 | 32 | 64 | 1,2 | 4 | 128 | 360 | 90.0% |",
        "| weak | cifar10 | 32 | 64 | 1,2 | 1 | 512 | 300 | 100.0% |",
        "| weak | cifar10 | 32 | 64 | 1,2 | 4 | 512 | 600 | 50.0% |",
    ]


@pytest.mark.parametrize(("value", "verdict"), [(0.105, ": within"), (0.13, ": not within")])
def test_losses_agree_if_they_differ_less_than_seeds_do(value, verdict):
    rows = [loss(1, 0, 0.11), loss(1, 1, 0.10), loss(1, 2, 0.115), loss(2, 0, 0.11)]
    assert "too few" in scaling.summarize(rows[1:]) and "too few" in scaling.summarize(rows[:3])
    assert verdict in scaling.summarize([*rows, loss(4, 0, value)])


# --- main


def test_main_writes_what_was_measured_before_a_failure(monkeypatch, tmp_path):
    def launch(count, limit):
        rows = [speed("weak", count, 128, 100.0 * count)]
        return rows, "" if count == 1 else f"{count} processes failed"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scaling, "launch", launch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--processes", "1,2"])
    with pytest.raises(UserError, match="2 processes failed"):
        scaling.main()
    (path,) = (tmp_path / "results").glob("scaling-*.json")
    report = json.loads(path.read_text())
    assert [row["efficiency"] for row in report["rows"]] == [1, 1]
    assert report["command"] == "python scaling.py --processes 1,2"
    assert report["agreement"].endswith("too few to compare")
    assert path.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--processes", "3"], "cannot be divided by 3 processes"),
        (["--processes", "8"], "asks for 8, but there are 4 GPUs"),
    ],
)
def test_main_refuses_impossible_numbers_of_processes(monkeypatch, flags, reason):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(sys, "argv", ["scaling.py", *flags])
    with pytest.raises(UserError, match=reason):
        scaling.main()
