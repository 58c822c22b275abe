"""Pairs of labelled images for "same or not?", and what is measured on them.

Images are known by their place, never by a file's name, which can repeat across folders.

Source: mllm sheet `twin.md` (pair maker, traps); TWIN arXiv 2512.23592.
Differs from the sheet: negatives that a source can't supply (no sibling class, all of its pairs taken) are drawn at
random, and counted as such.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["same", "near", "confused", "related", "random"]

_LISTED = 2**20  # pairs that may be written down at once


@dataclass(frozen=True)
class Pairs:
    """Pairs of images, by place.

    Args:
        places: First and second image, int64 [pairs, 2].
        same: 1 where both show one class, fp32 [pairs].
        kinds: How each pair was found.
    """

    places: Tensor
    same: Tensor
    kinds: tuple[Kind, ...]

    def __len__(self) -> int:
        return len(self.same)

    def counts(self) -> dict[str, int]:
        """Pairs of each kind."""
        return dict(Counter(self.kinds))


@dataclass(frozen=True)
class Sources:
    """Where hard negatives come from.

    Args:
        shares: Of "near", "confused" and "related" among the negatives; the rest is drawn at random.
        features: One vector per image, [images, width], for "near": the most similar images of other classes.
        confusions: Scores [images, classes] of the current model, for "confused": images of the classes with the
            highest scores beside an image's own.
        parents: A group per class, for "related": images of other classes of the same group.
    """

    shares: Mapping[str, float] = field(default_factory=dict)
    features: Tensor | None = None
    confusions: Tensor | None = None
    parents: Sequence[str] | None = None


def split_images(labels: Sequence[int], share: float, numbers: torch.Generator) -> tuple[list[int], list[int]]:
    """Places of the images to train on and of those held out; at least two of a class stay on each side, or all stay.

    Args:
        labels: Class of each image.
        share: Of each class's images that is held out.
        numbers: Where draws come from.
    """
    kept, held = list[int](), list[int]()
    for places in _by_class(labels).values():
        count = round(share * len(places))
        count = count if count >= 2 and len(places) - count >= 2 else 0
        order = _shuffled(places, numbers)
        held += order[:count]
        kept += order[count:]
    return sorted(kept), sorted(held)


def make_pairs(
    labels: Sequence[int],
    places: Sequence[int],
    positives: int,
    ratio: float,
    numbers: torch.Generator,
    sources: Sources | None = None,
    *,
    alone: bool = False,
) -> Pairs:
    """Same-class pairs and, exactly `ratio` times as many (rounded), pairs of different classes; none twice.

    Where the images don't give that many of one sort, there are fewer of both. The order inside a pair is random.

    Args:
        labels: Class of each image.
        places: Images that may be used.
        positives: Same-class pairs, spread evenly over the classes.
        ratio: Other-class pairs per same-class pair.
        numbers: Where draws come from.
        sources: Of hard negatives; None draws all at random.
        alone: Pair the only image of a class with itself.
    """
    groups = _by_class(labels, places)
    same = _alternating([_shuffled(_within(group, alone), numbers) for group in groups.values()])
    most = (len(places) ** 2 - sum(len(group) ** 2 for group in groups.values())) // 2
    count = min(positives, len(same))
    if ratio and round(count * ratio) > most:
        count = int(most / ratio)
    different = _negatives(labels, places, round(count * ratio), numbers, sources or Sources())
    found: list[tuple[tuple[int, int], Kind]] = [(pair, "same") for pair in same[:count]] + different
    turns = torch.rand(len(found), generator=numbers).tolist()
    ordered = [pair if turn < 0.5 else pair[::-1] for (pair, _), turn in zip(found, turns, strict=True)]
    return Pairs(
        torch.tensor(ordered, dtype=torch.int64).reshape(-1, 2),
        torch.tensor([float(kind == "same") for _, kind in found]),
        tuple(kind for _, kind in found),
    )


def balanced(same: Tensor, numbers: torch.Generator) -> Tensor:
    """Pairs two by two, one of a kind each, so that every batch of such couples holds as many yes as no.

    Args:
        same: 1 for same-class pairs, [pairs]; both sorts must be there.
        numbers: Where draws come from.

    Returns:
        Places of a same-class and of an other-class pair, int64 [couples, 2]; the rarer sort is gone through again.
    """
    sides = [
        side[torch.randperm(len(side), generator=numbers)]
        for side in (same.nonzero()[:, 0], (same == 0).nonzero()[:, 0])
    ]
    count = max(map(len, sides))
    return torch.stack([side.repeat(-(-count // len(side)))[:count] for side in sides], dim=1)


def shares_of(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers that add up to `total`, nearest to the shares, which add up to 1 (largest remainders)."""
    exact = {kind: total * share for kind, share in shares.items()}
    counts = {kind: math.floor(value + 1e-9) for kind, value in exact.items()}
    order = sorted(exact, key=lambda kind: counts[kind] - exact[kind])
    for kind in order[: total - sum(counts.values())]:
        counts[kind] += 1
    return counts


