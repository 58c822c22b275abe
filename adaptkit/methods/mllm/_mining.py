"""Options for multiple-choice questions, mined from a model's own answers.

Source: mllm sheet `dive-k.md`, step 1.
Differs from the sheet: a leading article is dropped from an answer too, as everywhere in adaptkit.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from adaptkit.methods.mllm._matching import normalise
from adaptkit.methods.tags import answer_of

How = Literal["mined", "truth added", "filled", "unparsed", "ranked"]

_TOO_LONG = 100
_FILLED = 2
_LABEL = re.compile(r"^\s*(?:[\w-]+ ){0,3}[\w-]+:\s+")


@dataclass(frozen=True)
class Mined:
    """The options of one image's question.

    Args:
        options: Classes in the order of their letters.
        truth: The right class.
        how: Where they come from: the answers alone; with the truth added; with random ones, since too few classes
            were named ("filled") or nothing could be read ("unparsed"); or a ranking of classes.
    """

    options: tuple[int, ...]
    truth: int
    how: How

    @property
    def place(self) -> int:
        """Place of the right letter."""
        return self.options.index(self.truth)


def guess_of(text: str) -> str:
    """What an answer names, normalised; "" where that is nothing or far too long for a name.

    Args:
        text: A decoded answer; its last answer block counts, where it has one.
    """
    plain = _LABEL.sub("", answer_of(text), count=1).strip()
    return normalise(plain) if len(plain) < _TOO_LONG else ""


def mine(texts: Sequence[str], names: Sequence[str], truth: int, numbers: torch.Generator, most: int) -> Mined | None:
    """Options from an image's sampled answers; None where it is too easy to teach anything.

    Args:
        texts: The answers, decoded.
        names: The classes' names.
        truth: The right class.
        numbers: Draws random options and the order.
        most: How many options at most.
    """
    guesses = [guess for guess in map(guess_of, texts) if guess]
    known = {normalise(name): index for index, name in enumerate(names)}
    frequent = [guess for guess, _ in Counter(guesses).most_common(most)]
    options = list(dict.fromkeys(known[guess] for guess in frequent if guess in known))
    how: How = "mined"
    if not guesses:
        options, how = _others([truth], len(names), numbers), "unparsed"
    elif options == [truth]:
        return None
    elif len(options) <= 1:
        options, how = options + _others([truth, *options], len(names), numbers), "filled"
    elif truth not in options:
        how = "truth added"
    return _shuffled(options, truth, how, numbers, most)


def ranked(order: Sequence[int], truth: int, numbers: torch.Generator, most: int) -> Mined:
    """The first classes of a ranking as options, the truth among them.

    Args:
        order: All classes, those that make the hardest options first.
        truth: The right class.
        numbers: Draws the order of the options.
        most: How many options.
    """
    return _shuffled(list(order[:most]), truth, "ranked", numbers, most)


def _others(left_out: Sequence[int], classes: int, numbers: torch.Generator) -> list[int]:
    """Two random classes, or as many as there are."""
    order = torch.randperm(classes, generator=numbers).tolist()
    return [index for index in order if index not in left_out][:_FILLED]


def _shuffled(options: list[int], truth: int, how: How, numbers: torch.Generator, most: int) -> Mined:
    if truth not in options:
        options = [*options[: most - 1], truth]
    order = torch.randperm(len(options), generator=numbers).tolist()
    return Mined(tuple(options[place] for place in order), truth, how)
