"""Class weights that are the text features plus a trained residual: shared by TaskRes, CLAP and ZS-LP.

Training prototypes that start at the text features is training what is added to them: same steps, same gradients. Kept
this way an unseen class is served by its text features alone, and what is saved stays near zero.

Source: taskres and clap sheets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.methods.adapters._texts import check_few_shots, mean_text_features, trained_views
from adaptkit.methods.base import ClassWeightMethod, GradientMethod, read_all
from adaptkit.types import FitTask, NovelClasses, TrainingLoop, TrainingSettings


class ResidualMethod(ClassWeightMethod, GradientMethod):
    """scale · cosine(feature, t + share · x), with t the unnormalised text feature and x trained, one for each class.

    Attributes:
        residual: Trained x, [classes, dim]; zero at first, which is zero-shot. Unseen classes have none.
    """

    novel_classes: NovelClasses = "synthesised"
    keep_underscores: bool = False
    residual: nn.Parameter
    _text_memo: tuple[Any, Tensor] | None = None

    def build(self) -> None:
        self.residual = nn.Parameter(torch.zeros(len(self.fitted_names), self.backbone.spec.embed_dim))

    def text_of(self, names: Sequence[str]) -> Tensor:
        """The unnormalised text features t [classes, dim] of any classes."""
        return mean_text_features(self.backbone, names, self.templates, keep_underscores=self.keep_underscores)

    def base_weights(self) -> Tensor:
        """t [classes, dim] of the current classes, remembered for one class list."""
        key = self.texts_key
        if self._text_memo is None or self._text_memo[0] != key:
            self._text_memo = (key, self.text_of(self.class_names))
        return self._text_memo[1]

    def share(self) -> Tensor | float:
        """How much of the residual is added."""
        return 1.0

    def residual_rows(self) -> Tensor:
        """x [classes, dim] of the current classes, zero for those it wasn't fitted on."""
        return rows_of(self.residual, self.fitted_names, self.class_names)

    def class_weights(self) -> Tensor:
        return F.normalize(self.base_weights() + self.share() * self.residual_rows(), dim=-1)

    def prepare(self, task: FitTask) -> None:
        check_few_shots(self.name, task.train.labels, task.class_names)
        with torch.no_grad():
            self.residual.zero_()  # a fit starts at zero-shot, also the second one


def rows_of(values: Tensor, fitted: Sequence[str], names: Sequence[str]) -> Tensor:
    """Rows of `values` [fitted, dim] for `names`, zeros for those that aren't among `fitted`; differentiable."""
    if tuple(names) == tuple(fitted):
        return values
    place = {name: index for index, name in enumerate(fitted)}
    rows = torch.tensor([place.get(name, len(fitted)) for name in names], device=values.device)
    return torch.cat([values, values.new_zeros(1, values.shape[1])])[rows]


@dataclass(frozen=True)
class _Pool:
    """All stored views of few shots in one heap, from which an epoch's one batch is drawn."""

    features: Tensor
    labels: Tensor
    size: int

    def draw(self) -> tuple[Tensor, Tensor]:
        """A batch without repeats; torch's generator is the loop's, seeded for the run."""
        rows = torch.randperm(len(self.labels))[: self.size].to(self.features.device)
        return self.features[rows], self.labels[rows]


class PrototypeMethod(ResidualMethod):
    """Prototypes that start at the text features, trained as the CLAP repository does.

    Its epoch has as many batches as the shots fill (at least one), drawn from the heap of all stored views. Where the
    shots fill none, that one batch still has the full size, and holds several views of an image.
    """

    default_training = TrainingSettings(epochs=300, batch_size=256, lr=0.1, weight_decay=0.0, views=20)
    _pool: _Pool | None = None

    def fit(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        if loop is not None and not loop.settings.fresh_views:
            self._pool = self._make_pool(task, loop.settings.batch_size)
        size = 0 if self._pool is None else self._pool.size
        try:
            report = super().fit(task, loop)
        finally:
            self._pool = None
        return {**report, "batch_size": size} if size else report

    def _make_pool(self, task: FitTask, batch_size: int) -> _Pool | None:
        views = trained_views(task.train)
        images = len(task.train.labels)
        if images >= batch_size or len(views) < 2:
            return None
        features = torch.cat([read_all(task.train, view) for view in views]).to(self.backbone.device)
        labels = task.train.labels.repeat(len(views)).to(self.backbone.device)
        return _Pool(features, labels, min(batch_size, len(labels)))

    def losses(self, inputs: Tensor, labels: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        if self._pool is not None and self.training:
            inputs, labels = self._pool.draw()
        return {"ce": F.cross_entropy(self(inputs), labels)}

    def reference_key(self, key: str) -> str | None:
        return {"residual": "adapter.prototypes"}[key]

    def load_reference_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over a released file's prototypes [classes, dim]; what they add to the text features is kept."""
        super().load_reference_state(state)
        with torch.no_grad():
            self.residual.sub_(self.text_of(self.fitted_names))
        self.classes_changed()
