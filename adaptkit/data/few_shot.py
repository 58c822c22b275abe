"""Few-shot sampling: the same images as the papers, from the same seeds.

The default, "coop", reproduces the published image lists. One seed gives different images in other code bases, so each
has a sampler by name:

=================  =====================================================================================
coop               Random(seed): train, then val with min(shots, 4), from one generator
cross-modal        the same draws as coop
tip                Random(1) whatever the seed; classes with too few images repeat some; the whole val split
clip-lora          Random(seed): val with min(shots, 4) first, then train
lp++               Random(seed), seeds 1 … 10 for its ten tasks: train, then val with `shots` as well
tpt                Random(0) afresh for every class, whatever the seed
coop-linear-probe  NumPy's RandomState(seed), classes in ascending order
=================  =====================================================================================

Source: datasets sheet, section 4. It leaves open, and we chose: the val draws of tpt (as coop's, reseeded per class),
and the order of draws of coop-linear-probe (train, then val).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from adaptkit.data.splits import Split, TrainSplit, ValSplit, require_split
from adaptkit.errors import ConfigError, DataError, UnknownNameError

SAMPLER_VERSION = 1
"""Raised when any sampler draws other images than before; stored in few-shot lists."""

_VAL_SHOTS = 4  # CoOp's upper limit of validation images per class
_TIP_SEED = 1
_TPT_SEED = 0

Groups = dict[int, list[int]]
Draw = Callable[[Sequence[int], int], list[int]]


@dataclass(frozen=True, eq=False)
class FewShot:
    """The images one seed draws.

    Args:
        train_indices: Positions in the train split, int64 [n], class by class in order of first appearance.
        val_indices: Positions in the val split, int64 [m]; empty without a val split.
        shots: Images per class asked for.
        seed: The seed.
        sampler: Which code base's draws.
        train_digest: sha256 of the newline-joined names of the training images.
        val_digest: The same for the validation images.
        short_classes: (class name, images) of classes that have fewer images than shots.
        notes: What a reader of results must know.
    """

    train_indices: np.ndarray
    val_indices: np.ndarray
    shots: int
    seed: int
    sampler: str
    train_digest: str
    val_digest: str
    short_classes: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Names the training image list."""
        return self.train_digest


def sample_few_shot(
    train: TrainSplit,
    val: ValSplit | None,
    shots: int,
    seed: int,
    sampler: str = "coop",
    *,
    allow_fewer: bool = False,
) -> FewShot:
    """Draw `shots` training images per class, and validation images beside them.

    Args:
        train: Split to draw from; the order of its list matters.
        val: Split to draw validation images from, or None.
        shots: Training images per class, at least 1.
        seed: Any integer; 0 is a seed like any other (CoOp's command line ignores it).
        sampler: Whose draws to reproduce; see the table above.
        allow_fewer: Take all images of classes that have fewer than `shots`, as CoOp does, and report them.

    Raises:
        DataError: A class has fewer images than `shots` (they are listed), or a split of the wrong kind.
        ConfigError: `shots` below 1.
        UnknownNameError: No such sampler.
    """
    require_split(train, TrainSplit, "Few-shot sampling")
    if val is not None:
        require_split(val, ValSplit, "Few-shot sampling, for its validation images,")
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 1:
        raise ConfigError(f"{shots!r} shots can't be drawn: give a whole number of at least 1.")
    if sampler not in SAMPLERS:
        raise UnknownNameError.for_name("sampler", sampler, SAMPLERS)
    if not len(train):
        raise DataError("No shots can be drawn: the dataset has test images alone (it is a target to test on).")
    short = _short_classes(train, shots)
    if short and not allow_fewer:
        raise DataError(_too_few(short, shots))
    train_groups, val_groups = group_by_label(train.labels), group_by_label(val.labels if val is not None else [])
    train_indices, val_indices = SAMPLERS[sampler](train_groups, val_groups, shots, int(seed))
    return FewShot(
        np.array(train_indices, dtype=np.int64),
        np.array(val_indices, dtype=np.int64),
        shots,
        int(seed),
        sampler,
        train.subset(train_indices).paths_digest,
        val.subset(val_indices).paths_digest if val is not None else "",
        tuple(short),
        _notes(sampler, short, shots),
    )


def group_by_label(labels: Sequence[int] | np.ndarray) -> Groups:
    """Positions by label: labels in order of first appearance (not sorted), positions in list order."""
    groups: Groups = {}
    for position, label in enumerate(np.asarray(labels, dtype=np.int64).tolist()):
        groups.setdefault(label, []).append(position)
    return groups


