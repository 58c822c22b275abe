"""IVLP: independent vision-language prompting, deep prompts in both towers that know nothing of each other.

Source: the baseline of arXiv 2210.03117 (two prompts, twelve layers) and of arXiv 2307.06948 (four, nine); ivlp sheet;
reference code muzairkhattak/multimodal-prompt-learning and muzairkhattak/PromptSRC, trainers/independentVL.py and
clip/model.py.
Differs from the reference: fp32 throughout (it stores the first text prompt in fp16 and rounds all prompts to fp16 on
the way in, in its fp32 mode too); widths follow the backbone (512 and 768 there); more text prompts than the phrase has
tokens are refused (there the words are dropped silently).
Kept: with fewer text prompts than the phrase has words the other words stay as frozen tokens ("of a" with two); behind
the last prompted layer the old prompts' outputs flow on; an image depth of 0 means no image prompts, whatever their
number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.backbones.tower import ImageTower, TextTower
from adaptkit.methods import methods
from adaptkit.methods.base import ClassWeightMethod, GradientMethod, MethodConfig
from adaptkit.methods.folding import EditedTower
from adaptkit.methods.prompts._deep import (
    check_count,
    check_depth,
    deeper_prompts,
    first_context,
    image_edits,
    prompted_image,
    prompted_text,
    reference_name,
    reference_sizes,
)
from adaptkit.methods.prompts._layout import open_image, open_text, prompt_rows
from adaptkit.types import Reads, TrainingSettings


@dataclass(frozen=True)
class IVLPConfig(MethodConfig):
    """Settings of IVLP."""

    num_text_context: int = field(default=2, metadata={"help": "Prompt vectors per text layer."})
    num_image_context: int = field(
        default=2, metadata={"help": "Prompt vectors per image layer; 0 leaves the image tower as it is."}
    )
    text_depth: int = field(default=12, metadata={"help": "Text layers that get prompts, the first one included."})
    image_depth: int = field(
        default=12,
        metadata={"help": "Image layers that get prompts, the first one included; 0 leaves the image tower as it is."},
    )
    context_init: str = field(
        default="a photo of a",
        metadata={
            "help": "Words before the class name; the first layer's text prompts start from the first of them. Empty:"
            " random prompts."
        },
    )

    def __post_init__(self) -> None:
        check_count("num_text_context", self.num_text_context)
        check_count("text_depth", self.text_depth)
        check_count("num_image_context", self.num_image_context, least=0)
        check_count("image_depth", self.image_depth, least=0)

    @property
    def prompts_images(self) -> bool:
        """Whether there are image prompts."""
        return self.num_image_context > 0 and self.image_depth > 0


@methods.register("ivlp")
class IVLP(ClassWeightMethod, GradientMethod):
    """Independent prompts: `text_prompts[l]` [M, text width] and `image_prompts[l]` [M, image width] of layer l."""

    name = "ivlp"
    config_class: ClassVar[type[IVLPConfig]] = IVLPConfig
    config: IVLPConfig
    reads: ClassVar[Reads] = "images"
    # no official few-shot setting exists (sheet); this is the base-to-novel one
    default_training = TrainingSettings(epochs=5, batch_size=4, lr=3.5e-3, views=4)

    def build(self) -> None:
        config, name = self.config, self.backbone.spec.name
        backbone, text = open_text(self.backbone, type(self).__name__)
        check_depth("text_depth", config.text_depth, text.layers, "text", name)
        self._phrase, first = first_context(backbone, config.context_init, config.num_text_context, self.generator)
        self.text_prompts = nn.ParameterList(
            [first, *deeper_prompts(config.text_depth - 1, config.num_text_context, text.width, self.generator)]
        )
        self.image_prompts = nn.ParameterList()
        if config.prompts_images:
            image = open_image(self.backbone, type(self).__name__)
            check_depth("image_depth", config.image_depth, image.layers, "image", name)
            self.image_prompts.extend(
                deeper_prompts(config.image_depth, config.num_image_context, image.width, self.generator)
            )
        else:  # what the image tower gives is stored: it needs no run in training
            self.wants_frozen = True

    def classes_changed(self) -> None:
        super().classes_changed()
        backbone, _ = open_text(self.backbone, type(self).__name__)
        self._rows = prompt_rows(backbone, self.class_names, self._phrase, self.config.num_text_context)

    def text_tower(self) -> TextTower:
        """The tower that the text prompts go into."""
        return open_text(self.backbone, type(self).__name__)[1]

    def image_tower(self) -> ImageTower:
        """The tower that the image prompts go into."""
        return open_image(self.backbone, type(self).__name__)

    def class_weights(self) -> Tensor:
        return F.normalize(prompted_text(self.text_tower(), self._rows, list(self.text_prompts)), dim=-1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Unnormalised features [batch, dim]; prompts stand behind the patches, where there are any."""
        if not self.config.prompts_images:
            return self.backbone.encode_image(pixels)
        return prompted_image(self.image_tower(), pixels, list(self.image_prompts))

    def forward(self, inputs: Tensor, *, features: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Logits [batch, classes] of pixels `inputs` [batch, 3, h, w].

        Args:
            inputs: Pixels.
            features: The images' features [batch, dim], where the caller has them already.
            weights: `class_weights`, where the caller has them already.
        """
        features = self.encode_image(inputs) if features is None else features
        return self.cosine_logits(features, self.folded_weights() if weights is None else weights)

    def fold_tower(self) -> nn.Module | None:
        if not self.config.prompts_images:
            return None
        return EditedTower(self.image_tower(), image_edits(list(self.image_prompts)))

    def losses(self, inputs: Tensor, labels: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        features = None if self.config.prompts_images else frozen
        return {"cross_entropy": F.cross_entropy(self(inputs, features=features), labels)}

    def context_vectors(self) -> dict[str, Tensor]:
        return {"first layer": self.text_prompts[0].detach()}  # deeper ones don't live among token embeddings

    def reference_key(self, key: str) -> str | None:
        kind, layer = key.split(".")  # "text_prompts.3"
        return reference_name(kind.removesuffix("_prompts"), int(layer))

    @classmethod
    def reference_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        text_count, text_depth = reference_sizes(state, "text")
        if not text_count:
            return {}
        image_count, image_depth = reference_sizes(state, "image")
        settings = {"num_text_context": text_count, "text_depth": text_depth}
        settings |= {"num_image_context": image_count, "image_depth": image_depth}
        # above four the releases drop the words, whatever was written
        return settings | ({"context_init": ""} if text_count > 4 else {})
