"""GPU memory: caps, and one policy for running out of it."""

import numpy as np
import pytest
import torch

from config import detect_tier
from engine import gpu_memory
from engine.dataloader import fits_on_gpu
from engine.errors import FallbackWarning, UserError
from engine.gpu_memory import OomBatcher
from tests.helpers import needs_gpu


@pytest.fixture
def two_gpus(monkeypatch) -> list:
    """Two fake GPUs of 24 and 8 GiB, the second current; returns (fraction, device) of each cap."""
    limits = []
    sizes = [torch.empty(0), torch.empty(0)]
    for size, gib in zip(sizes, (24, 8), strict=True):
        size.total_memory = gib * 2**30
    monkeypatch.setattr(gpu_memory, "_memory_cap", None)
    for name in ("LOCAL_RANK", "ACCELERATE_TORCH_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", sizes.__getitem__)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *limit: limits.append(limit)
    )
    return limits


@pytest.mark.parametrize(
    ("variable", "value", "device"),
    [
        ("LOCAL_RANK", "0", 0), ("LOCAL_RANK", "1", 1), ("LOCAL_RANK", "2", 0),
        ("ACCELERATE_TORCH_DEVICE", "cuda:0", 0), ("ACCELERATE_TORCH_DEVICE", "cuda", 1),
    ],
)  # fmt: skip
def test_cap_and_limit_are_of_the_gpu_of_this_rank(two_gpus, monkeypatch, variable, value, device):
    monkeypatch.setenv(variable, value)
    gib = (24, 8)[device]
    assert gpu_memory.memory_limit() == gib * 2**30
    gpu_memory.cap_memory(6)
    assert two_gpus == [(6 / gib, device)]


def test_memory_limit_is_the_cap_or_the_whole_card(two_gpus):
    assert gpu_memory.memory_limit() == 8 * 2**30
    gpu_memory.cap_memory(6)
    assert gpu_memory.memory_limit() == 6 * 2**30
    gpu_memory.cap_memory(12)
    assert gpu_memory.memory_limit() == 8 * 2**30 and two_gpus == [(0.75, 1), (1.0, 1)]
    gpu_memory.cap_memory(48)
    assert two_gpus[-1] == (1.0, 1)


def test_usable_memory_is_what_other_processes_leave(two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * 2**30, 8 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2**30)
    assert gpu_memory.usable_memory() == 3 * 2**30
    images = np.broadcast_to(np.uint8(0), (2**30, 1, 1, 1))
    assert not fits_on_gpu(images) and fits_on_gpu(images[: 2**29])
    gpu_memory.cap_memory(1)
    assert gpu_memory.usable_memory() == 2**30


def test_limited_to_restores_the_cap(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    gpu_memory.cap_memory(6)
    with pytest.raises(ZeroDivisionError), gpu_memory.limited_to(2):
        raise ZeroDivisionError
    assert two_gpus == [(0.75, 1), (0.25, 1), (0.75, 1)]


def test_oom_batcher_halves_for_good_and_covers_every_image_once():
    done, sizes = [], []

    def work(part: slice) -> slice:
        sizes.append(part.stop - part.start)
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError
        done.append(part)
        return part

    batcher = OomBatcher(12)
    with pytest.warns(FallbackWarning, match="continuing with batches of") as warned:
        assert list(batcher.map(10, work)) == done
    assert sizes == [10, 5, 3, 3, 3, 1] and batcher.size == 3
    assert [i for part in done for i in range(part.start, part.stop)] == list(range(10))
    assert len(warned) == 2


def raise_cuda_error(part: slice) -> None:
    raise torch.OutOfMemoryError


@pytest.mark.parametrize(
    "work",
    [
        raise_cuda_error,
        lambda part: torch.empty(2**58),  # a RuntimeError of the CPU's allocator
        lambda part: np.empty(2**58),  # a MemoryError
    ],
)
def test_oom_batcher_gives_up_at_one_image(work):
    with pytest.warns(FallbackWarning), pytest.raises(UserError, match=r"fits\. Sell one"):
        list(OomBatcher(2, "Sell one").map(2, work))


@pytest.mark.parametrize("text", [
    "CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`",
    "Triton Error [CUDA]: out of memory",
])  # fmt: skip
def test_errors_of_cuda_without_a_type_are_out_of_memory(text):
    assert gpu_memory.is_out_of_memory(RuntimeError(text))


def test_oom_batcher_raises_other_errors():
    with pytest.raises(RuntimeError, match="size"):
        list(OomBatcher(2).map(2, lambda part: torch.zeros(2) @ torch.zeros(3)))


@pytest.mark.gpu
@needs_gpu
def test_cap_memory_makes_a_smaller_card(monkeypatch):
    monkeypatch.setattr(gpu_memory, "_memory_cap", None)
    torch.cuda.empty_cache()
    gpu_memory.cap_memory(6.0)
    try:
        assert (detect_tier().name, detect_tier().memory) == ("Small", 6.0)
        left = 6 * 2**30 - torch.cuda.memory_reserved()  # earlier tests may hold some
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(left + 2**30, dtype=torch.uint8, device="cuda")
        torch.empty(left - 2**30, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
