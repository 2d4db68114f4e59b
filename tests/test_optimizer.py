"""Adam and Muon against PyTorch's Adam and against singular values, on one vector of parameters."""

import copy
from types import SimpleNamespace

import pytest
import torch

from ddpm_model import DDPMModel
from engine import optimizer, unet
from engine.optimizer import Adam, Muon, flatten, newton_schulz, padded_numel, use_muon, views
from engine.train_step import TrainStep
from tests.helpers import STEP_SETTINGS, make_batch

ONE = torch.tensor(1.0)
ZERO = torch.tensor(0.0)

needs_interpreter = pytest.mark.skipif(
    unet.triton_kernels is None or torch.cuda.is_available(), reason="needs Triton's interpreter"
)
by_formula_and_kernel = pytest.mark.parametrize(
    "kernel", [False, pytest.param(True, marks=needs_interpreter)]
)


def gradients(count: int, steps: int) -> torch.Tensor:
    """Gradients (steps, count), every second one small."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(steps, count, generator=generator) * torch.tensor([1, 1e-4]).repeat(
        count // 2
    )


@by_formula_and_kernel
def test_adam_is_pytorchs_and_skips_updates_that_are_not_finite(kernel, monkeypatch):
    monkeypatch.setattr(optimizer, "use_triton", lambda _: kernel)
    ours = torch.linspace(-1, 1, 5000)
    theirs = ours.clone().requires_grad_()
    adam = Adam(ours)
    reference = torch.optim.Adam([theirs], betas=optimizer.BETAS, eps=optimizer.EPSILON)
    for number, gradient in enumerate(gradients(5000, 6)):
        lr = 1e-3 * (number + 1)
        if number in (0, 3):
            adam.update(ours, gradient * torch.nan, torch.tensor(lr), ONE, ZERO)
        adam.update(ours, gradient, torch.tensor(lr), torch.tensor(0.5), ONE)
        theirs.grad = gradient * 0.5
        reference.param_groups[0]["lr"] = lr
        reference.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=2e-7)
    assert adam.count == 6


def test_newton_schulz_keeps_singular_vectors_and_moves_values_near_one():
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 8, 30), (1, 16, 16)):
        x = torch.randn(shape, generator=generator)
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        rotated = u.mT @ newton_schulz(x, ONE) @ v.mT  # diagonal if the vectors are the same
        values = rotated.diagonal(dim1=1, dim2=2)
        assert (rotated - torch.diag_embed(values)).abs().max() < 1e-4
        assert values[s > 0.02 * s.amax()].min() > 0.9 and values.max() < 1.2


def test_newton_schulz_polynomials_bear_rounding_at_each_step():
    s = torch.linspace(0, 1.1, 10_001)
    for a, b, c in optimizer.NEWTON_SCHULZ_STEPS:
        s = 1.01 * (a * s + b * s**3 + c * s**5)
    assert s.min() >= 0 and s[65:].min() > 0.8 and s.max() < 1.4


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_newton_schulz_in_bf16_bears_a_dominant_singular_value(rank):
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn((64, 32, rank), generator=generator)
    x = x @ torch.randn((64, rank, 288), generator=generator)
    found = torch.linalg.svdvals(newton_schulz(x.bfloat16(), ONE.bfloat16()).float())
    assert 0.8 < found[:, 0].min() and found.max() < 1.3


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_newton_schulz_applies_its_polynomials_to_the_singular_values(scale):
    x = torch.randn((3, 6, 20), generator=torch.Generator().manual_seed(0))
    u, expected, v = torch.linalg.svd(x, full_matrices=False)
    expected = expected / (expected**4).sum(1, keepdim=True) ** 0.25
    for a, b, c in optimizer.NEWTON_SCHULZ_STEPS:
        expected = a * expected + b * expected**3 + c * expected**5
    found = u.mT @ newton_schulz(x, torch.tensor(scale)) @ v.mT
    torch.testing.assert_close(found, torch.diag_embed(scale * expected), rtol=0, atol=1e-4)


def reference_muon_update(momentum: torch.Tensor) -> torch.Tensor:
    """Muon's update of one weight, at learning rate 1."""
    matrix = momentum.flatten(1)
    is_tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.mT if is_tall else matrix
    update = newton_schulz(wide[None], ONE)[0]
    update = update.mT if is_tall else update
    return 0.2 * max(matrix.shape) ** 0.5 * update.reshape(momentum.shape)


