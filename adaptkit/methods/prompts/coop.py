"""CoOp: learnable context vectors before (around, after) the class name in text prompts; both encoders stay frozen.

Source: arXiv 2109.01134, Sec. 3.2; coop sheet; reference code KaiyangZhou/CoOp, trainers/coop.py.
Differs from the reference: the context is kept and trained in fp32 (the reference trains an fp16 tensor without a
master copy); words to start from that aren't single tokens are refused (the reference misaligns them silently); words
together with class-specific contexts are refused (the reference ignores the second).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.errors import ConfigError
from adaptkit.methods import methods
from adaptkit.methods.base import ClassWeightMethod, GradientMethod, MethodConfig, draw_normal
from adaptkit.methods.prompts._layout import (
    ClassPosition,
    embed_pieces,
    open_text,
    placeholder,
    prompt_rows,
    single_piece_words,
)
from adaptkit.types import TrainingSettings

INITIAL_STD = 0.02


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
class CoOp(ClassWeightMethod, GradientMethod):
    """Context optimisation: `context` is [M, width], or [classes, M, width] where it is class-specific."""

    name = "coop"
    config_class = CoOpConfig
    config: CoOpConfig
    default_training = TrainingSettings(epochs=200, views=10)

    def build(self) -> None:
        config = self.config
        backbone, tower = open_text(self.backbone, "CoOp")
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

    def classes_changed(self) -> None:
        super().classes_changed()
        self._rows = prompt_rows(
            open_text(self.backbone, "CoOp")[0],
            self.class_names,
            self._phrase,
            self.context.shape[-2],
            class_specific=self.config.class_specific,
            position=self.config.class_position,
        )

    def class_weights(self) -> Tensor:
        context: Tensor = self.context
        if self.config.class_specific:
            context = context[self.fitted_indices()].flatten(0, 1)  # [classes · M, width]
        _, tower = open_text(self.backbone, "CoOp")
        return F.normalize(tower(self._rows.to(context.device), context), dim=-1)  # [classes, dim]

    def reference_key(self, key: str) -> str:
        return "prompt_learner.ctx"
