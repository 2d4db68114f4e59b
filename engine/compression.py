"""Weights for small files: matrices in 8 bits, a scale for each row, and all else in fp16."""

from collections.abc import Mapping

import torch
from torch import Tensor

NETWORK, GUIDE = "diffusion.model.", "guide."  # what the names of a model's weights start with
SCALE = ".scale"  # what the name of a matrix's scales ends with
# In the network itself, only matrices of at least so many values: they are most of the file, and
# smaller ones work on the full image, where rounding shows. Errors of the guide hardly matter.
LARGE = 100_000
MAX_INT8 = 127
MAX_FP16 = torch.finfo(torch.half).max
SMALLEST = 1e-30  # for rows of zeros


def compress(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state_dict of a model for a small file; `decompress` reads it.

    Of a matrix (R, ...) in 8 bits there are int8 values of its shape and float32 scales (R,).
    """
    compressed = {}
    for name, weight in state.items():
        is_large = name.startswith(NETWORK) and weight.numel() >= LARGE
        if weight.ndim > 1 and (is_large or name.startswith(GUIDE)):
            rows = weight.float().flatten(1)
            scale = rows.abs().amax(1).clamp(min=SMALLEST) / MAX_INT8
            values = (rows / scale[:, None]).round()
            compressed[name] = values.to(torch.int8).view(weight.shape)
            compressed[name + SCALE] = scale
        else:
            fits_fp16 = name.startswith((NETWORK, GUIDE)) and weight.abs().max() <= MAX_FP16
            compressed[name] = weight.half() if fits_fp16 else weight
    return compressed


def decompress(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state_dict of `compress` with its matrices as float32; any other as it is.

    Raises ValueError for a matrix in 8 bits without its scales, and for scales without it.
    """
    scales = {name + SCALE for name in state}
    weights = {name: value for name, value in state.items() if name not in scales}
    for name, values in weights.items():
        scale = state.get(name + SCALE)
        is_int8 = values.dtype == torch.int8
        if not is_int8 and scale is None:
            continue
        if not is_int8 or scale is None or scale.shape != values.shape[:1]:
            raise ValueError(f"{name} must have 8 bits and a scale for each row, or neither")
        weights[name] = (values.flatten(1) * scale[:, None]).view(values.shape)
    return weights
