"""RMSNorm with a gradient of its own: on a CPU, with half as many passes over memory."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def use_cpu_norm(x: Tensor) -> bool:
    """Whether x is on a CPU in fp32; torch.compile differentiates the formulas itself."""
    is_plain = x.device.type == "cpu" and x.dtype == torch.float32
    return is_plain and not torch.compiler.is_compiling()


class CpuNormFunction(torch.autograd.Function):
    """engine.unet.norm_act without biases: n = x / |x|, u = n * factor + shift, y = silu(u)."""

    @staticmethod
    def forward(ctx, x, gain, modulation, residual, activate):
        inv_norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        inv_norm = inv_norm.clamp_(min=1e-12).reciprocal_()
        n = x * inv_norm
        factor, shift = factor_and_shift(gain, modulation)
        u = n * factor if shift is None else torch.addcmul(shift, n, factor)
        ctx.save_for_backward(n, inv_norm, u if activate else None, gain, modulation)
        y = F.silu(u) if activate else u
        return y if residual is None else y.add_(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        n, inv_norm, u, gain, modulation = ctx.saved_tensors
        channels = n.shape[1]
        factor, shift = factor_and_shift(gain, modulation)

        # Of factor and shift.
        du = dy if u is None else torch.ops.aten.silu_backward(dy, u)
        du_n = du * n
        dfactor = du_n.sum((2, 3))  # (B, C)
        dmodulation = None
        if shift is not None:
            dscale = dfactor * gain.view(-1) * math.sqrt(channels)
            dmodulation = torch.cat((dscale, du.sum((2, 3))), dim=1)
            dfactor = dfactor * (modulation[:, :channels] + 1)
        dgain = (dfactor.sum(0) * math.sqrt(channels)).view_as(gain)

        # Of x: what of dn is not along n, over |x|.
        rows = du_n.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H * W, C)
        along = (rows @ factor.view(-1, channels, 1)).view_as(inv_norm)
        dn = du * factor if u is None else du.mul_(factor)
        dx = dn.addcmul_(n, along, value=-1).mul_(inv_norm)
        return dx, dgain, dmodulation, dy if ctx.needs_input_grad[3] else None, None


def factor_and_shift(gain: Tensor, modulation: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns n's factor, (1 or B, C, 1, 1), and what is added to it, (B, C, 1, 1)."""
    factor = gain * math.sqrt(gain.numel())
    if modulation is None:
        return factor, None
    scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
    return factor * (scale + 1), shift
