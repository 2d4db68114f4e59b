"""Adam and Muon on one flat vector of parameters.

A few kernels update a model and ask the host for nothing: lr, grad_scale and is_finite (1 or 0)
are scalars on the device, so that a CUDA graph can hold the update.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.triton_support import triton_kernels, use_triton

BETAS = (0.9, 0.99)  # of Adam
EPSILON = 1e-8
MOMENTUM = 0.95  # of Muon
# Polynomials (a, b, c) that together map singular values in [0.007, 1.1] to [0.9, 1.2]; rounding
# moves some above 1. Fitted to spectra of gradients: docs/experiments.md.
NEWTON_SCHULZ_STEPS = (
    (4.21, -8.216, 4.093),
    (3.431, -5.66, 2.543),
    (3.224, -5.093, 2.671),
    (3.38, -4.782, 2.371),
)
UPDATE_RMS = 0.2  # of a Muon update, matches Adam's: Liu et al. (arXiv:2502.16982)
MAX_SHARED_WIDTH = 2304  # columns; matrices up to this wide may share a batch
ALIGNMENT = 64  # values: each parameter begins at a multiple of 256 bytes
OLD_STATE_NAMES = {"exp_avg": "mean", "exp_avg_sq": "square"}  # in earlier checkpoints


def use_muon(name: str, p: Tensor) -> bool:
    """Whether Muon updates a parameter: inner weights, by the names of lucidrains' Unet."""
    is_inner = not any(end in name for end in ("init_conv", "class_embedding", "final_conv"))
    return is_inner and name.endswith("weight") and p.ndim >= 2


def flatten(model: nn.Module) -> tuple[Tensor, list[tuple[str, nn.Parameter]]]:
    """Moves a model's trainable parameters into one vector.

    They become contiguous or channels-last views of it. Returns the vector and the named parameters
    in its order: Muon's first, equal shapes together, and the class embedding last, so that the
    rest is as in an unconditional model.
    """

    def order(item: tuple[str, nn.Parameter]) -> tuple:
        name, p = item
        return not use_muon(name, p), "class_embedding" in name, *p.shape

    trainable = [item for item in model.named_parameters() if item[1].requires_grad]
    named = sorted(trainable, key=order)
    for _, p in named:
        # Muon reads a matrix row by row.
        if not (p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last)):
            p.data = p.data.contiguous()
    params = [p for _, p in named]
    flat = torch.zeros(sum(padded_numel(p.numel()) for p in params), device=params[0].device)
    for p, view in zip(params, views(flat, params), strict=True):
        view.copy_(p.detach())
        p.data = view
    return flat, named


def padded_numel(count: int) -> int:
    """Returns the padded length in the vector of a parameter of `count` values."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def views(flat: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Returns a vector's parts as views with the parameters' shapes and strides."""
    parts = flat.split([padded_numel(p.numel()) for p in params])
    return [
        part[: p.numel()].as_strided(p.shape, p.stride())
        for part, p in zip(parts, params, strict=True)
    ]


def scale_finite(grad: Tensor, grad_scale: Tensor, is_finite: Tensor) -> Tensor:
    """Returns grad * grad_scale, or zeros if is_finite is 0."""
    # torch.where with a scalar takes twice as long on a CPU.
    return (grad * (grad_scale * is_finite)).nan_to_num_(0.0, 0.0, 0.0)


class Adam:
    """Adam on a vector of parameters. Kingma and Ba (arXiv:1412.6980)."""

    def __init__(self, params: Tensor):
        self.exp_avg = torch.zeros_like(params)
        self.exp_avg_sq = torch.zeros_like(params)
        self.count = torch.zeros((), device=params.device)

    def update(
        self, params: Tensor, grad: Tensor, lr: Tensor, grad_scale: Tensor, is_finite: Tensor
    ) -> None:
        """Steps along grad * grad_scale in place; if is_finite is 0, nothing changes."""
        self.count += is_finite
        if use_triton(params):
            scalars = (lr, grad_scale, is_finite, self.count)
            triton_kernels.adam(
                params, grad, self.exp_avg, self.exp_avg_sq, *scalars, BETAS, EPSILON
            )
            return
        grad = scale_finite(grad, grad_scale, is_finite)
        self.exp_avg.lerp_(grad, (1 - BETAS[0]) * is_finite)
        self.exp_avg_sq.lerp_(grad.square(), (1 - BETAS[1]) * is_finite)
        count = self.count.clamp(min=1)  # 0 / 0 if the first update is skipped
        root = (self.exp_avg_sq / (1 - BETAS[1] ** count)).sqrt_().add_(EPSILON)
        params.sub_(self.exp_avg / root * (is_finite * lr / (1 - BETAS[0] ** count)))

    def state_dict(self) -> dict[str, Tensor]:
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "count": self.count}


