"""Frozen: a linear layer turns an image's vision vector into a prefix for a frozen language model.

Gradients of the caption loss flow through the language model, which stays as it is, into the layer and, on request,
into the vision encoder. It is the smallest bridge there is.

Source: Frozen arXiv 2106.13884; mllm sheet `frozen.md` (n = 2 tokens, Adam 3e-4 with betas 0.9 and 0.95, eps 1e-6).
Differs from the paper: the model's own vision encoder, frozen by default; the prefix stands where the model's chat
template has the image, with an empty question; shots are captioned by templates and descriptions; the last epoch is
kept (no early stop).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from adaptkit.methods import methods
from adaptkit.methods.mllm._prefix import PrefixConfig, PrefixedMllm, VisualPrefix
from adaptkit.types import TrainingSettings


@dataclass(frozen=True)
class FrozenConfig(PrefixConfig):
    """Settings of Frozen."""

    prompt: str = field(
        default="", metadata={"help": "What stands behind the prefix in front of the caption; {noun} is put in."}
    )


@methods.register("frozen")
class Frozen(PrefixedMllm):
    """A prefix of n vectors by one linear layer: inputs · n · width + n · width numbers."""

    name = "frozen"
    config_class = FrozenConfig
    config: FrozenConfig
    default_training: ClassVar[TrainingSettings | None] = TrainingSettings(
        epochs=50, batch_size=16, keep_last=True, optimiser="adam", lr=3e-4, eps=1e-6, weight_decay=0.0,
        schedule="constant", warmup_epochs=0,
    )  # fmt: skip

    def make_prefix(self, states: Tensor, width: int) -> VisualPrefix:
        return VisualPrefix(states.shape[-1], width, self.config.tokens, self.generator)
