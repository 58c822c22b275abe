"""MaPLe: deep text prompts, and image prompts that are linear images of them.

Source: arXiv 2210.03117, Sec. 3.3; maple sheet; reference code muzairkhattak/multimodal-prompt-learning,
trainers/maple.py and clip/model.py.
Differs from the reference: fp32 throughout (it mixes fp16 and fp32 tensors and runs in no other mode); widths follow
the backbone (512 and 768 there); more context vectors than the phrase has tokens are refused (there they erase the
class name, or, above four, the words are dropped silently).
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.methods import methods
from adaptkit.methods.base import ClassWeightMethod, GradientMethod, MethodConfig, draw_linear
from adaptkit.methods.folding import EditedTower
from adaptkit.methods.prompts._deep import (
    check_count,
    check_depth,
    deeper_prompts,
    first_context,
    image_edits,
    prompted_image,
    prompted_text,
)
from adaptkit.methods.prompts._layout import open_image, open_text, prompt_rows
from adaptkit.types import Reads, TrainingSettings

_MOST_WORDS = 4  # the reference drops the words above this many context vectors


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
        check_count("num_context", self.num_context)
        check_count("depth", self.depth)


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
        backbone, text = open_text(self.backbone, "MaPLe")
        image = open_image(self.backbone, "MaPLe")
        name = self.backbone.spec.name
        check_depth("depth", depth, text.layers, "text", name)
        check_depth("depth", depth, image.layers, "image", name)
        self._phrase, first = first_context(backbone, self.config.context_init, count, self.generator)
        self.contexts = nn.ParameterList([first, *deeper_prompts(depth - 1, count, text.width, self.generator)])
        couplings = [draw_linear(text.width, image.width, self.generator) for _ in range(min(depth, 2))]
        couplings += [deepcopy(couplings[1]) for _ in range(depth - 2)]  # the reference copies one draw to all deeper
        self.couplings = nn.ModuleList(couplings)

    def classes_changed(self) -> None:
        super().classes_changed()
        backbone, _ = open_text(self.backbone, "MaPLe")
        self._rows = prompt_rows(backbone, self.class_names, self._phrase, self.config.num_context)

    def class_weights(self) -> Tensor:
        _, text = open_text(self.backbone, "MaPLe")
        return F.normalize(prompted_text(text, self._rows, list(self.contexts)), dim=-1)  # [classes, dim]

    def image_prompts(self) -> list[Tensor]:
        """The image tower's prompts [M, image width] of each layer."""
        return [coupling(context) for coupling, context in zip(self.couplings, self.contexts, strict=True)]

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Unnormalised prompted features [batch, dim]; prompts stand behind the patches."""
        return prompted_image(open_image(self.backbone, "MaPLe"), pixels, self.image_prompts())

    def forward(self, inputs: Tensor) -> Tensor:
        return self.cosine_logits(self.encode_image(inputs), self.folded_weights())

    def fold_tower(self) -> EditedTower:
        return EditedTower(open_image(self.backbone, "MaPLe"), image_edits(self.image_prompts()))

    def reference_key(self, key: str) -> str:
        kind, index, *rest = key.split(".")  # "contexts.3", "couplings.3.weight"
        layer = int(index)
        if kind == "contexts":
            return "prompt_learner.ctx" if layer == 0 else f"prompt_learner.compound_prompts_text.{layer - 1}"
        place = "proj" if layer == 0 else f"compound_prompt_projections.{layer - 1}"
        return ".".join(["prompt_learner", place, *rest])

    @classmethod
    def reference_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The words behind the context vectors can't be seen; with more than four vectors there are none."""
        names = {name.removeprefix("prompt_learner."): value for name, value in state.items()}
        if "ctx" not in names or names["ctx"].dim() != 2:
            return {}
        count = len(names["ctx"])
        deeper = sum(name.startswith("compound_prompts_text.") for name in names)
        return {"num_context": count, "depth": 1 + deeper} | ({"context_init": ""} if count > _MOST_WORDS else {})

    def context_vectors(self) -> dict[str, Tensor]:
        return {"first layer": self.contexts[0].detach()}
