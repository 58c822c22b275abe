"""MaPLe: deep text prompts, and image prompts that are linear images of them.

Source: arXiv 2210.03117, Sec. 3.3; maple sheet; reference code muzairkhattak/multimodal-prompt-learning,
trainers/maple.py and clip/model.py.
Differs from the reference: fp32 throughout (it mixes fp16 and fp32 tensors and runs in no other mode); widths follow
the backbone (512 and 768 there); more context vectors than the phrase has tokens are refused (there they erase the
class name, or, above four, the words are dropped silently).
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.backbones.tower import EMBEDDING, InsertTokens, ReplaceContexts, ReplaceTokens
from adaptkit.errors import ConfigError
from adaptkit.methods import methods
from adaptkit.methods.base import ClassWeightMethod, GradientMethod, MethodConfig, draw_linear, draw_normal
from adaptkit.methods.prompts._layout import (
    embed_pieces,
    open_image,
    open_text,
    phrase_pieces,
    placeholder,
    prompt_rows,
)
from adaptkit.types import Reads, TrainingSettings

INITIAL_STD = 0.02


@dataclass(frozen=True)
class MaPLeConfig(MethodConfig):
    """Settings of MaPLe."""

    num_context: int = field(default=2, metadata={"help": "Prompt vectors per layer and tower."})
    depth: int = field(default=9, metadata={"help": "Layers that get prompts, the first one included."})
    context_init: str = field(
        default="a photo of a",
        metadata={"help": "Words before the class name; the first layer's prompts start from the first of them."},
    )

    def __post_init__(self) -> None:
        if self.num_context < 1:
            raise ConfigError(f"num_context is {self.num_context}, but must be at least 1.")
        if self.depth < 1:
            raise ConfigError(f"depth is {self.depth}, but must be at least 1 (the first layer).")


@methods.register("maple")
class MaPLe(ClassWeightMethod, GradientMethod):
    """Multi-modal prompt learning: `contexts[l]` [M, text width] and `couplings[l]` for layer l = 0 … depth - 1."""

    name = "maple"
    config_class = MaPLeConfig
    config: MaPLeConfig
    reads: ClassVar[Reads] = "images"
    # no official few-shot setting exists (sheet); this is the base-to-novel one
    default_training = TrainingSettings(epochs=5, batch_size=4, lr=3.5e-3, views=4)

    def build(self) -> None:
        depth, count = self.config.depth, self.config.num_context
        _, text = open_text(self.backbone, "MaPLe")
        image = open_image(self.backbone, "MaPLe")
        if depth > min(text.layers, image.layers):
            raise ConfigError(
                f"depth is {depth}, but {self.backbone.spec.name!r} has {text.layers} text and {image.layers} image"
                f" layers: choose a depth of at most {min(text.layers, image.layers)}."
            )
        first = self._first_context()
        deeper = [draw_normal((count, text.width), INITIAL_STD, self.generator) for _ in range(depth - 1)]
        self.contexts = nn.ParameterList([first, *deeper])
        couplings = [draw_linear(text.width, image.width, self.generator) for _ in range(min(depth, 2))]
        couplings += [deepcopy(couplings[1]) for _ in range(depth - 2)]  # the reference copies one draw to all deeper
        self.couplings = nn.ModuleList(couplings)

    def _first_context(self) -> nn.Parameter:
        backbone, text = open_text(self.backbone, "MaPLe")
        count = self.config.num_context
        self._phrase = " ".join(self.config.context_init.replace("_", " ").split())
        if not self._phrase:
            self._phrase = placeholder(backbone, count)
            return draw_normal((count, text.width), INITIAL_STD, self.generator)
        pieces = phrase_pieces(backbone, self._phrase)
        if len(pieces) < count:
            raise ConfigError(
                f"context_init {self._phrase!r} has {len(pieces)} tokens, fewer than num_context = {count}: write a"
                " longer phrase, set a smaller num_context, or leave context_init empty to start from random vectors."
            )
        return nn.Parameter(embed_pieces(text, pieces[:count]))

    def classes_changed(self) -> None:
        super().classes_changed()
        backbone, _ = open_text(self.backbone, "MaPLe")
        self._rows = prompt_rows(backbone, self.class_names, self._phrase, self.config.num_context)

    def class_weights(self) -> Tensor:
        _, text = open_text(self.backbone, "MaPLe")
        first, *deeper = self.contexts
        edits = {layer: [ReplaceContexts(context)] for layer, context in enumerate(deeper, start=1)}
        return F.normalize(text(self._rows.to(first.device), first, edits), dim=-1)  # [classes, dim]

    def image_prompts(self) -> list[Tensor]:
        """The image tower's prompts [M, image width] of each layer."""
        return [coupling(context) for coupling, context in zip(self.couplings, self.contexts, strict=True)]

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Unnormalised prompted features [batch, dim]; prompts stand behind the patches."""
        first, *deeper = self.image_prompts()
        edits = {EMBEDDING: [InsertTokens(first)]} | {
            layer: [ReplaceTokens(prompts, at=-self.config.num_context)]
            for layer, prompts in enumerate(deeper, start=1)
        }
        features: Tensor = open_image(self.backbone, "MaPLe")(pixels, edits)
        return features

    def forward(self, inputs: Tensor) -> Tensor:
        return self.cosine_logits(self.encode_image(inputs), self.folded_weights())

    def reference_key(self, key: str) -> str:
        kind, index, *rest = key.split(".")  # "contexts.3", "couplings.3.weight"
        layer = int(index)
        if kind == "contexts":
            return "prompt_learner.ctx" if layer == 0 else f"prompt_learner.compound_prompts_text.{layer - 1}"
        place = "proj" if layer == 0 else f"compound_prompt_projections.{layer - 1}"
        return ".".join(["prompt_learner", place, *rest])
