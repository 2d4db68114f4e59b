"""How far a run is, whose clock counts, and how it stops."""

import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import ReduceOp

from config import resolve
from engine import progress as progress_module
from engine.distributed import RankLostError
from engine.progress import LOG_EVERY, Progress, StopSignal, format_duration
from tests.forked_script import ForkedScript
from tests.helpers import ALONE, CPU, CPU_TIER, FakeTime

PAIR = SimpleNamespace(num_processes=2, process_index=1, device=CPU)


@pytest.fixture
def clock(monkeypatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(progress_module, "time", fake)
    return fake


def make_progress(seconds: float = 0.0, step: int = 0, **changes) -> Progress:
    config = resolve("folder", CPU_TIER, flags=changes)
    return Progress(config, 4, ALONE, seconds=seconds, step=step)


def test_progress_continues_with_the_seconds_of_earlier_sessions(clock):
    progress = make_progress(seconds=30, step=10, MINUTES=1)
    assert progress.fraction == 0.5
    clock.now += 6
    progress.advance(16)
    assert (progress.seconds, progress.step) == (36, 11)
    assert progress.fraction == 0.6 and progress.estimated_steps == round(11 / 0.6)
    clock.now += 23.9
    progress.advance(16)
    assert not progress.is_finished
    clock.now += 0.2
    progress.advance(16)
    assert progress.is_finished


def test_progress_of_several_ranks_has_the_clock_of_rank_0(clock, monkeypatch):
    monkeypatch.setattr(torch.distributed, "broadcast", lambda seconds, src: seconds.fill_(30))
    progress = Progress(resolve("folder", CPU_TIER, flags={"MINUTES": 1}), 4, PAIR)
    clock.now += 50
    for _ in range(LOG_EVERY - 1):
        progress.advance(16)
    assert progress.seconds == 0
    progress.advance(16)
    assert (progress.seconds, progress.fraction) == (30, 0.5)


def test_progress_in_steps_ignores_the_clock(clock):
    progress = make_progress(seconds=1e6, step=98, MAX_STEPS=100)
    clock.now += 1e6
    progress.advance(16)
    found = (progress.fraction, progress.estimated_steps, progress.is_finished)
    assert found == (0.99, 100, False)


def test_progress_in_epochs_counts_passes_with_any_earlier_batch():
    config = SimpleNamespace(EPOCHS=4, MAX_STEPS=0, MINUTES=0)
    # Two epochs of 8 steps, then the batch doubled.
    progress = Progress(config, 10, ALONE, step=20, epoch=2, epoch_step=5)
    found = (progress.fraction, progress.estimated_steps, progress.is_finished)
    assert found == (2.5 / 4, 35, False)
    progress.epoch = 3
    progress.epoch_step = 10
    assert progress.is_finished


def test_progress_ends_an_epoch_only_when_it_is_complete():
    progress = make_progress(MAX_STEPS=100)
    for _ in range(4):
        progress.end_epoch()
        progress.advance(16)
    assert (progress.epoch, progress.epoch_step, progress.images) == (0, 4, 64)
    progress.end_epoch()
    assert (progress.epoch, progress.epoch_step) == (1, 0)
    stored = progress.state_dict()
    assert stored.keys() == {"step", "epoch", "position", "images", "seconds", "best"}
    assert (stored["epoch"], stored["position"]) == (1, 0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(119, "119 seconds"), (150, "2.5 minutes"), (9000, "2.5 hours"), (216_000, "2.5 days")],
)
def test_format_duration_uses_the_unit_that_a_person_would(seconds, text):
    assert format_duration(seconds) == text


# Signals.


@pytest.mark.parametrize(
    ("mine", "other", "agreed"), [(0, 0, 0), (15, 0, 15), (0, 2, 2), (15, 15, 15), (2, 15, 15)]
)
def test_stop_signal_is_the_same_on_all_ranks(mine, other, agreed, monkeypatch):
    reduce = {ReduceOp.MAX: max, ReduceOp.MIN: min, ReduceOp.SUM: lambda *both: sum(both)}

    def all_reduce(number: torch.Tensor, op: ReduceOp) -> None:
        number.fill_(reduce[op](number.item(), other))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    stop = StopSignal(PAIR, str)
    stop.received = mine
    assert not stop.requested(LOG_EVERY + 1)  # nobody asks in between
    assert stop.requested(LOG_EVERY) == (agreed > 0)
    assert stop.number == agreed


def test_stop_signal_keeps_a_signal_that_comes_while_ranks_ask_each_other(monkeypatch):
    stop = StopSignal(PAIR, str)
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda number, op: os.kill(os.getpid(), signal.SIGTERM)
    )
    stop.previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, stop._handle)
    try:
        assert not stop.requested(LOG_EVERY)  # this rank had said 0 before it came
    finally:
        signal.signal(signal.SIGTERM, stop.previous[signal.SIGTERM])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda number, op: None)
    assert stop.requested(2 * LOG_EVERY) and stop.number == signal.SIGTERM


def test_stop_signal_restores_handlers_and_starts_no_thread_on_a_single_rank():
    before = signal.getsignal(signal.SIGTERM)
    threads = threading.active_count()
    with StopSignal(ALONE, str) as stop:
        assert threading.active_count() == threads
        assert not stop.requested(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested(2) and stop.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before  # a second one kills
    assert signal.getsignal(signal.SIGTERM) == before


STUCK = """
import os
import signal
import time
from types import SimpleNamespace
from engine import distributed, progress

progress.GRACE_PERIOD = 1.0
distributed.all_reduce = lambda *_, **__: None
dist = SimpleNamespace(num_processes=2, process_index=1, device="cpu")
for first, steps, seconds in (
    (1, 10, 0),  # asks long after the signal, but never where ranks answer
    (0, 1, 1.5),  # is told yes, and saves for long
    (1, 3, 1000),  # is stuck
):
    with progress.StopSignal(dist, lambda: "Resume with --resume mine") as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        for step in range(steps):
            time.sleep(0.15)
            stop.requested(10 * step + first)
        time.sleep(seconds)
    print("left", flush=True)
"""


def test_stop_signal_ends_a_rank_that_is_stuck_but_not_a_slow_one(tmp_path):
    (tmp_path / "stuck.py").write_text(STUCK)
    stuck = ForkedScript(tmp_path, tmp_path / "stuck.py")
    output, errors = stuck.communicate()
    assert (stuck.returncode, output) == (1, "left\nleft\n")
    assert errors.strip() == "error: rank 1 is stuck. Resume with --resume mine"


def test_stop_signal_waits_for_the_error_message_of_a_lost_rank():
    before = signal.getsignal(signal.SIGTERM)
    stop = StopSignal(ALONE, str)
    try:
        with pytest.raises(RankLostError), stop:
            raise RankLostError("connection reset")
        assert signal.getsignal(signal.SIGTERM) == stop._handle
    finally:
        stop.__exit__(None)
    assert signal.getsignal(signal.SIGTERM) == before
