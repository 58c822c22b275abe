"""Small image files for the tests of this folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adaptkit.data.splits import ArraySource, TestSplit, TrainSplit, ValSplit


def save_picture(path: Path, seed: int = 0, size: tuple[int, int] = (8, 6)) -> Path:
    """Save a noisy RGB picture of (width, height); missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def save_classes(root: Path, counts: Mapping[str, int], start: int = 0) -> Path:
    """Class folders with so many pictures each."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(start, start + count):
            save_picture(root / name / f"{index:03d}.png", seed=1000 * number + index)
    return root


def make_split(kind: Any, labels: list[int], num_classes: int | None = None) -> Any:
    """A split of blank pictures with given labels; ids are "kind/position"."""
    classes = max(labels, default=0) + 1 if num_classes is None else num_classes
    arrays = np.zeros((len(labels), 2, 2, 3), dtype=np.uint8)
    return kind(
        tuple(f"{kind.kind}/{index}" for index in range(len(labels))),
        np.array(labels, dtype=np.int64),
        tuple(f"class {label}" for label in range(classes)),
        ArraySource(arrays),
        np.arange(len(labels)),
    )


def make_train(labels: list[int], num_classes: int | None = None) -> TrainSplit:
    return make_split(TrainSplit, labels, num_classes)


def make_val(labels: list[int], num_classes: int | None = None) -> ValSplit:
    return make_split(ValSplit, labels, num_classes)


def make_test(labels: list[int], num_classes: int | None = None) -> TestSplit:
    return make_split(TestSplit, labels, num_classes)
