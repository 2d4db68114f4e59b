"""The pretrained model."""

import pytest
import torch
from safetensors import safe_open

from ddpm_model import DDPMModel
from engine import checkpoints
from engine.errors import UserError
from engine.samplers import SAMPLERS
from tests.helpers import run_script_ok

FILE = checkpoints.PRETRAINED_DIR / "cifar10.safetensors"


@pytest.fixture(scope="module")
def pretrained() -> DDPMModel:
    return DDPMModel.from_pretrained("cifar10")


def test_pretrained_model_is_the_default_of_inference(tmp_path):
    output = run_script_ok(tmp_path, "inference.py", "--num_samples", "1", "--steps", "2")
    assert f"no checkpoint in checkpoints/ yet; using the pretrained {FILE.name}" in output
    files = list(tmp_path.glob("inference_results/samples-*/*/000000.png"))
    assert len(files) == 10 and len({file.parent.name for file in files}) == 10


def test_pretrained_file_has_8_bit_matrices_fp16_weights_and_an_fp32_schedule():
    assert FILE.stat().st_size < 32e6
    with safe_open(FILE, framework="pt") as file:
        names = list(file.keys())
        dtypes = {name: file.get_slice(name).get_dtype() for name in names}
    for name, dtype in dtypes.items():
        is_network = name.startswith(("diffusion.model.", "guide."))
        if name + ".scale" in dtypes:
            assert is_network and dtype == "I8", name
        else:
            assert dtype == ("F16" if is_network and not name.endswith(".scale") else "F32"), name


def test_pretrained_model_denoises_its_samples(pretrained):
    images = pretrained.sample(1, steps=10, seed=0)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([300])
    with torch.no_grad():
        error = pretrained.mse_per_image(images, t, noise).mean().item()
        untrained = DDPMModel(dim=8).mse_per_image(images, t, noise).mean().item()
    assert error < 0.1 < 0.5 < untrained


def test_tuned_model_samples_in_two_steps_what_the_pretrained_one_does_in_20_nfe(pretrained):
    size = (checkpoints.PRETRAINED_DIR / "cifar10-tuned.safetensors").stat().st_size
    assert size < 16e6
    tuned = DDPMModel.from_pretrained("cifar10-tuned")
    labels = [1, 8]
    wanted = pretrained.sample(2, seed=0, labels=labels)
    images = tuned.sample(2, seed=0, labels=labels)
    distance = (images - wanted).square().mean().sqrt().item()
    to_others = (images - wanted.roll(1, 0)).square().mean().sqrt().item()
    assert distance < to_others / 3


def test_from_pretrained_rejects_unknown_names():
    with pytest.raises(UserError, match="unknown pretrained model cifar100; choose from cifar10"):
        DDPMModel.from_pretrained("cifar100")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pretrained_model_makes_no_noise_in_few_steps(pretrained, sampler):
    for steps in (1, 3, 8):
        images = pretrained.sample(1, seed=26, sampler=sampler, steps=steps)
        roughness = (images[..., 1:] - images[..., :-1]).abs().mean().item()
        assert roughness < 0.2, steps  # of noise 0.4, of images of 40 steps 0.08
