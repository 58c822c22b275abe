"""Constrained decoding: the answer is grown token by token and can only become a class name.

It gives what `generate(prefix_allowed_tokens_fn=…)` of transformers gives over the same tree of names, with
`length_penalty=0`; a test compares the two. Scores of tokens come from one pass over the tree instead of one per step.

Source: mllm sheet `few-shot-classifier.md`, route 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaptkit.backbones.mllm.trie import Trie


def constrained_beams(scores: Tensor, trie: Trie, beams: int) -> Tensor:
    """Candidates that beam search ends in, with their summed log-probabilities; -inf for the others.

    Args:
        scores: log p of each node after what lies above it, [rows, nodes].
        trie: The candidates; none may be the beginning of another (they end in a token of their own).
        beams: Beam width; 1 is greedy.

    Returns:
        [rows, candidates].
    """
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(trie.parents.tolist()):
        children.setdefault(parent, []).append(node)
    found = torch.full((len(scores), len(trie.tokens)), float("-inf"), dtype=scores.dtype)
    for row, values in enumerate(scores.tolist()):
        live = [(0.0, -1)]
        done: list[tuple[float, int]] = []
        while live:
            grown = sorted(((total + values[c], c) for total, node in live for c in children[node]), reverse=True)
            kept = sorted([*grown[: 2 * beams], *done], reverse=True)[:beams]
            live = [item for item in kept if item[1] in children]
            done = [item for item in kept if item[1] not in children]
        for total, node in done:
            found[row, node] = total
    return found.to(scores.device)[:, trie.ends.to(scores.device)]
