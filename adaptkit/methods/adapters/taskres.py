"""TaskRes: a trained residual for every class, added to its frozen text features.

Source: arXiv 2211.10277, Sec. 3; taskres sheet; reference code geekyutao/TaskRes, trainers/taskres.py.
Differs from the reference: underscores of class names become spaces (kept there; `keep_underscores` does so too); the
template list isn't extended in place; stored views instead of fresh crops in every epoch, unless asked for; an enhanced
base (TaskRes*) is taken as a matrix, since the reference doesn't say how its files were trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptkit.errors import AdapterError, ConfigError
from adaptkit.methods import methods
from adaptkit.methods.adapters._residual import ResidualMethod, rows_of
from adaptkit.methods.adapters._texts import count_correct, not_searched
from adaptkit.methods.base import MethodConfig, read_all
from adaptkit.storage import read_safetensors
from adaptkit.types import FitTask, TrainingLoop, TrainingSettings

SEARCHED_ALPHAS = (0.1, 0.3, 0.5, 0.7, 1.0)


@dataclass(frozen=True)
class TaskResConfig(MethodConfig):
    """Settings of TaskRes."""

    alpha: float = field(default=0.5, metadata={"help": "Share of the residual that is added (1.0 on Flowers102)."})
    base: str = field(
        default="zero-shot",
        metadata={
            "help": 'What it is added to: "zero-shot", or a safetensors file with a tensor "base" [classes, dim].'
        },
    )
    search_alpha: bool = field(
        default=False, metadata={"help": "Train with alpha 0.1, 0.3, 0.5, 0.7, 1.0, keep the best on validation shots."}
    )
    keep_underscores: bool = field(
        default=False, metadata={"help": "Keep the underscores of class names in prompts, as the reference does."}
    )

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"alpha is {self.alpha}, but must be a positive number.")
        if not self.base:
            raise ConfigError('base is empty, but must be "zero-shot" or the path of a safetensors file.')


@methods.register("taskres")
class TaskRes(ResidualMethod):
    """Class weights text + alpha · residual, the residual trained; unseen classes have none and are zero-shot.

    Attributes:
        alpha: Float buffer [].
        base: The base classifier [classes, dim] instead of the text features; only where the settings name one.
    """

    name = "taskres"
    config_class = TaskResConfig
    config: TaskResConfig
    default_training = TrainingSettings(epochs=200, batch_size=256, optimiser="adam", lr=2e-3, views=10)
    alpha: Tensor
    base: Tensor

    def build(self) -> None:
        super().build()
        self.keep_underscores = self.config.keep_underscores
        self.register_buffer("alpha", torch.tensor(float(self.config.alpha)))
        if self.config.base != "zero-shot":  # saved with the adapter: the file is needed by the fit alone
            self.register_buffer("base", torch.zeros_like(self.residual))

    def share(self) -> Tensor:
        return self.alpha

    def set_base(self, base: Tensor) -> None:
        """Put a base classifier [classes, dim] in the place of the text features of the fitted classes.

        Raises:
            ConfigError: The settings ask for the zero-shot base.
            AdapterError: Another shape, or values that aren't finite.
        """
        if self.config.base == "zero-shot":
            raise ConfigError('base is "zero-shot": set it to the file that the base comes from, or to "given".')
        if base.shape != self.residual.shape or not bool(torch.isfinite(base).all()):
            raise AdapterError(
                f"The base classifier has shape {tuple(base.shape)}; expected are finite numbers of shape"
                f" {tuple(self.residual.shape)}, one row a class in the order of the names."
            )
        self.base.copy_(base)
        self.classes_changed()

    def classes_changed(self) -> None:
        super().classes_changed()
        self._text_memo = None

    def base_weights(self) -> Tensor:
        if self.config.base == "zero-shot":
            return super().base_weights()
        return self._with_given(super().base_weights(), self.class_names)

    def _with_given(self, text: Tensor, names: Sequence[str]) -> Tensor:
        """The given base for fitted classes, text features for others."""
        fitted = set(self.fitted_names)
        seen = torch.tensor([[name in fitted] for name in names], device=text.device)
        return torch.where(seen, rows_of(self.base, self.fitted_names, names), text)

    def prepare(self, task: FitTask) -> None:
        super().prepare(task)
        if self.config.base in ("zero-shot", "given"):
            return
        found = read_safetensors(self.config.base)
        if "base" not in found:
            raise AdapterError(f'{self.config.base} has no tensor "base": it must hold one of shape [classes, dim].')
        self.set_base(found["base"].to(self.base))

    def fit(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        """Train; with `search_alpha` once for each alpha, of which the smallest of the best on `task.val` is kept."""
        why = not_searched(self.config.search_alpha, task.val)
        if why or loop is None or task.val is None:
            self.alpha.fill_(self.config.alpha)
            return {
                "alpha": self.config.alpha,
                **({} if not self.config.search_alpha else why),
                **super().fit(task, loop),
            }
        features, labels = read_all(task.val).to(self.alpha.device), task.val.labels
        best: tuple[int, float, dict[str, Any], Tensor] | None = None
        for alpha in SEARCHED_ALPHAS:
            self.alpha.fill_(alpha)
            report = super().fit(task, loop)
            right = count_correct(lambda rows: self(features[rows.to(features.device)]), len(labels), labels)
            if best is None or right > best[0]:
                best = (right, alpha, report, self.residual.detach().clone())
            if report.get("interrupted"):
                break
        right, alpha, report, residual = best  # type: ignore[misc]  # there is at least one alpha
        self.alpha.fill_(alpha)
        with torch.no_grad():
            self.residual.copy_(residual)
        tried = {"searched": True, "settings_tried": len(SEARCHED_ALPHAS), "val_images": len(labels)}
        return {**report, "alpha": alpha, **tried, "val_accuracy": right / len(labels)}

    def reference_key(self, key: str) -> str | None:
        return {"residual": "prompt_learner.text_feature_residuals"}.get(key)
