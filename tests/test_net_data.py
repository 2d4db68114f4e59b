"""Which half, which file, which unit: the wiring of sources, metrics, evaluate and plots."""

import argparse
import io
import json
import os
import socket
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.utils import calculate_md5

import benchmark
import evaluate
from ddpm_model import DDPMModel
from engine import checkpoints, graph, memory, metrics, plots, sources
from engine.command_line import run
from engine.errors import UserError
from engine.shapes import draw_shapes
from engine.sources import load_images

CPU = torch.device("cpu")


def save_gray(path: Path, value: int, size: tuple[int, int] = (4, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)


@pytest.fixture
def load(tmp_path):
    """load_images on tmp_path/data, which a test fills, with its cache in tmp_path/cache."""

    def load(dataset="folder", size=4, **options):
        return load_images(
            dataset, size, load.data, load.cache, workers=2, progress=False, **options
        )

    load.data, load.cache = tmp_path / "data", tmp_path / "cache"
    load.data.mkdir()
    return load


# --- sources


@pytest.mark.parametrize("turned", [False, True])
def test_crop_is_the_middle_of_wide_and_of_tall_images(turned):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :20], pixels[:, 20:60], pixels[:, 60:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    image = Image.fromarray(pixels.transpose(1, 0, 2) if turned else pixels)
    red, green, blue = sources.center_square(image, 40)
    assert (green > 250).all() and (red < 5).all() and (blue < 5).all()


@pytest.fixture
def interrupted(load, monkeypatch):
    """Thirty gray images in blocks of 4, the second unreadable, whose build stopped at the 20th."""
    monkeypatch.setattr(sources, "BLOCK", 4)
    for i in range(30):
        save_gray(load.data / f"{i:02d}.png", i)
    (load.data / "01.png").write_bytes(b"no image")
    crop, stopped = sources.center_square, []

    def stop(image: Image.Image, size: int) -> np.ndarray:
        value = image.getpixel((0, 0))[0]
        if value == 20 and not stopped:
            stopped.append(value)
            raise KeyboardInterrupt
        load.read.append(value)
        return crop(image, size)

    load.read = []
    monkeypatch.setattr(sources, "center_square", stop)
    with pytest.raises(KeyboardInterrupt):
        load()
    load.read.clear()
    return load


def test_interrupted_build_remembers_what_could_not_be_read(interrupted, capsys):
    assert interrupted()[:, 0, 0, 0].tolist() == [0, *range(2, 30)]
    assert min(interrupted.read) >= 16
    assert "1 of 30 images cannot be read" in (listed := capsys.readouterr().err)
    assert "01.png: cannot identify image" in listed


def test_unreadable_images_of_an_interrupted_build_count(interrupted, monkeypatch):
    monkeypatch.setattr(sources, "UNREADABLE_LIMIT", 1 / 40)
    with pytest.raises(UserError, match=r"too many of the 30 images .*01\.png"):
        interrupted()


@pytest.mark.parametrize(
    ("name", "value"), [("BLOCK", 5), ("PIL", SimpleNamespace(__version__="0"))]
)
def test_interrupted_build_starts_again_under_other_conditions(
    interrupted, monkeypatch, name, value
):
    monkeypatch.setattr(sources, name, value)
    assert interrupted()[:, 0, 0, 0].tolist() == [0, *range(2, 30)]
    assert sorted(interrupted.read) == [0, *range(2, 30)]


def write_archive(path: Path, files: dict[str, bytes]) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz") as archive:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("name", ["archive.zip", "archive.tar.gz"])
def test_archive_gives_its_contents_alone_and_never_leaves_its_folder(load, monkeypatch, name):
    png = io.BytesIO()
    Image.new("L", (4, 4), 7).save(png, "PNG")
    path, inside = load.data / "celeba" / name, "img_align_celeba"
    wanted, escaping = f"{inside}/a/0.png", f"{inside}/a/../../../escaped.png"
    others = ("other.png", f"{inside}_too/0.png", "../escaped.png", f"x/{inside}/0.png", escaping)
    path.parent.mkdir()
    write_archive(path, dict.fromkeys((wanted, *others), png.getvalue()))
    archive = replace(sources.CELEBA_ARCHIVE, name=name, md5=calculate_md5(path))
    monkeypatch.setattr(sources, "CELEBA_ARCHIVE", archive)
    assert load("celeba")[:, 0, 0, 0].tolist() == [7]
    found = {file for file in load.data.parent.rglob("*") if file.is_file()}
    assert {file for file in found if load.cache not in file.parents} == {
        path, load.data / "celeba" / wanted
    }  # fmt: skip


@pytest.mark.parametrize("link", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_tar_gives_no_links(tmp_path, link):
    path, archive = tmp_path / "archive.tar.gz", replace(sources.STL10_ARCHIVE, contents=("x",))
    with tarfile.open(path, "w:gz") as members:
        entry = tarfile.TarInfo("x/link")
        entry.type, entry.linkname = link, "/etc/hostname"
        members.addfile(entry)
    sources._unpack(archive, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["cifar10", "stl10", "celeba"])
def test_download_asks_for_the_archive_within_seconds(load, monkeypatch, name):
    asked = []

    def download(*arguments: str) -> None:
        asked.append((*arguments, socket.getdefaulttimeout()))
        raise OSError("stopped")

    monkeypatch.setattr(sources, "download_url", lambda *given: download("url", *given))
    monkeypatch.setattr(
        sources, "download_file_from_google_drive", lambda *given: download("drive", *given)
    )
    before = socket.getdefaulttimeout()
    with pytest.raises(UserError, match="stopped"):
        load(name)
    archive = getattr(sources, f"{name.upper()}_ARCHIVE")
    ((how, where, folder, file, md5, seconds),) = asked
    assert (how, where) == (
        ("drive", archive.drive_id) if name == "celeba" else ("url", archive.url)
    )
    assert (file, md5, seconds) == (archive.name, archive.md5, sources.CONNECT_SECONDS)
    assert load.data in Path(folder).parents
    assert socket.getdefaulttimeout() == before


def test_data_sets_have_as_many_images_as_the_estimate_says():
    assert sum(sources.CIFAR10_BINS.values()) == benchmark.IMAGES["cifar10"] == 50_000
    assert sum(sources.STL10_BINS.values()) == benchmark.IMAGES["stl10"] == 105_000
    assert list(sources.STL10_BINS.values()) == [5_000, 100_000]
    assert [name[-5] for name in sources.CIFAR10_BINS] == list("12345")


def test_sizes_are_looked_at_all_over_the_folder(load, monkeypatch):
    monkeypatch.setattr(sources, "LOOKED_AT", 4)
    for i in range(8):
        save_gray(load.data / f"{i}.png", i, (4, 4) if i < 4 else (8, 8))
    assert len(load(size=8, upsampling=False)) == 8  # half of them are large enough
    save_gray(load.data / "5.png", 0)  # not looked at
    assert len(load(size=8, upsampling=False)) == 8
    save_gray(load.data / "4.png", 0)
    with pytest.raises(UserError, match="3 of 4 looked at"):
        load(size=8, upsampling=False)


def test_folders_behind_links_are_read_and_dangling_links_left_out(load):
    for i in range(25):
        save_gray(load.data.parent / "elsewhere" / f"{i:02d}.png", i)
    (load.data / "link").symlink_to(load.data.parent / "elsewhere")
    (load.data / "dangling.png").symlink_to(load.data / "nowhere.png")
    assert load()[:, 0, 0, 0].tolist() == list(range(25))


def test_changed_size_alone_is_noticed(load):
    for value, size in ((1, (4, 4)), (2, (90, 90))):
        save_gray(load.data / "a.png", value, size)
        os.utime(load.data / "a.png", (0, 0))
        assert load()[:, 0, 0, 0].tolist() == [value]


def test_threads_read_no_more_than_two_blocks_ahead_each(monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", 1)
    asked = []

    def read(block: range, size: int) -> tuple[np.ndarray, list[str]]:
        asked.append(block.start)
        return np.full((1, 3, size, size), block.start, np.uint8), []

    source = sources.Source("", "", 100, read, list)
    blocks = sources._read_blocks(source, 2, 3, 10)
    assert next(blocks)[0][0, 0, 0, 0] == 10
    time.sleep(0.05)  # for what was asked for besides
    assert max(asked) <= 10 + 2 * 3
    assert [images[0, 0, 0, 0] for images, _ in blocks] == list(range(11, 100))


# --- metrics


class Colors(torch.nn.Module):
    """A feature network whose features are the mean colors."""

    title = "FD-Colors"

    def __init__(self, name: str = "colors"):
        super().__init__()
        self.name, self.batches = name, []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(images))
        return images.float().mean(dim=(2, 3))


def classifier(width: int) -> SimpleNamespace:
    """Stands in for Inception: its logits are ten times the features."""
    weights = SimpleNamespace(weight=torch.eye(width))
    return SimpleNamespace(
        network=SimpleNamespace(fc=weights), logits=lambda features: 10 * features
    )


def test_precision_is_of_samples_and_recall_of_real_images():
    pytest.importorskip("torch_fidelity", reason="needs requirements-eval.txt")
    real = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    center = real[np.square(real).sum(1).argsort()[:12]]
    scores = metrics.inception_scores(classifier(4), center, real)
    assert scores["precision"] == 1 and scores["recall"] < 0.8


def test_precision_and_recall_are_by_three_neighbors():
    pytest.importorskip("torch_fidelity", reason="needs requirements-eval.txt")
    real = np.float32([[0], [1], [3], [6], [10], [15], [21], [28]])
    samples = np.float32([[-5], [-6.5], [31], [40], [60], [80]])
    spheres = [6, 5, 3, 5, 7, 9, 13, 18]  # to the third neighbor of each
    inside = [np.any(np.abs(real[:, 0] - x) <= spheres) for x in samples[:, 0]]
    assert metrics.inception_scores(classifier(1), samples, real)["precision"] == np.mean(inside)
    assert 0 < np.mean(inside) < 1


def test_kernel_distance_is_that_of_its_definition():
    pytest.importorskip("torch_fidelity", reason="needs requirements-eval.txt")
    rng = np.random.default_rng(0)
    ours, theirs = (rng.normal(shift, 1, (20, 6)).astype(np.float32) for shift in (0, 1))

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / 6 + 1) ** 3

    def among(x: np.ndarray) -> float:
        return (kernel(x, x).sum() - np.trace(kernel(x, x))) / (20 * 19)

    expected = among(ours) + among(theirs) - 2 * kernel(ours, theirs).mean()
    scores = metrics.inception_scores(classifier(6), ours, theirs)
    assert scores["KID"] == pytest.approx(expected, rel=1e-3)
    assert scores["KID deviation"] < 1e-3 * expected  # each subset is all of them


def test_inception_score_is_of_the_samples():
    pytest.importorskip("torch_fidelity", reason="needs requirements-eval.txt")
    many, one = np.eye(4, dtype=np.float32)[np.arange(40) % 4], np.zeros((40, 4), np.float32)
    diverse = metrics.inception_scores(classifier(4), many, one)
    assert 2 < diverse["IS"] <= 4 and 0 < diverse["IS deviation"] < 1
    assert metrics.inception_scores(classifier(4), one, many)["IS"] == pytest.approx(1)


def test_a_distance_is_fid_with_the_published_weights_alone(tmp_path, monkeypatch):
    class Extractor(torch.nn.Module):
        def __init__(self, name, features, feature_extractor_weights_path):
            super().__init__()
            self.state = torch.load(feature_extractor_weights_path, weights_only=True)

    package = SimpleNamespace(FeatureExtractorInceptionV3=Extractor, URL_INCEPTION_V3="")
    monkeypatch.setattr(metrics, "optional", lambda *_: package)
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.ones(1)}, path)
    network = metrics.Inception(path)
    assert network.title == "FD-Inception" and network.state_dict() == {}
    assert network.network.state == {"weight": torch.ones(1)}
    assert network.name == f"inception-{metrics.digest(path)[:8]}"
    monkeypatch.setattr(metrics, "INCEPTION_SHA256", metrics.digest(path)[:8])
    assert metrics.Inception(path).title == "FID"


