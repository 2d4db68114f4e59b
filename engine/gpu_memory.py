"""GPU memory: how much this process may use, and what happens when it runs out."""

import contextlib
import errno
import gc
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from engine.errors import FallbackWarning, OutOfMemoryWarning, UserError

_memory_cap: float | None = None  # bytes
# In errors that have no exception type: of torch's CPU allocators, of CUDA's libraries, and of CUDA
# as torch and Triton report it.
OOM_TEXTS = ("DefaultCPUAllocator", "std::bad_alloc", "_STATUS_ALLOC_FAILED", "out of memory")
SAMPLING_ADVICE = "Stop other programs that use it, or sample on the CPU (CUDA_VISIBLE_DEVICES=-1)"


def cap_memory(gib: float) -> None:
    """Limits this process's GPU memory, as if the GPU were smaller; in GiB.

    What CUDA itself takes, some 0.5 GiB, comes on top. Without a GPU it warns.
    """
    global _memory_cap
    if torch.cuda.is_available():
        _memory_cap = gib * 2**30
        _set_allocator_limit(_memory_cap)
    else:
        message = f"no GPU to cap at {gib:g} GiB; continuing without the cap"
        warnings.warn(message, FallbackWarning, stacklevel=2)


def rank_gpu() -> int:
    """Returns the index of this rank's GPU; distributed.init makes it the current one."""
    named = torch.device(os.environ.get("ACCELERATE_TORCH_DEVICE", "cuda")).index
    if named is None and "LOCAL_RANK" in os.environ:
        # distributed.init refuses more ranks than GPUs later; here the index must only be valid.
        named = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
    return torch.cuda.current_device() if named is None else named


def _set_allocator_limit(limit: float) -> None:
    """Makes the allocator of this rank's GPU refuse more than `limit` bytes."""
    device = rank_gpu()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)


@contextlib.contextmanager
def limited_to(gib: float) -> Iterator[None]:
    """A block in which this process may allocate at most this many GiB of its GPU."""
    if torch.cuda.is_available():
        _set_allocator_limit(gib * 2**30)
    try:
        yield
    finally:
        if torch.cuda.is_available():
            _set_allocator_limit(memory_limit())


def memory_limit() -> float:
    """Returns the bytes that this process may allocate: the GPU's memory, or the cap."""
    total = torch.cuda.get_device_properties(rank_gpu()).total_memory
    return total if _memory_cap is None else min(_memory_cap, total)


def usable_memory() -> float:
    """Returns the bytes of memory_limit that other processes leave; what this one holds counts."""
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    return min(memory_limit(), free)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of the GPU, or of the CPU, is too small."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):  # MemoryError: numpy, Python
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OOM_TEXTS)


class OomBatcher:
    """A batch size that is halved for good, with a warning, whenever memory runs out.

    advice: what to do if not even one image fits.
    """

    def __init__(self, size: int, advice: str = SAMPLING_ADVICE):
        if size < 1:
            raise UserError(f"batch_size is {size}, but must be at least 1")
        self.size = size
        self.advice = advice

    def halve(self, failed: int) -> None:
        """Halves the size after `failed` images did not fit; UserError if it was 1.

        Call it outside the exception handler, where what the failed call held is free again.
        """
        if failed == 1:
            raise UserError(f"out of memory: not even one image fits. {self.advice}", 1)
        self.size = (failed + 1) // 2
        gc.collect()  # the failed call may have left reference cycles
        torch.cuda.empty_cache()
        message = f"out of memory; continuing with batches of {self.size}"
        warnings.warn(message, OutOfMemoryWarning, stacklevel=3)

    def map(self, count: int, function: Callable[[slice], Any]) -> Iterator[Any]:
        """Yields function(part) for slices that cover `count` in order, retrying on OOM."""
        start = 0
        while start < count:
            part = slice(start, min(start + self.size, count))
            try:
                yield function(part)
                start = part.stop
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            if start < part.stop:
                self.halve(part.stop - part.start)
