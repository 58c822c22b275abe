"""The digest that identifies a backbone: weights, preprocessing, tokenizer and text settings in one sha256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptkit.backbones.base import Preprocessing


def backbone_digest(tensors: Mapping[str, Tensor], preprocessing: Preprocessing, facts: Mapping[str, Any]) -> str:
    """The sha256 (64 hex digits) of everything that changes what a backbone computes.

    Args:
        tensors: Every weight and buffer by name; the order doesn't matter, shape and dtype do.
        preprocessing: The plain test transform.
        facts: What isn't a tensor: sizes, activation, tokenizer, pooling, logit scale. Plain JSON values.
    """
    digest = hashlib.sha256()
    plain = {"preprocessing": preprocessing.to_dict(), "facts": dict(facts)}
    digest.update(json.dumps(plain, sort_keys=True, ensure_ascii=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
