"""Four measurements: a sweep against one pass over the features, overhead per run, memory over many runs, reading."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import adaptkit.evaluation.protocols as protocols
from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.backbones.load import load_backbone
from adaptkit.data.features import FeatureStore
from adaptkit.evaluation.results import RESULT_FILE, RunResult
from adaptkit.evaluation.tasks import load_task
from adaptkit.storage import write_json
from adaptkit.sweeps.backbones import DEFAULT
from adaptkit.sweeps.plan import Plan, make_plan, place_of
from adaptkit.sweeps.results import read_runs
from adaptkit.sweeps.suite import read_suite
from adaptkit.sweeps.worker import Job, SharedFeatures, Worker, WorkerSettings, jobs_file

TEN = (
    "zero-shot", "tip-adapter", "tip-adapter-f", "linear-probe", "lp-plus-plus", "clip-adapter", "taskres", "gda",
    "ape", "clap",
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """How much is run.

    Args:
        methods: On one dataset.
        shots: Shot counts.
        seeds: Seeds of each.
        dataset: An embedded one.
        warm: Runs before overhead is measured.
        runs: Runs that memory is watched over, and overhead measured on.
        files: Result files that are read.
        classes: Of each.
    """

    methods: tuple[str, ...] = TEN
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    seeds: int = 3
    dataset: str = "shapes"
    warm: int = 100
    runs: int = 1000
    files: int = 10_000
    classes: int = 100


QUICK = Sizes(("zero-shot", "tip-adapter"), (1, 2), 2, "digits", 2, 6, 30, 10)


@dataclass
class Clock:
    """Seconds by the wall and of this process's own work; a busy machine stretches the first only."""

    wall: float = 0.0
    cpu: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add what the block takes."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.wall += time.perf_counter() - wall
            self.cpu += time.process_time() - cpu


def planned(methods: tuple[str, ...], dataset: str, shots: tuple[int, ...], seeds: int) -> Plan:
    """The plan of a benchmark."""
    content = {"name": "benchmark", "methods": list(methods), "datasets": [dataset], "shots": list(shots)}
    return make_plan(read_suite({**content, "seeds": list(range(1, seeds + 1))}))


@contextmanager
def worker_for(plan: Plan, out: Path, cache: Path) -> Iterator[Worker]:
    """A worker of a plan, in this process."""
    with jobs_file(out, [Job(run.digest, run.spec) for run in plan.runs]) as jobs:
        worker = Worker(WorkerSettings(str(out), jobs, "cpu", 64, str(cache)))
        try:
            yield worker
        finally:
            worker.close()


@contextmanager
def watched(target: Any, name: str, around: Callable[..., Any]) -> Iterator[None]:
    """Put `around(plain, *args, **kwargs)` in the place of a function."""
    plain = getattr(target, name)
    setattr(target, name, lambda *args, **kwargs: around(plain, *args, **kwargs))
    try:
        yield
    finally:
        setattr(target, name, plain)


# --- one pass over the features ---------------------------------------------------------------------------------------


