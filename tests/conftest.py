"""Settings that must be made before torch and Triton are imported, and shared fixtures."""

import os
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

import engine  # noqa: F401, sets how idle threads wait

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


# Of training scripts and runs.


@pytest.fixture
def on_a_cpu(monkeypatch) -> None:
    """Training scripts configure a run as without a GPU."""
    from tests.helpers import CPU_TIER

    monkeypatch.setattr("train.detect_tier", lambda: CPU_TIER)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """run_here(folder, script, *arguments) is run_script_ok in this process, and faster."""

    def call(folder: Path, script: str, *arguments: str, code: int = 0) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(Path(__file__).parent.parent / script), run_name="__main__")
        printed = capsys.readouterr()
        assert stopped.value.code == code, printed
        return printed.err if code else printed.out

    return call


@pytest.fixture
def script_error(run_here):
    """script_error(folder, script, *arguments) runs a script that must fail; returns its error."""

    def call(folder: Path, script: str, *arguments: str) -> str:
        errors = run_here(folder, script, *arguments, code=2).splitlines()
        lines = [line for line in errors if line.startswith("error: ")]
        assert len(lines) == 1 and errors[-1] == lines[0]
        return lines[0]

    return call


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with a finished run `whole` of 40 steps."""
    from tests.helpers import TINY_FLAGS, run_script_ok

    folder = tmp_path_factory.mktemp("trained")
    flags = ["--run_name", "whole", "--max_steps", "40"]
    run_script_ok(folder, "train_optimized.py", *TINY_FLAGS, *flags)
    return folder


@pytest.fixture
def trained_copy(trained, tmp_path) -> Path:
    """A folder with that run, which a test may change."""
    return shutil.copytree(trained, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def run_folder(trained, tmp_path) -> Path:
    """A folder with the image cache of `trained`, which takes a second to build."""
    shutil.copytree(trained / "data", tmp_path / "data")
    return tmp_path


@pytest.fixture(scope="session")
def trained_by_api(tmp_path_factory) -> Path:
    """A folder with a finished run `whole` of 4 steps, which are an epoch."""
    from config import resolve
    from ddpm_model import DDPMModel
    from engine.trainer import train
    from tests.helpers import API_FLAGS, CPU_TIER, random_images

    folder = tmp_path_factory.mktemp("trained_by_api")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        flags = API_FLAGS | {"MAX_STEPS": 4, "RUN_NAME": "whole"}
        config = resolve("folder", CPU_TIER, flags=flags)
        train(DDPMModel.from_config(config), random_images(80, 8), config)
    return folder


@pytest.fixture
def resumable(trained_by_api, tmp_path, monkeypatch) -> Callable[..., Path]:
    """A working folder with the run `whole`; resumable(file, ...) resumes it by the API."""
    from config import resolve
    from ddpm_model import DDPMModel
    from engine.trainer import train
    from tests.helpers import API_FLAGS, CPU_TIER, random_images

    shutil.copytree(trained_by_api, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def resume(file: str = "last.pt", seed: int = 0, **changes) -> Path:
        flags = API_FLAGS | {"MAX_STEPS": 4} | changes
        config = resolve("folder", CPU_TIER, flags=flags)
        images = random_images(80, 8, seed=seed)
        return train(DDPMModel.from_config(config), images, config, f"checkpoints/whole/{file}")

    return resume


@pytest.fixture
def saved_run(tmp_path, monkeypatch) -> dict:
    """The configuration of a run `mine` of train_optimized.py that has saved a checkpoint."""
    import train_optimized
    from config import resolve
    from engine import checkpoints
    from tests.helpers import CPU_TIER

    monkeypatch.chdir(tmp_path)
    flags = {
        "LEARNING_RATE": 0.0125, "DIM": 16, "DIM_MULTS": (1, 2), "IMAGE_SIZE": 8, "MAX_STEPS": 77,
        "BATCH_SIZE": 6, "GRADIENT_ACCUMULATION": 4, "SEED": 3, "RUN_NAME": "mine",
    }  # fmt: skip
    config = resolve("shapes", CPU_TIER, train_optimized.DEFAULTS, flags=flags).as_dict()
    empty = {key: type_() for key, type_ in checkpoints.TRAINING_KEYS.items()}
    checkpoints.save(Path("checkpoints/mine/last.pt"), empty | {"run": "mine", "config": config})
    return config
