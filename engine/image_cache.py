"""The image cache: a data set decoded once into a memory-mapped uint8 file."""

import hashlib
import json
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from engine.checkpoints import link_or_copy, write_atomically, write_text
from engine.dataloader import ImageDataset, read_ahead
from engine.errors import FallbackWarning, UserError, warn_fallback
from engine.image_source import Source

MAX_UNREADABLE_FRACTION = 1 / 20  # with more, something is wrong with the source
MIN_CHECKED = 1000  # images of a stream before that counts, except at its end
MAX_LISTED = 20  # unreadable images


class CacheFiles(NamedTuple):
    """The files of a cached source; other versions of it have the same prefix."""

    prefix: str
    images: Path
    labels: Path
    read_as: Path


def load_cached(
    source: Source, dataset: str, size: int, cache_dir: Path, workers: int, progress: bool
) -> ImageDataset:
    """Loads a source's images at `size` px from the cache, building it if missing.

    workers: decoding threads. Raises UserError if too many images cannot be read.
    """

    # The cache's files are named by source, size and how images are read.
    def name_files(key: str) -> CacheFiles:
        texts = (source.location + key, source.fingerprint)
        encoded = (text.encode("utf-8", "surrogateescape") for text in texts)
        location, fingerprint = (hashlib.sha256(text).hexdigest()[:10] for text in encoded)
        prefix = f"{dataset}_{size}px_{location}"
        path = cache_dir / f"{prefix}_{fingerprint}.npy"
        others = map(path.with_suffix, (".labels.npz", ".read_as.json"))
        return CacheFiles(prefix, path, *others)

    files = name_files(source.cache_key)

    # Open it; one process builds it if it is missing.
    data = _open(source, size, files)
    if data is None:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _lock(cache_dir / f"{files.prefix}.lock"):
            if _open(source, size, files) is None:  # no other process has built it
                if files.images.exists() and (not source.labels or files.labels.exists()):
                    reason = f"reading the image cache {files.images} failed (it is damaged)"
                    warnings.warn(f"{reason}; continuing without it", FallbackWarning, 2)
                _build(source, size, files, workers, progress)
                # A run is resumed and evaluated with what was chosen.
                chosen = name_files(source.key_of(source.chosen())) if source.chosen else files
                if chosen != files:
                    with _lock(cache_dir / f"{chosen.prefix}.lock"):
                        for old, new in zip(files[1:], chosen[1:], strict=True):
                            if old.exists():
                                link_or_copy(old, new)
                        _remove_others(chosen)
            _remove_others(files)
        data = _open(source, size, files)
    return data


def _remove_others(files: CacheFiles) -> None:
    """Removes earlier versions of a cached source, and files of killed builds; under its lock."""
    builds = tuple(f".{file.name}." for file in files[1:])  # an evaluation writes others
    for file in files.images.parent.glob(f"*{files.prefix}_*"):
        if file.name.startswith(builds) or not file.name.lstrip(".").startswith(files.images.stem):
            with suppress(OSError):  # on Windows, a file in use
                file.unlink()


def _open(source: Source, size: int, files: CacheFiles) -> ImageDataset | None:
    """Opens a cached data set; None if a file is missing, or not what a build writes."""
    try:
        images = np.load(files.images, mmap_mode="r")
        count, _, *sides = images.shape
        is_complete = images.offset + images.nbytes == files.images.stat().st_size
        if images.dtype != np.uint8 or sides != [size, size] or not is_complete:
            return None
        has_options = files.read_as.exists()  # caches of earlier versions have none
        read_as = json.loads(files.read_as.read_text()) if has_options else {}
        if not source.labels:
            return ImageDataset(images, read_as=read_as)
        with np.load(files.labels, allow_pickle=False) as file:
            labels = file["labels"]
            class_names = tuple(file["class_names"].tolist())
        is_intact = labels.dtype == np.int64 and labels.shape == (count,)
        return ImageDataset(images, labels, class_names, read_as) if is_intact else None
    except Exception:  # numpy and zipfile raise nearly anything on a broken file
        return None


def _lock(path: Path) -> AbstractContextManager:
    """Locks a path, waiting for other processes; a no-op if files cannot be locked."""
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print("another process is building this image cache; waiting for it", file=sys.stderr)
        return lock.acquire()
    except (NotImplementedError, OSError) as error:  # some network file systems
        warn_fallback("file locking", error)
        return nullcontext()


def _build(source: Source, size: int, files: CacheFiles, workers: int, progress: bool) -> None:
    unreadable: list[str] = []
    counts: list[int] = []  # images of each, 0 of unreadable, several of a file with frames

    def check(total: int, at_least: int = 0) -> None:
        if len(unreadable) > MAX_UNREADABLE_FRACTION * max(total, at_least):
            examples = "; ".join(unreadable[:3])
            which = f"{total} images in {source.location}"
            raise UserError(f"too many of the {which} cannot be read ({examples})")

    def write(file) -> None:
        shape = (source.count, source.channels(), size, size)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        options = {"total": source.count or None, "unit": " images", "disable": not progress}
        with tqdm(desc="decoding", **options) as bar:
            blocks = read_ahead(lambda block: source.read(block, size), source.blocks(), workers)
            for images in chain.from_iterable(blocks):
                bar.update()
                if isinstance(images, str):
                    unreadable.append(images)
                    check(source.count or len(counts) + 1, 0 if source.count else MIN_CHECKED)
                    counts.append(0)
                else:
                    file.write(images.tobytes())
                    counts.append(len(images))
        check(len(counts))
        if source.chosen:  # before the images have their name
            write_text(files.read_as, json.dumps(source.chosen().to_config()))
        # The header has room for another count.
        header["shape"] = (sum(counts), *shape[1:])
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)

    # Each file gets its name once it is complete.
    write_atomically(files.images, write)
    if source.labels:
        labels, names = source.labels()
        content = {"labels": np.repeat(labels, counts), "class_names": np.array(names, dtype=str)}
        write_atomically(files.labels, lambda file: np.savez(file, **content))
    if unreadable:
        description = f"{len(counts)} images in {source.location}"
        first = f"{len(unreadable)} of {description} cannot be read; continuing without:"
        warnings.warn("\n  ".join([first, *unreadable[:MAX_LISTED]]), FallbackWarning, stacklevel=2)
