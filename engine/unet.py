"""The library's Unet, computed faster: the same modules, weights and results, another order of memory and work.

Everything stays channels-last, so that no convolution turns its input round; 1x1 convolutions are matrix products;
a block's normalisation, modulation, activation and residual sum are one kernel on a GPU; linear attention is one
kernel too; the time embedding's projections for all blocks are one product; and in mixed precision all weights
are rounded together once, not one by one.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from denoising_diffusion_pytorch import Unet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

try:
    from engine import kernels
except ImportError:  # Triton comes with PyTorch for NVIDIA and AMD GPUs on Linux, not everywhere
    kernels = None


class FastUnet(Unet):
    """Takes the arguments of the library's Unet, has its state dict and gives its output and gradients.

    Within a relative error of 1e-5 in fp32 and 1e-2 in bf16. Like the library's under autocast, it computes in the
    autocast's precision and gives its output in that.
    """

    checkpointing = False  # set to True, blocks and attention keep their inputs alone and are computed again backwards

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.blocks = [module for module in self.modules() if hasattr(module, "block1")]
        grown = [stage[3][1].weight for stage in self.ups if isinstance(stage[3], nn.Sequential)]
        self.weights = [
            p for name, p in self.named_parameters() if name.endswith("weight") and not any(p is w for w in grown)
        ]
        row = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
        self.register_buffer("doubling", torch.kron(row, row), persistent=False)  # see grow

    def forward(self, x: Tensor, time: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        """(B, C, H, W) at timesteps (B,) to (B, C, H, W); H and W are multiples of downsample_factor."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        with torch.autocast(x.device.type, enabled=False):
            return self.evaluate(x, time, x_self_cond, dtype).contiguous()

    def evaluate(self, x: Tensor, time: Tensor, x_self_cond: Tensor | None, dtype: torch.dtype) -> Tensor:
        """forward, in the given precision."""
        w = dict(zip(self.weights, rounded(self.weights, dtype), strict=True))
        if self.self_condition:
            x = torch.cat((torch.zeros_like(x) if x_self_cond is None else x_self_cond, x), dim=1)
        x = first = conv(x.to(dtype, memory_format=torch.channels_last), self.init_conv, w)

        embedding, first_linear, _, second_linear = self.time_mlp
        t = F.gelu(F.linear(embedding(time).to(dtype), w[first_linear.weight], first_linear.bias.to(dtype)))
        t = F.silu(F.linear(t, w[second_linear.weight], second_linear.bias.to(dtype)))
        weight = torch.cat([w[block.mlp[1].weight] for block in self.blocks])
        bias = torch.cat([block.mlp[1].bias for block in self.blocks]).to(dtype)
        sizes = [block.mlp[1].out_features for block in self.blocks]
        modulation = dict(zip(self.blocks, F.linear(t, weight, bias).split(sizes, dim=1), strict=True))

        def compute_block(x: Tensor, module: nn.Module, kept: Tensor | None) -> Tensor:
            y = conv(x, module.block1.proj, w, with_bias=False)
            y = norm(y, module.block1.proj.bias, module.block1.norm.g, modulation[module], activated=True)
            y = module.block1.dropout(y) if kept is None else y * kept
            y = conv(y, module.block2.proj, w, with_bias=False)
            rest, rest_bias = x, None
            if isinstance(module.res_conv, nn.Conv2d):
                rest, rest_bias = conv(x, module.res_conv, w, with_bias=False), module.res_conv.bias
            return norm(y, module.block2.proj.bias, module.block2.norm.g, None, rest, rest_bias, activated=True)

        again = self.checkpointing and torch.is_grad_enabled()
        run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False) if again else at_once

        def block(x: Tensor, module: nn.Module) -> Tensor:
            return run(compute_block, x, module, kept_by_dropout(x, module) if again else None)

        saved = []
        for block1, block2, attention, downsample in self.downs:
            x = block(x, block1)
            saved.append(x)
            x = run(attend, block(x, block2), attention, w)
            saved.append(x)
            x = shrink(x, downsample[1], w) if isinstance(downsample, nn.Sequential) else conv(x, downsample, w)
        x = block(x, self.mid_block1)
        x = run(attend, x, self.mid_attn, w)
        x = block(x, self.mid_block2)
        for block1, block2, attention, upsample in self.ups:
            x = block(torch.cat((x, saved.pop()), dim=1), block1)
            x = block(torch.cat((x, saved.pop()), dim=1), block2)
            x = run(attend, x, attention, w)
            x = grow(x, upsample[1], self.doubling) if isinstance(upsample, nn.Sequential) else conv(x, upsample, w)
        x = block(torch.cat((x, first), dim=1), self.final_res_block)
        return conv(x, self.final_conv, w)


