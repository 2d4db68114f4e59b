"""The Triton kernels against the formulas in engine.unet, interpreted on the CPU."""

from collections.abc import Callable

import pytest
import torch

from engine import triton_support, unet
from tests.helpers import channels_last, compare_gradients, needs_no_gpu

pytest.importorskip("triton", reason="PyTorch brings Triton on Linux only")
pytestmark = needs_no_gpu  # tests/test_gpu.py runs them compiled


def add_bias(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The kernel, on a copy of x, which it overwrites."""
    return unet.triton_kernels.AddBiasFunction.apply(x * 1, bias)


@pytest.fixture
def launches(monkeypatch) -> list[tuple]:
    """Grid and arguments of each kernel that is launched; none runs."""
    found = []

    def record(_, grid):
        return lambda *args, **options: found.append((grid, args))

    monkeypatch.setattr(type(unet.triton_kernels._add_bias), "__getitem__", record)
    return found


# Shapes: full tiles, several programs an image with a partial tile, more channels than 512.
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("batch, channels, size, kind", [
    (3, 64, 8, "modulated"), (2, 24, 13, "modulated"), (2, 24, 13, "residual"), (2, 40, 4, "plain"),
    (1, 520, 3, "residual"),
])  # fmt: skip
def test_norm_kernel_matches_formula(batch, channels, size, kind, dtype, limit):
    torch.manual_seed(0)
    x = channels_last(batch, channels, size, size, dtype=dtype)
    # A part of a wider matrix product.
    wide = torch.randn(batch, 3 * channels).to(dtype) if kind == "modulated" else None
    residual = x.flip(0) if kind == "residual" else None
    residual_bias = torch.randn(channels) if kind == "residual" else None
    bias = None if kind == "plain" else torch.randn(channels)
    gain = torch.randn(1, channels, 1, 1)
    # Strided as the gradient of a concatenation is.
    dy = channels_last(batch, 2 * channels, size, size, dtype=dtype)[:, channels:]

    def with_slice(function: Callable) -> Callable:
        def norm_act(x, bias, gain, wide, residual, residual_bias):
            modulation = None if wide is None else wide[:, channels:]
            return function(x, bias, gain, modulation, residual, residual_bias, kind != "plain")

        return norm_act

    kernel = with_slice(unet.triton_kernels.NormFunction.apply)
    inputs = [x, bias, gain, wide, residual, residual_bias]
    compare_gradients(kernel, with_slice(unet.norm_act), inputs, dy, limit)


@pytest.mark.parametrize("kind", ["modulated", "residual"])
def test_norm_kernel_loops_over_rows_with_a_partial_last_tile(kind, monkeypatch):
    torch.manual_seed(0)
    # Seven programs an image in the forward pass, on two axes of the grid; two in the backward
    # pass, each with 13 rows in tiles of 4.
    monkeypatch.setattr(unet.triton_kernels, "MAX_GRID_Y", 3)
    monkeypatch.setattr(unet.triton_kernels, "TARGET_PROGRAMS", 4)
    monkeypatch.setattr(unet.triton_kernels, "TILE_ELEMENTS", 128)
    x, dy = (channels_last(3, 24, 5, 5) for _ in range(2))
    modulation = torch.randn(3, 48) if kind == "modulated" else None
    residual = x.flip(0) if kind == "residual" else None
    residual_bias = torch.randn(24) if kind == "residual" else None
    compare_gradients(
        lambda *inputs: unet.triton_kernels.NormFunction.apply(*inputs, True),
        lambda *inputs: unet.norm_act(*inputs, True),
        [x, torch.randn(24), torch.randn(1, 24, 1, 1), modulation, residual, residual_bias],
        dy,
    )


@pytest.mark.parametrize("programs", [1, 4])
@pytest.mark.parametrize("images", [3, 8, 10])
def test_norm_reduce_kernel_loops_over_images_with_a_partial_last_tile(images, programs):
    torch.manual_seed(0)
    channels = 20  # in two programs
    sums = torch.randn(3, images, programs, channels)
    modulation = torch.randn(images, 2 * channels)
    gain = torch.randn(channels)
    dgain, dbias, dresidual_bias = (torch.empty(channels) for _ in range(3))
    dmodulation = torch.empty_like(modulation)
    totals = sums.sum(2)

    def reduce(*pointers: torch.Tensor | None) -> None:
        unet.triton_kernels._norm_reduce[(2,)](
            sums, gain, *pointers, 2 * channels, images, channels,
            IMAGES=4, PROGRAMS=programs, COLS=16,
        )  # fmt: skip

    reduce(modulation, dgain, dbias, dmodulation, None)
    scale = modulation[:, :channels]
    torch.testing.assert_close(dgain, (totals[0] * (scale + 1)).sum(0))
    torch.testing.assert_close(dbias, totals[2].sum(0))
    torch.testing.assert_close(dmodulation, torch.cat([totals[0] * gain, totals[1]], dim=1))
    reduce(None, dgain, dbias, None, dresidual_bias)
    torch.testing.assert_close(dgain, totals[0].sum(0))
    torch.testing.assert_close(dresidual_bias, totals[1].sum(0))


def test_add_bias_kernel_matches_formula():
    torch.manual_seed(0)
    dy = channels_last(3, 48, 7, 5)[:, 24:]
    compare_gradients(add_bias, unet.add_bias, [channels_last(3, 24, 7, 5), torch.randn(24)], dy)


def test_add_bias_kernel_loops_over_rows_with_a_partial_last_tile(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(unet.triton_kernels, "TARGET_PROGRAMS", 3)
    monkeypatch.setattr(unet.triton_kernels, "TILE_ELEMENTS", 128)
    x, dy = (channels_last(3, 24, 7, 5) for _ in range(2))
    compare_gradients(add_bias, unet.add_bias, [x, torch.randn(24)], dy)


def test_kernels_take_images_of_one_pixel():
    """The strides of such images do not tell whether they are channels-last."""
    torch.manual_seed(0)
    x, dy = (torch.randn(3, 24, 1, 1) for _ in range(2))
    compare_gradients(add_bias, unet.add_bias, [x, torch.randn(24)], dy)
    compare_gradients(
        lambda x, gain: unet.triton_kernels.NormFunction.apply(
            x, None, gain, None, None, None, True
        ),
        lambda x, gain: unet.norm_act(x, None, gain, activate=True),
        [x, torch.randn(1, 24, 1, 1)],
        dy,
    )


def test_kernels_take_gradients_of_images_one_pixel_wide():
    """Such a gradient may have any stride along its width."""
    torch.manual_seed(0)
    x = channels_last(2, 24, 3, 1)
    dy = torch.randn(144).as_strided(x.shape, (72, 1, 24, 7))
    compare_gradients(add_bias, unet.add_bias, [x, torch.randn(24)], dy)


# Many images, and many pixels of 136 channels, for which a tile has the fewest.
@pytest.mark.parametrize("images, channels, size", [(70_000, 24, 4), (1, 136, 512)])
def test_kernels_are_launched_on_grids_that_cuda_takes(images, channels, size, launches):
    shapes = [(images, channels, size, size), (1, channels, 1, 1), (channels,)]
    x, gain, bias = (torch.empty(shape, device="meta", requires_grad=True) for shape in shapes)
    qkv = torch.empty(images, size**2, 96, device="meta")
    mem_kv = torch.empty(2, 1, 32, 16, device="meta", requires_grad=True)
    outputs = (
        unet.triton_kernels.NormFunction.apply(x, bias, gain, None, x, bias, True),
        unet.triton_kernels.AddBiasFunction.apply(x * 1, bias),
        sum(unet.triton_concat.ConcatFunction.apply(x, x)),
        unet.triton_attention.LinearAttentionFunction.apply(qkv, mem_kv),
        unet.triton_attention.FullAttentionFunction.apply(qkv, mem_kv.mT),
    )
    for y in outputs:
        y.backward(torch.empty_like(y))
    assert len(launches) == 12
    for grid, _ in launches:
        assert grid[0] < 2**31 and max(grid[1:], default=1) <= 65_535


def test_kernels_get_no_fp64_where_that_is_the_default(launches):
    torch.set_default_dtype(torch.float64)
    try:
        for probe in triton_support.PROBES.values():
            probe(torch.device("meta"), torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    tensors = [x for _, args in launches for x in args if isinstance(x, torch.Tensor)]
    assert {x.dtype for x in tensors} == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("name", ["norm", "add_bias", "concat", "linear", "full"])
def test_second_derivatives_of_kernels_raise(name):
    x = channels_last(1, 96, 2, 2).requires_grad_()
    qkv = x.flatten(2).mT
    function = {
        "norm": lambda: unet.triton_kernels.NormFunction.apply(
            x, None, torch.ones(1, 96, 1, 1), None, None, None, True
        ),
        "add_bias": lambda: add_bias(x, torch.ones(96)),
        "concat": lambda: unet.triton_concat.ConcatFunction.apply(x, x)[0],
        "linear": lambda: unet.triton_attention.LinearAttentionFunction.apply(
            qkv, torch.ones(2, 1, 32, 4)
        ),
        "full": lambda: unet.triton_attention.FullAttentionFunction.apply(
            qkv, torch.ones(2, 1, 4, 32)
        ),
    }[name]
    (dx,) = torch.autograd.grad(function().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
