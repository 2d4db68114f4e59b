"""engine/evaluation_report.py: the table, names of files, figures."""

import json

import numpy as np
import pytest

from engine import metrics, plots
from engine.evaluation_report import (
    format_classes,
    format_table,
    plot_nearest_neighbors,
    result_name,
    without_other_report,
)
from engine.shapes import draw_shapes
from tests.helpers import CPU, MeanColors


def test_plot_nearest_neighbors_finds_mirrored_copies_in_pixels_and_features():
    real = draw_shapes(np.arange(40), 32, 0)
    network = metrics.Lite0()
    references = {network: metrics.feature_statistics(metrics.extract_features(network, real, CPU))}
    samples = np.ascontiguousarray(real[[7, 19], ..., ::-1])
    figure = plot_nearest_neighbors(samples, ["a", "b"], real, references, CPU)
    pixels = np.asarray(figure)
    # 96 pixels and a line of text each.
    sampled, by_pixels, by_features = (pixels[top : top + 96, 4:200] for top in (26, 140, 254))
    assert sampled.std() > 10
    assert np.array_equal(sampled, by_pixels) and np.array_equal(sampled, by_features)


def test_plot_nearest_neighbors_shows_the_nearest_with_distances(monkeypatch):
    shown = []
    keep = lambda *values, **options: shown.append((values, options))  # noqa: E731
    monkeypatch.setattr(plots, "captioned_grid", keep)
    real = np.random.default_rng(0).integers(51, 200, (6, 3, 4, 4), np.uint8)
    samples = np.stack([real[4] + 51, real[1, :, :, ::-1]]).astype(np.uint8)
    network = MeanColors()
    features = metrics.extract_features(network, real, CPU)
    features[[4, 5]] = features[[5, 4]] + np.float32([[51], [1000]])
    # In features, image 5 is the nearest to sample 0.
    features[5] = metrics.extract_features(network, samples[:1], CPU)[0] + 2
    references = {network: metrics.feature_statistics(features)}
    plot_nearest_neighbors(samples, ["a", "b"], real, references, CPU)
    (((images, captions), options),) = shown
    expected = np.stack([*samples, real[4], samples[1], real[5], real[1]])
    np.testing.assert_array_equal((images * 255).round().numpy()[:5], expected[:5])
    assert captions[:5] == ["a", "b", "pixels 0.200", "pixels 0.000", "MeanColors 2.000"]
    assert captions[5] == "MeanColors 0.000" and options["columns"] == 2


def test_format_table_leaves_out_stds():
    rows = [
        {"name": name, "seconds": 12.3, "scores": {"FID": fid, "KID": 0.5, "KID std": 9.0}}
        for name, fid in (("first", 1.25), ("second", 30.0))
    ]
    assert [line.split() for line in format_table(rows).splitlines()] == [
        ["FID", "KID", "seconds"], ["first", "1.25", "0.5", "12"], ["second", "30", "0.5", "12"]
    ]  # fmt: skip


def test_format_classes_has_a_distance_where_any_class_does():
    cat = {"class": "cat", "samples": 3, "accuracy": 0.66666, "real accuracy": None}
    results = [
        {"name": "first", "classes": [cat | {"distance": 1.5}, cat | {"class": "a bird"}]},
        {"name": "second", "classes": [cat]},
    ]
    rows = [line.split() for line in format_classes(results, "FID", 0.98765).splitlines()]
    heads = ["class", "samples", "accuracy", "real", "accuracy"]
    assert rows == [
        ["first", "by", "class:"], [*heads, "FID"], ["cat", "3", "0.6667", "-", "1.5"],
        ["a", "bird", "3", "0.6667", "-", "-"],
        ["second", "by", "class:"], heads, ["cat", "3", "0.6667", "-"],
        ["class", "accuracy", "of", "real", "validation", "images:", "0.9877"],
    ]  # fmt: skip
    assert "validation" not in format_classes(results, "FID", None)  # without any


@pytest.mark.parametrize(
    "change",
    [
        {}, {"inputs": ["y.pt"]}, {"sha256": ["of a newer file"]}, {"sampling": {"guidance": 5.0}},
        {"use_amp": True}, {"reference": {}}, {"networks": ["lite0", "inception"]},
    ],
)  # fmt: skip
def test_report_replaces_only_one_of_the_same_inputs_and_settings(change, tmp_path):
    report = {"inputs": ["x.pt"], "sha256": ["abc"], "sampling": {"guidance": None}}
    report |= {"use_amp": False, "reference": {"dataset": "cifar10"}, "networks": ["lite0"]}
    (tmp_path / "name.json").write_text(json.dumps(report | {"seconds": 1}))
    found = without_other_report(tmp_path / "name", report | change)
    assert found == tmp_path / ("name_2" if change else "name")


@pytest.mark.parametrize(
    ("changes", "others", "name"),
    [
        ({}, 0, "unipc-14"),
        ({"guidance": 2.0}, 0, "unipc-14-guidance-2"),
        ({"guidance": 2.0, "guidance_mode": "cfg"}, 0, "unipc-14-cfg-guidance-2"),
        ({"seeds": "5-104"}, 2, "and-2-more-unipc-14-seeds-5-104"),
        ({"spacing": "own"}, 0, "unipc-14-own"),
        ({"sampler": "consistency", "noise_levels": "80,1"}, 0, "consistency-14-80-1"),
        ({"sampler": "a/my.py:f"}, 0, "a-my-f-14"),
    ],
)
def test_result_name_says_how_images_were_sampled(changes, others, name):
    row = {"name": "run-final", "checkpoint": "x.pt", "sampler": "unipc", "steps": 14}
    row |= {"spacing": "karras", "guidance": 1.0, "seeds": "0-99", "num_samples": 100}
    row |= {"guidance_mode": "autoguidance", "noise_levels": None}
    reference = {"dataset": "cifar10", "data_dir": "data"}
    found = result_name(row | changes, others, reference)
    assert found == f"evaluate-run-final-{name}-100-vs-cifar10"
