"""The golden cases' tiny CLIP, built by formula; see "The tiny CLIP" in the cases' README."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.backbones.open_clip import dual_encoder_from_open_clip_state


def draw(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal values by NumPy's frozen generator, float32: the same on every machine."""
    state = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()))
    return torch.from_numpy(np.asarray(state.standard_normal(shape), dtype=np.float32))


def tiny_images(clip: Mapping[str, Any], seed: int, batch: int) -> Tensor:
    """The cases' images [batch, 3, size, size], standing for normalised ones."""
    return draw(seed, "images", (batch, 3, clip["image_size"], clip["image_size"]))


def build_tiny_clip(clip: Mapping[str, Any], seed: int) -> DualEncoder:
    """The tiny CLIP of a case, with its "clip" sizes and "seed"."""
    config = {
        "embed_dim": clip["embed_dim"],
        "quick_gelu": clip["activation"] == "quick_gelu",
        "vision_cfg": {
            "image_size": clip["image_size"],
            "patch_size": clip["patch_size"],
            "width": clip["vision_width"],
            "head_width": clip["vision_width"] // clip["vision_heads"],
            "layers": clip["vision_layers"],
        },
        "text_cfg": {
            "context_length": clip["context_length"],
            "vocab_size": clip["vocab_size"],
            "width": clip["text_width"],
            "heads": clip["text_heads"],
            "layers": clip["text_layers"],
        },
    }
    state = {name: _value(seed, name, shape) for name, shape in _shapes(clip).items()}
    return dual_encoder_from_open_clip_state(state, config, {}, name=f"tiny-clip-{seed}")


def _shapes(clip: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    vision, text, embed = clip["vision_width"], clip["text_width"], clip["embed_dim"]
    patches = (clip["image_size"] // clip["patch_size"]) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "token_embedding.weight": (clip["vocab_size"], text),
        "positional_embedding": (clip["context_length"], text),
        "text_projection": (text, embed),
        "visual.class_embedding": (vision,),
        "visual.positional_embedding": (patches + 1, vision),
        "visual.conv1.weight": (vision, 3, clip["patch_size"], clip["patch_size"]),
        "visual.proj": (vision, embed),
        **_norm("ln_final", text),
        **_norm("visual.ln_pre", vision),
        **_norm("visual.ln_post", vision),
    }
    for index in range(clip["text_layers"]):
        shapes |= _block(f"transformer.resblocks.{index}.", text)
    for index in range(clip["vision_layers"]):
        shapes |= _block(f"visual.transformer.resblocks.{index}.", vision)
    return shapes


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _block(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        **_norm(f"{prefix}ln_1", width),
        **_norm(f"{prefix}ln_2", width),
        f"{prefix}attn.in_proj_weight": (3 * width, width),
        f"{prefix}attn.in_proj_bias": (3 * width,),
        f"{prefix}attn.out_proj.weight": (width, width),
        f"{prefix}attn.out_proj.bias": (width,),
        f"{prefix}mlp.c_fc.weight": (4 * width, width),
        f"{prefix}mlp.c_fc.bias": (4 * width,),
        f"{prefix}mlp.c_proj.weight": (width, 4 * width),
        f"{prefix}mlp.c_proj.bias": (width,),
    }


def _value(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """One tensor, by the README's table."""
    if name == "logit_scale":
        return torch.tensor(math.log(1 / 0.07), dtype=torch.float32)
    n = draw(seed, name, shape)
    is_norm = ".ln_" in f".{name}"
    if is_norm:
        return 1 + 0.1 * n if name.endswith("weight") else 0.1 * n
    if name in ("token_embedding.weight", "positional_embedding", "visual.positional_embedding"):
        return 0.02 * n
    if name == "visual.class_embedding":
        return n / math.sqrt(shape[0])
    if name == "visual.conv1.weight":
        return n / math.sqrt(math.prod(shape[1:]))
    if name in ("visual.proj", "text_projection"):
        return n / math.sqrt(shape[0])
    return n / math.sqrt(shape[1]) if len(shape) == 2 else 0.02 * n