def test_features_are_in_order_whatever_the_batch():
    images, network = draw_shapes(np.arange(70), 8, 0), Colors()
    found = metrics.extract(network, images, CPU)
    np.testing.assert_allclose(found, images.mean((2, 3)), rtol=1e-5)
    assert network.batches == [32, 32, 6]


def test_a_reference_takes_the_place_of_its_own_predecessor_alone(load, tmp_path):
    def reference(network: Colors, size: int = 4) -> set[str]:
        metrics.reference_of(network, load(size=size), CPU, tmp_path / "kept")
        return {path.name for path in (tmp_path / "kept").iterdir()}

    save_gray(load.data / "a.png", 1)
    save_gray(load.data / "b.png", 2)
    colors, others = Colors(), Colors("others")
    kept = reference(others) | reference(colors, size=8)
    (stale,) = reference(colors) - kept
    save_gray(load.data / "c.png", 3)
    names = reference(colors)
    assert stale not in names and kept < names and len(names) == 3


class Losses(torch.nn.Module):
    """A model whose squared error tells images, timesteps and noise that it is given."""

    num_timesteps, device = 11, CPU

    def squared_error(self, images, t, noise):
        assert not self.training and len(images) <= 2 and images.shape == noise.shape
        return images.mean((1, 2, 3)) * 10 + t + 1000 * noise.mean((1, 2, 3))


