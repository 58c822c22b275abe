"""Tiny random models of every family, saved in the layout their library publishes them in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

TEXTS = ["a photo of a cat.", "dog", "a red panda and a dog, in the snow"]
WORDS = ["a", "photo", "of", "cat", "dog", "red", "panda", "and", "in", "the", "snow", ".", ",", "it", "is", "an"]


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Make every weight matter: fresh models have zero biases and unit scales, which would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def word_tokenizer(*, start: str, end: str, padding: str, side: str = "right") -> Any:
    """A transformers tokenizer of whole words; `end` gets the highest id, as CLIP's has."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = list(dict.fromkeys([padding, start, "[UNK]"]))
    vocabulary = [*(token for token in special if token != end), *WORDS, end]
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = f"{start} $A {end}" if start else f"$A {end}"
    pairs = [(token, ids[token]) for token in (start, end) if token]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start or None,
        cls_token=start or None,
        eos_token=end,
        sep_token=end,
        pad_token=padding,
        unk_token="[UNK]",
        padding_side=side,
        model_max_length=24,
    )


def letter_tokenizer() -> Any:
    """SigLIP 2's own tokenizer class, with letters for pieces."""
    from transformers import Siglip2Tokenizer

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *"abcdefghijklmnopqrstuvwxyz.,"]
    return Siglip2Tokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], padding_side="right")


# --- open_clip --------------------------------------------------------------------------------------------------------

_VISION = {"image_size": 32, "patch_size": 8, "width": 48, "head_width": 16, "layers": 3}
_TEXT = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
_SMALL_TEXT = {**_TEXT, "vocab_size": 24}  # for word tokenizers


def _open_clip(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"embed_dim": 24, "vision_cfg": {**_VISION, **(vision or {})}, "text_cfg": {**_TEXT, **(text or {})}, **more}


OPEN_CLIP: dict[str, dict[str, Any]] = {
    "clip": _open_clip(),
    "clip-quickgelu": _open_clip(quick_gelu=True),
    "layer-scale": _open_clip({"ls_init_value": 0.1}, {"ls_init_value": 0.1}),
    "mean-pooled": _open_clip({"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}),
    "mean-after-norm": _open_clip({"pool_type": "avg"}),
    "custom-text": _open_clip(custom_text=True),
    "clipa-text": _open_clip(text={"no_causal_mask": True, "pool_type": "last"}),
    "first-token": _open_clip(text={"no_causal_mask": True, "pool_type": "first"}),
    "end-id": _open_clip(text={"pool_type": "eos", "eos_id": 49407}),
    "siglip": _open_clip(
        {"timm_model_name": "adaptkit_tiny_siglip", "timm_pool": "map", "timm_proj": "none"},
        {
            "vocab_size": 24,
            "hf_tokenizer_name": "here",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
            "act_kwargs": {"approximate": "tanh"},
        },
        embed_dim=48,
        custom_text=True,
        init_logit_bias=-10,
    ),
    "eva01": _open_clip(
        {"timm_model_name": "adaptkit_tiny_eva", "timm_pool": "token", "timm_proj": None}, custom_text=True
    ),
    "eva02": _open_clip(
        {"timm_model_name": "adaptkit_tiny_eva02", "timm_pool": "token", "timm_proj": None}, custom_text=True
    ),
    "timm-clip-vit": _open_clip(
        {"timm_model_name": "adaptkit_tiny_clip_vit", "timm_pool": "token", "timm_proj": None}, custom_text=True
    ),
    "resnet": _open_clip({"layers": [1, 1, 1, 1], "width": 16, "image_size": 64, "head_width": 64}),
    "coca": _open_clip(
        {"output_tokens": True},
        {"embed_cls": True, "output_tokens": True},
        multimodal_cfg={"context_length": 20, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 1},
        custom_text=True,
    ),
    "coca-attention-pool": _open_clip(
        {"output_tokens": True, "attentional_pool": True, "attn_pooler_heads": 2},
        {"embed_cls": True, "output_tokens": True},
        multimodal_cfg={"context_length": 20, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 1},
        custom_text=True,
    ),
}
"""Model configs by what they stand for."""

OPEN_CLIP_OPAQUE = {"eva02": "rotary", "resnet": "ResNet", "coca-attention-pool": "several queries"}
"""Those whose image tower stays closed, with a word of the reason."""


def register_tiny_timm_models() -> None:
    """Small relatives of timm's SigLIP, EVA-01, EVA-02 and CLIP ViTs, under names that open_clip's configs can use."""
    import timm
    from timm.models import Eva, VisionTransformer
    from timm.models import register_model as register

    if timm.is_model("adaptkit_tiny_siglip"):
        return
    size: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}

    def adaptkit_tiny_siglip(pretrained: bool = False, **more: Any) -> nn.Module:
        return VisionTransformer(
            **{**size, "class_token": False, "global_pool": "map", "norm_layer": _norm, **_own(more)}
        )

    def adaptkit_tiny_eva(pretrained: bool = False, **more: Any) -> nn.Module:
        return Eva(**{**size, "mlp_ratio": 2.5, **_own(more)})

    def adaptkit_tiny_eva02(pretrained: bool = False, **more: Any) -> nn.Module:
        return Eva(**{**size, "use_rot_pos_emb": True, "swiglu_mlp": True, "qkv_fused": False, **_own(more)})

    def adaptkit_tiny_clip_vit(pretrained: bool = False, **more: Any) -> nn.Module:
        from timm.layers import QuickGELU

        return VisionTransformer(**{**size, "pre_norm": True, "act_layer": QuickGELU, "init_values": 0.1, **_own(more)})

    for make in (adaptkit_tiny_siglip, adaptkit_tiny_eva, adaptkit_tiny_eva02, adaptkit_tiny_clip_vit):
        register(make)


def _own(more: dict[str, Any]) -> dict[str, Any]:
    """What timm's factory passes on, without what it keeps for itself."""
    return {key: value for key, value in more.items() if not key.startswith(("pretrained", "cache"))}


def _norm(width: int, **more: Any) -> nn.Module:
    return nn.LayerNorm(width, eps=1e-6, **more)


def save_open_clip(kind: str, folder: Path) -> Any:
    """Save `OPEN_CLIP[kind]` as a `local-dir:` folder; returns open_clip's own model."""
    import open_clip

    register_tiny_timm_models()
    config = OPEN_CLIP[kind]
    preprocess = {
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.25, 0.3],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    if "hf_tokenizer_name" in config["text_cfg"]:
        word_tokenizer(start="", end="</s>", padding="<pad>").save_pretrained(folder)
    model = shake(open_clip.create_model(f"local-dir:{folder}"))
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return model


# --- transformers -----------------------------------------------------------------------------------------------------

_SIDES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
_V = {**_SIDES, "hidden_size": 48, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
_T = {**_SIDES, "vocab_size": 24, "max_position_embeddings": 20}
_BERT = {**_T, "max_position_embeddings": 30, "type_vocab_size": 2, "pad_token_id": 0}

TRANSFORMERS = (
    "clip", "clip-end-2", "metaclip_2", "siglip", "siglip2", "chinese_clip", "altclip", "align",
)  # fmt: skip


def _transformers_model(kind: str, end: int) -> Any:
    import transformers as hf

    if kind.startswith("clip"):
        text = {**_T, "eos_token_id": 2 if kind == "clip-end-2" else end, "hidden_act": "gelu"}
        return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=_V, projection_dim=24))
    if kind == "metaclip_2":
        text = {**_T, "eos_token_id": end}
        return hf.MetaClip2Model(hf.MetaClip2Config(text_config=text, vision_config=_V, projection_dim=24))
    if kind == "siglip":
        text = {**_T, "projection_size": 48}
        return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=_V))
    if kind == "siglip2":
        text = {**_T, "projection_size": 48, "vocab_size": 64, "max_position_embeddings": 48}
        vision = {**_V, "num_patches": 16}
        return hf.Siglip2Model(hf.Siglip2Config(text_config=text, vision_config=vision))
    if kind == "chinese_clip":
        return hf.ChineseCLIPModel(hf.ChineseCLIPConfig(text_config=_BERT, vision_config=_V, projection_dim=24))
    if kind == "altclip":
        text = {**_BERT, "project_dim": 24, "pad_token_id": 0}
        return hf.AltCLIPModel(hf.AltCLIPConfig(text_config=text, vision_config=_V, projection_dim=24))
    vision = {"image_size": 64, "width_coefficient": 0.2, "depth_coefficient": 0.2, "hidden_dim": 32}
    return hf.AlignModel(hf.AlignConfig(text_config=_BERT, vision_config=vision, projection_dim=64))


