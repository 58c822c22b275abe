"""What adapters and heads share: unnormalised text means, image views as training rows, checks, validation accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptkit.backbones.base import Backbone
from adaptkit.errors import DataError
from adaptkit.types import Inputs

_ROWS = 1024


def text_examples(
    backbone: Backbone, names: Sequence[str], templates: Sequence[str], *, keep_underscores: bool = False
) -> Tensor:
    """Unnormalised text features [templates, classes, dim]; the underscores of a name become spaces, unless kept."""
    shown = [name if keep_underscores else name.replace("_", " ") for name in names]
    prompts = [template.format(name) for template in templates for name in shown]
    exact = torch.autocast(backbone.device.type, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), exact:  # made in inference mode, it couldn't serve training
        features = backbone.text_features(prompts).float().clone()
    return features.unflatten(0, (len(templates), len(names)))


def mean_text_features(
    backbone: Backbone, names: Sequence[str], templates: Sequence[str], *, keep_underscores: bool = False
) -> Tensor:
    """Mean over templates of the unnormalised text features, itself unnormalised, [classes, dim].

    Its length (several units for CLIP) sets what a step or a penalty on it means: it must not be normalised.
    """
    return text_examples(backbone, names, templates, keep_underscores=keep_underscores).mean(dim=0)


def trained_views(inputs: Inputs) -> range:
    """The augmented views, or the plain one where there is no other."""
    return range(1, inputs.num_views) if inputs.num_views > 1 else range(1)


def check_few_shots(name: str, labels: Tensor, class_names: Sequence[str]) -> None:
    """Refuse fewer than two classes, labels outside them, and classes without an image.

    Raises:
        DataError: With the first class that has no image.
    """
    if len(class_names) < 2:
        raise DataError(f"{name} needs at least two classes to tell apart, and the task has one: add another class.")
    if not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= len(class_names):
        raise DataError(
            f"{name} needs training images with labels 0 to {len(class_names) - 1}, in the order of the class names:"
            " check the labels."
        )
    counts = torch.bincount(labels.cpu(), minlength=len(class_names))
    absent = [class_names[index] for index in (counts == 0).nonzero()[:, 0].tolist()]
    if absent:
        raise DataError(
            f"{name} needs at least one image of every class, and there is none of {absent[0]!r}"
            f" ({len(absent)} such classes): add images, or leave the class out."
        )


@torch.no_grad()
def count_correct(logits_of: Callable[[Tensor], Tensor], count: int, labels: Tensor) -> int:
    """How many of `count` rows are answered right; `logits_of` maps indices [k] to logits [k, classes]."""
    right = 0
    for rows in torch.split(torch.arange(count), _ROWS):
        predicted = logits_of(rows).argmax(dim=-1)
        right += int((predicted == labels[rows].to(predicted.device)).sum())
    return right


def not_searched(search: bool, val: Inputs | None) -> dict[str, Any]:
    """Why nothing was chosen on validation images, as facts for the result; empty where something can be."""
    if not search:
        return {"searched": False, "why_not_searched": "search is off"}
    if val is None or not len(val.labels):
        return {"searched": False, "why_not_searched": "there are no validation images"}
    return {}
