"""Which images each step trains on, and how they reach the device."""

import mmap
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from engine.errors import UserError
from engine.memory import memory_limit

GPU_SHARE = 0.25  # images are held on the GPU if they take less than this share of the memory that we may have
PIECE = 4096  # images copied to the GPU at a time
VALIDATION_IMAGES = 512
VALIDATION_SHARE = 0.05


def split(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and of held-out images: every so many-th is held out, whatever the seed."""
    held_out = np.arange(count)[:: max(count // VALIDATION_IMAGES, round(1 / VALIDATION_SHARE))]
    return np.setdiff1d(np.arange(count), held_out), held_out


def fit_on_gpu(images: np.ndarray) -> bool:
    """Whether images, uint8 (N, C, H, W), are few enough to be held on the GPU, where there is one."""
    return torch.cuda.is_available() and images.nbytes < GPU_SHARE * memory_limit()


def on_device(images: np.ndarray, device: torch.device) -> Tensor:
    """A copy of images, uint8 (N, C, H, W), on the device, made piece by piece.

    What was read of a memory map is let go, lest the whole file count as this process's memory.
    """
    copied = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(images), PIECE):
        copied[start : start + PIECE] = torch.from_numpy(np.array(images[start : start + PIECE]))
        if isinstance(images.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            images.base.madvise(mmap.MADV_DONTNEED)
    return copied


class Batches:
    """The training images, batch by batch; an epoch's order is a function of (seed, epoch) alone.

    images: uint8 (N, C, H, W), in memory or memory-mapped. batch_size is the effective batch; of each batch this
    process gets its own `rank`-th part of `world`. Raises UserError if there are fewer images than one batch, or
    if the batch cannot be shared out equally.
    """

    def __init__(
        self,
        images: np.ndarray,
        batch_size: int,
        seed: int,
        device: torch.device,
        workers: int,
        rank: int = 0,
        world: int = 1,
    ):
        self.training, self.held_out = split(len(images))
        if len(self.training) < batch_size:
            raise UserError(
                f"{len(self.training)} images to train on (of {len(images)}; the others are held out) are fewer than "
                f"one batch of {batch_size}: add images or lower --batch_size and --gradient_accumulation"
            )
        if batch_size % world:
            raise UserError(f"a batch of {batch_size} cannot be shared equally by {world} processes")
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.device, self.workers, self.rank, self.world = device, workers, rank, world
        self.resident: Tensor | None = None
        if device.type == "cuda" and fit_on_gpu(images):
            self.resident = on_device(images, device)

    def __len__(self) -> int:
        """Steps in an epoch; what does not fill a batch waits for the next epoch's order."""
        return len(self.training) // self.batch_size

    def order(self, epoch: int) -> np.ndarray:
        """This process's image indices in the given epoch: (steps, images of this process)."""
        shuffled = np.random.default_rng([self.seed, epoch]).permutation(self.training)
        steps = shuffled[: len(self) * self.batch_size].reshape(len(self), self.world, -1)
        return steps[:, self.rank]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Tensor]:
        """The batches of an epoch from step `start` on: uint8 (images of this process, C, H, W) on the device."""
        order = self.order(epoch)[start:]
        if self.resident is not None:
            for index in torch.from_numpy(order).to(self.device):
                yield self.resident[index]
        elif self.device.type == "cuda":
            loader = DataLoader(
                Rows(self.images, order), batch_size=None, num_workers=self.workers, pin_memory=True, prefetch_factor=4
            )
            for batch in loader:
                yield batch.to(self.device, non_blocking=True)
        else:
            for index in order:
                yield torch.from_numpy(self.images[index]).to(self.device)

    def validation(self) -> Tensor:
        """The held-out images, uint8 (V, C, H, W), on the CPU."""
        return torch.from_numpy(self.images[self.held_out])


class Rows(Dataset):
    """Whole batches out of a memory map, for worker processes."""

    def __init__(self, images: np.ndarray, order: np.ndarray):
        self.images, self.order = images, order

    def __reduce__(self):
        """A worker that is not forked opens the file itself: pickled, the map would be a copy of all images."""
        if isinstance(self.images.base, mmap.mmap):
            return opened, (self.images.filename, self.images.offset, self.images.shape, self.order)
        return Rows, (self.images, self.order)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, step: int) -> Tensor:
        return torch.from_numpy(self.images[self.order[step]])


def opened(path: str, offset: int, shape: tuple[int, ...], order: np.ndarray) -> Rows:
    """Rows of the uint8 images that lie in a file from `offset` on."""
    return Rows(np.memmap(path, np.uint8, "r", offset, shape), order)
