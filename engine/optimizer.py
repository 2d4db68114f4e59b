"""What a step does with the gradient: Adam and Muon over one flat vector of weights.

A whole model is updated by a few kernels, none of which asks the host for anything: learning rate, clipping and whether
the update is good at all are scalars on the device, so that an update can be part of a CUDA graph.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.unet import fused, kernels

BETAS = (0.9, 0.99)
EPSILON = 1e-8
MOMENTUM = 0.95
LIKE_ADAM = 0.2  # root mean square of a Muon update, as Adam's are: Liu et al. (arXiv:2502.16982)
NARROW = 2304  # columns: matrices of fewer are made up to the widest of them
ALIGNED = 64  # values: each parameter begins at a multiple of 256 bytes, as kernels like it


def is_matrix(name: str, p: Tensor) -> bool:
    """Whether Muon takes this parameter: the weights of the layers between the first and the last."""
    return name.endswith("weight") and p.ndim >= 2 and not any(end in name for end in ("init_conv", "final_conv"))


def flatten(model: nn.Module) -> tuple[Tensor, list[tuple[str, nn.Parameter]]]:
    """Moves all parameters of a model into one vector; each goes on as a view of its part, with its strides.

    Returns the vector and the parameters in its order: first those of `is_matrix`, equal shapes together.
    """
    named = sorted(model.named_parameters(), key=lambda item: (not is_matrix(*item), *item[1].shape))
    parameters = [p for _, p in named]
    flat = torch.zeros(sum(padded(p.numel()) for p in parameters), device=parameters[0].device)
    for p, view in zip(parameters, views(flat, parameters), strict=True):
        view.copy_(p.detach())
        p.data = view
    return flat, named


def padded(count: int) -> int:
    """Values that a parameter of `count` takes in the vector, those left empty behind it included."""
    return -(-count // ALIGNED) * ALIGNED


def views(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parts of another vector that belong to the parameters, as tensors of their shapes and strides."""
    parts = flat.split([padded(p.numel()) for p in parameters])
    return [part[: p.numel()].as_strided(p.shape, p.stride()) for part, p in zip(parts, parameters, strict=True)]


class Adam:
    """Adam: Kingma and Ba (arXiv:1412.6980), on a vector of weights."""

    def __init__(self, weights: Tensor):
        self.mean, self.square = torch.zeros_like(weights), torch.zeros_like(weights)
        self.count = torch.zeros((), device=weights.device)

    def update(self, weights: Tensor, gradient: Tensor, rate: Tensor, factor: Tensor, good: Tensor) -> None:
        """One step along gradient * factor; rate, factor and good are scalars. Where good is 0 nothing changes."""
        self.count += good
        if fused(weights):
            kernels.adam(weights, gradient, self.mean, self.square, rate, factor, good, self.count, BETAS, EPSILON)
            return
        gradient = torch.where(good > 0, gradient * factor, 0)
        self.mean.lerp_(gradient, (1 - BETAS[0]) * good)
        self.square.lerp_(gradient.square(), (1 - BETAS[1]) * good)
        count = self.count.clamp(min=1)
        root = (self.square / (1 - BETAS[1] ** count)).sqrt_().add_(EPSILON)
        weights.sub_(self.mean / root * (good * rate / (1 - BETAS[0] ** count)))

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "square": self.square, "count": self.count}