# --- measures ---------------------------------------------------------------------------------------------------------


def pair_facts(margins: Tensor, same: Tensor) -> dict[str, float]:
    """Accuracy over both orders, share of yes, and share of pairs whose two orders get the same answer.

    Args:
        margins: Of each pair in both orders, [pairs, 2]; above 0 is a yes.
        same: 1 where yes is right, [pairs].
    """
    yes = margins > 0
    right = (yes == same.bool().to(yes.device)[:, None]).double().mean()
    share = float(same.double().mean())
    return {
        "accuracy": float(right),
        "yes_rate": float(yes.double().mean()),
        "swap_consistency": float((yes[:, 0] == yes[:, 1]).double().mean()),
        "majority_rate": max(share, 1 - share),
    }


@dataclass
class PairTally:
    """Answers given to pairs.

    Args:
        asked: Answers.
        yes: Those that were yes.
        swapped: Pairs asked in both orders.
        agreed: Those with the same answer both times.
    """

    asked: int = 0
    yes: int = 0
    swapped: int = 0
    agreed: int = 0

    def add(self, margins: Tensor) -> None:
        """Count the answers of pairs in one order or both, [pairs, 1 or 2]."""
        yes = margins > 0
        self.asked += yes.numel()
        self.yes += int(yes.sum())
        if yes.shape[1] == 2:
            self.swapped += len(yes)
            self.agreed += int((yes[:, 0] == yes[:, 1]).sum())

    def facts(self) -> dict[str, Any]:
        """Share of yes and swap consistency, where pairs were asked."""
        facts: dict[str, Any] = {}
        if self.asked:
            facts = {"pair_answers": self.asked, "yes_rate": self.yes / self.asked}
        if self.swapped:
            facts["swap_consistency"] = self.agreed / self.swapped
        return facts


# --- negatives --------------------------------------------------------------------------------------------------------


def _negatives(
    labels: Sequence[int], places: Sequence[int], total: int, numbers: torch.Generator, sources: Sources
) -> list[tuple[tuple[int, int], Kind]]:
    """`total` different pairs of different classes by their sources' shares."""
    streams: dict[Kind, Callable[[], Iterator[tuple[int, int]]]] = {
        "near": lambda: _near(labels, places, sources.features),
        "confused": lambda: _confused(labels, places, sources.confusions, numbers),
        "related": lambda: _related(labels, places, sources.parents, numbers),
    }
    shares = {kind: share for kind, share in sources.shares.items() if share}
    counts = shares_of(total, shares | {"random": 1 - sum(shares.values())})
    taken: dict[tuple[int, int], Kind] = {}
    for kind, stream in streams.items():
        wanted = len(taken) + counts.get(kind, 0)
        for first, second in stream() if wanted > len(taken) else ():
            if len(taken) == wanted:
                break
            taken.setdefault((min(first, second), max(first, second)), kind)
    for first, second in _any(labels, places, total - len(taken), set(taken), numbers):
        taken[first, second] = "random"
    return list(taken.items())


