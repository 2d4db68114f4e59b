"""engine/randomness.py: a step's random inputs by seed and number; the global generators."""

import random
from types import SimpleNamespace

import pytest
import torch

from engine.randomness import StepRandomness, get_rng_state, set_rng_state, step_randomness
from tests.helpers import CPU

PAIRS = [(seed, step) for seed in range(4) for step in range(4)]


@pytest.mark.parametrize("part", StepRandomness._fields)
def test_step_randomness_differs_for_every_seed_and_step(part):
    shape = torch.Size([64, 1, 2, 2])
    tensors = (getattr(step_randomness(*pair, shape, CPU), part) for pair in PAIRS)
    values = {tuple(each.flatten().tolist()) for each in tensors}
    assert len(values) == len(PAIRS)


def test_step_randomness_is_reproducible():
    first, second = (step_randomness(3, 7, torch.Size([8, 3, 2, 2]), CPU) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_rng_state_of_both_generators_is_restored():
    state = get_rng_state(CPU)
    values = random.random(), torch.rand(1).item()
    set_rng_state(state, CPU)
    assert (random.random(), torch.rand(1).item()) == values


def test_rng_state_of_another_device_is_saved(monkeypatch):
    backend = SimpleNamespace(get_rng_state=lambda: "state")
    monkeypatch.setattr(torch, "get_device_module", lambda device: backend)
    restored = []
    backend.set_rng_state = restored.append
    state = get_rng_state(torch.device("mps"))
    assert state["mps"] == "state"
    set_rng_state(state, CPU)
    assert restored == []
    set_rng_state(state, torch.device("mps"))
    assert restored == ["state"]
