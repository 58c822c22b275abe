"""A backbone's towers as a checkpoint in open_clip's layout, the reverse of what `backbones/open_clip.py` reads.

Source: open_clip 3.3, factory.py (local-dir and hub layout), model.py (CLIPVisionCfg, CLIPTextCfg), transformer.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.backbones.tokenizing import ClipTokenizer, OutsideTokenizer
from adaptkit.backbones.tower import BlockShape, ImageShape, TextShape
from adaptkit.errors import UnsupportedError

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
_NORM_EPS = 1e-5
_PROBES = (
    "a photo of a {}.",
    "Hello, World! 1234",
    "it's a café -- 100% naïve",
    "grey_wolf & 'snow' leopard",
    "日本 🙂",
)


def open_clip_config(backbone: DualEncoder) -> dict[str, Any]:
    """What stands in `open_clip_config.json` for a backbone's architecture and preprocessing.

    Raises:
        BackboneError: A tower can't be opened.
        UnsupportedError: open_clip's own CLIP has no setting for something that the backbone is.
    """
    backbone.require_open("A checkpoint in open_clip's layout", image=True, text=True)
    image, text, spec = backbone.image_tower, backbone.text_tower, backbone.spec
    if image is None or text is None:  # said already
        raise UnsupportedError(f"{spec.name!r} has no two open towers to write.")
    image_shape, text_shape = image.shape, text.shape
    _check(backbone, image_shape, text_shape)
    plain = spec.preprocessing
    return {
        "model_cfg": {
            "embed_dim": spec.embed_dim,
            "quick_gelu": image_shape.blocks.activation == "quick_gelu",
            "vision_cfg": _vision(image_shape),
            "text_cfg": _text(text_shape, backbone),
        },
        "preprocess_cfg": {
            "mean": list(plain.mean),
            "std": list(plain.std),
            "interpolation": plain.interpolation,
            "resize_mode": plain.resize,
        },
    }


def _vision(shape: ImageShape) -> dict[str, Any]:
    config: dict[str, Any] = {
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
        "width": shape.blocks.width,
        "head_width": shape.blocks.width // shape.blocks.heads,
        "layers": shape.blocks.layers,
        "mlp_ratio": shape.blocks.mlp_width / shape.blocks.width,
    }
    if not shape.ln_pre:
        config["no_ln_pre"] = True
    if shape.pool == "mean":
        config["pool_type"] = "avg"
    if shape.norm_after_pool:
        config["final_ln_after_pool"] = True
    return config | _block_settings(shape.blocks)


def _text(shape: TextShape, backbone: DualEncoder) -> dict[str, Any]:
    config: dict[str, Any] = {
        "context_length": shape.context_length,
        "vocab_size": shape.vocabulary,
        "width": shape.blocks.width,
        "heads": shape.blocks.heads,
        "layers": shape.blocks.layers,
        "mlp_ratio": shape.blocks.mlp_width / shape.blocks.width,
    }
    if not shape.causal:
        config["no_causal_mask"] = True
    pooling = _tokenizer(backbone).pooling
    if pooling.kind == "token":
        config |= {"pool_type": "eos", "eos_id": pooling.token}
    elif pooling.kind != "argmax":
        config["pool_type"] = pooling.kind
    if isinstance(_tokenizer(backbone), ClipTokenizer) and _clean(backbone) != "lower":
        config["tokenizer_kwargs"] = {"clean": _clean(backbone)}
    return config | _block_settings(shape.blocks)


def _block_settings(shape: BlockShape) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if shape.layer_scale:
        settings["ls_init_value"] = 1.0
    if shape.norm_eps != _NORM_EPS:
        settings["norm_kwargs"] = {"eps": shape.norm_eps}
    return settings


def _tokenizer(backbone: DualEncoder) -> ClipTokenizer | OutsideTokenizer:
    return backbone._tokenizer  # type: ignore[return-value]  # the two kinds that loaders make


def _clean(backbone: DualEncoder) -> str:
    tokenizer = _tokenizer(backbone)
    return tokenizer.bpe.clean if isinstance(tokenizer, ClipTokenizer) else "lower"


def _check(backbone: DualEncoder, image: ImageShape, text: TextShape) -> None:
    """Refuse what open_clip's own CLIP can't be told.

    Raises:
        UnsupportedError: The backbone has such a part; the message names it.
    """
    plain = backbone.spec.preprocessing
    bias = float(backbone.logit_bias)
    reasons = (
        ("a class token in its text tower (CoCa)", backbone._class_token is not None),
        ("a bias on its logits or pooling by attention (SigLIP)", bias != 0 or image.pool == "attention"),
        ("another tokenizer than CLIP's", not _has_clip_tokenizer(backbone)),
        ("no class token among its patches", not image.class_token),
        ("no projection behind one of its towers", not image.embed_dim or not text.embed_dim),
        ("a bias on its patches or projections", image.patch_bias or image.projection_bias or text.projection_bias),
        ("towers with different activations", image.blocks.activation != text.blocks.activation),
        ("the tanh form of GELU", "gelu_tanh" in (image.blocks.activation, text.blocks.activation)),
        ("another resize than its image size", plain.resize_size not in (None, plain.image_size)),
    )
    found = [what for what, has in reasons if has]
    if found:
        raise UnsupportedError(
            f"{backbone.spec.name!r} has {found[0]}, which open_clip's plain CLIP layout doesn't hold: use the adapter"
            " folder itself (or its peft folder, where it has one)."
        )


def _has_clip_tokenizer(backbone: DualEncoder) -> bool:
    """Whether its tokenizer is CLIP's, or gives the same ids as CLIP's on texts with everything that differs."""
    own = _tokenizer(backbone)
    if isinstance(own, ClipTokenizer):
        return True
    theirs, plain = own(list(_PROBES)), ClipTokenizer(own.context_length)(list(_PROBES))
    if not torch.equal(theirs.ends, plain.ends):
        return False
    rows = zip(theirs.ids.tolist(), plain.ids.tolist(), plain.ends.tolist(), strict=True)
    return all(mine[: end + 1] == other[: end + 1] for mine, other, end in rows)  # padding isn't seen


# --- weights ----------------------------------------------------------------------------------------------------------


def open_clip_state(towers: Mapping[str, Mapping[str, Tensor]], scale: float) -> dict[str, Tensor]:
    """Weights under the names of open_clip's `CLIP`.

    Args:
        towers: States of our towers, "image" and "text".
        scale: What cosines are multiplied with; stored as its logarithm.
    """
    state: dict[str, Tensor] = {"logit_scale": torch.tensor(math.log(scale))}
    for name, value in _tower_state(towers["image"]).items():
        state[f"visual.{name}"] = value
    state |= _tower_state(towers["text"])
    if "visual.projection.weight" in state:
        state["visual.proj"] = state.pop("visual.projection.weight").T.contiguous()
    if "projection.weight" in state:
        state["text_projection"] = state.pop("projection.weight").T.contiguous()
    if "visual.patch_embedding.weight" in state:
        state["visual.conv1.weight"] = state.pop("visual.patch_embedding.weight")
    return {name: value.detach().cpu().float().contiguous() for name, value in state.items()}


_PARTS = {
    "attn.out_proj": "attn.out_proj",
    "fc1": "mlp.c_fc",
    "fc2": "mlp.c_proj",
    "ln_1": "ln_1",
    "ln_2": "ln_2",
}


def _tower_state(tower: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {name: value for name, value in tower.items() if not name.startswith("blocks.")}
    layers = 1 + max(int(name.split(".")[1]) for name in tower if name.startswith("blocks."))
    for index in range(layers):
        ours, theirs = f"blocks.{index}.", f"transformer.resblocks.{index}."
        for kind in ("weight", "bias"):
            parts = [tower[f"{ours}attn.{name}.{kind}"] for name in ("q_proj", "k_proj", "v_proj")]
            state[f"{theirs}attn.in_proj_{kind}"] = torch.cat(parts)
            for mine, other in _PARTS.items():
                state[f"{theirs}{other}.{kind}"] = tower[f"{ours}{mine}.{kind}"]
        for mine, other in (("scale_1", "ls_1.gamma"), ("scale_2", "ls_2.gamma")):
            if ours + mine in tower:
                state[theirs + other] = tower[ours + mine]
    return state
