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
    """Reduce an adapter to what its current classes need, as one module from pixels to logits.

    Raises:
        UnsupportedError: The method can't be folded (the message says why), what it folds to answers otherwise, or the
            backbone has no image encoder of its own.
    """
    method = model.method if isinstance(model, AdaptedModel) else model
    return Folded(proven_fold(method), image_encoder(method.backbone), method.class_names)


def proven_fold(method: Method) -> Fold:
    """What a method reduces to for its current classes; folding proves itself on two random inputs.

    Raises:
        UnsupportedError: It can't be folded, or what it folds to answers otherwise.
    """
    spec, device = method.backbone.spec, method.backbone.device
    with torch.inference_mode(False), torch.no_grad():
        parts = method.fold()
        on_features = parts.tower is None and method.reads == "image_features"
        side = spec.preprocessing.image_size
        shape = (2, spec.embed_dim) if on_features else (2, 3, side, side)
        inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        if on_features:
            wanted, given = method(inputs), parts.head(inputs)
        else:
            wanted = AdaptedModel(method)(inputs)
            given = parts.head((parts.tower or method.backbone.encode_image)(inputs))
    difference = float((given - wanted).abs().max())
    if not difference <= _ALLOWED * max(1.0, float(wanted.abs().max())):
        raise UnsupportedError(
            f"{method.name} folds to something that answers otherwise (logits differ by {difference:.3g}), so it isn't"
            " used: keep the adapter folder, and report this."
        )
    return parts
