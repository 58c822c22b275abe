"""Folding: an adapted model without its text tower, as a plain module from pixels (or features) to logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adaptkit.errors import UnsupportedError
from adaptkit.methods.adapter import AdaptedModel
from adaptkit.methods.base import Method
from adaptkit.methods.folding import Fold, Kind, image_encoder

_ALLOWED = 1e-4
"""How far folded logits may be from the method's, relative to the largest: a hundred times what rounding does."""


class Folded(nn.Module):
    """An adapter reduced to what answering needs.

    Frozen weights are shared with the backbone; what was learned is copied, so that training on doesn't change it.

    Args:
        fold: What the method reduces to.
        encoder: The frozen backbone's image encoder.
        class_names: The classes, in the order of the logits.

    Attributes:
        kind: "matrix" (class weights on frozen features), "head" (more than a matrix on frozen features), or "tower"
            (an image tower of its own, with either).
    """

    def __init__(self, fold: Fold, encoder: nn.Module, class_names: tuple[str, ...]) -> None:
        super().__init__()
        self.kind: Kind = fold.kind
        self.class_names = class_names
        self.image = encoder if fold.tower is None else fold.tower
        self.head = fold.head
        self.requires_grad_(False).eval()

    @property
    def reads_features(self) -> bool:
        """Whether the frozen backbone's features are enough (`from_features`)."""
        return self.kind != "tower"

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [batch, classes] of preprocessed pixels [batch, 3, size, size]."""
        logits: Tensor = self.head(self.image(pixels))
        return logits

    def from_features(self, features: Tensor) -> Tensor:
        """Logits [batch, classes] of the frozen backbone's unnormalised features [batch, dim].

        Raises:
            UnsupportedError: It has an image tower of its own.
        """
        if not self.reads_features:
            raise UnsupportedError("This adapter has an image tower of its own: give pixels, not features.")
        logits: Tensor = self.head(features)
        return logits


def fold(model: AdaptedModel | Method) -> Folded:
    """Reduce an adapter to what its current classes need; folding proves itself on two random inputs.

    Raises:
        UnsupportedError: The method can't be folded (the message says why), or what it folds to answers otherwise.
    """
    method = model.method if isinstance(model, AdaptedModel) else model
    with torch.inference_mode(False), torch.no_grad():
        folded = Folded(method.fold(), image_encoder(method.backbone), method.class_names)
        _prove(method, folded)
    return folded


def _prove(method: Method, folded: Folded) -> None:
    side, dim = method.backbone.spec.preprocessing.image_size, method.backbone.spec.embed_dim
    on_features = folded.reads_features and method.reads == "image_features"  # the encoder itself is the same
    shape = (2, dim) if on_features else (2, 3, side, side)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(method.backbone.device)
    wanted = method(inputs) if on_features or method.reads == "images" else AdaptedModel(method)(inputs)
    difference = float(((folded.head if on_features else folded)(inputs) - wanted).abs().max())
    if not difference <= _ALLOWED * max(1.0, float(wanted.abs().max())):
        raise UnsupportedError(
            f"{method.name} folds to something that answers otherwise (logits differ by {difference:.3g}), so it isn't"
            " used: keep the adapter folder, and report this."
        )
