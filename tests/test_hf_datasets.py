"""Data sets by Hugging Face `datasets`: files that these tests make, streamed into the cache."""

import importlib.util
import io
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from engine.dataloader import ImageDataset
from engine.datasets import load_dataset
from engine.errors import FallbackWarning, UserError
from engine.image_source import ReadOptions
from tests.helpers import TINY_FLAGS, png, random_images

COUNT = 70  # more than one block
IMAGES = random_images(COUNT, 8)
ANIMALS = ("cat", "dog", "emu")


PNGS = [png(image.transpose(1, 2, 0)) for image in IMAGES]


def test_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"hf:x needs a package\. Run `pip install datasets`"
    ) as error:
        load_dataset("hf:x", 8, tmp_path)
    assert "\n" not in str(error.value)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder for a data set; the cache of `datasets` is next to it."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


def load(dataset: str = "hf:mine", use_labels: bool = True, **options) -> ImageDataset:
    return load_dataset(dataset, 8, Path(), progress=False, use_labels=use_labels, **options)


def write_parquet(folder: Path, **columns) -> None:
    import datasets

    kinds = {"img": datasets.Image(), "fine": datasets.ClassLabel(names=list(ANIMALS))}
    data = datasets.Dataset.from_dict(columns)
    for name, kind in kinds.items():
        if name in columns:
            data = data.cast_column(name, kind)
    data.to_parquet(folder / "train-0.parquet")


def test_parquet_with_declared_columns_is_read_with_class_names(folder):
    images = [{"bytes": png, "path": None} for png in PNGS]
    fine = [*(i % 3 for i in range(COUNT - 1)), None]
    write_parquet(folder, img=images, fine=fine, id=list(range(COUNT)))
    data = load()
    assert np.array_equal(data.images, IMAGES)
    assert data.labels.tolist() == [*fine[:-1], -1] and data.class_names == ANIMALS
    assert load(use_labels=False).labels is None


def test_plain_parquet_is_read_by_the_names_of_its_columns(folder):
    write_parquet(folder, image=PNGS, label=[("b", "a")[i % 2] for i in range(COUNT)])
    data = load()
    assert np.array_equal(data.images, IMAGES)
    assert data.labels.tolist() == [(i + 1) % 2 for i in range(COUNT)]
    assert data.class_names == ("a", "b")


