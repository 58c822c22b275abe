"""LP++: a linear probe plus zero-shot, each class weighing the two itself, with step sizes computed from the data.

Source: arXiv 2404.02285, Sec. 3; lp_plus_plus sheet; reference code FereshteShakeri/FewShot-CLIP-Strong-Baseline,
methods/linear_probe_p2.py.
Differs from the reference: fp32 (fp16 there); any number of shots a class; the chosen epoch is kept (test accuracies
are recorded at every epoch there). Kept: weights start at the sum of the shots, a bias drawn at random, and the
gradient of alpha, which is never cleared there (`alpha_grad: accumulate`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.errors import ConfigError, TrainingError
from adaptkit.methods import methods
from adaptkit.methods.adapters._texts import check_few_shots, count_correct, not_searched
from adaptkit.methods.base import Method, MethodConfig, progress_of, read_all
from adaptkit.methods.caches._cache import view_mean_keys
from adaptkit.methods.folding import Fold, MatrixHead
from adaptkit.types import FitTask, NovelClasses, TrainingLoop, TrainingSettings

ALPHA_FACTOR = 250.0
_PROGRESS_EPOCHS = 10


@dataclass(frozen=True)
class LPPlusPlusConfig(MethodConfig):
    """Settings of LP++."""

    alpha_grad: Literal["accumulate", "fresh"] = field(
        default="accumulate",
        metadata={"help": "Gradient of a step of alpha: of all epochs so far (as published), or of the last (fresh)."},
    )
    epochs: int = field(default=300, metadata={"help": "Steps over all shots at once."})
    alpha_every: int = field(default=10, metadata={"help": "Alpha takes a step after every so many epochs."})
    momentum: float = field(default=0.9, metadata={"help": "Momentum of the weights' and the bias's steps."})
    select_epoch: bool = field(
        default=True, metadata={"help": "Keep the last epoch with the best accuracy on validation shots, if any."}
    )

    def __post_init__(self) -> None:
        if self.alpha_grad not in ("accumulate", "fresh"):
            raise ConfigError(f"alpha_grad is {self.alpha_grad!r}, but must be accumulate or fresh.")
        for name, value in (("epochs", self.epochs), ("alpha_every", self.alpha_every)):
            if value < 1:
                raise ConfigError(f"{name} is {value}, but must be at least 1.")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum is {self.momentum}, but must be at least 0 and below 1.")


@dataclass(frozen=True)
class Support:
    """The shots: unit features `x` [n, dim], their text cosines [n, classes], labels, and the two step sizes."""

    x: Tensor
    cosines: Tensor
    labels: Tensor
    lr_weight: float
    lr_alpha: float


@dataclass(frozen=True)
class Gradients:
    """The mean cross-entropy `loss`, and its gradients."""

    loss: Tensor
    weight: Tensor
    bias: Tensor
    alpha: Tensor


def step_sizes(x: Tensor, cosines: Tensor) -> tuple[float, float]:
    """Of weights and bias 4 n / λmax(xᵀx), of alpha n / (4 · max over classes of Σ cosines²): inverse curvatures.

    Source: lp_plus_plus sheet, "Step sizes" (arXiv 2404.02285, Sec. 3.3).
    """
    gram = x.T @ x if len(x) > x.shape[1] else x @ x.T  # both have the same largest eigenvalue
    largest = float(torch.linalg.eigvalsh(gram)[-1])
    steepest = float(cosines.square().sum(dim=0).max())
    if not largest > 0 or not steepest > 0:
        raise TrainingError("The shots' features are all zero, or orthogonal to all texts: LP++ has no step size then.")
    return 4 * len(x) / largest, len(x) / (4 * steepest)


@methods.register("lp-plus-plus")
class LPPlusPlus(Method):
    """x·w + b + alpha · x·text, trained on all shots at once; novel classes are answered zero-shot.

    Attributes:
        weight: [classes, dim].
        bias: [classes].
        alpha: What zero-shot weighs, [classes].
    """

    name = "lp-plus-plus"
    config_class = LPPlusPlusConfig
    config: LPPlusPlusConfig
    novel_classes: NovelClasses = "zero-shot"
    default_training = TrainingSettings(epochs=0, views=1, crop_scale=0.5)  # read for its views only
    _rows: Tensor | None = None

    def build(self) -> None:
        classes, dim = len(self.fitted_names), self.backbone.spec.embed_dim
        self.weight = nn.Parameter(torch.zeros(classes, dim))
        self.bias = nn.Parameter(torch.empty(classes).uniform_(-(dim**-0.5), dim**-0.5, generator=self.generator))
        self.alpha = nn.Parameter(torch.full((classes,), float(self.backbone.logit_scale)))

    def classes_changed(self) -> None:
        self._rows = None if self.uses_fallback else self.fitted_indices()

    def forward(self, inputs: Tensor) -> Tensor:
        if self._rows is None:
            return self.cosine_logits(inputs, self.zero_shot())
        with torch.autocast(inputs.device.type, enabled=False):
            x, rows = F.normalize(inputs.float(), dim=-1), self._rows.to(self.weight.device)
            return F.linear(x, self.weight[rows], self.bias[rows]) + self.alpha[rows] * (x @ self.zero_shot().T)

    def fold(self) -> Fold:
        if self._rows is None:
            return Fold(self.cosine_head(self.zero_shot()))
        rows = self._rows.to(self.weight.device)
        both = self.weight[rows] + self.alpha[rows, None] * self.zero_shot()  # [classes, dim]
        return Fold(MatrixHead(both, bias=self.bias[rows]))

    # --- fitting ------------------------------------------------------------------------------------------------------

    def fit(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        """Train on the mean of the stored augmented views (one by default); choose the epoch on `task.val`, if any."""
        self.set_classes(self.fitted_names)
        check_few_shots(self.name, task.train.labels, task.class_names)
        support = self.start(view_mean_keys(task.train), task.train.labels)
        facts: dict[str, Any] = {"lr_weight": support.lr_weight, "lr_alpha": support.lr_alpha}
        facts |= {"initial_alpha": float(self.alpha[0].detach()), "epochs": self.config.epochs}
        why = not_searched(self.config.select_epoch, task.val)
        if why or task.val is None:
            return {**facts, **why, **self.train_epochs(support, loop)}
        features, labels = F.normalize(read_all(task.val), dim=-1).to(self.weight.device), task.val.labels
        best: dict[str, Any] = {"right": -1}

        def choose(epoch: int) -> None:
            right = count_correct(lambda rows: self(features[rows.to(features.device)]), len(labels), labels)
            if right >= best["right"]:  # ties go to later epochs
                state = {key: value.clone() for key, value in self.adapter_state().items()}
                best.update(right=right, epoch=epoch + 1, state=state)

        report = self.train_epochs(support, loop, choose)
        self.load_adapter_state(best["state"])
        chosen = {"chosen_epoch": best["epoch"], "val_accuracy": best["right"] / len(labels), "val_images": len(labels)}
        return {**facts, "searched": True, "settings_tried": self.config.epochs, **chosen, **report}

    @torch.no_grad()
    def start(self, x: Tensor, labels: Tensor) -> Support:
        """Put weights and alpha where training starts, from unit features `x` [n, dim]; the bias stays as drawn."""
        x, labels = x.to(self.weight.device), labels.to(self.weight.device)
        cosines = x @ self.zero_shot().T  # [n, classes]
        self.weight.zero_().index_add_(0, labels, x)  # the sum of a class's shots, not their mean
        own = cosines.gather(1, labels[:, None])[:, 0]
        sums, counts = torch.zeros_like(self.bias), torch.zeros_like(self.bias)
        means = sums.index_add(0, labels, own) / counts.index_add(0, labels, torch.ones_like(own))
        self.alpha.fill_(ALPHA_FACTOR * means.mean())
        return Support(x, cosines, labels, *step_sizes(x, cosines))

    @torch.no_grad()
    def gradients(self, support: Support) -> Gradients:
        """Mean cross-entropy over all shots and its gradients, written out."""
        logits = F.linear(support.x, self.weight, self.bias) + self.alpha * support.cosines  # [n, classes]
        log_p = logits.log_softmax(dim=-1)
        rows = torch.arange(len(log_p), device=log_p.device)
        loss = -log_p[rows, support.labels].mean()
        error = log_p.exp()
        error[rows, support.labels] -= 1
        error /= len(error)
        return Gradients(loss, error.T @ support.x, error.sum(dim=0), (error * support.cosines).sum(dim=0))

    @torch.no_grad()
    def train_epochs(self, support: Support, loop: TrainingLoop | None = None, after: Any = None) -> dict[str, Any]:
        """All epochs; `after(epoch)` is called when one is done.

        Raises:
            TrainingError: The loss isn't finite.
        """
        config, progress = self.config, progress_of(loop)
        speed_w, speed_b = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        alpha_grad = torch.zeros_like(self.alpha)
        losses: list[float] = []
        for epoch in range(config.epochs):
            now = self.gradients(support)
            losses.append(float(now.loss))
            if not math.isfinite(losses[-1]):
                raise TrainingError(f"{self.name}'s loss became {losses[-1]} in epoch {epoch + 1}: check the features.")
            self.weight.sub_(speed_w.mul_(config.momentum).add_(now.weight), alpha=support.lr_weight)
            self.bias.sub_(speed_b.mul_(config.momentum).add_(now.bias), alpha=support.lr_weight)
            alpha_grad = alpha_grad + now.alpha if config.alpha_grad == "accumulate" else now.alpha
            if (epoch + 1) % config.alpha_every == 0:
                self.alpha.sub_(alpha_grad, alpha=support.lr_alpha)
            if after is not None:
                after(epoch)
            if (epoch + 1) % _PROGRESS_EPOCHS == 0:
                progress(f"{self.name}: loss {losses[-1]:.4f}", epoch + 1, config.epochs)
        return {"losses": losses}
