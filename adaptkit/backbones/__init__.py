"""Frozen models: `load_backbone(name)` and what it returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptkit.backbones.base import Backbone, BackboneSpec, Preprocessing, Tokens
    from adaptkit.backbones.load import load_backbone

__all__ = ["Backbone", "BackboneSpec", "Preprocessing", "Tokens", "load_backbone"]


def __getattr__(name: str) -> Any:  # torch is imported on first use only
    if name == "load_backbone":
        from adaptkit.backbones.load import load_backbone

        return load_backbone
    if name in __all__:
        from adaptkit.backbones import base

        return getattr(base, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
