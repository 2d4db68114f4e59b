"""engine/devices.py: inference and evaluation run where training does."""

from collections.abc import Callable

import pytest
import torch
from accelerate import PartialState
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import evaluate
import inference
import train
from ddpm_model import DDPMModel
from engine import class_metrics, devices, distributed, inference_modes, metrics
from engine.errors import UserError
from tests.helpers import CPU, TINY_FLAGS, MeanColors


@pytest.fixture
def on_mps(monkeypatch) -> torch.device:
    """A machine whose device is MPS, as accelerate finds it."""
    distributed.init()
    device = torch.device("mps")
    monkeypatch.setitem(PartialState._shared_state, "device", device)
    return device


@pytest.mark.parametrize(
    ("script", "function"), [(inference, "load_for_sampling"), (evaluate, "evaluate")]
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


def test_device_named_for_accelerate_becomes_the_current_one(monkeypatch):
    distributed.init()
    device = torch.device("cuda:1")
    made_current = []
    monkeypatch.setitem(PartialState._shared_state, "device", device)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    assert devices.default_device() == device and made_current == [device]
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("cuda"))
    devices.default_device()
    assert made_current == [device]


def test_device_name_needs_no_backend_that_is_missing():
    assert devices.device_name(CPU) == "CPU"
    assert devices.device_name(torch.device("mps")) == "MPS"


def test_untested_device_is_noted_once(on_mps, capsys):
    devices.note_untested.cache_clear()
    assert devices.default_device() == devices.default_device() == on_mps
    note = "note: this project is untested on MPS; set ACCELERATE_TORCH_DEVICE=cpu"
    assert capsys.readouterr().out.startswith(note)
    devices.default_device()
    assert capsys.readouterr().out == ""


class NoFloat64(TorchDispatchMode):
    """A device without float64, such as MPS."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if getattr(output, "dtype", None) == torch.float64:
            raise TypeError(f"{function} makes float64")
        return output


def test_training_inference_and_evaluation_need_no_float64(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def on_cpu(function: Callable) -> Callable:
        def run(*args, **kwargs):
            with _disable_current_modes():
                return function(*args, **kwargs)

        return run

    # A model is built, and a distance computed, on the CPU.
    monkeypatch.setattr(DDPMModel, "_build", on_cpu(DDPMModel._build))
    for module in (metrics, class_metrics):
        monkeypatch.setattr(module, "frechet_distance", on_cpu(metrics.frechet_distance))
    monkeypatch.setattr(evaluate, "load_feature_networks", lambda *_: [MeanColors()])
    monkeypatch.setattr(inference_modes, "COMPARED_STEPS", (2,))
    with NoFloat64():
        with pytest.raises(TypeError, match="makes float64"):
            torch.zeros(1).double()
        for main, *flags in (
            (train.main, *TINY_FLAGS, "--timesteps", "10", "--max_steps", "4"),
            (inference.main, "--mode", "all", "--num_samples", "2", "--resamples", "2"),
            (evaluate.main, "--num_samples", "2"),
        ):
            monkeypatch.setattr("sys.argv", ["script.py", *flags])
            main()
    assert list(tmp_path.glob("results/evaluate-*.json"))
