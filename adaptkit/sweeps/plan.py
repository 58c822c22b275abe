"""Plans: the runs of a suite with the keys that name their results, and what of them is done.

Everything that can be checked is checked here, and everything wrong is said at once: datasets and their shots,
settings, backbones. A run's result lies at OUT/runs/<first two digits of its key's digest>/<digest>.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from adaptkit.config import from_mapping
from adaptkit.data.kept import datasets_kept
from adaptkit.errors import AdaptKitError, DataError, MissingPathError, StorageError
from adaptkit.evaluation.recipes import resolve, share_overrides
from adaptkit.evaluation.results import RESULT_FILE, RunKey, read_run
from adaptkit.evaluation.tasks import TaskSpec, load_task
from adaptkit.methods import CLIP_ROWS, methods
from adaptkit.storage import read_json
from adaptkit.sweeps.backbones import DEFAULT, KeptBackbone
from adaptkit.sweeps.suite import RunSpec, Suite, expand, raise_problems

if TYPE_CHECKING:
    from adaptkit.backbones.base import Backbone
    from adaptkit.evaluation.protocols import RunPlan
    from adaptkit.evaluation.tasks import Task
    from adaptkit.types import ProgressCallback

State = Literal["done", "failed", "damaged", "missing"]
RUNS, FAILURES = "runs", "failures"
OWN_PARTS = ("all", "base", "novel", "source")
"""Parts of a test that are the dataset's own."""
T = TypeVar("T")


@dataclass(frozen=True)
class RunSize:
    """What a run's time and room depend on.

    Args:
        reads: "image_features" or "images".
        train: Images it trains on.
        test: Images it is tested on.
        views: Augmented views of each training image.
        epochs: Passes over the training images; 0 where nothing is trained by gradient.
    """

    reads: str
    train: int
    test: int
    views: int
    epochs: float


@dataclass(frozen=True)
class PlannedRun:
    """A run that was checked.

    Args:
        spec: What was asked for.
        digest: Of its key; names its folder.
        key: Everything that changes its numbers.
        size: What its cost depends on.
    """

    spec: RunSpec
    digest: str
    key: RunKey
    size: RunSize

    @property
    def place(self) -> str:
        """Its folder within a sweep's folder."""
        return place_of(self.digest)


