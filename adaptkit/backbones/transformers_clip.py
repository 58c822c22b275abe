"""CLIP-like models of the transformers library: CLIP, MetaCLIP 2 and SigLIP are opened, other text encoders stay
opaque.

Only safetensors are read and no code from a repository is ever run.

Source: transformers 5.24, models/{clip,metaclip_2,siglip,siglip2,chinese_clip,altclip,align}/modeling_*.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adaptkit.backbones.base import Backbone, Preprocessing
from adaptkit.backbones.building import (
    assemble,
    from_library,
    make_image_tower,
    make_text_tower,
    need,
    opened,
    pair,
    square,
    triple,
)
from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.backbones.mllm.families import FAMILY_OF_TYPE
from adaptkit.backbones.open_clip import fingerprint
from adaptkit.backbones.proof import prove
from adaptkit.backbones.tokenizing import OutsideTokenizer, Pooling
from adaptkit.backbones.tower import Activation, BlockShape, ImageShape, ImageTower, TextShape, TextTower
from adaptkit.errors import BackboneError, MissingPathError

CLIP_LIKE = ("clip", "metaclip_2", "chinese_clip", "altclip")
"""Model types with CLIP's image tower; the first two also have its text tower."""

SIGLIP_LIKE = ("siglip", "siglip2")
MODEL_TYPES = (*CLIP_LIKE, *SIGLIP_LIKE, "align")

_ACTIVATIONS: dict[str, Activation] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


Weights = Literal["fp32", "bf16", "own"]
"""The type that weights are loaded in; "own" is the files'."""


def load_transformers(name: str, identifier: str, weights: Weights = "fp32") -> Backbone:
    """Load a model in transformers' layout, from the hub or a folder; image-text-to-text models become an `MLLM`.

    Args:
        name: The backbone's full name, for messages and the spec.
        identifier: A hub id, or a folder.
        weights: Of a multimodal language model; all others are loaded in fp32.

    Raises:
        MissingPathError: The identifier looks like a folder, and there is none.
        BackboneError: It can't be loaded, or is of a kind that isn't supported.
    """
    from transformers import AutoConfig

    source = _source(identifier)
    config = from_library(name, lambda: AutoConfig.from_pretrained(source, trust_remote_code=False), "config")
    if config.model_type in MODEL_TYPES:
        return _dual(name, source, config)
    if config.model_type in FAMILY_OF_TYPE:
        from adaptkit.backbones.mllm.loading import load_mllm

        return load_mllm(name, source, config, weights)
    if hasattr(config, "text_config"):
        raise BackboneError(
            f"Backbone {name!r} is of the type {config.model_type!r}, which isn't supported. Supported with text:"
            f" {', '.join(MODEL_TYPES)}; multimodal language models: {', '.join(FAMILY_OF_TYPE)}; models without text"
            " are supported where they give one vector per image."
        )
    from adaptkit.backbones.vision_only import transformers_vision_only

    return transformers_vision_only(name, source, config)


def _source(identifier: str) -> str:
    path = Path(identifier).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_absolute() or identifier.startswith(("./", "../", "~")):
        raise MissingPathError(f"There is no folder {identifier!r}. 'transformers:' takes a folder or a hub id.")
    return identifier


def load_model(name: str, source: str, *, may_lack: str = "") -> Any:
    """The source model in fp32, from safetensors, with every weight found.

    Args:
        name: The backbone's name.
        source: Folder or hub id.
        may_lack: A part of the model whose weights may be missing, because we don't use it.

    Raises:
        BackboneError: Weights are missing: the model would be partly random.
    """
    from transformers import AutoModel

    def load() -> Any:
        return AutoModel.from_pretrained(
            source, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )

    model, info = from_library(name, load)
    missing = [key for key in sorted(info["missing_keys"]) if not (may_lack and may_lack in key)]
    if missing:
        raise BackboneError(
            f"The files of backbone {name!r} lack {len(missing)} weights ({', '.join(missing[:3])}, …), so it would be"
            " partly random: they were made for another architecture, or are incomplete."
        )
    return model.float().eval()


