"""Settings that must be made before torch and Triton are imported, and shared fixtures."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

# Two workers of two threads each would wait for each other on two cores; and of one thread, a model
# is called once for a batch.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collectstart() -> None:
    """Sets what depends on a GPU; the process that starts the workers collects nothing."""
    import torch

    # Without a GPU, Triton interprets the kernels.
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def load(tmp_path):
    """The images of load_dataset on tmp_path/data, which a test fills."""
    from engine.datasets import load_dataset

    (tmp_path / "data").mkdir()

    def load(dataset="folder", size=4, folder="data", **options):
        data = load_dataset(
            dataset, size, tmp_path / folder, load.cache, workers=3, progress=False, **options
        )
        assert data.labels is None and data.class_names == ()
        return data.images

    load.data = tmp_path / "data"
    load.cache = tmp_path / "cache"
    return load


@pytest.fixture
def two_cores() -> Iterator[None]:
    """As on two cores; tests have one each."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# Of inference.py and app.py; each imports what it needs, after the settings above are made.


@pytest.fixture
def infer(monkeypatch) -> Callable[..., int]:
    """Runs an inference script in this process; returns its exit code."""
    import inference
    from tests.helpers import exit_code

    def infer(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["inference.py", *arguments])
        return exit_code(inference.main)

    return infer


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with a small model in checkpoints/."""
    from tests.small_models import small_model

    monkeypatch.chdir(tmp_path)
    sizes = {"image_size": 16, "dim_mults": (1, 2), "timesteps": 60, "sampling_timesteps": 6}
    small_model(**sizes).save_model("checkpoints/ddpm_final.pt")
    return tmp_path


@pytest.fixture
def guided(tmp_path, monkeypatch) -> Path:
    """A working folder with a smaller model that has a guide, and an image a.png."""
    import numpy as np
    from PIL import Image

    from tests.small_models import guided_model

    monkeypatch.chdir(tmp_path)
    guided_model().save_model("checkpoints/ddpm_final.pt")
    rows = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(rows).save("a.png")
    return tmp_path


@pytest.fixture
def conditional(tmp_path, monkeypatch):
    """A small model of three classes in checkpoints/ of the working folder."""
    from tests.small_models import small_model

    monkeypatch.chdir(tmp_path)
    model = small_model(class_counts={"cat": 2, "dog": 1, "cow": 1})
    model.snapshot_guide()
    for network in (model.unet, model.guide):
        network.class_embedding.weight.data.normal_()
    model.save_model("checkpoints/ddpm_final.pt")
    return model


@pytest.fixture
def grids(monkeypatch) -> list:
    """The images of each labeled grid or table that is made."""
    from engine import plots

    made = []

    def record(function: Callable, images, *args, **kwargs):
        made.append(images)
        return function(images, *args, **kwargs)

    for name in ("captioned_grid", "table"):
        monkeypatch.setattr(plots, name, partial(record, getattr(plots, name)))
    return made


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A model in a new working folder, as app.py serves it."""
    from PIL import Image

    import app
    from engine.page import ModelKeeper
    from tests.small_models import save_model

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # app.start sets it
    monkeypatch.chdir(tmp_path)
    path = save_model("checkpoints/ddpm_final.pt")
    return ModelKeeper(lambda: path, app.load_shared_model).refresh()
