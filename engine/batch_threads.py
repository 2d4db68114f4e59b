"""Two threads on a CPU, each with half of a batch.

The kernels of a small network are too short to be divided among the cores: each thread would wait
for the others after each of them. Halves of a batch wait for each other once.
"""

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class BatchThreads:
    """Calls functions on halves of a batch at the same time; the cores are shared equally.

    In which order two threads take random numbers is left to chance. So from the first call on that
    takes any, of torch or Python, batches are left whole.
    """

    def __init__(self):
        num_threads = torch.get_num_threads()
        started = threading.Barrier(2)

        def start(_: int) -> None:
            torch.get_num_threads()  # or the first kernel would set this thread's number again
            torch.set_num_threads(num_threads // 2)
            started.wait()

        self.pool: ThreadPoolExecutor | None = ThreadPoolExecutor(2)
        list(self.pool.map(start, range(2)))
        torch.set_num_threads(num_threads)  # which is also the default of later threads

    def map(self, fn: Callable[..., T], batch: Sequence[Tensor]) -> list[T]:
        """Returns fn(*half) of both halves of a batch (B, ...), or [fn(*batch)]."""
        if self.pool is not None:
            state = torch.get_rng_state(), random.getstate()
            halves = zip(*(x.chunk(2) for x in batch), strict=True)
            results = list(self.pool.map(lambda half: fn(*half), halves))
            if torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]:
                return results
            torch.set_rng_state(state[0])
            random.setstate(state[1])
            self.pool = None
        return [fn(*batch)]


def use_batch_threads(model: nn.Module, device: torch.device) -> bool:
    """Whether BatchThreads helps: on a CPU with two cores or more, of which OpenMP knows.

    Not with running statistics, such as BatchNorm's, which are of whole batches.
    """
    has_statistics = any(getattr(m, "track_running_stats", False) for m in model.modules())
    return device.type == "cpu" and torch.get_num_threads() > 1 and not has_statistics
