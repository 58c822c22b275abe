"""Open_clip models: its ViT and text transformers are opened, also timm's plain ViTs; the rest stay opaque.

Activation, epsilon, pooling and masks are read from the model that open_clip built for the weights (or from the config
that travels with a bare state dict), never assumed.

Source: open_clip 3.3, transformer.py, model.py, coca_model.py, timm_model.py, tokenizer.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adaptkit.backbones.base import Preprocessing
from adaptkit.backbones.building import (
    Opaque,
    activation_of,
    assemble,
    is_identity,
    is_norm,
    make_image_tower,
    make_text_tower,
    need,
    opened,
    pair,
    square,
    triple,
)
from adaptkit.backbones.dual_encoder import ClassToken, DualEncoder
from adaptkit.backbones.proof import prove
from adaptkit.backbones.timm_vit import open_timm_vit
from adaptkit.backbones.tokenizing import ClipTokenizer, OutsideTokenizer, Pooling, TextTokenizer
from adaptkit.backbones.tower import Activation, BlockShape, ImageShape, ImageTower, TextShape, TextTower
from adaptkit.errors import BackboneError

# --- open_clip's names to ours ----------------------------------------------------------------------------------------


def _block_weights(state: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """The weights of a `ResidualAttentionBlock` under our names."""
    ours, theirs = f"blocks.{index}.", f"transformer.resblocks.{index}."
    weights: dict[str, Tensor] = {}
    for name, source in (
        ("ln_1", "ln_1"),
        ("ln_2", "ln_2"),
        ("attn.out_proj", "attn.out_proj"),
        ("fc1", "mlp.c_fc"),
        ("fc2", "mlp.c_proj"),
    ):
        weights |= pair(ours + name, theirs + source, state)
    for kind in ("weight", "bias"):
        parts = state[f"{theirs}attn.in_proj_{kind}"].chunk(3)
        for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
            weights[f"{ours}attn.{name}.{kind}"] = part
    for name, source in (("scale_1", "ls_1.gamma"), ("scale_2", "ls_2.gamma")):
        if theirs + source in state:
            weights[ours + name] = state[theirs + source]
    return weights


def _image_tower(state: Mapping[str, Tensor], shape: ImageShape) -> ImageTower:
    """Fill a tower from the state of a `VisionTransformer` (names without "visual.")."""
    weights = {
        "patch_embedding.weight": state["conv1.weight"],
        "class_embedding": state["class_embedding"],
        "positional_embedding": state["positional_embedding"],
        "projection.weight": state["proj"].T,
        **pair("ln_post", "ln_post", state),
        **pair("ln_pre", "ln_pre", state),
    }
    for index in range(shape.blocks.layers):
        weights |= _block_weights(state, index)
    return make_image_tower(shape, weights)


def _text_tower(state: Mapping[str, Tensor], shape: TextShape) -> TextTower:
    """Fill a tower from the state of a `TextTransformer`, or of a `CLIP`, which has the same names."""
    embedding = state["token_embedding.weight"]
    if "cls_emb" in state:  # CoCa's class token becomes one more row
        embedding = torch.cat([embedding, state["cls_emb"][None]])
    weights = {
        "token_embedding.weight": embedding,
        "positional_embedding": state["positional_embedding"],
        **pair("ln_final", "ln_final", state),
        **pair("projection", "text_projection", state),
    }
    if "text_projection" in state:  # a bare matrix (in, out)
        weights["projection.weight"] = state["text_projection"].T
    for index in range(shape.blocks.layers):
        weights |= _block_weights(state, index)
    return make_text_tower(shape, weights)


# --- from a bare state dict and its config ----------------------------------------------------------------------------

_VISION_KEYS = {
    "layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "ls_init_value", "no_ln_pre", "pool_type",
    "final_ln_after_pool",
}  # fmt: skip
_TEXT_KEYS = {
    "context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "ls_init_value", "no_causal_mask",
    "pool_type", "eos_id", "proj_bias",
}  # fmt: skip
_MODEL_KEYS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale"}


def dual_encoder_from_open_clip_state(
    state_dict: Mapping[str, Tensor],
    model_cfg: Mapping[str, Any],
    preprocess_cfg: Mapping[str, Any],
    *,
    name: str,
    tokenizer: TextTokenizer | None = None,
    family: str = "open_clip",
) -> DualEncoder:
    """A backbone straight from open_clip's (and OpenAI's) state-dict names, without building open_clip's model.

    Args:
        state_dict: Weights of a ViT-based `CLIP` ("visual.conv1.weight", "transformer.resblocks.0.…", …).
        model_cfg: The "model_cfg" of an `open_clip_config.json`; `quick_gelu` says which activation the weights want.
        preprocess_cfg: The "preprocess_cfg" of the same file: mean, std, interpolation, resize_mode.
        name: The backbone's name.
        tokenizer: None for CLIP's own.
        family: Recorded in the spec.

    Raises:
        BackboneError: The config asks for something that only open_clip's own loader knows, or weights are missing.
    """
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    unknown = (set(model_cfg) - _MODEL_KEYS) | (set(vision) - _VISION_KEYS) | (set(text) - _TEXT_KEYS)
    if unknown:
        raise BackboneError(
            f"The model config of {name!r} has settings that a bare state dict can't follow:"
            f" {', '.join(sorted(unknown))}. Load it through open_clip, as 'local-dir:FOLDER'."
        )
    image_shape, text_shape = _shapes_from_config(model_cfg)
    pooling = _pooling(text.get("pool_type", "argmax"), text.get("eos_id", 2))
    visual = {key.removeprefix("visual."): value for key, value in state_dict.items() if key.startswith("visual.")}
    textual = {key.removeprefix("text."): value for key, value in state_dict.items() if not key.startswith("visual.")}
    try:
        image_tower, text_tower = _image_tower(visual, image_shape), _text_tower(textual, text_shape)
        logit_scale = float(state_dict["logit_scale"].float().exp())
    except (KeyError, RuntimeError) as error:  # a missing name, or a shape that doesn't fit
        raise BackboneError(f"The weights of {name!r} don't fit its config: {error}.") from error
    return assemble(
        name=name,
        family=family,
        image=image_tower,
        text=text_tower,
        tokenizer=tokenizer or ClipTokenizer(text_shape.context_length, pooling),
        preprocessing=_preprocessing(preprocess_cfg, name, image_shape.image_size),
        embed_dim=int(model_cfg["embed_dim"]),
        context_length=text_shape.context_length,
        logit_scale=logit_scale,
        logit_bias=float(state_dict.get("logit_bias", torch.tensor(0.0))),
    )


def _shapes_from_config(model_cfg: Mapping[str, Any]) -> tuple[ImageShape, TextShape]:
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    embed_dim = int(model_cfg["embed_dim"])
    activation: Activation = "quick_gelu" if model_cfg.get("quick_gelu", False) else "gelu"

    def blocks(cfg: Mapping[str, Any], heads: int, width: int) -> BlockShape:
        return BlockShape(
            width=width,
            heads=heads,
            layers=int(cfg.get("layers", 12)),
            mlp_width=int(width * cfg.get("mlp_ratio", 4.0)),
            activation=activation,
            layer_scale=cfg.get("ls_init_value") is not None,
        )

    vision_width, text_width = int(vision.get("width", 768)), int(text.get("width", 512))
    image_shape = ImageShape(
        blocks=blocks(vision, vision_width // int(vision.get("head_width", 64)), vision_width),
        image_size=int(vision.get("image_size", 224)),
        patch_size=int(vision.get("patch_size", 16)),
        embed_dim=embed_dim,
        ln_pre=not vision.get("no_ln_pre", False),
        pool="mean" if vision.get("pool_type", "tok") == "avg" else "class",
        norm_after_pool=bool(vision.get("final_ln_after_pool", False)),
    )
    text_shape = TextShape(
        blocks=blocks(text, int(text.get("heads", 8)), text_width),
        vocabulary=int(text.get("vocab_size", 49408)),
        context_length=int(text.get("context_length", 77)),
        embed_dim=embed_dim,
        causal=not text.get("no_causal_mask", False),
        projection_bias=bool(text.get("proj_bias", False)),
    )
    return image_shape, text_shape


def _pooling(kind: str, end: int) -> Pooling:
    """open_clip's pool types ("eos" looks for the end token's id) as ours."""
    match kind:
        case "eos":
            return Pooling("token", end)
        case "argmax" | "first" | "last":
            return Pooling(kind)
    raise Opaque(f"its text pooling {kind!r} isn't argmax, eos, first or last")


def _preprocessing(config: Mapping[str, Any], name: str, image_size: int) -> Preprocessing:
    """Open_clip's preprocessing config as ours.

    Raises:
        BackboneError: A setting that our transform doesn't have.
    """
    mode, resize = config.get("mode", "RGB"), config.get("resize_mode", "shortest")
    interpolation = config.get("interpolation", "bicubic")
    # "random" is for training: open_clip itself takes bicubic for everything but "bilinear" when it evaluates
    if mode != "RGB" or resize not in ("shortest", "squash") or interpolation not in ("bicubic", "bilinear", "random"):
        raise BackboneError(
            f"The preprocessing of {name!r} isn't supported: mode {mode!r}, resize mode {resize!r}, interpolation"
            f" {interpolation!r}. It must be RGB; shortest or squash; bicubic or bilinear."
        )
    kind: Literal["bicubic", "bilinear"] = "bilinear" if interpolation == "bilinear" else "bicubic"
    plain = Preprocessing(image_size, interpolation=kind, resize=resize)
    mean, std = config.get("mean"), config.get("std")
    return replace(plain, mean=triple(mean) if mean else plain.mean, std=triple(std) if std else plain.std)


# --- from a model that open_clip built --------------------------------------------------------------------------------


class _FirstOutput(nn.Module):
    """An encoder whose first output counts (CoCa's encoders also give their tokens)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        out = self.encoder(x)
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first


class _WholeModelText(nn.Module):
    """The text side of a `CLIP`, whose parts lie in the model itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        features: Tensor = self.model.encode_text(ids)  # type: ignore[operator]  # nn.Module's attributes are untyped
        return features


def from_open_clip(model: nn.Module, tokenizer: Any, *, name: str) -> DualEncoder:
    """A backbone from a loaded open_clip model, which is used up; towers that can't be opened are kept as they are.

    Args:
        model: An open_clip `CLIP`, `CustomTextCLIP` or `CoCa` with its `visual.preprocess_cfg`, in fp32 on the CPU.
        tokenizer: open_clip's `SimpleTokenizer` or `HFTokenizer` for it.
        name: The backbone's name.

    Raises:
        BackboneError: Preprocessing or tokenizer can't be followed, or a converted tower disagrees with its source.
    """
    source: Any = model.eval()
    visual = source.visual
    has_text_module = hasattr(source, "text")
    text_source = _FirstOutput(source.text) if has_text_module else _WholeModelText(source)
    text_module = source.text if has_text_module else source
    image_tower, opaque_image = opened(lambda: _open_image(visual))
    text, opaque_text = opened(lambda: _open_text(text_module, source.state_dict()))
    own_tokenizer = _tokenizer(tokenizer, text_module)
    image_source = _FirstOutput(visual)
    config = visual.preprocess_cfg
    backbone = assemble(
        name=name,
        family="coca" if type(source).__name__ == "CoCa" else "open_clip",
        image=image_tower or image_source,
        text=text[0] if text else text_source,
        tokenizer=own_tokenizer,
        preprocessing=_preprocessing(config, name, square(config.get("size", visual.image_size), name)),
        embed_dim=_embed_dim(text_module),
        context_length=own_tokenizer.context_length,
        logit_scale=float(source.logit_scale.detach().exp()),
        logit_bias=0.0 if source.logit_bias is None else float(source.logit_bias.detach()),
        class_token=text[1] if text else None,
        opaque_image=opaque_image,
        opaque_text=opaque_text,
    )
    prove(backbone, image_source, text_source)
    if not text and not has_text_module:
        source.visual = nn.Identity()  # the text side keeps the model, and shall not keep a second image tower
    return backbone


def _embed_dim(text_module: Any) -> int:
    projection = getattr(text_module, "text_projection", None)
    if isinstance(projection, nn.Linear):
        return projection.out_features
    if isinstance(projection, Tensor):
        return int(projection.shape[1])
    return int(getattr(text_module, "output_dim", 0) or text_module.ln_final.normalized_shape[0])


def _block_shape(transformer: Any) -> BlockShape:
    """Sizes of open_clip's `Transformer`.

    Raises:
        Opaque: Its blocks have parts that ours don't.
    """
    kinds = {type(block).__name__ for block in transformer.resblocks}
    need(kinds == {"ResidualAttentionBlock"}, f"its blocks are of the kind {', '.join(sorted(kinds))}")
    first = transformer.resblocks[0]
    need(is_norm(first.ln_1) and is_norm(first.ln_2), "its blocks aren't normalised by layer norms")
    return BlockShape(
        width=transformer.width,
        heads=first.attn.num_heads,
        layers=len(transformer.resblocks),
        mlp_width=first.mlp.c_fc.out_features,
        activation=activation_of(first.mlp.gelu),
        norm_eps=first.ln_1.eps,
        layer_scale=not is_identity(first.ls_1),
    )


def _open_image(visual: Any) -> ImageTower:
    """The image tower of an open_clip model, opened.

    Raises:
        Opaque: It is no vision transformer, or has a pooling head that our tower lacks.
    """
    kind = type(visual).__name__
    if kind == "TimmModel":
        layers = {name: layer for name, layer in visual.head.named_children() if not is_identity(layer)}
        need(not layers or set(layers) == {"proj"}, "its head isn't one linear projection")
        projection = layers.get("proj")
        need(projection is None or isinstance(projection, nn.Linear), "its head isn't one linear projection")
        return open_timm_vit(visual.trunk, projection)
    need(kind == "VisionTransformer", f"{kind} isn't a vision transformer")
    need(visual.attn_pool is None, "it pools by attention with several queries (CoCa's head)")
    need(visual.pool_type in ("tok", "avg"), f"its pooling {visual.pool_type!r} isn't tok or avg")
    need(visual.proj is not None, "it has no projection")
    shape = ImageShape(
        blocks=_block_shape(visual.transformer),
        image_size=square(visual.image_size, kind),
        patch_size=square(visual.patch_size, kind),
        embed_dim=visual.output_dim,
        ln_pre=is_norm(visual.ln_pre),
        pool="class" if visual.pool_type == "tok" else "mean",
        norm_after_pool=visual.final_ln_after_pool,
    )
    return _image_tower(visual.state_dict(), shape)


def _open_text(module: Any, model_state: Mapping[str, Tensor]) -> tuple[TextTower, ClassToken | None]:
    """The text tower of an open_clip model, opened, with its class token where it has one.

    Args:
        module: A `TextTransformer`, or the `CLIP` that has its parts.
        model_state: The whole model's state dict.

    Raises:
        Opaque: It is another library's model, or has parts that our tower lacks.
    """
    kind = type(module).__name__
    need(kind in ("TextTransformer", "CLIP"), f"its text encoder ({kind}) isn't open_clip's own transformer")
    need(not getattr(module, "use_pad_mask", False), "its text tower hides padding without being causal")
    state = {key.removeprefix("text."): value for key, value in model_state.items() if not key.startswith("visual.")}
    class_embedding = getattr(module, "cls_emb", None)
    projection = module.text_projection
    embedding = module.token_embedding
    causal = module.attn_mask is not None
    need(class_embedding is None or causal, "its text tower has a class token without being causal")
    _pooling(_pool_kind(module), 0)  # an unknown kind leaves the tower closed
    shape = TextShape(
        blocks=_block_shape(module.transformer),
        vocabulary=embedding.num_embeddings + int(class_embedding is not None),
        context_length=module.positional_embedding.shape[0],
        embed_dim=0 if projection is None else _embed_dim(module),
        causal=causal,
        projection_bias=isinstance(projection, nn.Linear) and projection.bias is not None,
    )
    class_token = None
    if class_embedding is not None:
        class_token = ClassToken(embedding.num_embeddings, module.pad_id, shifted=not module.correct_cls_mask)
    return _text_tower(state, shape), class_token


def _pool_kind(module: Any) -> str:
    """Which token is pooled; a class token comes after the text's own end, whatever `pool_type` says."""
    if getattr(module, "cls_emb", None) is not None:
        return "argmax"
    return str(getattr(module, "text_pool_type", None) or getattr(module, "pool_type", "argmax"))


# --- tokenizers -------------------------------------------------------------------------------------------------------

_CLEAN_NAMES = {"_clean_lower": "lower", "_clean_whitespace": "whitespace", "_clean_canonicalize": "canonicalize"}


def _tokenizer(tokenizer: Any, text_module: Any) -> ClipTokenizer | OutsideTokenizer:
    """Our tokenizer for open_clip's: never cutting off, and with the pooled position.

    Raises:
        BackboneError: A kind that isn't known.
    """
    end = getattr(text_module, "text_eos_id", getattr(text_module, "eos_id", 2))
    try:
        pooling = _pooling(_pool_kind(text_module), end)
    except Opaque:  # such a tower stays closed, and reads no pooled position from us
        pooling = Pooling("last")
    clean = _CLEAN_NAMES.get(tokenizer.clean_fn.__name__, "")
    if type(tokenizer).__name__ == "SimpleTokenizer":
        if len(tokenizer.all_special_ids) != 2 or not clean:
            raise BackboneError("This model adds special tokens to CLIP's tokenizer, which isn't supported.")
        return ClipTokenizer(tokenizer.context_length, pooling, clean)
    if type(tokenizer).__name__ != "HFTokenizer":
        raise BackboneError(f"The tokenizer {type(tokenizer).__name__} isn't one that open_clip gives its models.")
    inner, extra = tokenizer.tokenizer, 3  # "clips" mode adds start, end and class token

    def pieces(text: str) -> list[int]:
        ids: list[int] = inner(tokenizer.clean_fn(text), add_special_tokens=False).input_ids
        return ids

    def count(text: str) -> int:
        if tokenizer.tokenizer_mode == "clips":
            return len(pieces(text)) + extra
        return len(inner(tokenizer.clean_fn(text)).input_ids)

    facts = {
        "tokenizer": fingerprint(inner),
        "mode": tokenizer.tokenizer_mode,
        "clean": clean,
        "strip": bool(tokenizer.strip_sep_token),
        "length": tokenizer.context_length,
        "pooled": [pooling.kind, pooling.token],
    }
    return OutsideTokenizer(
        tokenizer, count, pieces, tokenizer.context_length, pooling, facts, lambda token: str(inner.decode([token]))
    )


def fingerprint(tokenizer: Any) -> str:
    """What identifies a transformers tokenizer: a digest of its rules, or of its vocabulary where it is a slow one."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    text = fast.to_str() if fast is not None else repr(sorted(tokenizer.get_vocab().items()))
    special = sorted((key, str(value)) for key, value in tokenizer.special_tokens_map.items())
    return hashlib.sha256((text + repr(special)).encode()).hexdigest()
