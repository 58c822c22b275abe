"""Linear probe: logistic regression on frozen image features, its strength chosen on validation shots.

Source: arXiv 2103.00020 (few-shot probes); linear_probe sheet; reference code KaiyangZhou/CoOp, lpclip/linear_probe.py.
Differs from the reference: without validation shots the regularisation is the one of openai/CLIP's read-me example
(C = 0.316) instead of an error, and a second solver of ours has the same objective.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.errors import ConfigError, DataError
from adaptkit.methods import methods
from adaptkit.methods.adapters._texts import not_searched
from adaptkit.methods.base import Method, MethodConfig, progress_of, read_all
from adaptkit.methods.folding import Fold, MatrixHead
from adaptkit.types import FitTask, NovelClasses, TrainingLoop

COARSE_C = (1e6, 1e4, 1e2, 1.0, 1e-2, 1e-4, 1e-6)
"""The first round of the search, in the order in which a tie keeps the earlier one."""

FINE_STEPS = 8

MOST_FITS = len(COARSE_C) + 1 + FINE_STEPS
"""The coarse round, then both ends, then one new end a step."""


@dataclass(frozen=True)
class LinearProbeConfig(MethodConfig):
    """Settings of the linear probe."""

    solver: Literal["lbfgs", "torch-lbfgs"] = field(
        default="lbfgs", metadata={"help": "lbfgs (scikit-learn's) or torch-lbfgs (the same objective, in torch)."}
    )
    search: bool = field(default=True, metadata={"help": "Choose C on the validation shots, where there are any."})
    c: float = field(
        default=0.316, metadata={"help": "Inverse regularisation without a search; larger is weaker regularisation."}
    )
    max_iterations: int = field(default=1000, metadata={"help": "Iterations a fit may take."})

    def __post_init__(self) -> None:
        if self.solver not in ("lbfgs", "torch-lbfgs"):
            raise ConfigError(f"Solver {self.solver!r} is unknown: choose lbfgs or torch-lbfgs.")
        if not 0 < self.c < math.inf:
            raise ConfigError(f"c is {self.c}, but must be a positive number.")
        if self.max_iterations < 1:
            raise ConfigError(f"max_iterations is {self.max_iterations}, but must be at least 1.")


@dataclass(frozen=True)
class Fit:
    """One fitted classifier: `weight` [classes, dim], `bias` [classes], and whether its solver converged."""

    weight: Tensor
    bias: Tensor
    converged: bool


@methods.register("linear-probe")
class LinearProbe(Method):
    """A linear classifier on unnormalised features; closed-set, so novel classes are answered zero-shot."""

    name = "linear-probe"
    config_class = LinearProbeConfig
    config: LinearProbeConfig
    novel_classes: NovelClasses = "zero-shot"
    needs_text = False

    def build(self) -> None:
        classes, dim = len(self.fitted_names), self.backbone.spec.embed_dim
        self.weight = nn.Parameter(torch.zeros(classes, dim))
        self.bias = nn.Parameter(torch.zeros(classes))
        if not self.backbone.has_text:
            self.novel_classes = "refused"  # there is no text encoder to answer zero-shot with

    def classes_changed(self) -> None:
        self._rows = None if self.uses_fallback else self.fitted_indices()

    def forward(self, inputs: Tensor) -> Tensor:
        if self._rows is None:
            return self.cosine_logits(inputs, self.zero_shot())
        rows = self._rows.to(self.weight.device)
        return F.linear(inputs.to(self.weight.dtype), self.weight[rows], self.bias[rows])  # [batch, classes]

    def fold(self) -> Fold:
        if self._rows is None:
            return Fold(self.cosine_head(self.zero_shot()))
        return Fold(MatrixHead(self.weight[self._rows], bias=self.bias[self._rows], normalise=False))

    def fit(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        """Fit, searching C on `task.val` where there is one; only view 0 is used (the probe knows no augmentation)."""
        features, labels = read_all(task.train).cpu(), task.train.labels.cpu()
        _check_labels(labels, task.class_names)
        solve = _scikit_fit if self.config.solver == "lbfgs" else _torch_fit
        fits: dict[float, Fit] = {}
        progress = progress_of(loop)

        def fit_at(c: float) -> Fit:
            if c not in fits:  # the end that a search step keeps would otherwise be fitted twice
                progress(f"{self.name} with C = {c:.3g}", len(fits), MOST_FITS)
                fits[c] = solve(features, labels, c, self.config.max_iterations)
            return fits[c]

        report: dict[str, Any] = {"c": self.config.c, **not_searched(self.config.search, task.val)}
        if "why_not_searched" not in report and task.val is not None:
            report = _search(fit_at, read_all(task.val).cpu(), task.val.labels.cpu())
        chosen = fit_at(report["c"])
        with torch.no_grad():
            self.weight.copy_(chosen.weight)
            self.bias.copy_(chosen.bias)
        return {**report, "fits": len(fits), "fits_not_converged": sum(not fit.converged for fit in fits.values())}


def _check_labels(labels: Tensor, names: tuple[str, ...]) -> None:
    if len(names) < 2:
        raise DataError("A linear probe needs at least two classes to tell apart.")
    present = set(labels.tolist())
    absent = [name for index, name in enumerate(names) if index not in present]
    if absent:
        raise DataError(
            f"A linear probe needs at least one image of every class, and there is none of {absent[0]!r}"
            f" ({len(absent)} such classes): add images, or leave the class out."
        )


def _search(fit_at: Callable[[float], Fit], features: Tensor, labels: Tensor) -> dict[str, Any]:
    """Coarse, then fine search of C by validation accuracy.

    Source: linear_probe sheet, "Hyper-parameter search". A coarse tie keeps the first, a fine tie the left end; the
    winner is the better end of the last step, not the best of all steps.
    """

    def accuracy(c: float) -> float:
        fit = fit_at(c)
        return float((F.linear(features, fit.weight, fit.bias).argmax(dim=-1) == labels).float().mean())

    coarse = max(COARSE_C, key=accuracy)  # max keeps the first of equals
    left, right = 0.1 * coarse, 10 * coarse
    winner = left
    for _ in range(FINE_STEPS):
        middle = 10 ** (0.5 * (math.log10(left) + math.log10(right)))
        if accuracy(right) > accuracy(left):
            winner, left = right, middle
        else:
            winner, right = left, middle
    return {"c": winner, "searched": True, "val_accuracy": accuracy(winner), "val_images": len(labels)}


def _scikit_fit(features: Tensor, labels: Tensor, c: float, max_iterations: int) -> Fit:
    """scikit-learn's logistic regression; two classes come as one row, which is shared out between both."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, solver="lbfgs", max_iter=max_iterations)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(features.numpy(), labels.numpy())
    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    weight = torch.from_numpy(model.coef_).float()
    return _both_rows(weight, torch.from_numpy(model.intercept_).float(), converged)


