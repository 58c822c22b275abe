"""The plain way, written out: every token of every full-length row in every block, then the pooled one is picked.

Nothing of the towers' own forward code is used, only their weights. Attention is torch's fused kernel (with its own
causal mode for texts), so that the plain way is as fast, and needs as little memory, as torch lets it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.backbones.tower import Attention, Block, ImageTower, TextTower
from adaptkit.errors import UnsupportedError

Deep = Mapping[int, Tensor]
"""Prompts [k, width] by the index of the block before which they are put in."""


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias) if isinstance(layer, nn.Linear) else x


def _norm(layer: nn.Module, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, layer.eps) if isinstance(layer, nn.LayerNorm) else x


def _activation(x: Tensor, kind: str) -> Tensor:
    if kind == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def _attention(layer: Attention, x: Tensor, causal: bool) -> Tensor:
    """Tokens [rows, n, width] to tokens [rows, n, width]."""
    q, k, v = (
        _linear(part, x).view(*x.shape[:2], layer.heads, -1).transpose(1, 2)  # [rows, heads, n, head_dim]
        for part in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return _linear(layer.out_proj, out.transpose(1, 2).flatten(2))


def _block(block: nn.Module, x: Tensor, causal: bool) -> Tensor:
    if not isinstance(block, Block) or block.scale_1 is not None or block.scale_2 is not None:
        raise UnsupportedError("The plain path knows the towers' own blocks only, and those without layer scale.")
    x = x + _attention(block.attn, _norm(block.ln_1, x), causal)
    hidden = _activation(_linear(block.fc1, _norm(block.ln_2, x)), block.activation)
    return x + _linear(block.fc2, hidden)


def plain_text(
    tower: TextTower, ids: Tensor, ends: Tensor, contexts: Tensor, start: int, deep: Deep | None = None
) -> Tensor:
    """Unnormalised features [classes, embed_dim] of prompts in which context vectors stand in for words.

    Args:
        tower: A causal text tower; only its weights are used.
        ids: int64 [classes, context_length], the prompts with placeholder words.
        ends: int64 [classes], the end tokens.
        contexts: [M, width], put in the place of tokens `start` … `start` + M - 1.
        start: Where they begin.
        deep: Context vectors [M, width] put in the same place before later blocks.

    Raises:
        UnsupportedError: The tower has no causal mask, or layer scale.
    """
    if not tower.causal:
        raise UnsupportedError("The plain path is that of causal text towers, and this one has no causal mask.")
    behind = start + len(contexts)
    x = tower.token_embedding.weight[ids]  # [classes, 77, width]
    x = torch.cat([x[:, :start], contexts.expand(len(ids), -1, -1), x[:, behind:]], dim=1)
    x = x + tower.positional_embedding
    for index, block in enumerate(tower.blocks):
        if deep and index in deep:
            x = torch.cat([x[:, :start], deep[index].expand(len(ids), -1, -1), x[:, behind:]], dim=1)
        x = _block(block, x, causal=True)
    x = _norm(tower.ln_final, x)  # of all tokens, as the reference implementations do
    return _linear(tower.projection, x[torch.arange(len(x)), ends])


def plain_image(tower: ImageTower, pixels: Tensor, first: Tensor | None = None, deep: Deep | None = None) -> Tensor:
    """Unnormalised features [batch, embed_dim] of pixels [batch, 3, size, size], class-token pooling only.

    Args:
        tower: An image tower; only its weights are used.
        pixels: Preprocessed.
        first: Prompts [k, width] put behind the patches, after the positional embedding.
        deep: What they are replaced by before later blocks.

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
    x = _norm(tower.ln_pre, x)
    for index, block in enumerate(tower.blocks):
        if deep and index in deep:
            x = torch.cat([x[:, : -len(deep[index])], deep[index].expand(len(x), -1, -1)], dim=1)
        x = _block(block, x, causal=False)
    return _linear(tower.projection, _norm(tower.ln_post, x[:, 0]))
