"""Where in the language model an image's and a text's feature is read: the layer, the tokens, and what is taken off.

    mini-mllm@layer2              the state behind layer 2, not normalised; without it the last one, normalised
    mini-mllm@image-mean          of images the mean over their own positions; without it the prompt's last token
    mini-mllm@centred             less the mean feature of images, and of texts, that show nothing
    mini-mllm@bf16@layer2@centred what is said of the weights comes first

Source: mllm sheet `few-shot-classifier.md`, route 7 (layer, pooling, centring).
Differs from the sheet: a backbone sees no dataset, so the centre is that of blank images and empty phrases; texts are
always read at their last token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adaptkit.errors import BackboneError

PLAIN_TEXTS = ("an object", "a thing", "a picture")
"""Texts that say nothing of what there is."""

_OPTION = re.compile(r"@(?:layer(\d{1,4})|(image-mean)|(centred))$")


@dataclass(frozen=True)
class Reading:
    """Where features are read.

    Args:
        layer: Number of the layer whose state is read, from 1; 0 for the last one, normalised.
        pooling: Of images: the prompt's last token, or the mean over the image's positions.
        centred: Take off the mean feature of inputs without content.
    """

    layer: int = 0
    pooling: Literal["last", "image-mean"] = "last"
    centred: bool = False

    @property
    def suffix(self) -> str:
        """It as part of a backbone's name."""
        layer = f"@layer{self.layer}" if self.layer else ""
        return layer + ("@image-mean" * (self.pooling == "image-mean")) + ("@centred" * self.centred)


def split_reading(name: str) -> tuple[str, Reading]:
    """A backbone's name without what it says of reading, and that.

    Raises:
        BackboneError: An option stands there twice, or layer 0 is asked for.

    Example:
        >>> split_reading("mini-mllm@layer2@centred")
        ('mini-mllm', Reading(layer=2, pooling='last', centred=True))
    """
    found: dict[str, str] = {}
    plain = name if isinstance(name, str) else ""
    while (match := _OPTION.search(plain)) and match.start():
        option = "layer" if match[1] else match[2] or match[3]
        if option in found or (match[1] and not int(match[1])):
            raise BackboneError(
                f"{name!r} has {match[0]!r} twice, or a layer 0: layers count from 1, options come once."
            )
        found[option] = match[1] or option
        plain = plain[: match.start()]
    if not found:
        return name, Reading()
    pooling: Literal["last", "image-mean"] = "image-mean" if "image-mean" in found else "last"
    return plain, Reading(int(found.get("layer", 0)), pooling, "centred" in found)


def blank_images(side: int) -> Tensor:
    """Two images without content, pixels [2, 3, side, side]: grey, and noise (always the same)."""
    noise = torch.rand(3, side, side, generator=torch.Generator().manual_seed(0))
    return torch.stack([torch.full((3, side, side), 0.5), noise])
