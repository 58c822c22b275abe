"""What single images tell: which classes gain, which are confused, with small pictures where the data is at hand."""

from __future__ import annotations

import base64
import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from adaptkit.errors import AdaptKitError
from adaptkit.evaluation.results import SOURCE, Predictions
from adaptkit.evaluation.tasks import Task, load_task
from adaptkit.sweeps.report.aggregate import Cell, Group
from adaptkit.sweeps.report.plots import Pairs
from adaptkit.sweeps.report.predictions import PredictionReader
from adaptkit.sweeps.report.repeat import spec_of
from adaptkit.sweeps.results import RunRecord

MOST_PAIRS = 8
PICTURES_PER_PAIR = 3
_SIDE = 56
_SMALL = 32


@dataclass(frozen=True)
class Confusion:
    """A pair of classes that a method confuses.

    Args:
        true: What the images show.
        answered: What the method says.
        count: How often, over all seeds.
        share: Of the answers about images of the true class, a fraction.
        pictures: `data:` addresses of a few such images.
    """

    true: str
    answered: str
    count: int
    share: float
    pictures: tuple[str, ...] = ()


class Images:
    """The test images and class names of a group, as far as its dataset is still there.

    Args:
        record: Any run of the group.
        wanted: False to look for nothing.

    Attributes:
        problem: Why there are none, one sentence; "" where there are.
    """

    def __init__(self, record: RunRecord, *, wanted: bool = True) -> None:
        self._result = record.result
        self.problem = "" if wanted else "pictures weren't asked for"
        self._task = self._load() if wanted else None

    def _load(self) -> Task | None:
        spec = spec_of(self._result)
        if spec is None:
            self.problem = "the result doesn't say where the images are"
            return None
        try:
            # images left out of training were only ever training images, and looking for them opens every file
            task = load_task(replace(spec, skip_unreadable=False))
            same = spec.skip_unreadable or task.dataset.digest == self._result.key.split_digest
        except (AdaptKitError, OSError) as error:
            self.problem = f"the dataset can't be loaded here: {error}"
            return None
        if not same:
            self.problem = "the dataset has other images now than when the runs were made"
            return None
        return task

    def names(self, part: str, classes: int) -> list[str]:
        """Class names of a part, in its own order; numbers where they aren't known."""
        stored = next((found.class_names for found in self._result.parts if found.name == part), ())
        names = stored or (() if part == "novel" else self._result.class_names)  # else those trained on
        if len(names) == classes:
            return list(names)
        return [f"{part} class {number}" for number in range(classes)]

    def pictures(self, predictions: Predictions, places: Sequence[int]) -> list[str]:
        """Small pictures of the images at some places of a part; those that can't be opened are left out."""
        if self._task is None:
            return []
        part = next((tested for tested in self._task.parts if tested.name == predictions.part), None)
        if part is None or not np.array_equal(part.split.labels, predictions.labels):
            return []
        found = []
        for place in places:
            try:
                found.append(data_address(part.split.image(place)))
            except (AdaptKitError, OSError) as error:
                self.problem = f"some images can't be opened: {error}"
        return found


def data_address(image: Image.Image) -> str:
    """A small copy of an image as a `data:` address; no file name or metadata goes with it."""
    small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    kind = "png" if max(small.size) <= _SMALL else "jpeg"
    stream = io.BytesIO()
    small.save(stream, kind, **({"optimize": True} if kind == "png" else {"quality": 80}))
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


# --- from predictions -------------------------------------------------------------------------------------------------


def kind_of(part: str) -> str:
    """How a part is called where targets are taken together."""
    return part if part in ("all", "base", "novel", SOURCE) else "targets"


def confidence_pairs(cell: Cell, reader: PredictionReader) -> dict[str, Pairs]:
    """Confidences and hits by kind of part, those of all seeds; {} without predictions."""
    gathered: dict[str, list[Predictions]] = defaultdict(list)
    for record in cell.runs:
        for part, predictions in reader.read(record).items():
            if part != "all" or len(record.result.parts) == 1:  # "all" beside base and novel holds the same images
                gathered[kind_of(part)].append(predictions)
    return {
        kind: (
            np.clip(np.concatenate([item.confidence for item in found]).astype(np.float64), 0, 1),
            np.concatenate([item.predicted == item.labels for item in found]),
        )
        for kind, found in gathered.items()
    }