def test_cache_is_read_again_until_the_files_change(folder, monkeypatch):
    write_parquet(folder, image=PNGS, label=[7, 5] * (COUNT // 2))
    first = load()
    with monkeypatch.context() as patch:
        patch.setattr("engine.hf_datasets.read_pixels", None)
        again = load()
    assert again.fingerprint() == first.fingerprint() and again.class_names == ("5", "7")
    write_parquet(folder, image=PNGS[:9], label=[7, 5, 6] * 3)
    assert load().images.shape == (9, 3, 8, 8)


def test_webdataset_is_read(folder):
    with tarfile.open(folder / "train-0.tar", "w") as archive:
        for index, content in enumerate(PNGS):
            for ending, data in (("png", content), ("cls", str(index % 3).encode())):
                info = tarfile.TarInfo(f"{index:05}.{ending}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    data = load()
    assert np.array_equal(data.images, IMAGES)
    assert data.labels.tolist() == [i % 3 for i in range(COUNT)]
    assert data.class_names == ("0", "1", "2")


def test_image_folder_and_arrow_are_read(folder):
    import datasets

    for index, content in enumerate(PNGS[:6]):
        (folder / ANIMALS[index % 3]).mkdir(exist_ok=True)
        (folder / ANIMALS[index % 3] / f"{index}.png").write_bytes(content)
    data = load()
    assert np.array_equal(data.images, IMAGES[[0, 3, 1, 4, 2, 5]])
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2] and data.class_names == ANIMALS

    datasets.load_dataset(str(folder), split="train").save_to_disk("arrow")
    arrow = load("hf:arrow")
    assert np.array_equal(arrow.images, data.images) and arrow.class_names == ANIMALS


def test_columns_are_named_where_they_are_not_clear(folder):
    labels = [i % 2 for i in range(COUNT)]
    write_parquet(folder, left=PNGS, img=PNGS[::-1], png=PNGS, coarse=labels, x=[0.5] * COUNT)
    for dataset, message in (
        ("hf:mine,left", r"no column of labels \(left: binary, .*x: float64\). Name it: --dataset"),
        ("hf:mine,x", r"no images in a column x"),
        ("hf:mine,left,x", r"no labels in a column x"),
        ("hf:mine,a,b,c", r"must look like hf:user/name"),
        ("hf:", r"must look like hf:user/name"),
    ):
        with pytest.raises(UserError, match=message):
            load(dataset)
    data = load("hf:mine,left,coarse")
    assert np.array_equal(data.images, IMAGES) and data.labels.tolist() == labels
    assert np.array_equal(load("hf:mine", use_labels=False).images, IMAGES[::-1])


def test_channels_are_those_asked_for(folder):
    write_parquet(folder, image=PNGS)
    assert load(use_labels=False, options=ReadOptions(channels=1)).images.shape == (COUNT, 1, 8, 8)


def encoded(image: Image.Image, format_: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def test_value_range_is_that_asked_for_and_must_be_for_more_than_8_bits(folder):
    grays = [Image.fromarray(np.full((8, 8), value, np.uint16)) for value in (0, 2000, 4000)]
    write_parquet(folder, image=[encoded(image, "PNG") for image in grays])
    with pytest.raises(
        UserError, match=r"too many of the 3 .* more than 8 bits. Set --value_range"
    ):
        load(use_labels=False)
    for text, expected in (("0,4000", [0, 128, 255]), ("0,8000", [0, 64, 128])):
        data = load(use_labels=False, options=ReadOptions(value_range=text))
        assert data.images[:, 2, 0, 0].tolist() == expected


def test_frames_are_those_asked_for(folder):
    first, *others = (Image.new("L", (8, 8), value) for value in (10, 20, 30))
    gif = encoded(first, "GIF", save_all=True, append_images=others)
    write_parquet(folder, image=[gif, PNGS[0]], label=["b", "a"])
    assert load().images[:-1, 0, 0, 0].tolist() == [10]
    data = load(options=ReadOptions(frames="all"))
    assert data.images[:-1, 0, 0, 0].tolist() == [10, 20, 30] and data.labels.tolist() == [
        1,
        1,
        1,
        0,
    ]


@pytest.mark.parametrize(
    ("image", "value_range", "frames"),
    [(Image.new("RGB", (8, 8)), "", "first"), (Image.new("I;16", (8, 8)), "0,9", "first"),
     (Image.new("L", (8, 8)), "", "all")],
)  # fmt: skip
def test_options_for_other_images_are_left_out_and_the_cache_has_both_names(
    folder, monkeypatch, image, value_range, frames
):
    others = [Image.new("L", (8, 8), 99)] if frames == "all" else []
    write_parquet(folder, image=[encoded(image, "TIFF", save_all=True, append_images=others)])
    data = load(use_labels=False, options=ReadOptions(value_range="0,9", frames="all"))
    assert data.read_as == {"CHANNELS": 3, "VALUE_RANGE": value_range, "FRAMES": frames}
    monkeypatch.setattr("engine.image_cache._build", None)  # a resumed run finds it
    again = load(use_labels=False, options=ReadOptions.from_config(data.read_as))
    assert np.array_equal(again.images, data.images) and again.read_as == data.read_as


@pytest.mark.parametrize("is_declared", [False, True])
def test_slashes_in_class_names_are_hyphens(folder, is_declared):
    import datasets

    names = ["T-shirt / top", "b\\c"]
    labels = datasets.Dataset.from_dict({"image": PNGS[:2], "label": names})
    if is_declared:
        labels = labels.cast_column("label", datasets.ClassLabel(names=names))
    labels.to_parquet(folder / "train-0.parquet")
    assert load().class_names == ("T-shirt - top", "b-c")


def test_unreadable_images_are_left_out_and_too_many_are_refused(folder):
    labels = [i % 3 for i in range(COUNT)]
    write_parquet(folder, image=[b"none", *PNGS[1:]], label=labels)
    with pytest.warns(FallbackWarning, match=r"1 of 70 images .* cannot be read(.|\n)*image 0: "):
        data = load()
    assert np.array_equal(data.images, IMAGES[1:]) and data.labels.tolist() == labels[1:]
    write_parquet(folder, image=[b"none"] * 4 + PNGS[4:], label=labels)
    with pytest.raises(UserError, match="too many of the 70 images"):
        load()


def test_small_images_are_refused(folder):
    write_parquet(folder, image=PNGS)
    with pytest.raises(UserError, match=r"are 8 px, smaller than --image_size 16 \(64 of 64"):
        load_dataset("hf:mine", 16, Path(), progress=False, upsampling=False)


def test_damaged_parquet_is_one_line(folder):
    write_parquet(folder, image=PNGS)
    path = folder / "train-0.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :])
    for upsampling in (False, True):
        with pytest.raises(UserError, match=r"stops after 0 images .*files again") as error:
            load(use_labels=False, upsampling=upsampling)
        assert "\n" not in str(error.value)


def test_other_formats_and_names_are_one_line(folder):
    (folder / "data.csv").write_text("image,label\na,b\n")
    with pytest.raises(UserError, match="mine has csv files, but must have parquet, arrow, "):
        load()
    with pytest.raises(UserError, match=r"hf:nowhere cannot be read \(.*\). It must be user/name"):
        load("hf:nowhere")


def test_other_splits_and_several_configurations_are_listed(folder):
    write_parquet(folder, image=PNGS)
    (folder / "train-0.parquet").rename(folder / "test-0.parquet")
    assert len(load(use_labels=False)) == COUNT  # the only one
    shutil.copy(folder / "test-0.parquet", folder / "validation-0.parquet")
    with pytest.raises(
        UserError, match=r"splits: \['validation', 'test'\].*with a split train or a"
    ):
        load()
    configs = "".join(f"- {{config_name: {n}, data_files: {n}-0.parquet}}\n" for n in ("test", "x"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(
        UserError, match=r"configs: \['test', 'x'\].* It must be .* one configuration"
    ):
        load()


def test_run_trains_on_a_data_set_by_its_name(folder, monkeypatch):
    write_parquet(folder, image=PNGS)
    flags = [*TINY_FLAGS, "--max_steps", "2", "--log_with", "none", "--dataset", "hf:mine"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    train.main()
    (run,) = Path("samples").iterdir()
    assert run.name.startswith("hf-mine-8px-") and (run / "final.png").exists()
