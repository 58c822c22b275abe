"""Image encoders without text (DINOv2, supervised ViTs, ConvNeXt, …), from timm and transformers. Their towers are
opaque.

Methods that need no class names in words (linear probe, caches without text) work on them.

Source: timm, models/_factory.py, data/config.py; transformers, models/*/modeling_*.py.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.backbones.base import Preprocessing
from adaptkit.backbones.building import assemble, from_library, square, triple, unknown_name
from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.backbones.transformers_clip import load_model, preprocessing_of
from adaptkit.errors import BackboneError, MissingPathError

OPAQUE = "image-only backbones aren't opened"

CLASS_TOKEN_TYPES = {"vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit_msn"}
"""Transformers model types whose feature is the normalised class token. Their "pooler_output" may come from a layer
that the checkpoint has no weights for."""


class _TimmFeatures(nn.Module):
    """A timm model without its classifier."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model(pixels)  # [batch, width]
        return features


class _TransformersFeatures(nn.Module):
    """A transformers vision model: the class token, or the model's own pooling."""

    def __init__(self, model: nn.Module, class_token: bool) -> None:
        super().__init__()
        self.model = model
        self.class_token = class_token

    def forward(self, pixels: Tensor) -> Tensor:
        out = self.model(pixel_values=pixels)
        pooled: Tensor = out.last_hidden_state[:, 0] if self.class_token else out.pooler_output.flatten(1)
        return pooled  # [batch, width]


def load_timm(name: str, identifier: str) -> DualEncoder:
    """Load an image encoder of timm: a name with its pretrained tag, "hf-hub:ORG/REPO", or a folder.

    Raises:
        UnknownNameError: timm doesn't know the name.
        MissingPathError: The identifier looks like a folder, and there is none.
        BackboneError: It can't be loaded, or needs a transform that we don't have.
    """
    import timm

    path = Path(identifier).expanduser()
    if path.is_dir():
        identifier = f"local-dir:{path}"
    elif path.is_absolute() or identifier.startswith(("./", "../", "~")):
        raise MissingPathError(f"There is no folder {identifier!r}. 'timm:' takes a folder, a name or hf-hub:ORG/REPO.")
    elif not identifier.startswith("hf-hub:") and not timm.is_model(identifier):
        raise unknown_name(
            "timm model", identifier, timm.list_models(), "'timm.list_models(pretrained=True)' lists them."
        )
    model = from_library(name, lambda: timm.create_model(identifier, pretrained=True, num_classes=0)).eval()
    settings = timm.data.resolve_model_data_config(model)
    return _image_only(name, "timm", _TimmFeatures(model), _timm_preprocessing(settings, name))


def _timm_preprocessing(settings: dict[str, Any], name: str) -> Preprocessing:
    """Timm's evaluation transform as ours."""
    side = square(settings["input_size"][1:], name)
    mode, interpolation = settings.get("crop_mode", "center"), settings.get("interpolation", "bicubic")
    if (
        mode not in ("center", "squash")
        or interpolation not in ("bicubic", "bilinear")
        or settings["input_size"][0] != 3
    ):
        raise BackboneError(
            f"The transform of {name!r} can't be followed: crop mode {mode!r}, interpolation {interpolation!r}."
            " Supported: three channels; center or squash; bicubic or bilinear."
        )
    before = math.floor(side / float(settings.get("crop_pct") or 1.0))
    return Preprocessing(
        side,
        triple(settings["mean"]),
        triple(settings["std"]),
        interpolation=interpolation,
        resize="squash" if mode == "squash" else "shortest",
        resize_size=None if before == side else before,
    )


def transformers_vision_only(name: str, source: str, config: Any) -> DualEncoder:
    """Load a vision model of transformers.

    Args:
        name: The backbone's name.
        source: Folder or hub id.
        config: Its config.

    Raises:
        BackboneError: It isn't a vision model that gives one vector per image.
    """
    from transformers import AutoImageProcessor

    processor = from_library(name, lambda: AutoImageProcessor.from_pretrained(source), "image processor")
    class_token = config.model_type in CLASS_TOKEN_TYPES
    model = load_model(name, source, may_lack="pooler." if class_token else "")
    if class_token and getattr(model, "pooler", None) is not None:
        model.pooler = None  # not read, and perhaps without weights
    features = _TransformersFeatures(model, class_token)
    return _image_only(name, config.model_type, features, preprocessing_of(processor, name))


@torch.no_grad()
def _image_only(name: str, family: str, encoder: nn.Module, preprocessing: Preprocessing) -> DualEncoder:
    side = preprocessing.image_size
    try:
        probe = encoder(torch.zeros(1, 3, side, side))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise BackboneError(f"{name!r} doesn't give one vector per image of {side} pixels: {error}.") from error
    if probe.dim() != 2:
        raise BackboneError(f"{name!r} gives features of shape {list(probe.shape)}, not one vector per image.")
    return assemble(
        name=name,
        family=family,
        image=encoder,
        text=None,
        tokenizer=None,
        preprocessing=preprocessing,
        embed_dim=probe.shape[1],
        opaque_image=OPAQUE,
        opaque_text="it has no text tower",
    )
