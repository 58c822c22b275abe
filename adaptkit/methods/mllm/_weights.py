"""Caption tokens weighted by how little text alone tells about them.

A reference that sees no image gives the probability of each token of a caption behind those before it. What it can't
guess is likely to be seen in the image, and counts more.

Source: PRIOR arXiv 2505.08971; mllm sheet `prior.md`. The exact weights of the paper couldn't be verified: the three
kinds and their constants are the sheet's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from adaptkit.backbones.mllm.model import MLLM
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.methods.mllm._tuning import IGNORED, answer_labels

WeightKind = Literal["linear", "power", "focal"]

USUAL: dict[WeightKind, tuple[float, float]] = {"linear": (1.0, 5.0), "power": (0.5, 5.0), "focal": (1.0, 5.0)}
"""The sheet's strength and largest weight of each kind."""

LEAST_PROBABILITY = 1e-4
"""Below this all tokens are equally hard to guess (power)."""

_ROWS_AT_ONCE = 16


def token_weights(probabilities: Tensor, kind: WeightKind, strength: float, most: float) -> Tensor:
    """Weights, fp32, falling in the probabilities; without a gradient.

    Args:
        probabilities: p of each token by the reference, [tokens].
        kind: linear: 1 + strength · (1 - p); power: p^-strength, within [1, most]; focal: (1 - p)^strength.
        strength: How much the weights differ; 0 makes them all 1.
        most: Largest weight of `power`.
    """
    p = probabilities.detach().float()
    if kind == "linear":
        return 1 + strength * (1 - p)
    if kind == "power":
        return p.clamp(min=LEAST_PROBABILITY).pow(-strength).clamp(1.0, most)
    return (1 - p).clamp(min=0).pow(strength)


def text_rows(mllm: MLLM, question: str, captions: Sequence[list[int]]) -> list[list[int]]:
    """Captions behind the question alone: the conversation without an image, whose placeholders are gone."""
    prompt = mllm.prompter.ids([Turn(question, 0)])
    return [prompt + caption for caption in captions]


def text_log_probs(mllm: MLLM, question: str, captions: Sequence[list[int]]) -> tuple[Tensor, ...]:
    """log p of every token of each caption by a model that sees no image, fp32 [tokens] each; differentiable.

    Args:
        mllm: The reference.
        question: What stands in front of a caption.
        captions: Token ids, with the token that ends the turn.
    """
    lengths = [len(caption) for caption in captions]
    batch = mllm.batch(text_rows(mllm, question, captions), None, lengths)
    following = answer_labels(batch.ids, lengths)[:, 1:]
    supervised = following != IGNORED
    logits = mllm.logits(mllm.hidden(batch)[:, :-1][supervised])
    picked = logits.log_softmax(dim=-1).gather(1, following[supervised][:, None])[:, 0]
    return picked.split(lengths)


@torch.no_grad()
def text_probabilities(mllm: MLLM, question: str, captions: Sequence[list[int]]) -> list[Tensor]:
    """p of every token of each caption, without a gradient, some captions at a time; see `text_log_probs`."""
    groups = [captions[start : start + _ROWS_AT_ONCE] for start in range(0, len(captions), _ROWS_AT_ONCE)]
    return [found.exp() for group in groups for found in text_log_probs(mllm, question, group)]
