"""GDA: a Gaussian per class with one shared covariance, in closed form, added to zero-shot; nothing is trained.

Source: arXiv 2402.04087; gda sheet; reference code mrflogs/ICLR24, main_few_shots.py and main_base2new.py.
Differs from the reference: alpha is searched on validation shots only (its ImageNet script searches on the test set);
the regularised covariance is inverted by Cholesky; the feature width stands where it writes 512; the estimator of its
base-to-novel script, which does not shrink, is the setting `shrinkage=False` (novel classes are always shrunken, as
there). Of very many samples only an even part is kept to make novel classes from. Kept: every augmented view counts as
a sample of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.errors import AdapterError, ConfigError, DataError
from adaptkit.methods import methods
from adaptkit.methods.base import Method, MethodConfig, progress_of, read_all
from adaptkit.methods.folding import Fold, MatrixHead
from adaptkit.types import FitTask, Inputs, NovelClasses, TrainingLoop, TrainingSettings

_ROWS = 8192  # samples, or validation images, that are worked on at a time
_NOVEL_BYTES = 64e6  # bounds the neighbours of the novel classes that are worked on at a time


@dataclass(frozen=True)
class GDAConfig(MethodConfig):
    """Settings of GDA."""

    alpha: float = field(default=0.1, metadata={"help": "Weight of the Gaussians beside zero-shot, before any search."})
    search: bool = field(default=True, metadata={"help": "Choose alpha on the validation shots, where there are any."})
    min_exponent: int = field(default=-4, metadata={"help": "The search tries powers of ten from this exponent …"})
    max_exponent: int = field(default=2, metadata={"help": "… to this one."})
    shrinkage: bool = field(
        default=True,
        metadata={"help": "Shrink the covariance; false is the paper's base-to-novel estimator, for many samples."},
    )
    neighbours: int = field(default=64, metadata={"help": "Samples nearest to a novel class's text that stand for it."})
    text_copies: int = field(default=16, metadata={"help": "How often its text itself counts in a novel class's mean."})
    max_features: int = field(
        default=32768, metadata={"help": "Samples kept to make novel classes from; 0: they are answered zero-shot."}
    )
    scale: float = field(default=100.0, metadata={"help": "Factor of the zero-shot cosine; 100 as in the reference."})

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}, but must be {wanted}"
            for name, wanted, ok in (
                ("alpha", "0 or more", 0 <= self.alpha < math.inf),
                ("min_exponent", "from -30 to 30", -30 <= self.min_exponent <= 30),
                ("max_exponent", "from min_exponent to 30", self.min_exponent <= self.max_exponent <= 30),
                ("neighbours", "at least 2", self.neighbours >= 2),
                ("text_copies", "0 or more", self.text_copies >= 0),
                ("max_features", "0 or more", self.max_features >= 0),
                ("scale", "a positive number", 0 < self.scale < math.inf),
            )
            if not ok
        ]
        if problems:
            raise ConfigError(f"These settings can't be used: {'; '.join(problems)}.")

    def alphas(self) -> list[float]:
        """The grid of the search, smallest first."""
        return [10.0**exponent for exponent in range(self.min_exponent, self.max_exponent + 1)]


@dataclass(frozen=True)
class Gaussians:
    """Normal distributions that share their covariance.

    Args:
        means: float64 [classes, dim].
        precision: float64 [dim, dim].
    """

    means: Tensor
    precision: Tensor

    def classifier(self) -> tuple[Tensor, Tensor]:
        """Bayes' rule with equal priors as weight [classes, dim] and bias [classes], fp32."""
        weight = self.means @ self.precision  # [classes, dim]; the precision is symmetric
        bias = -math.log(len(self.means)) - 0.5 * (weight * self.means).sum(dim=1)
        return weight.float(), bias.float()


def sample_views(inputs: Inputs) -> range:
    """The views that count as samples: the augmented ones, or the plain one where there is no other."""
    return range(1, inputs.num_views) if inputs.num_views > 1 else range(1)


