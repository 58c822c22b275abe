"""Which rewrites of a caption are good enough to train on, and which of them an image gets in an epoch.

Source: mllm sheet `recaption.md`, quality gate and sampler.
Differs from the sheet: nouns and adjectives aren't tagged; every content word of the caption must come back, and a word
that isn't in it counts as a new noun unless it is a function word, a word of a picture ("photo", "background") or looks
like a verb or an adverb. Words are compared without plural endings.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Reason = Literal["duplicate", "length", "missing", "new"]

LEAST_RATIO, MOST_RATIO = 0.5, 2.0
"""Words of a rewrite beside those of its caption."""

_WORD = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*")
_FUNCTION_WORDS = """
a an the this that these those it its they their them he his she her who whom whose which what where when while as and
or but nor so than then of in on at by to from with without for into onto over under above below behind beside between
among near next around across along through against off up down out inside outside toward towards about there here very
quite rather also too both each all some any no not only just more most much many few several is are was were be been
being am has have had having do does did can could may might will would shall should must show shows shown see sees seen
sit sits stand stands lie lies hold holds wear wears look looks feature features include includes contain contains
appear appears make makes made
"""
_FUNCTION = frozenset(_FUNCTION_WORDS.split())
_PICTURE_WORDS = """
image photo photograph picture shot view scene background foreground front back side top bottom left right middle center
centre part kind type sort number pair group
"""
_PICTURE = frozenset(_PICTURE_WORDS.split())
_IRREGULAR = {
    **{"men": "man", "women": "woman", "children": "child", "people": "person", "feet": "foot", "teeth": "tooth"},
    **{"geese": "goose", "mice": "mouse", "leaves": "leaf", "wolves": "wolf", "knives": "knife", "halves": "half"},
}


@dataclass(frozen=True)
class Gated:
    """What became of a caption's rewrites.

    Args:
        accepted: In their order.
        refused: The others, each with the first reason that spoke against it.
    """

    accepted: tuple[str, ...]
    refused: tuple[tuple[str, Reason], ...]

    def reasons(self) -> Counter[str]:
        """How many were refused, by reason."""
        return Counter(reason for _, reason in self.refused)


def gate(caption: str, rewrites: Sequence[str]) -> Gated:
    """Keep the rewrites that say what the caption says, and nothing else, in about as many words, once each."""
    accepted, refused = list[str](), list[tuple[str, Reason]]()
    seen = {tuple(_words(caption))}
    for text in rewrites:
        words = tuple(_words(text))
        reason = "duplicate" if words in seen else _fault(_words(caption), words)
        seen.add(words)
        if reason is None:
            accepted.append(text)
        else:
            refused.append((text, reason))
    return Gated(tuple(accepted), tuple(refused))


def _fault(caption: Sequence[str], words: Sequence[str]) -> Reason | None:
    """What speaks against a rewrite, None for nothing."""
    if not LEAST_RATIO <= len(words) / max(1, len(caption)) <= MOST_RATIO:
        return "length"
    wanted, own = {lemma(word) for word in caption}, {lemma(word) for word in words}
    if {word for word in wanted if not _light(word)} - own:
        return "missing"
    if {word for word in own - wanted if not (_light(word) or word in _PICTURE or word.endswith(("ed", "ly")))}:
        return "new"
    return None


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _light(word: str) -> bool:
    """Whether it is a function word or looks like a verb."""
    return word in _FUNCTION or word.endswith("ing")


def lemma(word: str) -> str:
    """A noun without its plural ending, roughly."""
    word = re.sub(r"['’]s?$", "", word)
    if word in _IRREGULAR or word in _FUNCTION or len(word) < 4:
        return _IRREGULAR.get(word, word)
    if word.endswith("ies"):
        return f"{word[:-3]}y"
    if word.endswith(("sses", "xes", "zes", "ches", "shes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


class VariantSampler:
    """Draws a variant for each image such that it gets all of them before any comes again."""

    def __init__(self) -> None:
        self._left: dict[int, list[int]] = {}

    def draw(self, image: int, count: int) -> int:
        """The next variant of an image that has `count`, from torch's own generator."""
        left = self._left.get(image)
        if not left:
            left = self._left[image] = torch.randperm(count).tolist()
        return left.pop()

    @property
    def state(self) -> Tensor:
        """Numbers of images with a variant each that they haven't had yet, in order, int64 [variants, 2]."""
        pairs = [(image, variant) for image, left in self._left.items() for variant in left]
        return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)

    @classmethod
    def from_state(cls, state: Tensor) -> VariantSampler:
        """A sampler that goes on from another's `state`."""
        sampler = cls()
        for image, variant in state.tolist():
            sampler._left.setdefault(image, []).append(variant)
        return sampler
