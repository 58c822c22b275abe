"""The registry of adaptation methods: one file each, found by its name, imported on first use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adaptkit.registry import Registry

if TYPE_CHECKING:
    from adaptkit.methods.base import Method

methods: Registry[type[Method]] = Registry("method", entry_points="adaptkit.methods")
methods.discover(__name__, Path(__file__).parent)

CLIP_ROWS = ("zero-shot", "clip-adapter")
"""Always beside a multimodal language model, on a CLIP: what the language model has to be worth its cost against.

Source: mllm sheet `base-to-novel.md`, fairness rule 3.
"""

__all__ = ["CLIP_ROWS", "methods"]
