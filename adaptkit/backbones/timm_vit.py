"""Opening timm's vision transformers: plain ViTs (CLIP, SigLIP with map pooling) and EVA without rotary positions.

Source: timm, models/vision_transformer.py, models/eva.py, layers/attention_pool.py.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from adaptkit.backbones.building import activation_of, is_identity, is_norm, make_image_tower, need, pair
from adaptkit.backbones.tower import BlockShape, ImageShape, ImageTower


def open_timm_vit(trunk: Any, projection: nn.Linear | None = None) -> ImageTower:
    """Our tower with a timm ViT's weights.

    Args:
        trunk: A timm `VisionTransformer` or `Eva`; its `head`, if any, is the projection.
        projection: A projection that stands behind the trunk (open_clip's `TimmModel` may have one).

    Raises:
        Opaque: The model isn't built of parts that our tower has.
    """
    kind = type(trunk).__name__
    need(kind in ("VisionTransformer", "Eva"), f"timm's {kind} isn't a plain vision transformer")
    _check_embedding(trunk)
    first = trunk.blocks[0]
    for block in trunk.blocks:
        _check_block(block)
    if isinstance(trunk.head, nn.Linear):
        need(projection is None, "it has two projections")
        projection = trunk.head
    shape = ImageShape(
        blocks=BlockShape(
            width=trunk.embed_dim,
            heads=first.attn.num_heads,
            layers=len(trunk.blocks),
            mlp_width=first.mlp.fc1.out_features,
            activation=activation_of(first.mlp.act),
            norm_eps=first.norm1.eps,
            layer_scale=_scales(first)[0] is not None,
        ),
        image_size=trunk.patch_embed.img_size[0],
        patch_size=trunk.patch_embed.patch_size[0],
        embed_dim=0 if projection is None else projection.out_features,
        class_token=trunk.cls_token is not None,
        ln_pre=is_norm(trunk.norm_pre),
        patch_bias=trunk.patch_embed.proj.bias is not None,
        projection_bias=projection is not None and projection.bias is not None,
        pool=_pool_kind(trunk),
        norm_after_pool=is_norm(trunk.fc_norm),
    )
    return make_image_tower(shape, _weights(trunk, shape, projection))


def _check_embedding(trunk: Any) -> None:
    height, width = trunk.patch_embed.img_size
    patch = trunk.patch_embed.patch_size
    places = trunk.patch_embed.num_patches + int(trunk.cls_token is not None)
    need(height == width and patch[0] == patch[1], "its images or patches aren't square")
    need(isinstance(trunk.patch_embed.proj, nn.Conv2d), "its patches aren't embedded by one convolution")
    need(is_identity(trunk.patch_embed.norm), "its patch embedding is normalised")
    need(getattr(trunk, "reg_token", None) is None, "it has register tokens")
    need(getattr(trunk, "rope", None) is None, "it has rotary positions")
    need(trunk.pos_embed is not None and trunk.pos_embed.shape[1] == places, "its positions aren't one per token")
    need(is_norm(trunk.norm) != is_norm(trunk.fc_norm), "it doesn't have exactly one last norm")


def _check_block(block: Any) -> None:
    attention, mlp = block.attn, block.mlp
    kinds = {type(block).__name__, type(attention).__name__, type(mlp).__name__}
    plain = {"Block", "Attention", "Mlp"}, {"EvaBlock", "EvaAttention", "Mlp"}
    need(kinds in plain, f"its blocks are made of {', '.join(sorted(kinds))}")
    extras = [getattr(attention, name, None) for name in ("q_norm", "k_norm", "norm", "gate")]
    need(is_identity(*extras, mlp.norm), "its blocks have norms or gates inside attention or MLP")
    need(is_norm(block.norm1) and is_norm(block.norm2), "its blocks aren't normalised by layer norms")
    need(attention.qkv is not None, "its attention has separate projections")
    need(attention.head_dim * attention.num_heads == block.norm1.normalized_shape[0], "its heads aren't of plain size")


def _pool_kind(trunk: Any) -> Literal["class", "mean", "attention"]:
    pool = trunk.global_pool
    need(pool in ("token", "avg", "map"), f"its pooling {pool!r} isn't token, avg or map")
    need(not getattr(trunk, "pool_include_prefix", False), "its pooling includes the class token")
    if pool != "map":
        return "class" if pool == "token" else "mean"
    head = trunk.attn_pool
    need(type(head).__name__ == "AttentionPoolLatent" and head.latent_len == 1, "its pooling head is of another kind")
    need(trunk.cls_token is None and is_identity(head.q_norm, head.k_norm), "its pooling head is of another kind")
    need(head.pos_embed is None and head.pool == "token", "its pooling head is of another kind")
    need(isinstance(head.q, nn.Linear) and head.mlp is not None, "its pooling head is of another kind")
    need(head.num_heads == trunk.blocks[0].attn.num_heads, "its pooling head has another number of heads")
    return "attention"


def _scales(block: Any) -> tuple[Tensor | None, Tensor | None]:
    """Layer scale of the attention's and the MLP's branch, or None."""
    if hasattr(block, "gamma_1"):  # EVA
        return block.gamma_1, block.gamma_2
    return getattr(block.ls1, "gamma", None), getattr(block.ls2, "gamma", None)


def _weights(trunk: Any, shape: ImageShape, projection: nn.Linear | None) -> dict[str, Tensor]:
    state = trunk.state_dict()
    weights = pair("patch_embedding", "patch_embed.proj", state)
    weights["positional_embedding"] = state["pos_embed"][0]
    weights |= pair("ln_post", "fc_norm" if shape.norm_after_pool else "norm", state)
    if shape.class_token:
        weights["class_embedding"] = state["cls_token"][0, 0]
    if shape.ln_pre:
        weights |= pair("ln_pre", "norm_pre", state)
    if projection is not None:
        weights |= pair("projection", "projection", {f"projection.{k}": v for k, v in projection.state_dict().items()})
    if shape.pool == "attention":
        weights |= _pool_weights(state)
    for index, block in enumerate(trunk.blocks):
        weights |= _block_weights(block, index, state)
    return weights


def _block_weights(block: Any, index: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
    ours, theirs, attention = f"blocks.{index}.", f"blocks.{index}.", block.attn
    weights: dict[str, Tensor] = {}
    for name, source in (
        ("ln_1", "norm1"),
        ("ln_2", "norm2"),
        ("attn.out_proj", "attn.proj"),
        ("fc1", "mlp.fc1"),
        ("fc2", "mlp.fc2"),
    ):
        weights |= pair(ours + name, theirs + source, state)
    bias = attention.qkv.bias
    if getattr(attention, "q_bias", None) is not None:  # EVA: no bias on the keys
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    if bias is None:
        bias = attention.qkv.weight.new_zeros(3 * attention.num_heads * attention.head_dim)
    names = ("q_proj", "k_proj", "v_proj")
    for name, weight, part in zip(names, attention.qkv.weight.chunk(3), bias.chunk(3), strict=True):
        weights |= {f"{ours}attn.{name}.weight": weight, f"{ours}attn.{name}.bias": part}
    for name, scale in zip(("scale_1", "scale_2"), _scales(block), strict=True):
        if scale is not None:
            weights[ours + name] = scale
    return weights


def _pool_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {"pool_head.probe": state["attn_pool.latent"][0]}
    for name, source in (
        ("attn.q_proj", "q"),
        ("attn.out_proj", "proj"),
        ("norm", "norm"),
        ("fc1", "mlp.fc1"),
        ("fc2", "mlp.fc2"),
    ):
        weights |= pair(f"pool_head.{name}", f"attn_pool.{source}", state)
    for kind in ("weight", "bias"):
        keys, values = state[f"attn_pool.kv.{kind}"].chunk(2)
        weights |= {f"pool_head.attn.k_proj.{kind}": keys, f"pool_head.attn.v_proj.{kind}": values}
    return weights
