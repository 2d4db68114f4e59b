"""Labels: of seeds, in files, given to the model's methods, compared on resume."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from config import Config, resolve
from ddpm_model import DDPMModel
from engine import labels, plots
from engine.dataloader import Batch, ImageDataset
from engine.datasets import load_dataset
from engine.errors import UserError
from engine.labels import check_classes_on_resume, labels_in_proportion, parse_classes
from engine.train_step import TrainStep
from engine.trainer import train
from tests.helpers import (
    API_FLAGS,
    CPU_TIER,
    STEP_SETTINGS,
    checkpoint_weights,
    random_images,
    save_gray,
)

CLASSES = {"cat": 3, "dog": 1}


def configure(**changes) -> Config:
    return resolve("folder", CPU_TIER, flags=API_FLAGS | changes)


def conditional() -> DDPMModel:
    """A small model whose classes differ."""
    torch.manual_seed(0)
    size = {"image_size": 8, "dim": 8, "dim_mults": (1, 2)}
    model = DDPMModel(**size, timesteps=40, sampling_timesteps=4, class_counts=CLASSES)
    model.unet.class_embedding.weight.data.normal_()
    return model


def test_labels_are_in_proportion_for_any_consecutive_seeds():
    counts = [5, 0, 3, 2]
    for first in (0, 7_777, 10**17):
        labels = labels_in_proportion(range(first, first + 1000), counts)
        found = np.bincount(labels, minlength=4)
        np.testing.assert_allclose(found, [500, 0, 300, 200], atol=4)
    some = labels_in_proportion([3, 10**17 + 5], counts)
    assert some[0] == labels_in_proportion(range(10), counts)[3] and some[1] == labels[5]


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("dog, cat", "cat dog cow", [1, 0]),
        ("0-1,2", "cat dog cow", [0, 1, 2]),
        ("dog-cow", "cat dog cow", [1, 2]),
        ("t-shirt,dog", "cat dog t-shirt", [2, 1]),
        ("cat-t-shirt", "cat dog t-shirt", [0, 1, 2]),
        ("2", "1 10 2", [2]),  # a name
        ("cat,cat", "cat dog", [0]),
    ],
)
def test_parse_classes_reads_names_numbers_and_ranges(text, names, expected):
    assert parse_classes(text, names.split()) == expected


def test_parse_classes_finds_names_with_spaces_around_them():
    assert parse_classes(" 50, cat", ["cat", " 50"]) == [1, 0]


@pytest.mark.parametrize(("text", "forward"), [("2-0", "0-2"), ("t-shirt-dog", "dog-t-shirt")])
def test_parse_classes_refuses_a_reversed_range(text, forward):
    with pytest.raises(UserError, match=f"reversed range {text}. Write {forward}"):
        parse_classes(text, ["cat", "dog", "t-shirt"])


def load_labeled(load, dataset: str, size: int) -> ImageDataset:
    return load_dataset(dataset, size, load.data, load.cache, progress=False, use_labels=True)


def test_folder_labels_are_the_first_folders_in_order(load):
    values = {"dog/a.png": 3, "cat/x/b.png": 1, "cat/a.png": 0, "dog/.hidden.png": 9}
    for name, value in values.items():
        save_gray(load.data / name, value)
    data = load_labeled(load, "folder", 4)
    assert data.class_names == ("cat", "dog") and data.class_counts == {"cat": 2, "dog": 1}
    assert dict(zip(data.images[:, 0, 0, 0].tolist(), data.labels.tolist(), strict=True)) == {
        0: 0, 1: 0, 3: 1,
    }  # fmt: skip
    assert load_labeled(load, "folder", 4).class_names == ("cat", "dog")  # from the cache


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["a/0.png", "b/0.png", "0.png"],
            r"has images outside its class folders \(1, e.g. 0.png\)",
        ),
        (["a/0.png", "a/1.png"], "has 1 class, but --class_conditional needs 2 to 10,000 classes"),
        (["0.png", "1.png"], "has no labels, but --class_conditional needs"),
        ([f"{i}/0.png" for i in range(4)], "has 4 classes, but --class_conditional needs 2 to 3 "),
    ],
)
def test_folder_without_usable_classes_is_rejected_only_if_labels_are_asked_for(
    load, monkeypatch, files, message
):
    monkeypatch.setattr(labels, "MAX_CLASSES", 10_000 if len(files) < 4 else 3)
    for name in files:
        save_gray(load.data / name, 1)
    assert len(load()) == len(files)
    with pytest.raises(UserError, match=message):
        load_labeled(load, "folder", 4)


def test_class_names_are_distinct_and_can_be_shown():
    names = [os.fsdecode(name) for name in (b"caf\xe9/0.png", b"dog/0.png")]
    assert labels.labels_from_folders(names, "here")[1] == ("caf\ufffd", "dog")
    labels.check_distinct(("a", "b"), "here")
    with pytest.raises(UserError, match="here has several classes that are named a-b here"):
        labels.check_distinct(("a-b", "a-b", "c"), "here")


def test_sample_takes_classes_by_seed_in_any_batch():
    model = conditional()
    labels = labels_in_proportion(range(8), [*CLASSES.values()])
    assert set(labels) == {0, 1}
    images = model.sample(8, seed=0)
    torch.testing.assert_close(images, model.sample(8, seed=0, labels=labels))
    torch.testing.assert_close(images[5:], model.sample(3, seed=5), atol=1e-5, rtol=0)
    other = model.sample(8, seed=0, labels=(1 - labels).tolist())
    assert (images - other).abs().amax(dim=(1, 2, 3)).min() > 0.01
    dogs = model.sample(2, seed=0, labels=1)
    torch.testing.assert_close(dogs, model.sample(2, seed=0, labels=[1, 1]))


def test_classes_of_constant_colors_are_sampled_in_their_color():
    colors = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1], [0.1, 0.1, 0.9]])
    torch.manual_seed(0)
    model = DDPMModel(
        image_size=2, dim=16, dim_mults=(1,), timesteps=100, class_counts=dict.fromkeys("rgb", 1)
    )
    changes = {"OPTIMIZER": "muon", "LABEL_DROPOUT": 0.1}
    step = TrainStep(model, SimpleNamespace(**(STEP_SETTINGS | changes)))
    labels = torch.arange(32) % 3
    images = (colors[labels] * 255).to(torch.uint8)[:, :, None, None].expand(-1, -1, 2, 2)
    for number in range(80):
        step(Batch(images, labels), number, 1e-2)
    samples = step.ema.sample(12, seed=0, labels=labels[:12], steps=8)
    found = samples.mean(dim=(2, 3)).argmax(dim=1)
    assert found.tolist() == labels[:12].tolist()


@pytest.mark.parametrize(
    "classes", [{"../x": 1}, {"": 1}, {"a\\b": 1}, {"..": 1}, {"a": "1"}, {"a": -1}, {"ä" * 128: 1}]
)
def test_class_names_from_a_file_cannot_leave_a_folder(classes):
    with pytest.raises(UserError, match="must have names that a folder can have"):
        DDPMModel(image_size=8, dim=8, dim_mults=(1, 2), class_counts=classes)


def test_classes_without_any_image_have_no_labels_by_default():
    model = DDPMModel(image_size=8, dim=8, dim_mults=(1, 2), class_counts={"cat": 0, "dog": 0})
    assert len(model.sample(2, labels=[0, 1], steps=1)) == 2
    with pytest.raises(UserError, match="no class has an image, so labels must be named"):
        model.sample(2)


def test_class_counts_of_numpy_are_stored_as_integers(tmp_path):
    counts = dict(zip(*np.unique(["cat", "dog", "dog"], return_counts=True), strict=True))
    model = DDPMModel(image_size=8, dim=8, dim_mults=(1, 2), class_counts=counts)
    for name in ("model.safetensors", "model.pt"):
        model.save_model(tmp_path / name)
        assert DDPMModel.from_file(tmp_path / name).class_counts == {"cat": 1, "dog": 2}


def test_unconditional_weights_fit_a_conditional_model():
    torch.manual_seed(0)
    plain = DDPMModel(image_size=8, dim=8, dim_mults=(1, 2), timesteps=40)
    plain.snapshot_guide()
    model = conditional()
    model.load_state_dict(plain.state_dict())
    assert not model.unet.class_embedding.weight.any()
    assert not model.guide.class_embedding.weight.any()
    options = {"seed": 0, "steps": 4}
    assert torch.equal(model.sample(2, labels=1, **options), plain.sample(2, **options))


@pytest.mark.parametrize(("classes", "is_same"), [(CLASSES, True), ({"cow": 3, "pig": 1}, False)])
def test_start_from_copies_embeddings_of_the_same_classes_only(classes, is_same):
    source = conditional()
    model = DDPMModel(image_size=8, dim=8, dim_mults=(1, 2), class_counts=classes)
    model.start_from(source)
    weights = (each.unet.class_embedding.weight for each in (model, source))
    assert torch.equal(*weights) == is_same
    assert torch.equal(model.unet.init_conv.weight, source.unet.init_conv.weight)


def test_interpolate_goes_between_two_classes():
    model = conditional()
    images = torch.rand(2, 3, 8, 8)
    both = model.interpolate(*images, 3, steps=10, labels=(0, 1))
    for i, label in ((0, 0), (2, 1)):
        same = model.interpolate(*images, 3, steps=10, labels=(label, label))
        torch.testing.assert_close(both[i], same[i])
        assert not torch.allclose(both[1], same[1], atol=1e-3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 2], r"labels are \[0, 2\], but must be between 0 and 1, or -1 for none"),
        ([0, -2], "but must be between 0 and 1"),
        ([0, 1, 1], "there are 3 labels for 2 images"),
        ([[0], [1]], r"labels have the shape \(2, 1\), but must have \(2,\)"),
        (torch.ones(2, 3), r"the shape \(2, 3\), but must have \(2, 2\)"),
        (["a", "b"], "must be numbers. Use class_names.index"),
        ([0.0, 1.0], r"the shape \(2,\), but must have \(2, 2\)"),
    ],
)
def test_labels_that_a_model_does_not_have_are_rejected(labels, message):
    with pytest.raises(UserError, match=message):
        conditional().sample(2, labels=labels)


def test_no_images_have_no_labels():
    assert conditional().sample(0).shape == (0, 3, 8, 8)


def test_labels_may_not_change_on_resume():
    path = Path("last.pt")
    many = {str(i): 1 for i in range(1000)}
    for same in ({}, CLASSES):
        check_classes_on_resume(path, same, CLASSES)
    for saved, other, message in (
        (CLASSES, {}, "was trained with classes. Resume with --class_conditional"),
        (CLASSES, CLASSES | {"cow": 1}, r"with \(cow: none, now 1\)\. .*--init_from last.pt"),
        (CLASSES, {"dog": 2, "cat": 2}, r"with \(cat: 3, now 2; dog: 1, now 2\)"),
        (CLASSES, {"dog": 1, "cat": 3}, r"with \(the classes in another order\)"),
        (many, many | {"7": 2}, r"with \(7: 1, now 2\)"),
    ):
        with pytest.raises(UserError, match=message):
            check_classes_on_resume(path, saved, other)


def test_train_continues_an_unconditional_run_with_classes(trained_by_api, tmp_path, monkeypatch):
    shutil.copytree(trained_by_api, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    grids = []
    save = plots.save_image
    monkeypatch.setattr(
        plots, "save_image", lambda image, *a: grids.append(image) or save(image, *a)
    )
    labels = np.arange(80) % 2
    data = ImageDataset(random_images(80, 8), labels, ("a", "b"))
    config = configure(MAX_STEPS=8, CLASS_CONDITIONAL=True)
    model = DDPMModel.from_config(config, data.class_counts)
    final = train(model, data, config, Path("checkpoints/whole/last.pt"))
    trained = DDPMModel.from_file(final)
    assert trained.architecture["class_counts"] == {"a": 40, "b": 40}
    assert trained.unet.class_embedding.weight.abs().min() > 0
    images = trained.sample(4, seed=[0, 1, 0, 1], labels=[0, 0, 1, 1])
    assert np.array_equal(grids[-1], plots.table(images, ["a", "b"], ["seed 0", "seed 1"]))
    before, after = (
        checkpoint_weights(f / "checkpoints/whole/final.pt") for f in (trained_by_api, tmp_path)
    )
    new = after.keys() - before.keys()
    assert {name.split(".")[-2] for name in new} == {"class_embedding"} and len(new) == 3

    # The other way, or with other labels, it does not.
    config.MAX_STEPS = 12
    for changed, message in (
        (ImageDataset(data.images), "Resume with --class_conditional"),
        (ImageDataset(data.images, labels * 0, ("a", "b")), "a: 40, now 80; b: 40, now 0"),
    ):
        model = DDPMModel.from_config(config, changed.class_counts)
        with pytest.raises(UserError, match=message):
            train(model, changed, config, final)
