"""engine/sources.py: the old import path still works, with a warning."""

import importlib
import sys

import numpy as np
import pytest

from engine import datasets
from engine.datasets import images_from_loader
from engine.errors import RenamedWarning
from engine.shapes import draw_shapes


def test_sources_is_the_old_import_path(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "SHAPES_COUNT", 10)
    monkeypatch.delitem(sys.modules, "engine.sources", raising=False)
    with pytest.warns(RenamedWarning, match="images_from_loader"):
        sources = importlib.import_module("engine.sources")
    assert sources.collect is images_from_loader
    images = sources.load_images("shapes", 8, tmp_path, tmp_path / "cache", progress=False)
    np.testing.assert_array_equal(images, draw_shapes(np.arange(10), 8))