@dataclass(frozen=True)
class Plan:
    """What a suite asks for.

    Args:
        name: Of the suite.
        runs: Grouped by backbone and dataset.
        notes: What was left out, and why.
    """

    name: str
    runs: tuple[PlannedRun, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """Why a run failed, as kept at OUT/failures/<digest>.json; the traceback lies beside it as a text file.

    Args:
        digest: Of the run's key.
        run: The run in words.
        reason: One sentence.
        traceback: Name of the text file, "" where there is none.
    """

    digest: str
    run: str
    reason: str
    traceback: str = ""


def place_of(digest: str) -> str:
    """Where the run of a key lies within a sweep's folder."""
    return f"{RUNS}/{digest[:2]}/{digest}"


def in_words(spec: RunSpec) -> str:
    """One line that names a run among others."""
    task = spec.task
    recipe = f" ({spec.recipe})" if spec.recipe else ""
    which = f"{task.protocol}, {task.shots} shots, seed {task.seed}"
    backbone = "" if spec.backbone == DEFAULT else f", {spec.backbone}"
    return f"{spec.method}{recipe} on {task.dataset}, {which}{backbone}"


# --- planning ---------------------------------------------------------------------------------------------------------


def make_plan(suite: Suite, *, progress: ProgressCallback | None = None) -> Plan:
    """Check a suite against data and backbones, and find the keys of its runs.

    Args:
        suite: From `load_suite`.
        progress: Called as (what, runs looked at, runs).

    Raises:
        ConfigError: Everything wrong, in one message.
    """
    specs = expand(suite)
    planner = _Planner(progress, len(specs), suite.clip_backbone)
    with datasets_kept():
        for _, group in groupby(specs, key=lambda spec: spec.backbone):
            planner.add_backbone(list(group))
        planner.add_backbone(planner.clip_rows(suite))
        planner.add_unseen()
    where = f"suite {suite.name}"
    raise_problems(where, planner.problems)
    if not planner.runs:
        raise_problems(where, [f"Nothing is left to run in {where}: its exclusions leave out everything."])
    return Plan(suite.name, tuple(planner.runs.values()), tuple(planner.notes()))


class _Planner:
    """One pass over a suite's runs."""

    def __init__(self, progress: ProgressCallback | None, total: int, clip: str) -> None:
        self.progress, self.total, self.looked_at, self.clip = progress, total, 0, clip
        self.runs: dict[str, PlannedRun] = {}
        self.problems: list[str] = []
        self.kept = KeptBackbone()
        self.seen: set[str] = set()
        self.unseen: set[str] = set()
        self.left_out: dict[tuple[str, str], dict[str, None]] = {}
        self.on_mllm: dict[TaskSpec, None] = {}

    def add_backbone(self, specs: list[RunSpec]) -> None:
        for task, group in groupby(specs, key=lambda spec: spec.task):
            self._add_task(task, list(group))

    def clip_rows(self, suite: Suite) -> list[RunSpec]:
        """What a CLIP gives on the tasks of multimodal language models; those that the suite has itself count once."""
        if self.clip == "none":
            return []
        rows = [
            RunSpec(name, task, self.clip, shared=suite.set, precision=suite.precision, named=False)
            for task in self.on_mllm
            for name in CLIP_ROWS
        ]
        self.total += len(rows)
        return rows

    def add_unseen(self) -> None:
        """Backbones that no task could be loaded for: their names may be wrong too."""
        from adaptkit.backbones.load import load_backbone

        for name in sorted(self.unseen - self.seen - {DEFAULT}):
            self._tried(lambda name=name: load_backbone(name))  # type: ignore[misc]

    def notes(self) -> list[str]:
        """What was left out; datasets with the same to say come together."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for (dataset, reason), found in self.left_out.items():
            groups.setdefault((reason, *found), []).append(dataset)
        return [
            f"left out on {', '.join(datasets)}: {', '.join(found)} ({reason})"
            for (reason, *found), datasets in groups.items()
        ]

    def _tried(self, attempt: Callable[[], T], where: str = "") -> T | None:
        try:
            return attempt()
        except (AdaptKitError, OSError) as error:
            self.problems.append(f"{where}{error}")
            return None

    def _add_task(self, spec: TaskSpec, specs: list[RunSpec]) -> None:
        task = self._tried(lambda: load_task(spec))
        name = specs[0].backbone
        if task is None:
            backbone = None
            self.unseen.add(name)
        else:
            backbone = self._tried(lambda: self.kept.get(name, task.dataset))
            self.seen.add(name)
        for run in specs:
            self.looked_at += 1
            if task is not None and backbone is not None:
                self._add_run(run, task, backbone)
            else:  # its settings may be wrong too
                self._tried(lambda run=run: check_settings(run, backbone))  # type: ignore[misc]
        if self.progress:
            self.progress("planning", self.looked_at, self.total)

    def _add_run(self, spec: RunSpec, task: Task, backbone: Backbone) -> None:
        reason = why_impossible(spec.method, task, backbone)
        if reason and spec.named:
            self.problems.append(
                f"{spec.method} can't run on {task.dataset.name} with {backbone.spec.name}: it {reason}."
            )
        elif reason:
            self.left_out.setdefault((task.dataset.name, reason), {})[spec.method] = None
        else:
            plan = self._tried(lambda: plan_of(spec, task, backbone))
            if plan is not None:
                planned = PlannedRun(spec, plan.key.digest, plan.key, _size(plan))
                self.runs.setdefault(planned.digest, planned)
                if backbone.is_mllm and spec.backbone == self.clip:
                    self.problems.append(
                        f"clip_backbone {self.clip!r} is a multimodal language model itself: choose a CLIP, or none."
                    )
                elif backbone.is_mllm:
                    self.on_mllm[spec.task] = None


def why_impossible(method: str, task: Task, backbone: Backbone) -> str:
    """Why a method can't run on a task at all ("needs …"), "" where it can; only what is cheap to see."""
    kind = methods.get(method)
    if kind.needs_mllm and not backbone.is_mllm:
        return "needs a multimodal language model, and the backbone isn't one"
    if kind.needs_text and not backbone.has_text:
        return "needs a text encoder, and the backbone has none"
    own = [part for part in task.parts if part.name in OWN_PARTS]  # targets bring their own descriptions
    asked = {name for part in own for name in part.split.class_names} | set(task.class_names)
    if kind.reads_descriptions == "needed" and not all(map(task.dataset.descriptions.get, asked)):
        return "needs descriptions of all classes (descriptions: FILE), and there are none"
    return ""


def check_settings(spec: RunSpec, backbone: Backbone | None) -> None:
    """Check what can be checked of a run's settings without its data, and perhaps without its backbone.

    Raises:
        AdaptKitError: Settings that can't be used.
    """
    from adaptkit.evaluation.protocols import choose_recipe

    task = spec.task
    recipe = None if backbone is None else choose_recipe(spec.method, task.protocol, backbone, spec.recipe)
    resolve(methods.get(spec.method), recipe, _overrides(spec), shots=task.shots, dataset=task.dataset)


def plan_of(spec: RunSpec, task: Task, backbone: Backbone) -> RunPlan:
    """The checked settings and the key of a run.

    Raises:
        AdaptKitError: Settings that can't be used.
    """
    from adaptkit.evaluation.protocols import plan_run

    return plan_run(
        spec.method,
        backbone,
        task,
        recipe=spec.recipe,
        overrides=_overrides(spec),
        precision=spec.precision,
    )


def _overrides(spec: RunSpec) -> list[str]:
    """A run's settings: those of the suite that its method reads, then its own.

    Raises:
        ConfigError: One of the suite's that no method at all reads.
    """
    names = [spec.method, *(name for name in methods if spec.shared and name != spec.method)]
    return [*share_overrides([methods.get(name) for name in names], spec.shared)[0], *spec.overrides]


def _size(plan: RunPlan) -> RunSize:
    kind, training = methods.get(plan.method), plan.resolved.training
    test = sum(len(part.split) for part in plan.task.parts)
    return RunSize(kind.reads, len(plan.task.train), test, training.views, training.epochs)


# --- what is done -----------------------------------------------------------------------------------------------------


def state_of(out: Path, digest: str) -> State:
    """What there is of a run; a result that can't be used, or that Ctrl-C ended early, is "damaged"."""
    folder = out / place_of(digest)
    if (folder / RESULT_FILE).is_file():
        return "done" if finished(folder, digest) else "damaged"
    return "failed" if (out / FAILURES / f"{digest}.json").is_file() else "missing"


def finished(folder: Path, digest: str) -> bool:
    """Whether a folder holds a whole, finished run of that key."""
    try:
        result = read_run(folder)
    except DataError:
        return False
    return result.key_digest == digest and not result.fit.get("interrupted")


def states(plan: Plan, out: Path, progress: ProgressCallback | None = None) -> dict[str, State]:
    """The state of every run of a plan, by digest."""
    found: dict[str, State] = {}
    for done, run in enumerate(plan.runs, start=1):
        found[run.digest] = state_of(out, run.digest)
        if progress and (done % 100 == 0 or done == len(plan.runs)):
            progress("reading results", done, len(plan.runs))
    return found


def read_failures(out: Path, digests: Iterable[str]) -> list[Failure]:
    """Why runs failed, for those of `digests` that did."""
    found = []
    for digest in digests:
        path = out / FAILURES / f"{digest}.json"
        try:
            found.append(from_mapping(Failure, read_json(path, max_bytes=2**20), where=str(path)))
        except MissingPathError:
            continue
        except (AdaptKitError, StorageError) as error:
            found.append(Failure(digest, digest, f"its record is damaged ({error})"))
    return found


def counted(plan: Plan, found: Mapping[str, State]) -> Iterator[dict[str, Any]]:
    """Rows for people: the runs by protocol, backbone and dataset, with what there is of them."""
    groups: dict[tuple[str, str, str], list[PlannedRun]] = {}
    for run in plan.runs:
        groups.setdefault((run.key.protocol, run.key.backbone, run.spec.task.dataset), []).append(run)
    for (protocol, backbone, dataset), runs in groups.items():
        have = [found[run.digest] for run in runs]
        yield {
            "protocol": protocol,
            "backbone": backbone,
            "dataset": dataset,
            "methods": len({run.spec.method for run in runs}),
            "shots": sorted({run.spec.task.shots for run in runs}),
            "seeds": sorted({run.spec.task.seed for run in runs}),
            "runs": len(runs),
            **{state: have.count(state) for state in ("done", "failed", "damaged", "missing")},
        }
