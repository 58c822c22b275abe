"""How near an exported model comes to its adapter: from image files on, preprocessing included."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adaptkit.data.images import load_rgb
from adaptkit.data.transforms import to_pixels
from adaptkit.errors import UnsupportedError
from adaptkit.export.formats import Answer
from adaptkit.export.probes import Probes
from adaptkit.export.standalone import read_rgb, to_input
from adaptkit.methods.adapter import AdaptedModel
from adaptkit.types import ProgressCallback

_BATCH = 16
_ALLOWED = 1e-3
"""How far logits of a model in full precision may be from the adapter's, relative to the largest."""


def measure(
    model: AdaptedModel, probes: Probes, answers: Mapping[str, Answer], progress: ProgressCallback
) -> dict[str, Any]:
    """Ask the adapter and what was written about the same image files, each by its own preprocessing.

    Args:
        model: The adapter.
        probes: The files.
        answers: What answers, by the name of its file.
        progress: Told how far it is.

    Returns:
        Largest difference of an input's values, and for each file the largest difference of a logit, the largest logit,
        the share of images with the same first class, and with labels the accuracy; plain values for JSON.
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
        "models": {name: _compared(np.concatenate(parts), reference, labels) for name, parts in given.items()},
    }
    if known.any():
        report["adapter_accuracy"] = float((reference.argmax(1) == labels)[known].mean())
    return report


def _compared(logits: NDArray[np.float32], wanted: NDArray[np.float32], labels: NDArray[np.int64]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "max_difference": float(np.abs(logits - wanted).max()),
        "largest_logit": float(np.abs(wanted).max()),
        "top1_agreement": float((logits.argmax(1) == wanted.argmax(1)).mean()),
    }
    known = labels >= 0
    if known.any():
        facts["accuracy"] = float((logits.argmax(1) == labels)[known].mean())
    return facts


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
