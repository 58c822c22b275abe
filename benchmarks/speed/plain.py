"""The plain way, written out: every token of every full-length row in every block, then the pooled one is picked.

Nothing of the towers' own forward code is used, only their weights. Attention is torch's fused kernel (with its own
causal mode for texts, which stands for a mask that is built again in every block), so that the plain way is as fast,
and needs as little memory, as torch lets it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.backbones.tower import Attention, Block, ImageTower, TextTower
from adaptkit.errors import UnsupportedError

Deep = Mapping[int, Tensor]
"""Prompts [k, width] by the index of the block before which they are put in."""

Edit = Callable[[int, Tensor], Tensor]
"""Index of a block and tokens [rows, n, width] before it, to the tokens that it shall see."""


def replacing(deep: Deep, start: int) -> Edit:
    """Before a block of `deep`, its prompts take the place of the tokens from `start` on (negative: from the end)."""

    def edit(index: int, x: Tensor) -> Tensor:
        if index not in deep:
            return x
        at = start % x.shape[1]
        prompts = deep[index].expand(len(x), -1, -1)
        return torch.cat([x[:, :at], prompts, x[:, at + prompts.shape[1] :]], dim=1)

    return edit


def inserting(deep: Deep, share: float = 1.0) -> Edit:
    """Before the first block of `deep`, its tokens are put in behind token 0; before the others they replace those.

    With a `share` below 1 (MMRL++) the others become share · tokens + (1 - share) · what they were.
    """

    def edit(index: int, x: Tensor) -> Tensor:
        if index not in deep:
            return x
        tokens = deep[index].expand(len(x), -1, -1)
        if index == min(deep):
            return torch.cat([x[:, :1], tokens, x[:, 1:]], dim=1)
        behind = 1 + tokens.shape[1]
        return torch.cat([x[:, :1], share * tokens + (1 - share) * x[:, 1:behind], x[:, behind:]], dim=1)

    return edit


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer, or nothing."""
    return F.linear(x, layer.weight, layer.bias) if isinstance(layer, nn.Linear) else x


def norm(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer norm, or nothing."""
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, layer.eps) if isinstance(layer, nn.LayerNorm) else x


def _activation(x: Tensor, kind: str) -> Tensor:
    if kind == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def _attention(layer: Attention, x: Tensor, causal: bool) -> Tensor:
    """Tokens [rows, n, width] to tokens [rows, n, width]."""
    q, k, v = (
        linear(part, x).view(*x.shape[:2], layer.heads, -1).transpose(1, 2)  # [rows, heads, n, head_dim]
        for part in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return linear(layer.out_proj, out.transpose(1, 2).flatten(2))


def _block(block: nn.Module, x: Tensor, causal: bool) -> Tensor:
    if not isinstance(block, Block) or block.scale_1 is not None or block.scale_2 is not None:
        raise UnsupportedError("The plain path knows the towers' own blocks only, and those without layer scale.")
    x = x + _attention(block.attn, norm(block.ln_1, x), causal)
    hidden = _activation(linear(block.fc1, norm(block.ln_2, x)), block.activation)
    return x + linear(block.fc2, hidden)


def plain_text(
    tower: TextTower,
    ids: Tensor,
    ends: Tensor,
    contexts: Tensor | None = None,
    *,
    start: int = 1,
    edit: Edit | None = None,
) -> Tensor:
    """Unnormalised features [classes, embed_dim] of prompts in which context vectors may stand in for words.

    Args:
        tower: A causal text tower; only its weights are used.
        ids: int64 [classes, context_length], the prompts with placeholder words.
        ends: int64 [classes], the end tokens.
        contexts: [M, width], put in the place of tokens `start` … `start` + M - 1.
        start: Where they begin.
        edit: What changes before blocks; where it inserts tokens, all end tokens move behind them.

    Raises:
        UnsupportedError: The tower has no causal mask, or layer scale.
    """
    if not tower.causal:
        raise UnsupportedError("The plain path is that of causal text towers, and this one has no causal mask.")
    x = tower.token_embedding.weight[ids]  # [classes, 77, width]
    if contexts is not None:
        x = replacing({0: contexts}, start)(0, x)
    x = x + tower.positional_embedding
    for index, block in enumerate(tower.blocks):
        x = _block(block, edit(index, x) if edit else x, causal=True)
    x = norm(tower.ln_final, x)  # of all tokens, as the reference implementations do
    inserted = x.shape[1] - ids.shape[1]
    return linear(tower.projection, x[torch.arange(len(x), device=x.device), ends + inserted])


def plain_image_tokens(
    tower: ImageTower, pixels: Tensor, first: Tensor | None = None, edit: Edit | None = None
) -> Tensor:
    """Every token [batch, n, width] after the last block and before the last norm; the class token leads.

    Args:
        tower: An image tower; only its weights are used.
        pixels: Preprocessed, [batch, 3, size, size].
        first: Prompts [k, width] put behind the patches, after the positional embedding.
        edit: What changes before blocks.

    Raises:
        UnsupportedError: The tower pools something else than its class token, or has layer scale.
    """
    if tower.shape.pool != "class" or tower.class_embedding is None:
        raise UnsupportedError(f"The plain path pools a class token, and this tower pools {tower.shape.pool!r}.")
    size = tower.shape.patch_size
    x = F.conv2d(pixels, tower.patch_embedding.weight, tower.patch_embedding.bias, stride=size)
    x = x.flatten(2).transpose(1, 2)  # [batch, patches, width]
    x = torch.cat([tower.class_embedding.expand(len(x), 1, -1), x], dim=1) + tower.positional_embedding
    if first is not None:
        x = torch.cat([x, first.expand(len(x), -1, -1)], dim=1)
    x = norm(tower.ln_pre, x)
    for index, block in enumerate(tower.blocks):
        x = _block(block, edit(index, x) if edit else x, causal=False)
    return x


def plain_image(tower: ImageTower, pixels: Tensor, first: Tensor | None = None, edit: Edit | None = None) -> Tensor:
    """Unnormalised features [batch, embed_dim] of pixels [batch, 3, size, size]; arguments as above."""
    return linear(tower.projection, norm(tower.ln_post, plain_image_tokens(tower, pixels, first, edit)[:, 0]))
