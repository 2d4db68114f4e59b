"""engine/input_images.py: images and masks that a user hands over."""

import io
from pathlib import Path

from PIL import Image

from engine import input_images


def test_input_image_is_converted_with_a_notice_of_what_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for mode, size, change in (
        ("LA", (30, 20), "cropped and resized"),
        ("RGB", (32, 32), "resized"),
        ("RGB", (16, 18), "cropped"),
        ("L", (16, 16), "converted"),
        ("RGB", (16, 16), None),
    ):
        Image.new(mode, size).save("a.png")
        input_images.read_image(Path("a.png"), 16, 3)
        notice = f"a.png: {size[0]}x{size[1]} {mode}, {change} to 16x16 RGB\n"
        assert capsys.readouterr().out == (notice if change else "")


def test_input_image_of_16_bits_is_scaled_as_the_run_says(tmp_path, capsys):
    for value_range, notice, expected in (
        ("", "scaled by its own values", 4000 / 4095), ("0,8000", "scaled from 0,8000", 0.5),
    ):  # fmt: skip
        Image.new("I;16", (8, 8), 4000).save(tmp_path / "a.png")
        image = input_images.read_image(tmp_path / "a.png", 8, 1, value_range)
        assert abs(image.mean().item() - expected) < 0.005
        assert f"a.png: 8x8 I;16, {notice} to 8x8 L\n" in capsys.readouterr().out


def test_mask_is_read_by_its_brightest_channel_on_black():
    for mode, color, is_masked in (
        ("L", 128, True), ("L", 127, False), ("1", 1, True), ("I;16", 65535, True),
        ("RGB", (255, 0, 0), True), ("RGB", (0, 255, 0), True), ("RGB", (0, 0, 255), True),
        ("RGB", (90, 90, 90), False), ("RGBA", (255, 255, 255, 255), True),
        ("RGBA", (255, 255, 255, 0), False), ("LA", (255, 100), False),
    ):  # fmt: skip
        file = io.BytesIO()
        mask = Image.new(mode, (8, 8))
        mask.paste(color, (0, 0, 4, 8))
        mask.save(file, "png")
        read = input_images.read_mask(file, io.BytesIO(file.getvalue()), 8)
        assert read[:, :3].eq(is_masked).all() and not read[:, 5:].any(), (mode, color)


def test_input_image_is_rotated_by_its_exif_data(tmp_path):
    image, exif = Image.new("RGB", (20, 20), "black"), Image.Exif()
    image.paste("white", (0, 0, 20, 10))
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to show it
    image.save(tmp_path / "photo.png", exif=exif)
    image = input_images.read_image(tmp_path / "photo.png", 20, 3)
    assert image[:, :, 15].min() == 1 and image[:, :, 5].max() == 0
