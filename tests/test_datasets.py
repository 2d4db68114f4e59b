"""engine/datasets.py: pixels and order of every source, downloads, errors."""

import io
import socket
import sys
import tarfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CelebA
from torchvision.datasets.utils import _get_google_drive_file_id, calculate_md5

import train
from config import resolve
from engine import datasets
from engine.dataloader import ImageDataset
from engine.datasets import choose_default_dataset, images_from_loader, load_dataset
from engine.errors import FallbackWarning, UserError
from engine.image_source import ReadOptions
from engine.shapes import draw_shapes, kind_of
from tests.helpers import (
    CPU_TIER,
    TINY_FLAGS,
    change_archive,
    random_images,
    save_gray,
    write_tar,
    write_zip,
)

STL10_NAMES = ("stl10_binary/train_X.bin", "stl10_binary/unlabeled_X.bin")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments):
        raise URLError("no route to host")

    monkeypatch.setattr(datasets.utils, "download_url", refuse)
    monkeypatch.setattr(datasets, "find_spec", lambda name: name)


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def cifar10_files(images: np.ndarray) -> dict[str, bytes]:
    """The five files: of each image a label byte and its planes of rows."""
    labels = np.full((len(images), 1), 7, np.uint8)
    records = np.concatenate([labels, images.reshape(len(images), -1)], axis=1).reshape(5, -1)
    names = datasets.ARCHIVES["cifar10"].contents
    return {name: part.tobytes() for name, part in zip(names, records, strict=True)}


def stl10_files(images: np.ndarray) -> dict[str, bytes]:
    """The two files, of 2 and 3 images: their planes of columns; and the labels of the first."""
    by_columns = np.ascontiguousarray(images.transpose(0, 1, 3, 2))
    parts = (by_columns[:2].tobytes(), by_columns[2:].tobytes(), bytes([10, 1]))
    return dict(zip((*STL10_NAMES, "stl10_binary/train_y.bin"), parts, strict=True))


@pytest.fixture
def cifar10(monkeypatch):
    """Ten images in place of the 50,000."""
    names = datasets.ARCHIVES["cifar10"].contents
    change_archive(monkeypatch, "cifar10", contents=dict.fromkeys(names, 2))
    return random_images(10, 32)


@pytest.fixture
def stl10(monkeypatch):
    """Five images in place of the 105,000."""
    change_archive(monkeypatch, "stl10", contents=dict(zip(STL10_NAMES, (2, 3), strict=True)))
    return random_images(5, 96)


# Named data sets.


def test_archives_have_the_published_counts():
    counts = {name: archive.contents for name, archive in datasets.ARCHIVES.items()}
    assert sum(counts["cifar10"].values()) == 50_000
    assert [name[-5] for name in counts["cifar10"]] == list("12345")
    assert counts["stl10"] == dict(zip(STL10_NAMES, (5_000, 100_000), strict=True))


def test_cifar10_is_read_from_its_binary_records(load, cifar10):
    write_files(load.data, cifar10_files(cifar10))
    np.testing.assert_array_equal(load("cifar10", 32), cifar10)


def test_cifar10_download_leaves_only_the_extracted_files(load, cifar10, monkeypatch, tmp_path):
    write_tar(tmp_path / "remote.tar.gz", cifar10_files(cifar10))

    def download(url, folder, name, md5):
        Path(folder, name).write_bytes((tmp_path / "remote.tar.gz").read_bytes())

    monkeypatch.setattr(datasets.utils, "download_url", download)
    np.testing.assert_array_equal(load("cifar10", 32), cifar10)
    assert [path.name for path in load.data.iterdir()] == ["cifar-10-batches-bin"]


def test_cifar10_names_a_truncated_file(load, cifar10):
    files = cifar10_files(cifar10)
    name = "cifar-10-batches-bin/data_batch_3.bin"
    write_files(load.data, files | {name: files[name][:3073]})
    with pytest.raises(UserError, match=r"data_batch_3\.bin is damaged or incomplete"):
        load("cifar10", 32)