class Muon:
    """SGD momentum with orthogonalized updates. Jordan et al., kellerjordan.github.io/posts/muon.

    A convolution is a matrix with a row for each output channel. Takes the same learning rates as
    Adam. shapes: of the parameters in the vector, equal ones together. mix_sizes:
    orthogonalize different sizes in one batch, padded; a GPU needs as long for many small products
    as for a few large ones.
    """

    def __init__(self, params: Tensor, shapes: Sequence[torch.Size], mix_sizes: bool):
        self.exp_avg = torch.zeros_like(params)
        self.batches: dict[tuple[int, int], list[MatrixGroup]] = {}
        end = 0
        sizes = [(shape[0], shape[1:].numel()) for shape in shapes]
        for (rows, columns), equal in itertools.groupby(sizes):
            count = len(list(equal))
            start = end
            end += count * padded_numel(rows * columns)
            # Matrices with the same key share a batch, padded to the largest of it: with mix_sizes,
            # those whose short sides round up to the same power of two and whose long sides are at
            # most MAX_SHARED_WIDTH, or equal.
            short, long = sorted((rows, columns))
            key = (short, long)
            if mix_sizes:
                key = (2 ** math.ceil(math.log2(short)), max(long, MAX_SHARED_WIDTH))
            group = MatrixGroup(start, end, count, rows, columns)
            self.batches.setdefault(key, []).append(group)

    def update(
        self, params: Tensor, grad: Tensor, lr: Tensor, grad_scale: Tensor, is_finite: Tensor
    ) -> None:
        """Steps along the orthogonalized momentum in place, unless is_finite is 0."""
        nesterov = self.nesterov_update(grad, grad_scale, is_finite)
        for groups in self.batches.values():
            parts = [transpose_if_tall(group.view_of(nesterov)) for group in groups]
            short, long = (max(part.shape[i] for part in parts) for i in (1, 2))
            # Zero padding is invariant under Newton-Schulz.
            x = torch.cat([F.pad(p, (0, long - p.shape[2], 0, short - p.shape[1])) for p in parts])
            x = newton_schulz(x, UPDATE_RMS * lr * is_finite)
            updates = x.split([group.count for group in groups])
            for group, update in zip(groups, updates, strict=True):
                target = transpose_if_tall(group.view_of(params))
                # Where all singular values are 1, the RMS of the values is 1 / max_dim_sqrt.
                max_dim_sqrt = max(group.rows, group.columns) ** 0.5
                target.sub_(update[:, : target.shape[1], : target.shape[2]], alpha=max_dim_sqrt)

    def nesterov_update(self, grad: Tensor, grad_scale: Tensor, is_finite: Tensor) -> Tensor:
        """Averages grad * grad_scale into exp_avg; returns the Nesterov update, bf16 by Triton."""
        if use_triton(grad):
            update = torch.empty_like(grad, dtype=torch.bfloat16)
            scalars = (grad_scale, is_finite)
            triton_kernels.nesterov_momentum(grad, self.exp_avg, update, *scalars, MOMENTUM)
            return update
        grad = scale_finite(grad, grad_scale, is_finite)
        self.exp_avg.lerp_(grad, (1 - MOMENTUM) * is_finite)
        return grad.lerp_(self.exp_avg, MOMENTUM * is_finite)

    def state_dict(self) -> dict[str, Tensor]:
        return {"exp_avg": self.exp_avg}


@dataclass(frozen=True)
class MatrixGroup:
    """`count` matrices of the same size in a vector from `start` to `end`, each padded."""

    start: int
    end: int
    count: int
    rows: int
    columns: int

    def view_of(self, flat: Tensor) -> Tensor:
        """Returns these matrices (count, rows, columns) as a view of the vector."""
        padded = flat[self.start : self.end].view(self.count, -1)
        return padded[:, : self.rows * self.columns].unflatten(1, (self.rows, self.columns))


def transpose_if_tall(x: Tensor) -> Tensor:
    """Returns matrices (K, M, N) with M at most N: as they are, or transposed."""
    return x.mT if x.shape[1] > x.shape[2] else x


def newton_schulz(x: Tensor, scale: Tensor) -> Tensor:
    """Moves singular values of matrices (K, M, N), M <= N, near `scale`; Newton-Schulz steps.

    A step maps each singular value s to a s + b s^3 + c s^5. The first one needs
    values of at most 1. The Schatten-4 norm is an upper bound of them, closer than the Frobenius
    norm, and follows from x x^T, which the step needs anyway. Dividing by it and scaling happen in
    the small (K, M, M) products, so that only matrix products go over x.
    """
    square = x @ x.mT
    norm = square.float().square().sum((1, 2), keepdim=True) ** 0.25
    inv_norm = (1 / (norm + 1e-7)).to(x.dtype)
    first, *inner, last = NEWTON_SCHULZ_STEPS
    x = (newton_schulz_polynomial(square * inv_norm**2, *first) * inv_norm) @ x
    for step in inner:
        x = newton_schulz_polynomial(x @ x.mT, *step) @ x
    return (newton_schulz_polynomial(x @ x.mT, *last) * scale) @ x


def newton_schulz_polynomial(square: Tensor, a: float, b: float, c: float) -> Tensor:
    """Returns what a Newton-Schulz step multiplies x by, from x x^T (K, M, M)."""
    polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
    polynomial.diagonal(dim1=1, dim2=2).add_(a)
    return polynomial
