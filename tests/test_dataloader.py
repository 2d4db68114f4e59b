"""engine/dataloader.py: splits, the order of an epoch, labels, memory maps."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import dataloader
from engine.dataloader import (
    Batch,
    BatchLoader,
    ImageDataset,
    as_batch,
    read_ahead,
    train_val_split,
)
from engine.errors import UserError
from tests.helpers import CPU, random_images


def numbered(count: int, **labels) -> ImageDataset:
    """Images that are filled with their own index."""
    index = np.arange(count, dtype=np.uint8)[:, None, None, None]
    return ImageDataset(np.tile(index, (1, 3, 4, 4)), **labels)


def labeled(count: int) -> ImageDataset:
    """Numbered images whose label is 1000 plus their index."""
    return numbered(count, labels=1000 + np.arange(count))


def numbers(batch: Batch) -> list[int]:
    """The indices of numbered images."""
    return batch.images[:, 0, 0, 0].tolist()


def save_memmap(path: Path, images: np.ndarray) -> np.ndarray:
    np.save(path, images)
    return np.load(path, mmap_mode="r")


# Fingerprints.


def test_fingerprint_depends_on_shape_and_images_alone(tmp_path, monkeypatch):
    data = labeled(200)
    known = ImageDataset(data.images).fingerprint()
    assert known == "28843bf0a5d32bbe"  # on every machine
    mapped = save_memmap(tmp_path / "images.npy", data.images)
    assert ImageDataset(mapped).fingerprint() == data.fingerprint() == known
    images = data.images.copy()
    images[123, 1, 2, 3] += 1
    others = images, data.images.reshape(200, 3, 2, 8)
    assert len({known, *(ImageDataset(other).fingerprint() for other in others)}) == 3

    # Of much data, every n-th image is hashed.
    monkeypatch.setattr(dataloader, "FINGERPRINT_BYTES", data.images.nbytes // 3)
    sampled = [ImageDataset(x).fingerprint() for x in (data.images, images)]
    assert sampled[0] != sampled[1]
    images[123] = data.images[123]
    images[124] += 1
    assert ImageDataset(images).fingerprint() == sampled[0]


# Splits.


def test_train_val_split_takes_one_in_twenty_up_to_about_512():
    assert train_val_split(200)[1].tolist() == list(range(0, 200, 20))
    assert train_val_split(51200)[1].tolist() == list(range(0, 51200, 100))
    assert len(train_val_split(2)[1]) == 1


def test_batch_loader_validates_on_exactly_the_validation_split():
    batch = BatchLoader(labeled(200), 16, 0, CPU, 1).validation()
    assert numbers(batch) == list(range(0, 200, 20))
    assert batch.labels.tolist() == list(range(1000, 1200, 20))


# The order of an epoch.


def test_batch_loader_order_has_every_training_image_once_divided_between_ranks():
    data = numbered(200)
    single = BatchLoader(data, 16, 7, CPU, 1)
    ranks = [BatchLoader(data, 16, 7, CPU, 1, rank, 4) for rank in range(4)]
    train_indices, val_indices = train_val_split(200)
    assert len(val_indices) == 10 and not set(val_indices) & set(train_indices)
    assert len(single) == 11 and len(np.unique(single.order(3))) == 11 * 16
    assert set(single.order(3).flat) <= set(train_indices)
    local = [loader.order(3) for loader in ranks]
    assert np.array_equal(np.concatenate(local, axis=1), single.order(3))
    assert not np.array_equal(single.order(3), single.order(4))
    assert len(list(single.epoch(3, start=4))) == 7


def test_batch_loader_order_differs_for_every_seed_and_epoch():
    loaders = [BatchLoader(numbered(200), 16, seed, CPU, 1) for seed in range(4)]
    orders = {tuple(loader.order(epoch).flatten()) for loader in loaders for epoch in range(4)}
    assert len(orders) == 16


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("make", [numbered, labeled])
def test_batch_loader_epoch_yields_images_and_labels_in_order(make, on_gpu):
    loader = BatchLoader(make(200), 16, 0, CPU, 1, rank=1, world_size=2)
    if on_gpu:
        labels = as_batch(loader.data).labels
        loader.gpu_data = Batch(dataloader.copy_to_device(loader.data.images, CPU), labels)
    batches = list(loader.epoch(5, start=2))
    order = loader.order(5)[2:]
    assert [numbers(batch) for batch in batches] == order.tolist()
    assert not set(range(0, 200, 20)) & {n for batch in batches for n in numbers(batch)}
    labels = [batch.labels if batch.labels is None else batch.labels.tolist() for batch in batches]
    assert labels == ((order + 1000).tolist() if make is labeled else [None] * len(order))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((256, 0, CPU, 1), "fewer than one batch of 256"),
     ((16, 0, CPU, 1, 0, 3), "by 3 ranks. Make --batch_size a multiple of 3")],
)  # fmt: skip
def test_batch_loader_rejects_batch_sizes(arguments, message):
    with pytest.raises(UserError, match=message):
        BatchLoader(numbered(200), *arguments)


# Batches.


@pytest.mark.parametrize("labels", [None, torch.arange(5)])
def test_batch_slices_and_moves_images_and_labels_together(labels):
    batch = Batch(torch.arange(5).view(5, 1, 1, 1), labels)
    assert batch[0] is batch.images and batch[1] is batch.labels
    for index in (slice(1, 3), torch.tensor([4, 0])):
        part = batch.take(index).to(CPU)
        assert torch.equal(part.images, batch.images[index])
        assert part.labels is None if labels is None else torch.equal(part.labels, labels[index])


# Memory maps.


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_read_ahead_yields_in_order_and_reads_two_ahead_per_thread(threads):
    taken = []

    def items() -> Iterator[int]:
        for item in range(20):
            taken.append(item)
            yield item

    values = read_ahead(lambda item: 10 * item, items(), threads)
    for number, value in enumerate(values):
        assert value == 10 * number
        assert len(taken) == min(20, number + 1 + 2 * threads)
    assert number == 19


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's RssFile")
def test_copy_to_device_releases_the_pages_of_a_memory_map(tmp_path, monkeypatch):
    def mapped_bytes() -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.split("RssFile:")[1].split()[0]) * 1024

    images = random_images(20_000, 32)
    mapped = save_memmap(tmp_path / "images.npy", images)
    monkeypatch.setattr(dataloader, "COPY_CHUNK", 1000)
    before = mapped_bytes()
    copied = dataloader.copy_to_device(mapped, CPU)
    assert mapped_bytes() - before < images.nbytes / 4
    assert torch.equal(copied, torch.from_numpy(images))
    # A plain read does count.
    assert np.array_equal(mapped, images)
    assert mapped_bytes() - before > images.nbytes / 2