def test_loss_by_timestep_takes_images_from_all_over_with_the_same_noise(monkeypatch):
    monkeypatch.setattr(metrics, "BATCH", 2)
    monkeypatch.setattr(metrics, "VALIDATION_IMAGES", 3)
    images = (torch.arange(7) * 20).byte().reshape(7, 1, 1, 1).expand(7, 3, 4, 4)
    timesteps, losses = metrics.loss_by_timestep(Losses().train(), images, points=3)
    noise = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)).mean().item()
    mean = np.mean([0, 60, 120]) / 255
    assert timesteps == [0, 5, 10]
    expected = [10 * mean + t + 1000 * noise for t in timesteps]
    assert losses == pytest.approx(expected, rel=1e-4)


# --- evaluate


def test_images_of_a_file_are_read_channels_first(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 6, 6, 3), np.uint8)
    np.savez(tmp_path / "a.npz", seeds=np.arange(3), images=images)
    for size in (0, 6):
        found = evaluate.read_images(tmp_path / "a.npz", size)
        np.testing.assert_array_equal(found, np.moveaxis(images, 3, 1))
    with pytest.raises(UserError, match=r"should hold uint8 \(N, 8, 8, 3\)"):
        evaluate.read_images(tmp_path / "a.npz", 8)


def test_images_of_a_folder_get_the_size_of_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_gray(tmp_path / "x" / "a.png", 1, (9, 6))
    save_gray(tmp_path / "x" / "b.png", 2, (16, 16))
    (tmp_path / "x" / "a.json").write_text("{}")
    assert evaluate.read_images(Path("x"), 0).shape == (2, 3, 6, 6)
    assert evaluate.read_images(Path("x"), 12).shape == (2, 3, 12, 12)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """evaluate.draw of a small model with a guide: what it asks batch_generate for, and `how`."""
    torch.manual_seed(0)
    model = DDPMModel(
        image_size=16, dim=8, dim_mults=(1, 2), timesteps=60, sampling_timesteps=3, guidance=3.0
    )
    model.keep_guide()
    path = tmp_path / "model.pt"
    path.write_bytes(b"weights")

    def drawn(guide: bool = True, **settings):
        asked = {}

        def batch_generate(model, total, batch, seed, sampler, steps, **options):
            amp = torch.is_autocast_enabled("cpu")
            asked.update(total=total, batch=batch, seed=seed, sampler=sampler, steps=steps, amp=amp)
            asked.update(options)
            return torch.linspace(0, 1, 3).reshape(1, 3, 1, 1).expand(total, 3, 16, 16)

        monkeypatch.setattr(evaluate, "batch_generate", batch_generate)
        if not guide:
            model.guide = None
        usual = {"sampler": "unipc", "steps": 0, "spacing": evaluate.SPACING, "guidance": 0.0}
        usual |= {"batch_size": 0, "use_amp": False, "num_samples": 5, "seeds": 7}
        images, how = evaluate.draw(model, path, argparse.Namespace(**usual | settings))
        assert images[:, :, 2, 3].tolist() == [[0, 128, 255]] * 5 and images.dtype == np.uint8
        return asked, how

    drawn.model, drawn.path = model, path
    return drawn


