"""engine/image_source.py: folders, archives and arrays as training reads them."""

import io
import os
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine import image_source
from engine.datasets import load_dataset
from engine.errors import FallbackWarning, UserError
from engine.image_source import ReadOptions
from tests.helpers import png, random_images, save_gray


@pytest.fixture
def load(tmp_path):
    """The images of load_dataset on tmp_path/data, which a test fills."""
    (tmp_path / "data").mkdir()

    def load(name="data", size=4, upsampling=True, **options) -> np.ndarray:
        how = {"options": ReadOptions(**options), "upsampling": upsampling}
        folder = tmp_path / name
        return load_dataset("folder", size, folder, load.cache, 3, False, **how).images

    load.data = tmp_path / "data"
    load.cache = tmp_path / "cache"
    return load


def save_deep(path: Path, values: list[int], dtype: type) -> None:
    Image.fromarray(np.full((4, 4), values, dtype)).save(path)


# Folders.


def test_folder_leaves_out_a_few_unreadable_files_with_a_warning(load):
    for i in range(30):
        save_gray(load.data / f"{i:02d}.png", i)
    (load.data / "10.png").write_bytes(b"no image")
    expected = [i for i in range(30) if i != 10]
    with pytest.warns(FallbackWarning, match="1 of 30 images in .*cannot be read") as warned:
        images = load()
    assert images.shape == (29, 1, 4, 4) and images[:, 0, 0, 0].tolist() == expected
    lines = str(warned[0].message).splitlines()
    assert len(lines) == 2 and "10.png: " in lines[1] and "cannot identify image" in lines[1]
    assert load()[:, 0, 0, 0].tolist() == expected  # from the cache


