"""The registry of adaptation methods: one file each, found by its name, imported on first use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adaptkit.registry import Registry

if TYPE_CHECKING:
    from adaptkit.methods.base import Method

methods: Registry[type[Method]] = Registry("method", entry_points="adaptkit.methods")
methods.discover(__name__, Path(__file__).parent)

__all__ = ["methods"]
