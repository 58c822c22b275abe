"""Vectors among the token embeddings of a multimodal language model. In token rows, vector j is written as -1 - j.

A row then has its full length before anything is embedded, so that positions (three axes on Qwen) and token types come
out as they do for tokens.

Source: mllm sheet `backbones.md` (positions with embeddings).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adaptkit.backbones.mllm.batches import Batch
from adaptkit.backbones.mllm.model import MLLM
from adaptkit.backbones.mllm.prompts import Prompter, Turn


def with_soft(mllm: MLLM, batch: Batch, soft: Tensor) -> Tensor | None:
    """Embeddings [rows, length, width] of a batch with `soft` [k, width] at its vectors; None where it has none."""
    places = batch.ids < 0
    if not bool(places.any()):
        return None
    vectors = mllm.embed(batch.ids.clamp(min=0))
    return torch.where(places[..., None], soft.to(vectors.dtype)[(-1 - batch.ids).clamp(min=0)], vectors)


def question_span(prompter: Prompter, turn: Turn, counts: Sequence[int]) -> tuple[list[int], int, int]:
    """A prompt's token ids, and where in them the question begins and ends.

    It is what the prompt doesn't share, from either end, with the same prompt without a question. A space that only
    keeps the question off an image isn't part of it: it is as long as in the prompt without images.
    """
    ids, start, end = _span(prompter, turn, counts)
    _, first, last = _span(prompter, Turn(turn.text, 0), ())
    return ids, max(start, end - (last - first)), end


def _span(prompter: Prompter, turn: Turn, counts: Sequence[int]) -> tuple[list[int], int, int]:
    ids, bare = prompter.ids([turn], counts), prompter.ids([Turn("", turn.images)], counts)
    return ids, *between(ids, bare)


def between(ids: Sequence[int], others: Sequence[int]) -> tuple[int, int]:
    """Where the part of `ids` begins and ends that it doesn't share, from either end, with `others`.

    What both ends could claim goes to the last tokens.
    """
    tail = _shared(ids[::-1], others[::-1])
    return _shared(ids[: len(ids) - tail], others[: len(others) - tail]), len(ids) - tail


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two rows share."""
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count