def _dual(name: str, source: str, config: Any) -> DualEncoder:
    from transformers import AutoImageProcessor, AutoTokenizer

    processor = from_library(name, lambda: AutoImageProcessor.from_pretrained(source), "image processor")
    tokenizer = from_library(name, lambda: AutoTokenizer.from_pretrained(source, trust_remote_code=False), "tokenizer")
    model = load_model(name, source)
    kind = config.model_type
    naflex = kind == "siglip2"
    preprocessing = _naflex_preprocessing(processor, config) if naflex else preprocessing_of(processor, name)
    _check_image_size(preprocessing.image_size, config, name)
    image_source = _NaflexImages(model, config) if naflex else _Images(model)
    text_source = _Texts(model, kind, tokenizer.pad_token_id)
    image_tower, opaque_image = opened(lambda: _open_image(model, config))
    text_tower, opaque_text = opened(lambda: _open_text(model, config))
    own_tokenizer = _tokenizer(tokenizer, config)
    scale = model.temperature.reciprocal() if kind == "align" else model.logit_scale.exp()
    bias = getattr(model, "logit_bias", None)
    backbone = assemble(
        name=name,
        family=kind,
        image=image_tower or image_source,
        text=text_tower or text_source,
        tokenizer=own_tokenizer,
        preprocessing=preprocessing,
        embed_dim=_embed_dim(model, config),
        context_length=own_tokenizer.context_length,
        logit_scale=float(scale.detach()),
        logit_bias=0.0 if bias is None else float(bias.detach()),
        opaque_image=opaque_image,
        opaque_text=opaque_text,
    )
    prove(backbone, image_source, text_source)
    return backbone


def _check_image_size(made: int, config: Any, name: str) -> None:
    if config.model_type in ("align", "siglip2"):  # a convolutional net, and a grid whose size we choose
        return
    side = square(config.vision_config.image_size, name)
    if side != made:
        raise BackboneError(f"Backbone {name!r} takes images of {side} pixels, and its processor makes {made}.")


def _embed_dim(model: Any, config: Any) -> int:
    if config.model_type in SIGLIP_LIKE:
        return int(config.vision_config.hidden_size)
    return int(model.text_projection.out_features)


# --- the source models' own encoders, kept where a tower stays closed -------------------------------------------------


