"""How the next token of a generated answer is chosen: the likeliest, or drawn.

Draws come from numbers that the caller hands in, one per row and step, so an answer doesn't depend on which others are
generated with it, nor on the device.

Source: top-p, arXiv 1904.09751; repetition penalty, arXiv 1909.05858; in the order of transformers' `generate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        temperature: 0 takes the likeliest token.
        top_p: Draw among the likeliest tokens whose probabilities together reach this; 1 draws among all.
        repetition_penalty: What logits of tokens that were said before are divided by (multiplied, where they are
            negative); 1 changes nothing.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


GREEDY = Sampling()


def said_before(rows: Sequence[Sequence[int]], vocabulary: int, device: torch.device) -> Tensor:
    """Which tokens stand in each row of token ids, bool [rows, vocabulary]."""
    said = torch.zeros(len(rows), vocabulary, dtype=torch.bool, device=device)
    for place, row in enumerate(rows):
        said[place, torch.as_tensor(list(row), dtype=torch.int64, device=device)] = True
    return said


def chosen(logits: Tensor, sampling: Sampling, draws: Tensor | None = None, said: Tensor | None = None) -> Tensor:
    """The next token of each row, int64 [rows].

    Args:
        logits: fp32 [rows, vocabulary].
        sampling: How.
        draws: Numbers in [0, 1), fp64 [rows]; not looked at with temperature 0.
        said: Tokens said before, bool [rows, vocabulary]; None for none.
    """
    if said is not None and sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        logits = torch.where(said, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature <= 0 or draws is None:
        return logits.argmax(dim=-1)
    shares, order = (logits / sampling.temperature).double().softmax(dim=-1), None
    if sampling.top_p < 1:
        shares, order = shares.sort(dim=-1, descending=True)
        shares = shares.masked_fill(shares.cumsum(dim=-1) - shares >= sampling.top_p, 0.0)
    heights = shares.cumsum(dim=-1)
    wanted = draws.to(heights)[:, None] * heights[:, -1:]
    places = torch.searchsorted(heights, wanted, right=True).clamp(max=heights.shape[-1] - 1)  # [rows, 1]
    return (places if order is None else order.gather(1, places))[:, 0]