def _draw_from(generator: random.Random) -> Draw:
    """CoOp's draw: `count` of the items, or all of them in list order, without drawing, where there are fewer."""
    return lambda items, count: generator.sample(items, count) if len(items) >= count else list(items)


def _each(groups: Groups, count: int, draw: Draw) -> list[int]:
    return [position for items in groups.values() for position in draw(items, count)]


def _coop(train: Groups, val: Groups, shots: int, seed: int) -> tuple[list[int], list[int]]:
    draw = _draw_from(random.Random(seed))
    chosen = _each(train, shots, draw)
    return chosen, _each(val, min(shots, _VAL_SHOTS), draw)


def _tip(train: Groups, val: Groups, shots: int, seed: int) -> tuple[list[int], list[int]]:
    generator = random.Random(_TIP_SEED)

    def draw(items: Sequence[int], count: int) -> list[int]:
        return generator.sample(items, count) if len(items) >= count else generator.choices(items, k=count)

    return _each(train, shots, draw), sorted(position for items in val.values() for position in items)


def _clip_lora(train: Groups, val: Groups, shots: int, seed: int) -> tuple[list[int], list[int]]:
    draw = _draw_from(random.Random(seed))
    chosen = _each(val, min(shots, _VAL_SHOTS), draw)
    return _each(train, shots, draw), chosen


def _lp_plus_plus(train: Groups, val: Groups, shots: int, seed: int) -> tuple[list[int], list[int]]:
    draw = _draw_from(random.Random(seed))
    chosen = _each(train, shots, draw)
    return chosen, _each(val, shots, draw)


def _tpt(train: Groups, val: Groups, shots: int, seed: int) -> tuple[list[int], list[int]]:
    def draw(items: Sequence[int], count: int) -> list[int]:
        return _draw_from(random.Random(_TPT_SEED))(items, count)

    return _each(train, shots, draw), _each(val, min(shots, _VAL_SHOTS), draw)


def _coop_linear_probe(train: Groups, val: Groups, shots: int, seed: int) -> tuple[list[int], list[int]]:
    generator = np.random.RandomState(seed % 2**32)  # NumPy takes no other seeds

    def draw(items: Sequence[int], count: int) -> list[int]:
        if len(items) < count:
            return list(items)
        chosen: list[int] = generator.choice(np.array(items), size=count, replace=False).tolist()
        return chosen

    chosen = _each(dict(sorted(train.items())), shots, draw)
    return chosen, _each(dict(sorted(val.items())), min(shots, _VAL_SHOTS), draw)


SAMPLERS: dict[str, Callable[[Groups, Groups, int, int], tuple[list[int], list[int]]]] = {
    "coop": _coop,
    "cross-modal": _coop,
    "tip": _tip,
    "clip-lora": _clip_lora,
    "lp++": _lp_plus_plus,
    "tpt": _tpt,
    "coop-linear-probe": _coop_linear_probe,
}
"""Samplers by name."""


def _short_classes(split: Split, shots: int) -> list[tuple[str, int]]:
    """Classes with fewer images than shots, those without any included."""
    return [(name, count) for name, count in zip(split.class_names, split.counts(), strict=True) if count < shots]


def _too_few(short: Sequence[tuple[str, int]], shots: int) -> str:
    listed = ", ".join(f"{name} {count}" for name, count in short[:10]) + (", …" if len(short) > 10 else "")
    least = min(count for _, count in short)
    hint = f"ask for {least} shots, add images, or allow fewer" if least else "add images, or allow fewer"
    return (
        f"{len(short)} class{'es have' if len(short) > 1 else ' has'} fewer training images than {shots}"
        f" shot{'s' if shots > 1 else ''} ({listed}): {hint} (--allow-fewer)."
    )


def _notes(sampler: str, short: Sequence[tuple[str, int]], shots: int) -> tuple[str, ...]:
    notes = []
    if short:
        listed = ", ".join(f"{name} {count}" for name, count in short[:10])
        how = "repeated" if sampler == "tip" else "taken as they are"
        notes.append(f"{len(short)} classes have fewer than {shots} training images, {how}: {listed}")
    if sampler in ("tip", "tpt"):
        notes.append(f"the sampler {sampler!r} draws the same images for every seed")
    return tuple(notes)
