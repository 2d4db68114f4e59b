"""The built-in `shapes` images: one circle, square, triangle or star each, on a two-colour gradient.

They need no network and no file, at any size. Image i is a function of (seed, i) alone, so any part of the
set can be drawn anywhere and the whole never has to be.
"""

import colorsys

import numpy as np

KINDS = ("circle", "square", "triangle", "star")
NUMBERS = 9  # random numbers that an image takes
CHUNK = 1024  # images drawn at a time: bounds memory to some 100 MB at 64 px


def uniform(seed: int, index: np.ndarray, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) for each image, a hash of (seed, index, column): SplitMix64 (Steele et al., 2014).

    Returns float64 of shape (len(index), count).
    """
    mask = (1 << 64) - 1
    column = np.arange(count, dtype=np.uint64)
    z = index.astype(np.uint64)[:, None] * np.uint64(count) + column
    z = z + np.uint64((seed * 0xD1342543DE82EF95 + 1) & mask)
    z = z * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) / 2.0**53


def corners(kind: str) -> np.ndarray:
    """Corners of a polygon with circumscribed radius 1, counter-clockwise, (n, 2); y points down."""
    n, inner = {"square": (4, 1.0), "triangle": (3, 1.0), "star": (10, 0.45)}[kind]
    turn = -np.pi / 4 if kind == "square" else -np.pi / 2
    angle = turn + 2 * np.pi * np.arange(n) / n
    radius = np.where(np.arange(n) % 2 == 0, 1.0, inner)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def signed_distance(x: np.ndarray, y: np.ndarray, polygon: np.ndarray) -> np.ndarray:
    """Distance of each point to the polygon's outline, negative inside; x, y of any equal shape."""
    nearest = np.full(x.shape, np.inf, x.dtype)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        ex, ey = x.dtype.type(bx - ax), x.dtype.type(by - ay)
        px, py = x - x.dtype.type(ax), y - y.dtype.type(ay)
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (px - along * ex) ** 2 + (py - along * ey) ** 2)
        # even-odd rule: a ray to the right crosses this edge
        left_of_edge = (px * ey - py * ex) * np.sign(ey) < 0
        inside ^= ((y >= ay) != (y >= by)) & left_of_edge
    return np.where(inside, -1, 1) * np.sqrt(nearest)


def draw_shapes(index: np.ndarray, size: int, seed: int = 0) -> np.ndarray:
    """Draws the images with the given numbers.

    index: int (N,), not negative. Returns uint8 (N, 3, size, size).
    """
    index = np.asarray(index)
    return np.concatenate([_draw(index[i : i + CHUNK], size, seed) for i in range(0, len(index), CHUNK)])


def kind_of(index: np.ndarray, seed: int = 0) -> np.ndarray:
    """Which of `KINDS` each image shows: int (N,)."""
    return (uniform(seed, np.asarray(index), NUMBERS)[:, 0] * len(KINDS)).astype(int)


def _draw(index: np.ndarray, size: int, seed: int) -> np.ndarray:
    u = uniform(seed, index, NUMBERS)
    kind = kind_of(index, seed)
    radius = 0.32 + 0.13 * u[:, 1]
    reach = np.maximum(0.5 - radius, 0)  # the circumscribed circle stays inside the picture
    centre = 0.5 + (2 * u[:, 2:4] - 1) * reach[:, None]

    # pixel centres in each shape's own coordinates, where its radius is 1
    pixel = ((np.arange(size) + 0.5) / size).astype(np.float32)
    dx = (pixel[None, None, :] - centre[:, 0, None, None]).astype(np.float32)
    dy = (pixel[None, :, None] - centre[:, 1, None, None]).astype(np.float32)
    r = radius[:, None, None].astype(np.float32)
    x, y = np.broadcast_arrays(dx / r, dy / r)

    distance = np.empty(x.shape, np.float32)
    for k, name in enumerate(KINDS):
        of = kind == k
        distance[of] = (
            np.hypot(x[of], y[of]) - 0.9 if name == "circle" else signed_distance(x[of], y[of], corners(name))
        )
    cover = np.clip(0.5 - distance * r * size, 0, 1)[:, None]  # antialiased over one pixel

    # a light shape on a dark ground or the reverse, of another hue, so that the outline is always there
    light = u[:, 4] < 0.5
    shape = _rgb(u[:, 5] + 0.35 + 0.3 * u[:, 6], np.where(light, 0.75, 0.95), np.where(light, 1.0, 0.55))
    near = _rgb(u[:, 5], np.where(light, 0.6, 0.25), np.where(light, 0.30, 1.0))
    far = _rgb(u[:, 5] + 0.25 * (u[:, 7] - 0.5), np.where(light, 0.6, 0.25), np.where(light, 0.55, 0.8))
    slope = (2 * np.pi * u[:, 8])[:, None, None].astype(np.float32)
    ramp = 0.5 + (np.cos(slope) * (pixel[None, None, :] - 0.5) + np.sin(slope) * (pixel[None, :, None] - 0.5)) / 1.42
    ramp = ramp[:, None]
    ground = near * (1 - ramp) + far * ramp
    return np.round(255 * (ground * (1 - cover) + shape * cover)).astype(np.uint8)


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """HSV to RGB, each (N,), hue in turns; returns float32 (N, 3, 1, 1) in [0, 1]."""
    rgb = [colorsys.hsv_to_rgb(h % 1.0, s, v) for h, s, v in zip(hue, saturation, value, strict=True)]
    return np.array(rgb, np.float32)[:, :, None, None]
