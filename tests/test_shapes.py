"""engine/shapes.py: images by (seed, index), equally frequent kinds, exact areas."""

import numpy as np
import pytest

from engine.shapes import SHAPE_KINDS, draw_shapes, kind_of, uniform_hash


def test_draw_shapes_depends_on_index_and_seed_only():
    image = draw_shapes(np.array([7]), 16)
    np.testing.assert_array_equal(draw_shapes(np.array([3, 5000, 7]), 16)[2:], image)
    assert (draw_shapes(np.array([7]), 16, seed=1) != image).any()


def test_kind_of_is_uniform():
    frequency = np.bincount(kind_of(np.arange(10_000)), minlength=4) / 10_000
    np.testing.assert_allclose(frequency, 0.25, atol=0.015)  # 3.5 standard deviations


@pytest.mark.parametrize(
    ("kind", "unit_area"),
    [
        ("circle", np.pi * 0.9**2),
        ("square", 2),
        ("triangle", 3 * 3**0.5 / 4),
        ("star", 10 * 0.45 * np.sin(np.pi / 5) / 2),
    ],
)
def test_draw_shapes_covers_the_area_of_the_outline(kind, unit_area):
    """The summed coverage of a shape is its area, to a fraction of a pixel."""
    size = 32
    index = np.flatnonzero(kind_of(np.arange(200)) == SHAPE_KINDS.index(kind))
    u = uniform_hash(index, 0)
    radii = 0.32 + 0.13 * u[:, 1]
    centers = 0.5 + (2 * u[:, 2:4] - 1) * (0.5 - radii)[:, None]
    pixel = (np.arange(size) + 0.5) / size
    x, y = (axis.ravel() for axis in np.meshgrid(pixel, pixel))
    plane = np.stack([np.ones_like(x), x, y], axis=1)
    images = draw_shapes(index, size).astype(float)
    for image, radius, center in zip(images, radii, centers, strict=True):
        colors = image.reshape(3, -1).T
        distance = np.hypot(x - center[0], y - center[1])
        # The background is linear in x and y: its pixels outside the shape determine the others.
        is_outside = distance > radius + 1 / size
        fit = np.linalg.lstsq(plane[is_outside], colors[is_outside], rcond=None)[0]
        background = plane @ fit
        contrast = colors[distance.argmin()] - background
        coverage = ((colors - background) * contrast).sum(1) / (contrast**2).sum(1)
        assert coverage.mean() == pytest.approx(unit_area * radius**2, rel=0.01)
