"""Data sets: named ones (downloaded if missing), folders and data loaders."""

import os
import re
import socket
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import STL10, CelebA, utils

from engine import hf_datasets
from engine.dataloader import ImageDataset
from engine.distributed import print0
from engine.errors import FallbackWarning, UserError
from engine.image_cache import load_cached
from engine.image_files import file_fingerprint
from engine.image_source import (
    DEFAULT_OPTIONS,
    ReadOptions,
    Source,
    image_source,
    is_array_file,
    load_array_labels,
    path_source,
)
from engine.labels import NO_LABEL, check_distinct, check_num_classes, labels_from_folders
from engine.shapes import SHAPE_KINDS, draw_shapes, kind_of

DATASETS = ("auto", "cifar10", "celeba", "stl10", "shapes", "folder", "hf:NAME")
SHAPES_COUNT = 20_480
CONNECT_SECONDS = 20


@dataclass(frozen=True)
class Archive:
    """A published archive, downloaded or put at `path` in the data folder by hand."""

    path: str
    md5: str
    url: str
    contents: Mapping[str, int]  # files or folders to extract, and the number of images in each
    record_bytes: int = 0  # of each image in a file
    to_pixels: Callable[[np.ndarray], np.ndarray] | None = None  # record to (height, width, 3)
    class_names: tuple[str, ...] = ()
    # labels of the first file's images, a byte each, from 1 on; else each record begins with one
    label_file: str = ""


