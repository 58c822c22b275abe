"""The attention inside an MLLM's vision encoder, of two layers, per vector that the language model would read.

Queries and keys of the two layers are computed once more from what went into them, so the encoder may use any attention
kernel, and no other layer's map is made.

Source: VScan arXiv 2505.22654; mllm sheet `vscan.md`, stage 1 (class token's row; attention received, averaged over
merge units, put back from window order); transformers 5.24, models/*/modeling_*.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.errors import BackboneError

SHALLOW = 5 / 24
"""How deep the shallow layer lies: the 6th of LLaVA's 24, the 8th of Qwen2.5-VL's 32, its first that sees all."""

_ATTENTION = re.compile(r"(?:^|\.)(?:layers|layer|blocks)\.\d+\.(?:self_attn|attention|attn)$")
_Call = tuple[Any, Tensor, dict[str, Any]]  # a layer, its hidden states, its other arguments


class Watched:
    """What went into the attention layers of interest during one run of an encoder.

    Args:
        tower: The encoder.
    """

    def __init__(self, tower: Any) -> None:
        self._tower = tower
        self.layers = [module for name, module in tower.named_modules() if _ATTENTION.search(name)]
        last, full = len(self.layers) - 1, getattr(tower, "fullatt_block_indexes", None)
        self.shallow = min(last, full[0] if full else round(SHALLOW * (last + 1)))
        self.last = last
        self._calls: dict[int, _Call] = {}

    def note(self, place: int) -> Callable[..., None]:
        """A hook that notes what goes into a layer."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._calls[place] = (module, hidden.detach(), kwargs)

        return hook

    @torch.no_grad()
    def maps(self, images: int, grids: Tensor | None) -> tuple[Tensor, Tensor, bool]:
        """Attention of the shallow and of a deep layer, and whether it is a class token's.

        Args:
            images: How many images went in.
            grids: Of Qwen's encoders, else None.

        Returns:
            Two fp32 [images, patches or merge units], in reading order, and the flag. The deep layer is the last; the
            last but one where there is a class token.

        Raises:
            BackboneError: The encoder isn't built as those that we know.
        """
        if not self._calls:
            raise BackboneError(
                f"The attention of {type(self._tower).__name__} can't be read: choose token_reduction merge, norm,"
                " uniform or random."
            )
        if grids is not None:
            pair = [_units(received(*self._calls[place]), self._tower, grids) for place in (self.shallow, self.last)]
            return pair[0].reshape(images, -1), pair[1].reshape(images, -1), False
        length = self._calls[self.last][1].shape[1]
        if math.isqrt(length) ** 2 == length:
            return received(*self._calls[self.shallow]), received(*self._calls[self.last]), False
        deep = max(0, self.last - 1)
        return class_row(*self._calls[self.shallow]), class_row(*self._calls[deep]), True


@contextmanager
def watching(tower: nn.Module) -> Iterator[Watched]:
    """Note what goes into a shallow and the deepest attention layers of an encoder while it runs."""
    watched = Watched(tower)
    places = {watched.shallow, watched.last, watched.last - 1} & set(range(len(watched.layers)))
    hooks = [watched.layers[place].register_forward_pre_hook(watched.note(place), with_kwargs=True) for place in places]
    try:
        yield watched
    finally:
        for hook in hooks:
            hook.remove()


def _queries_keys(layer: Any, hidden: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Queries and keys, fp32 [images, heads, length, size]; Qwen's images are one after the other."""
    if hasattr(layer, "qkv"):
        queries, keys, _ = layer.qkv(hidden).reshape(len(hidden), 3, layer.num_heads, -1).unbind(1)
        cos, sin = (part.float()[:, None] for part in given["position_embeddings"])
        queries, keys = (part.float() * cos + _half_turn(part.float()) * sin for part in (queries, keys))
        return queries.transpose(0, 1)[None], keys.transpose(0, 1)[None]  # [1, heads, length, size]
    parts = []
    for word in "qk":
        projected = getattr(layer, f"{word}_norm", nn.Identity())(getattr(layer, f"{word}_proj")(hidden))
        parts.append(projected.float().unflatten(-1, (layer.num_heads, -1)).transpose(1, 2))
    return parts[0], parts[1]


def _half_turn(vectors: Tensor) -> Tensor:
    first, second = vectors.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def class_row(layer: Any, hidden: Tensor, given: dict[str, Any]) -> Tensor:
    """The class token's attention to every patch, averaged over heads, [images, patches]."""
    queries, keys = _queries_keys(layer, hidden, given)
    scores = queries[:, :, :1] @ keys.transpose(-1, -2) * keys.shape[-1] ** -0.5
    return scores.softmax(dim=-1)[:, :, 0, 1:].mean(dim=1)


def received(layer: Any, hidden: Tensor, given: dict[str, Any]) -> Tensor:
    """The attention that every patch gets, averaged over queries and heads, [images, patches].

    Where images (or windows of them) follow one another in one row, each sees itself alone, and the row comes back.
    """
    queries, keys = _queries_keys(layer, hidden, given)
    bounds = given.get("cu_seqlens")
    lengths = [keys.shape[2]] if bounds is None else bounds.diff().tolist()
    parts = []
    for query, key in zip(queries.split(lengths, dim=2), keys.split(lengths, dim=2), strict=True):
        scores = query @ key.transpose(-1, -2) * key.shape[-1] ** -0.5
        parts.append(scores.softmax(dim=-1).mean(dim=(1, 2)))  # [images, patches]
    return torch.cat(parts, dim=1)


def _units(attention: Tensor, tower: Any, grids: Tensor) -> Tensor:
    """Mean over the patches of each merge unit, in reading order, [units of all images]."""
    units = attention[0].unflatten(0, (-1, tower.spatial_merge_size**2)).mean(dim=1)
    if not hasattr(tower, "fullatt_block_indexes"):
        return units
    from transformers.vision_utils import get_vision_window_index

    order, _ = get_vision_window_index(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size)
    return units[order.to(units.device).argsort()]


def pooled(attention: Tensor, vectors: int) -> Tensor:
    """Attention to patches [images, patches] as the mean over those of each vector, [images, vectors]."""
    own, side = math.isqrt(vectors), math.isqrt(attention.shape[1])
    if own == side:
        return attention
    return F.avg_pool2d(attention.reshape(-1, 1, side, side), side // own).flatten(1)
