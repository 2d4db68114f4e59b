"""The training step: what it computes, and what it does when something fails."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddpm_model import DDPMModel
from engine.dataloader import Batch, BatchLoader, ImageDataset
from engine.errors import FallbackWarning, UserError
from engine.optimizer import use_muon
from engine.randomness import step_randomness
from engine.train_step import TrainStep, ema_decay, learning_rate
from tests.helpers import CPU, STEP_SETTINGS, make_batch, max_weight_difference


class FragileModel(DDPMModel):
    """A model that runs out of memory above `max_images`, or whose loss is NaN."""

    max_images = 10**9
    is_broken = False

    def forward(self, images, t, noise):
        if len(images) > self.max_images:
            raise torch.OutOfMemoryError("too many images")
        return super().forward(images, t, noise) * (float("nan") if self.is_broken else 1.0)


def make_model() -> FragileModel:
    torch.manual_seed(0)
    return FragileModel(
        image_size=8, dim=8, dim_mults=(1, 2), timesteps=50, loss_weighting="min_snr"
    )


def make_step(**changes) -> TrainStep:
    return TrainStep(make_model(), SimpleNamespace(**(STEP_SETTINGS | changes)))


# What a step computes.


@pytest.mark.parametrize(("clip", "flip"), [(1.0, True), (0.0, False)])
def test_step_is_adamw_on_the_clipped_gradient_of_the_loss(clip, flip):
    step = make_step(WEIGHT_DECAY=2.0, GRAD_CLIP=clip, HORIZONTAL_FLIP=flip)
    reference = make_model()
    # Adam's first step amplifies the rounding of small gradients: the same memory layout.
    reference.to(memory_format=torch.channels_last)
    groups = [
        {"params": [p for n, p in reference.named_parameters() if use_muon(n, p) == is_matrix],
         "weight_decay": 2.0 * is_matrix}
        for is_matrix in (True, False)
    ]  # fmt: skip
    adam = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99))
    randomness = step_randomness(0, 3, torch.Size([32, 3, 8, 8]), CPU)
    images = make_batch().images / 255
    is_mirrored = randomness.mirror[:, None, None, None] & flip
    x = torch.where(is_mirrored, images.flip(-1), images)
    expected = reference(x, (randomness.timestep_u * 50).long(), randomness.noise)
    expected.backward()
    expected_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), clip or torch.inf)
    adam.step()
    loss, norm = step(make_batch(), 3, 0.01)
    torch.testing.assert_close((loss, norm), (expected.detach(), expected_norm))
    assert max_weight_difference(step.model, reference) < 1e-6


@pytest.mark.parametrize("micro_batch", [8, 12])  # 12 does not divide the batch
def test_step_accumulates_micro_batches_to_the_same_update(micro_batch):
    single_pass, accumulated = make_step(BATCH_SIZE=32), make_step(BATCH_SIZE=micro_batch)
    for number in range(3):
        single_pass(make_batch(), number, 1e-3)
        accumulated(make_batch(), number, 1e-3)
    assert max_weight_difference(single_pass.model, make_model()) > 0
    # The updates are 3e-3; the rest is rounding.
    assert max_weight_difference(single_pass.model, accumulated.model) < 5e-6


def test_step_ema_follows_its_closed_form():
    step = make_step(EMA_DECAY=0.6)
    start = next(step.model.parameters()).detach().clone()
    history = []
    for number in range(6):
        step(make_batch(), number, 1e-2)
        history.append(next(step.model.parameters()).detach().clone())
    decays = [min(0.6, (1 + n) / (10 + n)) for n in range(6)]
    expected, weight = torch.zeros_like(start), 1.0
    for decay, value in zip(reversed(decays), reversed(history), strict=True):
        expected, weight = expected + weight * (1 - decay) * value, weight * decay
    torch.testing.assert_close(next(step.ema.parameters()), expected + weight * start)
    assert ema_decay(0.999, 0) == 0.1 and ema_decay(0.999, 10**6) == 0.999


def test_step_copies_changing_buffers_to_the_ema():
    model = make_model()
    model.unet.add_module("norm", torch.nn.BatchNorm2d(3))
    model.unet.register_forward_pre_hook(lambda unet, inputs: (unet.norm(inputs[0]), *inputs[1:]))
    step = TrainStep(model, SimpleNamespace(**STEP_SETTINGS))
    for number in range(2):
        step(make_batch(), number, 1e-3)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        trained = getattr(step.model.unet.norm, name)
        assert not torch.equal(trained, getattr(torch.nn.BatchNorm2d(3), name))
        assert torch.equal(getattr(step.ema.unet.norm, name), trained)


def test_step_drops_the_guide_which_would_be_trained():
    model = make_model()
    model.snapshot_guide()
    step = TrainStep(model, SimpleNamespace(**STEP_SETTINGS))
    assert step.model.guide is step.ema.guide is None
    assert len(step.params) == len(make_step().params)


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_step_updates_each_weight_with_its_optimizer(optimizer):
    """Adam's first update is the learning rate, up or down, in every single weight."""
    names = ("init_conv", "final_conv", "final_res_block.block1.proj")
    step = make_step(OPTIMIZER=optimizer)
    weights = [step.model.get_parameter(f"diffusion.model.{name}.weight") for name in names]
    before = [weight.detach().clone() for weight in weights]
    step(make_batch(), 0, 0.01)
    moved = [(weight.detach() - old).abs() for weight, old in zip(weights, before, strict=True)]
    by_adam = [torch.allclose(by, torch.tensor(0.01), rtol=0.02) for by in moved]
    assert by_adam == [True, True, optimizer == "adam"]