def test_stl10_planes_are_stored_by_columns(load, stl10):
    write_files(load.data, stl10_files(stl10))
    np.testing.assert_array_equal(load("stl10", 96), stl10)


def test_stl10_uses_an_archive_saved_by_hand(load, stl10, monkeypatch):
    others = ("test_X.bin", "class_names.txt")
    path = load.data / "stl10_binary.tar.gz"
    files = {f"stl10_binary/{name}": b"1" for name in others} | stl10_files(stl10)
    write_tar(path, files)
    with pytest.raises(UserError, match=r"stl10_binary\.tar\.gz is damaged or incomplete"):
        load("stl10", 96)
    change_archive(monkeypatch, "stl10", md5=calculate_md5(path))
    np.testing.assert_array_equal(load("stl10", 96), stl10)
    extracted = {path.name for path in (load.data / "stl10_binary").iterdir()}
    assert extracted == {"train_X.bin", "train_y.bin", "unlabeled_X.bin"}


def test_stl10_extracted_without_labels_still_trains_without_them(load, stl10):
    files = stl10_files(stl10)
    write_files(load.data, {name: files[name] for name in STL10_NAMES})
    np.testing.assert_array_equal(load("stl10", 96), stl10)


def test_celeba_uses_a_zip_saved_by_hand(load, monkeypatch, capsys):
    path = load.data / "celeba" / "img_align_celeba.zip"
    path.parent.mkdir()
    files = {}
    for i, color in enumerate(("red", "lime", "blue")):
        jpeg = io.BytesIO()
        Image.new("RGB", (178, 218), color).save(jpeg, "JPEG", quality=100)
        files[f"img_align_celeba/{i:06d}.jpg"] = jpeg.getvalue()
    write_zip(path, files)
    with pytest.raises(UserError, match=r"img_align_celeba\.zip is damaged or incomplete"):
        load("celeba", 64)
    change_archive(monkeypatch, "celeba", md5=calculate_md5(path))
    expected = np.broadcast_to(255 * np.eye(3)[:, :, None, None], (3, 3, 64, 64))
    extract = datasets._extract

    def extract_late(*arguments) -> None:
        extract(path, datasets.ARCHIVES["celeba"].contents, path.parent)  # by another process
        extract(*arguments)

    monkeypatch.setattr(datasets, "_extract", extract_late)
    np.testing.assert_allclose(load("celeba", 64), expected, atol=3)  # JPEG
    assert "--channels" not in capsys.readouterr().out  # there is no choice


def test_shapes_is_the_first_images(load, monkeypatch):
    monkeypatch.setattr(datasets, "SHAPES_COUNT", 100)
    np.testing.assert_array_equal(load("shapes", 16), draw_shapes(np.arange(100), 16, seed=0))


def test_load_dataset_rejects_unknown_names(load):
    with pytest.raises(UserError, match="unknown data set mnist; choose from cifar10, "):
        load("mnist")


# Labels.


def load_labeled(load, dataset: str, size: int) -> ImageDataset:
    return load_dataset(dataset, size, load.data, load.cache, progress=False, use_labels=True)


def test_cifar10_labels_are_the_first_bytes(load, cifar10):
    write_files(load.data, cifar10_files(cifar10))
    data = load_labeled(load, "cifar10", 32)
    assert data.labels.tolist() == [7] * 10 and data.class_names[7] == "horse"
    assert data.class_counts == dict.fromkeys(data.class_names, 0) | {"horse": 10}


def test_stl10_labels_start_at_1_and_unlabeled_images_have_none(load, stl10):
    write_files(load.data, stl10_files(stl10))
    data = load_labeled(load, "stl10", 96)
    assert data.labels.tolist() == [9, 0, -1, -1, -1]
    assert data.class_counts == dict.fromkeys(data.class_names, 0) | {"truck": 1, "airplane": 1}


