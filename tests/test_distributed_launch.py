"""Launched ranks: rank 0 prepares first, and a dead rank ends all with one line."""

import re

import pytest
import torch

from tests.test_distributed import torchrun

SCRIPT = """
import os
import signal
import time

from engine import distributed
from engine.cli import run_script

rank = distributed.launched_rank()

def prepare():
    start = time.time()
    time.sleep(0.5 if rank == 0 else 0)
    return start, time.time()

def main():
    choice = distributed.from_rank0("choice", lambda: f"choice-{rank}")
    start, end = distributed.rank0_first("prepare", prepare)
    before = signal.getsignal(signal.SIGTERM)
    with distributed.session(lambda: "resume like this"):
        pass
    is_restored = signal.getsignal(signal.SIGTERM) == before
    with distributed.session(lambda: "resume like this"):
        print(f"{rank} {choice} {start} {end} {is_restored}\\n", end="", flush=True)
        distributed.broadcast_object("")
        if rank == 1:
            time.sleep(0.5)  # until the others have left the collective operation
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1000)  # outside of collective operations, only SIGTERM ends the others

run_script(main)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs the ranks do not talk through gloo")
def test_ranks_share_choices_wait_for_rank_0_and_end_with_one_line(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = torchrun(tmp_path, "script.py", count=3)
    output, errors = launcher.communicate(timeout=60)
    ranks = sorted(line.split() for line in output.splitlines() if line)
    assert [(rank, choice) for rank, choice, *_ in ranks] == [(r, "choice-0") for r in "012"]
    rank0_end = float(ranks[0][3])
    assert all(float(start) >= rank0_end for _, _, start, *_ in ranks[1:])
    assert all(is_restored == "True" for *_, is_restored in ranks)

    assert launcher.returncode == 1
    (line,) = re.findall(r"^error: .*", errors, re.MULTILINE)
    assert line == (
        "error: stopped by SIGTERM: another rank died, or the launcher was stopped; "
        "resume like this"
    )
