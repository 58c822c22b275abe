"""What the studio works out of numbers alone: folds, which images to label next, which classes are confused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

FOLDS = 5
_LEAST_UNCERTAINTY = 0.01  # where the classifier is sure of everything, diversity alone decides


def folds(labels: Ints, seed: int = 0) -> Ints:
    """The fold of each image, [n] in 0 … FOLDS - 1, each class spread evenly; -1 for the only image of its class.

    Such an image is always trained on and never tested: a class that wasn't seen can't be answered.

    Args:
        labels: Class of each image, [n].
        seed: Of the shuffling within classes.
    """
    places = np.full(len(labels), -1, dtype=np.int64)
    numbers = np.random.default_rng(seed)
    start = 0
    for label in np.unique(labels):
        members = numbers.permutation(np.flatnonzero(labels == label))
        if len(members) > 1:
            places[members] = (start + np.arange(len(members))) % FOLDS
            start += len(members)  # so that small classes don't all fall into the first folds
    return places


def uncertainty(odds: Floats) -> Floats:
    """Entropy of probabilities [n, classes], from 0 (sure) to 1 (all classes alike)."""
    classes = odds.shape[1]
    if classes < 2:
        return np.ones(len(odds))
    safe = np.clip(odds, 1e-12, 1.0)
    result: Floats = -(safe * np.log(safe)).sum(axis=1) / np.log(classes)
    return result


def label_next(odds: Floats | None, features: Floats, known: Floats, count: int) -> list[int]:
    """Positions of the images that are most worth a label, the best first: uncertainty × diversity.

    One after the other, the image with the largest product of the classifier's uncertainty and its distance
    (1 - cosine) to the nearest image that has a label or was chosen before.

    Args:
        odds: Probabilities [n, classes]; None where nothing answers yet, and diversity alone decides.
        features: Of the images without a label, [n, dim], unit rows.
        known: Of the images with one, [m, dim], unit rows.
        count: How many.

    Source: uncertainty sampling with the greedy k-centre choice of arXiv 1708.00489.
    """
    weight = np.ones(len(features)) if odds is None else np.maximum(uncertainty(odds), _LEAST_UNCERTAINTY)
    distance = np.full(len(features), 2.0)
    if len(known):
        distance = np.minimum(distance, 1 - (features @ known.T).max(axis=1))
    elif len(features) and odds is None:
        distance = 1 + features @ features.mean(axis=0)  # the most ordinary image is the first
    chosen: list[int] = []
    free = np.ones(len(features), dtype=bool)
    for _ in range(min(count, len(features))):
        best = int(np.where(free, weight * np.maximum(distance, 1e-9), -1.0).argmax())
        chosen.append(best)
        free[best] = False
        distance = np.minimum(distance, 1 - features @ features[best])
    return chosen


@dataclass(frozen=True)
class Confusion:
    """Images of one class that were taken for another.

    Args:
        true: The class they are of.
        taken_for: The class that was answered.
        images: Positions of the images.
    """

    true: int
    taken_for: int
    images: tuple[int, ...]


def confusions(labels: Sequence[int], answers: Sequence[int]) -> list[Confusion]:
    """The pairs of classes that are confused, the most frequent first."""
    pairs: dict[tuple[int, int], list[int]] = defaultdict(list)
    for position, (label, answer) in enumerate(zip(labels, answers, strict=True)):
        if label != answer:
            pairs[label, answer].append(position)
    ranked = sorted(pairs.items(), key=lambda item: (-len(item[1]), item[0]))
    return [Confusion(true, taken, tuple(images)) for (true, taken), images in ranked]
