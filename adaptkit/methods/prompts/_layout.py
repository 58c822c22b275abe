"""Where learnable context vectors stand in text prompts: layouts shared by the prompt-learning methods.

Source: coop sheet ("Forward pass"): the prompt is tokenised with a placeholder word for each context vector, so that
the end token stands where it would stand in words; then the placeholders' embeddings are replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from adaptkit.backbones.base import Backbone, Tokens
from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.backbones.tower import ImageTower, TextRows, TextTower
from adaptkit.errors import BackboneError, ConfigError, DataError

ClassPosition = Literal["end", "middle", "front"]

_PLACEHOLDERS = ("X", "a", "the", "x")


def open_text(backbone: Backbone, needed_by: str) -> tuple[DualEncoder, TextTower]:
    """The backbone and its opened text tower.

    Raises:
        BackboneError: The text tower can't be opened.
    """
    backbone.require_open(needed_by, text=True)
    if not isinstance(backbone, DualEncoder) or backbone.text_tower is None:
        raise BackboneError(f"{needed_by} needs a backbone with an open text tower; {backbone.spec.name!r} has none.")
    return backbone, backbone.text_tower


def open_image(backbone: Backbone, needed_by: str) -> ImageTower:
    """The opened image tower.

    Raises:
        BackboneError: The image tower can't be opened.
    """
    backbone.require_open(needed_by, image=True)
    if backbone.image_tower is None:
        raise BackboneError(f"{needed_by} needs a backbone with an open image tower; {backbone.spec.name!r} has none.")
    return backbone.image_tower


def phrase_pieces(backbone: DualEncoder, phrase: str) -> list[int]:
    """Token ids of a phrase to start a context from; underscores are spaces."""
    return backbone.word_pieces(phrase.replace("_", " "))


def single_piece_words(backbone: DualEncoder, phrase: str) -> list[int]:
    """Token ids of a phrase in which each word is one token.

    Raises:
        ConfigError: A word is more than one token: words and context vectors would not line up.
    """
    words = phrase.replace("_", " ").split()
    pieces = phrase_pieces(backbone, phrase)
    split = [word for word in words if len(backbone.word_pieces(word)) != 1]
    if split or len(pieces) != len(words):
        wrong = split[0] if split else phrase
        raise ConfigError(
            f"context_init {phrase!r} can't be used: {wrong!r} is {len(backbone.word_pieces(wrong))} tokens, and each"
            " word must be exactly one. Choose common words, or leave context_init empty and set num_context."
        )
    return pieces


def embed_pieces(tower: TextTower, pieces: Sequence[int]) -> Tensor:
    """Token embeddings [pieces, width] on the CPU, a copy in fp32."""
    weight = tower.token_embedding.weight.detach()
    return weight[torch.tensor(pieces, device=weight.device)].float().cpu()


def placeholder(backbone: DualEncoder, count: int) -> str:
    """`count` words that are one token each, such as "X X X X".

    Raises:
        BackboneError: The tokenizer has no such word.
    """
    for word in _PLACEHOLDERS:
        phrase = " ".join([word] * count)
        if len(backbone.word_pieces(phrase)) == count:
            return phrase
    raise BackboneError(
        f"The tokenizer of {backbone.spec.name!r} splits every placeholder word, so contexts can't be laid out."
    )


def prompt_rows(
    backbone: DualEncoder,
    names: Sequence[str],
    phrase: str,
    num_context: int,
    *,
    class_specific: bool = False,
    position: ClassPosition = "end",
) -> TextRows:
    """The layout of "<phrase> <name>." with the phrase's first tokens replaced by context slots.

    Args:
        backbone: With an open text tower.
        names: Class names; underscores are spaces.
        phrase: At least `num_context` tokens; those beyond it stay as words.
        num_context: Context vectors per prompt, M.
        class_specific: Class c has slots c·M … c·M + M - 1 to itself, instead of all sharing 0 … M - 1.
        position: Where the class name stands among the context vectors; "middle" and "front" move it forward.

    Raises:
        DataError: A class name doesn't fit beside the context (the message says which).
    """
    plain = [name.replace("_", " ") for name in names]
    tokens = _tokenize(backbone, plain, phrase, num_context)
    start = _context_start(backbone, tokens, phrase)
    symbols = tokens.ids.clone()
    slots = torch.arange(num_context, device=symbols.device).repeat(len(names), 1)  # [classes, M]
    if class_specific:
        slots += num_context * torch.arange(len(names), device=symbols.device)[:, None]
    symbols[:, start : start + num_context] = -1 - slots
    if position != "end":
        kept = num_context // 2 if position == "middle" else 0
        lengths = [len(backbone.word_pieces(name)) for name in plain]
        symbols = symbols.gather(1, _name_forward(symbols, start + kept, start + num_context, lengths))
    return backbone.text_rows(tokens, symbols)


def _tokenize(backbone: DualEncoder, plain: Sequence[str], phrase: str, num_context: int) -> Tokens:
    try:
        return backbone.tokenize([f"{phrase} {name}." for name in plain])
    except BackboneError as error:
        sizes = [len(backbone.word_pieces(name)) for name in plain]
        longest = max(range(len(plain)), key=sizes.__getitem__)
        raise DataError(
            f"Class name {plain[longest]!r} ({sizes[longest]} tokens) doesn't fit beside {num_context} context vectors:"
            f" {backbone.spec.name!r} reads {backbone.spec.context_length} tokens in all. Shorten the name or set a"
            " smaller num_context."
        ) from error


def _context_start(backbone: DualEncoder, tokens: Tokens, phrase: str) -> int:
    """Where the phrase begins: behind the start token, or at 0 for tokenizers that have none."""
    row, pieces = tokens.ids[0].tolist(), backbone.word_pieces(phrase)
    for start in range(len(row) - len(pieces) + 1):
        if row[start : start + len(pieces)] == pieces:
            return start
    raise BackboneError(
        f"The tokenizer of {backbone.spec.name!r} writes {phrase!r} differently inside a prompt, so contexts can't be"
        " laid out."
    )


def _name_forward(symbols: Tensor, to: int, name_at: int, lengths: Sequence[int]) -> Tensor:
    """Column order [classes, length] that moves each class name from column `name_at` to `to`; the end stays put."""
    columns = torch.arange(symbols.shape[1]).repeat(len(symbols), 1)
    for row, length in enumerate(lengths):
        moved = [*range(name_at, name_at + length), *range(to, name_at)]
        columns[row, to : name_at + length] = torch.tensor(moved)
    return columns.to(symbols.device)
