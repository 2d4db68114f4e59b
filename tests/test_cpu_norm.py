"""engine/cpu_norm.py: the norm on the CPU has the gradients of the formula."""

import pytest
import torch

from engine import unet
from tests.helpers import relative_error


@pytest.mark.parametrize("is_modulated", [False, True])
@pytest.mark.parametrize("activate", [False, True])
def test_cpu_norm_has_the_gradients_of_the_formula(is_modulated, activate, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 8, 5, 4), (1, 8, 1, 1), (3, 16), (3, 8, 5, 4)]
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    x, gain, modulation, residual = inputs
    inputs = [x, gain, modulation] if is_modulated else [x, gain, residual]
    dy = torch.randn(x.shape, generator=generator)
    found = []
    for use_cpu_norm in (True, False):
        monkeypatch.setattr(unet, "use_cpu_norm", lambda x, use=use_cpu_norm: use)
        args = (modulation, None) if is_modulated else (None, residual)
        y = unet.norm_act(x, None, gain, *args, activate=activate)
        assert (type(y.grad_fn).__name__ == "CpuNormFunctionBackward") == use_cpu_norm
        found.append([y, *torch.autograd.grad(y, inputs, dy)])
    for a, b in zip(*found, strict=True):
        assert relative_error(a, b) < 1e-5


def test_second_derivative_of_the_cpu_norm_raises():
    x = torch.randn(2, 8, 3, 3, requires_grad=True)
    y = unet.norm_act(x, None, torch.ones(1, 8, 1, 1), activate=True)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
