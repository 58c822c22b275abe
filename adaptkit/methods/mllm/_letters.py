"""Lettered multiple choice, with cyclic shifts against position bias.

Source: mllm sheet `few-shot-classifier.md`, route 2.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MOST_OPTIONS = len(string.ascii_uppercase)
LETTERS = tuple(string.ascii_uppercase)


LETTER_ONLY = "Answer with the letter of the right option only."


def options_text(question: str, options: Sequence[str], ending: str = LETTER_ONLY) -> str:
    """The question with its options, one lettered line each, and how it is to be answered."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, ending])


def shifted(order: Sequence[int], shift: int) -> list[int]:
    """The options rotated by some places."""
    return [*order[shift:], *order[:shift]]


@dataclass
class LetterTally:
    """How often each letter was chosen, over all shifts.

    Args:
        counts: Choices by letter's place.
    """

    counts: list[int] = field(default_factory=list)

    def add(self, log_probs: Tensor) -> None:
        """Count the choices of some answers, log-probabilities [answers, letters]."""
        letters = log_probs.shape[1]
        self.counts += [0] * (letters - len(self.counts))
        for place, count in enumerate(torch.bincount(log_probs.argmax(dim=1).cpu(), minlength=letters).tolist()):
            self.counts[place] += count

    @property
    def bias(self) -> float:
        """Largest minus smallest share of a letter: 0 where all are chosen alike, 1 where one always is."""
        total = sum(self.counts)
        return (max(self.counts) - min(self.counts)) / total if total else 0.0


def spread(shortlist: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
    """Logits of all classes: the shortlist's, and below its lowest the others in the order of their scores.

    Args:
        shortlist: Classes that were options, int64 [rows, options].
        chosen: Their log-probabilities, [rows, options].
        scores: What the shortlist was made from, [rows, classes].
    """
    others = scores.scatter(1, shortlist, float("-inf"))
    lowest = chosen.amin(dim=1, keepdim=True)
    below = lowest - 1 + others - others.amax(dim=1, keepdim=True)
    return below.scatter(1, shortlist, chosen)
