"""The training step: what it computes, and what it does when something goes wrong."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddpm_model import DDPMModel
from engine.batches import Batches, Rows, split
from engine.errors import UserError
from engine.step import Step, draw, ema_decay, learning_rate
from engine.training import MOST_SKIPPED_IN_A_ROW

SETTINGS = {
    "BATCH_SIZE": 32,
    "GRADIENT_ACCUMULATION": 1,
    "OPTIMIZER": "adam",
    "GRAD_CLIP": 1.0,
    "EMA_DECAY": 0.9,
    "HORIZONTAL_FLIP": True,
    "USE_AMP": False,
    "COMPILE_MODEL": False,
    "CUDA_GRAPH": False,
    "SEED": 0,
}


class Breakable(DDPMModel):
    """A model that can run out of memory above a number of images, or lose its loss at some timesteps."""

    most_images, broken = 10**9, False

    def forward(self, images, t, noise):
        if len(images) > self.most_images:
            raise torch.OutOfMemoryError("too many images")
        return super().forward(images, t, noise) * (float("nan") if self.broken else 1.0)


def make(**changes) -> Step:
    torch.manual_seed(0)
    model = Breakable(image_size=8, dim=8, dim_mults=(1, 2), timesteps=50)
    return Step(model, SimpleNamespace(**(SETTINGS | changes)))


def images(count: int = 32) -> torch.Tensor:
    return torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def largest_difference(a: torch.nn.Module, b: torch.nn.Module) -> float:
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_one_step_is_adam_on_the_clipped_gradient_of_the_loss():
    step = make()
    torch.manual_seed(0)
    reference = Breakable(image_size=8, dim=8, dim_mults=(1, 2), timesteps=50)
    reference.to(memory_format=torch.channels_last)  # Adam's first step makes much of the rounding of small gradients
    adam = torch.optim.Adam(reference.parameters(), lr=0.01, betas=(0.9, 0.99))
    place, noise, mirror = draw(0, 3, torch.Size([32, 3, 8, 8]), torch.device("cpu"))
    t = (place * 50).long()
    x = torch.stack([image.flip(-1) if flip else image for image, flip in zip(images() / 255, mirror, strict=True)])
    expected = reference(x, t, noise)
    expected.backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    adam.step()
    loss, ours = step(images(), 3, 0.01)
    torch.testing.assert_close((loss, ours), (expected.detach(), norm))
    assert largest_difference(step.model, reference) < 1e-6


class Replayed:
    """What engine.graph.Graph is to a step, on a machine that has no CUDA graphs: always the same inputs and output."""

    def __init__(self, work, pool):
        self.work, self.inputs, self.output = work, None, None

    def __call__(self, *inputs):
        if self.inputs is None:
            self.inputs = [x.clone() for x in inputs]
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        output = self.work(*self.inputs)
        self.output = output.clone() if self.output is None else self.output.copy_(output)
        return self.output


@pytest.mark.parametrize("micro", [32, 8, 12])
def test_replayed_micro_batches_make_the_same_update(micro, monkeypatch):
    monkeypatch.setattr("engine.step.Graph", Replayed)
    plain, replayed = make(BATCH_SIZE=micro), make(BATCH_SIZE=micro)
    replayed.graphs = {}
    for number in range(3):
        losses = [step(images(), number, 1e-3)[0].item() for step in (plain, replayed)]
        assert losses[0] == losses[1]
    assert largest_difference(plain.model, replayed.model) == 0
    assert set(replayed.graphs) == {micro, 32 % micro or micro, "update"}


def test_a_step_that_cannot_be_captured_is_done_without_a_graph(monkeypatch, capsys):
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("engine.step.Graph", refuse)
    step, reference = make(), make()
    step.graphs = {}
    for made in (step, reference):
        made(images(), 0, 1e-3)
    assert "CUDA graph capture FAILED" in capsys.readouterr().out and step.graphs is None
    assert largest_difference(step.model, reference.model) == 0


@pytest.mark.parametrize("micro", [8, 12])  # 12 does not divide the batch
def test_accumulated_micro_batches_make_the_same_update_as_the_whole_batch(micro):
    whole, parts = make(BATCH_SIZE=32), make(BATCH_SIZE=micro)
    for number in range(3):
        whole(images(), number, 1e-3)
        parts(images(), number, 1e-3)
    assert largest_difference(whole.model, make().model) > 0
    assert largest_difference(whole.model, parts.model) < 5e-6  # the updates are 3e-3; the rest is rounding


def test_ema_is_its_closed_form():
    step = make(EMA_DECAY=0.6)
    start = next(step.model.parameters()).detach().clone()
    history = []
    for number in range(6):
        step(images(), number, 1e-2)
        history.append(next(step.model.parameters()).detach().clone())
    decays = [min(0.6, (1 + n) / (10 + n)) for n in range(6)]
    expected, weight = torch.zeros_like(start), 1.0
    for decay, value in zip(reversed(decays), reversed(history), strict=True):
        expected, weight = expected + weight * (1 - decay) * value, weight * decay
    torch.testing.assert_close(next(step.ema.parameters()), expected + weight * start)
    assert ema_decay(0.999, 0) == 0.1 and ema_decay(0.999, 10**6) == 0.999


def test_an_update_that_is_not_finite_is_left_out_and_counted():
    step = make()
    step(images(), 0, 1e-3)
    before = make()
    before.load_state_dict(copy.deepcopy(step.state_dict()))
    step.model.broken = True
    for number in range(3):
        step(images(), 1 + number, 1e-3)
    assert (step.skipped.item(), step.skipped_in_a_row.item()) == (3, 3)
    assert largest_difference(step.model, before.model) == largest_difference(step.ema, before.ema) == 0
    step.model.broken = False
    step(images(), 4, 1e-3)
    before(images(), 4, 1e-3)
    assert (step.skipped.item(), step.skipped_in_a_row.item()) == (3, 0)
    assert largest_difference(step.model, before.model) == 0  # Adam's moments and step count were left alone too
    assert MOST_SKIPPED_IN_A_ROW > 3


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(capsys):
    step, reference = make(), make()
    step.model.most_images = 10
    step(images(), 0, 1e-3)
    reference(images(), 0, 1e-3)
    assert step.micro_batch == 8
    assert largest_difference(step.model, reference.model) < 1e-6
    assert capsys.readouterr().out.count("out of GPU memory") == 2
    step.model.most_images = 0
    with pytest.raises(UserError, match="out of GPU memory"):
        step(images(), 1, 1e-3)


def test_out_of_memory_while_validating_or_updating(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    step = make()
    expected = step.validate(images(20))
    step.ema.most_images = 5
    assert step.validate(images(20)) == pytest.approx(expected, rel=1e-5)
    assert capsys.readouterr().out.split("\n")[:-1] == [
        f"out of GPU memory: going on with batches of {size}" for size in (10, 5)
    ]
    assert step.validate(images(20)) == pytest.approx(expected, rel=1e-5) and not capsys.readouterr().out
    step.ema.most_images = 0
    with pytest.raises(UserError, match="one image alone does not fit"):
        step.validate(images(20))

    def fail(loss):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(step, "update", fail)
    with pytest.raises(UserError, match="out of GPU memory in the update"):
        step(images(), 1, 1e-3)


def test_compilation_that_fails_is_said_and_done_without(capsys, monkeypatch):
    def compiler(model, **_):
        def fail(*_):
            raise torch._dynamo.exc.TorchDynamoException("no C++ compiler")

        network = torch.nn.Module()
        network.forward = fail
        return network

    monkeypatch.setattr(torch, "compile", compiler)
    step, reference = make(COMPILE_MODEL=True), make()
    step(images(), 0, 1e-3)
    reference(images(), 0, 1e-3)
    assert largest_difference(step.model, reference.model) == 0
    assert "torch.compile FAILED" in capsys.readouterr().out


def test_mixed_precision_stays_near_full_precision():
    step, reference = make(USE_AMP=True), make()
    loss, _ = step(images(), 0, 1e-3)
    expected, _ = reference(images(), 0, 1e-3)
    assert loss.item() != expected.item()
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert next(step.model.parameters()).dtype == torch.float32


def test_validation_does_not_depend_on_the_batch_or_the_moment():
    step = make()
    value = step.validate(images(20))
    step.micro_batch = 7
    assert step.validate(images(20)) == pytest.approx(value, rel=1e-5)


def test_learning_rate_rises_then_falls_to_nothing():
    def rate(step, progress, schedule="cosine"):
        return learning_rate(2e-3, schedule, step, 100, progress)

    assert rate(0, 0.0) == pytest.approx(2e-5) and rate(49, 0.0) == pytest.approx(1e-3)
    assert rate(100, 0.0) == 2e-3 and rate(500, 0.5) == pytest.approx(1e-3) and rate(999, 1.0) == pytest.approx(0)
    assert rate(999, 1.0, "constant") == 2e-3


def test_an_epoch_is_every_training_image_once_shared_out_over_the_processes():
    data = np.zeros((200, 3, 4, 4), np.uint8)
    alone = Batches(data, 16, 7, torch.device("cpu"), 1)
    shared = [Batches(data, 16, 7, torch.device("cpu"), 1, rank, 4) for rank in range(4)]
    training, held_out = split(200)
    assert len(held_out) == 10 and not set(held_out) & set(training)
    assert len(alone) == 11 and len(np.unique(alone.order(3))) == 11 * 16
    assert set(alone.order(3).flat) <= set(training)
    assert np.array_equal(np.concatenate([part.order(3) for part in shared], axis=1), alone.order(3))
    assert not np.array_equal(alone.order(3), alone.order(4))
    assert len(list(alone.epoch(3, start=4))) == 7
    with pytest.raises(UserError, match="fewer than one batch of 256"):
        Batches(data, 256, 0, torch.device("cpu"), 1)
    with pytest.raises(UserError, match="cannot be shared equally by 3"):
        Batches(data, 16, 0, torch.device("cpu"), 1, 0, 3)


def test_workers_that_are_not_forked_get_the_path_of_a_memory_map_not_its_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (64, 3, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    mapped, order = np.load(tmp_path / "images.npy", mmap_mode="r"), np.array([[5, 2, 63], [0, 7, 7]])
    for there in (mapped, mapped[::-1], images):
        pickled = pickle.dumps(Rows(there, order))
        assert (len(pickled) < 1000) == (there is mapped)
        assert np.array_equal(pickle.loads(pickled)[1], there[order[1]])
