"""Triton kernels for the work between matrix products, and for the optimizers.

Images are channels-last: a row is the C channels of a pixel. Between two convolutions PyTorch reads
and writes an activation about six times, a kernel once. Kernels compute in fp32. A pointer that is
None removes its term when the kernel is compiled. engine.unet and engine.optimizer have the same
formulas in plain PyTorch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TARGET_PROGRAMS = 528  # four for each of the 132 multiprocessors of an H100
MAX_PROGRAMS_PER_IMAGE = 64
MAX_GRID_Y = 65_535  # programs along axis 1 or 2 of a launch grid; axis 0 takes 2^31 - 1
TILE_ELEMENTS = 1024  # of each array that a program holds at a time
BLOCK_SIZE = 2048  # elements for each program of an elementwise kernel


@triton.jit
def _load_fp32(ptr, mask):
    return tl.load(ptr, mask, 0.0).to(tl.float32)


@triton.jit
def _norm_forward(x_ptr, bias_ptr, gain_ptr, modulation_ptr, residual_ptr, residual_bias_ptr, y_ptr,
                  modulation_stride, pixels, channels, ACTIVATE: tl.constexpr, ROWS: tl.constexpr,
                  COLS: tl.constexpr):  # fmt: skip
    """Bias, RMSNorm, modulation, SiLU, residual:

    n = (x + bias) / |x + bias|    u = n * gain * sqrt(C) * (scale + 1) + shift
    y = silu(u) + residual + residual_bias
    modulation: scale (C), then shift (C), of each image; rows are modulation_stride apart. Programs
    (image, *) do the tiles of an image: all channels of ROWS pixels each.
    """
    image = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    rows = tile * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    col_mask = cols < channels
    mask = (rows < pixels)[:, None] & col_mask[None, :]
    offsets = (image * pixels + rows)[:, None] * channels + cols[None, :]

    # Bias and norm.
    x = _load_fp32(x_ptr + offsets, mask)
    if bias_ptr is not None:
        x += _load_fp32(bias_ptr + cols, col_mask)[None, :]
    norm = tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)
    n = x / norm[:, None]
    factor = _load_fp32(gain_ptr + cols, col_mask) * tl.sqrt(channels.to(tl.float32))
    u = n * factor[None, :]

    # Modulation, SiLU, residual.
    if modulation_ptr is not None:
        scale_ptr = modulation_ptr + image * modulation_stride + cols
        u = u * (_load_fp32(scale_ptr, col_mask) + 1)[None, :]
        u += _load_fp32(scale_ptr + channels, col_mask)[None, :]
    y = u
    if ACTIVATE:
        y = u * tl.sigmoid(u)
    if residual_ptr is not None:
        y += _load_fp32(residual_ptr + offsets, mask)
    if residual_bias_ptr is not None:
        y += _load_fp32(residual_bias_ptr + cols, col_mask)[None, :]
    tl.store(y_ptr + offsets, y, mask)


@triton.jit(do_not_specialize=["rows_per_program"])  # or two kernels would be compiled for it
def _norm_backward(x_ptr, bias_ptr, gain_ptr, modulation_ptr, residual_bias_ptr, dy_ptr, dx_ptr,
                   sums_ptr, modulation_stride, dy_stride, pixels, channels, rows_per_program,
                   ACTIVATE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """dx, and sums over pixels for the other gradients; n and u as in _norm_forward:

    factor = gain * sqrt(C) * (scale + 1)    u = n * factor + shift    du = dy * silu'(u)
    dn = du * factor                         dx = (dn - n * sum(dn * n)) / |x + bias|
    Program (image, i) loops over the i-th rows_per_program pixels, ROWS at a time. It stores its
    sums (3, images, programs, C): [0] du * n * sqrt(C); [1] du, or dy if there is a residual bias;
    [2] dx.
    """
    image = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    cols = tl.arange(0, COLS)
    col_mask = cols < channels
    sqrt_channels = tl.sqrt(channels.to(tl.float32))
    factor = _load_fp32(gain_ptr + cols, col_mask) * sqrt_channels
    bias = tl.zeros([COLS], tl.float32)
    if bias_ptr is not None:
        bias = _load_fp32(bias_ptr + cols, col_mask)
    shift = tl.zeros([COLS], tl.float32)
    if modulation_ptr is not None:
        scale_ptr = modulation_ptr + image * modulation_stride + cols
        factor = factor * (_load_fp32(scale_ptr, col_mask) + 1)
        shift = _load_fp32(scale_ptr + channels, col_mask)

    # Rows are summed once, at the end: a sum across threads in each round is slow.
    dgain_acc = tl.zeros([ROWS, COLS], tl.float32)
    dshift_acc = tl.zeros([ROWS, COLS], tl.float32)
    dbias_acc = tl.zeros([ROWS, COLS], tl.float32)
    end = tl.minimum((program + 1) * rows_per_program, pixels)
    for start in tl.range(program * rows_per_program, end, ROWS, num_stages=2):  # prefetches
        pixel = start + tl.arange(0, ROWS)
        mask = (pixel < end)[:, None] & col_mask[None, :]
        row = image * pixels + pixel
        x = _load_fp32(x_ptr + row[:, None] * channels + cols[None, :], mask)
        x = tl.where(mask, x + bias[None, :], 0.0)
        dy = _load_fp32(dy_ptr + row[:, None] * dy_stride + cols[None, :], mask)
        inv_norm = 1 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)
        n = x * inv_norm[:, None]
        if residual_bias_ptr is not None:
            dshift_acc += dy
        du = dy
        if ACTIVATE:
            u = n * factor[None, :] + shift[None, :]
            sigmoid = tl.sigmoid(u)
            du = dy * sigmoid * (1 + u * (1 - sigmoid))
        if modulation_ptr is not None:
            dshift_acc += du
        dgain_acc += du * n
        dn = du * factor[None, :]
        dx = (dn - n * tl.sum(dn * n, 1)[:, None]) * inv_norm[:, None]
        dbias_acc += dx
        tl.store(dx_ptr + row[:, None] * channels + cols[None, :], dx, mask)

    sums_stride = tl.num_programs(0) * tl.num_programs(1) * channels
    sums_ptr += (image * tl.num_programs(1) + program) * channels + cols
    tl.store(sums_ptr, tl.sum(dgain_acc, 0) * sqrt_channels, col_mask)
    if modulation_ptr is not None or residual_bias_ptr is not None:
        tl.store(sums_ptr + sums_stride, tl.sum(dshift_acc, 0), col_mask)
    if bias_ptr is not None:
        tl.store(sums_ptr + 2 * sums_stride, tl.sum(dbias_acc, 0), col_mask)


@triton.jit
def _norm_reduce(sums_ptr, gain_ptr, modulation_ptr, dgain_ptr, dbias_ptr, dmodulation_ptr,
                 dresidual_bias_ptr, modulation_stride, images, channels, IMAGES: tl.constexpr,
                 PROGRAMS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """Gradients of all but x from _norm_backward's sums (3, images, PROGRAMS, C).

    For each image dscale = gain * sums[0] and dshift = sums[1]; dgain is the sum over images of
    (scale + 1) * sums[0]. Program i does the i-th COLS channels, IMAGES images at a time.
    """
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    col_mask = cols < channels
    sums_stride = images * PROGRAMS * channels
    gain = _load_fp32(gain_ptr + cols, col_mask)

    # Sums over programs, then over images.
    dgain_acc = tl.zeros([COLS], tl.float32)
    dbias_acc = tl.zeros([COLS], tl.float32)
    dresidual_acc = tl.zeros([COLS], tl.float32)
    for start in range(0, images, IMAGES):
        image = start + tl.arange(0, IMAGES)
        mask = (image < images)[:, None] & col_mask[None, :]
        row = image[:, None] * PROGRAMS + tl.arange(0, PROGRAMS)[None, :]
        tile_ptr = sums_ptr + row[:, :, None] * channels + cols[None, None, :]
        tile_mask = mask[:, None, :]
        dgain = tl.sum(tl.load(tile_ptr, tile_mask, 0.0), 1)
        if dbias_ptr is not None:
            dbias_acc += tl.sum(tl.sum(tl.load(tile_ptr + 2 * sums_stride, tile_mask, 0.0), 1), 0)
        dshift = tl.sum(tl.load(tile_ptr + sums_stride, tile_mask, 0.0), 1)
        if dresidual_bias_ptr is not None:
            dresidual_acc += tl.sum(dshift, 0)
        if modulation_ptr is not None:
            scale_ptr = modulation_ptr + image[:, None] * modulation_stride + cols[None, :]
            dscale_ptr = dmodulation_ptr + image[:, None] * (2 * channels) + cols[None, :]
            tl.store(dscale_ptr, dgain * gain[None, :], mask)
            tl.store(dscale_ptr + channels, dshift, mask)
            dgain = dgain * (_load_fp32(scale_ptr, mask) + 1)
        dgain_acc += tl.sum(dgain, 0)
    tl.store(dgain_ptr + cols, dgain_acc, col_mask)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + cols, dbias_acc, col_mask)
    if dresidual_bias_ptr is not None:
        tl.store(dresidual_bias_ptr + cols, dresidual_acc, col_mask)


def as_channels_last_rows(x: Tensor) -> Tensor:
    """Returns x (B, C, H, W) as rows of adjacent channels that are stride(3) apart.

    Copies x only if it is stored otherwise.
    """
    _, channels, height, width = x.shape
    is_evenly_spaced = x.stride(2) == width * x.stride(3) and x.stride(0) == height * x.stride(2)
    if is_evenly_spaced and x.stride(1) == 1:
        return x
    x = x.contiguous(memory_format=torch.channels_last)
    # Axes of size 1 may still have any stride.
    return x.as_strided(x.shape, (height * width * channels, 1, width * channels, channels))


def launch_config(channels: int, pixels: int) -> dict[str, int]:
    """Returns rows and columns of a program's tile, and the number of its warps."""
    cols = triton.next_power_of_2(channels)
    rows = min(max(TILE_ELEMENTS // cols, 1), triton.next_power_of_2(pixels))
    # Each of the 32 threads of a warp has 16 elements in its registers, more only above 8 warps.
    return dict(ROWS=rows, COLS=cols, num_warps=max(1, min(rows * cols // 512, 8)))


class NormFunction(torch.autograd.Function):
    """engine.unet.norm_act; with a modulation or a residual bias, not both."""

    @staticmethod
    def forward(ctx, x, bias, gain, modulation, residual, residual_bias, activate):
        assert modulation is None or residual_bias is None  # sums[1] is for one of them
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        images, channels, height, width = x.shape
        y = torch.empty_like(x)
        ctx.config = launch_config(channels, height * width)
        tiles = triton.cdiv(height * width, ctx.config["ROWS"])
        grid_z = triton.cdiv(tiles, MAX_GRID_Y)
        ctx.modulation_stride = 0 if modulation is None else modulation.stride(0)
        ctx.activate = activate
        ctx.save_for_backward(x, bias, gain, modulation, residual_bias)
        _norm_forward[images, triton.cdiv(tiles, grid_z), grid_z](
            x, bias, gain, modulation, residual, residual_bias, y, ctx.modulation_stride,
            height * width, channels, activate, **ctx.config)  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, bias, gain, modulation, residual_bias = ctx.saved_tensors
        dy = as_channels_last_rows(dy)
        images, channels, height, width = x.shape
        pixels = height * width
        dx = torch.empty_like(x)
        dgain, dbias, dmodulation, dresidual_bias = (
            None if p is None else torch.empty(p.shape, dtype=p.dtype, device=p.device)
            for p in (gain, bias, modulation, residual_bias)
        )
        # Each image is split over programs until the GPU is full.
        max_programs = min(triton.cdiv(pixels, ctx.config["ROWS"]), MAX_PROGRAMS_PER_IMAGE)
        programs = min(triton.cdiv(TARGET_PROGRAMS, images), max_programs)
        programs = triton.next_power_of_2(programs)
        sums = torch.empty((3, images, programs, channels), dtype=torch.float32, device=x.device)
        _norm_backward[images, programs](
            x, bias, gain, modulation, residual_bias, dy, dx, sums, ctx.modulation_stride,
            dy.stride(3), pixels, channels, triton.cdiv(pixels, programs), ctx.activate,
            **ctx.config)  # fmt: skip
        # Tiles of 256 rows and 16 channels (64 adjacent bytes): 16 values in registers of a thread.
        _norm_reduce[(triton.cdiv(channels, 16),)](
            sums, gain, modulation, dgain, dbias, dmodulation, dresidual_bias,
            ctx.modulation_stride, images, channels, IMAGES=max(256 // programs, 1),
            PROGRAMS=programs, COLS=16, num_warps=8)  # fmt: skip
        dresidual = dy if ctx.needs_input_grad[4] else None
        return dx, dbias, dgain, dmodulation, dresidual, dresidual_bias, None


@triton.jit
def _add_bias(x_ptr, bias_ptr, numel, channels, BLOCK: tl.constexpr):
    """x += bias in place; each program does BLOCK elements."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    y = _load_fp32(x_ptr + offsets, mask) + _load_fp32(bias_ptr + offsets % channels, mask)
    tl.store(x_ptr + offsets, y, mask)


@triton.jit
def _sum_rows(x_ptr, sums_ptr, x_stride, rows, channels, rows_per_program, ROWS: tl.constexpr,
              COLS: tl.constexpr):  # fmt: skip
    """Program i sums the i-th rows_per_program rows of x into sums (programs, C)."""
    program = tl.program_id(0)
    cols = tl.arange(0, COLS)
    col_mask = cols < channels
    acc = tl.zeros([ROWS, COLS], tl.float32)
    end = tl.minimum((program + 1) * rows_per_program, rows)
    for start in range(program * rows_per_program, end, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & col_mask[None, :]
        acc += _load_fp32(x_ptr + row[:, None].to(tl.int64) * x_stride + cols[None, :], mask)
    tl.store(sums_ptr + program * channels + cols, tl.sum(acc, 0), col_mask)


class AddBiasFunction(torch.autograd.Function):
    """Adds bias (C,) in place to x, the channels-last output of a convolution."""

    @staticmethod
    def forward(ctx, x, bias):
        ctx.mark_dirty(x)
        ctx.channels = len(bias)
        ctx.dtype = bias.dtype
        programs = triton.cdiv(x.numel(), BLOCK_SIZE)
        _add_bias[(programs,)](x, bias, x.numel(), len(bias), BLOCK=BLOCK_SIZE)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        rows = dy.numel() // ctx.channels
        dy_rows = as_channels_last_rows(dy)
        config = launch_config(ctx.channels, rows)
        programs = min(TARGET_PROGRAMS, triton.cdiv(rows, config["ROWS"]))
        sums = torch.empty((programs, ctx.channels), dtype=torch.float32, device=dy.device)
        _sum_rows[(programs,)](
            dy_rows, sums, dy_rows.stride(3), rows, ctx.channels, triton.cdiv(rows, programs),
            **config)  # fmt: skip
        return dy, sums.sum(0).to(ctx.dtype)


@triton.jit
def _adam(param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, lr_ptr, grad_scale_ptr, is_finite_ptr,
          step_count_ptr, numel, beta1, beta2, epsilon, BLOCK: tl.constexpr):  # fmt: skip
    """Adam (arXiv:1412.6980) for g = grad * grad_scale; each program does BLOCK elements:

    exp_avg += (1 - beta1) * (g - exp_avg)    exp_avg_sq += (1 - beta2) * (g^2 - exp_avg_sq)
    root = sqrt(exp_avg_sq / (1 - beta2^step)) + epsilon
    param -= lr / (1 - beta1^step) * exp_avg / root
    """
    if tl.load(is_finite_ptr) > 0:
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < numel
        step = tl.load(step_count_ptr)
        grad = tl.load(grad_ptr + offsets, mask, 0.0) * tl.load(grad_scale_ptr)
        exp_avg = tl.load(exp_avg_ptr + offsets, mask, 0.0)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask, 0.0)
        exp_avg += (1 - beta1) * (grad - exp_avg)
        exp_avg_sq += (1 - beta2) * (grad * grad - exp_avg_sq)
        tl.store(exp_avg_ptr + offsets, exp_avg, mask)
        tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq, mask)
        root = tl.sqrt(exp_avg_sq / (1 - tl.exp2(step * tl.log2(beta2)))) + epsilon
        param = tl.load(param_ptr + offsets, mask, 0.0)
        param -= tl.load(lr_ptr) / (1 - tl.exp2(step * tl.log2(beta1))) * exp_avg / root
        tl.store(param_ptr + offsets, param, mask)


def adam(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, lr: Tensor,
         grad_scale: Tensor, is_finite: Tensor, step_count: Tensor, betas: tuple[float, float],
         epsilon: float) -> None:  # fmt: skip
    """Updates param, exp_avg and exp_avg_sq in place, unless is_finite is 0.

    The first four are contiguous vectors, lr to step_count scalars on the device.
    """
    _adam[(triton.cdiv(param.numel(), BLOCK_SIZE),)](
        param, grad, exp_avg, exp_avg_sq, lr, grad_scale, is_finite, step_count, param.numel(),
        *betas, epsilon, BLOCK=BLOCK_SIZE)  # fmt: skip


@triton.jit
def _nesterov_momentum(grad_ptr, exp_avg_ptr, momentum_ptr, grad_scale_ptr, is_finite_ptr, numel,
                       decay, BLOCK: tl.constexpr):  # fmt: skip
    """Nesterov's momentum of g = grad * grad_scale; each program does BLOCK elements:

    exp_avg += (1 - decay) * (g - exp_avg)    momentum = g + decay * (exp_avg - g)
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    momentum = tl.zeros([BLOCK], tl.float32)
    if tl.load(is_finite_ptr) > 0:
        grad = tl.load(grad_ptr + offsets, mask, 0.0) * tl.load(grad_scale_ptr)
        exp_avg = tl.load(exp_avg_ptr + offsets, mask, 0.0)
        exp_avg += (1 - decay) * (grad - exp_avg)
        tl.store(exp_avg_ptr + offsets, exp_avg, mask)
        momentum = grad + decay * (exp_avg - grad)
    tl.store(momentum_ptr + offsets, momentum, mask)


def nesterov_momentum(grad: Tensor, exp_avg: Tensor, momentum: Tensor, grad_scale: Tensor,
                      is_finite: Tensor, decay: float) -> None:  # fmt: skip
    """Updates exp_avg in place and writes momentum; if is_finite is 0, only zeros to momentum.

    The first three are contiguous vectors, momentum of any precision; the next two scalars on the
    device.
    """
    _nesterov_momentum[(triton.cdiv(grad.numel(), BLOCK_SIZE),)](
        grad, exp_avg, momentum, grad_scale, is_finite, grad.numel(), decay,
        BLOCK=BLOCK_SIZE)  # fmt: skip
