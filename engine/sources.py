"""Where training images come from. Every dataset ends as one uint8 array on disk, memory-mapped.

A source is decoded, cropped and resized once for each image size; later runs find the array in the cache, whose file
name carries a fingerprint of the source, so that a changed source is noticed. Nothing is ever unpickled: CIFAR-10 and
STL-10 are read from their binary versions.
"""

import hashlib
import json
import os
import socket
import sys
import tarfile
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, BinaryIO

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from torchvision.datasets import STL10, CelebA
from torchvision.datasets.utils import download_file_from_google_drive, download_url
from tqdm import tqdm

from engine.errors import UserError
from engine.locks import lock
from engine.shapes import draw_shapes

DATASETS = ("auto", "cifar10", "celeba", "stl10", "shapes", "folder")

SHAPES_COUNT = 20_480
SHAPES_SEED = 0
CIFAR10_BINS = {f"cifar-10-batches-bin/data_batch_{i}.bin": 10_000 for i in range(1, 6)}  # images in each
STL10_BINS = {"stl10_binary/train_X.bin": 5_000, "stl10_binary/unlabeled_X.bin": 100_000}

BLOCK = 64  # images a thread decodes at a time
LOOKED_AT = 200  # images of a folder whose size is looked at, to see whether they have the pixels asked for
UNREADABLE_LIMIT = 1 / 20  # of a folder; with more, it is the folder that is wrong
CONNECT_SECONDS = 20


@dataclass(frozen=True)
class Archive:
    """A published archive: `name`, when put by hand into `folder` of the data directory, is used instead of a download.

    `contents` are the files or folders to take out of it; they end up beside it.
    """

    title: str
    folder: str
    name: str
    md5: str
    url: str
    contents: tuple[str, ...]
    drive_id: str | None = None  # on Google Drive, where `url` is only the page for people


@dataclass(frozen=True)
class Source:
    """`count` images, read a block at a time.

    `place` tells one source of a dataset from another, `state` changes whenever the images there do.
    `read(block, size)` returns the images numbered by the range `block` as uint8 (n, 3, size, size) and, for each one
    that could not be read and is left out, a line saying why. `sides()` returns the smaller sides, in pixels, of some
    of the images, or nothing if they come in any size.
    """

    place: str
    state: str
    count: int
    read: Callable[[range, int], tuple[np.ndarray, list[str]]]
    sides: Callable[[], list[int]]


CIFAR10_ARCHIVE = Archive(
    title="CIFAR-10",
    folder="",
    name="cifar-10-binary.tar.gz",
    md5="c32a1d4ab5d03f1284b67883e8d87530",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    contents=tuple(CIFAR10_BINS),
)
STL10_ARCHIVE = Archive(
    title="STL-10",
    folder="",
    name=STL10.filename,
    md5=STL10.tgz_md5,
    url=STL10.url,
    contents=tuple(STL10_BINS),
)
CELEBA_ARCHIVE = Archive(
    title="CelebA",
    folder="celeba",
    name="img_align_celeba.zip",
    md5=next(md5 for _, md5, name in CelebA.file_list if name == "img_align_celeba.zip"),
    url="http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    contents=("img_align_celeba",),
    drive_id=next(drive_id for drive_id, _, name in CelebA.file_list if name == "img_align_celeba.zip"),
)


def resolve_auto(data_dir: Path, has_gpu: bool, announce: Callable[[str], None]) -> str:
    """What `--dataset auto` means here: "cifar10" with a GPU if it is on disk or can be fetched, else "shapes".

    Fetches CIFAR-10 if need be, but never without a GPU. `announce` gets one line when it is "shapes".
    """
    why = "there is no GPU, and CIFAR-10 takes days on a CPU"
    if has_gpu:
        try:
            _require(CIFAR10_ARCHIVE, data_dir)
            return "cifar10"
        except UserError as error:
            why = str(error)
    announce(
        f"*** DATASET: the built-in shapes, not CIFAR-10: {why}. `--dataset cifar10` insists on CIFAR-10, "
        "`--dataset folder --data_dir DIR` takes images of your own. ***"
    )
    return "shapes"


