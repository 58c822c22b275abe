"""What a plan will take: time, memory and disk, from earlier runs where there are some, else from a rough model.

The model: an image view costs what a small batch costs on this machine now, measured; a pass forward and backward three
of them; a method on features 0.2 s and 3 ms a step; prompts and LoRA a pass of the text tower a step on top, counted as
a quarter of an image view per class (names are short, see the shared prefix). It tells minutes from days, no more.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adaptkit.evaluation.results import RunResult
from adaptkit.methods import methods
from adaptkit.sweeps.backbones import DEFAULT
from adaptkit.sweeps.plan import PlannedRun
from adaptkit.sweeps.results import RunRecord

TOWER_FAMILIES = ("prompts", "lora")
_STEP_IMAGES = 32
_SECONDS = {"run": 0.2, "step": 0.003}
_RUN_BYTES = 60_000
_PROCESS_BYTES = 0.5e9
FEATURES = "features:"
"""Begins the names of datasets that are files of ready features."""
_Key = tuple[str, ...]


@dataclass(frozen=True)
class Estimate:
    """What the missing runs of a plan will take.

    Args:
        seconds: Of one worker, in all.
        encoding_seconds: Of them, for frozen features that aren't known to be stored.
        memory_bytes: Of one worker.
        disk_bytes: For results and features.
        runs: How many.
        measured: How many of them are timed by earlier runs of their kind.
        basis: Where the numbers come from, one sentence.
    """

    seconds: float
    encoding_seconds: float
    memory_bytes: float
    disk_bytes: float
    runs: int
    measured: int
    basis: str


@dataclass(frozen=True)
class Probe:
    """What was measured of a backbone.

    Args:
        seconds: Of one image view.
        dim: Numbers of a feature.
        bytes: Of its weights.
    """

    seconds: float
    dim: int
    bytes: int


def probe(name: str) -> Probe:
    """Measure a backbone with one small batch."""
    import torch

    from adaptkit.backbones.load import load_backbone

    backbone = load_backbone("mini" if name == DEFAULT else name)
    size, count = backbone.spec.preprocessing.image_size, 8
    pixels = torch.zeros(count, 3, size, size)
    with torch.inference_mode():
        backbone.encode_image(pixels)  # warm
        began = time.perf_counter()
        backbone.encode_image(pixels)
        seconds = (time.perf_counter() - began) / count
    weights = sum(value.numel() * value.element_size() for value in backbone.parameters())
    return Probe(seconds, backbone.spec.embed_dim, weights)


def estimate(runs: Sequence[PlannedRun], earlier: Iterable[RunRecord], probes: Mapping[str, Probe]) -> Estimate:
    """What runs will take.

    Args:
        runs: Those still to do.
        earlier: Finished runs, of this sweep or others.
        probes: Of each backbone, by name.
    """
    records = list(earlier)
    known = _Known([record.result for record in records])
    measured, seconds = 0, 0.0
    for run in runs:
        own = known.seconds(run)
        measured += own is not None
        seconds += _modelled(run, probes[run.spec.backbone]) if own is None else own
    views = distinct_views(runs)
    encoding = sum(count * probes[name].seconds for name, count in views.items())
    features = sum(count * (4 * probes[name].dim + 32) for name, count in views.items())
    sizes = [size for record in records[:50] if (size := _folder_bytes(record.folder))]
    modelled = _PROCESS_BYTES + 3 * max((found.bytes for found in probes.values()), default=0)
    return Estimate(
        seconds + encoding,
        encoding,
        max([modelled, *(float(result.peak_memory_bytes) for result in known.results)]),
        len(runs) * (statistics.fmean(sizes) if sizes else _RUN_BYTES) + features,
        len(runs),
        measured,
        _basis(len(runs), measured, len(records)),
    )


def distinct_views(runs: Iterable[PlannedRun]) -> dict[str, int]:
    """Image views that the stored features of some runs consist of, by backbone; nothing counts as stored already.

    Shots are drawn anew for every seed; those of fewer shots are taken to be among those of more.
    """
    tests: dict[_Key, int] = {}
    trains: dict[_Key, int] = defaultdict(int)
    for run in runs:
        if run.size.reads != "image_features" or run.spec.task.dataset.startswith(FEATURES):
            continue  # nothing is stored, or all of it is
        task, backbone = run.spec.task, run.spec.backbone
        place = (backbone, task.dataset)
        tests[place] = max(tests.get(place, 0), run.size.test)
        seeded = (*place, str(task.seed))
        trains[seeded] = max(trains[seeded], run.size.train * (1 + run.size.views))
    found: dict[str, int] = defaultdict(int)
    for key, count in [*tests.items(), *trains.items()]:
        found[key[0]] += count
    return dict(found)


class _Known:
    """Seconds of earlier runs: of the same kind, else of the same method and backbone."""

    def __init__(self, results: list[RunResult]) -> None:
        self.results = results
        kinds: dict[_Key, list[float]] = defaultdict(list)
        for result in results:
            spent = sum(value for name, value in result.seconds.items() if name != "features")
            key = result.key
            kinds[key.method, key.backbone].append(spent)
            kinds[key.method, key.backbone, key.dataset, key.protocol, str(key.shots)].append(spent)
        self.kinds = {kind: statistics.median(spent) for kind, spent in kinds.items()}

    def seconds(self, run: PlannedRun) -> float | None:
        key = run.key
        exact = self.kinds.get((key.method, key.backbone, key.dataset, key.protocol, str(key.shots)))
        return self.kinds.get((key.method, key.backbone)) if exact is None else exact


def _modelled(run: PlannedRun, backbone: Probe) -> float:
    size = run.size
    steps = size.epochs * math.ceil(size.train / _STEP_IMAGES)
    seconds = _SECONDS["run"] + steps * _SECONDS["step"]
    if methods.entry(run.spec.method).family in TOWER_FAMILIES:
        classes = max(1, size.train // max(1, run.spec.task.shots))
        seconds += steps * classes * backbone.seconds / 4
    if size.reads == "images":
        seconds += (3 * size.epochs * size.train + size.test) * backbone.seconds
    return seconds


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _basis(runs: int, measured: int, earlier: int) -> str:
    model = "a rough model and the speed of this machine on one batch"
    if not measured:
        return f"from {model}; no earlier runs of these methods are here"
    if measured == runs:
        return f"from {earlier} earlier runs"
    return f"{measured} runs from {earlier} earlier ones, the other {runs - measured} from {model}"
