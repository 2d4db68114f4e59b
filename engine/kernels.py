"""Triton kernels for what lies between a Unet's matrix products, forward and backward, on channels-last images.

Between two convolutions a plain network reads and writes every activation half a dozen times; here it is once. The
formulas in plain PyTorch, which these are tested against, are in engine.unet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 264  # enough to fill a GPU of 132 multiprocessors twice
TILE = 4096  # values that a program holds of each array


@triton.jit
def _norm_forward(
    x, bias, gain, modulation, residual, residual_bias, y, modulation_stride, pixels, channels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr, MODULATED: tl.constexpr, RESIDUAL: tl.constexpr,
    RESIDUAL_BIAS: tl.constexpr, ACTIVATED: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    here = columns < channels
    inside = (rows < pixels)[:, None] & here[None, :]
    at = (image * pixels + rows)[:, None] * channels + columns[None, :]
    v = tl.load(x + at, inside, 0.0).to(tl.float32)
    if BIAS:
        v += tl.load(bias + columns, here, 0.0).to(tl.float32)[None, :]
    length = tl.maximum(tl.sqrt(tl.sum(v * v, 1)), 1e-12)
    g = tl.load(gain + columns, here, 0.0).to(tl.float32) * tl.sqrt(channels.to(tl.float32))
    u = v / length[:, None] * g[None, :]
    if MODULATED:
        m = modulation + image * modulation_stride + columns
        u = u * (tl.load(m, here, 0.0).to(tl.float32) + 1)[None, :]
        u += tl.load(m + channels, here, 0.0).to(tl.float32)[None, :]
    if ACTIVATED:
        u = u * tl.sigmoid(u)
    if RESIDUAL:
        u += tl.load(residual + at, inside, 0.0).to(tl.float32)
    if RESIDUAL_BIAS:
        u += tl.load(residual_bias + columns, here, 0.0).to(tl.float32)[None, :]
    tl.store(y + at, u, inside)


@triton.jit
def _norm_backward(
    x, bias, gain, modulation, dy, dx, sums, modulation_stride, dy_row, pixels, channels, share,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr, MODULATED: tl.constexpr, RESIDUAL: tl.constexpr,
    ACTIVATED: tl.constexpr,
):  # fmt: skip
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, COLUMNS)
    here = columns < channels
    root = tl.sqrt(channels.to(tl.float32))
    g = tl.load(gain + columns, here, 0.0).to(tl.float32) * root
    b = tl.zeros([COLUMNS], tl.float32)
    if BIAS:
        b = tl.load(bias + columns, here, 0.0).to(tl.float32)
    shift = tl.zeros([COLUMNS], tl.float32)
    if MODULATED:
        m = modulation + image * modulation_stride + columns
        g = g * (tl.load(m, here, 0.0).to(tl.float32) + 1)
        shift = tl.load(m + channels, here, 0.0).to(tl.float32)
    # summed over rows only once, at the end: a sum across threads in every round took most of the time
    for_gain = tl.zeros([ROWS, COLUMNS], tl.float32)
    for_shift = tl.zeros([ROWS, COLUMNS], tl.float32)
    for_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, share, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = ((row < share) & (part * share + row < pixels))[:, None] & here[None, :]
        at = image * pixels + part * share + row
        v = tl.load(x + at[:, None] * channels + columns[None, :], inside, 0.0).to(tl.float32)
        v = tl.where(inside, v + b[None, :], 0.0)
        d = tl.load(dy + at[:, None] * dy_row + columns[None, :], inside, 0.0).to(tl.float32)
        shorter = 1 / tl.maximum(tl.sqrt(tl.sum(v * v, 1)), 1e-12)
        n = v * shorter[:, None]
        if RESIDUAL:
            for_shift += d
        if ACTIVATED:
            u = n * g[None, :] + shift[None, :]
            s = tl.sigmoid(u)
            d = d * s * (1 + u * (1 - s))
        if MODULATED:
            for_shift += d
        for_gain += d * n
        d = d * g[None, :]
        d = (d - n * tl.sum(d * n, 1)[:, None]) * shorter[:, None]
        if BIAS:
            for_bias += d
        tl.store(dx + at[:, None] * channels + columns[None, :], d, inside)
    stride = tl.num_programs(0) * tl.num_programs(1) * channels
    place = sums + (image * tl.num_programs(1) + part) * channels + columns
    tl.store(place, tl.sum(for_gain, 0) * root, here)
    if MODULATED or RESIDUAL:
        tl.store(place + stride, tl.sum(for_shift, 0), here)
    if BIAS:
        tl.store(place + 2 * stride, tl.sum(for_bias, 0), here)


@triton.jit
def _norm_finish(
    sums, gain, modulation, dgain, dbias, dmodulation, dresidual_bias, modulation_stride, images, channels,
    IMAGES: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr, MODULATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    here = columns < channels
    stride = images * PARTS * channels
    g = tl.load(gain + columns, here, 0.0).to(tl.float32)
    for_gain, for_bias = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for_residual = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, images, IMAGES):
        image = start + tl.arange(0, IMAGES)
        inside = (image < images)[:, None] & here[None, :]
        row = image[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
        at = row[:, :, None] * channels + columns[None, None, :]
        whole = (image < images)[:, None, None] & here[None, None, :]
        a = tl.sum(tl.load(sums + at, whole, 0.0), 1)
        if BIAS:
            for_bias += tl.sum(tl.sum(tl.load(sums + 2 * stride + at, whole, 0.0), 1), 0)
        if RESIDUAL:
            for_residual += tl.sum(tl.sum(tl.load(sums + stride + at, whole, 0.0), 1), 0)
        if MODULATED:
            m = image[:, None] * modulation_stride + columns[None, :]
            scale = tl.load(modulation + m, inside, 0.0).to(tl.float32)
            d = image[:, None] * (2 * channels) + columns[None, :]
            tl.store(dmodulation + d, a * g[None, :], inside)
            tl.store(dmodulation + d + channels, tl.sum(tl.load(sums + stride + at, whole, 0.0), 1), inside)
            a = a * (scale + 1)
        for_gain += tl.sum(a, 0)
    tl.store(dgain + columns, for_gain, here)
    if BIAS:
        tl.store(dbias + columns, for_bias, here)
    if RESIDUAL:
        tl.store(dresidual_bias + columns, for_residual, here)


def rows_of(x: Tensor) -> Tensor:
    """x (B, C, H, W) such that each pixel's channels lie together and all pixels follow at equal distances."""
    _, channels, height, width = x.shape
    if height * width == 1:  # where the distance of pixels may be anything, and no copy changes it
        return x.contiguous().as_strided(x.shape, (channels, 1, channels, channels))
    good = x.stride(1) == 1 and x.stride(2) == width * x.stride(3) and x.stride(0) == height * x.stride(2)
    return x if good else x.contiguous(memory_format=torch.channels_last)


