"""CoOp: learnable context vectors before (around, after) the class name in text prompts; both encoders stay frozen.

Source: arXiv 2109.01134, Sec. 3.2; coop sheet; reference code KaiyangZhou/CoOp, trainers/coop.py.
Differs from the reference: the context is kept and trained in fp32 (the reference trains an fp16 tensor without a
master copy); words to start from that aren't single tokens are refused (the reference misaligns them silently); words
together with class-specific contexts are refused (the reference ignores the second).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.backbones.tower import TextRows
from adaptkit.errors import ConfigError
from adaptkit.methods import methods
from adaptkit.methods.base import MethodConfig, draw_normal
from adaptkit.methods.prompts._context import INITIAL_STD, SharedContextMethod, reference_context
from adaptkit.methods.prompts._layout import (
    ClassPosition,
    embed_pieces,
    placeholder,
    prompt_rows,
    single_piece_words,
)
from adaptkit.types import TrainingSettings


@dataclass(frozen=True)
class CoOpConfig(MethodConfig):
    """Settings of CoOp."""

    num_context: int = field(
        default=16, metadata={"help": "Learned context vectors; with context_init its number of words counts instead."}
    )
    context_init: str = field(
        default="", metadata={"help": 'Words to start from ("a photo of a"), one token each; empty: random vectors.'}
    )
    class_specific: bool = field(
        default=False, metadata={"help": "Context vectors of its own for every class (novel classes are then refused)."}
    )
    class_position: ClassPosition = field(
        default="end", metadata={"help": "Where the class name stands: end, middle or front of the context."}
    )

    def __post_init__(self) -> None:
        if self.num_context < 1:
            raise ConfigError(f"num_context is {self.num_context}, but must be at least 1.")
        if self.class_position not in ("end", "middle", "front"):
            raise ConfigError(f"class_position {self.class_position!r} is unknown: choose end, middle or front.")
        if self.class_specific and self.context_init.strip():
            raise ConfigError(
                "context_init and class_specific can't be combined: words start one context that all classes share."
                " Leave one of them out."
            )


@methods.register("coop")
class CoOp(SharedContextMethod):
    """Context optimisation: `context` is [M, width], or [classes, M, width] where it is class-specific."""

    name = "coop"
    title = "CoOp"
    config_class = CoOpConfig
    config: CoOpConfig
    default_training = TrainingSettings(epochs=200, views=10)

    def build(self) -> None:
        config = self.config
        backbone, tower = self.open_text()
        if config.context_init.strip():
            self._phrase = " ".join(config.context_init.replace("_", " ").split())
            self.context = nn.Parameter(embed_pieces(tower, single_piece_words(backbone, self._phrase)))
            return
        self._phrase = placeholder(backbone, config.num_context)
        shape = [config.num_context, tower.width]
        if config.class_specific:
            self.novel_classes = "refused"
            shape = [len(self.fitted_names), *shape]
        self.context = draw_normal(shape, INITIAL_STD, self.generator)

    def layout(self) -> TextRows:
        return prompt_rows(
            self.open_text()[0],
            self.class_names,
            self._phrase,
            self.context.shape[-2],
            class_specific=self.config.class_specific,
            position=self.config.class_position,
        )

    def class_weights(self) -> Tensor:
        if not self.config.class_specific:
            return super().class_weights()
        context = self.context[self.fitted_indices()].flatten(0, 1)  # [classes · M, width]
        _, tower = self.open_text()
        return F.normalize(tower(self._rows.to(context.device), context), dim=-1)  # [classes, dim]

    def context_vectors(self) -> dict[str, Tensor]:
        if not self.config.class_specific:
            return super().context_vectors()
        contexts = self.context.detach()[self.fitted_indices()]
        return {f"context of {name}": own for name, own in zip(self.class_names, contexts, strict=True)}

    @classmethod
    def reference_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        context, settings = reference_context(state), super().reference_settings(state)
        return settings if context is None else settings | {"class_specific": context.dim() == 3}
