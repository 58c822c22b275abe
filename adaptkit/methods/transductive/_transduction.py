"""What the transductive methods share: kept support features, checked batches, and warnings about their assumptions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.errors import AdapterError, AdaptKitWarning, ConfigError, DataError
from adaptkit.methods.base import Method, MethodConfig, read_all
from adaptkit.types import FitTask, TrainingLoop

_CHUNK_BYTES = 128e6  # bounds what is computed of a batch at once


@dataclass(frozen=True)
class TransductiveConfig(MethodConfig):
    """Settings that every transductive method has."""

    use_support: bool = field(
        default=True, metadata={"help": "Use the labelled shots (few-shot); without them it is zero-shot."}
    )
    effective_classes: int = field(
        default=0, metadata={"help": "How many classes a batch is assumed to hold; 0: all of them."}
    )
    query_batch: int = field(default=0, metadata={"help": "Test images taken together; 0: the whole test set."})
    max_support: int = field(
        default=64, metadata={"help": "At most this many shots per class are kept (and saved); the first ones."}
    )

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}, but must be {wanted}"
            for name, wanted, ok in (
                ("effective_classes", "0 (all) or more", self.effective_classes >= 0),
                ("query_batch", "0 (all) or more", self.query_batch >= 0),
                ("max_support", "at least 1", self.max_support >= 1),
                *self.limits(),
            )
            if not ok
        ]
        if problems:
            raise ConfigError(f"These settings can't be used: {'; '.join(problems)}.")

    def limits(self) -> tuple[tuple[str, str, bool], ...]:
        """(setting, what it must be, whether it is) of the method's own settings."""
        return ()


def positive(value: float) -> bool:
    """Whether a setting is a positive number."""
    return 0 < value < math.inf


@dataclass(frozen=True)
class Support:
    """Labelled shots among the current classes.

    Args:
        features: Unit rows [shots, dim].
        labels: Index among the current classes, int64 [shots].
    """

    features: Tensor
    labels: Tensor

    def one_hot(self, classes: int) -> Tensor:
        """float64 [shots, classes]."""
        return F.one_hot(self.labels, classes).double()


def effective_number(probabilities: Tensor) -> float:
    """How many classes a batch seems to hold: exp(entropy) of its mean prediction [images, classes].

    No labels are looked at. Unsure predictions make it larger than the truth, a biased classifier smaller.

    Example:
        >>> effective_number(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
        2.0
    """
    share = probabilities.double().mean(dim=0)
    return float(torch.special.entr(share).sum().exp())