def _near(labels: Sequence[int], places: Sequence[int], features: Tensor | None) -> Iterator[tuple[int, int]]:
    """Every image with its nearest one of another class, then every image with its second, and so on."""
    if features is None:
        return
    at = torch.as_tensor(list(places))
    unit = torch.nn.functional.normalize(features[at].float().cpu(), dim=1)
    own = torch.tensor([labels[place] for place in places])
    similar = (unit @ unit.T).masked_fill(own[:, None] == own, -torch.inf)
    order = similar.argsort(dim=1, descending=True, stable=True)
    others = (own[:, None] != own).sum(dim=1).tolist()
    for rank in range(len(places)):
        for place, partner, count in zip(places, order[:, rank].tolist(), others, strict=True):
            if rank < count:  # behind them come those of its own class
                yield place, places[partner]


def _confused(
    labels: Sequence[int], places: Sequence[int], scores: Tensor | None, numbers: torch.Generator
) -> Iterator[tuple[int, int]]:
    """Every image with one of the class it is confused with most; then all again, and then of the next class."""
    if scores is None:
        return
    groups = _by_class(labels, places)
    order = scores.argsort(dim=1, descending=True, stable=True).tolist()
    for rank in range(scores.shape[1] - 1):
        partners = {}
        for place in places:
            others = [label for label in order[place] if label != labels[place]]
            partners[place] = _shuffled(groups.get(others[rank], []), numbers)
        yield from _in_turn(partners)


def _related(
    labels: Sequence[int], places: Sequence[int], parents: Sequence[str] | None, numbers: torch.Generator
) -> Iterator[tuple[int, int]]:
    """Every image with one of another class of the same group, again and again."""
    if parents is None:
        return
    partners = {
        place: _shuffled(
            [
                other
                for other in places
                if labels[other] != labels[place] and parents[labels[other]] == parents[labels[place]]
            ],
            numbers,
        )
        for place in places
    }
    yield from _in_turn(partners)


def _any(
    labels: Sequence[int], places: Sequence[int], count: int, taken: set[tuple[int, int]], numbers: torch.Generator
) -> Iterator[tuple[int, int]]:
    """`count` pairs of different classes that aren't taken, at random; there must be as many."""
    left, found = count, set(taken)
    if len(places) ** 2 <= _LISTED:  # few images can run out of pairs: all that are left, shuffled
        free = [p for p in combinations(sorted(places), 2) if labels[p[0]] != labels[p[1]] and p not in taken]
        yield from _shuffled(free, numbers)[:count]
        return
    while left > 0:
        draws = torch.randint(len(places), (left, 2), generator=numbers).tolist()
        for first, second in (sorted((places[one], places[two])) for one, two in draws):
            if labels[first] != labels[second] and (first, second) not in found:
                found.add((first, second))
                left -= 1
                yield first, second


# --- pieces -----------------------------------------------------------------------------------------------------------


def _by_class(labels: Sequence[int], places: Sequence[int] | None = None) -> dict[int, list[int]]:
    groups: dict[int, list[int]] = {}
    for place in sorted(range(len(labels)) if places is None else places):
        groups.setdefault(labels[place], []).append(place)
    return dict(sorted(groups.items()))


def _within(group: Sequence[int], alone: bool) -> list[tuple[int, int]]:
    """All pairs of one class."""
    return [(group[0], group[0])] if alone and len(group) == 1 else list(combinations(group, 2))


def _shuffled(items: Sequence[Any], numbers: torch.Generator) -> list[Any]:
    return [items[place] for place in torch.randperm(len(items), generator=numbers).tolist()]


def _alternating(rows: Sequence[list[Any]]) -> list[Any]:
    """The first of each row, then the second of each, as long as there are some."""
    longest = max(map(len, rows), default=0)
    return [row[place] for place in range(longest) for row in rows if place < len(row)]


def _in_turn(partners: Mapping[int, list[int]]) -> Iterator[tuple[int, int]]:
    """Every image with its first partner, then every image with its second, and so on."""
    yield from _alternating([[(place, other) for other in others] for place, others in partners.items()])
