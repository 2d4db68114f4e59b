"""engine/image_cache.py: built once, completely; labels follow their images."""

import hashlib
import io
import os
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine import image_cache
from engine.dataloader import ImageDataset
from engine.datasets import load_dataset
from engine.errors import FallbackWarning, UserError
from engine.image_cache import load_cached
from engine.image_source import ReadOptions, Source
from tests.forked_script import ForkedScript
from tests.helpers import random_images


def gray_source(count: int, unreadable: tuple[int, ...] = (), on_read=None, **fields) -> Source:
    """A source whose image i is filled with i; on_read(block) precedes each read."""

    def read(block: range, size: int) -> list[np.ndarray | str]:
        if on_read:
            on_read(block)
        images = [np.full((1, 3, size, size), i, np.uint8) for i in block]
        broken = [f"image {i} is broken" if i in unreadable else None for i in block]
        return [reason or image for reason, image in zip(broken, images, strict=True)]

    return Source(**({"location": "here", "fingerprint": "1"} | fields), count=count, read=read)


def values(data: ImageDataset) -> list[int]:
    return data.images[:, 0, 0, 0].tolist()


@pytest.fixture
def load(tmp_path):
    """load_cached with the cache in tmp_path/cache."""

    def load(source: Source, size: int = 4) -> ImageDataset:
        return load_cached(source, "gray", size, load.cache, workers=3, progress=False)

    load.cache = tmp_path / "cache"
    load.files = lambda: {path.name for path in load.cache.iterdir() if path.suffix != ".lock"}
    return load


# The file.


def test_cache_file_keeps_its_name_and_format(load):
    """Caches of earlier versions are used."""
    data = load(gray_source(200))
    location, fingerprint = (hashlib.sha256(text).hexdigest()[:10] for text in (b"here", b"1"))
    path = load.cache / f"gray_4px_{location}_{fingerprint}.npy"
    assert data.images.filename == path and load.files() == {path.name}
    assert not data.images.flags.writeable and values(data) == list(range(200))
    expected = io.BytesIO()
    np.save(expected, np.array(data.images))
    assert path.read_bytes() == expected.getvalue()


def test_cache_under_the_name_of_what_was_chosen_waits_for_its_builder(load):
    """One process builds what another, which reads any channels, turns out to have built."""
    is_building, may_finish = threading.Event(), threading.Event()

    def wait(block: range) -> None:
        is_building.set()
        may_finish.wait(20)

    with ThreadPoolExecutor(2) as pool:
        named = pool.submit(load, gray_source(3, cache_key=f"\n{ReadOptions(1)}", on_read=wait))
        assert is_building.wait(20)
        any_source = gray_source(3, cache_key="any", chosen=lambda: ReadOptions(1))
        chosen = pool.submit(load, any_source)
        with pytest.raises(TimeoutError):
            chosen.result(timeout=0.5)
        may_finish.set()
        assert values(named.result(20)) == values(chosen.result(20)) == [0, 1, 2]
    assert len([name for name in load.files() if name.endswith(".npy")]) == 2


def test_cache_is_used_until_the_source_changes(tmp_path):
    def load(folder: str, size: int = 4) -> list[int]:
        options = ReadOptions(channels=1)
        folder = tmp_path / folder
        data = load_dataset("folder", size, folder, cache, progress=False, options=options)
        return values(data)

    def save(path: str, value: int) -> None:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4), value).save(tmp_path / path)

    cache = tmp_path / "cache"
    save("data/a.png", 1)
    save("other/a.png", 9)
    load("data", size=8)
    load("other")
    others = set(cache.glob("*.npy"))

    load("data")
    (first,) = set(cache.glob("*.npy")) - others
    written = first.stat()
    assert load("data") == [1]
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == (written.st_mtime_ns, written.st_ino)

    save("data/b.png", 2)
    assert load("data") == [1, 2]
    (second,) = set(cache.glob("*.npy")) - others
    assert second != first
    assert others < set(cache.glob("*.npy"))  # another size and another folder

    save("data/b.png", 3)  # of the same size
    os.utime(tmp_path / "data" / "b.png", (0, 0))  # the clock may be too coarse for this test
    assert load("data") == [1, 3]


