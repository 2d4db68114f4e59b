"""Checkpoint files: atomic, found by age and name, plain tensors only."""

import os
from pathlib import Path

import pytest
import torch

from engine import checkpoints
from engine.errors import UserError


def test_write_atomically_syncs_the_complete_file_before_renaming(tmp_path, monkeypatch):
    path, events = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace

    def note_fsync(handle):
        events.append(("fsync", os.fstat(handle).st_size))
        fsync(handle)

    def note_replace(source, target):
        events.append(("replace", Path(source).stat().st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    checkpoints.write_atomically(path, lambda file: file.write(b"abc"))
    assert events == [("fsync", 3), ("replace", 3)]
    assert path.read_bytes() == b"abc" and list(tmp_path.iterdir()) == [path]


def test_write_atomically_leaves_the_old_file_after_an_error(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="full") as caught:

        def write(file):
            file.write(b"half")
            raise OSError(28, "full")

        checkpoints.write_atomically(path, write)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.fixture
def two_runs(tmp_path, monkeypatch) -> Path:
    """checkpoints/ with run `b`, then run `a`, saved one after the other."""
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("b", "a")):
        for file in ("last.pt", "best.pt"):
            path = Path("checkpoints") / name / file
            checkpoints.save(path, {"x": torch.zeros(1)})
            seconds = 1000 + 10 * age + (file == "best.pt")
            os.utime(path, (seconds, seconds))
    return tmp_path


def test_resolve_checkpoint_takes_the_run_saved_last(two_runs):
    assert checkpoints.resolve_checkpoint("newest") == Path("checkpoints/a/last.pt")
    assert checkpoints.resolve_checkpoint("b") == Path("checkpoints/b/last.pt")
    assert checkpoints.resolve_checkpoint("checkpoints/b") == Path("checkpoints/b/last.pt")
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoints.resolve_checkpoint("c")


def test_newest_is_the_file_written_last_under_its_shortest_path(two_runs):
    assert checkpoints.newest() == Path("checkpoints/a/best.pt")
    final = Path("checkpoints/a/final.pt")
    checkpoints.save(final, {"x": torch.zeros(1)})
    checkpoints.link_or_copy(final, Path("checkpoints/ddpm_final.pt"))
    assert checkpoints.newest() == Path("checkpoints/ddpm_final.pt")


def test_newest_falls_back_to_the_pretrained_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert checkpoints.newest() == checkpoints.PRETRAINED_DIR / "cifar10.safetensors"
    assert "using the pretrained" in capsys.readouterr().out


def test_link_or_copy_replaces_the_target_without_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError

    monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "b").write_bytes(b"old")
    checkpoints.link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 2
