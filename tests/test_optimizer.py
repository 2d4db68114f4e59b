"""Adam and Muon against PyTorch's Adam and against singular values."""

import pytest
import torch

from ddpm_model import DDPMModel
from engine import optimizer, unet
from engine.optimizer import Adam, Muon, flatten, is_matrix, orthogonal, padded, views

ONE = torch.tensor(1.0)


by_formula_and_kernel = pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=pytest.mark.skipif(
    unet.kernels is None or torch.cuda.is_available(), reason="needs Triton's interpreter"))])  # fmt: skip


def gradients(count: int, steps: int) -> torch.Tensor:
    return torch.randn(steps, count, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e-4]).repeat(
        count // 2
    )


@by_formula_and_kernel
def test_adam_is_pytorchs_and_leaves_out_what_is_not_good(kernel, monkeypatch):
    monkeypatch.setattr(optimizer, "fused", lambda _: kernel)
    start = torch.linspace(-1, 1, 5000)
    ours, theirs = start.clone(), start.clone().requires_grad_()
    adam, reference = Adam(ours), torch.optim.Adam([theirs], betas=optimizer.BETAS, eps=optimizer.EPSILON)
    for number, gradient in enumerate(gradients(5000, 6)):
        rate = 1e-3 * (number + 1)
        if number == 0 or number == 3:
            adam.update(ours, gradient * torch.nan, torch.tensor(rate), ONE, torch.tensor(0.0))
        adam.update(ours, gradient, torch.tensor(rate), torch.tensor(0.5), ONE)
        theirs.grad, reference.param_groups[0]["lr"] = gradient * 0.5, rate
        reference.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=2e-7)
    assert adam.count == 6


def test_orthogonal_keeps_singular_vectors_and_brings_values_near_one():
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 8, 30), (1, 16, 16)):
        x = torch.randn(shape, generator=generator)
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        inside = u.mT @ orthogonal(x, ONE) @ v.mT  # diagonal, where the vectors are the same
        values = inside.diagonal(dim1=1, dim2=2)
        assert (inside - torch.diag_embed(values)).abs().max() < 1e-4
        assert values[s > 0.1 * s.amax()].min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("gather", [False, True])
@by_formula_and_kernel
def test_muon_moves_each_matrix_by_its_own_momentum(kernel, gather, monkeypatch):
    monkeypatch.setattr(optimizer, "fused", lambda _: kernel)
    shapes = [torch.Size([4, 2, 3, 3])] * 2 + [torch.Size([8, 5])]
    parameters = [torch.zeros(shape) for shape in shapes]
    weights = torch.zeros(sum(padded(p.numel()) for p in parameters))
    muon, generator = Muon(weights, shapes, gather), torch.Generator().manual_seed(0)
    for part in views(weights, parameters):
        part.copy_(torch.randn(part.shape, generator=generator))
    expected, mean = [part.clone() for part in views(weights, parameters)], [torch.zeros(shape) for shape in shapes]
    for _ in range(3):
        gradient = torch.zeros_like(weights)
        for part in views(gradient, parameters):
            part.copy_(torch.randn(part.shape, generator=generator))
        muon.update(weights, gradient * torch.nan, ONE, ONE, torch.tensor(0.0))
        muon.update(weights, gradient, torch.tensor(0.1), torch.tensor(0.5), ONE)
        for w, m, g in zip(expected, mean, views(gradient, parameters), strict=True):
            m.mul_(0.95).add_(0.05 * 0.5 * g)
            ahead = (0.05 * 0.5 * g + 0.95 * m).flatten(1)
            wide = ahead.shape[0] <= ahead.shape[1]
            update = orthogonal(ahead[None], ONE)[0] if wide else orthogonal(ahead.mT[None], ONE)[0].mT
            w -= 0.1 * 0.2 * max(ahead.shape) ** 0.5 * update.reshape(w.shape)
    for w, part in zip(expected, views(weights, parameters), strict=True):
        torch.testing.assert_close(part, w, rtol=1e-4, atol=1e-5)


def test_flattened_parameters_are_views_in_which_equal_matrices_lie_together():
    model = DDPMModel(image_size=8, dim=8, dim_mults=(1, 2)).to(memory_format=torch.channels_last)
    before = {name: (p.detach().clone(), p.stride()) for name, p in model.named_parameters()}
    flat, named = flatten(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.stride() == before[name][1]
        assert (
            p.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
            and p.data_ptr() % 256 == flat.data_ptr() % 256
        )
    matrices = [p.shape for name, p in named if is_matrix(name, p)]
    assert [is_matrix(name, p) for name, p in named] == [True] * len(matrices) + [False] * (len(named) - len(matrices))
    groups = [group for batch in Muon(flat[:0], matrices, gather=True).batches.values() for group in batch]
    assert len(groups) == len({(shape[0], shape[1:].numel()) for shape in matrices})
    flat.zero_()
    assert all(not p.any() for p in model.parameters())
