"""Scores by class: distance to the real images of a class, and how often it is recognized."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.dataloader import train_val_split
from engine.metrics import Statistics, feature_statistics, frechet_distance

MAX_DISTANCES = 100  # classes; with more, distances by class would take hours
WEIGHT_DECAY = 1e-3  # of the classifier
Classifier = Callable[[np.ndarray], np.ndarray]  # features (N, D) to labels (N,)
ClassRow = dict[str, Any]


def fit_classifier(features: np.ndarray, labels: np.ndarray, num_classes: int) -> Classifier:
    """Fits a logistic regression to features (N, D) and labels (N,) by L-BFGS."""
    # Features with mean 0 and std 1.
    mean = features.mean(axis=0)
    std = features.std(axis=0) + 1e-6

    def standardize(rows: np.ndarray) -> Tensor:
        return torch.from_numpy((rows - mean) / std)

    # A linear layer, zero at first.
    x = standardize(features)
    y = torch.from_numpy(labels)
    linear = nn.Linear(x.shape[1], num_classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    # L-BFGS evaluates the loss several times in its one step.
    def loss() -> Tensor:
        optimizer.zero_grad()
        penalty = 0.5 * WEIGHT_DECAY * linear.weight.square().sum()
        value = nn.functional.cross_entropy(linear(x), y) + penalty
        value.backward()
        return value

    optimizer.step(loss)

    @torch.no_grad()
    def classify(rows: np.ndarray) -> np.ndarray:
        return linear(standardize(rows)).argmax(dim=1).numpy()

    return classify


class ClassMetrics:
    """What samples of each class are compared with: real images with labels, by their features.

    A classifier is fitted to those that a run trains on; the validation split shows how well it
    does on real images. network: whose features the reference has. labels: int64 (N,) of the
    reference; images without a label are left out.
    """

    def __init__(
        self, network: nn.Module, reference: Statistics, labels: np.ndarray,
        class_names: Sequence[str],
    ):  # fmt: skip
        self.network = network
        self.class_names = class_names
        self.features = reference.features
        self.labels = labels
        train, validation = (part[labels[part] >= 0] for part in train_val_split(len(labels)))
        self.classify = fit_classifier(self.features[train], labels[train], len(class_names))
        self.validation_labels = labels[validation]
        predictions = self.classify(self.features[validation])
        self.is_validation_correct = predictions == self.validation_labels

    @property
    def real_accuracy(self) -> float | None:
        """The classifier's accuracy on real images of the validation split; None without any."""
        return rounded_mean(self.is_validation_correct)

    def score(
        self, features: np.ndarray, labels: np.ndarray
    ) -> tuple[float | None, list[ClassRow]]:
        """Returns how often samples are named as their class, and a row for each class.

        features: (N, D). labels: the class of each sample, -1 for none.
        """
        is_correct = self.classify(features) == labels
        rows: list[ClassRow] = []
        for label, name in enumerate(self.class_names):
            samples = labels == label
            real = self.labels == label
            validation = self.validation_labels == label
            row: ClassRow = {
                "class": name, "samples": int(samples.sum()),
                "accuracy": rounded_mean(is_correct[samples]),
                "real accuracy": rounded_mean(self.is_validation_correct[validation]),
            }  # fmt: skip
            if len(self.class_names) <= MAX_DISTANCES and min(samples.sum(), real.sum()) > 1:
                pair = map(feature_statistics, (features[samples], self.features[real]))
                row["distance"] = round(frechet_distance(*pair), 3)
            rows.append(row)
        return rounded_mean(is_correct[labels >= 0]), rows


def rounded_mean(is_correct: np.ndarray) -> float | None:
    """Returns the fraction that is correct; None of no values."""
    return round(float(is_correct.mean()), 4) if len(is_correct) else None
