"""Loading proves itself: an opened tower is compared with the model it was filled from, on a small probe."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adaptkit.backbones.base import Tokens
from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.errors import BackboneError

RELATIVE_TOLERANCE = 1e-4
"""Rounding differs by about 1e-6; a wrong activation, mask or epsilon by 1e-3 or more."""

PROBE_TEXTS = ("a photo of a cat.", "dog")


def probe_pixels(size: int) -> Tensor:
    """One image's normalised pixels [1, 3, size, size], always the same."""
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def prove(
    backbone: DualEncoder,
    encode_image: Callable[[Tensor], Tensor],
    encode_text: Callable[[Tensor], Tensor] | None = None,
    texts: Sequence[str] = PROBE_TEXTS,
) -> None:
    """Compare the opened towers with their source; opaque ones are the source and need no proof.

    One image and two short texts: this runs whenever a model is converted, and costs less than reading its weights.

    Args:
        backbone: The converted model, on the CPU.
        encode_image: The source's unnormalised image features of pixels.
        encode_text: The source's unnormalised text features of token ids [texts, context_length].
        texts: What to compare the text tower on.

    Raises:
        BackboneError: A tower disagrees.
    """
    if backbone.image_tower is not None:
        pixels = probe_pixels(backbone.spec.preprocessing.image_size)
        _compare(backbone, "image", backbone.encode_image(pixels), encode_image(pixels))
    if backbone.text_tower is not None and encode_text is not None:
        tokens: Tokens = backbone.tokenize(texts)
        _compare(backbone, "text", backbone.encode_text(tokens), encode_text(tokens.ids))


def _compare(backbone: DualEncoder, tower: str, ours: Tensor, theirs: Tensor) -> None:
    difference = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)) if ours.shape == theirs.shape else 1.0
    if not difference <= RELATIVE_TOLERANCE:  # also refuses NaN
        raise BackboneError(
            f"The {tower} tower of {backbone.spec.name!r}, converted, doesn't compute what its source does (relative"
            f" difference {difference:.1e}): its architecture isn't fully supported. Please report the model's name."
        )
