"""VPT: visual prompt tuning of CLIP, prompts in the first layers of the image tower; the text side stays as it is.

Source: the vision-only baseline of arXiv 2210.03117, after the idea of arXiv 2203.12119; vpt sheet; reference code
muzairkhattak/multimodal-prompt-learning, trainers/vpt.py and clip/model.py.
Differs from the reference: prompts enter in fp32 (it rounds them to fp16 on the way in, and their gradients with them);
the width follows the backbone (768 there); evaluation follows the module's mode (there a call's argument).
Kept: prompts stand behind the patches, not between class token and patches; the first norm sees those of the first
layer only; class names stand in "a photo of a {}." for every dataset, whatever templates the dataset has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adaptkit.methods import methods
from adaptkit.methods.base import ClassWeightMethod, GradientMethod, MethodConfig
from adaptkit.methods.folding import EditedTower
from adaptkit.methods.prompts._deep import (
    check_count,
    check_depth,
    deeper_prompts,
    image_edits,
    prompted_image,
    reference_name,
    reference_sizes,
)
from adaptkit.methods.prompts._layout import open_image
from adaptkit.types import Reads, TrainingSettings

TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class VPTConfig(MethodConfig):
    """Settings of VPT."""

    num_context: int = field(default=8, metadata={"help": "Prompt vectors per layer."})
    depth: int = field(
        default=12, metadata={"help": "Image layers that get prompts, the first one included; 1 is shallow prompting."}
    )

    def __post_init__(self) -> None:
        check_count("num_context", self.num_context)
        check_count("depth", self.depth)


@methods.register("vpt")
class VPT(ClassWeightMethod, GradientMethod):
    """Visual prompt tuning: `prompts[l]` [M, image width] for layer l = 0 … depth - 1."""

    name = "vpt"
    config_class = VPTConfig
    config: VPTConfig
    reads: ClassVar[Reads] = "images"
    # no official few-shot setting exists (sheet); this is the base-to-novel one
    fixed_templates = True
    default_training = TrainingSettings(epochs=5, batch_size=4, lr=2.5e-3, views=4)

    def build(self) -> None:
        tower = open_image(self.backbone, "VPT")
        check_depth("depth", self.config.depth, tower.layers, "image", self.backbone.spec.name)
        self.prompts = nn.ParameterList(
            deeper_prompts(self.config.depth, self.config.num_context, tower.width, self.generator)
        )
        self.templates = (TEMPLATE,)

    def class_weights(self) -> Tensor:
        """The zero-shot classifier [classes, dim] of the fixed template: no trainable reaches it."""
        with torch.autocast(self.backbone.device.type, enabled=False):  # it is remembered, so never in half precision
            return self.zero_shot()

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Unnormalised prompted features [batch, dim]; prompts stand behind the patches."""
        return prompted_image(open_image(self.backbone, "VPT"), pixels, list(self.prompts))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.cosine_logits(self.encode_image(inputs), self.folded_weights())

    def fold_tower(self) -> EditedTower:
        return EditedTower(open_image(self.backbone, "VPT"), image_edits(list(self.prompts)))

    def reference_key(self, key: str) -> str:
        return reference_name("image", int(key.split(".")[1]))  # "prompts.3"

    @classmethod
    def reference_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        count, depth = reference_sizes(state, "image")
        return {"num_context": count, "depth": depth} if count else {}