def shot_indices(labels: Tensor, most: int) -> Tensor:
    """Indices of the first `most` images of each class, in order, int64 [kept]."""
    seen: dict[int, int] = {}
    kept = []
    for index, label in enumerate(labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= most:
            kept.append(index)
    return torch.tensor(kept, dtype=torch.int64)


class TransductiveMethod(Method):
    """A method whose answer for an image depends on the batch it comes in.

    Classes without shots are served too: they have no labelled anchor, only their names and the batch.

    Attributes:
        support: Unit features of the shots, [shots, dim]; empty before the fit and without `use_support`.
        support_labels: Index among the fitted classes of each, int64 [shots].
    """

    config_class = TransductiveConfig
    config: TransductiveConfig
    transductive = True
    support: Tensor
    support_labels: Tensor

    def build(self) -> None:
        self._set_support(torch.zeros(0, self.backbone.spec.embed_dim), torch.zeros(0, dtype=torch.int64))

    def _set_support(self, features: Tensor, labels: Tensor) -> None:
        self.register_buffer("support", features.to(self.backbone.device))
        self.register_buffer("support_labels", labels.to(self.backbone.device))

    def classes_changed(self) -> None:
        self._warned = False

    # --- fitting ------------------------------------------------------------------------------------------------------

    def fit(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        if len(self.fitted_names) < 2:
            raise DataError(f"{self.name} shares a batch out among classes, and this task has one: give it at least 2.")
        self.set_classes(self.fitted_names)
        features = read_all(task.train)
        kept = shot_indices(task.train.labels, self.config.max_support if self.config.use_support else 0)
        self._set_support(F.normalize(features[kept], dim=-1), task.train.labels[kept])
        return {"support_images": len(kept), **self.choose(task, loop)}

    def choose(self, task: FitTask, loop: TrainingLoop | None) -> dict[str, Any]:
        """Choose settings on validation images, once the support is kept; facts for the result."""
        return {}

    # --- answering ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """Log-assignments [batch, classes] of a batch of features [batch, dim], in fp32; all images count for each."""
        classes = len(self.class_names)
        if classes == 1 or not len(inputs):
            return torch.zeros(len(inputs), classes, device=inputs.device)
        with torch.autocast(inputs.device.type, enabled=False):
            f = F.normalize(inputs.float(), dim=-1)
            text = self.zero_shot().float()
            self._check_assumption(f, text)
            return self.answer(inputs, f, text, self.current_support()).float()

    def answer(self, inputs: Tensor, f: Tensor, text: Tensor, support: Support | None) -> Tensor:
        """`assign`, for methods that also need the features as they came, [batch, dim]."""
        return self.assign(f, text, support)

    def assign(self, f: Tensor, text: Tensor, support: Support | None) -> Tensor:
        """Log-assignments [batch, classes] whose argmax is the answer.

        Args:
            f: Unit features [batch, dim].
            text: Unit class weights [classes, dim].
            support: None if none of the current classes has shots.
        """
        raise NotImplementedError(f"{type(self).__name__} doesn't define assign.")

    def current_support(self) -> Support | None:
        """The shots of the current classes; None if there are none."""
        place = {name: index for index, name in enumerate(self.class_names)}
        new = torch.tensor([place.get(name, -1) for name in self.fitted_names], device=self.support.device)
        labels = new[self.support_labels]
        inside = labels >= 0
        return Support(self.support[inside], labels[inside]) if bool(inside.any()) else None

    # --- assumptions --------------------------------------------------------------------------------------------------

    def _check_assumption(self, f: Tensor, text: Tensor) -> None:
        """Warn, once for a class list, if the batch itself speaks against `effective_classes`."""
        if self._warned:
            return
        classes, assumed = len(text), self.config.effective_classes
        shares = [torch.softmax(self.cosine_logits(part, text), dim=-1).sum(dim=0) for part in self.chunks(f, classes)]
        found = effective_number(torch.stack(shares).sum(dim=0, keepdim=True) / len(f))
        if 0 < assumed < classes and found > 2 * assumed:
            said = f"at most {assumed} of the {classes} classes, but its zero-shot predictions spread over {found:.0f}"
            advice = "set effective_classes to what a batch holds (0: all), or answers collapse into few classes"
        elif (assumed == 0 or assumed >= classes) and min(found, len(f)) < classes / 2:
            said = (
                f"all {classes} classes, but its {len(f)} images' zero-shot predictions spread over {found:.0f}"
                if found <= len(f)
                else f"all {classes} classes, but it has {len(f)} images"
            )
            advice = "use larger batches, or set effective_classes to the number of classes in one"
        else:
            return
        self._warned = True
        warnings.warn(f"{self.name} assumes that a batch holds {said}: {advice}.", AdaptKitWarning, stacklevel=4)

    @staticmethod
    def chunks(f: Tensor, columns: int) -> tuple[Tensor, ...]:
        """The rows of `f` in parts of which `columns` float64 numbers a row fit the memory bound."""
        return torch.split(f, max(1, int(_CHUNK_BYTES / (8 * max(1, columns)))))

    # --- state --------------------------------------------------------------------------------------------------------

    def resize_for(self, state: Mapping[str, Tensor]) -> None:
        features, labels = state.get("support"), state.get("support_labels")
        if features is None or labels is None:
            return  # the caller says what is missing
        dim, classes = self.backbone.spec.embed_dim, len(self.fitted_names)
        if features.dim() != 2 or features.shape[1] != dim or labels.shape != features.shape[:1]:
            raise AdapterError(
                f"The adapter's support has features of shape {tuple(features.shape)} and labels of shape"
                f" {tuple(labels.shape)}; expected are [shots, {dim}] and [shots]: it was made for another backbone."
            )
        if labels.is_floating_point() or (len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes):
            raise AdapterError(f"The adapter's support has labels outside its {classes} classes: it is damaged.")
        if len(labels) > classes * self.config.max_support:
            raise AdapterError(
                f"The adapter's support has {len(labels)} shots, and its settings allow {self.config.max_support} for"
                f" each of {classes} classes: it is damaged."
            )
        self._set_support(torch.zeros(features.shape), torch.zeros(labels.shape, dtype=torch.int64))