def test_step_in_mixed_precision_stays_near_full_precision():
    step, reference = make_step(USE_AMP=True), make_step()
    loss, _ = step(make_batch(), 0, 1e-3)
    expected, _ = reference(make_batch(), 0, 1e-3)
    assert loss.item() != expected.item()
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert next(step.model.parameters()).dtype == torch.float32


def test_validate_depends_neither_on_the_micro_batch_nor_on_the_call():
    step = make_step()
    value = step.validate(make_batch(20))
    step.batcher.size = 7
    assert step.validate(make_batch(20)) == pytest.approx(value, rel=1e-5)


def test_validation_does_not_depend_on_how_images_are_sorted():
    # Untrained: the loss is about the mean square of v = alpha noise - sigma x_0, weighted.
    torch.manual_seed(0)
    model = DDPMModel(image_size=8, dim=8, dim_mults=(1, 2))
    step = TrainStep(model, SimpleNamespace(**STEP_SETTINGS))
    gray, white = torch.full((60, 3, 8, 8), 128), torch.full((60, 3, 8, 8), 255)
    orders = torch.cat([gray, white]), torch.cat([white, gray]), torch.stack([gray, white], 1)
    losses = [step.validate(Batch(images.view(120, 3, 8, 8).byte())) for images in orders]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=0.03)


def test_learning_rate_rises_then_falls_to_zero():
    def lr(step, progress, schedule="cosine"):
        return learning_rate(2e-3, schedule, step, 100, progress)

    assert lr(0, 0.0) == pytest.approx(2e-5) and lr(49, 0.0) == pytest.approx(1e-3)
    assert lr(100, 0.0) == 2e-3 and lr(500, 0.5) == pytest.approx(1e-3)
    assert lr(999, 1.0) == pytest.approx(0)
    assert lr(999, 1.0, "constant") == 2e-3
    assert learning_rate(2e-3, "cosine", 0, 0, 0.0) == 2e-3  # without a warm-up


# Labels.


class ConditionalModel(DDPMModel):
    """Records the images and labels that forward gets."""

    def __init__(self, **options):
        super().__init__(**options)
        self.calls = []

    def forward(self, images, t, noise, labels=None):
        self.calls.append(((images[:, 0, 0, 0] * 255).round().int().tolist(), labels.tolist()))
        return super().forward(images, t, noise)


def labeled_loader(count: int = 60, labels: bool = True) -> BatchLoader:
    """Images that are filled with their own index; the label is the index times three."""
    index = np.arange(count)
    images = np.broadcast_to(index.astype(np.uint8)[:, None, None, None], (count, 3, 8, 8))
    data = ImageDataset(images, 3 * index if labels else None)
    return BatchLoader(data, 16, 7, CPU, 1)


def test_step_passes_each_image_with_its_label():
    loader = labeled_loader()
    options = SimpleNamespace(**(STEP_SETTINGS | {"BATCH_SIZE": 6}))
    model = ConditionalModel(image_size=8, dim=8, dim_mults=(1, 2), timesteps=50)
    step = TrainStep(model, options)
    for epoch, start in [(0, 0), (0, 1), (2, 2)]:  # as resumed in the middle of an epoch, too
        step.model.calls.clear()
        for number, batch in enumerate(loader.epoch(epoch, start)):
            step(batch, number, 1e-3)
        assert [len(images) for images, _ in step.model.calls][:3] == [6, 6, 4]
        seen = [image for images, _ in step.model.calls for image in images]
        assert seen == loader.order(epoch)[start:].flatten().tolist()
        assert [3 * i for i in seen] == [x for _, labels in step.model.calls for x in labels]
    step.ema.calls.clear()
    step.validate(loader.validation())
    ((images, labels),) = step.ema.calls
    assert images == loader.val_indices.tolist() and labels == [3 * image for image in images]


