"""Zero-shot: the frozen backbone's own answer from class names, one template or an ensemble of them.

Source: arXiv 2103.00020, Sec. 3.1; datasets sheet, section 6; reference code KaiyangZhou/CoOp, trainers/zsclip.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adaptkit.methods import methods
from adaptkit.methods.base import ClassWeightMethod
from adaptkit.types import FitTask, TrainingLoop


@methods.register("zero-shot")
class ZeroShot(ClassWeightMethod):
    """Nothing is learned; several templates are averaged per class."""

    name = "zero-shot"

    def class_weights(self) -> Tensor:
        return self.zero_shot()

    def fit(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        return {"templates": len(self.templates)}