def test_draw_takes_the_models_own_steps_and_guidance_unless_told(drawn):
    asked, how = drawn()
    sampler, timesteps = drawn.model.plan("unipc", 3, evaluate.SPACING)
    assert (asked["steps"], asked["guidance"], asked["amp"]) == (3, None, False)
    assert (asked["total"], asked["batch"], asked["seed"]) == (5, 64, 7)
    assert (how["steps"], how["guidance"], how["seeds"], how["use_amp"]) == (3, 3.0, "7-11", False)
    assert how["nfe"] == drawn.model.evaluations(sampler, timesteps)
    assert how["nfe"] > drawn.model.evaluations(sampler, timesteps, 1.0)
    assert how["sha256"] == evaluate.digest(drawn.path) and how["checkpoint"] == str(drawn.path)


def test_draw_takes_what_it_is_told(drawn):
    settings = {"steps": 4, "guidance": 1.0, "batch_size": 2, "use_amp": True, "spacing": "uniform"}
    asked, how = drawn(**settings, sampler="heun")
    assert (asked["steps"], asked["guidance"], asked["batch"], asked["amp"]) == (4, 1.0, 2, True)
    assert (asked["sampler"], asked["spacing"]) == ("heun", "uniform")
    assert {name: how[name] for name in ("steps", "guidance", "use_amp", "spacing", "sampler")} == {
        "steps": 4, "guidance": 1.0, "use_amp": True, "spacing": "uniform", "sampler": "heun"
    }  # fmt: skip
    plan = drawn.model.plan("heun", 4, "uniform")
    assert how["nfe"] == drawn.model.evaluations(*plan, 1.0)