def _torch_fit(features: Tensor, labels: Tensor, c: float, max_iterations: int) -> Fit:
    """The same objective by torch's L-BFGS, in double precision: ½‖W‖² + C · Σ cross-entropy; the bias goes free."""
    classes = int(labels.max()) + 1
    rows = 1 if classes == 2 else classes  # scikit-learn's convention, which sets what ‖W‖ counts
    x = features.double()
    theta = torch.zeros(rows, x.shape[1] + 1, dtype=torch.float64, requires_grad=True)  # last column: bias
    optimiser = torch.optim.LBFGS(
        [theta],
        max_iter=max_iterations,
        max_eval=3 * max_iterations,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )
    scale = 1 / (1 + c * len(x))  # the same minimum, with gradients of a size that the tolerances fit

    def objective() -> Tensor:
        weight, bias = theta[:, :-1], theta[:, -1]
        logits = F.linear(x, weight, bias)  # [n, rows]
        if rows == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)  # [n, 2]
        return scale * (0.5 * weight.square().sum() + c * F.cross_entropy(logits, labels, reduction="sum"))

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = objective()
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    steps = optimiser.state[theta]["n_iter"]
    fitted = theta.detach().float()
    return _both_rows(fitted[:, :-1], fitted[:, -1], steps < max_iterations)


def _both_rows(weight: Tensor, bias: Tensor, converged: bool) -> Fit:
    """A one-row (two-class) fit as two rows with the same probabilities."""
    if len(weight) == 1:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return Fit(weight, bias, converged)
