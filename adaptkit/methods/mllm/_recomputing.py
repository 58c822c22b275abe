"""Gradient checkpointing: a decoder layer's inner values are computed again on the way back instead of being kept.

Source: arXiv 1604.06174; mllm sheet `lora-sft.md` ("Gradient checkpointing").
Differs from transformers: its own switch needs the model in training mode, which would also turn dropout on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from adaptkit.errors import TrainingError

_CACHES = ("cache", "past_key_values")
"""What a layer would fill a second time."""


def recompute(layers: Sequence[nn.Module]) -> None:
    """Make layers compute their inner values again on the way back, where gradients are wanted."""
    for layer in layers:
        layer.forward = _twice(layer.forward)


def _twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*given: Any, **named: Any) -> Any:
        if torch.is_grad_enabled() and all(named.get(name) is None for name in _CACHES):
            return checkpoint(forward, *given, use_reentrant=False, **named)
        return forward(*given, **named)

    return run


def require_gradients(method: str, parameters: Sequence[nn.Parameter]) -> None:
    """Refuse to go on where no gradient arrives, as with checkpointing behind inputs without gradients.

    Raises:
        TrainingError: All gradients are missing or zero.
    """
    if not any(p.grad is not None and bool(p.grad.any()) for p in parameters):
        raise TrainingError(
            f"No gradient reached what {method} trains: it would stay as it is. Train without checkpointing, or choose"
            " other parts of the model."
        )
