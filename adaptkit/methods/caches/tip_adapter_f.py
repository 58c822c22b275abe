"""Tip-Adapter-F: Tip-Adapter whose cache keys are then trained.

Source: arXiv 2207.09519, Sec. 3.2; tip_adapter sheet; reference code gaopengcuhk/Tip-Adapter, main.py.
Differs from the reference: fp32; the last epoch counts (it keeps the epoch with the best test accuracy, and reports the
larger of two test numbers); the search uses validation shots only.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adaptkit.methods import methods
from adaptkit.methods.base import GradientMethod
from adaptkit.methods.caches._cache import CacheMethod, trainable_keys
from adaptkit.types import FitTask, TrainingSettings


@methods.register("tip-adapter-f")
class TipAdapterF(CacheMethod, GradientMethod):
    """Trains the keys at the starting alpha and beta, then searches both again; keys aren't normalised again."""

    name = "tip-adapter-f"
    reference_names = ("best_F", "values")
    default_training = TrainingSettings(
        epochs=20,
        batch_size=256,
        optimiser="adamw",
        lr=1e-3,
        eps=1e-4,
        weight_decay=0.01,
        schedule="cosine-step",
        warmup_epochs=0,
        views=10,
        crop_scale=0.5,
    )

    def _keep_keys(self, keys: Tensor) -> None:
        self.keys = trainable_keys(keys)

    def prepare(self, task: FitTask) -> None:
        self.build_cache(task)

    def finish(self, task: FitTask) -> dict[str, Any]:
        return {"keys": len(self.keys), **self.search(task)}