def _unit_views(inputs: Inputs) -> Iterator[Tensor]:
    for view in sample_views(inputs):
        yield F.normalize(read_all(inputs, view), dim=-1)  # [n, dim]


def estimate(inputs: Inputs, names: tuple[str, ...], *, shrinkage: bool = True) -> Gaussians:
    """Class means and the shared precision of all views' unit features, one view in memory at a time.

    With shrinkage the precision is dim · ((n - 1) S + tr(S) I)⁻¹, S the covariance of the centred samples (divisor
    n - 1); without, it is the pseudo-inverse of the classes' own covariances' mean.

    Raises:
        DataError: A class has no image, or the samples don't vary within the classes.
    """
    labels = inputs.labels.cpu()
    counts = labels.bincount(minlength=len(names)).double() * len(sample_views(inputs))  # [classes]
    _check_counts(counts, names, shrinkage)
    means = _class_sums(inputs, labels, len(names)) / counts[:, None]
    weights = torch.ones_like(counts) if shrinkage else 1 / ((counts - 1) * len(names))
    scatter = _scatter(inputs, labels, means, weights.sqrt())
    samples, dim = float(counts.sum()), len(scatter)
    trace = float(scatter.trace())
    if not trace > 1e-10:
        raise DataError(
            "The images of each class have all the same features, so there is no spread to estimate: give more shots,"
            " or augmented views (training.views)."
        )
    if not shrinkage:
        return Gaussians(means, torch.linalg.pinv(scatter, hermitian=True))
    scatter.diagonal().add_(trace / (samples - 1))
    return Gaussians(means, dim * torch.cholesky_inverse(torch.linalg.cholesky(scatter)))


def _check_counts(counts: Tensor, names: tuple[str, ...], shrinkage: bool) -> None:
    absent = [name for name, count in zip(names, counts.tolist(), strict=True) if not count]
    if len(names) < 2:
        raise DataError("gda needs at least two classes to tell apart.")
    if absent:
        raise DataError(
            f"gda needs at least one image of every class, and there is none of {absent[0]!r} ({len(absent)} such"
            " classes): add images, or leave the class out."
        )
    least = float(counts.max() if shrinkage else counts.min())
    if least < 2:
        raise DataError(
            "gda estimates how samples spread within a class, and there is only one sample of a class: give more shots,"
            " or augmented views (training.views)."
        )


def _class_sums(inputs: Inputs, labels: Tensor, classes: int) -> Tensor:
    """Sum of each class's samples, float64 [classes, dim]."""
    views = _unit_views(inputs)
    per_image = next(views).cpu().double()  # [n, dim]
    for features in views:
        per_image += features.cpu().double()
    return per_image.new_zeros(classes, per_image.shape[1]).index_add_(0, labels, per_image)


def _scatter(inputs: Inputs, labels: Tensor, means: Tensor, weights: Tensor) -> Tensor:
    """Sum over samples of c cᵀ, float64 [dim, dim], c being weight of the class · (sample - mean of the class)."""
    total = means.new_zeros(means.shape[1], means.shape[1])
    centres, weights = means.float(), weights.float()
    for features in _unit_views(inputs):
        for rows in torch.split(torch.arange(len(labels)), _ROWS):
            own = labels[rows]
            centred = (features[rows].cpu() - centres[own]) * weights[own, None]  # [rows, dim]
            total += (centred.T @ centred).double()  # centred first, so that fp32 products are exact enough
    return total


