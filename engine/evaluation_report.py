"""What evaluate.py reports: tables, the names of files, figures."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine import plots
from engine.metrics import References, extract_features, nearest_neighbors
from engine.sampling_settings import sampling_name

Evaluation = dict[str, Any]  # scores of images and how they were made, as in the JSON file


def format_table(results: list[Evaluation]) -> str:
    """Returns the scores as aligned columns."""
    columns = [name for name in results[0]["scores"] if not name.endswith(" std")]
    width = max(len(row["name"]) for row in results)
    lines = [" " * width + "".join(f"{name:>16}" for name in (*columns, "seconds"))]
    for row in results:
        scores = "".join(f"{row['scores'][name]:16.4g}" for name in columns)
        lines.append(f"{row['name']:{width}}{scores}{row['seconds']:16.0f}")
    return "\n".join(lines)


def format_classes(results: list[Evaluation], title: str, real_accuracy: float | None) -> str:
    """Returns the scores of each class as aligned columns. title: of the distance."""
    lines = []
    for result in results:
        rows = result["classes"]
        width = max(len("class"), *(len(row["class"]) for row in rows))
        columns = {"samples": "samples", "accuracy": "accuracy", "real accuracy": "real accuracy"}
        if any("distance" in row for row in rows):
            columns["distance"] = title
        heads = "".join(f"{text:>15}" for text in columns.values())
        lines += [result["name"], f"{'class':{width}}{heads}"]
        for row in rows:
            values = (row.get(key) for key in columns)
            cells = (f"{'-' if value is None else f'{value:.4g}':>15}" for value in values)
            lines.append(f"{row['class']:{width}}{''.join(cells)}")
    return "\n".join([*lines, f"class accuracy of held-out real images: {real_accuracy}"])


def result_name(first: Evaluation, others: int, reference: dict[str, Any]) -> str:
    """Returns the name of result files: what was evaluated, how sampled, compared with what."""
    parts = [first["name"], *([f"and-{others}-more"] if others else [])]
    if "checkpoint" in first:
        parts.append(sampling_name(first))
        mode = "" if first["guidance_mode"] == "autoguidance" else f"{first['guidance_mode']}-"
        parts += [f"{mode}guidance-{first['guidance']:g}"] if first["guidance"] != 1 else []
        parts += [f"seeds-{first['seeds']}"] if not first["seeds"].startswith("0-") else []
    is_folder = reference["dataset"] == "folder"
    source = Path(reference["data_dir"]).resolve().name if is_folder else reference["dataset"]
    return "-".join(["evaluate", *parts, str(first["num_samples"]), "vs", source])


def plot_nearest_neighbors(
    samples: np.ndarray, captions: list[str], real: np.ndarray, references: References,
    device: torch.device,
) -> Image.Image:  # fmt: skip
    """Returns samples and, below each, the real images nearest in pixels and features."""
    queries = np.concatenate([samples, samples[..., ::-1]])  # training may mirror images
    spaces = [("pixels", queries.reshape(len(queries), -1), real.reshape(len(real), -1), 255)]
    for network, reference in references.items():
        features = extract_features(network, queries, device)
        spaces.append((network.title.removeprefix("FD-"), features, reference.features, 1))
    tiles = [samples]
    captions = list(captions)
    for name, points, rows, unit in spaces:
        distance, index = (values.reshape(2, -1) for values in nearest_neighbors(points, rows))
        mirrored = distance[1] < distance[0]
        nearest = real[np.where(mirrored, index[1], index[0])]
        tiles.append(np.where(mirrored[:, None, None, None], nearest[..., ::-1], nearest))
        captions += [f"{name} {value:.3f}" for value in distance.min(axis=0) / unit]
    title = "samples and, below each, the nearest real images with their root mean square distance"
    images = torch.from_numpy(np.concatenate(tiles)) / 255
    return plots.captioned_grid(images, captions, columns=len(samples), title=title, smallest=96)


def save_curves(
    results: list[Evaluation], losses: dict[str, tuple[list[int], list[float]]],
    titles: list[str], stem: Path,
) -> None:  # fmt: skip
    """Plots losses, by name as timesteps and values, and distances by training time."""
    if losses:
        timesteps, _ = next(iter(losses.values()))
        values = {name: loss for name, (_, loss) in losses.items()}
        plots.save_loss_by_timestep(timesteps, values, stem.with_name(f"{stem.name}-loss.png"))
    trained = [row for row in results if row.get("trained_seconds")]
    if len(trained) > 1:
        minutes = [row["trained_seconds"] / 60 for row in trained]
        distances = {title: [row["scores"][title] for row in trained] for title in titles}
        plots.plot_fd_over_time(minutes, distances, stem.with_name(f"{stem.name}-curve.png"))
