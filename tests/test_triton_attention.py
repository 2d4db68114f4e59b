"""The Triton kernels of attention against their formulas, interpreted on the CPU."""

import pytest
import torch

from engine import unet
from tests.helpers import compare_gradients, needs_no_gpu

pytest.importorskip("triton", reason="PyTorch brings Triton on Linux only")
pytestmark = needs_no_gpu  # tests/test_gpu.py runs them compiled


def test_attention_kernels_need_a_slot():
    assert unet.triton_attention.supports_attention(32, 1)
    assert not unet.triton_attention.supports_attention(32, 0)
    assert not unet.triton_attention.supports_attention(32, 17)


@pytest.mark.parametrize("batch, tokens, heads, dim, slots, dtype, limit", [
    (2, 64, 2, 32, 4, torch.float32, 1e-5),
    (1, 300, 2, 32, 2, torch.float32, 1e-5),
    (2, 36, 3, 16, 4, torch.float32, 1e-5),
    (2, 256, 4, 32, 4, torch.float16, 1e-2),  # the interpreter's bf16 products are wrong
])  # fmt: skip
def test_linear_attention_kernel_matches_formula(batch, tokens, heads, dim, slots, dtype, limit):
    torch.manual_seed(0)
    qkv = 2 * torch.randn(batch, tokens, 3 * heads * dim).to(dtype)
    mem_kv = torch.randn(2, heads, dim, slots)
    assert unet.triton_attention.supports_attention(dim, slots)
    dy = torch.randn(batch, tokens, heads * dim).to(dtype)
    kernel = unet.triton_attention.LinearAttentionFunction.apply
    compare_gradients(kernel, unet.linear_attention, [qkv, mem_kv], dy, limit)


# Tokens: one partial block, full blocks, several blocks of which the last is partial.
@pytest.mark.parametrize("batch, tokens, heads, dim, slots, dtype, limit", [
    (3, 16, 4, 32, 4, torch.float32, 1e-5),
    (2, 9, 3, 16, 16, torch.float32, 1e-5),
    (1, 128, 2, 32, 2, torch.float32, 1e-5),
    (2, 70, 2, 64, 4, torch.float32, 1e-5),
    (2, 256, 2, 32, 4, torch.float16, 1e-2),  # the interpreter's bf16 products are wrong
    (1, 150, 2, 32, 4, torch.float16, 1e-2),
])  # fmt: skip
def test_full_attention_kernels_match_formula(batch, tokens, heads, dim, slots, dtype, limit):
    torch.manual_seed(0)
    qkv = 2 * torch.randn(batch, tokens, 3 * heads * dim).to(dtype)
    qkv[:, :, : heads * dim] *= 4  # scores of 100 and more, whose maximum grows along the keys
    mem_kv = torch.randn(2, heads, slots, dim)
    assert unet.triton_attention.supports_attention(dim, slots)
    dy = torch.randn(batch, tokens, heads * dim).to(dtype)
    kernel = unet.triton_attention.FullAttentionFunction.apply
    compare_gradients(kernel, unet.full_attention, [qkv, mem_kv], dy, limit)


@pytest.mark.filterwarnings("ignore:(overflow|invalid):RuntimeWarning")  # of padding
def test_full_attention_ignores_padding_where_all_scores_are_low():
    """Padding has score 0, and exp(0 - log-sum-exp) is infinite there."""
    torch.manual_seed(0)
    qkv, mem_kv = torch.randn(2, 20, 96), torch.randn(2, 1, 4, 32)
    qkv[:, :, :32] -= 8
    qkv[:, :, 32:64] += 8
    mem_kv[0] += 8
    kernel = unet.triton_attention.FullAttentionFunction.apply
    compare_gradients(kernel, unet.full_attention, [qkv, mem_kv], torch.randn(2, 20, 32), 1e-4)
