"""Image features of an MLLM: computed once per image, then picked, repeated and put into any prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from adaptkit.backbones.mllm.families import Family


@dataclass(frozen=True)
class ImageFeatures:
    """What the language model reads of some images.

    Args:
        tokens: Of each image, its vectors [placeholders, width].
        deeper: Vectors that are added inside the first layers of the language model, per layer and image (Qwen3-VL).
        grids: Time, height and width of each image in patches, int64 [images, 3] (Qwen), or None.
        kept: Where tokens were left out, the places that those of each image had among all, int64 [placeholders].
        whole: Where tokens were left out, how many each image had.
    """

    tokens: tuple[Tensor, ...]
    deeper: tuple[tuple[Tensor, ...], ...] = ()
    grids: Tensor | None = None
    kept: tuple[Tensor, ...] = ()
    whole: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def counts(self) -> tuple[int, ...]:
        """Placeholders of each image."""
        return tuple(len(vectors) for vectors in self.tokens)

    def select(self, indices: Iterable[int]) -> ImageFeatures:
        """Some of the images, in any order and as often as asked for; nothing is copied or computed."""
        picked = list(indices)
        return ImageFeatures(
            tuple(self.tokens[index] for index in picked),
            tuple(tuple(layer[index] for index in picked) for layer in self.deeper),
            None if self.grids is None else self.grids[picked],
            tuple(self.kept[index] for index in picked if self.kept),
            tuple(self.whole[index] for index in picked if self.whole),
        )

    @staticmethod
    def join(parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """All images of several sets, one after the other; tokens were left out of all or of none."""
        grids = [part.grids for part in parts if part.grids is not None]
        parts = [part for part in parts if len(part)]
        layers = len(parts[0].deeper) if parts else 0
        return ImageFeatures(
            tuple(vectors for part in parts for vectors in part.tokens),
            tuple(tuple(vectors for part in parts for vectors in part.deeper[layer]) for layer in range(layers)),
            torch.cat(grids) if grids else None,
            tuple(places for part in parts for places in part.kept),
            tuple(count for part in parts for count in part.whole),
        )

    def as_outputs(self, family: Family) -> Any:
        """The features as the family's own encoder would return them."""
        pooled = torch.stack(self.tokens) if family.stacked else list(self.tokens)
        return SimpleNamespace(pooler_output=pooled, deepstack_features=[list(layer) for layer in self.deeper])


def features_of(output: Any, images: int, grids: Tensor | None) -> ImageFeatures:
    """An encoder's output as features of single images.

    Args:
        output: What `get_image_features` returned.
        images: How many images went in.
        grids: As in `ImageFeatures`.
    """
    pooled = output.pooler_output
    if not isinstance(pooled, Tensor) and len(pooled) != images:  # Idefics takes them all for one sample's
        pooled = torch.cat([vectors.reshape(-1, vectors.shape[-1]) for vectors in pooled])
    if isinstance(pooled, Tensor):  # [images · tiles, vectors, width]; square images all have as many vectors
        pooled = pooled.reshape(images, -1, pooled.shape[-1]).unbind()
    tokens = tuple(vectors.reshape(-1, vectors.shape[-1]) for vectors in pooled)
    deeper = tuple(tuple(layer) for layer in getattr(output, "deepstack_features", None) or ())
    return ImageFeatures(tokens, deeper, grids)
