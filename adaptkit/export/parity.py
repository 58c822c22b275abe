"""How near an exported model comes to its adapter: from image files on, preprocessing included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adaptkit.data.images import load_rgb
from adaptkit.data.transforms import to_pixels
from adaptkit.errors import UnsupportedError
from adaptkit.evaluation.calibration import Calibration, warning_about
from adaptkit.export.formats import Answer
from adaptkit.export.probes import Probes
from adaptkit.export.standalone import in_set, probabilities, read_rgb, to_input
from adaptkit.methods.adapter import AdaptedModel
from adaptkit.types import ProgressCallback

_BATCH = 16
_ALLOWED = 1e-3
"""How far logits of a model in full precision may be from the adapter's, relative to the largest."""


@dataclass(frozen=True)
class Promise:
    """What is said about sets of labels.

    Args:
        calibration: What held-out images taught.
        coverage: How often the true class shall be in the set, between 0 and 1.
    """

    calibration: Calibration
    coverage: float

    def to_dict(self) -> dict[str, Any]:
        """What it rests on, and a warning where that is too little ("" where it isn't)."""
        images = len(self.calibration.scores)
        return {"held_out": images, "coverage": self.coverage, "warning": warning_about(images, self.coverage)}


def measure(
    model: AdaptedModel,
    probes: Probes,
    answers: Mapping[str, Answer],
    progress: ProgressCallback,
    promise: Promise | None = None,
) -> dict[str, Any]:
    """Ask the adapter and what was written about the same image files, each by its own preprocessing.

    Args:
        model: The adapter.
        probes: The files.
        answers: What answers, by the name of its file.
        progress: Told how far it is.
        promise: Of a calibrated adapter: sets are compared as well.

    Returns:
        Largest difference of an input's values, and for each file the largest difference of a logit, the largest logit,
        the share of images with the same first class (and the same set), and with labels the accuracy (and how often
        the true class is in the set); plain values for JSON.
    """
    settings = model.backbone.spec.preprocessing.to_dict()
    wanted: list[NDArray[np.float32]] = []
    given: dict[str, list[NDArray[np.float32]]] = {name: [] for name in answers}
    apart = 0.0
    for start in range(0, len(probes.files), _BATCH):
        files = probes.files[start : start + _BATCH]
        ours = torch.stack([to_pixels(load_rgb(file), model.backbone.spec.preprocessing) for file in files])
        theirs = np.stack([to_input(read_rgb(file), settings) for file in files])
        apart = max(apart, float(np.abs(ours.numpy() - theirs).max()))
        with torch.no_grad():
            wanted.append(model(ours.to(model.backbone.device)).float().cpu().numpy())
        for name, answer in answers.items():
            given[name].append(answer(theirs))
        progress("comparing with the adapter", start + len(files), len(probes.files))
    reference, labels = np.concatenate(wanted), np.array(probes.labels)
    known = labels >= 0
    report: dict[str, Any] = {
        "probes": {"images": len(labels), "what": probes.what, "labelled": int(known.sum())},
        "inputs_max_difference": apart,
        "models": {},
    }
    inside = None
    if promise is not None:
        report["sets"] = promise.to_dict()
        calibration = promise.calibration
        inside = calibration.sets(calibration.probabilities(reference.astype(np.float64)), promise.coverage)
    for name, parts in given.items():
        logits = np.concatenate(parts)
        facts = _compared(logits, reference) | _right("", logits, labels)
        if promise is not None and inside is not None:
            facts |= _compared_sets(logits, inside, labels, promise)
        report["models"][name] = facts
    return report | _right("adapter_", reference, labels) | _covered("adapter_", inside, labels)


def _compared(logits: NDArray[np.float32], wanted: NDArray[np.float32]) -> dict[str, Any]:
    return {
        "max_difference": float(np.abs(logits - wanted).max()),
        "largest_logit": float(np.abs(wanted).max()),
        "top1_agreement": float((logits.argmax(1) == wanted.argmax(1)).mean()),
    }


def _compared_sets(
    logits: NDArray[np.float32], wanted: NDArray[np.bool_], labels: NDArray[np.int64], promise: Promise
) -> dict[str, Any]:
    """What people get who copy the README's lines, beside the adapter's own sets."""
    odds = probabilities(logits, promise.calibration.temperature)
    inside = in_set(odds, promise.calibration.scores, promise.coverage)
    return {"same_sets": float((inside == wanted).all(axis=1).mean())} | _covered("", inside, labels)


def _right(prefix: str, logits: NDArray[np.float32], labels: NDArray[np.int64]) -> dict[str, float]:
    """The accuracy, where images have labels."""
    known = labels >= 0
    return {f"{prefix}accuracy": float((logits.argmax(1) == labels)[known].mean())} if known.any() else {}


def _covered(prefix: str, inside: NDArray[np.bool_] | None, labels: NDArray[np.int64]) -> dict[str, float]:
    """How often the true class is in the set, and how many classes a set holds, where images have labels."""
    rows = np.flatnonzero(labels >= 0)
    if inside is None or not len(rows):
        return {}
    return {
        f"{prefix}coverage": float(inside[rows, labels[rows]].mean()),
        f"{prefix}set_size": float(inside[rows].sum(axis=1).mean()),
    }


def check_near(facts: Mapping[str, Any], path: Path) -> None:
    """Refuse a model in full precision that doesn't answer as its adapter does.

    Raises:
        UnsupportedError: It doesn't.
    """
    if not facts["max_difference"] <= _ALLOWED * max(1.0, facts["largest_logit"]):
        raise UnsupportedError(
            f"{path.name} answers otherwise than the adapter (logits differ by {facts['max_difference']:.3g}), so"
            " nothing was written: use the adapter folder itself, and report this."
        )
