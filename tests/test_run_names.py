"""engine/run_names.py: what a run is called that is new, resumes or branches off."""

import os
import shutil
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine import checkpoints, run_names
from engine.errors import UserError
from engine.run_names import new_run_name
from tests.helpers import hold_lock, max_checkpoint_difference


def test_new_run_name_is_unused_even_if_two_runs_start_in_the_same_second(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_names, "datetime", SimpleNamespace(now=lambda: datetime(2026, 1, 1)))
    unnamed = SimpleNamespace(RUN_NAME="", DATASET="shapes", IMAGE_SIZE=8)
    assert new_run_name(unnamed) == "shapes-8px-20260101-000000"
    assert new_run_name(unnamed) == "shapes-8px-20260101-000000-2"
    handle = hold_lock("shapes-8px-20260101-000000-3")
    assert new_run_name(unnamed) == "shapes-8px-20260101-000000-4"
    os.close(handle)


@pytest.mark.parametrize("name", ["../mine", "/mine", "a/../../b", ".", "newest", "a/b.pt"])
def test_new_run_name_must_be_a_folder_below_the_checkpoints(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="must name a folder below checkpoints/"):
        new_run_name(SimpleNamespace(RUN_NAME=name))


def test_new_run_name_may_be_that_of_a_run_that_saved_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("checkpoints/mine").mkdir(parents=True)
    named = SimpleNamespace(RUN_NAME="mine")
    assert new_run_name(named) == "mine"
    Path("checkpoints/mine/last.pt").touch()
    with pytest.raises(UserError, match=r"there is a run mine already\. Resume it"):
        new_run_name(named)

    # Of another, nothing but samples is left.
    Path("samples/old").mkdir(parents=True)
    Path("samples/old/final.png").touch()
    with pytest.raises(UserError, match=r"there is a run old already\. Choose another"):
        new_run_name(SimpleNamespace(RUN_NAME="old"))


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
