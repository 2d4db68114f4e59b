"""engine/pixels.py: channels, ranges of values, frames, squares."""

import warnings

import numpy as np
import pytest
from PIL import Image

from engine import pixels
from engine.errors import UserError


def read(path, size: int, channels: int, *arguments) -> np.ndarray:
    with Image.open(path) as image:
        return pixels.read_pixels(image, size, channels, *arguments)


# Channels.


def flat(mode: str, color) -> Image.Image:
    return Image.new(mode, (4, 4), color)


def palette() -> Image.Image:
    image = flat("P", 1)
    image.putpalette([255, 0, 0, 10, 20, 30])
    return image


@pytest.mark.parametrize(
    ("image", "suffix", "options", "expected"),
    [
        (flat("1", 1), ".png", {}, (255, 255, 255)),
        (flat("L", 77), ".png", {}, (77, 77, 77)),
        (flat("L", 77), ".png", {"transparency": 77}, (255, 255, 255)),
        (flat("LA", (0, 100)), ".png", {}, (155, 155, 155)),
        (palette(), ".png", {}, (10, 20, 30)),
        (palette(), ".png", {"transparency": 1}, (255, 255, 255)),
        (palette(), ".png", {"transparency": bytes([255, 51])}, (206, 208, 210)),
        (flat("RGBA", (255, 0, 0, 51)), ".png", {}, (255, 204, 204)),
        (flat("RGBA", (9, 9, 9, 0)), ".webp", {"lossless": True}, (255, 255, 255)),
        (flat("RGB", (1, 2, 3)), ".png", {"transparency": (1, 2, 3)}, (255, 255, 255)),
        (flat("CMYK", (0, 255, 255, 0)), ".tif", {}, (255, 0, 0)),
        (flat("I;16", 128 * 257), ".png", {}, (128, 128, 128)),
        (flat("I;16", 128 * 257), ".png", {"transparency": 128 * 257}, (255, 255, 255)),
        (flat("I", 128 * 257), ".tif", {}, (128, 128, 128)),
    ],
)  # fmt: skip
def test_convert_puts_every_mode_on_white_or_keeps_its_transparency(
    tmp_path, image, suffix, options, expected
):
    image.save(path := tmp_path / f"image{suffix}", **options)
    color = read(path, 4, 3)[0].reshape(3, -1)
    assert (color == color[:, :1]).all()
    np.testing.assert_allclose(color[:, 0], expected, atol=1)

    gray = read(path, 4, 1)
    luma = np.dot(color[:, 0], [0.299, 0.587, 0.114])
    assert gray.shape == (1, 1, 4, 4) and abs(gray[0, 0, 0, 0] - luma) <= 1

    *color, alpha = read(path, 4, 4)[0, :, 0, 0].astype(float)
    on_white = np.array(color) * alpha / 255 + 255 - alpha
    np.testing.assert_allclose(on_white, expected, atol=2)
    is_opaque = image.mode not in ("LA", "RGBA") and "transparency" not in options
    assert (alpha == 255) == is_opaque


def test_resizing_mixes_no_color_of_transparent_pixels():
    image = Image.new("RGBA", (8, 8), (0, 255, 0, 0))
    image.paste((200, 0, 0, 255), (0, 0, 3, 8))
    red, green, blue, alpha = pixels.center_square(image, 4)
    assert green.max() == blue.max() == 0 and red[alpha > 50].min() >= 199
    assert 50 < alpha[0, 1] < 200  # the edge


# Ranges of values.


@pytest.mark.parametrize(
    ("lowest", "highest", "expected"),
    [
        (40, 200, (0, 255)),
        (0, 1, (0, 1)),
        (0.1, 0.7, (0, 1)),
        (512, 3600, (0, 4095)),
        (0, 4096, (0, 8191)),
        (0, 65535, (0, 65535)),
        (-1000, 63, (-1000, 63)),
        (-1, 1, (-1, 1)),
        (30000, 34000, (30000, 34000)),
        (32896, 32896, (0, 65535)),
        (0, 0, (0, 1)),
        (-5, -5, (-5, -4)),
    ],
)
def test_find_range_never_makes_data_black(lowest, highest, expected):
    assert pixels.find_range(lowest, highest) == expected


