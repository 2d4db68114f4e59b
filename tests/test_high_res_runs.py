"""The high-resolution scripts from the published archive to the sampled image."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.utils import calculate_md5

import inference
import inference_high_res
import train
import train_stl10_optimized
import train_true_high_res
from engine.datasets import ARCHIVES
from engine.errors import UserError
from tests.helpers import change_archive, random_images, write_tar, write_zip

STL10_NAMES = tuple(ARCHIVES["stl10"].contents)
FOUR_LEVELS = [
    "--dim", "8", "--dim_mults", "1,1,1,1", "--attention_heads", "1", "--attention_dim", "8",
    "--batch_size", "4", "--grid_images", "2", "--sampling_timesteps", "2", "--max_steps", "2",
]  # fmt: skip


@pytest.fixture
def run_training(tmp_path, monkeypatch):
    """Runs a training script in an empty folder; returns the final checkpoint."""
    monkeypatch.chdir(tmp_path)

    def run_training(script, *arguments: str) -> dict:
        name = f"run-{len(list(Path('.').glob('checkpoints/*')))}"
        flags = [*FOUR_LEVELS, *arguments, "--run_name", name]
        monkeypatch.setattr(sys, "argv", [script.__file__, *flags])
        train.main(script.__doc__, script.DEFAULTS)
        return torch.load("checkpoints/ddpm_final.pt", weights_only=True)

    return run_training


def check_samples(tmp_path, monkeypatch, size: int) -> None:
    """Runs inference_high_res.py on the newest checkpoint; checks image sizes."""
    output = tmp_path / f"samples-{size}"
    flags = ["--num_samples", "3", "--batch_size", "2", "--output_dir", str(output)]
    monkeypatch.setattr(sys, "argv", ["inference_high_res.py", *flags])
    inference.main(inference_high_res.__doc__, inference_high_res.DEFAULTS)
    images = sorted(output.rglob("0*.png"))
    assert [Image.open(path).size for path in images] == [(size, size)] * 3
    (grid,) = output.rglob("grid.png")
    assert Image.open(grid).width >= 2 * max(size, 128)


def test_stl10_run_from_its_archive(run_training, tmp_path, monkeypatch):
    archive = tmp_path / "data" / "stl10_binary.tar.gz"
    archive.parent.mkdir()
    parts = [part.tobytes() for part in np.split(random_images(16, 96), [4])]
    labels = {"stl10_binary/train_y.bin": bytes([1, 2, 3, 4])}
    write_tar(archive, dict(zip(STL10_NAMES, parts, strict=True)) | labels)
    counts = dict(zip(STL10_NAMES, (4, 12), strict=True))
    change_archive(monkeypatch, "stl10", contents=counts, md5=calculate_md5(archive))
    final = run_training(train_stl10_optimized, "--gradient_checkpointing", "--dropout", "0.1")
    data = {"dataset": "stl10", "images": 16, "shape": [3, 96, 96]}
    assert final["data"].items() >= data.items()
    assert final["architecture"]["schedule_base_size"] == 32
    assert final["architecture"]["dropout"] == 0.1
    check_samples(tmp_path, monkeypatch, 96)


def test_celeba_run_from_its_zip_and_from_a_folder_at_128(run_training, tmp_path, monkeypatch):
    archive = tmp_path / "data" / "celeba" / "img_align_celeba.zip"
    archive.parent.mkdir(parents=True)
    files = {}
    for i in range(16):
        jpeg = io.BytesIO()
        pixels = np.random.default_rng(i).integers(0, 256, (218, 178, 3), np.uint8)
        Image.fromarray(pixels).save(jpeg, "JPEG")
        files[f"img_align_celeba/{i + 1:06d}.jpg"] = jpeg.getvalue()
    write_zip(archive, files)
    change_archive(monkeypatch, "celeba", md5=calculate_md5(archive))
    final = run_training(train_true_high_res, "--dataset", "celeba")
    data = {"dataset": "celeba", "images": 16, "shape": [3, 64, 64]}
    assert final["data"].items() >= data.items()
    check_samples(tmp_path, monkeypatch, 64)

    folder = ["--dataset", "folder", "--data_dir", "data/celeba/img_align_celeba", "--target_size"]
    final = run_training(train_true_high_res, *folder, "128")
    assert final["data"]["shape"] == [3, 128, 128]
    check_samples(tmp_path, monkeypatch, 128)

    message = r"are 178 px, smaller than --image_size 192 .*--image_size 176, or --use_upsampling"
    with pytest.raises(UserError, match=message):
        run_training(train_true_high_res, *folder, "192")
    final = run_training(train_true_high_res, *folder, "192", "--use_upsampling")
    assert final["data"]["shape"] == [3, 192, 192]