def test_step_drops_labels_by_seed_and_step_but_not_in_validation():
    loader = labeled_loader()
    options = {"BATCH_SIZE": 6, "LABEL_DROPOUT": 0.5, "SEED": 3}
    model = ConditionalModel(image_size=8, dim=8, dim_mults=(1, 2), timesteps=50)
    step = TrainStep(model, SimpleNamespace(**(STEP_SETTINGS | options)))
    for number, batch in enumerate(loader.epoch(0)):
        step.model.calls.clear()
        step(batch, number, 1e-3)
        label_u = step_randomness(3, number, batch.images.shape, CPU).label_u
        expected = torch.where(label_u < 0.5, -1, batch.labels).tolist()
        assert [x for _, labels in step.model.calls for x in labels] == expected
        assert 0 < expected.count(-1) < len(expected)
    step.ema.calls.clear()
    step.validate(loader.validation())
    assert -1 not in step.ema.calls[0][1]


def test_step_without_labels_in_the_data_or_in_forward_passes_none():
    for labels in (True, False):  # FragileModel.forward has no parameter for labels
        loader, step = labeled_loader(labels=labels), make_step()
        loss, _ = step(next(loader.epoch(0)), 0, 1e-3)
        assert loss.isfinite() and np.isfinite(step.validate(loader.validation()))


# Updates that are not finite.


def test_step_skips_and_counts_an_update_that_is_not_finite():
    step, reference = make_step(), make_step()
    step(make_batch(), 0, 1e-3)
    reference.load_state_dict(copy.deepcopy(step.state_dict()))
    step.model.is_broken = True
    for number in range(3):
        step(make_batch(), 1 + number, 1e-3)
    assert (step.skipped_updates.item(), step.consecutive_skips.item()) == (3, 3)
    assert max_weight_difference(step.model, reference.model) == 0
    assert max_weight_difference(step.ema, reference.ema) == 0
    step.model.is_broken = False
    for made in (step, reference):
        made(make_batch(), 4, 1e-3)
    assert (step.skipped_updates.item(), step.consecutive_skips.item()) == (3, 0)
    # Adam's moments and step count were not touched either.
    assert max_weight_difference(step.model, reference.model) == 0


class InfiniteGradient:
    """A hook that makes the gradient of a parameter infinite while `is_on`."""

    is_on = True

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.inf if self.is_on else gradient


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_step_skips_an_infinite_gradient_of_a_finite_loss(optimizer):
    step, reference = make_step(OPTIMIZER=optimizer), make_step(OPTIMIZER=optimizer)
    hook = InfiniteGradient()
    step.param_views[0].register_hook(hook)
    loss, norm = step(make_batch(), 0, 1e-3)
    assert loss.isfinite() and not norm.isfinite()
    assert (step.skipped_updates.item(), step.consecutive_skips.item()) == (1, 1)
    assert max_weight_difference(step.model, reference.model) == 0
    assert max_weight_difference(step.ema, reference.ema) == 0
    hook.is_on = False
    for made in (step, reference):
        made(make_batch(), 1, 1e-3)
    assert max_weight_difference(step.model, reference.model) == 0


@pytest.mark.parametrize(
    ("loss", "gradient", "moves"),
    [(0.5, 0.1, True), (np.nan, 0.1, False), (np.inf, 0.1, False), (0.5, np.nan, False)],
)
def test_update_checks_both_loss_and_gradient(loss, gradient, moves):
    step, reference = make_step(), make_step()
    step.lr.fill_(1e-3)
    step.grad.fill_(gradient)
    step.update(torch.tensor(loss))
    assert (max_weight_difference(step.model, reference.model) > 0) == moves
    assert step.skipped_updates.item() == (not moves)


def test_update_with_a_scaled_loss_is_the_same_and_a_nonfinite_one_halves_the_scale(monkeypatch):
    monkeypatch.setattr("engine.train_step.LOSS_SCALE_GROWTH_STEPS", 2)
    step, reference = make_step(GRAD_CLIP=0.1), make_step(GRAD_CLIP=0.1)
    step.use_loss_scaling = True
    step.loss_scale.fill_(1024.0)
    loss, norm = step(make_batch(), 0, 1e-3)
    expected = reference(make_batch(), 0, 1e-3)
    torch.testing.assert_close((loss, norm), expected)
    assert max_weight_difference(step.model, reference.model) < 1e-6
    assert step.loss_scale.item() == 1024.0
    step(make_batch(), 1, 1e-3)
    assert step.loss_scale.item() == 2048.0  # after two finite ones
    step.model.is_broken = True
    step(make_batch(), 2, 1e-3)
    assert step.loss_scale.item() == 1024.0