class Muon:
    """Muon: momentum whose matrices are made orthogonal before they are followed. Jordan et al. (2024).

    A convolution counts as a matrix of one row for each output channel. `shapes` are those of the parameters in
    `weights`, equal ones together. Updates are scaled such that learning rates mean what they mean to Adam.
    gather: make matrices up to a common size, since many small products take a GPU as long as a few large ones.
    """

    def __init__(self, weights: Tensor, shapes: Sequence[torch.Size], gather: bool):
        self.mean = torch.zeros_like(weights)
        self.batches: dict[tuple[int, int], list[Matrices]] = {}
        start = 0
        for (rows, columns), equal in itertools.groupby((shape[0], shape[1:].numel()) for shape in shapes):
            matrices = Matrices(start, len(list(equal)), rows, columns)
            short, long = min(rows, columns), max(rows, columns)
            key = (2 ** math.ceil(math.log2(short)), max(long, NARROW)) if gather else (short, long)
            self.batches.setdefault(key, []).append(matrices)
            start = matrices.stop

    def update(self, weights: Tensor, gradient: Tensor, rate: Tensor, factor: Tensor, good: Tensor) -> None:
        """One step along gradient * factor; rate, factor and good are scalars. Where good is 0 nothing changes."""
        ahead = self.ahead(gradient, factor, good)
        for batch in self.batches.values():
            parts = [lying(matrices.of(ahead)) for matrices in batch]
            short, long = (max(part.shape[i] for part in parts) for i in (1, 2))
            # rows and columns of zeros change nothing and stay zeros
            x = torch.cat([F.pad(part, (0, long - part.shape[2], 0, short - part.shape[1])) for part in parts])
            updates = orthogonal(x, LIKE_ADAM * rate * good).split([matrices.count for matrices in batch])
            for matrices, update in zip(batch, updates, strict=True):
                target = lying(matrices.of(weights))
                longer = max(matrices.rows, matrices.columns) ** 0.5
                target.sub_(update[:, : target.shape[1], : target.shape[2]], alpha=longer)

    def ahead(self, gradient: Tensor, factor: Tensor, good: Tensor) -> Tensor:
        """Takes gradient * factor into the mean and gives the mean that it would lead to a second time (Nesterov).

        In bf16 on a GPU, in which the matrices are made orthogonal there. Where good is 0: zeros, and the mean stays.
        """
        if fused(gradient):
            ahead = torch.empty_like(gradient, dtype=torch.bfloat16 if gradient.is_cuda else None)
            kernels.momentum(gradient, self.mean, ahead, factor, good, MOMENTUM)
            return ahead
        gradient = torch.where(good > 0, gradient * factor, 0)
        self.mean.lerp_(gradient, (1 - MOMENTUM) * good)
        return gradient.lerp_(self.mean, MOMENTUM * good)

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean}


@dataclass(frozen=True)
class Matrices:
    """`count` matrices of the same shape that lie in a vector from `start` on, each padded."""

    start: int
    count: int
    rows: int
    columns: int

    @property
    def stride(self) -> int:
        """From one to the next."""
        return padded(self.rows * self.columns)

    @property
    def stop(self) -> int:
        """Where the next ones begin."""
        return self.start + self.count * self.stride

    def of(self, flat: Tensor) -> Tensor:
        """These matrices (count, rows, columns), a view of the vector."""
        whole = flat[self.start : self.stop].view(self.count, self.stride)
        return whole[:, : self.rows * self.columns].unflatten(1, (self.rows, self.columns))


def lying(x: Tensor) -> Tensor:
    """Matrices (K, M, N) with M at most N: as they are, or transposed."""
    return x.mT if x.shape[1] > x.shape[2] else x


def orthogonal(x: Tensor, scale: Tensor) -> Tensor:
    """Matrices (K, M, N), M at most N, with their singular values moved near `scale` by five Newton-Schulz steps.

    Those steps need matrices of length 1 or less. Dividing by the length and scaling are left to the small square
    products, so that nothing but matrix products goes over x.
    """
    square = x @ x.mT
    length = square.diagonal(dim1=1, dim2=2).float().sum(1).sqrt()[:, None, None]
    shorter = (1 / (length + 1e-7)).to(x.dtype)
    x = (quintic(square * shorter**2) * shorter) @ x
    for _ in range(3):
        x = quintic(x @ x.mT) @ x
    return (quintic(x @ x.mT) * scale) @ x


def quintic(square: Tensor) -> Tensor:
    """What x is multiplied by in a Newton-Schulz step, for x x^T (K, M, M).

    The coefficients make small singular values grow fast and leave all between 0.7 and 1.2.
    """
    polynomial = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
    polynomial.diagonal(dim1=1, dim2=2).add_(3.4445)
    return polynomial
