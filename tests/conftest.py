"""Settings that must be made before torch and Triton are imported."""

import os

# Two workers of two threads each would wait for each other on two cores; and of one thread, a model
# is called once for a batch.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collectstart() -> None:
    """Sets what depends on a GPU; the process that starts the workers collects nothing."""
    import torch

    # Without a GPU, Triton interprets the kernels.
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
