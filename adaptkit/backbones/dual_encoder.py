"""The backbone that is made of two encoders, open where their towers could be opened, opaque otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adaptkit.backbones.base import Backbone, BackboneSpec, Tokens
from adaptkit.backbones.tokenizing import TextTokenizer
from adaptkit.backbones.tower import ImageTower, TextRows, TextTower
from adaptkit.errors import BackboneError

ImageEncoder = ImageTower | nn.Module
TextEncoder = TextTower | nn.Module


@dataclass(frozen=True)
class ClassToken:
    """A class token that a text tower puts behind every text and pools (CoCa).

    Args:
        symbol: Its row in the tower's token embedding.
        padding: The padding id, whose keys are hidden.
        shifted: True for released CoCa weights: their mask is one place off, so that the first padding after the text
            is seen, and the class token doesn't see itself unless the text fills the context.
    """

    symbol: int
    padding: int = 0
    shifted: bool = True

    def rows(self, symbols: Tensor, ends: Tensor) -> TextRows:
        """The layout of texts [rows, length]: text, first padding, class token; the rest can't be seen and goes.

        Source: open_clip, transformer.py, TextTransformer._build_additive_mask.
        """
        count, length = symbols.shape
        full = torch.cat([symbols, symbols.new_full((count, 1), self.symbol)], dim=1)  # [rows, length + 1]
        padding = full == self.padding
        hidden = torch.cat([padding.new_zeros(count, 1), padding[:, :-1]], dim=1) if self.shifted else padding
        at = (ends + 2).clamp(max=length)[:, None]  # the class token's new place
        columns = torch.arange(length + 1, device=symbols.device).expand_as(full)
        columns = torch.where(columns == at, length, columns)  # [rows, length + 1]
        return TextRows.build(
            full.gather(1, columns), at[:, 0], causal=True, positions=columns, hidden=hidden.gather(1, columns)
        )


class DualEncoder(Backbone):
    """Image and text encoders with a shared space.

    Args:
        spec: Facts about the weights.
        image: An `ImageTower`, or any module from pixels [batch, 3, size, size] to features [batch, embed_dim].
        text: A `TextTower`, any module from token ids [texts, length] to features, or None for image-only backbones.
        tokenizer: From texts to `Tokens`, refusing what doesn't fit; None without text.
        logit_scale: exp of the model's logit scale.
        logit_bias: Added to logits.
        class_token: The class token that the text tower appends to every text and pools (CoCa), or None.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        image: ImageEncoder,
        text: TextEncoder | None = None,
        tokenizer: TextTokenizer | None = None,
        *,
        logit_scale: float = 1.0,
        logit_bias: float = 0.0,
        class_token: ClassToken | None = None,
    ) -> None:
        super().__init__(spec, logit_scale, logit_bias)
        self.image = image
        self.text = text
        self._tokenizer = tokenizer
        self._class_token = class_token
        self.freeze()

    @property
    def image_tower(self) -> ImageTower | None:  # type: ignore[override]  # read-only here
        return self.image if isinstance(self.image, ImageTower) else None

    @property
    def text_tower(self) -> TextTower | None:  # type: ignore[override]  # read-only here
        return self.text if isinstance(self.text, TextTower) else None

    def encode_image(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.image(pixels)  # [batch, embed_dim]
        return features

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        tokens = self._require_tokenizer()(self._listed(texts))
        return Tokens(tokens.ids.to(self.device), tokens.ends.to(self.device))

    def word_pieces(self, text: str) -> list[int]:
        """Token ids of the bare text, without start, end and padding (for the lengths of class names).

        Raises:
            BackboneError: The backbone has no text encoder.
        """
        return self._require_tokenizer().word_pieces(text)

    def piece_text(self, token: int) -> str:
        """One token as it reads.

        Raises:
            BackboneError: The backbone has no text encoder.
        """
        return self._require_tokenizer().piece_text(token)

    def _require_tokenizer(self) -> TextTokenizer:
        if self._tokenizer is None:
            raise BackboneError(f"Backbone {self.spec.name!r} has no text encoder; choose one with both towers.")
        return self._tokenizer

    @staticmethod
    def _listed(texts: Sequence[str]) -> list[str]:
        if isinstance(texts, str):
            raise BackboneError(f"tokenize takes a list of texts, not one text: write [{texts!r}].")
        return list(texts)

    def text_rows(self, tokens: Tokens, symbols: Tensor | None = None) -> TextRows:
        """The text tower's layout of tokenised texts.

        Args:
            tokens: As `tokenize` gives them.
            symbols: The ids with context slots (-1 - j) put in; None for the ids themselves.

        Raises:
            BackboneError: The text tower is opaque or missing.
        """
        tower = self.text_tower
        if tower is None:
            self.require_open("A prompt layout", text=True)
            raise BackboneError(f"Backbone {self.spec.name!r} has no open text tower.")
        symbols = tokens.ids if symbols is None else symbols
        if self._class_token is not None:
            return self._class_token.rows(symbols, tokens.ends)
        return TextRows.build(symbols, tokens.ends, causal=tower.causal)

    def encode_text(self, tokens: Tokens) -> Tensor:
        if self.text is None:
            return super().encode_text(tokens)
        features: Tensor = self.text(tokens.ids) if self.text_tower is None else self.text(self.text_rows(tokens))
        return features  # [texts, embed_dim]
