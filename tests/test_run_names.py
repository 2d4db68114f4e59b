"""engine/run_names.py: what a new run is called."""

import os
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine import run_names
from engine.errors import UserError
from engine.run_names import new_run_name
from tests.helpers import hold_lock


def test_new_run_name_is_unused_even_if_two_runs_start_in_the_same_second(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_names, "datetime", SimpleNamespace(now=lambda: datetime(2026, 1, 1)))
    unnamed = SimpleNamespace(RUN_NAME="", DATASET="shapes", IMAGE_SIZE=8)
    assert new_run_name(unnamed) == "shapes-8px-20260101-000000"
    assert new_run_name(unnamed) == "shapes-8px-20260101-000000-2"
    handle = hold_lock("shapes-8px-20260101-000000-3")
    assert new_run_name(unnamed) == "shapes-8px-20260101-000000-4"
    os.close(handle)


@pytest.mark.parametrize("name", ["../mine", "/mine", "a/../../b", "."])
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
