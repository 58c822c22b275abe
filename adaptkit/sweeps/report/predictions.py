"""The stored first choices of runs, read when a test or a plot needs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from adaptkit.errors import AdaptKitError
from adaptkit.evaluation.results import PREDICTIONS_FILE, Predictions
from adaptkit.storage import read_safetensors
from adaptkit.sweeps.results import RunRecord

_FIELDS = ("index", "labels", "predicted", "confidence")


class PredictionReader:
    """Predictions by run and part; what was read last is kept, what can't be read is remembered with its reason."""

    def __init__(self) -> None:
        self._kept: dict[Path, dict[str, Predictions]] = {}
        self.problems: dict[Path, str] = {}

    def read(self, record: RunRecord) -> dict[str, Predictions]:
        """A run's predictions by part; {} where there are none, or they don't fit the result."""
        folder = record.folder
        if folder not in self._kept:
            try:
                self._kept[folder] = _read(record)
            except AdaptKitError as error:
                self._kept[folder], self.problems[folder] = {}, str(error)
        return self._kept[folder]

    def forget(self) -> None:
        """Drop what was read, so that memory stays flat over many groups."""
        self._kept.clear()


def _read(record: RunRecord) -> dict[str, Predictions]:
    arrays = {name: value.numpy() for name, value in read_safetensors(record.folder / PREDICTIONS_FILE).items()}
    found = {}
    for part in record.result.parts:
        columns = [arrays[key] for name in _FIELDS if (key := f"{part.name}.{name}") in arrays]
        if [column.shape for column in columns] != [(part.total,)] * len(_FIELDS):
            continue
        predictions = Predictions(part.name, *columns)
        classes = part.num_classes
        inside = all(((v >= 0) & (v < classes)).all() for v in (predictions.labels, predictions.predicted))
        right = int((predictions.labels == predictions.predicted).sum())
        if inside and right == part.correct and bool(np.isfinite(predictions.confidence).all()):
            found[part.name] = predictions
    if len(found) < len(record.result.parts):
        raise AdaptKitError(f"{record.folder / PREDICTIONS_FILE} doesn't fit the result beside it: run it again.")
    return found