class _Images(nn.Module):
    """The image side of a transformers model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.vision_model
        self.projection = getattr(model, "visual_projection", nn.Identity())

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.projection(self.encoder(pixel_values=pixels).pooler_output)  # [batch, embed_dim]
        return features


class _NaflexImages(nn.Module):
    """SigLIP 2 with flexible resolution, on square images whose grid is that of its positions."""

    def __init__(self, model: Any, config: Any) -> None:
        super().__init__()
        self.encoder = model.vision_model
        self.patch = int(config.vision_config.patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        batch, channels, side, _ = pixels.shape
        grid = side // self.patch
        x = pixels.view(batch, channels, grid, self.patch, grid, self.patch)
        x = x.permute(0, 2, 4, 3, 5, 1).reshape(batch, grid * grid, -1)  # [batch, patches, patch · patch · channels]
        mask = torch.ones(batch, grid * grid, dtype=torch.int64, device=pixels.device)
        shapes = torch.full((batch, 2), grid, dtype=torch.int64, device=pixels.device)
        out = self.encoder(pixel_values=x, pixel_attention_mask=mask, spatial_shapes=shapes)
        features: Tensor = out.pooler_output  # [batch, embed_dim]
        return features


class _Texts(nn.Module):
    """The text side of a transformers model; BERT-like ones are told which tokens are padding."""

    def __init__(self, model: Any, kind: str, padding: int | None) -> None:
        super().__init__()
        self.encoder = model.text_model
        self.projection = getattr(model, "text_projection", nn.Identity())
        self.bert = kind in ("chinese_clip", "altclip", "align")
        self.padding = padding

    def forward(self, ids: Tensor) -> Tensor:
        if not self.bert:
            pooled: Tensor = self.encoder(input_ids=ids).pooler_output
        else:
            seen = torch.ne(ids, -1 if self.padding is None else self.padding).long()
            pooled = self.encoder(input_ids=ids, attention_mask=seen).last_hidden_state[:, 0]
        features: Tensor = self.projection(pooled)  # [texts, embed_dim]
        return features


# --- opening ----------------------------------------------------------------------------------------------------------


def _block_shape(config: Any) -> BlockShape:
    """Sizes of CLIP's or SigLIP's encoder, from its own config."""
    need(config.hidden_act in _ACTIVATIONS, f"its MLPs use {config.hidden_act!r}, which isn't a kind of GELU")
    return BlockShape(
        width=config.hidden_size,
        heads=config.num_attention_heads,
        layers=config.num_hidden_layers,
        mlp_width=config.intermediate_size,
        activation=_ACTIVATIONS[config.hidden_act],
        norm_eps=config.layer_norm_eps,
    )


def _block_weights(state: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for index in range(layers):
        ours, theirs = f"blocks.{index}.", f"encoder.layers.{index}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weights |= pair(f"{ours}attn.{name}", f"{theirs}self_attn.{name}", state)
        for name, source in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2")):
            weights |= pair(ours + name, theirs + source, state)
    return weights


def _open_image(model: Any, config: Any) -> ImageTower:
    kind, vision = config.model_type, config.vision_config
    need(
        kind in CLIP_LIKE or kind in SIGLIP_LIKE,
        f"the image encoder of {kind!r} isn't a vision transformer of a known kind",
    )
    siglip = kind in SIGLIP_LIKE
    need(not siglip or getattr(vision, "vision_use_head", True), "it has no pooling head")
    patch = square(vision.patch_size, kind)
    grid = int(vision.num_patches**0.5) if kind == "siglip2" else square(vision.image_size, kind) // patch
    shape = ImageShape(
        blocks=_block_shape(vision),
        image_size=grid * patch if kind == "siglip2" else square(vision.image_size, kind),
        patch_size=patch,
        embed_dim=0 if siglip else model.visual_projection.out_features,
        class_token=not siglip,
        ln_pre=not siglip,
        patch_bias=siglip,
        pool="attention" if siglip else "class",
    )
    state = model.vision_model.state_dict()
    weights = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        **pair("patch_embedding", "embeddings.patch_embedding", state),
        **pair("ln_post", "post_layernorm", state),
        **_block_weights(state, shape.blocks.layers),
    }
    if kind == "siglip2":  # a linear layer on patches flattened as (height, width, channel)
        flat = weights["patch_embedding.weight"]
        weights["patch_embedding.weight"] = flat.view(len(flat), patch, patch, -1).permute(0, 3, 1, 2)
    if siglip:
        weights |= _head_weights(state)
    else:
        weights |= {
            "class_embedding": state["embeddings.class_embedding"],
            **pair("ln_pre", "pre_layrnorm", state),
            "projection.weight": model.visual_projection.weight,
        }
    return make_image_tower(shape, weights)


def _head_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SigLIP's pooling head under our names."""
    weights = {"pool_head.probe": state["head.probe"][0]}
    for kind in ("weight", "bias"):
        parts = state[f"head.attention.in_proj_{kind}"].chunk(3)
        for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
            weights[f"pool_head.attn.{name}.{kind}"] = part
    weights |= pair("pool_head.attn.out_proj", "head.attention.out_proj", state)
    for name, source in (("norm", "layernorm"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2")):
        weights |= pair(f"pool_head.{name}", f"head.{source}", state)
    return weights


def _open_text(model: Any, config: Any) -> TextTower:
    kind, text = config.model_type, config.text_config
    need(kind in ("clip", "metaclip_2", *SIGLIP_LIKE), f"the text encoder of {kind!r} is a BERT")
    siglip = kind in SIGLIP_LIKE
    projection = model.text_model.head if siglip else model.text_projection
    shape = TextShape(
        blocks=_block_shape(text),
        vocabulary=text.vocab_size,
        context_length=text.max_position_embeddings,
        embed_dim=projection.out_features,
        causal=not siglip,
        projection_bias=projection.bias is not None,
    )
    state = model.text_model.state_dict()
    weights = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        **pair("ln_final", "final_layer_norm", state),
        **{f"projection.{key}": value for key, value in projection.state_dict().items()},
        **_block_weights(state, shape.blocks.layers),
    }
    return make_text_tower(shape, weights)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def _pooling(config: Any) -> Pooling:
    """Which token a text tower pools.

    CLIP checkpoints from before transformers' pull request 24773 say that their end token is 2, and mean the highest
    id; MetaCLIP 2, whose end token really is 2, means it.
    """
    kind, end = config.model_type, getattr(config.text_config, "eos_token_id", None)
    if kind == "clip" and end == 2:
        return Pooling("argmax")
    if kind in ("clip", "metaclip_2"):
        return Pooling("token", -1 if end is None else int(end))
    return Pooling("last" if kind in SIGLIP_LIKE else "first")


def _tokenizer(tokenizer: Any, config: Any) -> OutsideTokenizer:
    kind, text = config.model_type, config.text_config
    bert = kind in ("chinese_clip", "altclip", "align")
    positions = int(text.max_position_embeddings)
    if kind == "altclip":  # RoBERTa counts positions from the padding id on
        positions -= int(text.pad_token_id) + 1
    length = min(positions, int(tokenizer.model_max_length)) if bert else positions
    # BERT is told what is padding, so as little as possible is added; CLIP and SigLIP see full-length rows
    padding = "longest" if bert else "max_length"

    def pad(texts: list[str]) -> Tensor:
        ids: Tensor = tokenizer(
            texts, padding=padding, truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        return ids

    def count(text: str) -> int:
        return len(tokenizer(text).input_ids)

    def pieces(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    pooling = _pooling(config)
    facts = {"tokenizer": fingerprint(tokenizer), "length": length, "pooled": [pooling.kind, pooling.token]}
    return OutsideTokenizer(pad, count, pieces, length, pooling, facts, lambda token: str(tokenizer.decode([token])))


# --- preprocessing ----------------------------------------------------------------------------------------------------


def preprocessing_of(processor: Any, name: str) -> Preprocessing:
    """A transformers image processor's plain transform as ours.

    Raises:
        BackboneError: It does something that ours can't.
    """
    settings = processor.to_dict()
    if not settings.get("do_resize", True):
        raise _unmappable(name, "it doesn't resize")
    mean, std = _mean_and_std(settings, name)
    size = dict(settings.get("size") or {})
    crop = settings.get("crop_size") if settings.get("do_center_crop") else None
    side = (
        None if crop is None else square([crop["height"], crop["width"]] if isinstance(crop, Mapping) else crop, name)
    )
    common = {"mean": mean, "std": std, "interpolation": _interpolation(settings, name)}
    if settings.get("crop_pct") is not None and set(size) == {"shortest_edge"}:  # ConvNeXt's own rule
        return _convnext(int(size["shortest_edge"]), float(settings["crop_pct"]), common)
    if set(size) == {"shortest_edge"} and side is not None:
        shorter = int(size["shortest_edge"])
        return Preprocessing(side, resize="shortest", resize_size=None if shorter == side else shorter, **common)
    if set(size) == {"height", "width"}:
        both = square([size["height"], size["width"]], name)
        image_size = both if side is None else side
        return Preprocessing(image_size, resize="squash", resize_size=None if both == image_size else both, **common)
    raise _unmappable(name, f"its size is {size} with {'a crop to ' + str(side) if side else 'no crop'}")


def _unmappable(name: str, reason: str) -> BackboneError:
    return BackboneError(
        f"The image processor of {name!r} can't be followed: {reason}. Supported: resize the shorter side and crop, or"
        " resize to a square; bicubic or bilinear; rescale to 0 … 1; one mean and deviation per channel."
    )


def _interpolation(settings: Mapping[str, Any], name: str) -> Any:
    resample = int(settings.get("resample", 3))
    if resample not in (2, 3):
        raise _unmappable(name, f"its interpolation is number {resample} of PIL's")
    return "bilinear" if resample == 2 else "bicubic"


def _mean_and_std(
    settings: Mapping[str, Any], name: str
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    if not settings.get("do_rescale", True):
        raise _unmappable(name, "it doesn't rescale pixel values")
    factor, offset = float(settings.get("rescale_factor", 1 / 255)), bool(settings.get("rescale_offset", False))
    if str(settings.get("image_processor_type", "")).startswith("EfficientNet") and settings.get("include_top"):
        raise _unmappable(name, "it normalises twice (include_top)")
    normalises = settings.get("do_normalize", True)
    mean = triple(settings["image_mean"]) if normalises else (0.0, 0.0, 0.0)
    std = triple(settings["image_std"]) if normalises else (1.0, 1.0, 1.0)
    # theirs: (pixel · factor - offset - mean) / std, pixel in 0 … 255; ours: (pixel / 255 - mean) / std
    stretch, shift = 255 * factor, float(offset)
    if abs(stretch - 1) < 1e-6 and not offset:
        return mean, std
    means, stds = [(m + shift) / stretch for m in mean], [s / stretch for s in std]
    return triple(means), triple(stds)


def _convnext(shortest: int, crop: float, common: dict[str, Any]) -> Preprocessing:
    if shortest >= 384:  # at this size it squashes, below it keeps a margin and crops
        return Preprocessing(shortest, resize="squash", **common)
    return Preprocessing(shortest, resize="shortest", resize_size=int(shortest / crop), **common)


def _naflex_preprocessing(processor: Any, config: Any) -> Preprocessing:
    """SigLIP 2 with flexible resolution, on the square grid of its positions (its own choice keeps the ratio)."""
    settings = processor.to_dict()
    mean, std = _mean_and_std(settings, config.model_type)
    side = int(config.vision_config.num_patches**0.5) * int(config.vision_config.patch_size)
    interpolation = _interpolation(settings, config.model_type)
    return Preprocessing(side, mean, std, interpolation=interpolation, resize="squash")
