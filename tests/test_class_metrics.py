"""Scores by class: what the classifier is fitted to and tested on, unlabeled images."""

import numpy as np
import pytest
from torch import nn

from engine.class_metrics import ClassMetrics, fit_classifier
from engine.dataloader import train_val_split
from engine.metrics import feature_statistics, frechet_distance


def clusters(labels: np.ndarray) -> np.ndarray:
    """Features in three dimensions, 3 std around a corner for each class."""
    noise = np.random.default_rng(0).standard_normal((len(labels), 3))
    return (noise + 3 * np.eye(3)[labels]).astype(np.float32)


def test_classifier_is_near_the_best_possible():
    labels = np.arange(3000) % 3
    features = clusters(labels)
    classify = fit_classifier(features[:1500], labels[:1500], 3)
    # Bayes: the corner with the largest coordinate.
    best = (features[1500:].argmax(axis=1) == labels[1500:]).mean()
    found = (classify(features[1500:]) == labels[1500:]).mean()
    assert 0.9 < best < 1 and found == pytest.approx(best, abs=0.02)


def test_class_metrics_hold_out_the_validation_split_and_ignore_images_without_a_label():
    labels = np.arange(400) % 2
    features = clusters(labels)
    _, held_out = train_val_split(400)
    wrong = labels.copy()
    wrong[held_out] = 1 - labels[held_out]  # seen by nobody who learns
    scores = ClassMetrics(nn.Identity(), feature_statistics(features), wrong, ("a", "b"))
    assert scores.real_accuracy < 0.1
    unlabeled = np.where(np.arange(400) < 200, labels, -1)
    scores = ClassMetrics(nn.Identity(), feature_statistics(features), unlabeled, ("a", "b"))
    assert scores.real_accuracy >= 0.9

    # Samples: all of a, of which a quarter looks like b, and two without a label.
    sampled = np.zeros(42, int)
    sampled[40:] = -1
    looks = np.where(np.arange(42) % 4 == 3, 1, 0)
    accuracy, (a, b) = scores.score(clusters(looks), sampled)
    assert accuracy == a["accuracy"] == pytest.approx(0.75, abs=0.06)
    assert (a["samples"], b["samples"], b["accuracy"]) == (40, 0, None)
    expected = frechet_distance(
        feature_statistics(clusters(looks)[:40]), feature_statistics(features[:200:2])
    )
    assert a["distance"] == pytest.approx(expected, abs=1e-3) and "distance" not in b