CELEBA_DRIVE_ID, CELEBA_MD5, CELEBA_ZIP = CelebA.file_list[0]
ARCHIVES = {
    "cifar10": Archive(  # a record is a label and 3 planes of rows
        "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530",
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        {f"cifar-10-batches-bin/data_batch_{i}.bin": 10_000 for i in range(1, 6)},
        3073, lambda record: record[1:].reshape(3, 32, 32).transpose(1, 2, 0),
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
    "stl10": Archive(  # a record is 3 planes of columns
        STL10.filename, STL10.tgz_md5, STL10.url,
        {"stl10_binary/train_X.bin": 5_000, "stl10_binary/unlabeled_X.bin": 100_000},
        27648, lambda record: record.reshape(3, 96, 96).transpose(2, 1, 0),
        ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
        "stl10_binary/train_y.bin",
    ),
    "celeba": Archive(
        f"celeba/{CELEBA_ZIP}", CELEBA_MD5, f"https://drive.google.com/file/d/{CELEBA_DRIVE_ID}",
        {"img_align_celeba": 202_599},
    ),
}  # fmt: skip


def choose_default_dataset(data_dir: Path, has_gpu: bool, download: bool = True) -> str:
    """Chooses the data set of --dataset auto: "cifar10" with a GPU, else "shapes".

    CIFAR-10 is downloaded here if it is missing, unless `download` is false; if that fails, the
    choice is "shapes".
    """
    advice = "--dataset folder --data_dir DIR for your own images"
    if has_gpu:
        try:
            if download:
                ensure_downloaded(ARCHIVES["cifar10"], data_dir)
            return "cifar10"
        except UserError as error:
            line = f"no CIFAR-10 ({error}); continuing with the built-in shapes. Use {advice}"
            warnings.warn(line, FallbackWarning, stacklevel=2)
    else:
        reason = "no CUDA GPU found; CIFAR-10 would take days"
        advice = f"--dataset cifar10 to override, or {advice}"
        print0(f"dataset: built-in shapes ({reason}). Use {advice}.")
    return "shapes"


def check_stored(dataset: str, data_dir: Path) -> None:
    """Raises UserError if a script's default data set is not in a data folder."""
    if archive := ARCHIVES.get(dataset):
        local = data_dir / archive.path
        if not local.exists() and not all((local.parent / n).exists() for n in archive.contents):
            advice = f"--dataset folder for your own images, or --dataset {dataset} to download it"
            raise UserError(f"--data_dir is {data_dir}, which has no {dataset}. Add {advice}")


def check_channels(dataset: str, channels: int) -> None:
    """Raises UserError for channels that a data set cannot be read with; 0: its own."""
    if channels not in (0, 3) and dataset in (*ARCHIVES, "shapes"):
        raise UserError(f"{channels} channels are for folders and hf:NAME, but {dataset} is RGB")


def load_dataset(
    dataset: str, image_size: int, data_dir: Path, cache_dir: Path = Path("data/cache"),
    workers: int = 4, progress: bool = True, upsampling: bool = True, use_labels: bool = False,
    options: ReadOptions = DEFAULT_OPTIONS,
) -> ImageDataset:  # fmt: skip
    """Loads the training images of a data set, their center squares resized.

    dataset: one of DATASETS except "auto", or what hf_source reads. image_size: 0 for the images'
    own, if it is the same for all.
    data_dir: where its files are or will be stored; for "folder", a folder, .zip or .tar of images,
    or an .npz or .npy of arrays. workers: decoding threads. upsampling: whether more than half of
    the images may be smaller than image_size. use_labels: whether to return labels, too. options:
    how to read a folder or what hf_source reads; others are RGB.

    The images, uint8 (N, C, image_size, image_size), are a read-only memory map of a file in
    cache_dir. Raises UserError for files that are missing, damaged or too small, or labels that are
    missing although asked for.
    """
    check_channels(dataset, options.channels)
    source = open_source(dataset, Path(data_dir), use_labels, options)
    sizes = [] if image_size and upsampling else sorted(source.sample_sizes())
    location = source.location or dataset
    if not sizes and dataset != "shapes" and not (image_size and upsampling):
        raise UserError(f"no image that was looked at in {location} can be opened. Check the files")
    if not image_size:
        if len(set(sizes)) != 1:
            found = f"{sizes[0]} to {sizes[-1]} px" if sizes else "any size"
            raise UserError(f"images in {location} have {found}. Set --image_size")
        image_size = sizes[0]
    small = sum(size < image_size for size in sizes)
    if 2 * small > len(sizes):
        median = sizes[len(sizes) // 2]
        # What fits and the levels of the preset can halve: five from 128 px on, or four.
        multiple = 16 if median >= 128 else 8
        works = median // multiple * multiple
        advice = f"{works}, or --use_upsampling" if works else "8 with --use_upsampling"
        raise UserError(
            f"images in {location} are {median} px, smaller than --image_size {image_size} "
            f"({small} of {len(sizes)} checked). Use --image_size {advice}"
        )
    data = load_cached(source, file_slug(dataset), image_size, Path(cache_dir), workers, progress)
    if use_labels:
        check_num_classes(data.class_names, location)
        check_distinct(data.class_names, location)
    return data


def file_slug(dataset: str) -> str:
    """Returns a data set's name for file names: `hf:user/name` is `hf-user-name`."""
    return re.sub(r"[^\w.-]+", "-", dataset)[:60]


def placeholder(
    dataset: str, image_size: int, use_labels: bool = False, channels: int = 0
) -> ImageDataset | None:
    """Returns a stand-in for a data set: as many black images, with its classes.

    None for a folder, and for a data set of the Hub that does not say its count or classes. Raises
    UserError for channels that load_dataset refuses.
    """
    check_channels(dataset, channels)
    count = 0
    class_names: tuple[str, ...] = ()
    if archive := ARCHIVES.get(dataset):
        count = sum(archive.contents.values())
        class_names = archive.class_names
    elif dataset == "shapes":
        count = SHAPES_COUNT
        class_names = SHAPE_KINDS
    elif dataset.startswith(hf_datasets.PREFIX) and not use_labels:
        count = hf_datasets.hf_source(dataset, DEFAULT_OPTIONS, False).count
    images = np.broadcast_to(np.uint8(0), (count, channels or 3, image_size, image_size))
    if use_labels and count:
        check_num_classes(class_names, dataset)
        return ImageDataset(images, np.arange(count) % len(class_names), class_names)
    return ImageDataset(images) if count else None


def images_from_loader(loader: Iterable) -> np.ndarray:
    """Copies the images of all batches, e.g. of a DataLoader: uint8 (N, C, H, W).

    A batch is or begins with a tensor or array (B, C, H, W), uint8 or floating point in [0, 1]; all
    (C, H, W) are the same. Raises UserError for anything else.
    """
    # Images of each batch, checked.
    chunks = []
    for batch in loader:
        images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if isinstance(images, np.ndarray) and images.dtype.kind in "biuf":
            images = torch.from_numpy(images.copy())  # torch refuses negative strides
        if not isinstance(images, torch.Tensor):
            raise UserError(f"batches must be or begin with numbers, not {type(images).__name__}")
        images = images.detach().cpu()
        shape = tuple(images.shape)
        differs = chunks and shape[1:] != chunks[0].shape[1:]
        if len(shape) != 4 or 0 in shape or shape[1] > 4 or differs:
            raise UserError(f"batches must be (B, C <= 4, H, W), images of one shape, not {shape}")

        # As uint8.
        if images.dtype != torch.uint8:
            low, high = images.double().aminmax()  # torch has none of uint16
            if not (images.is_floating_point() and low >= 0 and high <= 1):
                found = f"{images.dtype} from {low:g} to {high:g}"
                raise UserError(f"images must be uint8, or floating point in [0, 1], not {found}")
            images = (images.float() * 255).round().to(torch.uint8)
        chunks.append(images.numpy().copy())  # the batch may be in a worker's shared memory
    if not chunks:
        raise UserError("the loader is empty")
    return np.concatenate(chunks)


def open_source(
    dataset: str, data_dir: Path, use_labels: bool = False, options: ReadOptions = DEFAULT_OPTIONS
) -> Source:
    """Returns the source of a data set, downloaded if missing; labels if asked."""
    if dataset.startswith(hf_datasets.PREFIX):
        return hf_datasets.hf_source(dataset, options, use_labels)
    archive = ARCHIVES.get(dataset)
    if archive:
        ensure_downloaded(archive, data_dir, use_labels)
    source = open_images(dataset, data_dir, options)
    if not use_labels:
        return source

    if dataset == "folder" and is_array_file(data_dir):
        labels, names = load_array_labels(data_dir, source.count)
    elif dataset == "folder":
        labels, names = labels_from_folders(source.names, source.location)
    elif dataset == "shapes":
        labels = kind_of(np.arange(SHAPES_COUNT)).astype(np.int64)
        names = SHAPE_KINDS
    else:
        names = archive.class_names
        labels = archive_labels(archive, data_dir) if names else None
    check_num_classes(names, source.location)
    return replace(source, labels=lambda: (labels, names))


def archive_labels(archive: Archive, folder: Path) -> np.ndarray:
    """Returns labels of an archive's images, int64; NO_LABEL for files without any."""
    if not archive.label_file:
        records = [np.fromfile(folder / name, np.uint8) for name in archive.contents]
        return np.concatenate([r[:: archive.record_bytes] for r in records]).astype(np.int64)
    labels = np.full(sum(archive.contents.values()), NO_LABEL)
    known = np.fromfile(folder / archive.label_file, np.uint8).astype(np.int64) - 1
    labels[: len(known)] = known
    return labels


def open_images(dataset: str, data_dir: Path, options: ReadOptions) -> Source:
    """Returns the source of a data set whose files are here, without labels."""
    if archive := ARCHIVES.get(dataset):
        if archive.to_pixels:
            return binary_source(archive, data_dir)
        source = path_source(data_dir / "celeba/img_align_celeba", None)
        return replace(source, cache_key=ReadOptions(channels=3).cache_key)  # as caches are named
    if dataset == "folder":
        return path_source(data_dir, options)
    if dataset == "shapes":
        fingerprint = f"0 {SHAPES_COUNT}"  # seed and count
        return Source(
            "", fingerprint, SHAPES_COUNT, lambda i, size: [*draw_shapes(i, size)[:, None]]
        )
    raise UserError(f"unknown data set {dataset}; choose from {', '.join(DATASETS[1:])}")


def binary_source(archive: Archive, folder: Path) -> Source:
    """Returns the source of the images in an archive's binary files."""
    records = []
    for name, count in archive.contents.items():
        path = folder / name
        if path.stat().st_size != count * archive.record_bytes:
            raise UserError(f"{path} is damaged or incomplete. Delete it to extract it again")
        records += [(path, i * archive.record_bytes) for i in range(count)]

    def open_record(record: tuple[Path, int]) -> Image.Image:
        # Not memory-mapped: the pages would count as memory of this process, 3 GB for STL-10.
        path, offset = record
        pixels = archive.to_pixels(np.fromfile(path, np.uint8, archive.record_bytes, offset=offset))
        return Image.fromarray(np.ascontiguousarray(pixels))

    fingerprint = "".join(f"{n} {file_fingerprint(folder / n)}\n" for n in archive.contents)
    return image_source(folder, fingerprint, records, open_record, None)


@contextmanager
def socket_timeout(seconds: float) -> Iterator[None]:
    """Sets the default socket timeout, without which torchvision may wait forever."""
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)


@socket_timeout(CONNECT_SECONDS)
def ensure_downloaded(archive: Archive, data_dir: Path, use_labels: bool = False) -> None:
    """Extracts an archive's contents if missing; downloads it first if need be."""
    local = data_dir / archive.path
    folder = local.parent
    contents = [*archive.contents, *([archive.label_file] if archive.label_file else [])]
    needed = contents if use_labels else archive.contents
    if all((folder / name).exists() for name in needed):
        return
    advice = f"Get {local.name} from {archive.url} and save it as {local}"
    if "drive.google.com" in archive.url and not local.is_file() and find_spec("gdown") is None:
        raise UserError(f"this download needs gdown. Run `pip install gdown`. Without it: {advice}")
    if local.is_file() and not utils.check_integrity(local, archive.md5):
        raise UserError(f"{local} is damaged or incomplete (MD5 is not {archive.md5}). {advice}")
    try:
        # Files get their final names once they are complete.
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
            packed = local if local.is_file() else Path(temporary, local.name)
            if packed != local:
                utils.download_url(archive.url, temporary, local.name, archive.md5)
            _extract(packed, contents, temporary)
            for name in contents:
                (folder / name).parent.mkdir(exist_ok=True)
                if not (folder / name).exists():  # another process may have been faster
                    os.replace(Path(temporary, name), folder / name)
    except Exception as error:  # urllib, tarfile and zipfile each raise their own
        raise UserError(f"could not download or extract {local} ({error!r}). {advice}") from error


def _extract(packed: Path, contents: Iterable[str], folder: str) -> None:
    """Extracts `contents` and files below them from a .zip or .tar.gz; no links."""
    prefixes = tuple(f"{name}/" for name in contents)

    def is_wanted(name: str) -> bool:
        return f"{name}/".startswith(prefixes) and ".." not in name.split("/")

    if packed.suffix == ".zip":
        with zipfile.ZipFile(packed) as archive:
            archive.extractall(folder, filter(is_wanted, archive.namelist()))
        return
    with tarfile.open(packed) as archive:
        files = (member for member in archive if member.isfile() and is_wanted(member.name))
        # Python before 3.10.12 has no filters and ignores the attribute.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(folder, files)
