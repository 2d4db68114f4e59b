"""engine/triton_support.py: kernels compile for every GPU, and do not for want of a compiler."""

import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from engine import triton_support
from engine.errors import FallbackWarning
from tests.helpers import CPU, ROOT, needs_no_gpu

needs_triton = pytest.mark.skipif(
    triton_support.triton_kernels is None, reason="PyTorch brings Triton on Linux only"
)
# Compiles for GPUs that are not here, and launches nothing.
COMPILE = """
from types import SimpleNamespace
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import KernelInterface
from engine import triton_support

def compile_only(kernel, grid):
    return lambda *args, **options: kernel.run(*args, grid=(1, 1, 1), warmup=True, **options)

KernelInterface.__getitem__ = compile_only
targets = [("cuda", 75, 32), ("cuda", 80, 32), ("cuda", 90, 32)]
targets += [("hip", "gfx942", 64), ("hip", "gfx1100", 32)]
for number, target in enumerate(targets):
    driver.set_active(SimpleNamespace(
        get_current_device=lambda: number, get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget(*target),
    ))
    dtype = torch.float16 if target[1] == 75 else torch.bfloat16
    for name, probe in triton_support.PROBES.items():
        try:
            probe(torch.device("cpu"), dtype)
        except Exception as error:
            print(name, *target, error)
"""


@needs_triton
def test_every_kernel_compiles_for_gpus_of_nvidia_and_amd(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMPILE]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (result.stdout, result.returncode) == ("", 0), result.stderr


@pytest.fixture
def on_gpu(monkeypatch) -> SimpleNamespace:
    """A tensor that says it is on a GPU, where nothing was tried yet; kernels are interpreted."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    triton_support.kernels_work.cache_clear()
    yield SimpleNamespace(is_cuda=True, device=CPU, dtype=torch.float32, numel=lambda: 1)
    triton_support.kernels_work.cache_clear()


@needs_triton
@needs_no_gpu
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])  # as in sampling
def test_kernels_are_used_where_all_of_them_work(on_gpu, mode, recwarn):
    with mode():
        assert triton_support.use_triton(on_gpu)
    assert not recwarn
    assert not triton_support.use_triton(torch.zeros(1))


@pytest.mark.parametrize("changes", [{"dtype": torch.float64}, {"numel": lambda: 0}])
def test_kernels_are_not_used_for_fp64_or_empty_tensors(on_gpu, changes, monkeypatch):
    monkeypatch.setattr(triton_support, "MISSING", "")
    monkeypatch.setattr(triton_support, "PROBES", {})
    assert triton_support.use_triton(on_gpu)
    assert not triton_support.use_triton(SimpleNamespace(**(vars(on_gpu) | changes)))


def test_kernels_are_probed_with_their_device_current(on_gpu, monkeypatch):
    current, seen = [], []

    @contextlib.contextmanager
    def device(device):
        current.append(device)
        yield
        current.pop()

    def probe(device, _):
        seen.append((device, *current))

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(triton_support, "MISSING", "")
    monkeypatch.setattr(triton_support, "PROBES", {"norm": probe})
    on_gpu.device = torch.device("cuda:1")
    assert triton_support.use_triton(on_gpu)
    assert seen == [(on_gpu.device, on_gpu.device)] and not current


def test_probe_out_of_memory_is_raised_and_tried_again(on_gpu, monkeypatch):
    outcomes = iter([RuntimeError("Triton Error [CUDA]: out of memory"), None])

    def probe(*_):
        if error := next(outcomes):
            raise error

    monkeypatch.setattr(triton_support, "MISSING", "")
    monkeypatch.setattr(triton_support, "PROBES", {"norm": probe})
    with pytest.raises(RuntimeError, match="out of memory"):
        triton_support.use_triton(on_gpu)
    assert triton_support.use_triton(on_gpu)


@pytest.mark.parametrize("is_installed", [True, False])
def test_kernels_that_fail_are_named_once_and_not_used(on_gpu, is_installed, monkeypatch):
    def fail(*_):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")

    monkeypatch.setattr(triton_support, "PROBES", {"norm": fail, "add_bias": fail})
    monkeypatch.setattr(triton_support, "MISSING", "" if is_installed else "No module named triton")
    message = (
        r"the Triton kernel norm failed \(Failed to find C compiler. Please specify via CC.\)"
        if is_installed
        else r"importing Triton failed \(No module named triton\)"
    )
    with pytest.warns(FallbackWarning, match=f"^{message}; continuing without Triton") as warned:
        assert not triton_support.use_triton(on_gpu)
        assert not triton_support.use_triton(on_gpu)
    assert len(warned) == 1
