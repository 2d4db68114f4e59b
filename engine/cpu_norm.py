"""RMSNorm with a gradient of its own: on a CPU, with half as many passes over memory."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def use_cpu_norm(x: Tensor) -> bool:
    """Whether x is on a CPU in fp32; torch.compile differentiates the formulas itself."""
    is_plain = x.device.type == "cpu" and x.dtype == torch.float32
    return is_plain and not torch.compiler.is_compiling()


class CpuNormFunction(torch.autograd.Function):
    """engine.unet.norm_act without biases."""

    @staticmethod
    def forward(ctx, x, gain, modulation, residual, activate):
        inv_norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        inv_norm = inv_norm.clamp_(min=1e-12).reciprocal_()
        y = x * inv_norm
        factor, shift = factor_and_shift(gain, modulation)
        z = y * factor if shift is None else torch.addcmul(shift, y, factor)
        ctx.save_for_backward(y, inv_norm, z if activate else None, gain, modulation)
        out = F.silu(z) if activate else z
        return out if residual is None else out.add_(residual)

    @staticmethod
    def backward(ctx, dout):
        y, inv_norm, z, gain, modulation = ctx.saved_tensors
        channels = y.shape[1]
        factor, shift = factor_and_shift(gain, modulation)

        # Of z = y * factor + shift.
        dz = dout if z is None else torch.ops.aten.silu_backward(dout, z)
        dz_y = dz * y
        dfactor = dz_y.sum((2, 3))  # (B, C)
        dmodulation = None
        if shift is not None:
            dscale = dfactor * gain.view(-1) * math.sqrt(channels)
            dmodulation = torch.cat((dscale, dz.sum((2, 3))), dim=1)
            dfactor = dfactor * (modulation[:, :channels] + 1)
        dgain = (dfactor.sum(0) * math.sqrt(channels)).view_as(gain)

        # Of y = x / |x|: what of dy is not along y, over |x|.
        rows = dz_y.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H * W, C)
        along = (rows @ factor.view(-1, channels, 1)).view_as(inv_norm)
        dy = dz * factor if z is None else dz.mul_(factor)
        dx = dy.addcmul_(y, along, value=-1).mul_(inv_norm)
        return dx, dgain, dmodulation, dout if ctx.needs_input_grad[3] else None, None


def factor_and_shift(gain: Tensor, modulation: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns what y is multiplied by, (1 or B, C, 1, 1), and what is added (B, C, 1, 1)."""
    factor = gain * math.sqrt(gain.numel())
    if modulation is None:
        return factor, None
    scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
    return factor * (scale + 1), shift