def test_shapes_are_labeled_by_kind(load, monkeypatch):
    monkeypatch.setattr(datasets, "SHAPES_COUNT", 100)
    data = load_labeled(load, "shapes", 8)
    assert data.class_names == ("circle", "square", "triangle", "star")
    np.testing.assert_array_equal(data.labels, kind_of(np.arange(100)))


# Downloads and archives.


@pytest.mark.parametrize(
    ("dataset", "path"),
    [
        ("cifar10", "cifar-10-binary.tar.gz"),
        ("stl10", "stl10_binary.tar.gz"),
        ("celeba", "celeba/img_align_celeba.zip"),
    ],
)
def test_missing_dataset_without_network_says_which_file_to_save_where(
    load, no_network, dataset, path
):
    with pytest.raises(UserError) as caught:
        load(dataset, 32)
    message = str(caught.value)
    assert "no route to host" in message and "\n" not in message
    assert message.endswith(f"save it as {load.data / path}")
    assert not [file for file in load.data.rglob("*") if file.is_file()]


@pytest.mark.parametrize("dataset", ["cifar10", "stl10", "celeba"])
def test_download_requests_the_archive_with_a_timeout(load, monkeypatch, dataset):
    requests = []

    def download(*arguments):
        requests.append((*arguments, socket.getdefaulttimeout()))
        raise OSError("stopped")

    monkeypatch.setattr(datasets.utils, "download_url", download)
    monkeypatch.setattr(datasets, "find_spec", lambda name: name)
    before = socket.getdefaulttimeout()
    with pytest.raises(UserError, match="stopped"):
        load(dataset)
    archive = datasets.ARCHIVES[dataset]
    ((url, folder, name, md5, seconds),) = requests
    assert (url, md5, seconds) == (archive.url, archive.md5, datasets.CONNECT_SECONDS)
    assert name == Path(archive.path).name and load.data in Path(folder).parents
    assert socket.getdefaulttimeout() == before


def test_celeba_without_gdown_says_what_to_install_before_anything_else(load, monkeypatch):
    monkeypatch.setattr(datasets, "find_spec", lambda name: None)
    monkeypatch.setattr(datasets.utils, "download_url", lambda *_: pytest.fail("tried"))
    with pytest.raises(UserError, match=r"needs gdown\. Run `pip install g.*save it as .*\.zip$"):
        load("celeba")


def test_celeba_is_downloaded_from_google_drive():
    drive_id, md5, _ = next(x for x in CelebA.file_list if x[2] == "img_align_celeba.zip")
    archive = datasets.ARCHIVES["celeba"]
    assert (_get_google_drive_file_id(archive.url), archive.md5) == (drive_id, md5)