def _image_processor(kind: str) -> Any:
    import transformers as hf

    crop, colours = {"height": 32, "width": 32}, {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    if kind == "siglip":
        return hf.SiglipImageProcessor(size=crop, **colours)
    if kind == "siglip2":
        return hf.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    if kind == "align":
        size, crop = {"height": 80, "width": 80}, {"height": 64, "width": 64}
        return hf.EfficientNetImageProcessor(
            size=size, crop_size=crop, do_center_crop=True, do_normalize=False, rescale_offset=True,
            rescale_factor=1 / 127.5, include_top=False, resample=2,
        )  # fmt: skip
    cls = hf.ChineseCLIPImageProcessor if kind == "chinese_clip" else hf.CLIPImageProcessor
    return cls(size={"shortest_edge": 40}, crop_size=crop, **colours)


def save_transformers(kind: str, folder: Path) -> tuple[Any, Any]:
    """Save a model with tokenizer and image processor; returns transformers' own model and tokenizer."""
    tokenizer = word_tokenizer(start="" if kind.startswith("siglip") else "<s>", end="</s>", padding="<pad>")
    if kind == "siglip2":
        tokenizer = letter_tokenizer()
    torch.manual_seed(0)
    model = shake(_transformers_model(kind, tokenizer.eos_token_id))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _image_processor(kind).save_pretrained(folder)
    return model, tokenizer


def save_vision_only(kind: str, folder: Path) -> Any:
    """Save a vision model of transformers with its processor; returns the model."""
    import transformers as hf

    torch.manual_seed(0)
    side = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    if kind == "dinov2":
        model: Any = hf.Dinov2Model(hf.Dinov2Config(**side))
    elif kind == "vit":
        model = hf.ViTModel(hf.ViTConfig(**side, intermediate_size=64), add_pooling_layer=False)
    else:
        model = hf.ConvNextModel(hf.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=32))
    shake(model).save_pretrained(folder)
    if kind == "convnext":
        hf.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875).save_pretrained(folder)
    else:
        size, crop = {"shortest_edge": 32}, {"height": 28, "width": 28}
        hf.BitImageProcessor(size=size, crop_size=crop, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
            folder
        )
    return model
