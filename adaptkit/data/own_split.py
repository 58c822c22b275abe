"""Splits of our own: the same on every machine, never comparable with published ones.

Every class is shuffled by a generator of its own from sorted file names, so a class keeps its split when others are
added. Without any official split a class gives `round(0.5 n)` training and `round(0.2 n)` validation images (Python's
round) and the rest for testing; where testing is official, `round(0.2 n)` of the training images validate. In very
small classes training comes first, then testing: one image trains; of two or more at least one tests.

Source: datasets sheet, sections 3 and 9.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from adaptkit.data.lists import Item, Lists, many

TRAIN_SHARE, VAL_SHARE = 0.5, 0.2


def split_sizes(count: int, shots: int | None = None) -> tuple[int, int, int]:
    """How many of a class's images train, validate and test in an own split.

    Args:
        count: The class's images, at least 1.
        shots: Training images to keep where the class has more than that; None for the plain rule.

    Example:
        >>> split_sizes(10), split_sizes(3), split_sizes(6, shots=4)
        ((5, 2, 3), (2, 0, 1), (4, 0, 2))
    """
    train, val = max(1, round(TRAIN_SHARE * count)), round(VAL_SHARE * count)
    if shots is not None and train < shots < count:
        train = shots
        val = min(val, int((count - train) * VAL_SHARE / (1 - TRAIN_SHARE)))  # the rest in the rule's own proportion
    if count > 1:
        val = min(val, count - train - 1)  # at least one image tests
    return train, val, count - train - val


def split_all(by_class: Mapping[str, Sequence[str]], seed: int, shots: int | None = None) -> tuple[Lists, list[str]]:
    """Split paths by class name into all three parts; labels follow the mapping's order.

    Returns:
        The lists, in path order within each class, and notes for the reader of results.
    """
    lists: Lists = {"train": [], "val": [], "test": []}
    raised = 0
    for label, (name, paths) in enumerate(by_class.items()):
        ordered = sorted(paths)
        shuffled = shuffled_positions(name, len(ordered), seed)
        train, val, test = split_sizes(len(ordered), shots)
        raised += train > split_sizes(len(ordered))[0]
        for split, start, size in (("train", 0, train), ("val", train, val), ("test", train + val, test)):
            chosen = sorted(shuffled[start : start + size])
            lists[split] += [Item(ordered[position], label) for position in chosen]
    notes = [f"own split, not comparable with published ones: 50/20/30 per class, seed {seed}"]
    if raised:
        notes.append(
            f"{many(raised, 'class')} too small for {shots} shots under the 50/20/30 rule: {shots} images kept for"
            " training, so the test images depend on the number of shots"
        )
    return lists, notes


def keep_val(
    labels: Sequence[int], names: Sequence[str], order: Sequence[str], seed: int
) -> tuple[list[int], list[int]]:
    """Take 20 % of each class's training images for validation.

    Args:
        labels: Class index of every training image.
        names: Class names by label; each names its class's generator.
        order: What the images are sorted by before they are shuffled: their paths.
        seed: The seed.

    Returns:
        Positions that still train and positions that validate, both ascending.
    """
    by_class: dict[int, list[int]] = {}
    for position in sorted(range(len(labels)), key=lambda position: order[position]):
        by_class.setdefault(labels[position], []).append(position)
    train: list[int] = []
    val: list[int] = []
    for label, positions in by_class.items():
        shuffled = [positions[index] for index in shuffled_positions(names[label], len(positions), seed)]
        kept = min(round(VAL_SHARE * len(positions)), len(positions) - 1)
        val += shuffled[:kept]
        train += shuffled[kept:]
    return sorted(train), sorted(val)


def shuffled_positions(name: str, count: int, seed: int) -> list[int]:
    """0 … `count` - 1, shuffled by the generator of the class `name`."""
    positions = list(range(count))
    random.Random(f"{seed}/{name}").shuffle(positions)
    return positions
