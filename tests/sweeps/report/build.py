"""Runs made by hand, with predictions, for reports that need many and run none."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from adaptkit.evaluation.metrics import harmonic_mean
from adaptkit.evaluation.results import PREDICTIONS_FILE, RESULT_FILE, PartResult, RunResult
from adaptkit.storage import write_json, write_safetensors
from adaptkit.sweeps.results import RunRecord
from tests.sweeps.made import made_result

EMBEDDED = {"kind": "embedded", "version": "1"}
JSON = {"kind": "json", "path": "/data/eurosat/split_zhou_EuroSAT.json"}


def record(
    root: Path,
    method: str = "coop",
    accuracy: float | Mapping[str, float] = 0.5,
    *,
    images: int = 60,
    classes: int = 4,
    names: Sequence[str] = (),
    source: Mapping[str, Any] = EMBEDDED,
    notes: Sequence[str] = (),
    predictions: bool = True,
    changes: Mapping[str, Any] | None = None,
    **key: Any,
) -> RunRecord:
    """A finished run below `root`; `accuracy` is one number, or one per part. `changes` replace parts of the result."""
    result = made_result(method=method, **key)
    wanted = accuracy if isinstance(accuracy, Mapping) else {"all": accuracy}
    arrays: dict[str, np.ndarray] = {}
    parts = []
    for name, share in wanted.items():
        numbers = np.random.default_rng(zlib.crc32(f"{method} {name} {result.key.seed}".encode()))
        labels = np.arange(images) % classes
        right = numbers.permutation(images) < round(share * images)
        predicted = np.where(right, labels, (labels + 1 + numbers.integers(0, classes - 1, images)) % classes)
        arrays |= {
            f"{name}.index": np.arange(images, dtype=np.int32),
            f"{name}.labels": labels.astype(np.int32),
            f"{name}.predicted": predicted.astype(np.int32),
            f"{name}.confidence": numbers.uniform(0.3, 1, images).astype(np.float32),
        }
        parts.append(part_of(name, labels, predicted, classes))
    facts: dict[str, Any] = {
        "parts": tuple(parts),
        "class_names": tuple(names) or result.class_names,
        "dataset": {"name": result.key.dataset, "source": dict(source), "notes": list(notes)},
        "trained_parameters": 0 if method == "zero-shot" else 512,
        "recipe": f"{method}/{result.key.protocol}",
    }
    if "novel" in wanted:
        facts["harmonic_mean"] = harmonic_mean(parts[0].accuracy, parts[1].accuracy)
    result = replace(result, **{**facts, **(changes or {})})
    folder = root / result.key_digest[:16]
    return write(folder, result, arrays if predictions else {})


def part_of(name: str, labels: np.ndarray, predicted: np.ndarray, classes: int) -> PartResult:
    per_class = tuple(
        (int(((labels == label) & (predicted == label)).sum()), int((labels == label).sum()))
        for label in range(classes)
    )
    correct = int((labels == predicted).sum())
    return PartResult(name, classes, correct, len(labels), {"accuracy": correct / len(labels), "ece": 0.1}, per_class)


def write(folder: Path, result: RunResult, arrays: Mapping[str, np.ndarray]) -> RunRecord:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULT_FILE, asdict(result))
    if arrays:
        write_safetensors(folder / PREDICTIONS_FILE, arrays)
    return RunRecord(folder, result)


def seeds(root: Path, method: str, accuracies: Sequence[Any], **facts: Any) -> list[RunRecord]:
    """One run per accuracy, of seeds 1, 2, …"""
    return [record(root, method, value, seed=seed, **facts) for seed, value in enumerate(accuracies, start=1)]