def class_gains_of(cell: Cell, zero_shot: Cell, images: Images) -> list[tuple[str, str, float]]:
    """(class, kind of part, gain over zero-shot), of the classes that have test images; means over the seeds."""
    gains = []
    for index, part in enumerate(cell.first.parts):
        reference = next((other for other in zero_shot.first.parts if other.name == part.name), None)
        if reference is None or len(reference.per_class) != len(part.per_class):
            continue
        if part.name == "all" and len(cell.first.parts) > 1:
            continue
        names = images.names(part.name, len(part.per_class))
        runs = [record.result.parts[index].per_class for record in cell.runs]
        ours = _class_accuracy([run for run in runs if len(run) == len(part.per_class)])
        theirs = _class_accuracy([reference.per_class])
        where = f"{part.name}: " if kind_of(part.name) == "targets" else ""
        for name, before, after in zip(names, theirs, ours, strict=True):
            if np.isfinite(before) and np.isfinite(after):
                gains.append((where + name, kind_of(part.name), float(after - before)))
    return gains


def _class_accuracy(runs: Sequence[Sequence[tuple[int, int]]]) -> np.ndarray:
    """Accuracy by class over all runs, NaN for classes without a test image."""
    correct, total = np.asarray(runs, dtype=np.float64).sum(axis=0).T
    return np.divide(correct, total, out=np.full_like(correct, np.nan), where=total > 0)


def confusions(cell: Cell, reader: PredictionReader, images: Images) -> list[Confusion]:
    """The pairs of classes that a method confuses most, over all seeds and parts."""
    counts: Counter[tuple[str, int, int]] = Counter()
    examples: dict[tuple[str, int, int], tuple[Predictions, list[int]]] = {}
    totals: Counter[tuple[str, int]] = Counter()
    classes = {part.name: part.num_classes for part in cell.first.parts}
    for record in cell.runs:
        whole = {part.name for part in record.result.parts if classes.get(part.name) == part.num_classes}
        for name, predictions in reader.read(record).items():
            if name in whole and (name != "all" or len(record.result.parts) == 1):
                _count(name, predictions, counts, examples, totals)
    found = []
    for (part, true, answered), count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_PAIRS]:
        names = images.names(part, classes[part])
        predictions, places = examples[part, true, answered]
        pictures = tuple(images.pictures(predictions, places[:PICTURES_PER_PAIR]))
        found.append(Confusion(names[true], names[answered], count, count / totals[part, true], pictures))
    return found


def _count(
    part: str,
    predictions: Predictions,
    counts: Counter[tuple[str, int, int]],
    examples: dict[tuple[str, int, int], tuple[Predictions, list[int]]],
    totals: Counter[tuple[str, int]],
) -> None:
    """Add one run's wrong answers."""
    for label, number in zip(*np.unique(predictions.labels, return_counts=True), strict=True):
        totals[part, int(label)] += int(number)
    for place in np.flatnonzero(predictions.labels != predictions.predicted).tolist():
        pair = (part, int(predictions.labels[place]), int(predictions.predicted[place]))
        counts[pair] += 1
        kept = examples.setdefault(pair, (predictions, []))
        if kept[0] is predictions:
            kept[1].append(place)


def reliability_panels(group: Group, reader: PredictionReader, most: int) -> Mapping[str, Mapping[str, Pairs]]:
    """Confidences of zero-shot and of the best methods of a group, best first."""
    chosen = [cell for cell in (group.zero_shot,) if cell is not None]
    chosen += [cell for cell in group.cells if cell is not group.zero_shot][: most - len(chosen)]
    found = {cell.label: confidence_pairs(cell, reader) for cell in chosen}
    return {label: parts for label, parts in found.items() if parts}
