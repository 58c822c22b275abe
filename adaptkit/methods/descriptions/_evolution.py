"""ProAPO's search over sets: an archive of what was tried, and the operators that make new sets from the best ones.

Source: proapo sheet, "Stage 1" and "Stage 2".
Differs from the reference: one stream of random numbers (Python's); the archive's best is asked for when the search is
over, so that the last round's sets count (they are ranked a round too late there).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Bits = frozenset[int]
"""A set of members of a library, by their place in it."""

EXTRA_TRIES = 64
"""An operator gives up after this many draws more than it was to find."""

SMALLEST_WEIGHT = 1e-3


@dataclass(frozen=True)
class Operators:
    """How many new sets each operator makes in a round: the first three of every parent, the others in all."""

    additions: int = 8
    removals: int = 8
    replacements: int = 8
    mutations: int = 8
    crossovers: int = 16


@dataclass
class Archive:
    """Every set that was evaluated, with its fitness, in order.

    Args:
        evaluate: The fitness of a set; higher is better.
        scores: Fitness by set.
    """

    evaluate: Callable[[Bits], float]
    scores: dict[Bits, float] = field(default_factory=dict)

    def add(self, sets: Sequence[Bits]) -> None:
        """Evaluate those that are new."""
        for one in sets:
            if one not in self.scores:
                self.scores[one] = self.evaluate(one)

    def best(self, count: int = 1) -> list[Bits]:
        """The fittest so far; of equals the smaller set, then the earlier."""
        return sorted(self.scores, key=lambda one: (-self.scores[one], len(one)))[:count]

    def best_score(self) -> float:
        return self.scores[self.best()[0]]


@dataclass(frozen=True)
class Breeder:
    """Makes new sets.

    Args:
        library: The members to choose from.
        operators: How many of each kind.
        numbers: Where draws come from.
        weights: Per member, how likely an addition is; None for all alike. Removals go the other way round.
    """

    library: tuple[int, ...]
    operators: Operators
    numbers: random.Random
    weights: dict[int, float] | None = None

    def children(self, archive: Archive, parents: Sequence[Bits], mutation_size: int) -> list[Bits]:
        """A round's new sets, none of them in the archive, none twice."""
        found: dict[Bits, None] = {}
        plan = self.operators

        def gather(wanted: int, draw: Callable[[], Bits | None]) -> None:
            before = len(found)
            for _ in range(wanted + EXTRA_TRIES):
                if len(found) - before >= wanted:
                    return
                child = draw()
                if child is None:
                    return
                if child and child not in archive.scores:
                    found[child] = None

        for parent in parents:
            gather(plan.additions, lambda parent=parent: self.added(parent))  # type: ignore[misc]
            gather(plan.removals, lambda parent=parent: self.removed(parent))  # type: ignore[misc]
            gather(plan.replacements, lambda parent=parent: self.replaced(parent))  # type: ignore[misc]
        gather(plan.mutations, lambda: self.drawn(mutation_size))
        gather(plan.crossovers, lambda: self.crossed(parents))
        return list(found)

    def added(self, parent: Bits) -> Bits | None:
        """One more member; None where there is no other."""
        outside = [member for member in self.library if member not in parent]
        return parent | {self._pick(outside)} if outside else None

    def removed(self, parent: Bits) -> Bits | None:
        """One member less; None for sets of one or two."""
        return parent - {self._pick(sorted(parent), reverse=True)} if len(parent) > 2 else None

    def replaced(self, parent: Bits) -> Bits | None:
        """One member out, another one in."""
        outside = [member for member in self.library if member not in parent]
        if not outside or not parent:
            return None
        return parent - {self._pick(sorted(parent), reverse=True)} | {self._pick(outside)}

    def drawn(self, size: int) -> Bits | None:
        """A random set of that size, or of all there is."""
        return frozenset(self.numbers.sample(self.library, min(size, len(self.library)))) or None

    def crossed(self, parents: Sequence[Bits]) -> Bits | None:
        """What all parents share, and some of the rest: likelier what more of them hold. None without two to choose."""
        if not parents:
            return None
        common = frozenset.intersection(*parents)
        rest = sorted(frozenset.union(*parents) - common)
        if len(rest) < 2:
            return None
        held = [float(sum(member in parent for parent in parents)) for member in rest]
        chosen = set(common)
        for _ in range(self.numbers.randint(1, len(rest))):
            place = self.numbers.choices(range(len(rest)), held)[0]
            chosen.add(rest.pop(place))
            held.pop(place)
        return frozenset(chosen)

    def _pick(self, members: Sequence[int], *, reverse: bool = False) -> int:
        if self.weights is None:
            return self.numbers.choice(members)
        weights = [max(self.weights[member], SMALLEST_WEIGHT) for member in members]
        return self.numbers.choices(members, [1 / weight for weight in weights] if reverse else weights)[0]


def evolve(
    archive: Archive,
    breeder: Breeder,
    rounds: int,
    *,
    parents: int = 4,
    progress: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """Let the archive's best have children, round after round; the best fitness after each.

    A round's random sets have 2 members and one more in every further round.
    """
    history = []
    for step in range(rounds):
        progress(step)
        archive.add(breeder.children(archive, archive.best(parents), 2 + step))
        history.append(archive.best_score())
    return history
