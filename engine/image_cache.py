"""The image cache: a data set decoded once into a memory-mapped uint8 file."""

import hashlib
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from engine.checkpoints import write_atomically
from engine.dataloader import ImageDataset
from engine.errors import FallbackWarning, UserError

BLOCK = 64  # images that a thread decodes at a time
MAX_UNREADABLE_FRACTION = 1 / 20  # with more, something is wrong with the source


@dataclass(frozen=True)
class Source:
    """Where the images of a data set come from, and their labels if it has classes."""

    location: str
    fingerprint: str  # changes whenever the images or labels at the location do
    count: int
    # read(indices, size): images, uint8 (n, 3, size, size), and {index: why it is left out}
    read: Callable[[range, int], tuple[np.ndarray, dict[int, str]]]
    # sample_sizes(): shorter sides of some of the images in pixels; none if they have any size
    sample_sizes: Callable[[], Iterable[int]] = tuple
    labels: np.ndarray | None = None  # int64 (count,), indices into class_names or -1
    class_names: tuple[str, ...] = ()
    names: Iterable[str] = ()  # of the files, below the location


def load_cached(
    source: Source, dataset: str, size: int, cache_dir: Path, workers: int, progress: bool
) -> ImageDataset:
    """Loads a source's images at `size` px from the cache, building it if missing.

    workers: decoding threads. Raises UserError if too many images cannot be read.
    """
    texts = (source.location, source.fingerprint)
    encoded = (text.encode("utf-8", "surrogateescape") for text in texts)
    location, fingerprint = (hashlib.sha256(text).hexdigest()[:10] for text in encoded)
    prefix = f"{dataset}_{size}px_{location}"
    path = cache_dir / f"{prefix}_{fingerprint}.npy"
    labels_path = path.with_suffix(".labels.npz")
    needed = [path] if source.labels is None else [path, labels_path]
    if not all(file.exists() for file in needed):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _lock(cache_dir / f"{prefix}.lock"):
            if not all(file.exists() for file in needed):  # another process may have built it
                _build(source, size, path, labels_path, workers, progress)
            # Earlier versions of the source, and temporary files of killed builds.
            for file in cache_dir.glob(f"*{prefix}_*"):
                if not file.name.startswith(path.stem):
                    with suppress(OSError):  # on Windows, a file in use
                        file.unlink()
    images = np.load(path, mmap_mode="r")
    if source.labels is None:
        return ImageDataset(images)
    with np.load(labels_path, allow_pickle=False) as file:
        return ImageDataset(images, file["labels"], tuple(file["class_names"].tolist()))


def _lock(path: Path) -> AbstractContextManager:
    """Locks a path, waiting for other processes; a no-op if files cannot be locked."""
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print("another process is building this image cache; waiting for it", file=sys.stderr)
        return lock.acquire()
    except (NotImplementedError, OSError) as error:  # some network file systems
        warnings.warn(f"file locking failed ({error}); continuing without it", FallbackWarning, 2)
        return nullcontext()


def _build(source: Source, size: int, path: Path, labels_path: Path, workers, progress) -> None:
    description = f"{source.count} images in {source.location}"
    unreadable = {}

    def write(file) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (source.count, 3, size, size)}
        np.lib.format.write_array_header_1_0(file, header)
        with tqdm(total=source.count, desc="decoding", unit=" images", disable=not progress) as bar:
            for images, reasons in _read_blocks(source, size, workers):
                file.write(images.tobytes())
                bar.update(len(images) + len(reasons))
                unreadable.update(reasons)
                if len(unreadable) > MAX_UNREADABLE_FRACTION * source.count:
                    some = "; ".join(list(unreadable.values())[:3])
                    raise UserError(f"too many of the {description} cannot be read ({some})")
        # The header has room for another count.
        header["shape"] = (source.count - len(unreadable), 3, size, size)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)

    # Each file gets its name once it is complete.
    write_atomically(path, write)
    if source.labels is not None:
        labels = np.delete(source.labels, list(unreadable))
        content = {"labels": labels, "class_names": np.array(source.class_names, dtype=str)}
        write_atomically(labels_path, lambda file: np.savez(file, **content))
    if unreadable:
        first = f"{len(unreadable)} of {description} cannot be read; continuing without:"
        warnings.warn("\n  ".join([first, *unreadable.values()]), FallbackWarning, stacklevel=2)


def _read_blocks(source: Source, size: int, workers: int) -> Iterator[tuple]:
    """Yields source.read's results in order, at most two blocks ahead per thread."""
    pending = deque()
    with ThreadPoolExecutor(workers) as pool:  # Pillow and numpy release the GIL
        for start in range(0, source.count, BLOCK):
            block = range(start, min(start + BLOCK, source.count))
            pending.append(pool.submit(source.read, block, size))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
