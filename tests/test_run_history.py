"""What is shown of a run while it trains, and later."""

import json
import os

import pytest
from PIL import Image

from engine import run_history
from engine.run_names import SAMPLES_DIR

NOW = 1_000_000_000


def write_run(name: str, fractions: list[float | None], final: bool = False) -> None:
    """Writes what a run logs every 10 steps and 60 seconds, the last at NOW."""
    folder = SAMPLES_DIR / name
    folder.mkdir(parents=True)
    rows = [
        {"step": 10 * i, "epoch": i, "images": 640 * i, "seconds": 60.0 * i, "loss": 1 / i}
        | {"images_per_second": 10.0 * i, "validation_loss": 2 / i}
        | ({} if fraction is None else {"fraction": fraction})
        for i, fraction in enumerate(fractions, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        grid = Image.new("RGB", (4, 4))
        grid.save(folder / f"step_{row['step']:07d}.png")
    if final:
        grid.save(folder / "final.png")
    for path in folder.iterdir():
        os.utime(path, (NOW, NOW))


def test_summarize_run_predicts_the_time_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run("cifar10/a", [0.1, 0.2, 0.3])
    assert run_history.find_runs() == ["cifar10/a"]
    version = run_history.run_version("cifar10/a")
    figures = run_history.summarize_run(version, NOW)
    assert figures["state"] == "training"
    assert figures["time left"] == "7.0 minutes"  # 3 minutes were 30 %
    assert figures["speed"] == "20 images/s"
    assert (figures["loss"], figures["validation loss"]) == ("0.3333", "0.6667")
    later = run_history.summarize_run(version, NOW + 600)
    assert later["state"] == "silent for 10.0 minutes"
    assert [caption for _, caption in run_history.run_grids("cifar10/a")] == [
        "step 10", "step 20", "step 30",
    ]  # fmt: skip


def test_summarize_run_does_without_rows_that_are_not_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run("a", [0.5])
    with (SAMPLES_DIR / "a/metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "loss": 0.25}\n')
    assert run_history.summarize_run(run_history.run_version("a"), NOW)["step"] == "10"


def test_summarize_run_has_the_speed_of_the_last_ten_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run("a", [0.01] * 30)
    figures = run_history.summarize_run(run_history.run_version("a"), NOW)
    assert figures["speed"] == "255 images/s"  # the mean of 210 to 300


@pytest.mark.parametrize(
    ("fractions", "state"), [([0.5, 1.0], "finished"), ([None], "finished"), ([0.6], "training")]
)
def test_summarize_run_knows_a_finished_run(tmp_path, monkeypatch, fractions, state):
    monkeypatch.chdir(tmp_path)
    write_run("a", fractions, final=True)
    assert run_history.summarize_run(run_history.run_version("a"), NOW)["state"] == state


def test_run_grids_are_limited_and_end_with_the_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run("a", [0.01] * 60, final=True)
    captions = [caption for _, caption in run_history.run_grids("a")]
    assert len(captions) <= run_history.MAX_GRIDS and captions[-1] == "final"


def test_run_grids_of_a_continued_run_end_with_its_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run("a", [0.5, 1.0], final=True)
    os.utime(SAMPLES_DIR / "a/final.png", (1, 1))
    assert [caption for _, caption in run_history.run_grids("a")] == ["final", "step 10", "step 20"]


def test_versions_change_with_metrics_and_with_grids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run("a", [0.5])
    metrics, grids = run_history.run_version("a"), run_history.grids_version("a")
    with (SAMPLES_DIR / "a/metrics.jsonl").open("a") as file:
        file.write('{"step": 20}\n')
    (SAMPLES_DIR / "a/loss.png").touch()
    assert run_history.run_version("a") != metrics and run_history.grids_version("a") == grids
    metrics = run_history.run_version("a")
    Image.new("RGB", (4, 4)).save(SAMPLES_DIR / "a/final.png")
    assert run_history.run_version("a") == metrics and run_history.grids_version("a") != grids
