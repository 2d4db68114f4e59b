"""How much of the GPU's memory this process may have."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from engine.errors import UserError

cap: float | None = None  # bytes


def cap_memory(gib: float) -> None:
    """Lets this process allocate at most so many GiB of its GPU's memory, as if there were no more.

    What CUDA itself takes, some 0.5 GiB, comes on top. Without a GPU one line says that nothing is capped.
    """
    global cap
    if not torch.cuda.is_available():
        print(f"no GPU whose memory could be capped at {gib:g} GiB")
        return
    cap = gib * 2**30
    # of several processes each has a GPU; if they are too many, that is said where they come together
    device = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), device)


def memory_limit() -> float:
    """Bytes of the current GPU that this process may allocate: its memory, or the cap where there is one."""
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return total if cap is None else min(cap, total)


class AtOnce:
    """How many images are computed at once: running out of GPU memory halves `size` for good."""

    def __init__(self, size: int):
        self.size = size

    def parts(self, count: int, work: Callable[[slice], Any]) -> Iterator[Any]:
        """work(part) for parts that cover `count` in order; one for which memory runs out is done again in two.

        Says in one line what the size is from then on. Raises UserError if 1 is too many.
        """
        start = 0
        while start < count:
            part = slice(start, min(start + self.size, count))
            try:
                result = work(part)
            except torch.OutOfMemoryError:
                if part.stop - start == 1:
                    raise UserError("one image alone does not fit into the GPU's memory: try --use_amp", 1) from None
            else:
                yield result
                start = part.stop
                continue
            torch.cuda.empty_cache()  # outside the handler, where what the failed call had is free again
            self.size = (part.stop - start + 1) // 2
            print(f"out of GPU memory: going on with batches of {self.size}")