def test_draw_by_ddpm_takes_all_timesteps(drawn):
    asked, how = drawn(sampler="ddpm")
    assert asked["steps"] == how["steps"] == 60


def test_draw_without_a_guide_says_no_guidance(drawn):
    assert drawn(guide=False, guidance=2.5)[1]["guidance"] == 1.0


class Scored(Colors, metrics.Inception):
    """An Inception network as far as isinstance tells."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.name, self.title, self.batches = "scored", "FID", []


def test_scores_compare_the_samples_features_with_the_references(monkeypatch):
    def scores(network, ours, theirs):
        assert isinstance(network, Scored)
        return {"ours": ours, "theirs": theirs}

    monkeypatch.setattr(metrics, "inception_scores", scores)
    images, real = draw_shapes(np.arange(9), 8, 0), draw_shapes(np.arange(9, 29), 8, 0)
    colors, scored = Colors(), Scored()
    features = metrics.extract(colors, real, CPU)
    shifted = metrics.Reference(metrics.statistics_of(features + 1), features + 1)
    plain = metrics.Reference(metrics.statistics_of(features), features)
    found = evaluate.measure(images, {colors: plain, scored: shifted}, CPU)
    own = metrics.extract(colors, images, CPU)
    distances = [
        metrics.frechet_distance(metrics.statistics_of(own), reference.statistics)
        for reference in (plain, shifted)
    ]
    assert [found["FD-Colors"], found["FID"]] == distances
    np.testing.assert_array_equal(found["ours"], own)
    np.testing.assert_array_equal(found["theirs"], features + 1)


def test_nearest_figure_shows_and_names_what_is_nearest(monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "labelled_grid", lambda *given, **how: shown.append((given, how)))
    real = np.random.default_rng(0).integers(51, 200, (6, 3, 4, 4), np.uint8)
    samples = np.stack([real[4] + 51, real[1, :, :, ::-1]]).astype(np.uint8)
    network = Colors()
    features = metrics.extract(network, real, CPU)
    features[[4, 5]] = features[[5, 4]] + np.float32([[51], [1000]])  # image 5 is like sample 0
    features[5] = metrics.extract(network, samples[:1], CPU)[0] + 2
    references = {network: metrics.Reference(metrics.statistics_of(features), features)}
    evaluate.nearest_figure(samples, ["a", "b"], real, references, CPU)
    (((pictures, labels), how),) = shown
    expected = np.stack([*samples, real[4], samples[1], real[5], real[1]])
    np.testing.assert_array_equal((pictures * 255).round().numpy()[:5], expected[:5])
    assert labels[:5] == ["a", "b", "pixels 0.200", "pixels 0.000", "Colors 2.000"]
    assert labels[5] == "Colors 0.000" and how["columns"] == 2


def test_table_leaves_deviations_out():
    found = [
        {"name": name, "seconds": 12.3, "scores": {"FID": fid, "KID": 0.5, "KID deviation": 9.0}}
        for name, fid in (("first", 1.25), ("second", 30.0))
    ]
    lines = [line.split() for line in evaluate.table(found).splitlines()]
    assert lines == [
        ["FID", "KID", "seconds"], ["first", "1.25", "0.5", "12"], ["second", "30", "0.5", "12"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "others", "label"),
    [
        ({}, 0, "run-final-unipc-14-100-vs-cifar10"),
        ({"guidance": 2.0}, 0, "run-final-unipc-14-guidance-2-100-vs-cifar10"),
        ({"seeds": "5-104"}, 2, "run-final-and-2-more-unipc-14-seeds-5-104-100-vs-cifar10"),
        ({"spacing": "own"}, 0, "run-final-unipc-14-own-100-vs-cifar10"),
        ({"sampler": "a/my.py:f"}, 0, "run-final-a-my-f-14-100-vs-cifar10"),
    ],
)
def test_label_says_how_it_was_drawn(changes, others, label):
    found = {"name": "run-final", "checkpoint": "x.pt", "sampler": "unipc", "steps": 14}
    found |= {"spacing": evaluate.SPACING, "guidance": 1.0, "seeds": "0-99", "num_samples": 100}
    reference = {"dataset": "cifar10", "data_dir": "data"}
    assert evaluate.label_of(found | changes, others, reference) == label


def bias_and_count(model: DDPMModel, images: torch.Tensor) -> tuple[list[int], list[float]]:
    """Stands in for the loss by timestep: tells which model and how many images it is given."""
    return [0, 59], [1 + model.unet.final_conv.bias.mean().item(), float(len(images))]


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """Runs evaluate.py on mean colors; returns its JSON and what it asks of plots."""
    monkeypatch.chdir(tmp_path)
    for folder, numbers in (("real", range(24)), ("others", range(30, 44))):
        for i, image in zip(numbers, draw_shapes(np.array(numbers), 16, 0), strict=True):
            Path(folder).mkdir(exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(f"{folder}/{i}.png")
    config = {"DATASET": "folder", "IMAGE_SIZE": 16, "DATA_DIR": "real"}
    for seed, (name, seconds) in enumerate((("late", 150.0), ("early", 60.0))):
        torch.manual_seed(seed)
        model = DDPMModel(16, 8, (1, 2), timesteps=60, sampling_timesteps=2)
        with torch.no_grad():
            model.unet.final_conv.bias.fill_(seed / 2)
        state = {"architecture": model.architecture, "model": model.state_dict(), "config": config}
        progress = {"seconds": seconds, "images": 1000 * seconds}
        checkpoints.save(Path(f"checkpoints/run/{name}.pt"), state | {"progress": progress})
    monkeypatch.setattr(evaluate, "feature_networks", lambda *_: [Colors()])
    monkeypatch.setattr(metrics, "loss_by_timestep", bias_and_count)
    seen = {}

    def evaluated(*arguments: str) -> dict:
        for name in ("save_distance_curve", "save_loss_by_timestep", "labelled_grid"):

            def keep(*given, name=name, **_):
                seen[name] = given
                return Image.new("L", (1, 1))

            monkeypatch.setattr(plots, name, keep)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            run(evaluate.main)
        assert stopped.value.code == 0
        (path,) = Path("results").glob("*.json")
        return json.loads(path.read_text()) | seen

    return evaluated


PAIR = ("--checkpoint", "checkpoints/run/late.pt", "checkpoints/run/early.pt", "--num_samples", "4")


def test_curve_is_of_each_checkpoints_minutes_and_distances(evaluated):
    found = evaluated(*PAIR, "--seeds", "3")
    late, early = found["evaluations"]
    scores = [one["scores"]["FD-Colors"] for one in (late, early)]
    assert scores[0] != scores[1]
    minutes, distances, path = found["save_distance_curve"]
    assert minutes == [2.5, 1.0] and distances == {"FD-Colors": scores} and "curve" in path.name
    timesteps, losses, _ = found["save_loss_by_timestep"]
    assert timesteps == [0, 59] and losses == {"run-late": [1, 2], "run-early": [1.5, 2]}
    assert (late["trained_images"], early["trained_images"]) == (150_000, 60_000)
    pictures, labels = found["labelled_grid"]
    assert labels[:4] == ["seed 3", "seed 4", "seed 5", "seed 6"]
    model = DDPMModel().load_model("checkpoints/run/early.pt")  # the last of them
    expected = model.sample(4, seed=3)
    np.testing.assert_allclose(pictures[:4], expected, atol=0.51 / 255)


def test_a_named_data_set_takes_the_place_of_the_trained_one(evaluated):
    found = evaluated(*PAIR, "--dataset", "folder", "--data_dir", "others")
    assert (found["reference"]["data_dir"], found["reference"]["images"]) == ("others", 14)
    assert found["save_loss_by_timestep"][1]["run-late"][1] == 2  # still those held out of 24


def test_real_images_have_the_size_that_is_asked_for(evaluated):
    found = evaluated(*PAIR, "--image_size", "8")
    assert found["reference"]["image_size"] == 8 and "labelled_grid" not in found


# --- plots


def test_bytes_are_clipped_and_rounded_with_channels_last():
    images = torch.tensor([-1.0, 0.5, 2.0]).reshape(1, 3, 1, 1).expand(1, 3, 2, 4)
    found = plots.to_bytes(images)
    assert found.shape == (1, 2, 4, 3) and found[0, 1, 3].tolist() == [0, 128, 255]
    gray = plots.to_image(torch.full((1, 2, 4), 0.999))
    assert gray.mode == "L" and gray.size == (4, 2) and gray.getpixel((3, 1)) == 255


def test_labelled_grid_goes_row_by_row():
    images = torch.linspace(0, 1, 5).reshape(5, 1, 1, 1).expand(5, 3, 4, 4)
    sheet = np.asarray(plots.labelled_grid(images, [""] * 5, columns=3, smallest=8))
    corners = [sheet[4 + row * 26, 4 + column * 12, 0] for row in (0, 1) for column in range(3)]
    assert corners[:5] == [0, 64, 128, 191, 255] and sheet.shape == (56, 40, 3)
    with pytest.raises(ValueError, match="shorter"):
        plots.labelled_grid(images, ["a"])


def test_grid_has_as_many_columns_as_rows():
    assert plots.grid(torch.zeros(9, 3, 64, 64)).size == (3 * 66 + 2, 3 * 66 + 2)
    assert plots.grid(torch.zeros(7, 3, 64, 64)).size == (3 * 66 + 2, 3 * 66 + 2)
    assert plots.grid(torch.zeros(6, 3, 64, 64), columns=6).size == (6 * 66 + 2, 66 + 2)


def test_small_images_alone_are_enlarged_by_a_whole_factor():
    image = torch.arange(6.0).reshape(1, 2, 3)
    large = plots.enlarge(image, smallest=7)
    assert large.shape == (1, 4, 6) and large[0, 2:, 2:4].unique().tolist() == [4.0]
    assert plots.enlarge(torch.zeros(1, 100, 100)).shape == (1, 100, 100)


def test_gif_rests_on_the_last_frame_and_starts_again(tmp_path):
    frames = [Image.new("L", (4, 4), value) for value in (0, 100, 200)]
    plots.save_gif(frames, tmp_path / "a.gif", milliseconds=70)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3 and gif.info["loop"] == 0
        durations = []
        for i in range(3):
            gif.seek(i)
            durations.append(gif.info["duration"])
    assert durations == [70, 70, 1500]


@pytest.fixture
def lines(monkeypatch):
    """What a plots function draws: points of each line by label."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))

    def lines(draw, *arguments) -> dict[str, list[tuple[float, float]]]:
        draw(*arguments, Path("unused.png"))
        (axes,) = figures[-1].axes
        assert axes.get_yscale() == "log"
        plots.plt.close(figures[-1])
        return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}

    return lines