def tiles(channels: int, pixels: int) -> dict[str, int]:
    """Rows and columns that a program holds at once, and its warps."""
    columns = triton.next_power_of_2(channels)
    rows = min(max(TILE // columns, 1), triton.next_power_of_2(pixels))
    return dict(ROWS=rows, COLUMNS=columns, num_warps=max(1, min(rows * columns // 512, 8)))


class Norm(torch.autograd.Function):
    """engine.unet.norm in one pass over its inputs, and in one over them and the gradient backwards.

    The modulation comes instead of a residual with its own bias, not with it.
    """

    @staticmethod
    def forward(ctx, x, bias, gain, modulation, residual, residual_bias, activated):
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        images, channels, height, width = x.shape
        y, pixels = torch.empty_like(x), height * width
        tile = tiles(channels, pixels)
        _norm_forward[images, triton.cdiv(pixels, tile["ROWS"])](
            x, bias, gain, modulation, residual, residual_bias, y, 0 if modulation is None else modulation.stride(0),
            pixels, channels, BIAS=bias is not None, MODULATED=modulation is not None, RESIDUAL=residual is not None,
            RESIDUAL_BIAS=residual_bias is not None, ACTIVATED=activated, **tile,
        )  # fmt: skip
        ctx.save_for_backward(x, bias, gain, modulation, residual_bias)
        ctx.activated, ctx.residual = activated, residual is not None
        return y

    @staticmethod
    def backward(ctx, dy):
        x, bias, gain, modulation, residual_bias = ctx.saved_tensors
        dy = rows_of(dy)
        images, channels, height, width = x.shape
        dx, pixels = torch.empty_like(x), height * width
        tile, parts = tiles(channels, pixels), 1
        while images * parts < PROGRAMS and tile["ROWS"] * parts < pixels and parts < 64:
            parts *= 2
        sums = torch.empty((3, images, parts, channels), device=x.device)
        dgain, dbias, dmodulation, dresidual_bias = (
            None if value is None else torch.empty(value.shape, dtype=value.dtype, device=value.device)
            for value in (gain, bias, modulation, residual_bias)
        )
        stride = 0 if modulation is None else modulation.stride(0)
        flags = dict(BIAS=bias is not None, MODULATED=modulation is not None, RESIDUAL=residual_bias is not None)
        _norm_backward[images, parts](
            x, bias, gain, modulation, dy, dx, sums, stride, dy.stride(3), pixels, channels,
            triton.cdiv(pixels, parts), ACTIVATED=ctx.activated, **flags, **tile,
        )  # fmt: skip
        _norm_finish[(triton.cdiv(channels, 16),)](
            sums, gain, modulation, dgain, dbias, dmodulation, dresidual_bias, stride, images, channels,
            IMAGES=max(256 // parts, 1), PARTS=parts, COLUMNS=16, **flags, num_warps=8,
        )  # fmt: skip
        return dx, dbias, dgain, dmodulation, dy if ctx.residual else None, dresidual_bias, None


@triton.jit
def _add_bias(x, bias, count, channels, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    v = tl.load(x + at, inside, 0.0).to(tl.float32) + tl.load(bias + at % channels, inside, 0.0).to(tl.float32)
    tl.store(x + at, v, inside)


@triton.jit
def _sum_rows(x, sums, row_stride, rows, channels, share, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    part = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    here = columns < channels
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, share, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = ((row < share) & (part * share + row < rows))[:, None] & here[None, :]
        at = (part * share + row)[:, None] * row_stride + columns[None, :]
        total += tl.load(x + at, inside, 0.0).to(tl.float32)
    tl.store(sums + part * channels + columns, tl.sum(total, 0), here)


class AddBias(torch.autograd.Function):
    """x + bias, written over x, a convolution's channels-last output; PyTorch's own sum of the gradient is slow."""

    @staticmethod
    def forward(ctx, x, bias):
        ctx.mark_dirty(x)
        ctx.channels, ctx.dtype = x.shape[1], bias.dtype
        _add_bias[(triton.cdiv(x.numel(), 2048),)](x, bias, x.numel(), ctx.channels, SIZE=2048)
        return x

    @staticmethod
    def backward(ctx, dy):
        rows, flat = dy.numel() // ctx.channels, rows_of(dy)
        tile = tiles(ctx.channels, rows)
        parts = min(PROGRAMS, triton.cdiv(rows, tile["ROWS"]))
        sums = torch.empty((parts, ctx.channels), device=dy.device)
        _sum_rows[(parts,)](flat, sums, flat.stride(3), rows, ctx.channels, triton.cdiv(rows, parts), **tile)
        return dy, sums.sum(0).to(ctx.dtype)


@triton.jit
def _attend(
    qkv, memory, out, context, log_sum, tokens, scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, MEMORY: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, n, width = tl.arange(0, DIM), tl.arange(0, TOKENS), 3 * HEADS * DIM
    q = qkv + image * tokens * width + head * DIM
    k, v = q + HEADS * DIM, q + 2 * HEADS * DIM
    kind = qkv.dtype.element_ty
    slot = tl.arange(0, 16)
    slots = memory + head * DIM * MEMORY + d[None, :] * MEMORY + slot[:, None]
    there = (slot < MEMORY)[:, None] & (d < DIM)[None, :]
    memory_k = tl.load(slots, there, -float("inf")).to(tl.float32)
    memory_v = tl.load(slots + HEADS * DIM * MEMORY, there, 0.0).to(kind)
    top = tl.max(memory_k, 0)
    memory_k = tl.exp(memory_k - top[None, :])
    total = tl.sum(memory_k, 0)
    kv = tl.dot(tl.trans(memory_k.to(kind)), memory_v, input_precision=PRECISION)
    for start in range(0, tokens, TOKENS):
        inside = (start + n < tokens)[:, None] & (d < DIM)[None, :]
        at = (start + n)[:, None] * width + d[None, :]
        k_n = tl.load(k + at, inside, -float("inf")).to(tl.float32)
        v_n = tl.load(v + at, inside, 0.0)
        higher = tl.maximum(top, tl.max(k_n, 0))
        fade = tl.exp(top - higher)
        e = tl.exp(k_n - higher[None, :])
        total = total * fade + tl.sum(e, 0)
        kv = kv * fade[:, None] + tl.dot(tl.trans(e.to(kind)), v_n, input_precision=PRECISION)
        top = higher
    kv = kv / total[:, None]
    number = image * HEADS + head
    tl.store(context + number * DIM * DIM + d[:, None] * DIM + d[None, :], kv)
    tl.store(log_sum + number * DIM + d, top + tl.log(total))
    kv = kv.to(kind)
    for start in range(0, tokens, TOKENS):
        inside = (start + n < tokens)[:, None] & (d < DIM)[None, :]
        q_n = tl.load(q + (start + n)[:, None] * width + d[None, :], inside, 0.0).to(tl.float32)
        e = tl.exp(q_n - tl.max(q_n, 1)[:, None])
        e = e * (scale / tl.sum(e, 1))[:, None]
        y = tl.dot(e.to(kind), kv, input_precision=PRECISION)
        at = (image * tokens + start + n)[:, None] * (HEADS * DIM) + head * DIM + d[None, :]
        tl.store(out + at, y, inside)


@triton.jit
def _attend_backward(
    qkv, memory, context, log_sum, dout, dqkv, dmemory, tokens, scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, MEMORY: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, n, width = tl.arange(0, DIM), tl.arange(0, TOKENS), 3 * HEADS * DIM
    base = image * tokens * width + head * DIM
    q, dq = qkv + base, dqkv + base
    kind = qkv.dtype.element_ty
    number = image * HEADS + head
    kv = tl.load(context + number * DIM * DIM + d[:, None] * DIM + d[None, :])
    level = tl.load(log_sum + number * DIM + d)
    dkv = tl.zeros([DIM, DIM], tl.float32)
    for start in range(0, tokens, TOKENS):
        inside = (start + n < tokens)[:, None] & (d < DIM)[None, :]
        at = (start + n)[:, None] * width + d[None, :]
        q_n = tl.load(q + at, inside, 0.0).to(tl.float32)
        out_at = (image * tokens + start + n)[:, None] * (HEADS * DIM) + head * DIM + d[None, :]
        dy = tl.load(dout + out_at, inside, 0.0)
        e = tl.exp(q_n - tl.max(q_n, 1)[:, None])
        p = e / tl.sum(e, 1)[:, None]
        dkv += tl.dot(tl.trans((p * scale).to(kind)), dy, input_precision=PRECISION)
        dp = tl.dot(dy, tl.trans(kv.to(kind)), input_precision=PRECISION) * scale
        tl.store(dq + at, p * (dp - tl.sum(dp * p, 1)[:, None]), inside)
    common = tl.sum(dkv * kv, 1)  # sum over tokens of k_n * dk_n
    dkv = dkv.to(kind)
    k, dk = q + HEADS * DIM, dq + HEADS * DIM
    for start in range(0, tokens, TOKENS):
        inside = (start + n < tokens)[:, None] & (d < DIM)[None, :]
        at = (start + n)[:, None] * width + d[None, :]
        e = tl.exp(tl.load(k + at, inside, -float("inf")).to(tl.float32) - level[None, :])
        v_n = tl.load(k + HEADS * DIM + at, inside, 0.0)
        dk_n = tl.dot(v_n, tl.trans(dkv), input_precision=PRECISION)
        tl.store(dk + at, e * (dk_n - common[None, :]), inside)
        tl.store(dk + HEADS * DIM + at, tl.dot(e.to(kind), dkv, input_precision=PRECISION), inside)
    slot = tl.arange(0, 16)
    at = head * DIM * MEMORY + d[None, :] * MEMORY + slot[:, None]
    there = (slot < MEMORY)[:, None] & (d < DIM)[None, :]
    e = tl.exp(tl.load(memory + at, there, -float("inf")).to(tl.float32) - level[None, :])
    v_n = tl.load(memory + HEADS * DIM * MEMORY + at, there, 0.0).to(kind)
    dk_n = tl.dot(v_n, tl.trans(dkv), input_precision=PRECISION)
    dmemory += image * 2 * HEADS * DIM * MEMORY
    tl.store(dmemory + at, e * (dk_n - common[None, :]), there)
    tl.store(dmemory + HEADS * DIM * MEMORY + at, tl.dot(e.to(kind), dkv, input_precision=PRECISION), there)


class LinearAttention(torch.autograd.Function):
    """Linear attention over qkv (B, N, 3 * heads * D) and memory slots, in one pass; see engine.unet.attend."""

    @staticmethod
    def forward(ctx, qkv, memory):
        _, heads, dim, slots = memory.shape
        qkv, memory = qkv.contiguous(), memory.contiguous()
        images, tokens, _ = qkv.shape
        out = qkv.new_empty(images, tokens, heads * dim)
        context = torch.empty((images, heads, dim, dim), device=qkv.device)
        log_sum = torch.empty((images, heads, dim), device=qkv.device)
        ctx.options = dict(
            HEADS=heads, DIM=dim, MEMORY=slots, TOKENS=min(max(triton.next_power_of_2(tokens), 16), 2048 // dim),
            PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
        )  # fmt: skip
        _attend[images, heads](qkv, memory, out, context, log_sum, tokens, dim**-0.5, **ctx.options)
        ctx.save_for_backward(qkv, memory, context, log_sum)
        return out

    @staticmethod
    def backward(ctx, dout):
        qkv, memory, context, log_sum = ctx.saved_tensors
        images, tokens, _ = qkv.shape
        dqkv, dmemory = torch.empty_like(qkv), torch.empty((images, *memory.shape), device=qkv.device)
        _attend_backward[images, memory.shape[1]](
            qkv, memory, context, log_sum, dout.contiguous(), dqkv, dmemory, tokens, memory.shape[2] ** -0.5,
            **ctx.options,
        )  # fmt: skip
        return dqkv, dmemory.sum(0).to(memory.dtype)


def suits(memory: Tensor) -> bool:
    """Whether the kernel does attention of these memory slots (2, heads, D, slots)."""
    _, _, dim, slots = memory.shape
    return dim in (16, 32, 64) and slots <= 16


@triton.jit
def _adam(
    weights, gradient, mean, square, rate, factor, good, steps, count, beta1, beta2, epsilon, SIZE: tl.constexpr
):  # fmt: skip
    if tl.load(good) > 0:
        at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
        inside = at < count
        t = tl.load(steps)
        g = tl.load(gradient + at, inside, 0.0) * tl.load(factor)
        m = tl.load(mean + at, inside, 0.0)
        v = tl.load(square + at, inside, 0.0)
        m += (1 - beta1) * (g - m)
        v += (1 - beta2) * (g * g - v)
        tl.store(mean + at, m, inside)
        tl.store(square + at, v, inside)
        root = tl.sqrt(v / (1 - tl.exp2(t * tl.log2(beta2)))) + epsilon
        w = tl.load(weights + at, inside, 0.0)
        w -= tl.load(rate) / (1 - tl.exp2(t * tl.log2(beta1))) * m / root
        tl.store(weights + at, w, inside)


def adam(
    weights: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, rate: Tensor, factor: Tensor, good: Tensor,
    steps: Tensor, betas: tuple[float, float], epsilon: float,
) -> None:  # fmt: skip
    """engine.optimizer.Adam.update in one pass: all vectors are contiguous, rate, factor, good and steps scalars."""
    _adam[(triton.cdiv(weights.numel(), 2048),)](
        weights, gradient, mean, square, rate, factor, good, steps, weights.numel(), *betas, epsilon, SIZE=2048
    )


@triton.jit
def _momentum(gradient, mean, ahead, factor, good, count, momentum, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    if tl.load(good) > 0:
        g = tl.load(gradient + at, inside, 0.0) * tl.load(factor)
        m = tl.load(mean + at, inside, 0.0)
        m += (1 - momentum) * (g - m)
        tl.store(mean + at, m, inside)
        tl.store(ahead + at, g + momentum * (m - g), inside)
    else:
        tl.store(ahead + at, tl.zeros([SIZE], tl.float32), inside)


def momentum(gradient: Tensor, mean: Tensor, ahead: Tensor, factor: Tensor, good: Tensor, momentum: float) -> None:
    """engine.optimizer.Muon.ahead in one pass, into `ahead`: all vectors are contiguous, factor and good scalars."""
    if gradient.numel():
        _momentum[(triton.cdiv(gradient.numel(), 2048),)](
            gradient, mean, ahead, factor, good, gradient.numel(), momentum, SIZE=2048
        )
