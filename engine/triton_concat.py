"""Triton kernels that concatenate channels, and split their gradient again.

Images are channels-last: a row is the C channels of a pixel. PyTorch's concatenation reaches half
of the memory's speed, and its gradient is a view, which what follows has to copy.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.triton_kernels import as_channels_last_rows

COPIED_ELEMENTS = 4096  # by a program


@triton.jit
def _concat(a_ptr, b_ptr, y_ptr, a_stride, b_stride, rows, a_channels, b_channels,
            ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """Rows of y are those of a followed by those of b.

    Program (i, 0) copies the i-th ROWS rows of a, program (i, 1) those of b.
    """
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = tl.arange(0, COLS)[None, :]
    y_ptr += row * (a_channels + b_channels) + col
    if tl.program_id(1) == 0:
        mask = (row < rows) & (col < a_channels)
        tl.store(y_ptr, tl.load(a_ptr + row * a_stride + col, mask), mask)
    else:
        mask = (row < rows) & (col < b_channels)
        tl.store(y_ptr + a_channels, tl.load(b_ptr + row * b_stride + col, mask), mask)


@triton.jit
def _add_and_split(dy_ptr, dz_ptr, da_ptr, db_ptr, dy_stride, dz_stride, rows, a_channels,
                   b_channels, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """Rows of da are the first a_channels of dy + dz, those of db the rest.

    Program (i, 0) writes the i-th ROWS rows of da, program (i, 1) those of db.
    """
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = tl.arange(0, COLS)[None, :]
    dy_ptr += row * dy_stride + col
    dz_ptr += row * dz_stride + col
    if tl.program_id(1) == 0:
        mask = (row < rows) & (col < a_channels)
        dy = tl.load(dy_ptr, mask).to(tl.float32)
        tl.store(da_ptr + row * a_channels + col, dy + tl.load(dz_ptr, mask), mask)
    else:
        mask = (row < rows) & (col < b_channels)
        dy = tl.load(dy_ptr + a_channels, mask).to(tl.float32)
        tl.store(db_ptr + row * b_channels + col, dy + tl.load(dz_ptr + a_channels, mask), mask)


def copy_grid(rows: int, a_channels: int, b_channels: int) -> tuple[tuple[int, int], dict]:
    """Returns the launch grid of the two kernels above, and their constants."""
    cols = triton.next_power_of_2(max(a_channels, b_channels))
    tile_rows = max(COPIED_ELEMENTS // cols, 1)
    return (triton.cdiv(rows, tile_rows), 2), dict(ROWS=tile_rows, COLS=cols)


def empty_rows(like: Tensor, channels: int) -> Tensor:
    """Returns an uninitialized channels-last tensor, like another but for its channels."""
    shape = (len(like), channels, *like.shape[2:])
    options = dict(dtype=like.dtype, device=like.device)
    return torch.empty(shape, **options, memory_format=torch.channels_last)


class ConcatFunction(torch.autograd.Function):
    """The channels of a, then those of b, (B, C, H, W); returned twice, for two consumers.

    So the gradients of both are added and split in one pass. ValueError if a and b differ in more
    than their channels.
    """

    @staticmethod
    def forward(ctx, a, b):
        if (len(a), *a.shape[2:]) != (len(b), *b.shape[2:]):
            raise ValueError(f"cannot concatenate {tuple(a.shape)} and {tuple(b.shape)}")
        a = as_channels_last_rows(a)
        b = as_channels_last_rows(b)
        images, a_channels, height, width = a.shape
        ctx.channels = a_channels, b.shape[1]
        y = empty_rows(a, sum(ctx.channels))
        rows = images * height * width
        grid, constants = copy_grid(rows, *ctx.channels)
        _concat[grid](a, b, y, a.stride(3), b.stride(3), rows, *ctx.channels, **constants)
        return y, y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dz):
        dy = as_channels_last_rows(dy)
        dz = as_channels_last_rows(dz)
        images, _, height, width = dy.shape
        da, db = (empty_rows(dy, channels) for channels in ctx.channels)
        rows = images * height * width
        grid, constants = copy_grid(rows, *ctx.channels)
        strides = dy.stride(3), dz.stride(3)
        _add_and_split[grid](dy, dz, da, db, *strides, rows, *ctx.channels, **constants)
        return da, db
