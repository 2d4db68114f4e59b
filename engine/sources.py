"""Old import path of engine/datasets.py, for one more release."""

import warnings
from typing import Any

from engine.datasets import images_from_loader, load_dataset
from engine.errors import RenamedWarning

collect = images_from_loader


def load_images(*args: Any, **options: Any) -> Any:
    """Returns load_dataset(...).images."""
    return load_dataset(*args, **options).images


message = "engine.sources: use images_from_loader and load_dataset of engine.datasets instead"
warnings.warn(message, RenamedWarning, stacklevel=2)
