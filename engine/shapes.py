"""The built-in data set: a circle, square, triangle or star on a gradient.

It needs no network and no files, at any size. Image i is a function of (seed, i) alone.
"""

import colorsys

import numpy as np

SHAPE_KINDS = ("circle", "square", "triangle", "star")
NUM_UNIFORM = 9  # random numbers of an image


def kind_of(index: np.ndarray, seed: int = 0) -> np.ndarray:
    """Returns which of SHAPE_KINDS each image shows: int (N,)."""
    return (uniform_hash(index, seed)[:, 0] * len(SHAPE_KINDS)).astype(int)


def uniform_hash(index: np.ndarray, seed: int) -> np.ndarray:
    """Hashes (seed, index, column) to numbers in [0, 1): float64 (N, NUM_UNIFORM).

    SplitMix64 (Steele et al., 2014).
    """
    column = np.arange(NUM_UNIFORM, dtype=np.uint64)
    z = np.asarray(index).astype(np.uint64)[:, None] * np.uint64(NUM_UNIFORM) + column
    z = z + np.uint64((seed * 0xD1342543DE82EF95 + 1) % 2**64)
    z = z * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) / 2.0**53


def draw_shapes(index: np.ndarray, size: int, seed: int = 0) -> np.ndarray:
    """Returns the images at indices, int (N,), not negative: uint8 (N, 3, size, size)."""
    # The circumscribed circle of a shape stays inside the image, whose side is 1.
    u = uniform_hash(index, seed)
    radius = 0.32 + 0.13 * u[:, 1]
    center = 0.5 + (2 * u[:, 2:4] - 1) * np.maximum(0.5 - radius, 0)[:, None]

    # Pixel centers in coordinates where the shape has radius 1 and center 0.
    column = ((np.arange(size) + 0.5) / size).astype(np.float32)
    row = column[:, None]
    r = radius[:, None, None].astype(np.float32)
    x = (column - center[:, 0, None, None]).astype(np.float32) / r
    y = (row - center[:, 1, None, None]).astype(np.float32) / r

    # Antialiased over one pixel.
    kinds = kind_of(index, seed)
    distance = np.empty((len(kinds), size, size), np.float32)
    for number, kind in enumerate(SHAPE_KINDS):
        of_kind = kinds == number
        distance[of_kind] = _signed_distance(x[of_kind], y[of_kind], kind)
    coverage = np.clip(0.5 - distance * r * size, 0, 1)[:, None]

    # A light shape on a dark background or the reverse, in another hue, so that it stands out.
    is_light = u[:, 4] < 0.5
    saturation = np.where(is_light, 0.6, 0.25)
    start = _rgb(u[:, 5], saturation, np.where(is_light, 0.30, 1.0))
    end = _rgb(u[:, 5] + 0.25 * (u[:, 7] - 0.5), saturation, np.where(is_light, 0.55, 0.8))
    saturation = np.where(is_light, 0.75, 0.95)
    shape = _rgb(u[:, 5] + 0.35 + 0.3 * u[:, 6], saturation, np.where(is_light, 1.0, 0.55))
    angle = (2 * np.pi * u[:, 8])[:, None, None].astype(np.float32)
    ramp = 0.5 + (np.cos(angle) * (column - 0.5) + np.sin(angle) * (row - 0.5)) / 1.42
    background = start * (1 - ramp[:, None]) + end * ramp[:, None]
    return np.round(255 * (background * (1 - coverage) + shape * coverage)).astype(np.uint8)


def _signed_distance(x: np.ndarray, y: np.ndarray, kind: str) -> np.ndarray:
    """Signed distance to a shape of radius 1, negative inside; y points down."""
    if kind == "circle":
        return np.hypot(x, y) - 0.9
    count, inner_radius = {"square": (4, 1.0), "triangle": (3, 1.0), "star": (10, 0.45)}[kind]
    angle = (-np.pi / 4 if kind == "square" else -np.pi / 2) + 2 * np.pi * np.arange(count) / count
    radius = np.where(np.arange(count) % 2 == 0, 1.0, inner_radius)
    corners = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    squared = np.inf
    is_inside = False
    for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        edge_x, edge_y = (end - start).astype(np.float32)
        to_x = x - start[0].astype(np.float32)
        to_y = y - start[1].astype(np.float32)
        along = np.clip((to_x * edge_x + to_y * edge_y) / (edge_x**2 + edge_y**2), 0, 1)
        nearest = (to_x - along * edge_x) ** 2 + (to_y - along * edge_y) ** 2
        squared = np.minimum(squared, nearest)
        is_left = (to_x * edge_y - to_y * edge_x) * np.sign(edge_y) < 0
        is_inside ^= ((y >= start[1]) != (y >= end[1])) & is_left  # even-odd rule, ray to the right
    return np.where(is_inside, -1, 1) * np.sqrt(squared)


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Converts HSV, each (N,), hue in turns, to float32 (N, 3, 1, 1) in [0, 1]."""
    hsv = zip(hue % 1.0, saturation, value, strict=True)
    return np.array([colorsys.hsv_to_rgb(*color) for color in hsv], np.float32)[:, :, None, None]
