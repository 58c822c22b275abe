"""Candidate answers as one tree of tokens: what they share is computed once.

Source: mllm sheet `few-shot-classifier.md`, route 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from adaptkit.errors import DataError


@dataclass(frozen=True)
class Trie:
    """Token sequences as a tree; parents come before their children.

    Args:
        tokens: Token of each node, int64 [nodes].
        parents: Parent of each node, -1 for the root, int64 [nodes].
        depths: Steps from the root, 0 for a first token, int64 [nodes].
        ends: Node that each candidate ends in, int64 [candidates].
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    ends: Tensor

    @classmethod
    def build(cls, sequences: Sequence[Sequence[int]]) -> Trie:
        """The tree of some token sequences.

        Raises:
            DataError: There is none, or one is empty.
        """
        if not sequences or not all(sequences):
            raise DataError("Candidate answers need at least one token each: leave empty names out.")
        places: dict[tuple[int, int], int] = {}
        tokens: list[int] = []
        parents: list[int] = []
        depths: list[int] = []
        ends: list[int] = []
        for sequence in sequences:
            node = -1
            for depth, token in enumerate(sequence):
                key = (node, int(token))
                if key not in places:
                    places[key] = len(tokens)
                    tokens.append(int(token))
                    parents.append(node)
                    depths.append(depth)
                node = places[key]
            ends.append(node)
        return cls(*(torch.tensor(values, dtype=torch.int64) for values in (tokens, parents, depths, ends)))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each candidate, int64 [candidates]."""
        return self.depths[self.ends] + 1

    @cached_property
    def ancestors(self) -> Tensor:
        """Whether node j lies on the way from the root to node i, itself included, bool [nodes, nodes]."""
        count = len(self.tokens)
        above = torch.zeros(count, count, dtype=torch.bool)
        for node, parent in enumerate(self.parents.tolist()):
            if parent >= 0:
                above[node] = above[parent]
            above[node, node] = True
        return above

    def paths(self) -> Tensor:
        """Which nodes a candidate's tokens are, float32 [candidates, nodes]."""
        return self.ancestors[self.ends].float()

    def inner(self) -> Tensor:
        """Nodes that have children: those whose next-token probabilities are needed, int64 [inner]."""
        return torch.unique(self.parents[self.parents >= 0])

    def groups(self, limit: int) -> list[Tensor]:
        """Inner nodes in groups of about `limit`, each closed under parents, so that it can be computed on its own.

        Branches from the root stay whole: one with more nodes than `limit` makes a group of its own.
        """
        roots: list[int] = []
        for node, parent in enumerate(self.parents.tolist()):
            roots.append(node if parent < 0 else roots[parent])
        branches: dict[int, list[int]] = {}
        for node in self.inner().tolist():
            branches.setdefault(roots[node], []).append(node)
        groups: list[list[int]] = []
        for branch in branches.values():
            if groups and len(groups[-1]) + len(branch) <= limit:
                groups[-1] += branch
            else:
                groups.append(list(branch))
        return [torch.tensor(sorted(group), dtype=torch.int64) for group in groups]
