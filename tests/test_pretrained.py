"""The model that comes with the project."""

import pytest
import torch
from safetensors import safe_open

from ddpm_model import DDPMModel
from engine import checkpoints
from engine.errors import UserError
from tests.test_training import run

FILE = checkpoints.SHIPPED / "cifar10.safetensors"


def test_a_fresh_clone_draws_with_it(tmp_path):
    output = run(tmp_path, "inference.py", "--num_samples", "2", "--steps", "2")
    assert "nothing was trained in checkpoints/ yet" in output and str(FILE) in output
    assert len(list(tmp_path.glob("inference_results/samples-*/00000?.png"))) == 2


def test_it_is_small_half_precision_and_its_schedule_is_not():
    assert FILE.stat().st_size < 32e6
    with safe_open(FILE, framework="pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a dict
    assert all((kind == "F16") == name.startswith(("diffusion.model.", "guide.")) for name, kind in kinds.items())


def test_it_is_trained():
    """It takes noise off what it draws itself far better than a new model, and draws the same again from a copy."""
    model = DDPMModel.from_pretrained("cifar10")
    images = model.sample(4, steps=10, seed=0)
    noise, t = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)), torch.full((4,), 300)
    with torch.no_grad():
        error = model.squared_error(images, t, noise).mean().item()
        new = DDPMModel(dim=8, loss_weighting="edm").squared_error(images, t, noise).mean().item()
    assert error < 0.1 < 0.5 < new
    with pytest.raises(UserError, match="no model cifar100 comes with the project; there are cifar10"):
        DDPMModel.from_pretrained("cifar100")


def test_half_precision_halves_the_file_and_hardly_moves_a_picture(tmp_path):
    torch.manual_seed(0)
    model = DDPMModel(image_size=16, dim=16, dim_mults=(1, 2))
    for name, half in (("whole", False), ("half", True)):
        model.save_model(tmp_path / f"{name}.safetensors", half=half)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    other = DDPMModel().load_model(tmp_path / "half.safetensors")
    assert next(other.parameters()).dtype == torch.float32
    assert (other.sample(2, steps=5, seed=0) - model.sample(2, steps=5, seed=0)).abs().max() < 0.02
