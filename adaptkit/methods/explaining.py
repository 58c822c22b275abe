"""What learned context vectors are near to: the words of the backbone's token embedding.

Source: arXiv 2109.01134, whose authors list the nearest words of CoOp's vectors and find few that read as language.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptkit.backbones.vocabulary import nearest_words
from adaptkit.errors import AdaptKitError, UnsupportedError
from adaptkit.methods import methods
from adaptkit.methods.base import Method
from adaptkit.methods.prompts._layout import open_text

CAUTION = (
    "Nearest words rarely read as language: the vectors are free to lie between words, and a near word doesn't say what"
    " a vector does (Source: CoOp, arXiv 2109.01134)."
)


@dataclass(frozen=True)
class NearWord:
    """A word near a vector: how it reads, its token id, Euclidean distance and cosine."""

    word: str
    token: int
    distance: float
    cosine: float


@dataclass(frozen=True)
class ExplainedVector:
    """One learned vector.

    Args:
        group: What it belongs to, as the method names it.
        index: Its place there, from 1.
        norm: Its length.
        nearest: Nearest words, nearest first.
        start: The word it started from, or None where it started elsewhere.
        moved: Its Euclidean distance from there.
    """

    group: str
    index: int
    norm: float
    nearest: tuple[NearWord, ...]
    start: str | None = None
    moved: float | None = None


@dataclass(frozen=True)
class Explanation:
    """Learned vectors with their words, and how many vectors were left out."""

    vectors: tuple[ExplainedVector, ...]
    left_out: int


def explain_contexts(method: Method, top: int = 3, limit: int | None = None) -> Explanation:
    """The words nearest to a method's context vectors.

    Args:
        method: Fitted.
        top: Words per vector.
        limit: At most this many vectors, the first ones; None for all.

    Raises:
        UnsupportedError: The method learns no vectors that stand among words.
    """
    groups = method.context_vectors()
    if not groups:
        raise UnsupportedError(nothing_to_explain(method))
    backbone, tower = open_text(method.backbone, "Explaining")
    rows = [(group, index) for group, vectors in groups.items() for index in range(len(vectors))]
    shown = rows[:limit]
    vectors = torch.stack([groups[group][index].float().cpu() for group, index in shown])
    embedding = tower.token_embedding.weight.detach().cpu()  # not all devices have double precision
    tokens, distances, cosines = nearest_words(vectors, embedding, top)
    starts = _starts(method, groups, embedding)
    explained = []
    for row, (group, index) in enumerate(shown):
        words = zip(tokens[row].tolist(), distances[row].tolist(), cosines[row].tolist(), strict=True)
        start = starts.get((group, index))
        explained.append(
            ExplainedVector(
                group,
                index + 1,
                float(vectors[row].norm()),
                tuple(NearWord(backbone.piece_text(token), token, far, cosine) for token, far, cosine in words),
                None if start is None else backbone.piece_text(start),
                None if start is None else float((vectors[row] - embedding[start].float()).norm()),
            )
        )
    return Explanation(tuple(explained), len(rows) - len(shown))


def _starts(method: Method, groups: Mapping[str, Tensor], embedding: Tensor) -> dict[tuple[str, int], int]:
    """The token that each vector started from, of those that started from a word.

    Words, unlike random draws, come out the same in a method that is built anew: there they are found exactly.
    """
    if not str(getattr(method.config, "context_init", "")).strip():
        return {}
    fresh = type(method)(method.backbone, method.fitted_names[:1], templates=method.templates, config=method.config)
    found: dict[tuple[str, int], int] = {}
    for group, vectors in fresh.context_vectors().items():
        if group not in groups or groups[group].shape != vectors.shape:
            continue
        tokens, distances, _ = nearest_words(vectors.cpu(), embedding, 1)
        exact = zip(tokens[:, 0].tolist(), distances[:, 0].tolist(), strict=True)
        found |= {(group, index): token for index, (token, distance) in enumerate(exact) if distance == 0}
    return found


def nothing_to_explain(method: Method) -> str:
    """Why a method has no words to show: what it learned instead, and which methods can be explained."""
    learned = [f"{key} [{' × '.join(map(str, value.shape))}]" for key, value in method.adapter_state().items()]
    what = f"it learned {_listed(learned)}" if learned else "it learned nothing"
    return (
        f"{method.name} learns no vectors among the words of a prompt, so there are no nearest words: {what}"
        f" ({methods.entry(method.name).summary}). Methods that can be explained: {', '.join(explainable())}."
    )


def _listed(items: list[str], most: int = 4) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def explainable() -> list[str]:
    """Registered methods that name their context vectors; imports them all."""
    found = []
    for name in methods:
        try:
            if methods.get(name).context_vectors is not Method.context_vectors:
                found.append(name)
        except (AdaptKitError, ImportError):  # another package's method, which may not be importable here
            continue
    return found
