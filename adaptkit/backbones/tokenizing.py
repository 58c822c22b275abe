"""Tokenizers: from texts to ids and pooled positions, never cutting a text off silently."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from adaptkit.backbones.base import Tokens
from adaptkit.backbones.clip_bpe import ClipBpe, readable
from adaptkit.errors import BackboneError


class TextTokenizer(Protocol):
    """What a backbone needs of a tokenizer."""

    @property
    def facts(self) -> dict[str, Any]:
        """Plain values that tell two tokenizers apart; part of the backbone's digest."""

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Ids and pooled positions; raises `BackboneError` for a text that doesn't fit."""

    def word_pieces(self, text: str) -> list[int]:
        """Ids of the bare text, without start, end and padding."""

    def piece_text(self, token: int) -> str:
        """One token as it reads."""


@dataclass(frozen=True)
class Pooling:
    """Which position of a text a tower pools.

    Args:
        kind: "argmax" (the highest id, CLIP's end token), "first", "last", or "token" (the first `token`).
        token: The id that "token" looks for.
    """

    kind: Literal["argmax", "first", "last", "token"]
    token: int = -1

    def ends(self, ids: Tensor) -> Tensor:
        """Pooled positions [texts] of ids [texts, length]; ties and absent tokens as torch's argmax has them."""
        if self.kind == "argmax":
            return ids.argmax(dim=-1)
        if self.kind == "token":
            return (ids == self.token).int().argmax(dim=-1)
        return torch.full(ids.shape[:1], ids.shape[1] - 1 if self.kind == "last" else 0, dtype=torch.int64)


def check_length(text: str, length: int, context_length: int) -> None:
    """Refuse a text of `length` tokens where `context_length` fit.

    Raises:
        BackboneError: The text is too long; the message names it and says by how many tokens.
    """
    if length > context_length:
        raise BackboneError(
            f"The text {text!r} is too long: it has {length} tokens with start and end, {length - context_length} more"
            f" than the {context_length} that fit. Shorten it by {length - context_length} or more."
        )


class ClipTokenizer:
    """CLIP's own tokenizer.

    Args:
        context_length: Positions of the text tower.
        pooling: Which position is pooled.
        clean: How texts are cleaned, as in `ClipBpe`.
    """

    def __init__(self, context_length: int = 77, pooling: Pooling = Pooling("argmax"), clean: str = "lower") -> None:
        self.bpe = ClipBpe(clean)
        self.context_length = context_length
        self.pooling = pooling

    @property
    def facts(self) -> dict[str, Any]:
        """Kind, context length, cleaning and pooling."""
        pooled = [self.pooling.kind, self.pooling.token]
        return {"tokenizer": "clip-bpe", "length": self.context_length, "clean": self.bpe.clean, "pooled": pooled}

    def word_pieces(self, text: str) -> list[int]:
        """Ids of the bare text.

        Example:
            >>> ClipTokenizer().word_pieces("tabby cat")
            [36145, 2368]
        """
        return self.bpe.encode(text)

    def piece_text(self, token: int) -> str:
        """One token as it reads.

        Example:
            >>> ClipTokenizer().piece_text(2368)
            'cat'
        """
        return self.bpe.decode(token) if token < len(self.bpe.vocabulary) else f"[{token}]"

    def __call__(self, texts: Sequence[str]) -> Tokens:
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.int64)  # [texts, context_length], padded with 0
        for row, text in enumerate(texts):
            pieces = [self.bpe.start, *self.bpe.encode(text), self.bpe.end]
            check_length(text, len(pieces), self.context_length)
            ids[row, : len(pieces)] = torch.tensor(pieces)
        return Tokens(ids, self.pooling.ends(ids))


@dataclass(frozen=True)
class OutsideTokenizer:
    """Another library's tokenizer.

    Args:
        pad: From texts to ids [texts, context_length], padded; may cut off what doesn't fit.
        count: How many tokens a text has, start and end tokens included, before anything is cut off.
        pieces: Ids of the bare text.
        context_length: Positions of the text tower.
        pooling: Which position is pooled.
        facts: What tells it apart.
        decode: From an id to its text; None where the library doesn't say.
    """

    pad: Callable[[list[str]], Tensor]
    count: Callable[[str], int]
    pieces: Callable[[str], list[int]]
    context_length: int
    pooling: Pooling
    facts: dict[str, Any] = field(default_factory=dict)
    decode: Callable[[int], str] | None = None

    def word_pieces(self, text: str) -> list[int]:
        """Ids of the bare text."""
        return self.pieces(text)

    def piece_text(self, token: int) -> str:
        """One token as it reads; its number where it reads as nothing."""
        text = self.decode(token) if self.decode is not None else ""
        return readable(text.strip() or text) or f"[{token}]"

    def __call__(self, texts: Sequence[str]) -> Tokens:
        for text in texts:
            check_length(text, self.count(text), self.context_length)
        ids = self.pad(list(texts)).to(torch.int64)  # [texts, context_length]
        return Tokens(ids, self.pooling.ends(ids))
