"""Halves of a batch in two threads, and a training step that computes them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ddpm_model import DDPMModel
from engine.batch_threads import BatchThreads
from engine.dataloader import Batch
from engine.randomness import seed_everything
from engine.train_step import TrainStep
from tests.helpers import STEP_SETTINGS, max_weight_difference


def trained(has_threads: bool = True, **architecture) -> TrainStep:
    """A small model after three steps on 7 images each, in micro-batches of 5."""
    torch.manual_seed(0)
    model = DDPMModel(image_size=8, dim=8, dim_mults=(1, 2), timesteps=50, **architecture)
    step = TrainStep(model, SimpleNamespace(**(STEP_SETTINGS | {"BATCH_SIZE": 5})))
    if not has_threads:
        step.threads = None
    images = torch.randint(256, (7, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    seed_everything(2)
    for number in range(3):
        step(Batch(images.to(torch.uint8)), number, 1e-3)
    return step


def test_map_returns_both_halves_in_order_of_threads_that_share_the_cores(two_cores):
    threads = BatchThreads()
    x = torch.arange(5)

    def sum_and_cores(x, y):
        return (x + y).tolist(), torch.get_num_threads()  # x + y may change the number

    assert threads.map(sum_and_cores, (x, 2 * x)) == [([0, 3, 6], 1), ([9, 12], 1)]
    assert threads.map(sum_and_cores, (x[:1], x[:1])) == [([0], 1)]
    assert torch.get_num_threads() == 2


def test_map_leaves_a_batch_whole_for_random_numbers(two_cores):
    threads = BatchThreads()
    torch.manual_seed(0)
    (found,) = threads.map(torch.rand_like, [torch.zeros(4)])
    torch.manual_seed(0)
    assert torch.equal(found, torch.rand(4))
    (count,) = threads.map(len, [torch.zeros(4)])
    assert count == 4


def test_step_in_two_threads_is_the_same_and_repeatable(two_cores):
    step, again = trained(), trained()
    assert step.threads.pool is not None
    assert max_weight_difference(step.model, again.model) == 0
    assert 0 < max_weight_difference(step.model, trained(has_threads=False).model) < 1e-5


@pytest.mark.parametrize("random", [{"dropout": 0.5}, {"self_condition": True}])
def test_step_of_a_random_model_is_the_same_bit_for_bit(random, two_cores):
    step, reference = trained(**random), trained(has_threads=False, **random)
    assert step.threads.pool is None
    assert max_weight_difference(step.model, reference.model) == 0


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True)]
)
def test_step_keeps_batches_whole_for_running_statistics(norm, two_cores):
    model = DDPMModel(image_size=8, dim=8, dim_mults=(1, 2), timesteps=50)
    config = SimpleNamespace(**STEP_SETTINGS)
    assert TrainStep(model, config).threads
    model.norm = norm
    assert TrainStep(model, config).threads is None
