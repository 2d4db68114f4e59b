"""Triton kernels for linear attention with memory slots (arXiv:1812.01243).

For each image and head, with queries Q (N, D), keys K and values V (slots + N, D):

    context = softmax(K over tokens)^T V          (D, D)
    out = scale * softmax(Q over D) context       (N, D)

Program (image, head) holds context and BLOCK tokens at a time. Softmaxes and sums are in fp32,
matrix products in the precision of qkv.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_SLOTS = tl.constexpr(16)  # slots are padded to them, the fewest rows that tl.dot takes
PRECISION = tl.constexpr("ieee")  # of products of fp32; ROCm compiles no tf32, also in bf16 kernels


@triton.jit
def _attention_forward(qkv_ptr, mem_kv_ptr, out_ptr, context_ptr, lse_ptr, tokens, scale,
                       HEADS: tl.constexpr, DIM: tl.constexpr, SLOTS: tl.constexpr,
                       BLOCK: tl.constexpr):  # fmt: skip
    """Stores out, and for the backward pass context and the log-sum-exp of the keys.

    One pass over the keys: whenever their maximum grows, the sums so far are rescaled to it.
    """
    image = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, DIM)
    dim_mask = (dims < DIM)[None, :]  # always true: masks of both axes compile to faster code
    block = tl.arange(0, BLOCK)
    stride = 3 * HEADS * DIM  # between tokens
    dtype = qkv_ptr.dtype.element_ty
    q_ptr = qkv_ptr + image * tokens * stride + head * DIM
    k_ptr = q_ptr + HEADS * DIM

    # Keys and values of the slots, then of the tokens.
    slots = tl.arange(0, MAX_SLOTS)
    slot_ptr = mem_kv_ptr + head * DIM * SLOTS + dims[None, :] * SLOTS + slots[:, None]
    slot_mask = (slots < SLOTS)[:, None] & dim_mask
    mem_k = tl.load(slot_ptr, slot_mask, -float("inf")).to(tl.float32)
    mem_v = tl.load(slot_ptr + HEADS * DIM * SLOTS, slot_mask, 0.0).to(dtype)
    running_max = tl.max(mem_k, 0)
    exp_mem_k = tl.exp(mem_k - running_max[None, :])
    running_sum = tl.sum(exp_mem_k, 0)
    context = tl.dot(tl.trans(exp_mem_k.to(dtype)), mem_v, input_precision=PRECISION)
    for start in range(0, tokens, BLOCK):
        mask = (start + block < tokens)[:, None] & dim_mask
        offsets = (start + block)[:, None] * stride + dims[None, :]
        k = tl.load(k_ptr + offsets, mask, -float("inf")).to(tl.float32)
        v = tl.load(k_ptr + HEADS * DIM + offsets, mask, 0.0)
        new_max = tl.maximum(running_max, tl.max(k, 0))
        rescale = tl.exp(running_max - new_max)
        exp_k = tl.exp(k - new_max[None, :])
        running_sum = running_sum * rescale + tl.sum(exp_k, 0)
        context = context * rescale[:, None]
        context += tl.dot(tl.trans(exp_k.to(dtype)), v, input_precision=PRECISION)
        running_max = new_max
    context = context / running_sum[:, None]
    index = image * HEADS + head
    tl.store(context_ptr + index * DIM * DIM + dims[:, None] * DIM + dims[None, :], context)
    tl.store(lse_ptr + index * DIM + dims, running_max + tl.log(running_sum))

    # Queries.
    context = context.to(dtype)
    for start in range(0, tokens, BLOCK):
        mask = (start + block < tokens)[:, None] & dim_mask
        row_ptr = q_ptr + (start + block)[:, None] * stride
        q = tl.load(row_ptr + dims[None, :], mask, 0.0).to(tl.float32)
        exp_q = tl.exp(q - tl.max(q, 1)[:, None])
        p = exp_q * (scale / tl.sum(exp_q, 1))[:, None]
        out = tl.dot(p.to(dtype), context, input_precision=PRECISION)
        out_row = (image * tokens + start + block)[:, None] * (HEADS * DIM)
        tl.store(out_ptr + out_row + head * DIM + dims[None, :], out, mask)


@triton.jit
def _kv_backward(kv_ptr, dkv_ptr, offsets, v_offset, mask, lse, dcontext, kdk_sum):
    """dK and dV of a tile of tokens or slots, see _attention_backward."""
    s = tl.exp(tl.load(kv_ptr + offsets, mask, -float("inf")).to(tl.float32) - lse[None, :])
    v = tl.load(kv_ptr + v_offset + offsets, mask, 0.0).to(dcontext.dtype)
    ds = tl.dot(v, tl.trans(dcontext), input_precision=PRECISION)
    tl.store(dkv_ptr + offsets, s * (ds - kdk_sum[None, :]), mask)
    dv = tl.dot(s.to(dcontext.dtype), dcontext, input_precision=PRECISION)
    tl.store(dkv_ptr + v_offset + offsets, dv, mask)


@triton.jit
def _attention_backward(qkv_ptr, mem_kv_ptr, context_ptr, lse_ptr, dout_ptr, dqkv_ptr, dmem_kv_ptr,
                        tokens, scale, HEADS: tl.constexpr, DIM: tl.constexpr, SLOTS: tl.constexpr,
                        BLOCK: tl.constexpr):  # fmt: skip
    """dqkv and dmem_kv; P = softmax(Q over D), S = softmax(K over tokens) = exp(K - lse):

    dP = scale * dout context^T    dQ = P * (dP - sum over D of dP * P)
    dcontext = scale * P^T dout    dV = S dcontext    dS = V dcontext^T    dK = S * (dS - kdk_sum)
    kdk_sum, over tokens of S * dS, is also the sum over V's D of dcontext * context.
    dmem_kv (B, 2, heads, D, slots) is to be summed over images.
    """
    image = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, DIM)
    block = tl.arange(0, BLOCK)
    stride = 3 * HEADS * DIM  # between tokens
    dtype = qkv_ptr.dtype.element_ty
    q_ptr = qkv_ptr + image * tokens * stride + head * DIM
    dq_ptr = dqkv_ptr + image * tokens * stride + head * DIM
    index = image * HEADS + head
    context = tl.load(context_ptr + index * DIM * DIM + dims[:, None] * DIM + dims[None, :])
    lse = tl.load(lse_ptr + index * DIM + dims)

    # Queries and context.
    dcontext = tl.zeros([DIM, DIM], tl.float32)
    for start in range(0, tokens, BLOCK):
        mask = (start + block < tokens)[:, None]
        offsets = (start + block)[:, None] * stride + dims[None, :]
        q = tl.load(q_ptr + offsets, mask, 0.0).to(tl.float32)
        out_row = (image * tokens + start + block)[:, None] * (HEADS * DIM)
        dout = tl.load(dout_ptr + out_row + head * DIM + dims[None, :], mask, 0.0)
        exp_q = tl.exp(q - tl.max(q, 1)[:, None])
        p = exp_q / tl.sum(exp_q, 1)[:, None]
        dcontext += tl.dot(tl.trans((p * scale).to(dtype)), dout, input_precision=PRECISION)
        dp = tl.dot(dout, tl.trans(context.to(dtype)), input_precision=PRECISION) * scale
        tl.store(dq_ptr + offsets, p * (dp - tl.sum(dp * p, 1)[:, None]), mask)

    # Keys and values of the tokens, then of the slots.
    kdk_sum = tl.sum(dcontext * context, 1)
    dcontext = dcontext.to(dtype)
    v_offset = HEADS * DIM
    for start in range(0, tokens, BLOCK):
        mask = (start + block < tokens)[:, None]
        offsets = (start + block)[:, None] * stride + dims[None, :] + HEADS * DIM
        _kv_backward(q_ptr, dq_ptr, offsets, v_offset, mask, lse, dcontext, kdk_sum)
    slots = tl.arange(0, MAX_SLOTS)
    mask = (slots < SLOTS)[:, None]
    offsets = head * DIM * SLOTS + dims[None, :] * SLOTS + slots[:, None]
    dmem_kv_ptr += image * 2 * HEADS * DIM * SLOTS
    v_offset = HEADS * DIM * SLOTS
    _kv_backward(mem_kv_ptr, dmem_kv_ptr, offsets, v_offset, mask, lse, dcontext, kdk_sum)


class LinearAttentionFunction(torch.autograd.Function):
    """engine.unet.linear_attention with the kernels."""

    @staticmethod
    def forward(ctx, qkv, mem_kv):
        qkv = qkv.contiguous()
        mem_kv = mem_kv.contiguous()
        images, tokens, _ = qkv.shape
        _, heads, dim, slots = mem_kv.shape
        out = qkv.new_empty(images, tokens, heads * dim)
        context = torch.empty((images, heads, dim, dim), device=qkv.device)
        lse = torch.empty((images, heads, dim), device=qkv.device)
        block = min(max(triton.next_power_of_2(tokens), 16), 2048 // dim)
        ctx.options = dict(HEADS=heads, DIM=dim, SLOTS=slots, BLOCK=block)
        _attention_forward[images, heads](
            qkv, mem_kv, out, context, lse, tokens, dim**-0.5, **ctx.options)  # fmt: skip
        ctx.save_for_backward(qkv, mem_kv, context, lse)
        return out

    @staticmethod
    def backward(ctx, dout):
        qkv, mem_kv, context, lse = ctx.saved_tensors
        images, tokens, _ = qkv.shape
        _, heads, dim, _ = mem_kv.shape
        dqkv = torch.empty_like(qkv)
        dmem_kv = torch.empty((images, *mem_kv.shape), device=qkv.device)
        _attention_backward[images, heads](
            qkv, mem_kv, context, lse, dout.contiguous(), dqkv, dmem_kv, tokens, dim**-0.5,
            **ctx.options)  # fmt: skip
        return dqkv, dmem_kv.sum(0).to(mem_kv.dtype)


def supports_linear_attention(mem_kv: Tensor) -> bool:
    """Whether the kernels take memory slots (2, heads, D, slots) of this shape."""
    _, _, dim, slots = mem_kv.shape
    return dim in (16, 32, 64) and slots <= MAX_SLOTS.value
