"""A trainable visual prefix in the place of a multimodal model's own bridge, and captions to train it on.

A prefix takes exactly the places that an image has in the model's prompt: its n vectors stand at n placeholders, so
that positions, token types and markers come out as the model knows them, and every way of answering works on it.

Source: mllm sheets `frozen.md`, `magma.md`.
Differs from the papers: the prefix stands in the model's own chat template; captions are templates with the class's
name, and its descriptions where there are some.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.backbones.mllm.model import MLLM
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.errors import ConfigError
from adaptkit.methods.base import ParameterGroup, draw_linear, render_prompts
from adaptkit.methods.mllm._tuning import TunedMllm, TunedMllmConfig
from adaptkit.methods.mllm._vision import (
    Phi,
    Pool,
    as_image,
    open_vision,
    pooled,
    vision_parameters,
    vision_states,
)
from adaptkit.types import FitTask, TrainingLoop

BETAS = (0.9, 0.95)
"""Averages' decay of adam in the bridge papers."""


class VisualPrefix(nn.Module):
    """From vision states to vectors among the language model's embeddings.

    Args:
        inputs: Width of the vision encoder.
        width: Width of the language model.
        tokens: Vectors per image, of one pooled state; 0: one per state, by one shared layer (a grid).
        numbers: Draws the layer.
        norm: Whether dropout and a LayerNorm follow.
    """

    def __init__(self, inputs: int, width: int, tokens: int, numbers: torch.Generator, *, norm: bool = False) -> None:
        super().__init__()
        self.width = width
        self.linear = draw_linear(inputs, max(1, tokens) * width, numbers)
        self.after = nn.Sequential(nn.Dropout(0.1), nn.LayerNorm(width)) if norm else nn.Identity()

    def forward(self, states: Tensor) -> Tensor:
        """Vectors [images, n, width] of states [images, positions, inputs]; a pooled state is the only position."""
        vectors: Tensor = self.linear(states.float()).reshape(len(states), -1, self.width)  # [images, n, width]
        out: Tensor = self.after(vectors)
        return out


@dataclass(frozen=True)
class PrefixConfig(TunedMllmConfig):
    """Settings that methods with a visual prefix share."""

    answers: Literal["names", "captions"] = field(
        default="captions",
        metadata={
            "help": "What is trained and scored as an answer: the name, or a caption (a template with the name; trained"
            " on the class's descriptions too, where there are some)."
        },
    )
    tokens: int = field(default=2, metadata={"help": "Vectors that an image becomes."})
    pool: Pool = field(
        default="mean", metadata={"help": "The encoder's vector of an image: mean of its states, or its class token."}
    )
    phi: Phi = field(
        default="frozen", metadata={"help": "The vision encoder: frozen, trained by low-rank updates (lora), or full."}
    )
    phi_r: int = field(default=16, metadata={"help": "phi=lora: rank of the updates; their scale is 1."})
    phi_lr: float = field(default=1e-5, metadata={"help": "Learning rate of the vision encoder where it is trained."})

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [f"{name} is {getattr(self, name)}" for name in ("tokens", "phi_r") if getattr(self, name) < 1]
        wrong += [f"phi_lr is {self.phi_lr}"] if self.phi_lr <= 0 else []
        if wrong:
            raise ConfigError(f"These settings can't be used: {', '.join(wrong)}; at least 1, and a rate above 0.")
        if self.variant == "letters" and self.answers == "captions":
            raise ConfigError("Captions aren't letters: choose variant sft or softmax, or answers=names.")