def test_cache_build_removes_what_killed_builds_and_earlier_versions_left(load):
    load(gray_source(5))
    (stale,) = load.files()
    (load.cache / f".{stale}.4711.tmp").touch()
    (load.cache / "unrelated.npy").touch()
    derived = Path(stale).stem.rpartition("_")[0] + f"_{hashlib.sha256(b'2').hexdigest()[:10]}"
    live = f".{derived}.inception.npz.4711.tmp"  # statistics that an evaluation is writing
    (load.cache / live).touch()
    (load.cache / f".{derived}.npy.4711.tmp").touch()
    load(gray_source(5, fingerprint="2"))
    (built,) = load.files() - {"unrelated.npy", live}
    assert built != stale and {"unrelated.npy", live} < load.files()


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: path.write_bytes(b""),
    "random": lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
    "type": lambda path: np.save(path, np.zeros((5, 3, 4, 4), np.float32)),
    "shape": lambda path: np.save(path, np.zeros((5, 3, 4, 5), np.uint8)),
    "scalar": lambda path: np.save(path, np.uint8(0)),
    "pickle": lambda path: np.save(path, np.array([None, 1]), allow_pickle=True),
}


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [("*.npy", damage) for damage in DAMAGES]
    + [("*.labels.npz", damage) for damage in ("empty", "random", "type")],
)
def test_damaged_cache_is_built_again_with_a_warning(load, pattern, damage):
    source = gray_source(5, labels=lambda: (np.arange(5), ("a", "b")))
    load(source)
    (path,) = load.cache.glob(pattern)
    DAMAGES[damage](path)
    if path.with_name(f"{path.name}.npy").exists():  # np.save adds it
        path.with_name(f"{path.name}.npy").rename(path)
    with pytest.warns(FallbackWarning, match=r"reading the image cache .* failed") as warned:
        data = load(source)
    assert len(warned) == 1 and values(data) == data.labels.tolist() == list(range(5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(source)


# Unreadable images.


def test_cache_leaves_out_unreadable_images_and_lists_them(load):
    with pytest.warns(FallbackWarning) as warned:
        data = load(gray_source(100, unreadable=(3, 70)))
    assert values(data) == [i for i in range(100) if i not in (3, 70)]
    (message,) = (str(warning.message) for warning in warned)
    assert message.splitlines() == [
        "2 of 100 images in here cannot be read; continuing without:",
        "  image 3 is broken",
        "  image 70 is broken",
    ]


def test_cache_lists_the_first_unreadable_images(load, monkeypatch):
    monkeypatch.setattr(image_cache, "MAX_LISTED", 2)
    with pytest.warns(FallbackWarning) as warned:
        load(gray_source(100, unreadable=(3, 7, 70, 71)))
    (message,) = (str(warning.message) for warning in warned)
    assert message.startswith("4 of 100 images")
    assert message.splitlines()[1:] == ["  image 3 is broken", "  image 7 is broken"]


def test_cache_accepts_one_unreadable_image_in_twenty(load):
    with pytest.warns(FallbackWarning, match="2 of 40"):
        load(gray_source(40, unreadable=(0, 1)))
    with pytest.raises(UserError, match=r"too many of the 40 images in here .*image 0 is broken"):
        load(gray_source(40, unreadable=(0, 1, 2), fingerprint="2"))
    assert len(load.files()) == 1  # of the first


def test_cache_of_a_stream_says_how_many_images_were_read(load):
    stream = replace(gray_source(0, unreadable=tuple(range(100))), stream=lambda: [range(100)])
    with pytest.raises(UserError, match=r"too many of the 51 images in here .*image 0 is broken"):
        load(stream)


# Labels.


@pytest.mark.filterwarnings("ignore::engine.errors.FallbackWarning")
@pytest.mark.parametrize("unreadable", [(), (3, 70)])
def test_cache_labels_follow_their_images(load, unreadable):
    def forbid(block):
        pytest.fail("read a cached source")

    names = ("a", "b")
    labels = {"labels": lambda: (1000 + np.arange(100), names)}
    first = load(gray_source(100, unreadable, **labels))
    cached = load(gray_source(100, unreadable, on_read=forbid, **labels))
    for data in (first, cached):
        assert data.labels.dtype == np.int64 and data.class_names == names
        assert data.labels.tolist() == [1000 + value for value in values(data)]
        assert len(data) == 100 - len(unreadable)


@pytest.mark.filterwarnings("ignore::engine.errors.FallbackWarning")
def test_cache_without_labels_is_rebuilt_when_its_source_has_some(load):
    assert load(gray_source(100, (3,))).labels is None
    data = load(gray_source(100, (3,), labels=lambda: (np.arange(100), ())))
    assert data.labels.tolist() == values(data)
    assert load(gray_source(100, (3,))).labels is None


# Interrupted and concurrent builds.


def test_interrupted_build_leaves_nothing_and_starts_again(load):
    def interrupt(block):
        assert not load.files() or all(name.endswith(".tmp") for name in load.files())
        if 130 in block:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(gray_source(250, on_read=interrupt))
    assert not load.files()
    assert values(load(gray_source(250))) == list(range(250))


def test_killed_build_starts_again_and_ends_the_same(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, pixels in enumerate(random_images(700, 40)):
        Image.fromarray(pixels.transpose(1, 2, 0)[:, :32]).save(folder / f"{i:04d}.png")
    cache = tmp_path / "cache"
    (tmp_path / "decode.py").write_text(
        "import time; from pathlib import Path; from engine import datasets\n"
        "from engine import pixels\n"
        "crop = pixels.center_square\n"
        "def slow_crop(*arguments):\n    time.sleep(0.003)\n    return crop(*arguments)\n"
        "pixels.center_square = slow_crop\n"
        "datasets.load_dataset('folder', 32, Path('images'), Path('cache'), 2, progress=False)"
    )

    def written() -> int:
        return sum(path.stat().st_size for path in cache.glob("*.tmp"))

    killed = ForkedScript(tmp_path, tmp_path / "decode.py")
    while written() < 200 * 3 * 32**2:
        assert killed.returncode is None
        time.sleep(0.005)
    killed.kill()
    assert written() and not list(cache.glob("*.npy"))
    load_dataset("folder", 32, folder, cache, progress=False)
    load_dataset("folder", 32, folder, tmp_path / "undisturbed", progress=False)
    names = {path.name for path in cache.iterdir()}
    assert names == {path.name for path in (tmp_path / "undisturbed").iterdir()}
    for name in names:
        assert (cache / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_second_load_waits_for_the_first(load, monkeypatch):
    blocks, printed = [], []
    is_building, is_waiting = threading.Event(), threading.Event()

    def on_read(block):
        blocks.append(block)
        is_building.set()
        assert is_waiting.wait(60)

    def print_notice(text, file):
        printed.append(text)
        is_waiting.set()

    monkeypatch.setattr(image_cache, "print", print_notice, raising=False)

    source = gray_source(250, on_read=on_read)
    with ThreadPoolExecutor(2) as pool:  # locks are between open files, so threads will do
        first = pool.submit(load, source)
        is_building.wait()
        second = pool.submit(load, source)
    assert values(first.result()) == values(second.result()) == list(range(250))
    assert len(blocks) == 4 and len(load.files()) == 1
    assert printed == ["another process is building this image cache; waiting for it"]


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(95, "not supported")])
def test_cache_is_built_where_files_cannot_be_locked(load, monkeypatch, error):
    class Unsupported:
        def __init__(self, path):
            pass

        def acquire(self, timeout=None):
            raise error

    monkeypatch.setattr(image_cache, "FileLock", Unsupported)
    with pytest.warns(FallbackWarning, match=r"file locking failed .*continuing without it"):
        assert values(load(gray_source(100))) == list(range(100))
    assert len(load.files()) == 1
