"""train.py: the checkpoint that a command line means."""

from pathlib import Path

import torch

from engine import checkpoints
from train import parse_command_line


def test_all_ranks_take_the_checkpoint_that_rank_0_finds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = torch.distributed.HashStore()
    monkeypatch.setattr("engine.distributed._launcher_store", lambda: store)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        checkpoints.save(Path("checkpoints", rank, "last.pt"), {})
        resumed = parse_command_line("", {}, ["--resume"]).resume
        tuned = parse_command_line("", {}, [], {}).init_from
        assert resumed == tuned == Path("checkpoints/0/last.pt")
