"""The fast Unet against the library's, and the GPU's kernels against the plain formulas.

The kernels' tests run on the CPU, where conftest.py has Triton interpret them.
"""

import pytest
import torch
from denoising_diffusion_pytorch import Unet

from engine import unet
from engine.unet import FastUnet

ARCHITECTURES = [
    dict(dim=32, dim_mults=(1, 2, 4)),
    dict(dim=24, dim_mults=(1, 2), attn_heads=(1, 4), attn_dim_head=(16, 32), full_attn=(True, False)),
    dict(dim=16, dim_mults=(1, 2, 2), self_condition=True, learned_sinusoidal_cond=True),
]


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative error of a against b."""
    return ((a - b).double().norm() / b.double().norm()).item()


def pair(device: str = "cpu", **architecture) -> tuple[Unet, FastUnet]:
    torch.manual_seed(0)
    library, fast = Unet(**architecture), FastUnet(**architecture)
    for parameter in library.parameters():  # gains and biases that are neither 1 nor 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    fast.load_state_dict(library.state_dict())
    return library.to(device), fast.to(device, memory_format=torch.channels_last)


def results(network: Unet, autocast: bool = False, size: int = 16) -> list[torch.Tensor]:
    """Output, gradient of the input and gradients of all weights in one vector."""
    generator = torch.Generator().manual_seed(1)
    device = next(network.parameters()).device
    x, dy = (torch.randn(3, 3, size, size, generator=generator).to(device) for _ in range(2))
    x.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        y = network(x, torch.tensor([0, 400, 999], device=device))
    (y.float() * dy).sum().backward()
    gradients = torch.cat([dict(network.named_parameters())[name].grad.flatten() for name in sorted(
        name for name, _ in network.named_parameters())])  # fmt: skip
    return [y.detach().float(), x.grad, gradients]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_output_and_gradients_are_the_librarys(architecture):
    library, fast = pair(**architecture)
    assert list(library.state_dict()) == list(fast.state_dict())
    for a, b in zip(results(fast), results(library), strict=True):
        assert error(a, b) < 1e-5


def test_mixed_precision_is_about_as_far_from_full_precision_as_the_librarys():
    library, fast = pair(**ARCHITECTURES[0])
    exact = results(library)
    for network in (library, fast):
        network.zero_grad()
    theirs = results(library, autocast=True)
    ours = results(fast, autocast=True)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert error(a, c) < 1.5 * error(b, c) < 0.05


def test_compiled_mixed_precision_has_every_gradient():  # torch 2.11's Dynamo lost all that were rounded together
    _, fast = pair(**ARCHITECTURES[1])
    plain = results(fast, autocast=True)
    fast.zero_grad()
    compiled = torch.compile(fast, backend="eager", dynamic=False)  # what it traces, without a C++ compiler
    for a, b in zip(results(compiled, autocast=True), plain, strict=True):
        assert error(a, b) < 1e-3


on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu.py runs the kernels themselves")


def channels_last(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def compare(kernel, formula, inputs, dy, limit):
    """The same output and gradients from both."""
    found = []
    for function in (kernel, formula):
        leaves = [value.detach().clone().requires_grad_() for value in inputs if value is not None]
        fresh = iter(leaves)
        y = function(*(None if value is None else next(fresh) for value in inputs))
        y.backward(dy)
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*found, strict=True):
        assert error(a, b) < limit


@on_the_cpu
# the sizes: whole tiles, several parts of an image that are no whole tiles, more channels than a power of two
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("batch, channels, side, kind", [
    (3, 64, 8, "modulated"), (2, 24, 13, "modulated"), (2, 24, 13, "residual"), (2, 40, 4, "plain"),
    (1, 520, 3, "residual"),
])  # fmt: skip
def test_the_norm_kernel(batch, channels, side, kind, dtype, limit):
    torch.manual_seed(0)
    x = channels_last(batch, channels, side, side, dtype=dtype)
    modulation = torch.randn(batch, 3 * channels).to(dtype) if kind == "modulated" else None
    residual, residual_bias = (x.flip(0), torch.randn(channels)) if kind == "residual" else (None, None)
    bias, gain = None if kind == "plain" else torch.randn(channels), torch.randn(1, channels, 1, 1)
    dy = channels_last(batch, 2 * channels, side, side, dtype=dtype)[:, channels:]  # as a concatenation's gradient is

    def call(function):
        def norm(x, bias, gain, modulation, *rest):  # the modulation is a part of a wider product
            modulation = None if modulation is None else modulation[:, channels:]
            return function(x, bias, gain, modulation, *rest, kind != "plain")

        return norm  # fmt: skip

    inputs = [x, bias, gain, modulation, residual, residual_bias]
    compare(call(unet.kernels.Norm.apply), call(unet.norm), inputs, dy, limit)


@on_the_cpu
@pytest.mark.parametrize("batch, tokens, heads, dim, slots, dtype, limit", [
    (2, 64, 2, 32, 4, torch.float32, 1e-5),
    (1, 300, 2, 32, 2, torch.float32, 1e-5),
    (2, 36, 3, 16, 4, torch.float32, 1e-5),
    (2, 256, 4, 32, 4, torch.float16, 1e-2),  # the interpreter's bf16 products are wrong
])  # fmt: skip
def test_the_linear_attention_kernel(batch, tokens, heads, dim, slots, dtype, limit):
    torch.manual_seed(0)
    qkv, memory = 2 * torch.randn(batch, tokens, 3 * heads * dim).to(dtype), torch.randn(2, heads, dim, slots)
    assert unet.kernels.suits(memory)
    dy = torch.randn(batch, tokens, heads * dim).to(dtype)
    compare(unet.kernels.LinearAttention.apply, unet.linear_attention, [qkv, memory], dy, limit)


@on_the_cpu
def test_the_bias_kernel():
    torch.manual_seed(0)
    x, bias = channels_last(3, 24, 7, 5, dtype=torch.float32), torch.randn(24)
    dy = channels_last(3, 48, 7, 5, dtype=torch.float32)[:, 24:]
    compare(lambda x, bias: unet.kernels.AddBias.apply(x * 1, bias), unet.biased, [x, bias], dy, 1e-5)


@on_the_cpu
def test_kernels_where_the_image_is_one_pixel():  # whose strides say nothing of where the channels lie
    torch.manual_seed(0)
    x, bias, dy = torch.randn(3, 24, 1, 1), torch.randn(24), torch.randn(3, 24, 1, 1)
    compare(lambda x, bias: unet.kernels.AddBias.apply(x * 1, bias), unet.biased, [x, bias], dy, 1e-5)
    gain = torch.randn(1, 24, 1, 1)
    compare(
        lambda x, gain: unet.kernels.Norm.apply(x, None, gain, None, None, None, True),
        lambda x, gain: unet.norm(x, None, gain, activated=True),
        [x, gain], dy, 1e-5,
    )  # fmt: skip
