"""What evaluate.py reports: tables, the names of files, figures."""

import json
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image

from engine import plots
from engine.class_metrics import ClassMetrics, ClassRow
from engine.inference_jobs import numbered
from engine.metrics import References, Scores, extract_features, nearest_neighbors
from engine.sampling_settings import sampling_name

FEW_IMAGES = 2048  # Inception's features; of fewer images, the covariance is singular


class Evaluation(TypedDict, total=False):
    """How images were made and what they score: one of `evaluations` in the JSON file."""

    name: str
    images: str  # the path of --images; or, of a checkpoint:
    checkpoint: str
    sha256: str
    sampler: str
    steps: int
    spacing: str | None
    noise_levels: str | None
    guidance: float  # 1 if it changes nothing
    guidance_mode: str
    guidance_min_sigma: float
    guidance_max_sigma: float
    nfe: int
    seeds: str  # FIRST-LAST
    use_amp: bool
    seconds_sampling: float
    trained_seconds: float | None
    trained_images: int | None
    num_samples: int
    scores: Scores
    classes: list[ClassRow]
    seconds: float  # sampling, the loss by timestep and scoring


def format_table(results: list[Evaluation]) -> str:
    """Returns the scores as aligned columns."""
    columns = [name for name in results[0]["scores"] if not name.endswith(" std")]
    width = max(len(result["name"]) for result in results)
    lines = [" " * width + "".join(f"{name:>16}" for name in (*columns, "seconds"))]
    for result in results:
        scores = "".join(f"{result['scores'][name]:16.4g}" for name in columns)
        lines.append(f"{result['name']:{width}}{scores}{result['seconds']:16.0f}")
    return "\n".join(lines)


def format_classes(results: list[Evaluation], distance: str, real_accuracy: float | None) -> str:
    """Returns the scores of each class as aligned columns; the distance has this name."""
    lines = []
    for result in results:
        rows = result["classes"]
        width = max(len("class"), *(len(row["class"]) for row in rows))
        columns = ["samples", "accuracy", "real accuracy"]
        if any("distance" in row for row in rows):
            columns.append("distance")
        headings = (distance if column == "distance" else column for column in columns)
        cells = "".join(f"{heading:>15}" for heading in headings)
        lines += [f"{result['name']} by class:", f"{'class':{width}}{cells}"]
        for row in rows:
            values = (row.get(column) for column in columns)
            cells = "".join(f"{'-' if value is None else f'{value:.4g}':>15}" for value in values)
            lines.append(f"{row['class']:{width}}{cells}")
    if real_accuracy is not None:
        lines.append(f"class accuracy of real validation images: {real_accuracy:.4g}")
    return "\n".join(lines)


def print_tables(results: list[Evaluation], by_class: ClassMetrics | None) -> None:
    """Prints the scores, and those of each class, if there are any."""
    if results:
        print(format_table(results))
    if results and by_class:
        title = by_class.network.title
        print(format_classes(results, title, by_class.real_accuracy))


def note_few_images(count: int) -> None:
    """Prints that a Fréchet distance needs more images, if it does."""
    if count < FEW_IMAGES:
        print(f"note: of {count} images, Fréchet distances are too high and vary; compare KID")


def result_name(first: Evaluation, num_others: int, reference: dict[str, Any]) -> str:
    """Returns the name of result files: what was evaluated, how sampled, compared with what."""
    parts = ["evaluate", first["name"]]
    if num_others:
        parts.append(f"and-{num_others}-more")
    if "checkpoint" in first:
        parts.append(sampling_name(first))
        if first["guidance"] != 1:
            mode = "" if first["guidance_mode"] == "autoguidance" else f"{first['guidance_mode']}-"
            parts.append(f"{mode}guidance-{first['guidance']:g}")
        if not first["seeds"].startswith("0-"):
            parts.append(f"seeds-{first['seeds']}")
    is_folder = reference["dataset"] == "folder"
    source = Path(reference["data_dir"]).resolve().name if is_folder else reference["dataset"]
    return "-".join([*parts, str(first["num_samples"]), "vs", source])


def without_other_report(stem: Path, report: dict[str, Any]) -> Path:
    """Returns the first of stem, stem_2, ... whose JSON is not of other inputs.

    report: to be written there. What the name does not say is compared.
    """
    compared = ("inputs", "sha256", "sampling", "use_amp", "reference", "networks")

    def is_free_or_same(path: Path) -> bool:
        try:
            stored = json.loads(Path(f"{path}.json").read_text())
            return all(stored[name] == report[name] for name in compared)
        except FileNotFoundError:
            return True
        except (ValueError, KeyError, TypeError):  # damaged, or of an earlier version
            return False

    return next(filter(is_free_or_same, numbered(stem)))


def plot_nearest_neighbors(
    samples: np.ndarray, captions: list[str], real: np.ndarray, references: References,
    device: torch.device,
) -> Image.Image:  # fmt: skip
    """Returns samples and, below each, the real images nearest in pixels and features."""
    queries = np.concatenate([samples, samples[..., ::-1]])  # training may mirror images
    spaces = [("pixels", queries.reshape(len(queries), -1), real.reshape(len(real), -1), 255)]
    for network, statistics in references.items():
        features = extract_features(network, queries, device)
        spaces.append((type(network).__name__, features, statistics.features, 1))
    tiles = [samples]
    captions = list(captions)
    for name, points, real_points, unit in spaces:
        nearest = nearest_neighbors(points, real_points)
        distance, index = (values.reshape(2, -1) for values in nearest)
        mirrored = distance[1] < distance[0]
        found = real[np.where(mirrored, index[1], index[0])]
        tiles.append(np.where(mirrored[:, None, None, None], found[..., ::-1], found))
        captions += [f"{name} {value:.3f}" for value in distance.min(axis=0) / unit]
    title = "samples; below, the nearest real images, maybe mirrored, with RMS distance"
    images = torch.from_numpy(np.concatenate(tiles)) / 255
    return plots.captioned_grid(images, captions, columns=len(samples), title=title, smallest=96)


def save_curves(
    results: list[Evaluation], losses: dict[str, tuple[list[int], list[float]]],
    titles: list[str], stem: Path,
) -> None:  # fmt: skip
    """Plots losses by timestep, and the distances of these titles by training time.

    losses: timesteps and values by name.
    """
    if losses:
        timesteps, _ = next(iter(losses.values()))
        values = {name: loss for name, (_, loss) in losses.items()}
        plots.save_loss_by_timestep(timesteps, values, stem.with_name(f"{stem.name}-loss.png"))
    trained = [result for result in results if result.get("trained_seconds")]
    if len(trained) > 1:
        minutes = [result["trained_seconds"] / 60 for result in trained]
        distances = {title: [result["scores"][title] for result in trained] for title in titles}
        plots.save_fd_over_time(minutes, distances, stem.with_name(f"{stem.name}-curve.png"))
