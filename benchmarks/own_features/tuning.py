"""Settings from training images alone: searched on a part of the shots that is held out, then used to fit all shots.

The published files have no images to spare for validation once the val split is tested on, and nothing may be chosen on
test images.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from adaptkit.backbones.base import Backbone
from adaptkit.data.features import FeatureStore
from adaptkit.data.few_shot import group_by_label
from adaptkit.data.splits import ValSplit
from adaptkit.errors import DataError
from adaptkit.evaluation.protocols import plan_run, run_method
from adaptkit.evaluation.tasks import Task

CHOSEN = ("alpha", "beta", "gamma", "c", "chosen_epoch")
"""What a method's report calls a setting that it chose."""

TUNED = ("linear-probe", "tip-adapter", "tip-adapter-f", "ape", "ape-t", "gda", "lp-plus-plus", "transclip")
"""Methods whose recipes choose settings on validation images, at a cost of the fit's own size."""

AFTER_TRAINING = ("tip-adapter-f", "ape-t")
"""Those of them that train with the starting values and choose afterwards: chosen values are put in after the fit."""


def held_out_task(task: Task) -> Task | None:
    """The task with a quarter of each class's shots (at least one) as validation images; None where there is one shot.

    Test images stay in it and aren't looked at.
    """
    shots = task.few_shot.shots
    if shots < 2:
        return None
    held = max(1, shots // 4)
    groups = group_by_label(task.train.labels).values()
    kept = np.concatenate([group[held:] for group in groups]).astype(np.int64)
    out = np.concatenate([group[:held] for group in groups]).astype(np.int64)
    part = task.train.subset(out)
    val = ValSplit(part.ids, part.labels, part.class_names, part.source, part.positions)
    return replace(task, train=task.train.subset(kept), val=val)


def chosen_overrides(method: str, backbone: Backbone, task: Task, store: FeatureStore) -> dict[str, float]:
    """Settings by name, chosen on held-out shots; {} where the recipe's stay.

    Args:
        method: Registered name.
        backbone: The run's.
        task: With one split of training images and no validation images.
        store: Of features.
    """
    smaller = held_out_task(task) if method in TUNED else None
    if smaller is None:
        return {}
    # the test parts aren't needed for a choice: one image keeps the run short
    few = replace(smaller.parts[0], split=smaller.parts[0].split.subset([0]), positions=smaller.parts[0].positions[:1])
    smaller = replace(smaller, parts=(few,))
    try:
        fit = run_method(plan_run(method, backbone, smaller), backbone, store=store).result.fit
    except DataError:  # too few shots are left for the method (gda needs two)
        return {}
    if not fit.get("searched"):
        return {}
    names = {"chosen_epoch": "epochs"}
    return {f"method.{names.get(key, key)}": fit[key] for key in CHOSEN if key in fit}