@pytest.mark.parametrize("mix_sizes", [False, True])
@by_formula_and_kernel
def test_muon_updates_each_matrix_by_its_momentum(kernel, mix_sizes, monkeypatch):
    monkeypatch.setattr(optimizer, "use_triton", lambda _: kernel)
    shapes = [torch.Size([4, 2, 3, 3])] * 2 + [torch.Size([8, 5])]
    params = [torch.zeros(shape) for shape in shapes]
    flat = torch.zeros(sum(padded_numel(p.numel()) for p in params))
    muon = Muon(flat, shapes, mix_sizes)
    generator = torch.Generator().manual_seed(0)
    for view in views(flat, params):
        view.copy_(torch.randn(view.shape, generator=generator))
    expected = [view.clone() for view in views(flat, params)]
    exp_avg = [torch.zeros(shape) for shape in shapes]
    for _ in range(3):
        grad = torch.zeros_like(flat)
        for view in views(grad, params):
            view.copy_(torch.randn(view.shape, generator=generator))
        muon.update(flat, grad * torch.nan, ONE, ONE, ZERO)
        muon.update(flat, grad, torch.tensor(0.1), torch.tensor(0.5), ONE)
        for w, m, g in zip(expected, exp_avg, views(grad, params), strict=True):
            m.mul_(0.95).add_(0.05 * 0.5 * g)
            w -= 0.1 * reference_muon_update(0.05 * 0.5 * g + 0.95 * m)
    limit = 2e-2 if kernel else 1e-4  # the kernel writes bf16
    for w, view in zip(expected, views(flat, params), strict=True):
        torch.testing.assert_close(view, w, rtol=limit, atol=limit / 10)


def test_flatten_makes_parameters_views_with_equal_matrices_together():
    model = DDPMModel(image_size=8, dim=8, dim_mults=(1, 2)).to(memory_format=torch.channels_last)
    before = {name: (p.detach().clone(), p.stride()) for name, p in model.named_parameters()}
    flat, named = flatten(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.stride() == before[name][1]
        assert p.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
        assert p.data_ptr() % 256 == flat.data_ptr() % 256
    matrices = [p.shape for name, p in named if use_muon(name, p)]
    rest = len(named) - len(matrices)
    assert [use_muon(*item) for item in named] == [True] * len(matrices) + [False] * rest
    batches = Muon(flat[:0], matrices, mix_sizes=True).batches
    groups = [group for batch in batches.values() for group in batch]
    assert len(groups) == len({(shape[0], shape[1:].numel()) for shape in matrices})
    flat.zero_()
    assert all(not p.any() for p in model.parameters())


@pytest.mark.parametrize("weight", [torch.randn(4, 8).mT, torch.randn(8, 6)[:, :4]])
def test_flatten_lays_out_a_matrix_of_any_strides_by_row(weight):
    linear = torch.nn.Linear(4, 8, bias=False)
    linear.weight = torch.nn.Parameter(weight)
    expected = weight.clone()
    flat, _ = flatten(linear)
    assert torch.equal(flat[:32].view(8, 4), expected) and torch.equal(linear.weight, expected)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_step_of_an_unconditional_run_continues_as_a_conditional_one(optimizer):
    def make(classes: dict[str, int]) -> TrainStep:
        torch.manual_seed(0)
        model = DDPMModel(image_size=8, dim=8, dim_mults=(1, 2), timesteps=50, class_counts=classes)
        changes = {"OPTIMIZER": optimizer, "LABEL_DROPOUT": 1.0}
        return TrainStep(model, SimpleNamespace(**(STEP_SETTINGS | changes)))

    plain, conditional = make({}), make({"a": 1, "b": 1})
    plain(make_batch(), 0, 1e-2)
    plain.ema.snapshot_guide()
    conditional.load_state_dict(copy.deepcopy(plain.state_dict()))
    # Without a label, it trains as before.
    plain(make_batch(), 1, 1e-2)
    batch = make_batch()._replace(labels=torch.ones(32, dtype=torch.long))
    conditional(batch, 1, 1e-2)
    weights = dict(conditional.model.named_parameters())
    for name, expected in plain.model.named_parameters():
        torch.testing.assert_close(weights.pop(name), expected, atol=1e-6, rtol=0)
    ((name, embedding),) = weights.items()
    assert "class_embedding" in name and not embedding.any()
    # With labels, the embedding learns.
    conditional.config.LABEL_DROPOUT = 0.0
    conditional(batch, 2, 1e-2)
    assert embedding[1].any() and not embedding[0].any()


def test_use_muon_excludes_the_first_and_the_last_convolution():
    model = DDPMModel(image_size=8, dim=8, dim_mults=(1, 2))
    found = {name: use_muon(name, p) for name, p in model.named_parameters()}
    excluded = {name for name, p in model.named_parameters() if p.ndim > 1 and not found[name]}
    others = {name for name in excluded if not name.endswith((".g", ".mem_kv"))}
    assert others == {f"diffusion.model.{name}_conv.weight" for name in ("init", "final")}
    for name in ("final_res_block.block1.proj", "time_mlp.1", "mid_block1.mlp.1"):
        assert found[f"diffusion.model.{name}.weight"]
    assert not any(found[name] for name, p in model.named_parameters() if p.ndim < 2)
