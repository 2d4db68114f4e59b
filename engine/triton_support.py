"""Whether Triton kernels are used: all must compile and run on this GPU."""

import functools
import warnings

import torch
from torch import Tensor

from engine.errors import FallbackWarning, short_reason
from engine.gpu_memory import is_out_of_memory

try:
    from engine import triton_attention, triton_concat, triton_kernels

    MISSING = ""
except ImportError as error:  # PyTorch brings Triton on Linux only
    triton_attention = None
    triton_concat = None
    triton_kernels = None
    MISSING = str(error)


def use_triton(x: Tensor) -> bool:
    """Whether to run our kernels; torch.compile generates its own from the formulas.

    Not for empty tensors, nor for fp64, as kernels compute in fp32.
    """
    if torch.compiler.is_compiling() or not x.is_cuda:
        return False
    return x.numel() > 0 and x.dtype != torch.float64 and kernels_work(x.device)


@functools.cache
def kernels_work(device: torch.device) -> bool:
    """Whether all kernels compile and run on a device; warns of the first failure.

    An out-of-memory error of a probe is raised: it says nothing about the kernels.
    """
    problem = find_problem(device)
    if problem:
        message = f"{problem}; continuing without Triton kernels, slower"
        warnings.warn(message, FallbackWarning, stacklevel=2)
    return not problem


def find_problem(device: torch.device) -> str:
    """Returns which kernel fails on a device, and why; empty if none does."""
    if MISSING:
        return f"importing Triton failed ({MISSING})"
    # Probes compute gradients; callers may be sampling.
    with torch.cuda.device(device), torch.inference_mode(False), torch.enable_grad():
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if has_bf16 else torch.float16
        for name, probe in PROBES.items():
            try:
                probe(device, dtype)
            except Exception as error:  # Triton and the compilers that it starts raise their own
                if is_out_of_memory(error):
                    raise
                return f"the Triton kernel {name} failed ({short_reason(error, 300)})"
    return ""


def probe_norm(device: torch.device, dtype: torch.dtype) -> None:
    """Runs the norm with a modulation, and with a residual, forward and backward.

    With sizes for which a model of dim 128 has the same kernels, as compiling takes seconds.
    """
    x = torch.ones(16, 128, 8, 4, device=device, dtype=dtype, requires_grad=True)
    vector = torch.ones(128, device=device, dtype=torch.float32, requires_grad=True)
    modulation = torch.ones(16, 256, device=device, dtype=dtype, requires_grad=True)
    for rest in ((modulation, None, None), (None, x, vector)):
        y = triton_kernels.NormFunction.apply(x, vector, vector.view(1, -1, 1, 1), *rest, True)
        y.backward(torch.ones_like(y))


def probe_add_bias(device: torch.device, dtype: torch.dtype) -> None:
    """Adds a bias, forward and backward."""
    x = torch.ones(1, 128, 8, 8, device=device, dtype=dtype)
    bias = torch.ones(128, device=device, dtype=torch.float32, requires_grad=True)
    y = triton_kernels.AddBiasFunction.apply(x, bias)
    y.backward(torch.ones_like(y))


def probe_concat(device: torch.device, dtype: torch.dtype) -> None:
    """Concatenates, forward and backward."""
    x = torch.ones(1, 128, 8, 8, device=device, dtype=dtype, requires_grad=True)
    sum(triton_concat.ConcatFunction.apply(x, x)).sum().backward()


def probe_linear_attention(device: torch.device, dtype: torch.dtype) -> None:
    """Runs linear attention, forward and backward."""
    qkv = torch.ones(1, 64, 384, device=device, dtype=dtype, requires_grad=True)
    mem_kv = torch.ones(2, 4, 32, 4, device=device, dtype=torch.float32, requires_grad=True)
    y = triton_attention.LinearAttentionFunction.apply(qkv, mem_kv)
    y.backward(torch.ones_like(y))


def probe_full_attention(device: torch.device, dtype: torch.dtype) -> None:
    """Runs full attention, forward and backward."""
    qkv = torch.ones(1, 64, 384, device=device, dtype=dtype, requires_grad=True)
    mem_kv = torch.ones(2, 4, 4, 32, device=device, dtype=torch.float32, requires_grad=True)
    y = triton_attention.FullAttentionFunction.apply(qkv, mem_kv)
    y.backward(torch.ones_like(y))


def probe_optimizer(device: torch.device, _: torch.dtype) -> None:
    """Runs an update of Adam and one of Muon's momentum."""
    vectors = torch.ones(4, 64, device=device, dtype=torch.float32)
    scalars = torch.ones(4, device=device, dtype=torch.float32)
    triton_kernels.adam(*vectors, *scalars, (0.9, 0.99), 1e-8)
    triton_kernels.nesterov_momentum(*vectors[:3], *scalars[:2], 0.9)


PROBES = {
    "norm": probe_norm, "add_bias": probe_add_bias, "concat": probe_concat,
    "linear_attention": probe_linear_attention, "full_attention": probe_full_attention,
    "optimizer": probe_optimizer,
}  # fmt: skip
