"""A backbone without towers: the features of some texts, as a file of features holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adaptkit.backbones.base import Backbone, BackboneSpec, Tokens
from adaptkit.errors import BackboneError

UNIDENTIFIED = "features:"
"""How the digest of a backbone begins whose weights a file of features doesn't identify."""


class StoredBackbone(Backbone):
    """What a file of features knows of the model that made them: its name, its logit scale, and some texts' features.

    Args:
        spec: Facts about the model that made the features; `context_length` is 1 where there are texts, else 0.
        logit_scale: exp of that model's logit scale.
        logit_bias: Added to logits.
        texts: Row of each text that has a feature.
        features: Unnormalised text features [rows, dim].
        templates: The templates whose prompts are among the texts.
        digest_of_texts: Changes when a text or its feature does.
        texts_length: The length of the templates' features where all have the same, as far as the file's precision
            goes; else None.
    """

    features: Tensor

    def __init__(
        self,
        spec: BackboneSpec,
        logit_scale: float,
        logit_bias: float,
        texts: Mapping[str, int],
        features: Tensor,
        templates: Sequence[str],
        digest_of_texts: str,
        *,
        texts_length: float | None = None,
    ) -> None:
        super().__init__(spec, logit_scale, logit_bias)
        self.register_buffer("features", features.float(), persistent=False)
        self.own_templates = tuple(templates)
        self.digest_of_texts = digest_of_texts
        self.texts_length = texts_length
        self._row_of = dict(texts)
        self.freeze()

    def knows(self, text: str) -> bool:
        """Whether there is a feature of the text."""
        return text in self._row_of

    def encode_image(self, pixels: Tensor) -> Tensor:
        raise BackboneError(
            f"{self.spec.name!r} is known here by stored features alone and can't read images: load the model itself"
            " (--backbone)."
        )

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """A text's only token is the row of its feature."""
        unknown = [text for text in texts if text not in self._row_of]
        if unknown:
            raise BackboneError(
                f"The file of features has none of the text {unknown[0]!r} (and {len(unknown) - 1} more), and there"
                " is no text encoder to read it: give the model that made the features (--backbone)."
            )
        rows = torch.tensor([[self._row_of[text]] for text in texts], dtype=torch.int64, device=self.device)
        return Tokens(rows.view(len(texts), 1), torch.zeros(len(texts), dtype=torch.int64, device=self.device))

    def encode_text(self, tokens: Tokens) -> Tensor:
        return self.features[tokens.ids[:, 0]]