def load_images(
    dataset: str,
    image_size: int,
    data_dir: Path,
    cache_dir: Path = Path("data/cache"),
    workers: int = 4,
    progress: bool = True,
    upsampling: bool = True,
) -> np.ndarray:
    """All training images of a dataset, their central square resized to `image_size` pixels.

    dataset: one of `DATASETS` but "auto" (see `resolve_auto`); what is missing is fetched, never replaced.
    data_dir: where the dataset's files are or go; for "folder", the images themselves, at any depth below it.
    workers: decoding threads. upsampling: whether images may have fewer pixels than are asked for; of a folder's images
    half may, which are told by up to 200 of them, evenly spread.

    Returns uint8 (N, 3, image_size, image_size), read-only and memory-mapped from `cache_dir`. Unreadable files are
    listed on stderr when the array is built, and left out of it. Building that was interrupted, however, goes on.

    Raises UserError: unknown dataset, missing or damaged files, no images, more than 1 in 20 unreadable, upsampling.
    """
    source = _open_source(dataset, Path(data_dir))
    if not upsampling:
        _require_pixels(source, image_size)
    prefix = f"{dataset}_{image_size}px_{_digest(source.place)}_"
    final = Path(cache_dir) / f"{prefix}{_digest(source.state)}.npy"
    if not final.exists():
        bar = tqdm(total=source.count, desc=f"{dataset} at {image_size} px", unit=" images", disable=not progress)
        try:
            with bar:
                _build(source, image_size, final, workers, bar)
        except OSError as error:
            raise UserError(f"cannot write the image cache {final}: {_one_line(error)}") from error
        for stale in final.parent.glob(f"{prefix}*"):
            if not stale.name.startswith(final.stem):
                with suppress(OSError):  # in use (Windows), or removed by another process
                    stale.unlink()
    return np.load(final, mmap_mode="r")


def collect(loader: Iterable) -> np.ndarray:
    """Gathers a finite iterable of batches, such as a DataLoader, into one array.

    Each batch is a tensor or array (B, C, H, W), or a tuple or list that begins with one, as in (images, labels). It is
    uint8, or floating point in [0, 1]. Returns uint8 (N, C, H, W).

    Raises UserError if a batch is anything else, if C, H or W differ between batches, or if there are none.
    """
    blocks = []
    for batch in loader:
        images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(images, (torch.Tensor, np.ndarray)):
            raise UserError(f"a batch should be a tensor of images or begin with one, not {type(images).__name__}")
        images = torch.as_tensor(images).detach().cpu()
        shape = tuple(images.shape)
        if len(shape) != 4 or 0 in shape or shape[1] > 4:
            raise UserError(f"a batch of images should have the shape (B, C, H, W) with C from 1 to 4, not {shape}")
        if blocks and shape[1:] != blocks[0].shape[1:]:
            raise UserError(f"images should be of one shape (C, H, W), not {blocks[0].shape[1:]} and {shape[1:]}")
        if images.is_floating_point():
            low, high = images.min().item(), images.max().item()
            if not (low >= 0 and high <= 1):  # so put, it catches NaN too
                raise UserError(f"floating-point images should be in [0, 1], not from {low:g} to {high:g}")
            images = (images.float() * 255).round().to(torch.uint8)
        if images.dtype != torch.uint8:
            raise UserError(f"images should be uint8, or floating point in [0, 1], not {images.dtype}")
        blocks.append(images.numpy().copy())  # a worker's batch would keep its shared memory, and a file, open
    if not blocks:
        raise UserError("the loader gave no images")
    return np.concatenate(blocks)


# --- sources


def _open_source(dataset: str, data_dir: Path) -> Source:
    if dataset == "cifar10":
        _require(CIFAR10_ARCHIVE, data_dir)
        # a record is a label and 3 planes of rows
        return _bins(data_dir, CIFAR10_BINS, 3073, lambda x: x[1:].reshape(3, 32, 32).transpose(1, 2, 0))
    if dataset == "stl10":
        _require(STL10_ARCHIVE, data_dir)
        # a record is 3 planes of columns
        return _bins(data_dir, STL10_BINS, 27648, lambda x: x.reshape(3, 96, 96).transpose(2, 1, 0))
    if dataset == "celeba":
        _require(CELEBA_ARCHIVE, data_dir)
        return _folder(data_dir / CELEBA_ARCHIVE.folder / CELEBA_ARCHIVE.contents[0])
    if dataset == "folder":
        return _folder(data_dir)
    if dataset == "shapes":
        return Source(
            place="",
            state=f"{SHAPES_SEED} {SHAPES_COUNT}",
            count=SHAPES_COUNT,
            read=lambda block, size: (draw_shapes(np.array(block), size, SHAPES_SEED), []),
            sides=list,
        )
    raise UserError(f"unknown dataset {dataset!r}; there are {', '.join(DATASETS[1:])}")


