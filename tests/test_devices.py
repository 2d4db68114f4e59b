"""engine/devices.py: inference and evaluation run where training does."""

import pytest
import torch
from accelerate import PartialState

import evaluate
import inference
from engine import devices, distributed
from engine.errors import UserError
from tests.helpers import CPU


@pytest.fixture
def on_mps(monkeypatch) -> torch.device:
    """A machine whose device is MPS, as accelerate finds it."""
    distributed.init()
    device = torch.device("mps")
    monkeypatch.setitem(PartialState._shared_state, "device", device)
    return device


@pytest.mark.parametrize(
    ("script", "function"), [(inference, "load_model"), (evaluate, "evaluate")]
)
def test_scripts_run_on_the_device_of_training(on_mps, tmp_path, monkeypatch, script, function):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["script.py"])
    used = []

    def stop(*arguments):
        used.append(arguments[-1])
        raise UserError("seen")

    monkeypatch.setattr(script, function, stop)
    with pytest.raises(UserError, match="seen"):
        script.main()
    assert used == [devices.default_device()] == [on_mps]


def test_device_name_needs_no_backend_that_is_missing():
    assert devices.device_name(CPU) == "CPU"
    assert devices.device_name(torch.device("mps")) == "MPS"
