"""A trainable visual prefix in the place of a multimodal model's own bridge.

A prefix takes exactly the places that an image has in the model's prompt: its n vectors stand at n placeholders, so
that positions, token types and markers come out as the model knows them, and every way of answering works on it.

Source: mllm sheets `frozen.md`, `magma.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.backbones.mllm.model import MLLM
from adaptkit.methods.base import ParameterGroup, at_least, draw_linear, refuse
from adaptkit.methods.mllm._bridged import BridgedConfig, BridgedMllm
from adaptkit.methods.mllm._vision import (
    Phi,
    Pool,
    as_image,
    open_vision,
    pooled,
    vision_parameters,
    vision_states,
)
from adaptkit.types import FitTask

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
class PrefixConfig(BridgedConfig):
    """Settings that methods with a visual prefix share."""

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
        refuse(self, *at_least(self, 1, "tokens", "phi_r"), ("phi_lr", "above 0", self.phi_lr > 0))


class PrefixedMllm(BridgedMllm):
    """A bridged MLLM that reads a prefix of its own for an image (`prefix_map`), or where that is None the model's."""

    config: Any
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

    @property
    def has_bridge(self) -> bool:
        return self.prefix_map is not None

    def shown(self, pixels: Tensor) -> ImageFeatures:
        """The frozen part of an image: its pooled or gridded states, or what the model's own bridge makes of it."""
        if self.prefix_map is None:
            return self.seen(pixels, self.question)
        states = self.chosen(vision_states(self.mllm, pixels.to(self.backbone.device)))
        return ImageFeatures(tuple(states.unbind()))

    def bridged(self, shown: ImageFeatures) -> ImageFeatures:
        """What the language model reads of what `shown` gave."""
        return shown if self.prefix_map is None else as_image(self.mllm, self.prefix_map(torch.stack(shown.tokens)))

    def parameter_groups(self) -> tuple[ParameterGroup, ...]:
        own = tuple(vision_parameters(self, self.mllm))
        known = {id(parameter) for parameter in own}
        others = tuple(parameter for parameter in self.trainables() if id(parameter) not in known)
        groups = [ParameterGroup(others, betas=BETAS)] if others else []
        return (*groups, ParameterGroup(own, lr=self.config.phi_lr, betas=BETAS)) if own else tuple(groups)

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