@pytest.mark.parametrize(
    ("lowest", "highest", "expected"),
    [
        (0.1, 0.7, (0, 1)),
        (0, 1.02, (0, 1)),
        (0, 2, (0, 2)),
        (0, 100, (0, 100)),
        (0, 200, (0, 255)),
        (0, 256, (0, 255)),
        (10, 4100, (0, 4100)),
        (4000, 4100, (4000, 4100)),
        (-0.5, 1.02, (-0.5, 1.02)),
        (0, 0, (0, 1)),
    ],
)
def test_find_range_of_floats_never_makes_data_dark(lowest, highest, expected):
    assert pixels.find_range(lowest, highest, is_float=True) == expected


def test_deep_images_are_scaled_from_their_range(tmp_path):
    values = np.array([[-1000, -500], [0, 1000]])
    for dtype in (np.int32, np.float32):
        Image.fromarray(values.astype(dtype)).save(path := tmp_path / "a.tif")
        assert read(path, 2, 1, (-1000.0, 0.0)).ravel().tolist() == [0, 128, 255, 255]
        assert read(path, 2, 1).ravel().tolist() == [0, 64, 128, 255]  # its own range
    Image.fromarray(np.array([[0, 65535]], np.uint16)).save(path)
    assert read(path, 1, 1).shape == (1, 1, 1, 1)  # uint16 does not overflow
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(path)
    with pytest.raises(ValueError, match="not finite"):
        read(path, 2, 1, (0.0, 1.0))


def test_parse_range_refuses_what_does_not_increase():
    assert pixels.parse_range("") is None
    assert pixels.parse_range("-1000, 400.5") == (-1000, 400.5)
    for text in ("12", "a,b", "1,2,3", "5,5", "9,1", "0,inf", "nan,1"):
        with pytest.raises(UserError, match="must be two increasing numbers"):
            pixels.parse_range(text)


# Frames and large images.


@pytest.mark.parametrize("suffix", [".gif", ".png", ".tif"])
def test_read_pixels_reads_the_first_or_all_frames(tmp_path, suffix):
    frames = [Image.new("L", (4, 4), value) for value in (0, 100, 200)]
    frames[0].save(path := tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
    assert read(path, 2, 1)[:, 0, 0, 0].tolist() == [0]
    assert read(path, 2, 3, None, True)[:, 2, 1, 1].tolist() == [0, 100, 200]


def test_images_above_pillows_limit_are_read(tmp_path):
    Image.new("1", (14_000, 14_000), 1).save(path := tmp_path / "slide.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(path, 8, 1).min() == 255


# Squares.


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (4, 4), "blue")
    image.paste("red", (0, 0, 4, 2))  # the upper half, on the right once turned clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    red, _, blue = read(tmp_path / "turned.png", 4, 3)[0]
    assert (red == [0, 0, 255, 255]).all() and (blue == [255, 255, 0, 0]).all()


def test_center_square_crops_and_antialiases(tmp_path):
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, :32] = (255, 0, 0)  # cropped
    pixels[:, 96:] = (0, 0, 255)
    pixels[::2, 32:96] = 255  # one-pixel stripes: gray once resized
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = read(tmp_path / "wide.png", 8, 3)[0].astype(int)
    assert image.shape == (3, 8, 8)
    # What is cropped has a little weight at the edge.
    np.testing.assert_allclose(image, 127.5, atol=20)


@pytest.mark.parametrize("is_tall", [False, True])
def test_center_square_is_the_middle_of_wide_and_tall_images(is_tall):
    colors = np.zeros((40, 80, 3), np.uint8)
    colors[:, :20] = (255, 0, 0)
    colors[:, 20:60] = (0, 255, 0)
    colors[:, 60:] = (0, 0, 255)
    image = Image.fromarray(colors.transpose(1, 0, 2) if is_tall else colors)
    red, green, blue = pixels.center_square(image, 40)
    assert (green > 250).all() and (red < 5).all() and (blue < 5).all()


def test_large_jpeg_keeps_its_detail(tmp_path):
    phase = 2 * np.pi * (np.arange(512) + 0.5) / 16  # 4 pixels a period once resized
    wave = (127.5 + 100 * np.sin(phase)).astype(np.uint8)
    image = Image.fromarray(np.tile(wave, (512, 1)))
    image.save(tmp_path / "wave.jpg", quality=100)
    expected = np.asarray(image.resize((128, 128), Image.Resampling.BICUBIC))
    difference = read(tmp_path / "wave.jpg", 128, 1)[0, 0].astype(float) - expected
    assert np.abs(difference).mean() < 1.5