def test_loss_curve_tells_training_from_validation(tmp_path, lines):
    rows = [{"step": 10 * i, "loss": 1 + i} for i in range(80)]
    rows += [{"step": 400, "validation_loss": 0.5}, {"step": 800, "validation_loss": 0.25}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = lines(plots.save_loss_curve, path)
    assert found["training"] == [(row["step"], row["loss"]) for row in rows[:80]]
    assert found["validation, EMA weights"] == [(400, 0.5), (800, 0.25)]
    mean = found["training, mean of 2 values"]
    assert mean[0] == (10, 1.5) and mean[-1] == (790, 79.5) and len(mean) == 79


def test_distance_curve_is_in_order_of_time(lines):
    found = lines(plots.save_distance_curve, [3.0, 1.0, 2.0], {"a": [30, 10, 20], "b": [3, 1, 2]})
    assert found == {"a": [(1, 10), (2, 20), (3, 30)], "b": [(1, 1), (2, 2), (3, 3)]}


def test_loss_by_timestep_has_a_line_for_each_model(lines):
    found = lines(plots.save_loss_by_timestep, [0, 9], {"a": [4.0, 2.0], "b": [3.0, 1.0]})
    assert found == {"a": [(0, 4), (9, 2)], "b": [(0, 3), (9, 1)]}


# --- memory and graphs


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs of 24 and of 8 GiB; `gpus` has the fractions that were set."""
    fractions = []
    cuda = torch.cuda
    sizes = {0: 24 * 2**30, 1: 8 * 2**30}
    monkeypatch.setattr(memory, "cap", None)
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda, "current_device", lambda: 1)
    properties = {i: SimpleNamespace(total_memory=size) for i, size in sizes.items()}
    monkeypatch.setattr(cuda, "get_device_properties", properties.__getitem__)
    monkeypatch.setattr(
        cuda, "set_per_process_memory_fraction", lambda *given: fractions.append(given)
    )
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return fractions


@pytest.mark.parametrize(("rank", "device"), [("0", 0), ("1", 1), ("2", 0)])
def test_memory_is_capped_on_the_gpu_of_the_process(gpus, monkeypatch, rank, device):
    monkeypatch.setenv("LOCAL_RANK", rank)
    memory.cap_memory(6)
    assert gpus == [(6 / (24, 8)[device], device)]


def test_memory_limit_is_the_cap_or_the_whole_card(gpus):
    assert memory.memory_limit() == 8 * 2**30
    memory.cap_memory(6)
    assert memory.memory_limit() == 6 * 2**30
    memory.cap_memory(12)
    assert memory.memory_limit() == 8 * 2**30 and gpus == [(0.25, 0), (0.5, 0)]
    memory.cap_memory(48)
    assert gpus[-1] == (1.0, 0)


def test_memory_that_runs_out_halves_the_size_for_good(capsys):
    done, tried = [], []

    def work(part: slice) -> slice:
        tried.append(part.stop - part.start)
        if tried[-1] > 3:
            raise torch.OutOfMemoryError
        done.append(part)
        return part

    at_once = memory.AtOnce(12)
    assert list(at_once.parts(10, work)) == done
    assert tried == [10, 5, 3, 3, 3, 1] and at_once.size == 3
    assert [i for part in done for i in range(part.start, part.stop)] == list(range(10))
    assert capsys.readouterr().out.count("out of GPU memory: going on with batches of") == 2


@pytest.fixture
def replays(monkeypatch):
    """Replays whose graphs, which it notes in `made`, give one tensor over and over."""
    made = []

    class Same:
        def __init__(self, network):
            made.append(network)
            self.output = torch.zeros(2)

        def __call__(self, *inputs):
            return self.output.add_(1)

    monkeypatch.setattr(graph, "Graph", Same)
    replays = graph.Replays()
    replays.made = made
    return replays


def test_each_network_mode_shape_and_precision_has_its_graph(replays, monkeypatch):
    monkeypatch.setattr(graph, "KEPT", 9)
    network, other, x = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), torch.zeros(2, 3)
    replays(network, x), replays(network, x)
    assert len(replays.made) == 1
    replays(other, x)
    replays(network, x[:1])
    replays(network, x.double())
    assert len(replays.made) == 4
    replays(network.eval(), x)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    for dtype in (torch.float16, torch.bfloat16):
        monkeypatch.setattr(torch, "get_autocast_dtype", {"cuda": dtype}.__getitem__)
        replays(network, x)
    assert len(replays.made) == 7


def test_oldest_graph_makes_room_and_outputs_are_copies(replays):
    networks = [torch.nn.Linear(1, 1) for _ in range(graph.KEPT + 1)]
    first, second = replays(networks[0], torch.zeros(1)), replays(networks[0], torch.zeros(1))
    assert first.tolist() == [1, 1] and second.tolist() == [2, 2]
    for network in networks[1:]:
        replays(network, torch.zeros(1))
    assert len(replays.graphs) == graph.KEPT
    replays(networks[1], torch.zeros(1))
    assert len(replays.made) == graph.KEPT + 1
    replays(networks[0], torch.zeros(1))
    assert len(replays.made) == graph.KEPT + 2
    replays.clear()
    assert not replays.graphs
