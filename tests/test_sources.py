"""Every source gives the right pixels in the right order; what is missing or broken is said in one line."""

import io
import os
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.utils import calculate_md5

from engine import locks, sources
from engine.errors import UserError
from engine.shapes import KINDS, NUMBERS, draw_shapes, kind_of, uniform
from engine.sources import collect, load_images, resolve_auto


@pytest.fixture
def load(tmp_path):
    """load_images on tmp_path/data, which a test fills, with its cache in tmp_path/cache."""
    (tmp_path / "data").mkdir()

    def load(dataset="folder", size=4, folder="data"):
        return load_images(dataset, size, tmp_path / folder, tmp_path / "cache", workers=3, progress=False)

    load.data, load.cache = tmp_path / "data", tmp_path / "cache"
    return load


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(sources, "download_url", refuse)
    monkeypatch.setattr(sources, "download_file_from_google_drive", refuse)


def random_images(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, size, size), np.uint8)


def save_grey(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(path)


def cifar10_files(images: np.ndarray) -> dict[str, bytes]:
    """The five files, each image a label byte and then its planes of rows."""
    labels = np.full((len(images), 1), 7, np.uint8)
    records = np.concatenate([labels, images.reshape(len(images), -1)], axis=1).reshape(5, -1)
    return {name: part.tobytes() for name, part in zip(sources.CIFAR10_BINS, records, strict=True)}


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def cifar10(monkeypatch):
    """Ten images in place of the 50,000."""
    monkeypatch.setattr(sources, "CIFAR10_BINS", dict.fromkeys(sources.CIFAR10_BINS, 2))
    return random_images(10, 32)


# --- the named datasets


def test_cifar10_is_read_from_its_binary_records(load, cifar10):
    write_files(load.data, cifar10_files(cifar10))
    np.testing.assert_array_equal(load("cifar10", 32), cifar10)


def test_cifar10_download_leaves_only_the_unpacked_files(load, cifar10, monkeypatch, tmp_path):
    write_tar(tmp_path / "remote.tar.gz", cifar10_files(cifar10))

    def download(url, folder, name, md5):
        Path(folder, name).write_bytes((tmp_path / "remote.tar.gz").read_bytes())

    monkeypatch.setattr(sources, "download_url", download)
    np.testing.assert_array_equal(load("cifar10", 32), cifar10)
    assert [path.name for path in load.data.iterdir()] == ["cifar-10-batches-bin"]


def test_cifar10_truncated_file_is_named(load, cifar10):
    files = cifar10_files(cifar10)
    files["cifar-10-batches-bin/data_batch_3.bin"] = files["cifar-10-batches-bin/data_batch_3.bin"][:3073]
    write_files(load.data, files)
    with pytest.raises(UserError, match=r"data_batch_3\.bin is damaged or incomplete"):
        load("cifar10", 32)


def test_stl10_planes_are_stored_by_columns(load, monkeypatch):
    monkeypatch.setattr(sources, "STL10_BINS", {"stl10_binary/train_X.bin": 2, "stl10_binary/unlabeled_X.bin": 3})
    images = random_images(5, 96)
    by_columns = np.ascontiguousarray(images.transpose(0, 1, 3, 2))
    train, unlabeled = by_columns[:2].tobytes(), by_columns[2:].tobytes()
    write_files(load.data, {"stl10_binary/train_X.bin": train, "stl10_binary/unlabeled_X.bin": unlabeled})
    np.testing.assert_array_equal(load("stl10", 96), images)


def test_stl10_archive_put_there_by_hand(load, monkeypatch):
    monkeypatch.setattr(sources, "STL10_BINS", {"stl10_binary/train_X.bin": 2, "stl10_binary/unlabeled_X.bin": 3})
    images = random_images(5, 96)
    by_columns = np.ascontiguousarray(images.transpose(0, 1, 3, 2))
    train, unlabeled = by_columns[:2].tobytes(), by_columns[2:].tobytes()
    others = {f"stl10_binary/{name}": b"1" for name in ("test_X.bin", "train_y.bin", "class_names.txt")}
    path = load.data / "stl10_binary.tar.gz"
    write_tar(path, {**others, "stl10_binary/train_X.bin": train, "stl10_binary/unlabeled_X.bin": unlabeled})
    with pytest.raises(UserError, match=r"stl10_binary\.tar\.gz is damaged or incomplete"):
        load("stl10", 96)
    monkeypatch.setattr(sources, "STL10_ARCHIVE", replace(sources.STL10_ARCHIVE, md5=calculate_md5(path)))
    np.testing.assert_array_equal(load("stl10", 96), images)
    assert {path.name for path in (load.data / "stl10_binary").iterdir()} == {"train_X.bin", "unlabeled_X.bin"}


def test_celeba_zip_put_there_by_hand(load, monkeypatch):
    path = load.data / "celeba" / "img_align_celeba.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for i, colour in enumerate(("red", "lime", "blue")):
            jpeg = io.BytesIO()
            Image.new("RGB", (178, 218), colour).save(jpeg, "JPEG", quality=100)
            archive.writestr(f"img_align_celeba/{i:06d}.jpg", jpeg.getvalue())

    with pytest.raises(UserError, match=r"img_align_celeba\.zip is damaged or incomplete"):
        load("celeba", 64)
    monkeypatch.setattr(sources, "CELEBA_ARCHIVE", replace(sources.CELEBA_ARCHIVE, md5=calculate_md5(path)))
    expected = np.broadcast_to(255 * np.eye(3)[:, :, None, None], (3, 3, 64, 64))
    np.testing.assert_allclose(load("celeba", 64), expected, atol=3)  # JPEG


@pytest.mark.parametrize(
    "dataset, name",
    [("cifar10", "cifar-10-binary.tar.gz"), ("stl10", "stl10_binary.tar.gz"), ("celeba", "img_align_celeba.zip")],
)
def test_missing_dataset_without_network_says_which_file_goes_where(load, no_network, dataset, name):
    with pytest.raises(UserError) as caught:
        load(dataset, 32)
    message = str(caught.value)
    assert "no route to host" in message and "\n" not in message
    where = load.data / "celeba" if dataset == "celeba" else load.data
    assert message.endswith(f"save it as {where / name}")
    assert not [path for path in load.data.rglob("*") if path.is_file()]


def test_auto(load, cifar10, no_network, monkeypatch):
    lines = []
    assert resolve_auto(load.data, True, lines.append) == "shapes"
    assert "cifar-10-binary.tar.gz" in lines.pop() and not lines

    write_files(load.data, cifar10_files(cifar10))
    assert resolve_auto(load.data, True, lines.append) == "cifar10" and not lines
    assert resolve_auto(load.data, False, lines.append) == "shapes"
    assert "no GPU" in lines[0] and "--dataset cifar10" in lines.pop() and not lines

    monkeypatch.setattr(sources, "download_url", lambda *args: pytest.fail("tried the network without a GPU"))
    assert resolve_auto(load.data / "elsewhere", False, lines.append) == "shapes"


# --- pixels


def flat(mode: str, colour) -> Image.Image:
    return Image.new(mode, (4, 4), colour)


def palette() -> Image.Image:
    image = flat("P", 1)
    image.putpalette([255, 0, 0, 10, 20, 30])
    return image


@pytest.mark.parametrize(
    "image, suffix, options, expected",
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
        (flat("RGB", "red"), ".gif", {"save_all": True, "append_images": [flat("RGB", "blue")]}, (255, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb_over_white(load, image, suffix, options, expected):
    image.save(load.data / f"image{suffix}", **options)
    pixels = load()[0].reshape(3, -1)
    assert (pixels == pixels[:, :1]).all()
    np.testing.assert_allclose(pixels[:, 0], expected, atol=1)


def test_exif_orientation_is_honoured(load):
    image = Image.new("RGB", (4, 4), "blue")
    image.paste("red", (0, 0, 4, 2))  # the upper half, on the right once turned clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(load.data / "turned.png", exif=exif)
    red, _, blue = load()[0]
    assert (red == [0, 0, 255, 255]).all() and (blue == [255, 255, 0, 0]).all()


def test_centre_crop_and_antialiasing(load):
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, :32], pixels[:, 96:] = (255, 0, 0), (0, 0, 255)  # cut off
    pixels[::2, 32:96] = 255  # one-pixel stripes: grey once resized
    Image.fromarray(pixels).save(load.data / "wide.png")
    image = load(size=8)[0].astype(int)
    assert image.shape == (3, 8, 8)
    np.testing.assert_allclose(image, 127.5, atol=20)  # what is cut off weighs a little at the edge


def test_large_jpeg_keeps_its_detail(load):
    wave = 127.5 + 100 * np.sin(2 * np.pi * (np.arange(512) + 0.5) / 16)  # 4 pixels a period once resized
    picture = Image.fromarray(np.tile(wave.astype(np.uint8), (512, 1)))
    picture.save(load.data / "wave.jpg", quality=100)
    expected = np.asarray(picture.resize((128, 128), Image.Resampling.BICUBIC))
    difference = load(size=128)[0, 0].astype(float) - expected
    assert np.abs(difference).mean() < 1.5  # levels


# --- folders


def test_folder_order_hidden_files_and_suffixes(load):
    for value, name in enumerate(["B.PNG", "a.png", "c/deep/x.bmp"]):
        save_grey(load.data / name, value)
    save_grey(load.data / ".hidden.png", 99)
    save_grey(load.data / ".thumbnails" / "x.png", 99)
    (load.data / "notes.txt").write_text("not an image")
    assert load()[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_few_unreadable_files_are_listed_and_left_out(load, monkeypatch, capsys):
    monkeypatch.setattr(sources, "BLOCK", 4)
    for i in range(30):
        save_grey(load.data / f"{i:02d}.png", i)
    (load.data / "10.png").write_bytes(b"no image")
    expected = [i for i in range(30) if i != 10]
    assert load()[:, 0, 0, 0].tolist() == expected
    listed = capsys.readouterr().err.splitlines()
    assert len(listed) == 2 and "10.png: cannot identify image" in listed[1]
    assert load()[:, 0, 0, 0].tolist() == expected  # from the cache


def test_many_unreadable_files_stop(load):
    for i in range(10):
        save_grey(load.data / f"{i}.png", i)
    whole = (load.data / "3.png").read_bytes()
    (load.data / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"too many of the 10 images .*3\.png"):
        load()
    assert not list(load.cache.iterdir())


def test_folder_without_images(load):
    with pytest.raises(UserError, match="no images in"):
        load()
    with pytest.raises(UserError, match="no such folder"):
        load(folder="nowhere")
    (load.data / "file.png").touch()
    with pytest.raises(UserError, match="a file, not a folder"):
        load(folder="data/file.png")


# --- pixels that the images do not have


def test_more_pixels_than_there_are_is_refused(load, cifar10, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SHAPES_COUNT", 10)

    def refused(dataset: str, size: int, folder: str = "data") -> str:
        with pytest.raises(UserError) as caught:
            load_images(dataset, size, tmp_path / folder, load.cache, progress=False, upsampling=False)
        return str(caught.value)

    write_files(load.data, cifar10_files(cifar10))
    assert "64 px are asked for, but the images in" in refused("cifar10", 64)
    assert "have 32 (fewer than 64: 1 of 1 looked at): ask for 32 at most" in refused("cifar10", 64)
    for i in range(5):  # the smaller side counts
        small = (tmp_path / "mixed" / f"{i}.png", (90, 40)), (tmp_path / "mixed" / f"{i}b.png", (70, 64))
        for path, size in small[: 1 if i == 4 else 2]:
            path.parent.mkdir(exist_ok=True)
            Image.new("L", size).save(path)
    assert "(fewer than 64: 5 of 9 looked at)" in refused("folder", 64, "mixed")
    Image.new("L", (64, 64)).save(tmp_path / "mixed" / "more.png")  # half of them have enough
    loaded = load_images("folder", 64, tmp_path / "mixed", load.cache, progress=False, upsampling=False)
    assert len(loaded) == 10
    assert len(load_images("shapes", 64, load.data, load.cache, progress=False, upsampling=False)) == 10
    assert len(load("cifar10", 64)) == 10


# --- the cache


def test_cache_is_used_until_the_source_changes(load, tmp_path):
    save_grey(load.data / "a.png", 1)
    save_grey(tmp_path / "other" / "a.png", 9)
    load(size=8), load(folder="other")
    kept = set(load.cache.iterdir())

    load()
    (first,) = set(load.cache.iterdir()) - kept
    written = first.stat()
    assert load()[:, 0, 0, 0].tolist() == [1]
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == (written.st_mtime_ns, written.st_ino)

    save_grey(load.data / "b.png", 2)
    assert load()[:, 0, 0, 0].tolist() == [1, 2]
    (second,) = set(load.cache.iterdir()) - kept
    assert second != first
    assert kept < set(load.cache.iterdir())  # another size and another folder keep theirs

    save_grey(load.data / "b.png", 3)  # of the same size
    os.utime(load.data / "b.png", (0, 0))  # some file systems keep time too coarsely for a test this fast
    assert load()[:, 0, 0, 0].tolist() == [1, 3]


def test_interrupted_goes_on_behind_the_last_finished_block(load, monkeypatch):
    drawn = []

    def draw(index, size, seed):
        assert not list(load.cache.glob("*.npy"))
        if 500 in index and interrupted:
            raise KeyboardInterrupt
        drawn.append(index[0])
        return draw_shapes(index, size, seed)

    monkeypatch.setattr(sources, "draw_shapes", draw)
    monkeypatch.setattr(sources, "SHAPES_COUNT", 1000)
    interrupted = True
    with pytest.raises(KeyboardInterrupt):
        load("shapes", 8)
    (journal,) = load.cache.glob("*.journal")
    finished = len(journal.read_text().splitlines()) - 1
    assert finished == 7  # blocks of 64 before that of image 500
    (partial,) = load.cache.glob("*.part")
    with partial.open("r+b") as file:  # as a crash of the machine leaves it: noted, but not all of it written
        file.seek(-50, os.SEEK_END)
        file.write(bytes(50))
    with journal.open("a") as file:
        file.write('{"images": 64, "c')
    interrupted = False
    drawn.clear()
    np.testing.assert_array_equal(load("shapes", 8), draw_shapes(np.arange(1000), 8, seed=0))
    assert sorted(drawn) == list(range(64 * 6, 1000, 64))
    assert [path.suffix for path in load.cache.iterdir()] == [".npy"]


def test_a_second_process_waits_for_the_first(load, monkeypatch):
    drawn, started = [], threading.Event()

    def draw(index, size, seed):
        drawn.append(index[0])
        started.set()
        time.sleep(0.05)
        return draw_shapes(index, size, seed)

    monkeypatch.setattr(sources, "draw_shapes", draw)
    monkeypatch.setattr(sources, "SHAPES_COUNT", 300)
    with ThreadPoolExecutor(2) as pool:  # locks are between open files, so that threads will do
        first = pool.submit(load, "shapes", 8)
        started.wait()
        second = pool.submit(load, "shapes", 8)
    np.testing.assert_array_equal(first.result(), second.result())
    assert len(drawn) == 5 and [path.suffix for path in load.cache.iterdir()] == [".npy"]


def test_without_locks_each_process_builds_for_itself(load, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(sources, "SHAPES_COUNT", 100)
    np.testing.assert_array_equal(load("shapes", 8), draw_shapes(np.arange(100), 8, seed=0))
    assert [path.suffix for path in load.cache.iterdir()] == [".npy"]


# --- collect


def test_collect():
    images = torch.from_numpy(random_images(5, 8))
    labels = torch.zeros(3)
    batches = [(images[:3].float() / 255, labels), images[3:4].double() / 255, [images[4:].numpy()]]
    collected = collect(batches)
    assert collected.dtype == np.uint8
    np.testing.assert_array_equal(collected, images.numpy())
    assert collect([torch.full((1, 3, 8, 8), 0.999)]).min() == 255  # rounded, not cut off


@pytest.mark.parametrize(
    "batches, message",
    [
        ([], "no images"),
        ([{"image": torch.zeros(2, 3, 8, 8)}], "dict"),
        ([torch.zeros(3, 8, 8)], r"\(B, C, H, W\)"),
        ([torch.zeros(2, 8, 8, 3)], r"\(B, C, H, W\)"),
        ([torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 9, 9)], "one shape"),
        ([torch.zeros(2, 3, 8, 8, dtype=torch.int64)], "int64"),
        ([torch.full((2, 3, 8, 8), -1.0)], "from -1 to -1"),
        ([torch.full((2, 3, 8, 8), float("nan"))], "nan"),
    ],
)
def test_collect_names_what_is_wrong(batches, message):
    with pytest.raises(UserError, match=message):
        collect(batches)


# --- shapes


def test_shapes_dataset_is_the_first_images(load, monkeypatch):
    monkeypatch.setattr(sources, "SHAPES_COUNT", 100)
    np.testing.assert_array_equal(load("shapes", 16), draw_shapes(np.arange(100), 16, seed=0))


def test_a_shape_depends_on_its_number_and_seed_alone():
    image = draw_shapes(np.array([7]), 16)
    np.testing.assert_array_equal(draw_shapes(np.array([3, 5000, 7]), 16)[2:], image)
    assert (draw_shapes(np.array([7]), 16, seed=1) != image).any()


def test_kinds_of_shapes_are_equally_frequent():
    share = np.bincount(kind_of(np.arange(10_000)), minlength=4) / 10_000
    np.testing.assert_allclose(share, 0.25, atol=0.015)  # 3.5 standard deviations


@pytest.mark.parametrize(
    "kind, unit_area",
    [
        ("circle", np.pi * 0.9**2),
        ("square", 2),
        ("triangle", 3 * 3**0.5 / 4),
        ("star", 10 * 0.45 * np.sin(np.pi / 5) / 2),
    ],
)
def test_antialiased_area(kind, unit_area):
    """The summed coverage of a shape is the area of its outline, to a fraction of a pixel."""
    size = 32
    index = np.flatnonzero(kind_of(np.arange(200)) == KINDS.index(kind))
    u = uniform(0, index, NUMBERS)
    radius = 0.32 + 0.13 * u[:, 1]
    centre = 0.5 + (2 * u[:, 2:4] - 1) * (0.5 - radius)[:, None]
    pixel = (np.arange(size) + 0.5) / size
    x, y = (axis.ravel() for axis in np.meshgrid(pixel, pixel))
    plane = np.stack([np.ones_like(x), x, y], axis=1)
    for image, r, (cx, cy) in zip(draw_shapes(index, size).astype(float), radius, centre, strict=True):
        colours = image.reshape(3, -1).T
        distance = np.hypot(x - cx, y - cy)
        # the ground is linear in x and y, so its pixels outside the shape tell what it is behind it
        outside = distance > r + 1 / size
        ground = plane @ np.linalg.lstsq(plane[outside], colours[outside], rcond=None)[0]
        contrast = colours[distance.argmin()] - ground
        cover = ((colours - ground) * contrast).sum(1) / (contrast**2).sum(1)
        area = cover.mean()
        assert area == pytest.approx(unit_area * r**2, rel=0.01)
