"""engine/sampling_settings.py: flags of how images are sampled, and what they default to."""

import json

import pytest
import torch
from torch import Tensor

from ddpm_model import DDPMModel
from tests.small_models import is_image, load_model, only


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {}),
        (["--guidance", "1"], {"guidance": 1}),
        (["--guidance", "4"], {"guidance": 4}),
        (["--steps", "3", "--spacing", "uniform"], {"steps": 3, "spacing": "uniform"}),
        (["--sampler", "ddim", "--eta", "0.8"], {"sampler": "ddim", "eta": 0.8}),
        (["--sampler", "ddpm"], {"sampler": "ddpm", "steps": 40}),
        (["--sampler", "heun", "--eta", "0.8"], {"sampler": "heun"}),
    ],
)
def test_samples_are_those_of_the_model(guided, infer, flags, options):
    assert infer("--seeds", "7,3", *flags) == 0
    images = load_model().sample(2, seed=[7, 3], **options)
    assert is_image(only("*/000007.png"), images[0]) and is_image(only("*/000003.png"), images[1])


def test_guidance_0_is_the_models_own_with_a_warning(guided, infer, capsys):
    assert infer("--seeds", "7", "--guidance", "0") == 0
    assert "warning: --guidance 0 is deprecated" in capsys.readouterr().err
    assert is_image(only("*/000007.png"), load_model().sample(1, seed=7)[0])
    assert json.loads(only("*/summary.json").read_text())["guidance"] is None


@pytest.mark.parametrize(
    ("flags", "steps"),
    [([], 5), (["--sampler", "ddpm"], 40), (["--sampler", "ddpm", "--steps", "3"], 3)],
)
def test_steps_default_to_all_timesteps_for_ddpm_only(guided, infer, capsys, flags, steps):
    assert infer("--num_samples", "1", *flags) == 0
    assert json.loads(only("samples-*/summary.json").read_text())["steps"] == steps
    model, sampler = load_model(), "ddpm" if flags else None
    nfe = model.count_nfe(*model.sampling_plan(sampler, steps))
    assert f"{steps} steps, {nfe} NFE" in capsys.readouterr().out


def test_use_amp_samples_in_mixed_precision(guided, infer, monkeypatch):
    found, sample = [], DDPMModel.sample

    def record(*args, **kwargs) -> Tensor:
        found.append(torch.is_autocast_enabled("cpu"))
        return sample(*args, **kwargs)

    monkeypatch.setattr(DDPMModel, "sample", record)
    for flags in ([], ["--use_amp"]):
        assert infer("--num_samples", "1", "--steps", "1", *flags) == 0
    assert found == [False, True]
