"""A run's result: one typed, versioned JSON document, its predictions and its adapter, in one folder.

A run counts as done when its `result.json` parses, has the key asked for and finite numbers; a folder that merely
exists counts for nothing.
"""

from __future__ import annotations

import functools
import math
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptkit.config import from_mapping
from adaptkit.errors import AdaptKitError, DataError, StorageError
from adaptkit.evaluation.metrics import harmonic_mean
from adaptkit.storage import digest_json, new_folder, read_json, write_json, write_safetensors

if TYPE_CHECKING:
    from adaptkit.methods.adapter import AdaptedModel

SCHEMA_VERSION = 1
SOURCE = "source"
"""The part that holds the source's own test images, where there are targets."""
RESULT_FILE = "result.json"
PREDICTIONS_FILE = "predictions.safetensors"
ADAPTER_FOLDER = "adapter"
_MAX_RESULT_BYTES = 64 * 2**20
_PACKAGES = ("torch", "torchvision", "open_clip_torch", "transformers", "scikit-learn", "numpy", "pillow")


@dataclass(frozen=True)
class PartResult:
    """Results on one part of what was tested: "all", "base" and "novel", or "source" and the targets by name.

    Args:
        name: Which part.
        num_classes: How many classes the model chose among.
        correct: Images whose first choice is right.
        total: Images.
        metrics: Full-precision metrics as fractions (see `adaptkit.evaluation.metrics`).
        per_class: (correct, total) for each class, in class order.
        fallback: True where the method can't serve these classes and its predictions are zero-shot.
        templates: For parts of another dataset than the one trained on: the templates its classes were described with;
            empty where a learned prompt stood in their place.
        class_names: The classes of the images, in label order, where they aren't those trained on.
    """

    name: str
    num_classes: int
    correct: int
    total: int
    metrics: dict[str, Any]
    per_class: tuple[tuple[int, int], ...]
    fallback: bool = False
    templates: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()

    @property
    def accuracy(self) -> float:
        """Share of right first choices, in [0, 1]."""
        return self.correct / self.total


@dataclass(frozen=True)
class RunKey:
    """Everything that changes a run's numbers; its digest names the run."""

    method: str
    backbone: str
    backbone_digest: str
    dataset: str
    split_digest: str
    protocol: str
    shots: int
    seed: int
    sampler: str
    settings: dict[str, Any]

    @property
    def digest(self) -> str:
        return digest_json(asdict(self))

    @property
    def marks(self) -> tuple[str, ...]:
        """How the task differs from the published protocol, for titles and warnings; empty where it doesn't."""
        given = self.settings
        marks = []
        if "class_split" in given:
            marks.append(f"random class split (seed {given['class_split']})")
        if "class_halves" in given:
            marks.append("class lists of one's own")
        if given.get("joint"):
            marks.append("joint: all classes are candidates for every image")
        if given.get("masking") == "names":
            marks.append("candidates by class list, not by masked logits")
        if "target_settings" in given:
            marks.append("settings chosen for each target")
        return tuple(marks)


@dataclass(frozen=True)
class RunResult:
    """One method on one task with one seed.

    Args:
        schema_version: Version of this layout.
        key: Everything that changes the numbers.
        key_digest: Digest of `key`.
        parts: Results by part of what was tested.
        harmonic_mean: Of base and novel accuracy, None for other protocols.
        trained_parameters: How many numbers were trained.
        adapter_bytes: Size of what was learned, on disk.
        seconds: By step: "features", "fit", "evaluate".
        peak_memory_bytes: Largest resident size of the process so far.
        images_encoded: Image views that had to be encoded for this run (0 where all were stored).
        few_shot_digest: Digest of the sampled image list.
        class_names: The classes, in label order.
        templates: Zero-shot templates.
        recipe: Name of the recipe, "" for none.
        tuned_on: What the settings were chosen on: "none", "val", "test" or "per-dataset-config".
        origins: Where each setting came from.
        fit: What the method reported.
        dataset: Facts about the data (source, notes).
        warnings: What a reader should know.
        environment: Versions, device, precision.
    """

    schema_version: int
    key: RunKey
    key_digest: str
    parts: tuple[PartResult, ...]
    harmonic_mean: float | None
    trained_parameters: int
    adapter_bytes: int
    seconds: dict[str, float]
    peak_memory_bytes: int
    images_encoded: int
    few_shot_digest: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    recipe: str = ""
    tuned_on: str = "none"
    origins: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> PartResult:
        """The part of that name."""
        for part in self.parts:
            if part.name == name:
                return part
        raise DataError(f"This run has no part {name!r}; it has {', '.join(p.name for p in self.parts)}.")

    @property
    def targets(self) -> tuple[PartResult, ...]:
        """The parts of other datasets than the one trained on; empty where the protocol has none."""
        return self.parts[1:] if self.parts[0].name == SOURCE else ()

    @property
    def target_average(self) -> float | None:
        """Mean accuracy of the targets, the source left out; None without targets."""
        return sum(part.accuracy for part in self.targets) / len(self.targets) if self.targets else None

    @property
    def drop(self) -> float | None:
        """By how much the targets' average is below the source's accuracy, where they are shifted versions of it."""
        shifted = self.key.protocol == "domain-generalisation" and self.target_average is not None
        return self.parts[0].accuracy - self.target_average if shifted and self.target_average is not None else None

    @property
    def among_all(self) -> tuple[float, ...]:
        """Base and novel accuracy and their harmonic mean where all classes are candidates; () where not asked."""
        found = [part.metrics.get("among_all") for part in self.parts]
        if self.harmonic_mean is None or not all(found):
            return ()
        base, novel = (float(one["accuracy"]) for one in found[:2] if one)
        return base, novel, harmonic_mean(base, novel)

    @property
    def score(self) -> float:
        """What methods are ranked by: the targets' average or H where there is one, else accuracy."""
        if self.target_average is not None:
            return self.target_average
        return self.parts[0].accuracy if self.harmonic_mean is None else self.harmonic_mean