def synthesise(text: Tensor, features: Tensor, neighbours: int, copies: int) -> Gaussians:
    """Gaussians of classes without images, from their unit text weights and other classes' unit features.

    A class's mean is that of the features nearest to its text and `copies` of the text; its covariance is the
    neighbours' around the text, shrunken; the precisions are averaged. With A [dim, neighbours] the neighbours minus
    the text and t = tr(A Aᵀ) / (neighbours - 1), (A Aᵀ + t I)⁻¹ = (I - A (t I + Aᵀ A)⁻¹ Aᵀ) / t: nothing of size
    [classes, dim, dim] is made.

    Source: gda sheet, "Base-to-novel".

    Args:
        text: [classes, dim].
        features: [n, dim], n ≥ 2.
        neighbours: How many; all there are where there are fewer.
        copies: Of the text.
    """
    dim, near = text.shape[1], min(neighbours, len(features))
    means, diagonal = [], text.new_zeros((), dtype=torch.float64)
    product = text.new_zeros(dim, dim, dtype=torch.float64)
    per_class = max(4 * len(features), 3 * 8 * near * dim)
    for part in torch.split(text, max(1, int(_NOVEL_BYTES / per_class))):
        nearest = features[(part @ features.T).topk(near, dim=1).indices].double()  # [part, near, dim]
        means.append((nearest.sum(dim=1) + copies * part.double()) / (near + copies))
        away = nearest - part.double()[:, None]  # Aᵀ, [part, near, dim]
        trace = away.square().sum(dim=(1, 2)) / (near - 1)  # [part]
        trace = trace.clamp_min(1e-12)[:, None, None]
        small = away @ away.mT + trace * torch.eye(near, dtype=away.dtype, device=away.device)
        root = torch.linalg.solve_triangular(torch.linalg.cholesky(small), away, upper=False) / trace.sqrt()
        diagonal += (1 / trace).sum()
        flat = root.flatten(0, 1)  # [part · near, dim]
        product += flat.T @ flat
    precision = dim * (diagonal * torch.eye(dim, dtype=product.dtype, device=product.device) - product) / len(text)
    return Gaussians(torch.cat(means), precision)


