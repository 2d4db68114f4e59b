"""The Triton kernels of the concatenation against its formula, interpreted on the CPU."""

import pytest
import torch

from engine import unet
from tests.helpers import channels_last, compare_gradients, needs_no_gpu

pytest.importorskip("triton", reason="PyTorch brings Triton on Linux only")
pytestmark = needs_no_gpu  # tests/test_gpu.py runs them compiled


# Shapes: a partial last tile, unequal halves, images of one pixel.
@pytest.mark.parametrize("a_channels, b_channels, size", [(64, 64, 9), (24, 40, 5), (48, 16, 1)])
def test_concat_kernels_match_formula(a_channels, b_channels, size, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(unet.triton_concat, "COPIED_ELEMENTS", 512)
    a = channels_last(3, 2 * a_channels, size, size)[:, a_channels:]
    b = channels_last(3, b_channels, size, size)
    weight = channels_last(3, a_channels + b_channels, size, size)

    def weighted_sum(y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return y * weight + z.square()

    compare_gradients(
        lambda a, b: weighted_sum(*unet.triton_concat.ConcatFunction.apply(a, b)),
        lambda a, b: weighted_sum(*unet.concat(a, b)),
        [a, b],
        torch.randn_like(weight),
    )


@pytest.mark.parametrize("shape", [(1, 8, 4, 2), (2, 8, 4, 4)])
def test_concat_rejects_images_of_another_size_or_number(shape):
    with pytest.raises(ValueError, match=r"cannot concatenate \(1, 8, 4, 4\) and"):
        unet.triton_concat.ConcatFunction.apply(channels_last(1, 8, 4, 4), channels_last(*shape))
