"""Weights in 8 bits are as close as their scales say, and samples stay what they were."""

import pytest
import torch

from ddpm_model import DDPMModel
from engine import checkpoints
from engine.compression import LARGE, SCALE, compress, decompress
from engine.errors import UserError
from tests.small_models import guided_model


def test_each_value_is_within_half_a_step_of_its_row():
    generator = torch.Generator().manual_seed(0)
    large = (
        torch.randn(200, LARGE // 200, generator=generator) * torch.logspace(-6, 2, 200)[:, None]
    )
    large[7] = 0
    state = {
        "diffusion.model.large.weight": large, "diffusion.model.small.weight": large[:50, :9],
        "guide.small.weight": large[:50, :9], "guide.bias": large[:, 0], "timestep_cdf": large[0],
    }  # fmt: skip
    compressed = compress(state)
    bits = {name: value.element_size() * 8 for name, value in compressed.items()}
    assert bits == {
        "diffusion.model.large.weight": 8, "diffusion.model.large.weight.scale": 32,
        "diffusion.model.small.weight": 16, "guide.small.weight": 8,
        "guide.small.weight.scale": 32, "guide.bias": 16, "timestep_cdf": 32,
    }  # fmt: skip

    restored = decompress(compressed)
    assert restored.keys() == state.keys()
    for name in ("diffusion.model.large.weight", "guide.small.weight"):
        step = state[name].abs().amax(1, keepdim=True) / 127
        assert ((restored[name] - state[name]).abs() <= 0.5001 * step).all()
    again = compress(restored)
    assert all(
        torch.equal(again[name], value) for name, value in compressed.items() if "scale" not in name
    )


def test_a_compressed_file_is_less_than_half_and_samples_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.compression.LARGE", 1000)
    model = guided_model(seed=0)
    model.save_model(tmp_path / "whole.safetensors")
    model.save_model(tmp_path / "small.safetensors", compressed=True)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("small", "whole")]
    assert sizes[0] < 0.5 * sizes[1]
    small = DDPMModel.from_file(tmp_path / "small.safetensors").eval()
    difference = small.sample(4, seed=0) - model.sample(4, seed=0)
    assert 0 < difference.square().mean().sqrt() < 0.01


def test_a_weight_above_those_of_fp16_is_kept(tmp_path):
    model = guided_model(seed=0)
    model.unet.final_conv.bias.data.fill_(70_000)
    model.save_model(tmp_path / "small.pt", compressed=True)
    small = DDPMModel.from_file(tmp_path / "small.pt")
    assert small.unet.final_conv.bias.tolist() == [70_000] * 3


MATRIX = "guide.final_conv.weight"  # (3, 8, 1, 1)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({MATRIX + SCALE: None}, "must have 8 bits and a scale for each row, or neither"),
        ({MATRIX + SCALE: torch.ones(1)}, "a scale for each row"),
        ({MATRIX: torch.ones(3, 8, 1, 1)}, "a scale for each row"),
        ({"guide.final_conv.bias" + SCALE: torch.ones(3)}, "a scale for each row"),
        ({MATRIX: None}, "Missing key"),
        ({"guide.another.weight" + SCALE: torch.ones(3)}, "Unexpected key"),
    ],
)
def test_matrices_and_scales_that_do_not_belong_together_are_refused(tmp_path, change, problem):
    model = guided_model(seed=0)
    state = {k: v.contiguous() for k, v in compress(model.state_dict()).items()} | change
    path = tmp_path / "model.safetensors"
    checkpoints.save_safetensors(
        path, model.architecture, {k: v for k, v in state.items() if v is not None}
    )
    with pytest.raises(UserError, match=rf"model\.safetensors does not fit DDPMModel .*{problem}"):
        DDPMModel.from_file(path)