def at_once(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Computes without checkpointing."""
    return function(*inputs)


def kept_by_dropout(x: Tensor, module: nn.Module) -> Tensor | None:
    """What the dropout of a block with input x multiplies by, 0 or 1 / (1 - p); None where nothing is dropped.

    Drawn before the block, so that a block computed twice drops the same both times: putting back the state of the
    random generator instead is not possible while a CUDA graph is captured.
    """
    p = module.block1.dropout.p
    if not (module.training and p):
        return None
    shape = len(x), module.block1.proj.out_channels, *x.shape[2:]
    kept = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return kept.bernoulli_(1 - p).div_(1 - p)


class Rounded(torch.autograd.Function):
    """Many tensors to another precision at once, and their gradients back."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor):
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return tuple(cast(tensors, [dtype] * len(tensors)))

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return None, *cast(gradients, ctx.dtypes)


def cast(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Copies of the tensors in the given precisions, with their strides, in few kernels."""
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    torch._foreach_copy_(copies, list(tensors))
    return copies


def rounded(parameters: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """The parameters as matrix products and convolutions of the given precision take them."""
    if all(p.dtype == dtype for p in parameters):
        return parameters
    if torch.compiler.is_compiling():  # torch 2.11's loses what Rounded gives back, and needs no help
        return [p.to(dtype) for p in parameters]
    return Rounded.apply(dtype, *parameters)


def conv(x: Tensor, module: nn.Conv2d, w: dict[Tensor, Tensor], with_bias: bool = True) -> Tensor:
    """A convolution with the weights of w; 1x1 as a product over channels, (B, H, W, C) being how x lies."""
    bias = module.bias if with_bias else None
    if module.kernel_size == (1, 1):
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x.permute(0, 2, 3, 1), w[module.weight].flatten(1), bias).permute(0, 3, 1, 2)
    return biased(F.conv2d(x, w[module.weight], padding=module.padding), bias)


def shrink(x: Tensor, module: nn.Conv2d, w: dict[Tensor, Tensor]) -> Tensor:
    """The library's Downsample: 2x2 pixels to channels and a 1x1 convolution, which is a 2x2 one of stride 2."""
    weight = w[module.weight].view(module.out_channels, -1, 2, 2)
    return biased(F.conv2d(x, weight, stride=2), module.bias)


def grow(x: Tensor, module: nn.Conv2d, doubling: Tensor) -> Tensor:
    """The library's Upsample: each pixel to 2x2 equal ones, then a 3x3 convolution.

    An output pixel sees only 2x2 different input pixels, so a transposed 4x4 convolution of stride 2 does it with
    4/9 of the work. Its weights along one axis are (w2, w1 + w2, w0 + w1, w0), which `doubling` (16, 9) makes of 3x3.
    """
    weight = doubling @ module.weight.permute(0, 2, 3, 1).flatten(1, 2)  # (out, 16, in)
    weight = weight.to(x.dtype).unflatten(1, (4, 4)).permute(3, 0, 1, 2)
    return biased(F.conv_transpose2d(x, weight, stride=2, padding=1), module.bias)


def fused(x: Tensor) -> bool:
    """Whether x goes to our kernels; torch.compile makes its own of the formulas."""
    return kernels is not None and x.is_cuda and not torch.compiler.is_compiling()


def biased(x: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, C, H, W), the output of a convolution, plus bias (C,)."""
    if bias is None:
        return x
    if fused(x):
        return kernels.AddBias.apply(x.contiguous(memory_format=torch.channels_last), bias)
    return x + bias.to(x.dtype).view(1, -1, 1, 1)


def norm(
    x: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    modulation: Tensor | None = None,
    residual: Tensor | None = None,
    residual_bias: Tensor | None = None,
    activated: bool = False,
) -> Tensor:
    """What follows a convolution: x + bias to length sqrt(C) over channels, times gain; modulated; SiLU; plus residual.

    x, residual: (B, C, H, W). bias, residual_bias: (C,). gain: C values. modulation (B, 2C): first scale - 1, then
    shift. Computes in fp32 whatever x is, and gives x's precision. RMSNorm: Zhang and Sennrich (arXiv:1910.07467).
    """
    if fused(x):
        return kernels.Norm.apply(x, bias, gain, modulation, residual, residual_bias, activated)
    y = x.float() if bias is None else x + bias.float().view(1, -1, 1, 1)
    # F.normalize, but Triton 3.6 (torch 2.11) cannot compile what Inductor makes of its gradient in fp16
    y = y * y.square().sum(dim=1, keepdim=True).clamp(min=1e-24).rsqrt()
    y = y * (gain.view(1, -1, 1, 1) * math.sqrt(x.shape[1]))
    if modulation is not None:
        scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
        y = torch.addcmul(shift, y, scale + 1)
    y = F.silu(y) if activated else y
    y = y if residual is None else y + residual
    return (y if residual_bias is None else y + residual_bias.view(1, -1, 1, 1)).to(x.dtype)


def attend(x: Tensor, module: nn.Module, w: dict[Tensor, Tensor]) -> Tensor:
    """x plus the library's attention over its pixels: linear attention (arXiv:1812.01243) or the usual kind.

    Both have a few learned keys and values (memory) beside those of the pixels.
    """
    height, width = x.shape[2:]
    qkv = conv(norm(x, None, module.norm.g), module.to_qkv, w).permute(0, 2, 3, 1).flatten(1, 2)
    linear = isinstance(module.to_out, nn.Sequential)
    y = linear_attention(qkv, module.mem_kv) if linear else full_attention(qkv, module.mem_kv.to(qkv.dtype))
    y = y.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    if not linear:
        return conv(y, module.to_out, w) + x
    to_out, out_norm = module.to_out
    return norm(conv(y, to_out, w, with_bias=False), to_out.bias, out_norm.g, residual=x)


def full_attention(qkv: Tensor, memory: Tensor) -> Tensor:
    """qkv (B, N, 3 * heads * D) and memory (2, heads, M, D) to (B, N, heads * D)."""
    _, heads, _, dim = memory.shape
    q, k, v = qkv.unflatten(2, (3, heads, dim)).permute(2, 0, 3, 1, 4)
    k, v = (torch.cat((m.expand(len(x), -1, -1, -1), x), dim=2) for m, x in zip(memory, (k, v), strict=True))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def linear_attention(qkv: Tensor, memory: Tensor) -> Tensor:
    """qkv (B, N, 3 * heads * D) and memory (2, heads, D, M) to (B, N, heads * D).

    Queries are a softmax over D and keys one over tokens, so that keys and values meet first, in a D x D matrix.
    """
    if fused(qkv) and kernels.suits(memory):
        return kernels.LinearAttention.apply(qkv, memory)
    heads, dim = memory.shape[1:3]
    q, k, v = qkv.unflatten(2, (3, heads, dim)).permute(2, 0, 3, 1, 4)
    memory = memory.mT.to(qkv.dtype)
    k, v = (torch.cat((m.expand(len(x), -1, -1, -1), x), dim=2) for m, x in zip(memory, (k, v), strict=True))
    context = k.softmax(dim=2).mT @ v
    return ((q.softmax(dim=3) * dim**-0.5) @ context).transpose(1, 2).flatten(2)
