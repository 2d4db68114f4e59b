"""A faster version of upstream's Unet with the same results.

Upstream is denoising-diffusion-pytorch. Activations stay channels-last, so that no convolution
transposes them; 1x1 convolutions are matrix products. On a GPU, all that follows a convolution is
one Triton kernel, and so is attention.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from denoising_diffusion_pytorch import Unet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.cpu_norm import CpuNormFunction, use_cpu_norm
from engine.errors import UserError
from engine.triton_support import triton_attention, triton_concat, triton_kernels, use_triton

CastWeights = dict[nn.Module, Tensor]  # layer -> its weight in the precision of matrix products
UPSTREAM_VERSIONS = "denoising-diffusion-pytorch>=2.1,<2.4"
# What upstream's modules consist of: names of parameters and children, or classes in a Sequential.
UPSTREAM_LAYOUTS = {
    "init_conv time_mlp downs ups mid_block1 mid_attn mid_block2 final_res_block final_conv",
    "mlp block1 block2 res_conv", "SiLU Linear", "proj norm act dropout", "g", "weight bias",
    "mem_kv norm to_qkv to_out", "mem_kv norm attend to_qkv to_out", "attn_dropout", "weight",
    "Conv2d RMSNorm", "Rearrange Conv2d", "Upsample Conv2d", "SinusoidalPosEmb Linear GELU Linear",
    "RandomOrLearnedSinusoidalPosEmb Linear GELU Linear", "weights",
}  # fmt: skip


class FastUnet(Unet):
    """Has the arguments, state dict, output and gradients of upstream's Unet.

    Relative error 1e-5 in fp32, 1e-2 in bf16. Under autocast it computes and returns autocast's
    precision. num_classes: of labels, whose embeddings are added to the time embedding; they begin
    as zeros. UserError if the installed Unet has other modules than those computed here.
    """

    checkpointing = False  # if True, blocks and attention are recomputed in the backward pass

    def __init__(self, *args: Any, num_classes: int = 0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_upstream(self)
        self.num_classes = num_classes
        matrix = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])  # see upsample
        self.register_buffer("upsample_matrix", torch.kron(matrix, matrix), persistent=False)
        if num_classes:
            zeros = torch.zeros(num_classes, self.time_mlp[3].out_features)
            self.class_embedding = nn.Embedding.from_pretrained(zeros, freeze=False)
        self.to(memory_format=torch.channels_last)  # or each convolution would transpose its weight

    def forward(
        self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """x (B, C, H, W), timesteps t (B,) or (1,); H and W are multiples of downsample_factor.

        labels: classes (B,), -1: no label; or weights of all classes, floats (B, num_classes).
        """
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if self.self_condition:
            x = torch.cat((torch.zeros_like(x) if x_self_cond is None else x_self_cond, x), dim=1)
        # Triton launches on the current device.
        guard = nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(x)
        with torch.autocast(device, enabled=False), guard:
            x = x.to(dtype, memory_format=torch.channels_last)
            return self._forward(x, t.expand(len(x)), labels).contiguous()

    def _forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """Computes in the precision of x."""
        layers, blocks = self._layers_and_blocks()
        weights = cast_weights(layers, x.dtype)
        modulations = self._modulations(t, labels, blocks, weights, x.dtype)
        recompute = self.checkpointing and torch.is_grad_enabled()

        def run(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
            if not recompute:
                return function(*inputs)
            return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)

        def block(x: Tensor, module: nn.Module, skip: Tensor | None = None) -> Tensor:
            mask = dropout_mask(x, module) if recompute else None
            return run(resnet_block, x, skip, module, weights, modulations[module], mask)

        # Encoder.
        stem = conv(x, self.init_conv, weights)
        x = stem
        skips = []
        for block1, block2, attention, down in self.downs:
            x = block(x, block1)
            skips.append(x)
            x = run(attention_block, block(x, block2), attention, weights)
            skips.append(x)
            x = downsample(x, down, weights)

        # Innermost level.
        x = block(x, self.mid_block1)
        x = run(attention_block, x, self.mid_attn, weights)
        x = block(x, self.mid_block2)

        # Decoder.
        for block1, block2, attention, up in self.ups:
            x = block(x, block1, skips.pop())
            x = block(x, block2, skips.pop())
            x = run(attention_block, x, attention, weights)
            x = upsample(x, up, weights, self.upsample_matrix)
        x = block(x, self.final_res_block, stem)
        return conv(x, self.final_conv, weights)

    def _layers_and_blocks(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The layers whose weights are cast, and the residual blocks, as they are now.

        Not upsample's layers: it combines their weights in fp32 before they are cast.
        """
        upsamplings = {up for *_, up in self.ups if isinstance(up, nn.Sequential)}
        layers = []
        blocks = []
        remaining = [self]
        while remaining:  # self.modules() takes three times as long
            module = remaining.pop()
            children = module._modules
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                layers.append(module)
            elif module not in upsamplings:
                remaining += children.values()
            if "block1" in children:
                blocks.append(module)
        return layers, blocks

    def _modulations(
        self, t: Tensor, labels: Tensor | None, blocks: Sequence[nn.Module], weights: CastWeights,
        dtype: torch.dtype,
    ) -> dict[nn.Module, Tensor]:  # fmt: skip
        """Scale and shift (B, 2C) of each block, of one matrix product for all."""
        embedding, linear1, _, linear2 = self.time_mlp
        t = F.linear(embedding(t).to(dtype), weights[linear1], linear1.bias.to(dtype))
        t = F.linear(F.gelu(t), weights[linear2], linear2.bias.to(dtype))
        if labels is not None:
            class_mix = labels
            if not labels.is_floating_point():  # -1 is no class
                every_label = torch.arange(self.num_classes, device=labels.device)
                class_mix = labels[:, None] == every_label
            embeddings = self.class_embedding.weight
            t = t + (class_mix.to(embeddings.dtype) @ embeddings).to(dtype)
        linears = [block.mlp[1] for block in blocks]
        weight = torch.cat([weights[linear] for linear in linears])
        bias = torch.cat([linear.bias for linear in linears]).to(dtype)
        modulations = F.linear(F.silu(t), weight, bias)
        sizes = [linear.out_features for linear in linears]
        return dict(zip(blocks, modulations.split(sizes, dim=1), strict=True))