@dataclass(frozen=True)
class Predictions:
    """First choices on one part of what was tested, image by image.

    Args:
        part: Which part.
        index: Position in its dataset's test split, [n].
        labels: True class within the part, [n].
        predicted: First choice, [n].
        confidence: Its probability, [n].
    """

    part: str
    index: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray


def write_run(
    folder: str | Path,
    result: RunResult,
    predictions: Iterable[Predictions],
    model: AdaptedModel,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a run's folder: result, predictions, adapter. It appears whole or not at all."""
    from adaptkit.methods.adapter import save_adapter

    arrays = {}
    for item in predictions:
        arrays[f"{item.part}.index"] = item.index.astype(np.int32)
        arrays[f"{item.part}.labels"] = item.labels.astype(np.int32)
        arrays[f"{item.part}.predicted"] = item.predicted.astype(np.int32)
        arrays[f"{item.part}.confidence"] = item.confidence.astype(np.float32)
    with new_folder(folder, overwrite=overwrite) as building:
        write_safetensors(building / PREDICTIONS_FILE, arrays)
        save_adapter(building / ADAPTER_FOLDER, model, adapter_facts(result))
        write_json(building / RESULT_FILE, asdict(result))
    return Path(folder)


def adapter_facts(result: RunResult) -> dict[str, Any]:
    """The facts about a run that its adapter's card shows."""
    facts: dict[str, Any] = {
        "dataset": result.key.dataset,
        "protocol": result.key.protocol,
        "shots": result.key.shots,
        "seed": result.key.seed,
        "split digest": result.key.split_digest,
        "few-shot digest": result.few_shot_digest,
    }
    for part in result.parts:
        where = "" if part.name == "all" else f", {part.name}" if result.targets else f", {part.name} classes"
        facts[f"test accuracy{where}"] = f"{100 * part.accuracy:.1f} % of {part.total}"
    if result.target_average is not None:
        facts["test accuracy, mean of targets"] = f"{100 * result.target_average:.1f} %"
    if result.drop is not None:
        facts["drop from source to targets"] = f"{100 * result.drop:.1f} points"
    if result.key.marks:
        facts["marks"] = "; ".join(result.key.marks)
    if result.tuned_on not in ("none", "val"):
        facts["caution"] = f"settings were chosen on: {result.tuned_on}"
    return facts


def read_run(folder: str | Path) -> RunResult:
    """Read and check a run's `result.json`.

    Raises:
        DataError: There is none, it is damaged, or a number in it isn't finite.
    """
    path = Path(folder) / RESULT_FILE
    if not path.is_file():
        raise DataError(f"{folder} is not a finished run: it has no {RESULT_FILE}.")
    try:
        result = from_mapping(RunResult, read_json(path, max_bytes=_MAX_RESULT_BYTES), where=RESULT_FILE)
    except (StorageError, AdaptKitError) as error:
        raise DataError(f"{path} is damaged ({error}): run it again.") from error
    counted = all(0 <= part.correct <= part.total > 0 for part in result.parts)
    if not result.parts or not counted or not all(math.isfinite(number) for number in result.seconds.values()):
        raise DataError(f"{path} holds no finite results: run it again.")
    if result.key.digest != result.key_digest:
        raise DataError(f"{path} doesn't match its own key: it was changed by hand or cut off; run it again.")
    return result


def is_done(folder: str | Path, key: RunKey) -> bool:
    """Whether the folder holds a finished run of exactly this key; one that Ctrl-C ended early isn't finished."""
    try:
        result = read_run(folder)
    except DataError:
        return False
    return result.key_digest == key.digest and not result.fit.get("interrupted")


def environment(device: str, precision: str) -> dict[str, Any]:
    """Versions and hardware, for the result."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "precision": precision,
        "versions": {package: _version(package) for package in _PACKAGES},
    }


@functools.cache  # a sweep asks for every run, and each answer takes a millisecond
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far, in bytes; 0 where the system doesn't say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def headline(result: RunResult) -> Mapping[str, Any]:
    """The few numbers that tables show, as fractions."""
    numbers: dict[str, Any] = {"method": result.key.method}
    numbers.update({part.name: part.accuracy for part in result.parts})
    if result.harmonic_mean is not None:
        numbers["H"] = result.harmonic_mean
    if result.target_average is not None:
        numbers["average"] = result.target_average
    if result.drop is not None:
        numbers["drop"] = result.drop
    numbers["trained_parameters"] = result.trained_parameters
    numbers["seconds"] = sum(result.seconds.values())
    return numbers