def test_folder_with_many_unreadable_files_is_an_error(load):
    for i in range(10):
        save_gray(load.data / f"{i}.png", i)
    content = (load.data / "3.png").read_bytes()
    (load.data / "3.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"too many of the 10 images .*3\.png"):
        load()
    assert {path.suffix for path in load.cache.iterdir()} <= {".lock"}


def test_folder_without_images_is_an_error(load):
    with pytest.raises(UserError, match="no images in"):
        load()
    with pytest.raises(UserError, match="nowhere is not a folder"):
        load("nowhere")
    (load.data / "file.png").touch()
    with pytest.raises(UserError, match=r"file\.png is not a folder.*\.zip, \.tar, \.npz"):
        load("data/file.png")


@pytest.mark.parametrize("size", [(4, 4), (90, 90)])
def test_folder_notices_a_changed_file(load, size):
    """By its time, or by its size where the file system's clock is too coarse."""
    for value, change in ((1, (4, 4)), (2, size)):
        save_gray(load.data / "a.png", value, change)
        os.utime(load.data / "a.png", (0, value if size == (4, 4) else 0))
        assert load()[:, 0, 0, 0].tolist() == [value]


# What the images have.


@pytest.mark.parametrize(
    ("modes", "channels", "line"),
    [
        (["L", "1", "I;16"], 1, "images read as gray: 3 gray"),
        (["RGB", "P"], 3, "images read as RGB: 2 RGB"),
        (["L", "RGB"], 3, "images read as RGB: 1 RGB, 1 gray"),
        (["RGBA", "LA"], 4, "images read as RGBA: 2 RGBA"),
        (["RGBA", "RGB"], 3, "images read as RGB, transparency on white: 1 RGB, 1 RGBA"),
    ],
)
def test_channels_are_those_of_the_images(load, modes, channels, line, capsys):
    for i, mode in enumerate(modes):
        image = Image.new(mode, (4, 4))
        image.save(load.data / f"{i}.png")
    assert load().shape == (len(modes), channels, 4, 4)
    assert line in capsys.readouterr().out
    for other in (1, 3, 4):
        assert load(channels=other).shape[1] == other
    assert load().shape[1] == channels


def test_cache_of_what_was_chosen_is_that_of_the_choice(load, capsys):
    save_gray(load.data / "a.png", 7)
    load()
    capsys.readouterr()
    assert load(channels=1)[:, 0, 0, 0].tolist() == [7]
    assert not capsys.readouterr().out
    assert load(channels=3).shape[1] == 3
    assert "read as RGB" in capsys.readouterr().out
    caches = list(load.cache.glob("*.npy"))
    assert len(caches) == 3 and len({path.stat().st_ino for path in caches}) == 2

    save_gray(load.data / "a.png", 8, (9, 9))
    assert load()[0, 0, 0, 0] == load(channels=1)[0, 0, 0, 0] == 8
    assert len(list(load.cache.glob("*.npy"))) == 3


def test_opaque_alpha_is_no_transparency(load):
    Image.new("RGBA", (4, 4), (1, 2, 3, 255)).save(load.data / "a.png")
    assert load()[0, :, 0, 0].tolist() == [1, 2, 3]


def test_value_range_is_that_of_the_whole_data_set(load, capsys):
    save_deep(load.data / "a.tif", [0, 1, 2, 3], np.uint16)
    save_deep(load.data / "b.tif", [0, 1365, 2730, 4095], np.uint16)
    assert load()[:, 0, 0].tolist() == [[0, 0, 0, 0], [0, 85, 170, 255]]
    line = (
        "2 images with values 0 to 4095: mapping 0 to black and 4095 to white; change with "
        "--value_range LOW,HIGH"
    )
    assert line in capsys.readouterr().out.splitlines()
    assert load(value_range="0,3")[0, 0, 0].tolist() == [0, 85, 170, 255]
    save_deep(load.data / "c.tif", [-1000, -500, 0, 63], np.int32)
    save_gray(load.data / "d.png", 9)  # of 8 bits
    assert load()[3].max() == 9 and load()[2, 0, 0, 0] == 0
    assert "values -1000 to 4095: mapping -1000 to black" in capsys.readouterr().out


def test_options_that_were_chosen_are_stored_and_read_the_same_cache(load):
    def read_as(name="data", **options) -> ReadOptions:
        how = {"progress": False, "options": ReadOptions(**options)}
        data = load_dataset("folder", 4, load.data.parent / name, load.cache, **how)
        return ReadOptions.from_config(data.read_as)

    save_gray(load.data / "a.png", 7)
    unused = {"value_range": "0,9", "frames": "all"}
    assert read_as(**unused) == read_as(**unused) == read_as() == ReadOptions(1)  # from the cache
    with pytest.raises(UserError, match="must be two increasing numbers"):
        read_as(value_range="9,0")
    save_deep(load.data / "b.tif", [-0.125, 0, 1, 2], np.float32)
    chosen = ReadOptions(1, "-0.125,2.0")
    assert read_as() == read_as() == chosen
    caches = {path.stat().st_ino for path in load.cache.glob("*.npy")}
    assert read_as(channels=1, value_range="-0.125,2.0") == chosen
    assert {path.stat().st_ino for path in load.cache.glob("*.npy")} == caches
    assert read_as(value_range="0,1") == ReadOptions(1, "0,1")

    for dtype, value_range in ((np.uint8, ""), (np.uint16, "0,255")):
        np.save(load.data.parent / "a.npy", np.full((2, 8, 8), 200, dtype))
        assert read_as("a.npy") == ReadOptions(1, value_range)


def test_floats_slightly_above_1_are_not_darkened(load):
    save_deep(load.data / "a.tif", [0, 0.2, 0.6, 1.02], np.float32)
    assert load()[0, 0, 0].tolist() == [0, 51, 153, 255]


def save_color_of_16_bits(path: Path, value: int, color_type: int = 2) -> None:
    """Writes a PNG that Pillow cannot: 16 bits a channel, RGB, or RGBA with color type 6."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    channels = 3 if color_type == 2 else 4
    rows = b"".join(b"\0" + struct.pack(">H", value) * 4 * channels for _ in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, 16, color_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks))


def test_color_of_16_bits_must_fill_them(load):
    save_color_of_16_bits(load.data / "a.png", 4095)
    with pytest.raises(UserError, match=r"at most 15 of 255 is left .* Convert them to 8 bits"):
        load()
    save_color_of_16_bits(load.data / "b.png", 50_000)
    assert load()[:, 0, 0, 0].tolist() == [15, 195]


def test_color_of_16_bits_may_have_alpha(load, monkeypatch):
    monkeypatch.setattr(image_source, "MAX_SIZES_CHECKED", 1)  # not all are samples
    for name in ("a.png", "b.png"):
        save_color_of_16_bits(load.data / name, 50_000, color_type=6)
    assert load()[:, 3, 0, 0].tolist() == [195, 195]


def test_frames_are_one_image_or_one_each(load, capsys):
    frames = [Image.new("L", (4, 4), value) for value in (1, 2, 3)]
    frames[0].save(load.data / "b.tif", save_all=True, append_images=frames[1:])
    save_gray(load.data / "a.png", 0)
    save_gray(load.data / "c.png", 4)
    assert load()[:, 0, 0, 0].tolist() == [0, 1, 4]
    assert "1 with 3 frames; using the first of each (--frames all" in capsys.readouterr().out
    assert load(frames="all")[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_value_range_is_that_of_all_frames_that_are_read(load):
    frames = [Image.fromarray(np.full((4, 4), value, np.uint16)) for value in (1000, 4095)]
    frames[0].save(load.data / "a.tif", save_all=True, append_images=frames[1:])
    assert load(frames="all")[:, 0, 0, 0].tolist() == [62, 255]


def test_read_options_are_those_of_the_run():
    config = {"CHANNELS": 1, "VALUE_RANGE": "0,4095", "FRAMES": "all", "DIM": 8}
    assert ReadOptions.from_config(config) == ReadOptions(1, "0,4095", "all")
    assert ReadOptions.from_config({}) == ReadOptions(3)  # of an earlier version


def test_labels_follow_the_frames(load):
    frames = [Image.new("L", (4, 4), value) for value in (1, 2)]
    (load.data / "x").mkdir()
    frames[0].save(load.data / "x" / "b.gif", save_all=True, append_images=frames[1:])
    save_gray(load.data / "y" / "c.png", 4)
    options = {"use_labels": True, "options": ReadOptions(frames="all")}
    data = load_dataset("folder", 4, load.data, load.cache, progress=False, **options)
    assert data.labels.tolist() == [0, 0, 1]


def test_crop_of_more_than_a_tenth_is_printed(load, capsys):
    save_gray(load.data / "a.png", 0, (20, 19))
    load()
    assert "crop" not in capsys.readouterr().out
    save_gray(load.data / "b.png", 0, (20, 8))
    load()
    assert "cropping to squares cuts off 32 % of the images' area" in capsys.readouterr().out


def test_sizes_are_checked_all_over_the_folder(load, monkeypatch):
    monkeypatch.setattr(image_source, "MAX_SIZES_CHECKED", 4)
    for i in range(8):
        save_gray(load.data / f"{i}.png", i, (4, 4) if i < 4 else (8, 8))
    assert len(load(size=8, upsampling=False)) == 8  # half of them are large enough
    save_gray(load.data / "5.png", 0)  # not checked
    assert len(load(size=8, upsampling=False)) == 8
    save_gray(load.data / "4.png", 0)
    with pytest.raises(UserError, match="3 of 4 checked"):
        load(size=8, upsampling=False)


# Archives.


def gray_png(value: int) -> bytes:
    return png(np.full((4, 4), value, np.uint8))


ARCHIVED = {
    "b/x.png": gray_png(2), "a.png": gray_png(1), "b/y.PNG": gray_png(3), "__MACOSX/._a.png": b"ab",
    ".hidden/z.png": gray_png(9), "readme.txt": b"text",
}  # fmt: skip


def write_archive(path: Path, files: dict[str, bytes] = ARCHIVED) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return
    with tarfile.open(path, {".gz": "w:gz", ".xz": "w:xz"}.get(path.suffix, "w")) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_archive_is_a_folder(load, tmp_path, name):
    write_archive(tmp_path / name)
    assert load(name)[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert {path.name for path in tmp_path.iterdir()} == {name, "data", "cache"}
    write_archive(tmp_path / name, {f"{i:03d}.png": gray_png(i) for i in range(200)})
    assert load(name)[:, 0, 0, 0].tolist() == list(range(200))


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
@pytest.mark.parametrize("prefix", ["./", "top/", "./top/sub/"])
def test_archive_of_class_folders_has_their_classes(load, tmp_path, name, prefix):
    write_archive(tmp_path / name, {f"{prefix}{i}/x.png": gray_png(int(i)) for i in "210"})
    data = load_dataset("folder", 4, tmp_path / name, load.cache, progress=False, use_labels=True)
    assert data.class_names == ("0", "1", "2")
    assert data.labels.tolist() == data.images[:, 0, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tar.xz"])
def test_damaged_archive_is_an_error(load, tmp_path, name):
    images = random_images(9, 32).transpose(0, 2, 3, 1)  # as PNG, they cannot be compressed
    write_archive(tmp_path / name, {f"{i}.png": png(image) for i, image in enumerate(images)})
    assert len(load(name)) == 9
    content = (tmp_path / name).read_bytes()
    cut = len(content) // 2 + 1000  # within an image
    # The directory of a .zip is at its end.
    message = r"cannot be read|a\.zip is damaged, or no archive"
    for damaged in (content[:cut], content[:cut] + bytes(99) + content[cut + 99 :]):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            load(name)


# Arrays.


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_array_of_bytes_is_read_as_it_is(load, tmp_path, channels):
    images = random_images(5, 6, channels)
    np.savez(tmp_path / "a.npz", seeds=np.arange(3), images=images.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(load("a.npz", 6), images)
    assert load("a.npz", 3).shape == (5, channels, 3, 3)
    np.save(tmp_path / "a.npy", images[:, 0])
    np.testing.assert_array_equal(load("a.npy", 6), images[:, :1])
    (tmp_path / "a.npz").rename(tmp_path / "named_otherwise.npy")
    np.testing.assert_array_equal(load("named_otherwise.npy", 6), images)


def test_array_has_labels_and_their_names(load, tmp_path):
    def load_labels(**arrays) -> tuple[list[int], tuple[str, ...]]:
        np.savez(tmp_path / "a.npz", images=np.zeros((4, 4, 4, 1), np.uint8), **arrays)
        data = load_dataset("folder", 4, tmp_path / "a.npz", load.cache, use_labels=True)
        return data.labels.tolist(), data.class_names

    labels = np.array([[7], [3], [-1], [7]], np.int16)
    assert load_labels(labels=labels) == ([1, 0, -1, 1], ("3", "7"))
    named = {"labels": np.array([1, 0, -1, 1]), "class_names": np.array(["cat", "dog", "cow"])}
    assert load_labels(**named) == ([1, 0, -1, 1], ("cat", "dog", "cow"))
    for arrays, message in (
        ({}, "has no labels"),
        (named | {"labels": labels}, "labels of no class in its class_names"),
        (named | {"labels": np.zeros(3, int)}, r"labels int64 \(3,\), but should have 4 integers"),
        ({"labels": np.zeros(4)}, r"labels float64 \(4,\), but should have 4 integers"),
        ({"labels": np.array([None] * 4)}, "is damaged or not an array file"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            load_labels(**arrays)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        (np.array([0, 2048, 4095], np.uint16), [0, 128, 255]),
        ([False, True, True], [0, 255, 255]),
    ],
)
def test_other_arrays_are_scaled_from_their_range(load, tmp_path, values, expected, capsys):
    np.save(tmp_path / "a.npy", np.tile(np.array(values)[:, None, None, None], (1, 4, 4, 3)))
    assert load("a.npy")[:, 0, 0, 0].tolist() == expected
    assert "to white; change with --value_range" in capsys.readouterr().out
    assert load("a.npy", upsampling=False)[:, 0, 0, 0].tolist() == expected
    assert not capsys.readouterr().out  # nor is it read: the cache has it


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4)), r"holds float64 \(4, 4\), but should hold images \(N, H, W\)"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"holds uint8 \(2, 3, 8, 8\)"),
        (np.zeros((0, 8, 8, 3)), r"holds float64 \(0, 8, 8, 3\)"),
        (np.full((2, 8, 8, 3), np.nan), "not finite"),
        (np.full((2, 8, 8, 3), None), "is damaged or not an array file"),
        (np.full((2, 8, 8, 3), "x"), r"holds <U1"),
    ],
)
def test_array_of_something_else_is_an_error(load, tmp_path, array, message):
    np.savez(tmp_path / "a.npz", array)
    with pytest.raises(UserError, match=message):
        load("a.npz")
    (tmp_path / "a.npz").write_bytes(b"PK no zip")
    with pytest.raises(UserError, match=r"a\.npz is damaged or not an array file"):
        load("a.npz")
