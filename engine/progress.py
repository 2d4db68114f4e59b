"""How far a run is, and whether it should stop: the two questions of the training loop."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState

from engine import distributed

LOG_EVERY = 10  # steps; the only times the host waits for the device
GRACE_PERIOD = 20.0  # seconds to react to a signal; torchrun kills after 30


@dataclass
class Progress:
    """How far a run is, over all its sessions, and how long it is.

    Rank 0's clock counts for all ranks, read every LOG_EVERY steps: all stop at the same step.
    """

    config: Any
    steps_per_epoch: int
    dist: PartialState
    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    images: int = 0
    seconds: float = 0.0
    best: float | None = None  # lowest validation loss

    def __post_init__(self):
        self.start_time = time.monotonic() - self.seconds

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint stores."""
        return {
            "step": self.step, "epoch": self.epoch, "position": self.epoch_step,
            "images": self.images, "seconds": self.seconds, "best": self.best,
        }  # fmt: skip

    def advance(self, images: int) -> None:
        """Counts a step on this many images."""
        self.step += 1
        self.epoch_step += 1
        self.images += images
        seconds = time.monotonic() - self.start_time
        if self.dist.num_processes == 1:
            self.seconds = seconds
        elif self.step % LOG_EVERY == 0:
            agreed = torch.tensor(seconds, device=self.dist.device)
            distributed.broadcast(agreed)
            self.seconds = agreed.item()

    def end_epoch(self) -> None:
        """Starts the next epoch if this one is complete."""
        if self.epoch_step == self.steps_per_epoch:
            self.epoch += 1
            self.epoch_step = 0

    @property
    def fraction(self) -> float:
        """The completed fraction of the run, 0 to 1 or more."""
        if self.config.MINUTES:
            return self.seconds / (60 * self.config.MINUTES)
        if self.config.MAX_STEPS:
            return self.step / self.config.MAX_STEPS
        # Not by `step`: an earlier session may have had another batch size.
        return (self.epoch + self.epoch_step / self.steps_per_epoch) / self.config.EPOCHS

    @property
    def is_finished(self) -> bool:
        """Whether the run has its configured length."""
        return self.fraction >= 1

    @property
    def is_log_step(self) -> bool:
        """Whether the step just done is logged."""
        return self.step % LOG_EVERY == 0 or self.is_finished

    @property
    def estimated_steps(self) -> int:
        """Steps of the complete run; in minutes, extrapolated from the speed so far."""
        if self.config.MINUTES:
            return round(self.step / max(self.fraction, 1e-9))
        remaining = (1 - self.fraction) * self.config.EPOCHS * self.steps_per_epoch
        return self.config.MAX_STEPS or self.step + round(remaining)


def format_duration(seconds: float) -> str:
    """Returns a duration in the largest unit of which it has at least two."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


class StopSignal:
    """SIGINT and SIGTERM as a question that the loop asks after each step; a second one kills.

    With several ranks, a thread ends this one if after a signal the loop stops asking for
    GRACE_PERIOD before it is told yes: a collective may wait forever for a rank that died.
    """

    def __init__(self, dist: PartialState, hint: Callable[[], str]):
        self.dist = dist
        self.hint = hint
        self.received = 0  # written by the signal handler alone: a signal is never overwritten
        self.number = 0  # what all ranks agreed to stop for
        self.previous: dict[int, Any] = {}
        self.was_asked = threading.Event()
        self.is_watched = dist.num_processes > 1

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self._handle)
        if self.is_watched:
            self.receiver, self.sender = socket.socketpair()
            self.sender.setblocking(False)
            signal.set_wakeup_fd(self.sender.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        if error_type is distributed.RankLostError:
            return  # a SIGTERM of the launcher must not come before the error message
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.is_watched = False
        if self.dist.num_processes > 1:
            self.was_asked.set()
            signal.set_wakeup_fd(-1)
            self.sender.close()

    def _handle(self, number: int, _frame: object) -> None:
        self.received = number
        signal.signal(number, self.previous[number])

    def _watch(self) -> None:
        # A handler waits for the main thread; a signal's number arrives here at once.
        while (data := self.receiver.recv(1)) and data[0] not in self.previous:
            pass
        while self.is_watched:
            self.was_asked.clear()
            if not self.was_asked.wait(GRACE_PERIOD) and self.is_watched:
                if distributed.is_first_failure():
                    line = f"\nerror: rank {self.dist.process_index} is stuck. {self.hint()}"
                    print(line, file=sys.stderr, flush=True)  # below the progress bar
                os._exit(1)

    def requested(self, step: int) -> bool:
        """Whether any rank was asked to stop; ranks ask each other every LOG_EVERY steps."""
        self.was_asked.set()
        if self.dist.num_processes == 1:
            self.number = self.received
        elif step % LOG_EVERY == 0:
            number = torch.tensor(self.received, device=self.dist.device)
            distributed.all_reduce(number, op=distributed.MAX)
            self.number = int(number.item())
        self.is_watched &= self.number == 0
        return self.number > 0
