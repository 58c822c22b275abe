"""A shortlist of classes by a CLIP-like dual encoder, for questions that can't list them all.

Source: mllm sheet `few-shot-classifier.md`, route 2 (shortlist from a CLIP dual encoder).
Differs from the sheet: the dual encoder reads the square that the language model reads, resized, and not the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.backbones.load import load_backbone
from adaptkit.errors import ConfigError
from adaptkit.methods.base import zero_shot_weights


class Shortlister:
    """Scores classes by cosines of a frozen dual encoder.

    Args:
        name: The backbone, as `load_backbone` takes it.
        device: Where it runs.

    Raises:
        ConfigError: It has no text encoder, or is a multimodal language model.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.backbone = load_backbone(name, device=device)
        if self.backbone.is_mllm or not self.backbone.has_text:
            raise ConfigError(
                f"shortlist is {name!r}, which isn't a CLIP-like backbone with a text encoder: choose one such as"
                " 'mini' or 'ViT-B-16/openai', or leave it empty."
            )
        self._memo: tuple[Any, Tensor] | None = None

    @torch.no_grad()
    def scores(self, pixels: Tensor, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Cosines [images, classes].

        Args:
            pixels: RGB in [0, 1], [images, 3, size, size].
            names: The classes.
            templates: Zero-shot templates.
        """
        plan = self.backbone.spec.preprocessing
        side = (plan.image_size, plan.image_size)
        sized = F.interpolate(pixels.float(), side, mode=plan.interpolation, antialias=True).clamp(0, 1)
        mean, std = (sized.new_tensor(three)[:, None, None] for three in (plan.mean, plan.std))
        key = (tuple(names), tuple(templates))
        if self._memo is None or self._memo[0] != key:
            self._memo = (key, zero_shot_weights(self.backbone, names, templates))
        features = self.backbone.encode_image((sized - mean) / std).float()
        return F.normalize(features, dim=-1) @ self._memo[1].T
