"""Trackers: each gets a run's configuration, metrics and grids; none of them can stop a run."""

import errno
import importlib.util
import itertools
import sqlite3
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

import train
from engine import plots, trackers
from engine.errors import FallbackWarning, UserError
from engine.trackers import Tracker
from tests.helpers import TINY_FLAGS

CONFIG = {"DIM": 8, "DIM_MULTS": (1, 2), "MINUTES": 0.5}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder, with what the trackers write outside of a run's in it too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run = tmp_path / "samples" / "mine"
    run.mkdir(parents=True)
    return run


def log_with(name: str, folder: Path, steps: list[int], resumed_at: int = 0) -> None:
    """Logs a session: a loss at each step, a grid of two images at the last."""
    tracker = Tracker(name, "mine", folder, CONFIG, resumed_at)
    for step in steps:
        tracker.log({"loss": step / 100}, step)
    plots.save_image(plots.grid(torch.rand(2, 4, 8, 8)), folder / "grid.png")
    tracker.log_grid(folder / "grid.png", steps[-1])
    tracker.close()


def test_tensorboard_has_metrics_and_grids_and_drops_what_was_logged_after_the_resumed_step(
    folder, monkeypatch
):
    # TensorBoard orders sessions by the second.
    clock = SimpleNamespace(time=itertools.count(10**9).__next__)
    monkeypatch.setattr(event_file_writer, "time", clock)
    log_with("tensorboard", folder, [10, 20, 30, 99])
    log_with("tensorboard", folder, [40], resumed_at=30)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    loss = {event.step: event.value for event in events.Scalars("loss")}
    assert loss == pytest.approx({10: 0.1, 20: 0.2, 30: 0.3, 40: 0.4})
    assert [event.step for event in events.Images("samples")] == [40]


def test_wandb_run_has_configuration_metrics_and_grids(folder):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    log_with("wandb", folder, [10, 20])
    (path,) = folder.glob("wandb/offline-run-*/run-mine.wandb")
    data, rows, config = path.read_bytes()[7:], [], {}
    while data:  # records of LevelDB's log: checksum, length, type, content
        length, type_ = struct.unpack_from("<HB", data, 4)
        assert type_ == 1
        record = Record.FromString(data[7 : 7 + length])
        data = data[7 + length :]
        config |= {item.key: item.value_json for item in record.run.config.update}
        row = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
        rows += [row] if row else []
    assert config["DIM"] == "8" and config["DIM_MULTS"] == '"(1, 2)"'
    assert [(row["_step"], row["loss"]) for row in rows] == [("10", "0.1"), ("20", "0.2")]
    assert "samples/_type" in rows[1] and list(path.parent.glob("files/media/images/samples_*.png"))


def test_wandb_starts_a_run_again_that_saved_nothing(folder, monkeypatch):
    started = {}

    class Fake:
        def __init__(self, project, **options):
            started.update(options)

        def start(self):
            pass

    monkeypatch.setitem(trackers.tracking.LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    trackers.create_tracker("wandb", "a/mine", folder, CONFIG, step=0)
    assert (started["id"], started["resume"]) == ("a-mine", "allow")


def test_trackio_run_has_metrics_and_grids_and_is_resumed(folder):
    pytest.importorskip("trackio")
    log_with("trackio", folder, [10, 20])
    log_with("trackio", folder, [30], resumed_at=20)
    with sqlite3.connect(folder.parent.parent / "trackio/ddpm.db") as database:
        query = "select run_name, step, cast(metrics as text) from metrics"
        rows = database.execute(query).fetchall()
    losses = [(name, step, metrics) for name, step, metrics in rows if "loss" in metrics]
    assert [row[:2] for row in losses] == [("mine", 10), ("mine", 20), ("mine", 30)]
    assert sum("samples" in metrics for *_, metrics in rows) == 2


def test_mlflow_run_has_configuration_metrics_and_grids(folder):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    log_with("mlflow", folder, [10, 20])
    client = MlflowClient()
    (run,) = client.search_runs(client.get_experiment_by_name("ddpm").experiment_id)
    assert run.info.run_name == "mine" and run.info.status == "FINISHED"
    assert run.data.params["DIM_MULTS"] == "(1, 2)"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(row.step, row.value) for row in history] == [(10, 0.1), (20, 0.2)]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["grid.png"]


def test_missing_tracker_is_one_line_before_anything_is_decoded(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["train.py", *TINY_FLAGS, "--log_with", "wandb"])
    with pytest.raises(
        UserError, match=r"--log_with wandb needs a package\. Run `pip ins"
    ) as error:
        train.main()
    assert "\n" not in str(error.value)
    assert not Path("data").exists()


class FullDisk:
    """A tracker on a full disk."""

    def start(self, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    log = finish = start


def test_tracker_that_fails_costs_rows_and_not_the_run(folder):
    tracker = Tracker("tensorboard", "mine", folder, CONFIG)
    tracker.tracker.finish()
    tracker.tracker = FullDisk()
    for use in (lambda: tracker.log({"loss": 1.0}, 1), tracker.close):
        with pytest.warns(FallbackWarning, match="tensorboard failed .*No space.*; continuing"):
            use()


def test_tracker_that_cannot_start_is_one_line(folder, monkeypatch):
    monkeypatch.setattr(trackers.tracking, "TensorBoardTracker", lambda *_, **__: FullDisk())
    line = r"--log_with tensorboard cannot start \(.*No space.*\)"
    with pytest.raises(UserError, match=line) as error:
        Tracker("tensorboard", "mine", folder, CONFIG)
    assert "\n" not in str(error.value)


def test_no_tracker_writes_nothing(folder):
    log_with("none", folder, [10])
    assert [path.name for path in folder.iterdir()] == ["grid.png"]