def measure_sharing(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """A sweep on one dataset, against the same image views encoded once and the methods' own fitting and testing."""
    plan = planned(sizes.methods, sizes.dataset, sizes.shots, sizes.seeds)
    asked: dict[str, tuple[Any, ...]] = {}
    encoded: list[int] = []
    whole = Clock()

    def asking(plain: Any, store: Any, backbone: Any, split: Any, **said: Any) -> Any:
        key = repr((split.digest, said.get("views"), said.get("settings")))
        asked.setdefault(key, (split, {**said, "progress": None}))
        return plain(store, backbone, split, **said)

    def encoding(plain: Any, backbone: Any, pixels: Any) -> Any:
        encoded.append(len(pixels))
        return plain(backbone, pixels)

    with (
        watched(SharedFeatures, "inputs", asking),
        watched(DualEncoder, "encode_image", encoding),
        worker_for(plan, folder / "sharing", folder / "sweep-features") as worker,
    ):
        worker.backbones.get(
            DEFAULT, load_task(plan.runs[0].spec.task).dataset
        )  # a worker's start isn't counted, here as below
        with whole.running():
            outcomes = [outcome for outcome in iter(worker.next, None) if outcome is not None]
    lost = [outcome.reason for outcome in outcomes if outcome.state != "done"]
    if lost:
        raise RuntimeError(f"{len(lost)} runs failed: {lost[0]}")
    results = [record.result for record in read_runs([folder / "sharing"])[0]]
    own = sum(result.seconds["fit"] + result.seconds["evaluate"] for result in results)
    one_pass, views = _one_pass(list(asked.values()), folder / "pass-features")
    return {
        "runs": len(outcomes),
        "image_views": views,
        "encoded_by_sweep": sum(encoded),
        "seconds": asdict(whole),
        "pass_seconds": asdict(one_pass),
        "own_seconds": own,
        "ratio": whole.wall / (one_pass.wall + own),
    }


def _timed(clock: Clock, plain: Any, *args: Any, **said: Any) -> Any:
    with clock.running():
        return plain(*args, **said)


def _one_pass(asked: list[tuple[Any, ...]], folder: Path) -> tuple[Clock, int]:
    """Every image view that the sweep asked for, encoded once in a store of its own."""
    backbone, store, clock = load_backbone("mini"), FeatureStore(folder), Clock()
    with clock.running():
        for split, said in asked:
            store.inputs(backbone, split, **said)
    return clock, store.encoded


# --- overhead and memory ----------------------------------------------------------------------------------------------


def measure_overhead(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Zero-shot again and again: what a run takes beyond `run_method`, and what memory does meanwhile.

    Counted as overhead: drawing the shots, checking settings and the key, looking for earlier results, the claim, and
    writing result, predictions and adapter, synced to disk. Not counted: the worker's start.
    """
    plan = planned(("zero-shot",), sizes.dataset, (1,), sizes.warm + sizes.runs)
    inside = Clock()
    beyond: list[float] = []
    beyond_cpu: list[float] = []
    memory: list[int] = []
    with (
        watched(protocols, "run_method", lambda plain, *args, **said: _timed(inside, plain, *args, **said)),
        worker_for(plan, folder / "overhead", folder / "sweep-features") as worker,
    ):
        for number in range(len(plan.runs)):
            whole, before = Clock(), replace(inside)
            with whole.running():
                outcome = worker.next()
            if outcome is None or outcome.state != "done":
                raise RuntimeError(f"Run {number} wasn't done: {outcome}.")
            if number >= sizes.warm:
                beyond.append(whole.wall - (inside.wall - before.wall))
                beyond_cpu.append(whole.cpu - (inside.cpu - before.cpu))
                if (number - sizes.warm) % max(1, sizes.runs // 10) == 0:
                    gc.collect()
                    memory.append(resident_bytes())
    return {
        "runs": len(beyond),
        "overhead_ms": 1e3 * statistics.median(beyond),
        "overhead_ms_p95": 1e3 * sorted(beyond)[int(0.95 * len(beyond))],
        "overhead_cpu_ms": 1e3 * statistics.median(beyond_cpu),
        "memory_bytes": memory,
        "memory_growth_bytes": memory[-1] - memory[0],
    }


def resident_bytes() -> int:
    """Resident size of this process now; 0 where the system doesn't say."""
    try:
        fields = Path("/proc/self/statm").read_text().split()
    except OSError:
        return 0
    import resource

    return int(fields[1]) * resource.getpagesize()


# --- reading ----------------------------------------------------------------------------------------------------------


def measure_reading(sizes: Sizes, folder: Path, like: RunResult) -> dict[str, Any]:
    """Reading and checking many results.

    Args:
        sizes: How many, of how many classes.
        folder: To write them to.
        like: A result that they are variations of.
    """
    root = folder / "reading"
    names = tuple(f"class number {index}" for index in range(sizes.classes))
    part = replace(like.parts[0], num_classes=sizes.classes, per_class=((1, 2),) * sizes.classes)
    for seed in range(sizes.files):
        key = replace(like.key, seed=seed)
        result = replace(like, key=key, key_digest=key.digest, parts=(part,), class_names=names)
        path = root / place_of(key.digest) / RESULT_FILE
        path.parent.mkdir(parents=True)
        if seed == 0:
            write_json(path, asdict(result))
            text = path.read_text(encoding="utf-8")
            first = key
        path.write_text(_varied(text, first.digest, key.digest, seed), encoding="utf-8")
    clock = Clock()
    with clock.running():
        records, damaged = read_runs([root])
        accuracies = [record.result.score for record in records]
    return {
        "files": len(records),
        "damaged": len(damaged),
        "mean": statistics.fmean(accuracies),
        "seconds": asdict(clock),
    }


def _varied(text: str, digest: str, other: str, seed: int) -> str:
    """The same result with another seed: made as text, since writing ten thousand properly isn't what is measured."""
    return text.replace(digest, other).replace('"seed": 0', f'"seed": {seed}')