class PrefixedMllm(TunedMllm):
    """A tuned MLLM that may read a prefix of its own in the place of images (`prefix_map`; None leaves the model's)."""

    config: Any
    reads_descriptions: ClassVar[Literal["never", "optional", "needed"]] = "optional"
    prefix_map: VisualPrefix | None

    # --- what a method fills in ---------------------------------------------------------------------------------------

    def make_prefix(self, states: Tensor, width: int) -> VisualPrefix | None:
        """The prefix, for an encoder that gives such states [1, positions, inputs] and a language model so wide."""
        raise NotImplementedError(f"{type(self).__name__} doesn't define make_prefix.")

    def chosen(self, states: Tensor) -> Tensor:
        """What the prefix reads of the encoder's states [images, positions, inputs]: here their pooled vector."""
        return pooled(self.mllm, states, self.config.pool)

    # --- parts --------------------------------------------------------------------------------------------------------

    def tune(self, twin: MLLM) -> None:
        open_vision(twin, self.config.phi, self.config.phi_r, self.generator)
        self.vision_frozen = self.config.phi == "frozen"
        with torch.no_grad():
            states = vision_states(twin, self.blank_images()[:1])
        made = self.make_prefix(states, twin.model.get_input_embeddings().weight.shape[1])
        self.prefix_map = None if made is None else made.to(twin.device).eval()

    def build(self) -> None:
        super().build()
        self._caption_ids: dict[str, list[int]] = {}
        for text in self.training_captions():
            self.mllm.prompter.check_text(text, "caption")

    def shown(self, pixels: Tensor) -> ImageFeatures:
        """The frozen part of an image: its pooled or gridded states, or what the model's own bridge makes of it."""
        if self.prefix_map is None:
            return super().features(pixels)
        states = self.chosen(vision_states(self.mllm, pixels.to(self.backbone.device)))
        return ImageFeatures(tuple(states.unbind()))

    def features(self, pixels: Tensor) -> ImageFeatures:
        return self.bridged(self.shown(pixels))

    def bridged(self, shown: ImageFeatures) -> ImageFeatures:
        """What the language model reads of what `shown` gave."""
        return shown if self.prefix_map is None else as_image(self.mllm, self.prefix_map(torch.stack(shown.tokens)))

    def training_states(self, inputs: Tensor) -> ImageFeatures:
        """What `shown` gives of training images (see `losses` for `inputs`)."""
        return super().training_features(inputs)

    def training_features(self, inputs: Tensor) -> ImageFeatures:
        return self.bridged(self.training_states(inputs))

    def parameter_groups(self) -> tuple[ParameterGroup, ...]:
        own = tuple(vision_parameters(self, self.mllm))
        known = {id(parameter) for parameter in own}
        others = tuple(parameter for parameter in self.trainables() if id(parameter) not in known)
        groups = [ParameterGroup(others, betas=BETAS)] if others else []
        return (*groups, ParameterGroup(own, lr=self.config.phi_lr, betas=BETAS)) if own else tuple(groups)

    def look(self, loop: TrainingLoop | None) -> None:
        prompt = len(self.prompt_ids([Turn(self.question)], [self.placeholders]))
        longest = max(map(len, self.caption_rows(self.training_captions())))
        self.mllm.prompter.check_length(prompt + longest, "The prompt with its longest caption")
        super().look(loop)

    # --- captions -----------------------------------------------------------------------------------------------------

    def candidate_texts(self, names: Sequence[str]) -> list[str]:
        if self.config.answers == "names":
            return super().candidate_texts(names)
        return render_prompts(names, self.templates[0])

    def captions_of(self, name: str) -> list[str]:
        """What a class's images may be captioned with in training."""
        if self.config.answers == "names":
            return super().candidate_texts([name])
        return [*(render_prompts([name], template)[0] for template in self.templates), *self.descriptions.get(name, ())]

    def training_captions(self) -> list[str]:
        """All captions of the fitted classes, each once."""
        return list(dict.fromkeys(text for name in self.fitted_names for text in self.captions_of(name)))

    def drawn_captions(self, labels: Tensor) -> list[str]:
        """A caption for each image; the loop has seeded torch's own generator, from which they are drawn."""
        pools = [self.captions_of(self.fitted_names[label]) for label in labels.tolist()]
        return [pool[int(torch.randint(len(pool), ()))] if len(pool) > 1 else pool[0] for pool in pools]

    def _questions(self, inputs: Tensor, labels: Tensor) -> tuple[list[str], list[list[int]]]:
        if self.config.variant != "sft" or self.config.answers == "names":
            return super()._questions(inputs, labels)
        return [self.question] * len(labels), self.caption_rows(self.drawn_captions(labels))

    def caption_rows(self, captions: Sequence[str]) -> list[list[int]]:
        """Tokens of captions as answers, each with the one that ends the turn; remembered."""
        new = [text for text in dict.fromkeys(captions) if text not in self._caption_ids]
        self._caption_ids |= zip(new, self.mllm.prompter.answers([Turn(self.question)], new), strict=True)
        return [self._caption_ids[text] for text in captions]

    def training_texts(self) -> list[str]:
        if self.config.answers == "names":
            return super().training_texts()
        prompter = self.mllm.prompter
        return [prompter.render([Turn(self.question, 1, text)]) for text in self.training_captions()]

    # --- the record ---------------------------------------------------------------------------------------------------

    def finish(self, task: FitTask) -> dict[str, Any]:
        return {**super().finish(task), **self.prefix_facts()}

    @torch.no_grad()
    def prefix_facts(self) -> dict[str, Any]:
        """The mean norm of prefix vectors against that of token embeddings: far from 1, answers tend to fail."""
        if self.prefix_map is None or self._numbered is None:
            return {}
        some = torch.arange(min(32, len(self._numbered.labels)))
        vectors = torch.cat(self.training_features(some).tokens).float()
        table = self.mllm.model.get_input_embeddings().weight.float()
        return {"prefix_norm_ratio": float(vectors.norm(dim=1).mean() / table.norm(dim=1).mean())}
