"""Context vectors beside class names in text prompts: what CoOp, KgCoOp, ProGrad and CoCoOp have in common.

Source: coop sheet ("Forward pass"); arXiv 2109.01134, Sec. 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.backbones.tower import TextRows, TextTower
from adaptkit.methods.base import ClassWeightMethod, GradientMethod
from adaptkit.methods.prompts._layout import open_text, prompt_rows

INITIAL_STD = 0.02


class ContextMethod(GradientMethod):
    """Learns `context` [M, width], which takes the place of the first M tokens of a phrase before class names.

    A method's `build` sets `context` and `_phrase`.

    Attributes:
        title: Its name as written in messages.
    """

    writes_texts: ClassVar[bool] = True
    title: ClassVar[str]
    context: nn.Parameter
    _phrase: str
    _rows: TextRows

    def open_text(self) -> tuple[DualEncoder, TextTower]:
        """The backbone and its opened text tower.

        Raises:
            BackboneError: The text tower can't be opened.
        """
        return open_text(self.backbone, self.title)

    def layout(self) -> TextRows:
        """The layout of the current classes' prompts.

        Raises:
            DataError: A class name doesn't fit beside the context.
        """
        return prompt_rows(self.open_text()[0], self.class_names, self._phrase, self.context.shape[-2])

    def classes_changed(self) -> None:
        super().classes_changed()
        self._rows = self.layout()

    def context_vectors(self) -> dict[str, Tensor]:
        return {"context": self.context.detach()}

    def reference_key(self, key: str) -> str:
        return "prompt_learner." + {"context": "ctx"}.get(key, key)

    @classmethod
    def reference_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The words that the context started from can't be seen, and don't matter: it stands in their place."""
        context = reference_context(state)
        return {} if context is None else {"num_context": context.shape[-2], "context_init": ""}


class SharedContextMethod(ContextMethod, ClassWeightMethod):
    """Whose class weights are the text features of the prompts with the context in them, the same for all images."""

    def class_weights(self) -> Tensor:
        _, tower = self.open_text()
        return F.normalize(tower(self._rows.to(self.context.device), self.context), dim=-1)  # [classes, dim]


def reference_context(state: Mapping[str, Tensor]) -> Tensor | None:
    """The context of an official release's checkpoint, [M, width] or class-specific [classes, M, width], if any."""
    context = state.get("prompt_learner.ctx", state.get("ctx"))
    return context if context is not None and context.dim() in (2, 3) else None
