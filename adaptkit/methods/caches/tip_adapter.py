"""Tip-Adapter: a training-free cache of the shots' features beside zero-shot.

Source: arXiv 2207.09519, Sec. 3.1; tip_adapter sheet; reference code gaopengcuhk/Tip-Adapter, main.py and utils.py.
Differs from the reference: fp32; alpha and beta are searched on validation shots only (its ImageNet script searches on
the test set); without validation shots the starting values stay, and the report says so.
"""

from __future__ import annotations

from typing import Any

from adaptkit.methods import methods
from adaptkit.methods.caches._cache import CacheMethod
from adaptkit.types import FitTask, TrainingLoop, TrainingSettings


@methods.register("tip-adapter")
class TipAdapter(CacheMethod):
    """Keys are the shots' features averaged over augmented views; nothing is trained."""

    name = "tip-adapter"
    default_training = TrainingSettings(epochs=0, views=10, crop_scale=0.5)  # read for its views only

    def fit(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        self.build_cache(task)
        return {"keys": len(self.keys), **self.search(task, loop)}