@pytest.mark.parametrize("name", ["archive.zip", "archive.tar.gz"])
def test_archive_yields_its_contents_only_and_never_leaves_its_folder(load, monkeypatch, name):
    png = io.BytesIO()
    Image.new("L", (4, 4), 7).save(png, "PNG")
    path = load.data / "celeba" / name
    folder = "img_align_celeba"
    wanted = f"{folder}/a/0.png"
    others = (
        "other.png", f"{folder}_too/0.png", "../escaped.png", f"x/{folder}/0.png",
        f"{folder}/a/../../../escaped.png",
    )  # fmt: skip
    path.parent.mkdir()
    write = write_zip if path.suffix == ".zip" else write_tar
    write(path, dict.fromkeys((wanted, *others), png.getvalue()))
    change_archive(monkeypatch, "celeba", path=f"celeba/{name}", md5=calculate_md5(path))
    assert load("celeba")[:, 0, 0, 0].tolist() == [7]
    files = {file for file in load.data.parent.rglob("*") if file.is_file()}
    outside_cache = {file for file in files if load.cache not in file.parents}
    assert outside_cache == {path, load.data / "celeba" / wanted}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_tar_archive_yields_no_links(tmp_path, kind):
    path = tmp_path / "archive.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        entry = tarfile.TarInfo("x/link")
        entry.type = kind
        entry.linkname = "/etc/hostname"
        archive.addfile(entry)
    datasets._extract(path, ["x"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The default data set.


def test_choose_default_dataset_takes_cifar10_only_with_a_gpu_and_the_files(
    load, cifar10, no_network, monkeypatch, capsys
):
    def choose(has_gpu: bool, folder: Path = load.data) -> tuple[str, list[str]]:
        chosen = choose_default_dataset(folder, has_gpu)
        return chosen, capsys.readouterr().out.splitlines()

    line = r"no CIFAR-10 .*cifar-10-binary.tar.gz.*; continuing with the built-in shapes. Use --da"
    with pytest.warns(FallbackWarning, match=line):
        assert choose(has_gpu=True) == ("shapes", [])

    write_files(load.data, cifar10_files(cifar10))
    assert choose(has_gpu=True) == ("cifar10", [])
    assert choose(has_gpu=False) == ("shapes", [
        "dataset: built-in shapes (no CUDA GPU found; CIFAR-10 would take days). Use --dataset "
        "cifar10 to override, or --dataset folder --data_dir DIR for your own images."
    ])  # fmt: skip

    def fail(*arguments):
        pytest.fail("tried to download without a GPU")

    monkeypatch.setattr(datasets.utils, "download_url", fail)
    assert choose(has_gpu=False, folder=load.data / "missing")[0] == "shapes"


def test_choose_default_dataset_without_download_expects_cifar10(load, monkeypatch):
    monkeypatch.setattr(datasets, "ensure_downloaded", lambda *_: pytest.fail("tried"))
    assert choose_default_dataset(load.data, True, download=False) == "cifar10"


@pytest.mark.parametrize(
    ("dataset", "count", "num_classes"),
    [
        ("cifar10", 50_000, 10),
        ("stl10", 105_000, 10),
        ("celeba", 202_599, 0),
        ("shapes", 20_480, 4),
    ],
)
def test_placeholder_has_as_many_images_as_the_data_set(dataset, count, num_classes):
    data = datasets.placeholder(dataset, 16)
    assert data.images.shape == (count, 3, 16, 16) and data.labels is None
    if num_classes:
        labeled = datasets.placeholder(dataset, 16, use_labels=True)
        assert len(labeled.class_counts) == num_classes
        assert len(labeled) == sum(labeled.class_counts.values())
    else:
        with pytest.raises(UserError, match="celeba has no labels"):
            datasets.placeholder(dataset, 16, use_labels=True)
    assert datasets.placeholder("folder", 16) is None


def test_choose_default_dataset_prints_on_rank_0_only(load, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert choose_default_dataset(load.data, has_gpu=False) == "shapes"
    assert not capsys.readouterr().out


# Resolution.


def test_load_dataset_without_upsampling_rejects_small_images(load, cifar10, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "SHAPES_COUNT", 10)

    def error(dataset: str, folder: str = "data") -> str:
        with pytest.raises(UserError) as caught:
            load(dataset, 64, folder, upsampling=False)
        return str(caught.value)

    write_files(load.data, cifar10_files(cifar10))
    assert error("cifar10") == (
        f"images in {load.data} are 32 px, smaller than --image_size 64 (10 of 10 checked). "
        "Use --image_size 32, or --use_upsampling"
    )
    for i in range(5):  # the shorter side counts
        save_gray(tmp_path / "mixed" / f"{i}.png", 0, (90, 40))
        if i < 4:
            save_gray(tmp_path / "mixed" / f"{i}b.png", 0, (70, 64))
    assert "(5 of 9 checked)" in error("folder", "mixed")
    save_gray(tmp_path / "mixed" / "more.png", 0, (64, 64))  # now half of them are large enough
    assert len(load("folder", 64, "mixed", upsampling=False)) == 10
    assert len(load("shapes", 64, upsampling=False)) == 10
    assert len(load("cifar10", 64)) == 10


@pytest.mark.parametrize(("side", "works"), [(28, 24), (5, 8), (100, 96), (150, 144)])
def test_load_dataset_names_a_size_that_the_levels_can_halve(load, side, works):
    save_gray(load.data / "a.png", 0, (side, side))
    joined = ", or" if works <= side else " with"
    for size in (256, 8) if side < 8 else (256,):
        with pytest.raises(UserError, match=f"Use --image_size {works}{joined} --use_upsampling"):
            load(size=size, upsampling=False)
    resolve("folder", CPU_TIER, flags={"IMAGE_SIZE": works})


def test_load_dataset_takes_the_size_that_all_images_have(load):
    save_gray(load.data / "a.png", 1, (9, 6))
    save_gray(load.data / "b.png", 2, (6, 6))
    assert load(size=0).shape == (2, 1, 6, 6)
    save_gray(load.data / "c.png", 3, (16, 8))
    with pytest.raises(UserError, match=r"have 6 to 8 px\. Set --image_size"):
        load(size=0)
    with pytest.raises(UserError, match=r"images in shapes have any size\. Set --image_size"):
        load("shapes", 0)
    for name in "abc":
        (load.data / f"{name}.png").write_bytes(b"no image")
    for size in (0, 8):
        with pytest.raises(UserError, match=r"no image that was looked at in .* can be opened"):
            load(size=size, upsampling=False)


def test_channels_are_for_folders(load, monkeypatch):
    save_gray(load.data / "a.png", 1)
    assert load(options=ReadOptions(channels=4)).shape == (1, 4, 4, 4)
    refusal = "1 channels are for folders and hf:NAME, but shapes is RGB"
    with pytest.raises(UserError, match=refusal):
        load("shapes", options=ReadOptions(channels=1))
    with pytest.raises(UserError, match=refusal):
        datasets.placeholder("shapes", 8, channels=1)
    flags = [*TINY_FLAGS, "--channels", "1", "--dry_run"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(UserError, match=refusal):
        train.main()


# Data loaders.


def test_images_from_loader_accepts_tensors_arrays_and_tuples():
    images = torch.from_numpy(random_images(5, 8))
    labels = torch.zeros(3)
    batches = [(images[:3].float() / 255, labels), images[3:4].double() / 255, [images[4:].numpy()]]
    copied = images_from_loader(batches)
    assert copied.dtype == np.uint8
    np.testing.assert_array_equal(copied, images.numpy())
    assert images_from_loader([torch.full((1, 3, 8, 8), 0.999)]).min() == 255  # rounded
    flipped = images.numpy()[..., ::-1]
    np.testing.assert_array_equal(images_from_loader([flipped]), flipped)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "the loader is empty"),
        ([{"image": torch.zeros(2, 3, 8, 8)}], "dict"),
        ([torch.zeros(3, 8, 8)], r"\(B, C <= 4, H, W\)"),
        ([torch.zeros(2, 8, 8, 3)], r"\(B, C <= 4, H, W\)"),
        ([torch.zeros(0, 3, 8, 8)], r"\(B, C <= 4, H, W\)"),
        ([torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 9, 9)], "one shape, not .* 9, 9"),
        ([torch.zeros(2, 3, 8, 8, dtype=torch.int64)], "int64"),
        ([torch.full((2, 3, 8, 8), -1.0)], "from -1 to -1"),
        ([np.full((2, 3, 8, 8), 7, np.uint16)], "uint16 from 7 to 7"),
        ([np.full((2, 3, 8, 8), "x")], "begin with numbers, not ndarray"),
        ([torch.full((2, 3, 8, 8), float("nan"))], "nan"),
    ],
)
def test_images_from_loader_rejects_other_batches(batches, message):
    with pytest.raises(UserError, match=message):
        images_from_loader(batches)
