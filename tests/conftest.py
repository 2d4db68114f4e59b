"""Settings that must be made before torch and Triton are imported, and shared fixtures."""

import os
from collections.abc import Iterator

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