def _require_pixels(source: Source, size: int) -> None:
    """Raises UserError if more than half of the images have fewer pixels than are asked for."""
    sides = sorted(source.sides())
    small = sum(side < size for side in sides)
    if 2 * small > len(sides):
        middle = sides[len(sides) // 2]
        raise UserError(
            f"{size} px are asked for, but the images in {source.place} have {middle} "
            f"(fewer than {size}: {small} of {len(sides)} looked at): ask for {middle} at most (--target_size), "
            "or have them enlarged (--use_upsampling)"
        )


def _bins(data_dir: Path, counts: dict[str, int], record: int, to_image: Callable[[np.ndarray], np.ndarray]) -> Source:
    """Files of `record` bytes an image, of which `to_image` makes a view (height, width, 3)."""
    paths = [data_dir / name for name in counts]
    for path, count in zip(paths, counts.values(), strict=True):
        if path.stat().st_size != count * record:
            raise UserError(
                f"{path} is damaged or incomplete: {path.stat().st_size:,} bytes, not {count * record:,}; "
                "delete it to have it unpacked or fetched again"
            )
    starts = np.cumsum([0, *counts.values()])

    def record_of(index: int) -> np.ndarray:
        # read, not mapped: the pages of a mapped file would count as this process's memory, all 3 GB of STL-10
        part = int(np.searchsorted(starts, index, side="right")) - 1
        return to_image(np.fromfile(paths[part], np.uint8, record, offset=int(index - starts[part]) * record))

    def read(block: range, size: int) -> tuple[np.ndarray, list[str]]:
        images = [Image.fromarray(np.ascontiguousarray(record_of(index))) for index in block]
        return np.stack([center_square(image, size) for image in images]), []

    return Source(
        str(data_dir.resolve()), _state(data_dir, counts), int(starts[-1]), read, lambda: [min(record_of(0).shape[:2])]
    )


def _folder(folder: Path) -> Source:
    """Every image at any depth below a folder, in the order of their relative paths."""
    if not folder.is_dir():
        raise UserError(f"{folder} is {'a file, not a folder' if folder.exists() else 'missing: no such folder'}")
    openable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    names = []  # strings, since Path objects for CelebA's 200,000 files take seconds
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(parent, folder).replace(os.sep, "/")
        prefix = "" if inside == "." else f"{inside}/"
        files = [name for name in files if not name.startswith(".")]
        names += [f"{prefix}{name}" for name in files if os.path.splitext(name)[1].lower() in openable]
    names.sort()
    paths = [os.path.join(folder, name) for name in names]
    if not paths:
        raise UserError(f"there are no images in {folder} (.jpg, .png, .webp and whatever else Pillow opens)")

    def read(block: range, size: int) -> tuple[np.ndarray, list[str]]:
        images, unreadable = [], []
        for path in paths[block.start : block.stop]:
            try:
                with Image.open(path) as image:
                    image.draft(None, (2 * size, 2 * size))  # JPEG: decodes fewer pixels, still twice too many
                    images.append(center_square(to_rgb(ImageOps.exif_transpose(image)), size))
            except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
                unreadable.append(f"{path}: {_one_line(error)}")
        return np.array(images, np.uint8).reshape(-1, 3, size, size), unreadable

    def sides() -> list[int]:
        found = []
        for path in paths[:: -(-len(paths) // LOOKED_AT)]:
            with suppress(Exception), Image.open(path) as image:  # reads the header alone
                found.append(min(image.size))
        return found

    return Source(str(folder.resolve()), _state(folder, names), len(paths), read, sides)


def _state(folder: Path, names: Iterable[str]) -> str:
    """A line for each of the files below a folder that changes whenever the file does."""
    lines = []
    for name in names:
        path = os.path.join(folder, name)
        try:
            stat = os.stat(path)
        except OSError:
            stat = os.lstat(path)  # a dangling link counts as an unreadable image
        lines.append(f"{name} {stat.st_size} {stat.st_mtime_ns}\n")
    return "".join(lines)


# --- pixels


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as mode RGB: transparency over white, 16-bit grey scaled (not clipped) to 8 bits.

    Raises ValueError for mode F, whose range nobody knows, and for what Pillow cannot convert.
    """
    if image.mode == "F":
        raise ValueError("32-bit floating-point pixels have no agreed range")
    if image.mode.startswith("I"):  # "I" or one of "I;16...": grey from 0 to 65535
        grey = np.asarray(image)
        grey = np.where(grey == image.info.get("transparency"), 65535, grey)
        return Image.fromarray(np.round(grey.clip(0, 65535) / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def center_square(image: Image.Image, size: int) -> np.ndarray:
    """The central square of an RGB image, resized with antialiasing: uint8 (3, size, size)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(square).transpose(2, 0, 1)


# --- the cache


def _build(source: Source, size: int, final: Path, workers: int, bar: tqdm) -> None:
    """Writes the images to a .part file, which gets its final name when all of it is on disk.

    Each finished block is noted in a journal, so that an interrupted build goes on where it was, whatever ended it.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    # where nobody can be kept out of files in common, each process has its own and none goes on with another's
    owner = "" if _can_lock(final.parent) else f".{socket.gethostname()}-{os.getpid()}"
    partial, journal = final.with_suffix(f"{owner}.part"), final.with_suffix(f"{owner}.journal")
    with _alone(journal, bar) as notes:
        if not final.exists():  # another process may have made it just now
            try:
                unreadable = _write(source, size, partial, notes, workers, bar)
            except UserError:
                partial.unlink()
                journal.unlink()
                raise
            os.replace(partial, final)
            if unreadable:
                bar.write(
                    f"{len(unreadable)} of {source.count} images cannot be read and are left out:", file=sys.stderr
                )
            for line in unreadable:
                bar.write(f"  {line}", file=sys.stderr)
    journal.unlink(missing_ok=True)


def _can_lock(folder: Path) -> bool:
    """Whether files there can be locked."""
    with TemporaryFile(dir=folder) as file:
        return lock(file.fileno()) is not None


@contextmanager
def _alone(path: Path, bar: tqdm) -> Iterator[BinaryIO]:
    """The file, made if need be, to read and write as the only process; another one is waited for."""
    while True:
        with open(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b") as file:
            if lock(file.fileno()) is False:
                bar.write("another process is building this cache: waiting for it", file=sys.stderr)
                lock(file.fileno(), wait=True)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield file
                return
        # the other process was done and removed it: what is locked is no longer what has the name


def _write(source: Source, size: int, path: Path, journal: BinaryIO, workers: int, bar: tqdm) -> list[str]:
    """Goes block by block, so that memory does not grow with the dataset; returns a line for each unreadable image."""
    path.touch()
    with path.open("r+b") as file:
        _write_header(file, source.count, size)
        finished = _finished_blocks(file, 3 * size**2, journal)
        unreadable = [reason for note in finished for reason in note["unreadable"]]
        bar.initial = bar.n = min(len(finished) * BLOCK, source.count)
        for images, reasons in _read_blocks(source, size, workers, bar.n):
            pixels = images.tobytes()
            file.write(pixels)
            file.flush()
            note = {"images": len(images), "crc": zlib.crc32(pixels), "unreadable": reasons}
            journal.write(json.dumps(note).encode() + b"\n")
            journal.flush()
            unreadable += reasons
            if len(unreadable) > UNREADABLE_LIMIT * source.count:
                some = "; ".join(unreadable[:3])
                raise UserError(f"too many of the {source.count} images in {source.place} cannot be read: {some}")
            bar.update(len(images) + len(reasons))
        file.seek(0)
        _write_header(file, source.count - len(unreadable), size)
        file.flush()
        os.fsync(file.fileno())
    return unreadable


def _finished_blocks(file: BinaryIO, record: int, journal: BinaryIO) -> list[dict]:
    """The notes of an interrupted build on its finished blocks, images of `record` bytes that follow in the file.

    Both files are cut off behind the last block that is whole; checksums tell, since a crash of the machine can leave
    any part of either unwritten.
    """
    made_by = json.dumps({"block": BLOCK, "pillow": PIL.__version__}).encode() + b"\n"
    journal.seek(0)
    lines, finished = journal.read().splitlines(keepends=True), []
    end, noted = file.tell(), len(made_by)
    for line in lines[1:] if lines[:1] == [made_by] else []:
        try:
            note = json.loads(line)
        except ValueError:
            break
        pixels = file.read(note["images"] * record)
        if not line.endswith(b"\n") or len(pixels) < note["images"] * record or zlib.crc32(pixels) != note["crc"]:
            break
        finished.append(note)
        end, noted = end + len(pixels), noted + len(line)
    if not finished:
        journal.seek(0)
        journal.write(made_by)
    for cut, at in ((file, end), (journal, noted)):
        cut.flush()
        cut.truncate(at)
        cut.seek(at)
    return finished


def _write_header(file: BinaryIO, count: int, size: int) -> None:
    # numpy pads it to a multiple of 64 bytes with room for the count to grow, so it can be written again in place
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, size, size)}
    np.lib.format.write_array_header_1_0(file, header)


def _read_blocks(source: Source, size: int, workers: int, first: int) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Blocks from image `first` on, in order, read by threads (Pillow and numpy let go of the GIL), two ahead each."""
    workers = max(1, workers)
    pending = deque()
    with ThreadPoolExecutor(workers) as pool:
        for start in range(first, source.count, BLOCK):
            pending.append(pool.submit(source.read, range(start, min(start + BLOCK, source.count)), size))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:10]


# --- downloads


def _require(archive: Archive, data_dir: Path) -> None:
    """Makes sure that an archive's contents are on disk: there already, else unpacked from it, else fetched.

    All is done in a temporary folder, so nothing half-written ever has its final name.
    """
    folder = data_dir / archive.folder
    if all((folder / name).exists() for name in archive.contents):
        return
    by_hand = folder / archive.name
    if by_hand.is_file() and _md5(by_hand) != archive.md5:
        raise UserError(
            f"{by_hand} is damaged or incomplete (its MD5 is not {archive.md5}): "
            f"delete it, or replace it by a fresh copy from {archive.url}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary:
            packed = by_hand
            if not by_hand.is_file():
                _download(archive, temporary)
                packed = Path(temporary, archive.name)
            _unpack(archive, packed, Path(temporary))
            for name in archive.contents:
                (folder / name).parent.mkdir(exist_ok=True)
                os.replace(Path(temporary, name), folder / name)
    except Exception as error:  # urllib, gdown, tarfile and zipfile raise each their own
        raise UserError(
            f"{archive.title} is missing from {folder} and could not be fetched ({_one_line(error)}): "
            f"get {archive.name} from {archive.url} and save it as {by_hand}"
        ) from error


def _md5(path: Path) -> str:
    digest = hashlib.md5()
    with path.open("rb") as file, _bytes_bar("checking", path) as bar:
        while part := file.read(1 << 20):
            digest.update(part)
            bar.update(len(part))
    return digest.hexdigest()


def _unpack(archive: Archive, packed: Path, folder: Path) -> None:
    """Takes the contents, and nothing else, out of a .zip or a .tar.gz."""

    def copy(name: str, source: IO[bytes], advance: Callable[[], None]) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            while part := source.read(1 << 20):
                file.write(part)
                advance()

    def is_wanted(name: str) -> bool:
        inside = any(name == content or name.startswith(f"{content}/") for content in archive.contents)
        return inside and ".." not in name.split("/")

    with packed.open("rb") as raw, _bytes_bar("unpacking", packed) as bar:

        def advance() -> None:
            bar.update(max(0, raw.tell() - bar.n))

        if packed.suffix == ".zip":
            with zipfile.ZipFile(raw) as members:
                for member in members.infolist():
                    if is_wanted(member.filename) and not member.is_dir():
                        with members.open(member) as source:
                            copy(member.filename, source, advance)
        else:
            with tarfile.open(fileobj=raw, mode="r:gz") as members:
                for member in members:
                    if is_wanted(member.name) and member.isfile():
                        copy(member.name, members.extractfile(member), advance)
        bar.update(bar.total - bar.n)  # the archive's own table of contents


def _bytes_bar(what: str, path: Path) -> tqdm:
    return tqdm(desc=f"{what} {path.name}", total=path.stat().st_size, unit="B", unit_scale=True, mininterval=1)


def _download(archive: Archive, folder: str) -> None:
    with socket_timeout(CONNECT_SECONDS):
        if archive.drive_id:
            download_file_from_google_drive(archive.drive_id, folder, archive.name, archive.md5)
        else:
            download_url(archive.url, folder, archive.name, archive.md5)


@contextmanager
def socket_timeout(seconds: float) -> Iterator[None]:
    """torchvision sets none, and would wait for ever behind a firewall that drops packets."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