@methods.register("gda")
class GDA(Method):
    """Gaussian discriminant analysis on the shots' features beside zero-shot, in closed form; nothing is trained.

    Attributes:
        weight: Of the fitted classes, [classes, dim]; zeros before the fit, when it predicts zero-shot.
        bias: [classes].
        features: Samples that novel classes are made from, [kept, dim].
        alpha: Float buffer [].
    """

    name = "gda"
    config_class = GDAConfig
    config: GDAConfig
    novel_classes: NovelClasses = "synthesised"
    mixes_classes = False  # one covariance serves fitted classes, another new ones
    default_training = TrainingSettings(epochs=0, views=10, crop_scale=0.5)  # read for its views only
    weight: Tensor
    bias: Tensor
    features: Tensor
    alpha: Tensor
    _made: tuple[Any, tuple[Tensor, Tensor]] | None = None

    def build(self) -> None:
        classes, dim = len(self.fitted_names), self.backbone.spec.embed_dim
        self.register_buffer("weight", torch.zeros(classes, dim))
        self.register_buffer("bias", torch.zeros(classes))
        self.register_buffer("features", torch.zeros(0, dim))
        self.register_buffer("alpha", torch.tensor(float(self.config.alpha)))
        if not self.config.max_features:
            self.novel_classes = "zero-shot"

    def classes_changed(self) -> None:
        self._made = None

    # --- logits -------------------------------------------------------------------------------------------------------

    def forward(self, inputs: Tensor) -> Tensor:
        if self.uses_fallback:
            return self.cosine_logits(inputs, self.zero_shot())
        with torch.autocast(inputs.device.type, enabled=False):
            f = F.normalize(inputs.float(), dim=-1)
            return self.clip_logits(f) + self.alpha * self.scores(f)  # [batch, classes]

    def clip_logits(self, f: Tensor) -> Tensor:
        """Zero-shot logits [batch, classes] of unit features [batch, dim]."""
        return self.config.scale * f @ self.zero_shot().T

    def scores(self, f: Tensor) -> Tensor:
        """What the Gaussians say, not yet weighed by alpha: [batch, classes] of unit features [batch, dim]."""
        weight, bias = self.classifier()
        return F.linear(f, weight, bias)

    def classifier(self) -> tuple[Tensor, Tensor]:
        """Weight [classes, dim] and bias [classes] of the current classes."""
        if self.class_names == self.fitted_names:
            return self.weight, self.bias
        if not self.all_novel:
            rows = self.fitted_indices()
            return self.weight[rows], self.bias[rows]
        key = (self.texts_key, id(self.features), self.features._version, self.features.device)
        if self._made is None or self._made[0] != key:
            self._made = (key, self._synthesised())
        return self._made[1]

    @torch.no_grad()
    def _synthesised(self) -> tuple[Tensor, Tensor]:
        text = self.zero_shot()
        if len(self.features) < 2:  # not fitted yet
            return torch.zeros_like(text), text.new_zeros(len(text))
        return synthesise(text, self.features, self.config.neighbours, self.config.text_copies).classifier()

    def fold(self) -> Fold:
        if self.uses_fallback:
            return Fold(self.cosine_head(self.zero_shot()))
        weight, bias = self.classifier()
        return Fold(MatrixHead(self.config.scale * self.zero_shot() + self.alpha * weight, bias=self.alpha * bias))

    # --- fit ----------------------------------------------------------------------------------------------------------

    def fit(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        self.set_classes(self.fitted_names)
        views = len(sample_views(task.train))
        progress_of(loop)(f"{self.name}: estimating the covariance", 0, 2)
        weight, bias = estimate(task.train, task.class_names, shrinkage=self.config.shrinkage).classifier()
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        self.alpha.fill_(self.config.alpha)
        self._keep(self._part_of(task.train))
        progress_of(loop)(f"{self.name}: searching alpha", 1, 2)
        facts = {"samples": views * len(task.train.labels), "kept_features": len(self.features)}
        return {**facts, **self._search(task)}

    def _keep(self, features: Tensor) -> None:
        self.register_buffer("features", features.to(self.backbone.device))

    def _part_of(self, inputs: Inputs) -> Tensor:
        """At most `max_features` unit features: as many whole views as fit, or else every so-manyth image of one."""
        count, most = len(inputs.labels), self.config.max_features
        views = list(sample_views(inputs))[: max(1, most // max(1, count))]
        rows = torch.arange(count)
        if count > most:
            rows = torch.linspace(0, count - 1, most).round().long()
        return torch.cat([F.normalize(read_all(inputs, view), dim=-1)[rows] for view in views])

    @torch.no_grad()
    def _search(self, task: FitTask) -> dict[str, Any]:
        """Choose alpha by validation accuracy: the first of the best; the starting value where none gets one right."""
        facts = {"alpha": float(self.alpha), "searched": False}
        if not self.config.search:
            return {**facts, "why_not_searched": "search is off"}
        if task.val is None or not len(task.val.labels):
            return {**facts, "why_not_searched": "there are no validation images"}
        alphas, images = self.config.alphas(), len(task.val.labels)
        correct = torch.zeros(len(alphas), dtype=torch.int64)
        for f, labels in zip(
            torch.split(F.normalize(read_all(task.val), dim=-1), _ROWS),
            torch.split(task.val.labels, _ROWS),
            strict=True,
        ):
            f, labels = f.to(self.backbone.device), labels.to(self.backbone.device)
            clip, scores = self.clip_logits(f), self.scores(f)
            correct += torch.stack([((clip + a * scores).argmax(dim=1) == labels).sum() for a in alphas]).cpu()
        best = int(correct.argmax())  # the first of equals
        if int(correct[best]):
            self.alpha.fill_(alphas[best])
            facts["alpha"] = alphas[best]
        return {
            **facts,
            "searched": True,
            "settings_tried": len(alphas),
            "val_images": images,
            "val_accuracy": int(correct[best]) / images,
        }

    # --- state --------------------------------------------------------------------------------------------------------

    def resize_for(self, state: Mapping[str, Tensor]) -> None:
        features, dim = state.get("features"), self.backbone.spec.embed_dim
        if features is None:
            return  # the caller says what is missing
        if features.dim() != 2 or features.shape[1] != dim:
            raise AdapterError(
                f"The adapter's features have shape {tuple(features.shape)}, [samples, {dim}] was expected: it was made"
                " for another backbone."
            )
        self._keep(torch.zeros(features.shape))
