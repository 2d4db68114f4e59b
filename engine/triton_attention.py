"""Triton kernels for linear and full attention with memory slots.

For each image and head, with queries Q (N, D), keys K and values V (slots + N, D):

    linear (arXiv:1812.01243)     context = softmax(K over tokens)^T V      (D, D)
                                  out = scale * softmax(Q over D) context   (N, D)
    full (arXiv:2307.08691)       out = softmax(scale * Q K^T over tokens) V

qkv: (B, N, 3 * heads * D). mem_kv: (2, heads, D, slots) for linear, (2, heads, slots, D) for full
attention. Both are read in place; gradients have the same layout. Linear attention: program (image,
head) loops over blocks of tokens. Full attention: a program has one block of queries of a head and
loops over its keys. Softmaxes and sums are in fp32, matrix products in the precision of qkv.
"""

import math

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

MAX_SLOTS = tl.constexpr(16)  # slots are padded to them, the fewest rows that tl.dot takes
PRECISION = tl.constexpr("ieee")  # tf32 would miss FastUnet's 1e-5 in fp32; ROCm compiles none


@triton.jit
def _linear_forward(qkv_ptr, mem_kv_ptr, out_ptr, context_ptr, lse_ptr, tokens, scale,
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
def _linear_backward_kv(kv_ptr, dkv_ptr, offsets, v_offset, mask, lse, dcontext, delta):
    """dK and dV of keys at `offsets` of qkv or mem_kv and values v_offset further on."""
    s = tl.exp(tl.load(kv_ptr + offsets, mask, -float("inf")).to(tl.float32) - lse[None, :])
    v = tl.load(kv_ptr + v_offset + offsets, mask, 0.0).to(dcontext.dtype)
    ds = tl.dot(v, tl.trans(dcontext), input_precision=PRECISION)
    tl.store(dkv_ptr + offsets, s * (ds - delta[None, :]), mask)
    dv = tl.dot(s.to(dcontext.dtype), dcontext, input_precision=PRECISION)
    tl.store(dkv_ptr + v_offset + offsets, dv, mask)


@triton.jit
def _linear_backward(qkv_ptr, mem_kv_ptr, context_ptr, lse_ptr, dout_ptr, dqkv_ptr, dmem_kv_ptr,
                        tokens, scale, HEADS: tl.constexpr, DIM: tl.constexpr, SLOTS: tl.constexpr,
                        BLOCK: tl.constexpr):  # fmt: skip
    """dqkv and dmem_kv; P = softmax(Q over D), S = softmax(K over tokens) = exp(K - lse):

    dP = scale * dout context^T    dQ = P * (dP - sum over D of dP * P)
    dcontext = scale * P^T dout    dV = S dcontext    dS = V dcontext^T    dK = S * (dS - delta)
    delta, the sum over tokens of S * dS, is also the sum over V's D of dcontext * context.
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
    delta = tl.sum(dcontext * context, 1)
    dcontext = dcontext.to(dtype)
    for start in range(0, tokens, BLOCK):
        mask = (start + block < tokens)[:, None]
        offsets = (start + block)[:, None] * stride + dims[None, :] + HEADS * DIM
        _linear_backward_kv(q_ptr, dq_ptr, offsets, HEADS * DIM, mask, lse, dcontext, delta)
    slots = tl.arange(0, MAX_SLOTS)
    mask = (slots < SLOTS)[:, None]
    offsets = head * DIM * SLOTS + dims[None, :] * SLOTS + slots[:, None]
    dmem_kv_ptr += image * 2 * HEADS * DIM * SLOTS
    v_offset = HEADS * DIM * SLOTS
    _linear_backward_kv(mem_kv_ptr, dmem_kv_ptr, offsets, v_offset, mask, lse, dcontext, delta)


class LinearAttentionFunction(torch.autograd.Function):
    """engine.unet.linear_attention with the kernels."""

    @staticmethod
    def forward(ctx, qkv, mem_kv):
        qkv = qkv.contiguous()
        mem_kv = mem_kv.contiguous()
        images, tokens, _ = qkv.shape
        _, heads, dim, slots = mem_kv.shape
        out = qkv.new_empty(images, tokens, heads * dim)
        context = qkv.new_empty(images, heads, dim, dim, dtype=torch.float32)
        lse = qkv.new_empty(images, heads, dim, dtype=torch.float32)
        # At least 16, which tl.dot needs; at most 2,048 values in a tile, 16 for each thread.
        block = min(max(triton.next_power_of_2(tokens), 16), 2048 // dim)
        ctx.options = dict(HEADS=heads, DIM=dim, SLOTS=slots, BLOCK=block)
        _linear_forward[images, heads](
            qkv, mem_kv, out, context, lse, tokens, dim**-0.5, **ctx.options)  # fmt: skip
        ctx.save_for_backward(qkv, mem_kv, context, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        qkv, mem_kv, context, lse = ctx.saved_tensors
        images, tokens, _ = qkv.shape
        _, heads, dim, _ = mem_kv.shape
        dqkv = torch.empty_like(qkv)
        dmem_kv = lse.new_empty(images, *mem_kv.shape)
        _linear_backward[images, heads](
            qkv, mem_kv, context, lse, dout.contiguous(), dqkv, dmem_kv, tokens, dim**-0.5,
            **ctx.options)  # fmt: skip
        return dqkv, dmem_kv.sum(0).to(mem_kv.dtype)


def supports_attention(dim: int, slots: int) -> bool:
    """Whether the kernels take this head dimension and number of memory slots."""
    return dim in (16, 32, 64) and 1 <= slots <= MAX_SLOTS.value


@triton.jit
def _find_block(tokens, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Image, head and tokens (BLOCK,) of this program; its neighbors read the same keys."""
    blocks = tl.cdiv(tokens, BLOCK)
    program = tl.program_id(0)
    image = (program // (blocks * HEADS)).to(tl.int64)
    rows = program % blocks * BLOCK + tl.arange(0, BLOCK)
    return image, program // blocks % HEADS, rows


@triton.jit
def _load_slots(mem_kv_ptr, head, dtype, HEADS: tl.constexpr, DIM: tl.constexpr,
                SLOTS: tl.constexpr):  # fmt: skip
    """Keys and values (MAX_SLOTS, D) of a head's slots, then zeros; which are slots; offsets."""
    slots = tl.arange(0, MAX_SLOTS)
    is_slot = slots < SLOTS
    offsets = (head * SLOTS + slots)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    mem_k = tl.load(mem_kv_ptr + offsets, is_slot[:, None], 0.0).to(dtype)
    mem_v = tl.load(mem_kv_ptr + HEADS * SLOTS * DIM + offsets, is_slot[:, None], 0.0).to(dtype)
    return mem_k, mem_v, is_slot, offsets


@triton.jit
def _full_forward(qkv_ptr, mem_kv_ptr, out_ptr, lse_ptr, tokens, scale, HEADS: tl.constexpr,
                  DIM: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
                  IS_RAGGED: tl.constexpr):  # fmt: skip
    """Stores out, and each query's log-sum-exp (base 2) for the backward pass.

    scale includes log2(e): powers of 2 are what a GPU computes. One pass over the keys: whenever
    a query's largest score grows, its sums so far are rescaled to it.
    """
    image, head, rows = _find_block(tokens, HEADS, BLOCK)
    dims = tl.arange(0, DIM)
    block = tl.arange(0, BLOCK)
    stride = 3 * HEADS * DIM  # between tokens
    q_ptr = qkv_ptr + image * tokens * stride + head * DIM
    k_ptr = q_ptr + HEADS * DIM
    row_mask = (rows < tokens)[:, None]
    q = tl.load(q_ptr + rows[:, None] * stride + dims[None, :], row_mask, 0.0)

    # Slots.
    mem_k, mem_v, is_slot, _ = _load_slots(mem_kv_ptr, head, q.dtype, HEADS, DIM, SLOTS)
    slot_scores = tl.dot(q, tl.trans(mem_k), input_precision=PRECISION)
    slot_scores = tl.where(is_slot[None, :], slot_scores, -float("inf"))
    running_max = tl.max(slot_scores, 1) * scale
    slot_p = tl.exp2(slot_scores * scale - running_max[:, None])
    running_sum = tl.sum(slot_p, 1)
    out = tl.dot(slot_p.to(q.dtype), mem_v, input_precision=PRECISION)

    # Tokens.
    for start in range(0, tokens, BLOCK):
        is_token = start + block < tokens
        offsets = (start + block)[:, None] * stride + dims[None, :]
        k = tl.load(k_ptr + offsets, is_token[:, None], 0.0)
        v = tl.load(k_ptr + HEADS * DIM + offsets, is_token[:, None], 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if IS_RAGGED:
            scores = tl.where(is_token[None, :], scores, -float("inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1) * scale)
        rescale = tl.exp2(running_max - new_max)
        p = tl.exp2(scores * scale - new_max[:, None])
        running_sum = running_sum * rescale + tl.sum(p, 1)
        out = out * rescale[:, None]
        out += tl.dot(p.to(q.dtype), v, input_precision=PRECISION)
        running_max = new_max
    out = out / running_sum[:, None]
    out_offsets = (image * tokens + rows)[:, None] * (HEADS * DIM) + head * DIM + dims[None, :]
    tl.store(out_ptr + out_offsets, out, row_mask)
    index = (image * HEADS + head) * tokens + rows
    tl.store(lse_ptr + index, running_max + tl.log2(running_sum), rows < tokens)


@triton.jit
def _full_backward_tile(rows, cols, drows, dcols, lse, delta, scale):
    """P = exp2(scale * rows cols^T - lse) and dS = P * (drows dcols^T - delta).

    With Q, K, dout, V a row is a query; with K, Q, V, dout a key, and P and dS are transposed.
    """
    scores = tl.dot(rows, tl.trans(cols), input_precision=PRECISION)
    p = tl.exp2(scores * scale - lse)
    dp = tl.dot(drows, tl.trans(dcols), input_precision=PRECISION)
    return p.to(rows.dtype), (p * (dp - delta)).to(rows.dtype)


@triton.jit
def _full_backward_q(qkv_ptr, mem_kv_ptr, out_ptr, lse_ptr, dout_ptr, dqkv_ptr, dmem_kv_ptr,
                     delta_ptr, tokens, scale, HEADS: tl.constexpr, DIM: tl.constexpr,
                     SLOTS: tl.constexpr, BLOCK: tl.constexpr,
                     IS_RAGGED: tl.constexpr):  # fmt: skip
    """dQ of BLOCK queries, delta, and what these queries add to dmem_kv.

    P = exp2(scale * Q K^T - lse)    delta = sum over D of dout * out
    dS = P * (dout V^T - delta)      dQ = D^-0.5 * dS K
    dmem_kv (B, blocks, 2, heads, slots, D) is to be summed over images and blocks.
    """
    image, head, rows = _find_block(tokens, HEADS, BLOCK)
    dims = tl.arange(0, DIM)
    block = tl.arange(0, BLOCK)
    stride = 3 * HEADS * DIM  # between tokens
    q_ptr = qkv_ptr + image * tokens * stride + head * DIM
    k_ptr = q_ptr + HEADS * DIM
    row_mask = (rows < tokens)[:, None]
    row_offsets = rows[:, None] * stride + dims[None, :]
    out_offsets = (image * tokens + rows)[:, None] * (HEADS * DIM) + head * DIM + dims[None, :]
    q = tl.load(q_ptr + row_offsets, row_mask, 0.0)
    out = tl.load(out_ptr + out_offsets, row_mask, 0.0).to(tl.float32)
    dout = tl.load(dout_ptr + out_offsets, row_mask, 0.0)
    index = (image * HEADS + head) * tokens + rows
    lse = tl.load(lse_ptr + index, rows < tokens, 0.0)[:, None]
    delta = tl.sum(dout.to(tl.float32) * out, 1)
    tl.store(delta_ptr + index, delta, rows < tokens)

    # Slots. Where lse is infinite, P and dS are 0.
    mem_k, mem_v, is_slot, slot_offsets = _load_slots(mem_kv_ptr, head, q.dtype, HEADS, DIM, SLOTS)
    slot_lse = tl.where(is_slot[None, :], lse, float("inf"))
    slot_p, slot_ds = _full_backward_tile(q, mem_k, dout, mem_v, slot_lse, delta[:, None], scale)
    dmem_k = tl.dot(tl.trans(slot_ds), q, input_precision=PRECISION) * DIM**-0.5
    dmem_v = tl.dot(tl.trans(slot_p), dout, input_precision=PRECISION)
    blocks = tl.cdiv(tokens, BLOCK)
    dmem_kv_ptr += (image * blocks + tl.program_id(0) % blocks) * 2 * HEADS * SLOTS * DIM
    tl.store(dmem_kv_ptr + slot_offsets, dmem_k, is_slot[:, None])
    tl.store(dmem_kv_ptr + HEADS * SLOTS * DIM + slot_offsets, dmem_v, is_slot[:, None])
    dq = tl.dot(slot_ds, mem_k, input_precision=PRECISION)

    # Tokens.
    for start in range(0, tokens, BLOCK):
        is_token = start + block < tokens
        offsets = (start + block)[:, None] * stride + dims[None, :]
        k = tl.load(k_ptr + offsets, is_token[:, None], 0.0)
        v = tl.load(k_ptr + HEADS * DIM + offsets, is_token[:, None], 0.0)
        token_lse = tl.where(is_token[None, :], lse, float("inf")) if IS_RAGGED else lse
        _, ds = _full_backward_tile(q, k, dout, v, token_lse, delta[:, None], scale)
        dq += tl.dot(ds, k, input_precision=PRECISION)
    dq_ptr = dqkv_ptr + image * tokens * stride + head * DIM
    tl.store(dq_ptr + row_offsets, dq * DIM**-0.5, row_mask)


@triton.jit
def _full_backward_kv(qkv_ptr, lse_ptr, dout_ptr, delta_ptr, dqkv_ptr, tokens, scale,
                      HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """dK and dV of BLOCK tokens, with P and dS of _full_backward_q, transposed:

    dV = P^T dout    dK = D^-0.5 * dS^T Q
    Padded queries add nothing: their dout and delta are 0.
    """
    # Keys and values of the block.
    image, head, rows = _find_block(tokens, HEADS, BLOCK)
    dims = tl.arange(0, DIM)
    block = tl.arange(0, BLOCK)
    stride = 3 * HEADS * DIM  # between tokens
    q_ptr = qkv_ptr + image * tokens * stride + head * DIM
    dout_ptr += image * tokens * (HEADS * DIM) + head * DIM
    index = (image * HEADS + head) * tokens
    row_mask = (rows < tokens)[:, None]
    row_offsets = rows[:, None] * stride + dims[None, :] + HEADS * DIM
    k = tl.load(q_ptr + row_offsets, row_mask, 0.0)
    v = tl.load(q_ptr + HEADS * DIM + row_offsets, row_mask, 0.0)

    # All queries, a block at a time.
    dk = tl.zeros([BLOCK, DIM], tl.float32)
    dv = tl.zeros([BLOCK, DIM], tl.float32)
    for start in range(0, tokens, BLOCK):
        queries = start + block
        mask = (queries < tokens)[:, None]
        q = tl.load(q_ptr + queries[:, None] * stride + dims[None, :], mask, 0.0)
        dout_offsets = queries[:, None] * (HEADS * DIM) + dims[None, :]
        dout = tl.load(dout_ptr + dout_offsets, mask, 0.0)
        lse = tl.load(lse_ptr + index + queries, queries < tokens, 0.0)[None, :]
        delta = tl.load(delta_ptr + index + queries, queries < tokens, 0.0)[None, :]
        p, ds = _full_backward_tile(k, q, v, dout, lse, delta, scale)
        dv += tl.dot(p, dout, input_precision=PRECISION)
        dk += tl.dot(ds, q, input_precision=PRECISION)
    dk_ptr = dqkv_ptr + image * tokens * stride + head * DIM
    tl.store(dk_ptr + row_offsets, dk * DIM**-0.5, row_mask)
    tl.store(dk_ptr + HEADS * DIM + row_offsets, dv, row_mask)


class FullAttentionFunction(torch.autograd.Function):
    """engine.unet.full_attention with the kernels."""

    @staticmethod
    def forward(ctx, qkv, mem_kv):
        qkv = qkv.contiguous()
        mem_kv = mem_kv.contiguous()
        images, tokens, _ = qkv.shape
        _, heads, slots, dim = mem_kv.shape
        out = qkv.new_empty(images, tokens, heads * dim)
        lse = qkv.new_empty(images, heads, tokens, dtype=torch.float32)
        # Tiles of 4 KiB: what a program holds fits into 64 KiB of shared memory.
        largest = min(64, 4096 // (dim * qkv.element_size()))
        block = min(max(triton.next_power_of_2(tokens), 16), largest)
        ctx.grid = (images * heads * triton.cdiv(tokens, block),)
        ctx.scale = dim**-0.5 * math.log2(math.e)
        ctx.options = dict(HEADS=heads, DIM=dim, BLOCK=block, num_warps=block // 16)  # 16 rows each
        ctx.key_options = dict(SLOTS=slots, IS_RAGGED=tokens % block > 0)
        _full_forward[ctx.grid](
            qkv, mem_kv, out, lse, tokens, ctx.scale, **ctx.options, **ctx.key_options)  # fmt: skip
        ctx.save_for_backward(qkv, mem_kv, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        qkv, mem_kv, out, lse = ctx.saved_tensors
        images, tokens, _ = qkv.shape
        dout = dout.contiguous()
        dqkv = torch.empty_like(qkv)
        blocks = triton.cdiv(tokens, ctx.options["BLOCK"])
        dmem_kv = lse.new_empty(images * blocks, *mem_kv.shape)
        delta = torch.empty_like(lse)
        _full_backward_q[ctx.grid](
            qkv, mem_kv, out, lse, dout, dqkv, dmem_kv, delta, tokens, ctx.scale,
            **ctx.options, **ctx.key_options)  # fmt: skip
        _full_backward_kv[ctx.grid](qkv, lse, dout, delta, dqkv, tokens, ctx.scale, **ctx.options)
        return dqkv, dmem_kv.sum(0).to(mem_kv.dtype)
