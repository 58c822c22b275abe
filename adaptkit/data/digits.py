"""scikit-learn's 1,797 real handwritten digits as 32x32 RGB pictures, with a fixed split.

The pictures are 8x8 with 17 grey levels. They are enlarged four times with cubic (Catmull-Rom) interpolation, edges
repeated, clipped to 0..255: smooth strokes, no new detail.

The split gives every class `round(0.5 n)` images for training and `round(0.2 n)` for validation (Python's round, half
to even), the rest for testing: the 50/20/30 rule that the few-shot literature uses where a dataset has no split of its
own. Within a class, order is shuffled by `random.Random(0)`, so the split never changes.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998), as
sklearn.datasets.load_digits.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLIT_SEED = 0
TRAIN_FRACTION, VAL_FRACTION = 0.5, 0.2


def cubic_weights(source: int, target: int) -> NDArray[np.float64]:
    """Catmull-Rom interpolation from `source` to `target` samples as a matrix [target, source]."""
    centre = (np.arange(target) + 0.5) * source / target - 0.5
    left = np.floor(centre).astype(int)
    weights = np.zeros((target, source))
    for tap in range(-1, 3):
        x = np.abs(centre - (left + tap))
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        column = np.clip(left + tap, 0, source - 1)  # repeats the edge
        np.add.at(weights, (np.arange(target), column), np.where(x < 1, near, np.where(x < 2, far, 0.0)))
    return weights


def enlarge(small: NDArray[Any], size: int = 32) -> NDArray[np.uint8]:
    """Grey pictures [n, h, h] in 0..16 as RGB [n, size, size, 3]."""
    weights = cubic_weights(small.shape[1], size)
    grey = np.clip(np.rint(weights @ small @ weights.T * (255 / 16)), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=3)


def split_rows(labels: NDArray[Any]) -> dict[str, NDArray[np.int64]]:
    """Row numbers of train, val and test, by the 50/20/30 rule within each class."""
    generator = random.Random(SPLIT_SEED)
    rows: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for label in range(int(labels.max()) + 1):
        own = [int(row) for row in np.flatnonzero(labels == label)]
        generator.shuffle(own)
        num_train, num_val = round(len(own) * TRAIN_FRACTION), round(len(own) * VAL_FRACTION)
        rows["train"] += own[:num_train]
        rows["val"] += own[num_train : num_train + num_val]
        rows["test"] += own[num_train + num_val :]
    return {split: np.array(sorted(chosen), dtype=np.int64) for split, chosen in rows.items()}


def load_digit_splits() -> tuple[dict[str, NDArray[np.uint8]], dict[str, NDArray[np.int64]]]:
    """Images [n, 32, 32, 3] and labels [n] by split."""
    from sklearn.datasets import load_digits  # here: it takes a second to import

    source = load_digits()
    labels = np.asarray(source.target, dtype=np.int64)
    rows = split_rows(labels)
    pictures = enlarge(source.images)
    return {split: pictures[r] for split, r in rows.items()}, {split: labels[r] for split, r in rows.items()}
