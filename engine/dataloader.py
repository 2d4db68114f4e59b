"""Batches: which images each step trains on, and how they reach the device."""

import hashlib
import mmap
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from engine.errors import RenamedWarning, UserError
from engine.gpu_memory import usable_memory

MAX_GPU_FRACTION = 0.25  # of the GPU memory we may use; larger data sets are streamed by threads
COPY_CHUNK = 4096  # images copied to the GPU at a time
MAX_VALIDATION_IMAGES = 512  # or a few more, so that they are evenly spaced
VALIDATION_FRACTION = 0.05
FINGERPRINT_BYTES = 2**28  # hashed of the images; of a larger data set every n-th image is
S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class ImageDataset:
    """Images and their labels, if any."""

    images: np.ndarray  # uint8 (N, C, H, W), often memory-mapped
    labels: np.ndarray | None = None  # int64 (N,), indices into class_names; -1: no label
    class_names: tuple[str, ...] = ()
    # Settings of ReadOptions that read the same images, without those that change nothing; if known
    read_as: Mapping[str, Any] = field(default_factory=dict)

    @property
    def class_counts(self) -> dict[str, int]:
        """The number of images of each class by its name."""
        if self.labels is None:
            return {}
        counts = np.bincount(self.labels + 1, minlength=len(self.class_names) + 1)[1:]
        return dict(zip(self.class_names, counts.tolist(), strict=True))

    @property
    def classes(self) -> dict[str, int]:
        """The former name of class_counts."""
        warnings.warn("classes is now class_counts", RenamedWarning, stacklevel=2)
        return self.class_counts

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: np.ndarray | slice) -> "ImageDataset":
        """Returns the images and labels at an index array or slice."""
        labels = None if self.labels is None else self.labels[index]
        return ImageDataset(self.images[index], labels, self.class_names)

    def fingerprint(self) -> str:
        """Returns a hash of shape and images, 16 hex digits."""
        stride = -(-self.images.nbytes // FINGERPRINT_BYTES) or 1
        digest = hashlib.blake2b(repr(self.images.shape).encode(), digest_size=8)
        for image in self.images[::stride]:
            digest.update(np.ascontiguousarray(image))
        return digest.hexdigest()


class Batch(NamedTuple):
    """One step's images, uint8 (B, C, H, W), and labels, int64 (B,), if any."""

    images: Tensor
    labels: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch on a device."""
        is_cuda = device.type == "cuda"  # other backends may read memory that is freed by then
        return Batch(*(x if x is None else x.to(device, non_blocking=is_cuda) for x in self))

    def pin_memory(self) -> "Batch":
        """Returns the batch in memory from which a GPU copies without the host's waiting."""
        return Batch(*(x if x is None else x.pin_memory() for x in self))

    def take(self, index: slice | Tensor) -> "Batch":
        """Returns the images and labels at a slice or index tensor."""
        return Batch(*(x if x is None else x[index] for x in self))


def as_batch(data: ImageDataset) -> Batch:
    """Returns a data set as one batch of tensors that share its memory."""
    labels = None if data.labels is None else torch.from_numpy(data.labels)
    return Batch(torch.from_numpy(data.images), labels)


def train_val_split(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns training and validation indices: every N-th image validates."""
    stride = max(count // MAX_VALIDATION_IMAGES, round(1 / VALIDATION_FRACTION))
    validation = np.arange(count)[::stride]
    return np.setdiff1d(np.arange(count), validation), validation


def fits_on_gpu(images: np.ndarray) -> bool:
    """Whether a GPU can hold the images in addition to a model."""
    return torch.cuda.is_available() and images.nbytes < MAX_GPU_FRACTION * usable_memory()


def copy_to_device(images: np.ndarray, device: torch.device) -> Tensor:
    """Copies images to the device in chunks; releases copied pages of a memory map."""
    copied = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(images), COPY_CHUNK):
        chunk = np.array(images[start : start + COPY_CHUNK])
        copied[start : start + COPY_CHUNK] = torch.from_numpy(chunk)
        if isinstance(images.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            images.base.madvise(mmap.MADV_DONTNEED)
    return copied


def read_ahead(read: Callable[[T], S], items: Iterable[T], threads: int) -> Iterator[S]:
    """Yields read(item) of all items in order, at most two ahead per thread.

    Threads are enough: numpy and Pillow release the GIL, and nothing is copied between processes.
    """
    if threads == 0:
        yield from map(read, items)
        return
    pending = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            pending.append(pool.submit(read, item))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class BatchLoader:
    """Training batches; an epoch's order is a function of (seed, epoch) alone.

    effective_batch: images of an update, of which each rank gets an equal part. workers: threads
    that read the images if they do not fit on the GPU. Raises UserError if there are fewer training
    images than one batch, or if the batch cannot be divided by the number of ranks.
    """

    def __init__(
        self, data: ImageDataset, effective_batch: int, seed: int, device: torch.device,
        workers: int, rank: int = 0, world_size: int = 1,
    ):  # fmt: skip
        self.train_indices, self.val_indices = train_val_split(len(data))
        if len(self.train_indices) < effective_batch:
            found = f"{len(self.train_indices)} training images (of {len(data)})"
            advice = "Add data or lower --batch_size and --gradient_accumulation"
            raise UserError(f"{found} are fewer than one batch of {effective_batch}. {advice}")
        if effective_batch % world_size:
            reason = f"a batch of {effective_batch} cannot be divided by {world_size} ranks"
            raise UserError(f"{reason}. Make --batch_size a multiple of {world_size}")
        self.data = data
        self.effective_batch = effective_batch
        self.seed = seed
        self.device = device
        self.workers = workers
        self.rank = rank
        self.world_size = world_size
        self.gpu_data: Batch | None = None  # the complete data set, if it fits
        if device.type == "cuda" and fits_on_gpu(data.images):
            labels = None if data.labels is None else torch.from_numpy(data.labels).to(device)
            self.gpu_data = Batch(copy_to_device(data.images, device), labels)

    def __len__(self) -> int:
        """Steps in an epoch; images that do not fill a batch are left out of this epoch."""
        return len(self.train_indices) // self.effective_batch

    def order(self, epoch: int) -> np.ndarray:
        """Returns this rank's image indices of an epoch: (steps, local batch)."""
        shuffled = np.random.default_rng([self.seed, epoch]).permutation(self.train_indices)
        steps = shuffled[: len(self) * self.effective_batch].reshape(len(self), self.world_size, -1)
        return steps[:, self.rank]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields this rank's batches of an epoch from step `start` on, on the device."""
        order = self.order(epoch)[start:]
        if self.gpu_data is not None:
            for index in torch.from_numpy(order).to(self.device):
                yield self.gpu_data.take(index)
            return
        is_cuda = self.device.type == "cuda"
        threads = self.workers if is_cuda else 0
        for batch in read_ahead(lambda index: as_batch(self.data[index]), order, threads):
            yield (batch.pin_memory() if is_cuda else batch).to(self.device)

    def validation(self) -> Batch:
        """Returns the validation split, on the CPU."""
        return as_batch(self.data[self.val_indices])
