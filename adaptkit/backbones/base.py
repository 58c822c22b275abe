"""The backbone: a frozen model with its tokenizer and its preprocessing, bound together.

Preprocessing, activation, context length, tokenizer and logit scale belong to the weights, so they are loaded with
them and covered by one digest; nothing about them can be set separately.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from adaptkit.errors import BackboneError

if TYPE_CHECKING:
    from adaptkit.backbones.tower import ImageTower, TextTower

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """The plain test transform of a backbone: from an RGB image to normalised pixels [3, size, size].

    Args:
        image_size: Side of the square input, in pixels.
        mean: Per-channel mean, for values in [0, 1].
        std: Per-channel standard deviation.
        interpolation: "bicubic" or "bilinear".
        resize: "shortest" (shorter side to `resize_size`, then centre crop) or "squash" (both sides to
            the input's size).
        resize_size: Shorter side before the crop; None for `image_size`.
    """

    image_size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize: Literal["shortest", "squash"] = "shortest"
    resize_size: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for digests and JSON."""
        return asdict(self)


@dataclass(frozen=True)
class BackboneSpec:
    """What is known about a backbone.

    Args:
        name: The name it was loaded by ("mini", "ViT-B-16/openai", "transformers:openai/clip-vit-base-patch16").
        family: "open_clip", "transformers-clip", "siglip", … as the loader calls it.
        digest: sha256 over weights, preprocessing, tokenizer and text settings; two backbones with one digest agree.
        embed_dim: Size of the joint space (image features where there is no text).
        preprocessing: The plain test transform.
        context_length: Text positions, 0 where there is no text.
        activation: Activation of the image tower's MLPs, as found with the weights.
        opaque_image: "" where the image tower is open, else why it can't be opened.
        opaque_text: The same for the text tower.
    """

    name: str
    family: str
    digest: str
    embed_dim: int
    preprocessing: Preprocessing
    context_length: int = 0
    activation: str = ""
    opaque_image: str = ""
    opaque_text: str = ""


@dataclass(frozen=True)
class Tokens:
    """Tokenised texts.

    Args:
        ids: int64 [texts, context_length], padded as the backbone's tokenizer pads.
        ends: Position whose output is the text's feature (for CLIP the end token), int64 [texts].
    """

    ids: Tensor
    ends: Tensor


class Backbone(nn.Module):
    """A frozen model behind one interface. Sub-classes fill in the encoders.

    Attributes:
        spec: Facts about the weights.
        image_tower: The opened image tower, or None where it is opaque (`spec.opaque_image` says why).
        text_tower: The opened text tower, or None.
        logit_scale: exp of the model's logit scale, a float buffer [] (≈ 100 for OpenAI's CLIP).
        logit_bias: Added to the logits (SigLIP), a float buffer [], 0 for CLIP.
        own_templates: The only templates that it reads; () for the usual backbone, which reads any.
        texts_length: The length of its templates' text features where all have the same; else None. Features that were
            scaled to unit length before they were stored do: divided by it, they are the zero-shot classifier itself.
            Normalised again, those rounded to half precision would move by 1e-4, which decides near ties.
        is_mllm: Whether it is a multimodal language model, which can be asked questions.
    """

    is_mllm: ClassVar[bool] = False
    spec: BackboneSpec
    own_templates: tuple[str, ...] = ()
    texts_length: float | None = None
    image_tower: ImageTower | None = None
    text_tower: TextTower | None = None
    logit_scale: Tensor
    logit_bias: Tensor

    def __init__(self, spec: BackboneSpec, logit_scale: float, logit_bias: float = 0.0) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("logit_scale", torch.tensor(float(logit_scale)), persistent=False)
        self.register_buffer("logit_bias", torch.tensor(float(logit_bias)), persistent=False)
        self._text_memo: dict[tuple[str, ...], Tensor] = {}

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    @property
    def has_text(self) -> bool:
        return self.spec.context_length > 0

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Unnormalised image features [batch, embed_dim] of preprocessed pixels [batch, 3, size, size]."""
        raise BackboneError(f"Backbone {self.spec.name!r} has no image encoder.")

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Token ids, with the position each text's feature is read at.

        Raises:
            BackboneError: A text doesn't fit into the context length (the message says which and by how much),
                or the backbone has no text tower.
        """
        raise BackboneError(f"Backbone {self.spec.name!r} has no text encoder; choose one with both towers.")

    def encode_text(self, tokens: Tokens) -> Tensor:
        """Unnormalised text features [texts, embed_dim]."""
        raise BackboneError(f"Backbone {self.spec.name!r} has no text encoder; choose one with both towers.")

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unnormalised frozen features [texts, embed_dim] of whole sentences; the last few lists are remembered."""
        key = tuple(texts)
        if key not in self._text_memo:
            if len(self._text_memo) >= 32:  # lists of class names repeat within a run; a run uses only a few
                self._text_memo.pop(next(iter(self._text_memo)))
            self._text_memo[key] = self.encode_text(self.tokenize(key))
        return self._text_memo[key]

    def require_open(self, needed_by: str, *, image: bool = False, text: bool = False) -> None:
        """Refuse, with the reason, where `needed_by` must reach inside a tower that is opaque.

        Raises:
            BackboneError: A needed tower is opaque or missing.
        """
        for wanted, tower, reason, word in (
            (image, self.image_tower, self.spec.opaque_image, "image"),
            (text, self.text_tower, self.spec.opaque_text, "text"),
        ):
            if wanted and tower is None:
                raise BackboneError(
                    f"{needed_by} must reach inside the {word} tower, and that of {self.spec.name!r} can't be opened:"
                    f" {reason or f'it has no {word} tower'}. Choose a ViT-based CLIP, or a method that works on"
                    " features ('adaptkit list methods' says which)."
                )

    def big_blocks(self) -> list[nn.Module]:
        """The parts that hold nearly all weights of the linear layers: what can be quantised."""
        towers = [tower for tower in (self.image_tower, self.text_tower) if tower is not None]
        return [block for tower in towers for block in tower.blocks]

    def freeze(self) -> Backbone:
        """Evaluation mode, no gradients for its own weights; returns itself."""
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Backbone:
        """Stays in evaluation mode: batch statistics and dropout of a frozen model never move."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Backbone:
        self._text_memo.clear()  # remembered features would stay on the old device or dtype
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
