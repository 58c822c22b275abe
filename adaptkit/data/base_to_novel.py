"""Base and novel classes: the first and second half of a dataset's labels.

Other orders and lists of one's own are options that reports must mark.

Source: protocols sheet, section 2.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from adaptkit.data.splits import S
from adaptkit.errors import DataError


@dataclass(frozen=True)
class ClassSubset:
    """Some classes of a dataset, with labels of their own: 0 … len(classes) - 1.

    Args:
        name: "base", "novel", or "all" for both.
        classes: Their labels in the whole dataset, ascending; position is the new label.
    """

    name: Literal["base", "novel", "all"]
    classes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.classes)

    def names(self, class_names: Sequence[str]) -> tuple[str, ...]:
        """The subset's class names, in the order of its new labels."""
        return tuple(class_names[label] for label in self.classes)

    def indices(self, labels: Sequence[int] | np.ndarray) -> np.ndarray:
        """Positions of the images that belong to the subset, ascending, int64 [k]."""
        return np.flatnonzero(np.isin(np.asarray(labels), self.classes)).astype(np.int64)

    def relabel(self, labels: Sequence[int] | np.ndarray) -> np.ndarray:
        """New labels of images that all belong to the subset, int64 [k].

        Raises:
            DataError: An image belongs to another class.
        """
        new = {label: position for position, label in enumerate(self.classes)}
        try:
            return np.array([new[int(label)] for label in labels], dtype=np.int64)
        except KeyError as error:
            raise DataError(f"Label {error.args[0]} isn't one of the {self.name} classes.") from error

    def restrict(self, split: S) -> S:
        """The part of a split that belongs to the subset, with new labels and class names; its type stays."""
        kept = split.subset(self.indices(split.labels))
        # names first: the labels are checked against them
        return replace(kept, class_names=self.names(split.class_names), labels=self.relabel(kept.labels))


def split_base_novel(
    labels: Sequence[int] | np.ndarray, num_classes: int, order: Sequence[int] | None = None
) -> tuple[ClassSubset, ClassSubset]:
    """Halve the classes: of n labels, sorted, the first ceil(n / 2) are base and the others novel.

    Shots are drawn from all classes first and filtered afterwards, so that base, novel and all-class runs with one seed
    share their images.

    Args:
        labels: Labels of the (few-shot) training list; only classes present in it count.
        num_classes: Classes of the dataset, to check the labels.
        order: Every label once, in the order to halve them in; None for ascending.

    Raises:
        DataError: Fewer than two classes, or a label outside the classes.

    Example:
        >>> base, novel = split_base_novel([0, 0, 1, 2, 4], 5)
        >>> base.classes, novel.classes
        ((0, 1), (2, 4))
    """
    present = sorted({int(label) for label in labels})
    if present and not 0 <= present[0] <= present[-1] < num_classes:
        raise DataError(f"Labels run from {present[0]} to {present[-1]}; 0 to {num_classes - 1} is accepted.")
    if len(present) < 2:
        raise DataError(f"Base-to-novel needs at least 2 classes with training images, and there are {len(present)}.")
    ordered = present if order is None else [label for label in order if label in set(present)]
    middle = (len(present) + 1) // 2
    return ClassSubset("base", tuple(sorted(ordered[:middle]))), ClassSubset("novel", tuple(sorted(ordered[middle:])))


def split_by_lists(labels: Sequence[int] | np.ndarray, base: Iterable[int]) -> tuple[ClassSubset, ClassSubset]:
    """Base classes as given, novel all others; of both those that are in `labels`.

    Raises:
        DataError: One of the two is empty.
    """
    present, chosen = {int(label) for label in labels}, set(base)
    halves = (present & chosen, present - chosen)
    if not all(halves):
        which = "base" if not halves[0] else "novel"
        raise DataError(f"No {which} class has training images: base-to-novel needs at least one on each side.")
    return ClassSubset("base", tuple(sorted(halves[0]))), ClassSubset("novel", tuple(sorted(halves[1])))


def random_order(num_classes: int, seed: int) -> list[int]:
    """All labels in an order drawn by the seed, for random splits into base and novel classes."""
    order = list(range(num_classes))
    random.Random(seed).shuffle(order)
    return order
