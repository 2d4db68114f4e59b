"""What a step does with the gradient: Adam and Muon over one flat vector of weights.

A whole model is updated by a few kernels, none of which asks the host for anything: learning rate, clipping and whether
the update is good at all are scalars on the device, so that an update can be part of a CUDA graph.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.unet import fused, kernels

BETAS = (0.9, 0.99)
EPSILON = 1e-8
MOMENTUM = 0.95
LIKE_ADAM = 0.2  # root mean square of a Muon update, as Adam's are: Liu et al. (arXiv:2502.16982)
ALIGNED = 64  # values: each parameter begins at a multiple of 256 bytes, as kernels like it


def is_matrix(name: str, p: Tensor) -> bool:
    """Whether Muon takes this parameter: the weights of the layers between the first and the last."""
    return name.endswith("weight") and p.ndim >= 2 and not any(end in name for end in ("init_conv", "final_conv"))


def flatten(model: nn.Module) -> tuple[Tensor, list[tuple[str, nn.Parameter]]]:
    """Moves all parameters of a model into one vector; each goes on as a view of its part, with its strides.

    Returns the vector and the parameters in its order: first those of `is_matrix`, equal shapes together.
    """
    named = sorted(model.named_parameters(), key=lambda item: (not is_matrix(*item), *item[1].shape))
    flat = torch.zeros(sum(padded(p) for _, p in named), device=named[0][1].device)
    start = 0
    for _, p in named:
        view = flat[start : start + p.numel()].as_strided(p.shape, p.stride())
        view.copy_(p.detach())
        p.data = view
        start += padded(p)
    return flat, named


def padded(p: Tensor) -> int:
    """Values that a parameter takes in the vector, those left empty behind it included."""
    return -(-p.numel() // ALIGNED) * ALIGNED


def views(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parts of another vector that belong to the parameters, as tensors of their shapes and strides."""
    parts = flat.split([padded(p) for p in parameters])
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
    """

    def __init__(self, weights: Tensor, shapes: Sequence[torch.Size]):
        self.mean = torch.zeros_like(weights)
        self.groups: list[tuple[int, int, int]] = []  # matrices, rows, columns
        for shape in shapes:
            rows, columns = shape[0], shape[1:].numel()
            before = self.groups[-1] if self.groups else (0, 0, 0)
            if before[1:] == (rows, columns):
                self.groups[-1] = (before[0] + 1, rows, columns)
            else:
                self.groups.append((1, rows, columns))

    def update(self, weights: Tensor, gradient: Tensor, rate: Tensor, factor: Tensor, good: Tensor) -> None:
        """One step along gradient * factor; rate, factor and good are scalars. Where good is 0 nothing changes."""
        gradient = torch.where(good > 0, gradient * factor, 0)
        self.mean.lerp_(gradient, (1 - MOMENTUM) * good)
        ahead = gradient.lerp_(self.mean, MOMENTUM)  # Nesterov's
        start = 0
        for count, rows, columns in self.groups:
            part = slice(start, start + count * -(-rows * columns // ALIGNED) * ALIGNED)
            own = (count, -1)
            matrices = ahead[part].view(own)[:, : rows * columns].unflatten(1, (rows, columns))
            size = LIKE_ADAM * max(rows, columns) ** 0.5
            update = orthogonal(matrices) * (size * rate * good)
            weights[part].view(own)[:, : rows * columns].unflatten(1, (rows, columns)).sub_(update)
            start = part.stop

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean}


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (K, M, N) with their singular values moved near 1, by five Newton-Schulz steps.

    The quintic's coefficients make small ones grow fast and leave all between 0.7 and 1.2. In bf16 on a GPU.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else matrices.dtype)
    x = x.mT if x.shape[1] > x.shape[2] else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if matrices.shape[1] > matrices.shape[2] else x).to(matrices.dtype)
