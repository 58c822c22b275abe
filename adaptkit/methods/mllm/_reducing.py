"""The settings that thin out image tokens, the same for every method that asks a multimodal language model.

Source: mllm sheet `vscan.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.backbones.mllm.reduction import Reduction, Rule
from adaptkit.errors import ConfigError
from adaptkit.methods.base import MethodConfig


@dataclass(frozen=True)
class ReducingConfig(MethodConfig):
    """Settings of methods whose image tokens can be thinned out."""

    token_reduction: Rule = field(
        default="none",
        metadata={
            "help": "Image tokens left out: none; vscan; attention, merge, norm, uniform or random (parts of vscan, and"
            " baselines).",
            "later": True,
        },
    )
    token_keep: float = field(
        default=0.333, metadata={"help": "token_reduction: share of an image's tokens that is kept.", "later": True}
    )
    token_window: int = field(
        default=0,
        metadata={"help": "vscan: side of a window in tokens; 0: 6 (LLaVA) or 4 (other families).", "later": True},
    )

    def __post_init__(self) -> None:
        _ = self.thinning

    @property
    def thinning(self) -> Reduction:
        """What is left out.

        Raises:
            ConfigError: A value is out of range.
        """
        return Reduction(self.token_reduction, self.token_keep, self.token_window)


@dataclass(frozen=True)
class TrainedReducingConfig(ReducingConfig):
    """The same of methods that are trained."""

    allow_training: bool = field(
        default=False,
        metadata={"help": "Train with image tokens left out too; that is another method.", "later": True},
    )


def token_facts(features: ImageFeatures) -> dict[str, Any]:
    """How many tokens an image has in the prompt, and had before any were left out, for the result."""
    facts: dict[str, Any] = {"tokens_per_image": features.counts[0]}
    return facts | ({"tokens_per_image_before": features.whole[0]} if features.whole else {})


def check_training(name: str, config: TrainedReducingConfig) -> None:
    """Refuse to train with tokens left out where that wasn't asked for.

    Raises:
        ConfigError: It wasn't.
    """
    if config.thinning.active and not config.allow_training:
        raise ConfigError(
            f"{name} would be trained with token_reduction {config.token_reduction}, which is meant for answering:"
            " train it with token_reduction=none, or set allow_training=true to train what it then answers with."
        )