def per_level(values: int | Sequence[int], dim_mults: Sequence[int]) -> list[int]:
    """Returns a value for each level from one value or one a level; UserError for other numbers."""
    values = [values] if isinstance(values, int) else list(values)
    if len(values) not in (1, len(dim_mults)):
        raise UserError(f"{values} has {len(values)} values, but dim_mults has {len(dim_mults)}")
    return values if len(values) > 1 else values * len(dim_mults)


def full_attention_levels(image_size: int, dim_mults: Sequence[int], max_size: int) -> list[bool]:
    """Returns whether each level has full attention: the lowest, and others up to max_size."""
    sizes = [image_size // 2**level for level in range(len(dim_mults))]
    return [size <= max(max_size, sizes[-1]) for size in sizes]


def check_upstream(network: Unet) -> None:
    """Raises UserError if upstream's modules are not those that FastUnet computes."""
    for module in network.modules():
        parts = [*dict(module.named_parameters(recurse=False)), *dict(module.named_children())]
        if isinstance(module, nn.Sequential):
            parts = [type(child).__name__ for child in module]
        layout = " ".join(parts)
        if parts and layout not in UPSTREAM_LAYOUTS and not isinstance(module, nn.ModuleList):
            found = f"{type(module).__name__} has {layout}"
            remedy = f'Run: pip install "{UPSTREAM_VERSIONS}"'
            raise UserError(f"unsupported Unet in denoising-diffusion-pytorch ({found}). {remedy}")


def dropout_mask(x: Tensor, module: nn.Module) -> Tensor | None:
    """Dropout factors 0 or 1 / (1 - p) of a block with input x; None without dropout.

    Sampled before the block, so that a recomputed block drops the same values: the state of the
    random generator cannot be restored while a CUDA graph is captured.
    """
    p = module.block1.dropout.p
    if not (module.training and p):
        return None
    shape = len(x), module.block1.proj.out_channels, *x.shape[2:]
    mask = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return mask.bernoulli_(1 - p).div_(1 - p)


def cast_weights(layers: Sequence[nn.Module], dtype: torch.dtype) -> CastWeights:
    """Maps layers, all of one precision, to their weights in another."""
    params = [layer.weight for layer in layers]
    # torch.compile of torch 2.11 loses the gradients of CastFunction.
    if params[0].dtype == dtype or torch.compiler.is_compiling():
        return {layer: p.to(dtype) for layer, p in zip(layers, params, strict=True)}
    return dict(zip(layers, CastFunction.apply(dtype, *params), strict=True))


class CastFunction(torch.autograd.Function):
    """Casts many tensors in few kernels, with their strides."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor):
        ctx.dtype = tensors[0].dtype
        copies = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in tensors)
        torch._foreach_copy_(copies, tensors)
        return copies

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return None, *CastFunction.apply(ctx.dtype, *grads)


def resnet_block(
    x: Tensor, skip: Tensor | None, module: nn.Module, weights: CastWeights, modulation: Tensor,
    mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """Upstream's ResnetBlock of x and skip, concatenated; mask, if any, replaces its dropout."""
    block1 = module.block1
    block2 = module.block2
    h = x
    if skip is not None:
        h, x = concat(x, skip)
    h = norm_act(
        *conv_deferring_bias(h, block1.proj, weights), block1.norm.g, modulation, activate=True
    )
    h = block1.dropout(h) if mask is None else h * mask
    h, bias = conv_deferring_bias(h, block2.proj, weights)
    skip_bias = None
    if isinstance(module.res_conv, nn.Conv2d):
        x, skip_bias = conv_deferring_bias(x, module.res_conv, weights)
    return norm_act(h, bias, block2.norm.g, None, x, skip_bias, activate=True)


def concat(x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """The channels of both, (B, C, H, W); twice, for the two ways through a block."""
    if use_triton(x):
        return triton_concat.ConcatFunction.apply(x, skip)
    x = torch.cat((x, skip), dim=1)
    return x, x


def attention_block(x: Tensor, module: nn.Module, weights: CastWeights) -> Tensor:
    """x plus upstream's Attention or LinearAttention over its pixels."""
    qkv = conv(norm_act(x, None, module.norm.g), module.to_qkv, weights)
    qkv = qkv.permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, 3 * heads * D)
    is_linear = isinstance(module.to_out, nn.Sequential)
    y = (linear_attention if is_linear else full_attention)(qkv, module.mem_kv)
    y = y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
    if not is_linear:
        return conv(y, module.to_out, weights) + x
    to_out, out_norm = module.to_out
    return norm_act(*conv_deferring_bias(y, to_out, weights), out_norm.g, residual=x)


def linear_attention(qkv: Tensor, mem_kv: Tensor) -> Tensor:
    """qkv (B, N, 3 * heads * D) and mem_kv (2, heads, D, slots) to (B, N, heads * D).

    Softmax of keys over N, of queries over D; linear in N, since keys and values are multiplied
    first (arXiv:1812.01243).
    """
    _, heads, dim, slots = mem_kv.shape
    if use_triton(qkv) and triton_attention.supports_attention(dim, slots):
        return triton_attention.LinearAttentionFunction.apply(qkv, mem_kv)
    # Pixels last: a softmax over the last axis is slow if that is short, as D is.
    q, *kv = qkv.mT.contiguous().unflatten(1, (3, heads, dim)).unbind(1)
    memory = mem_kv.to(qkv.dtype)[:, None].expand(-1, len(qkv), -1, -1, -1)
    k, v = (torch.cat(pair, dim=3) for pair in zip(memory, kv, strict=True))
    context = v @ k.softmax(dim=3).mT * dim**-0.5
    return (context @ q.softmax(dim=2)).flatten(1, 2).mT


def full_attention(qkv: Tensor, mem_kv: Tensor) -> Tensor:
    """qkv (B, N, 3 * heads * D) and mem_kv (2, heads, slots, D) to (B, N, heads * D)."""
    _, heads, slots, dim = mem_kv.shape
    # In fp32, PyTorch's is faster and takes less memory.
    use_kernels = qkv.element_size() == 2 and use_triton(qkv)
    if use_kernels and triton_attention.supports_attention(dim, slots):
        return triton_attention.FullAttentionFunction.apply(qkv, mem_kv)
    q, *kv = qkv.unflatten(2, (3, heads, dim)).permute(2, 0, 3, 1, 4)
    memory = mem_kv.to(qkv.dtype)[:, None].expand(-1, len(qkv), -1, -1, -1)
    k, v = (torch.cat(pair, dim=2) for pair in zip(memory, kv, strict=True))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def conv(x: Tensor, module: nn.Conv2d, weights: CastWeights) -> Tensor:
    """A convolution and its bias."""
    if use_cpu_norm(x) or module.kernel_size == (1, 1):  # adds the bias at no cost
        return convolve(x, module, weights, module.bias)
    return add_bias(convolve(x, module, weights, None), module.bias)


def convolve(x: Tensor, module: nn.Conv2d, weights: CastWeights, bias: Tensor | None) -> Tensor:
    """A convolution with a bias or none; 1x1 as a matrix product."""
    weight = weights[module]
    if module.kernel_size != (1, 1):
        return F.conv2d(x, weight, bias, padding=module.padding)
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def conv_deferring_bias(
    x: Tensor, module: nn.Conv2d, weights: CastWeights
) -> tuple[Tensor, Tensor | None]:
    """A convolution, and the bias that the norm_act which follows still has to add.

    None on a CPU: there, conv2d adds it at no cost, and norm_act would in another pass.
    """
    if use_cpu_norm(x):
        return conv(x, module, weights), None
    return convolve(x, module, weights, None), module.bias


def downsample(x: Tensor, module: nn.Module, weights: CastWeights) -> Tensor:
    """Upstream's Downsample, or the convolution that the last level has instead.

    Its 1x1 convolution of 2x2 pixels is a 2x2 convolution of stride 2.
    """
    if isinstance(module, nn.Conv2d):
        return conv(x, module, weights)
    weight = weights[module[1]].view(module[1].out_channels, -1, 2, 2)
    return add_bias(F.conv2d(x, weight, stride=2), module[1].bias)


def upsample(x: Tensor, module: nn.Module, weights: CastWeights, upsample_matrix: Tensor) -> Tensor:
    """Upstream's Upsample, or the convolution that the last level has instead.

    Its 3x3 convolution of pixels repeated 2x2 times is a transposed 4x4 convolution of stride 2,
    with 4/9 of the work. Along an axis the weights are (w2, w1 + w2, w0 + w1, w0), which
    upsample_matrix (16, 9) computes from the 3x3 weights.
    """
    if isinstance(module, nn.Conv2d):
        return conv(x, module, weights)
    weight = upsample_matrix @ module[1].weight.permute(0, 2, 3, 1).flatten(1, 2)  # (out, 16, in)
    weight = weight.to(x.dtype).unflatten(1, (4, 4)).permute(3, 0, 1, 2)
    return add_bias(F.conv_transpose2d(x, weight, stride=2, padding=1), module[1].bias)


def add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """Adds bias (C,) to a convolution's output x (B, C, H, W), maybe in place."""
    if use_triton(x):
        x = x.contiguous(memory_format=torch.channels_last)
        return triton_kernels.AddBiasFunction.apply(x, bias)
    return x + bias.to(x.dtype).view(1, -1, 1, 1)


def norm_act(
    x: Tensor, bias: Tensor | None, gain: Tensor, modulation: Tensor | None = None,
    residual: Tensor | None = None, residual_bias: Tensor | None = None, activate: bool = False,
) -> Tensor:  # fmt: skip
    """RMSNorm with bias, modulation, SiLU and residual, in fp32.

    silu(rms_norm(x + bias) * gain * (1 + scale) + shift) + residual + residual_bias, without the
    terms that are None; SiLU only if `activate`. rms_norm: arXiv:1910.07467, over channels. x,
    residual: (B, C, H, W). bias, residual_bias: (C,). gain: (1, C, 1, 1). modulation: scale and
    shift, (B, 2C); not together with residual_bias. Returns the precision of x.
    """
    if use_triton(x):
        inputs = x, bias, gain, modulation, residual, residual_bias
        return triton_kernels.NormFunction.apply(*inputs, activate)
    if bias is None and residual_bias is None and use_cpu_norm(x):
        return CpuNormFunction.apply(x, gain, modulation, residual, activate)
    y = x.float() if bias is None else x + bias.float().view(1, -1, 1, 1)
    # Not F.normalize: Triton 3.6 cannot compile Inductor's gradient of it in fp16.
    y = y * y.square().sum(dim=1, keepdim=True).clamp(min=1e-24).rsqrt()
    y = y * (gain.view(1, -1, 1, 1) * math.sqrt(x.shape[1]))
    if modulation is not None:
        scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
        y = torch.addcmul(shift, y, scale + 1)
    y = F.silu(y) if activate else y
    y = y if residual is None else y + residual
    return (y if residual_bias is None else y + residual_bias.view(1, -1, 1, 1)).to(x.dtype)
