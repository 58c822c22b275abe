"""A small file of features for tests: classes as directions, images around them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from adaptkit.storage import write_safetensors

NAMES = ("red fox", "blue jay", "oak", "yew", "pine", "beech")
DIM = 16
METADATA = {"class_names": json.dumps(NAMES), "backbone": "some CLIP", "logit_scale": "50"}


def small_tensors(per_class: int = 8, sizes: tuple[str, ...] = ("train", "val", "test")) -> dict[str, torch.Tensor]:
    """Tensors of a file with six classes: splits, one text feature per class, two descriptions per class."""
    numbers = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=numbers)  # noqa: E731
    centres = F.normalize(draw(len(NAMES), DIM), dim=-1)
    tensors = {}
    for split in sizes:
        labels = torch.arange(len(NAMES)).repeat(per_class)
        tensors[f"{split}_features"] = 3 * F.normalize(centres[labels] + 0.15 * draw(len(labels), DIM), dim=-1)
        tensors[f"{split}_labels"] = labels
    tensors["text_features"] = 2 * F.normalize(centres + 0.3 * draw(len(NAMES), DIM), dim=-1)
    tensors["description_labels"] = torch.arange(len(NAMES)).repeat_interleave(2)
    tensors["description_features"] = centres[tensors["description_labels"]] + 0.1 * draw(2 * len(NAMES), DIM)
    return tensors


def write_small(path: Path, tensors: dict[str, torch.Tensor] | None = None, **metadata: str | None) -> Path:
    """Write such a file; a text of the metadata that is None is left out."""
    texts = {key: text for key, text in (METADATA | metadata).items() if text is not None}
    write_safetensors(path, small_tensors() if tensors is None else tensors, texts)
    return path