# Fallbacks.


def test_step_halves_the_micro_batch_out_of_memory_and_changes_nothing_else():
    step, reference = make_step(), make_step()
    step.model.max_images = 10
    with pytest.warns(FallbackWarning, match="out of memory") as caught:
        step(make_batch(), 0, 1e-3)
    reference(make_batch(), 0, 1e-3)
    assert len(caught) == 2
    assert step.micro_batch == 8
    assert max_weight_difference(step.model, reference.model) < 1e-6
    step.model.max_images = 0
    with pytest.warns(FallbackWarning), pytest.raises(UserError, match="out of memory"):
        step(make_batch(), 1, 1e-3)


def test_step_out_of_memory_on_several_ranks_is_an_error():
    step = make_step()
    step.world_size = 2
    step.model.max_images = 10
    advice = "Use --batch_size 16 --gradient_accumulation 4, or lower --dim"
    with pytest.raises(UserError, match=advice) as caught:
        step(make_batch(), 0, 1e-3)
    assert caught.value.exit_code == 1 and step.micro_batch == 32


def test_validate_halves_its_batch_out_of_memory_for_good(recwarn):
    step = make_step()
    expected = step.validate(make_batch(20))
    step.ema.max_images = 5
    assert step.validate(make_batch(20)) == pytest.approx(expected, rel=1e-5)
    messages = [str(warning.message) for warning in recwarn.list]
    assert messages == [f"out of memory; continuing with batches of {size}" for size in (10, 5)]
    assert step.validate(make_batch(20)) == pytest.approx(expected, rel=1e-5)
    assert len(recwarn.list) == 2 and step.micro_batch == 32
    step.ema.max_images = 0
    with pytest.raises(UserError, match="not even one image fits"):
        step.validate(make_batch(20))


def test_update_out_of_memory_is_an_error(monkeypatch):
    def fail(loss):
        raise torch.OutOfMemoryError

    step = make_step()
    monkeypatch.setattr(step, "update", fail)
    with pytest.raises(UserError, match="out of memory in the update"):
        step(make_batch(), 1, 1e-3)


def test_step_continues_without_compilation_that_fails(monkeypatch):
    def compiler(model, **_):
        def fail(*_):
            raise torch._dynamo.exc.TorchDynamoException("no C++ compiler")

        network = torch.nn.Module()
        network.forward = fail
        return network

    monkeypatch.setattr(torch, "compile", compiler)
    step, reference = make_step(COMPILE_MODEL=True), make_step()
    with pytest.warns(FallbackWarning, match=r"torch.compile failed \(no C\+\+ compiler\)"):
        step(make_batch(), 0, 1e-3)
    reference(make_batch(), 0, 1e-3)
    assert max_weight_difference(step.model, reference.model) == 0


# Checkpoints.


def test_load_state_dict_restores_loss_scale_and_counters():
    step, other = make_step(), make_step()
    names = ("loss_scale", "finite_streak", "skipped_updates")
    for value, name in enumerate(names, 3):
        getattr(step, name).fill_(value)
    for made in (step, other):
        made.use_loss_scaling = True
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    assert [getattr(other, name).item() for name in names] == [3, 4, 5]


def test_load_state_dict_accepts_the_names_of_earlier_files():
    step, reference = make_step(OPTIMIZER="muon"), make_step(OPTIMIZER="muon")
    step(make_batch(), 0, 1e-3)
    state = copy.deepcopy(step.state_dict())
    assert set(state["optimizer"]["adam"]) == {"exp_avg", "exp_avg_sq", "count"}
    old_names = {"exp_avg": "mean", "exp_avg_sq": "square", "count": "count"}
    for name, moments in state["optimizer"].items():
        state["optimizer"][name] = {old_names[key]: value for key, value in moments.items()}
    del state["good_in_a_row"]
    reference.load_state_dict(state)
    for made in (step, reference):
        made(make_batch(), 1, 1e-3)
    assert max_weight_difference(step.model, reference.model) == 0
    with pytest.raises(UserError, match="another optimizer"):
        make_step(OPTIMIZER="adam").load_state_dict(state)
