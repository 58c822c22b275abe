"""One worker of a sweep: takes free runs, one after the other, and keeps what they share in memory.

A worker stays with a backbone and a dataset until none of their runs is left, so both are loaded once, and the features
of every image view are read once. It goes where no other worker is, as long as there is such a place.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from adaptkit.config import from_mapping
from adaptkit.data.features import FeatureStore, ViewSettings
from adaptkit.data.kept import datasets_kept
from adaptkit.data.splits import Split
from adaptkit.errors import AdaptKitError, DataError, StorageError
from adaptkit.evaluation.tasks import TaskSpec, load_task
from adaptkit.storage import digest_json, read_json, try_lock, write_json
from adaptkit.sweeps.backbones import KeptBackbone
from adaptkit.sweeps.claims import CLAIMS, GROUP, JOBS, Claim
from adaptkit.sweeps.plan import FAILURES, Failure, finished, in_words, place_of, plan_of
from adaptkit.sweeps.suite import RunSpec
from adaptkit.training.checkpoints import Checkpoints
from adaptkit.types import TensorInputs

if TYPE_CHECKING:
    from torch import Tensor

    from adaptkit.backbones.base import Backbone
    from adaptkit.evaluation.protocols import RunOutcome, RunPlan
    from adaptkit.evaluation.tasks import Task

UNFINISHED = "unfinished"
"""Folder of checkpoints of trainings under way; one whose worker died goes on from them."""

DATASETS_KEPT = 2
TASKS_KEPT = 2


@dataclass(frozen=True)
class Job:
    """A run to do.

    Args:
        digest: Of its key, as planned.
        spec: What was asked for.
    """

    digest: str
    spec: RunSpec


@dataclass(frozen=True)
class WorkerSettings:
    """What every worker of a sweep is told, as plain values.

    Args:
        out: The sweep's folder.
        jobs: File with the jobs that may be taken.
        device: "cpu", "cuda:1", …, or "auto": a GPU of its own where there are any.
        batch_size: Images encoded at once.
        cache: Folder of stored features; None for the default one.
        threads: For the worker's arithmetic.
    """

    out: str
    jobs: str
    device: str = "auto"
    batch_size: int = 64
    cache: str | None = None
    threads: int = 1


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Args:
        digest: Of its key.
        state: "done", "failed", or "no-space": the disk is full, and nothing can be kept.
        reason: Of a failure, one sentence.
        seconds: It took.
        images_encoded: Image views that it put through an image tower.
    """

    digest: str
    state: Literal["done", "failed", "no-space"]
    reason: str = ""
    seconds: float = 0.0
    images_encoded: int = 0


@contextmanager
def jobs_file(out: Path, jobs: Sequence[Job]) -> Iterator[str]:
    """A file with jobs, for as long as the block lasts; a sweep that is killed leaves it to the next to remove.

    Raises:
        StorageError: It can't be written.
    """
    path = out / JOBS / f"{os.getpid()}-{secrets.token_hex(4)}.json"
    handle = try_lock(path)  # tells others' `abandoned` that it is in use
    try:
        if handle is None:
            raise StorageError(f"{path} is in use by another process: try again.")
        try:
            with open(handle, "w", encoding="utf-8", closefd=False) as file:
                json.dump([asdict(job) for job in jobs], file)
        except OSError as error:
            raise StorageError(f"{path} can't be written: {error.strerror}.") from error
        yield str(path)
    finally:
        path.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


class SharedFeatures(FeatureStore):
    """A feature store that also keeps in memory what it gave for a split, for as long as the split is there."""

    def __init__(self, root: str | Path | None = None) -> None:
        super().__init__(root)
        self._held: WeakKeyDictionary[Split, dict[str, Any]] = WeakKeyDictionary()

    def features(self, backbone: Backbone, split: Split, **said: Any) -> Tensor:
        view = said.get("view", 0)
        make = super().features
        return self._remembered(backbone, split, "features", view, said, lambda: make(backbone, split, **said))

    def inputs(self, backbone: Backbone, split: Split, **said: Any) -> TensorInputs:
        views = said.get("views", 0)
        make = super().inputs
        return self._remembered(backbone, split, "inputs", views, said, lambda: make(backbone, split, **said))

    def _remembered(self, backbone: Backbone, split: Split, what: str, view: int, said: Any, make: Any) -> Any:
        settings = said.get("settings", ViewSettings()).facts(view)  # the plain view depends on none
        precision = said.get("precision", "fp32")
        key = repr((what, view, sorted(settings.items()), precision, backbone.spec.digest, str(backbone.device)))
        held = self._held.setdefault(split, {})
        if key not in held:
            held[key] = make()
        return held[key]


class Worker:
    """Does free runs, one per call of `next`.

    Args:
        settings: From the sweep.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings, self.out = settings, Path(settings.out)
        self._kept = ExitStack()
        self._kept.enter_context(datasets_kept(DATASETS_KEPT))
        self.device = _own_device(settings.device, self._kept)
        self.backbones = KeptBackbone(self.device)
        self.store = SharedFeatures(settings.cache)
        self.groups: dict[str, deque[Job]] = {}
        for content in read_json(settings.jobs):
            job = from_mapping(Job, content, where=settings.jobs)
            self.groups.setdefault(digest_json([job.spec.backbone, asdict(job.spec.group[1])]), deque()).append(job)
        self.group: str | None = None
        self._place: int | None = None  # the lock that tells others we are at this group
        self._tasks: dict[TaskSpec, Task] = {}

    def close(self) -> None:
        """Let go of the datasets and of the place at a group."""
        self._leave()
        self._kept.close()

    # --- which run ----------------------------------------------------------------------------------------------------

    def next(self) -> Outcome | None:
        """Do a run that nobody else does; None where none is left."""
        while self.group is not None or self._go_on():
            for job in _drained(self.groups[str(self.group)]):
                if (self.out / FAILURES / f"{job.digest}.json").exists() or self._is_done(job):
                    continue
                claim = Claim.take(self.out, job.digest)
                if claim is None:
                    continue
                try:
                    if not self._is_done(job):  # its last holder may have finished it just now
                        return self.do(job)
                finally:
                    claim.release()
            self._leave()
        return None

    def _is_done(self, job: Job) -> bool:
        return finished(self.out / place_of(job.digest), job.digest)

    def _go_on(self) -> bool:
        """Go to a group with runs left, if possible to one where no other worker is; False where there is none."""
        left = [name for name, jobs in self.groups.items() if jobs]
        for name in left:
            self._place = try_lock(self.out / CLAIMS / f"{GROUP}{name}")
            if self._place is not None:
                self.group = name
                return True
        self.group = left[0] if left else None
        return bool(left)

    def _leave(self) -> None:
        if self._place is not None:
            with contextlib.suppress(OSError):
                (self.out / CLAIMS / f"{GROUP}{self.group}").unlink()
            os.close(self._place)
        self.group = self._place = None

    # --- one run ------------------------------------------------------------------------------------------------------

    def do(self, job: Job) -> Outcome:
        """Do a run; what goes wrong with it is written down, and others go on."""
        try:
            task = self._task(job.spec.task)
            backbone = self.backbones.get(job.spec.backbone, task.dataset)
            plan = self._plan(job, task, backbone)
            kept = Checkpoints(self.out / UNFINISHED / job.digest, job.digest)
            outcome = self._run(plan, backbone, kept)
            self._write(job, outcome)
            kept.clear()
        except Exception as error:
            return self._failed(job, error)
        result = outcome.result
        return Outcome(job.digest, "done", "", sum(result.seconds.values()), result.images_encoded)

    def _plan(self, job: Job, task: Task, backbone: Backbone) -> RunPlan:
        plan = plan_of(job.spec, task, backbone)
        if plan.key.digest != job.digest:
            raise DataError(
                "The data, the backbone or a recipe isn't what it was when the sweep was planned: plan it again."
            )
        return plan

    def _run(self, plan: RunPlan, backbone: Backbone, kept: Checkpoints) -> RunOutcome:
        from adaptkit.evaluation.protocols import run_method

        outcome = run_method(plan, backbone, store=self.store, batch_size=self.settings.batch_size, checkpoints=kept)
        if outcome.result.fit.get("interrupted"):
            raise KeyboardInterrupt
        return outcome

    def _write(self, job: Job, outcome: RunOutcome) -> None:
        from adaptkit.evaluation.results import write_run

        folder = self.out / place_of(job.digest)
        write_run(folder, outcome.result, outcome.predictions, outcome.model, overwrite=True)

    def _task(self, spec: TaskSpec) -> Task:
        if spec not in self._tasks:
            while len(self._tasks) >= TASKS_KEPT:
                self._tasks.pop(next(iter(self._tasks)))
            self._tasks[spec] = load_task(spec)
        return self._tasks[spec]

    def _failed(self, job: Job, error: Exception) -> Outcome:
        if is_full(error):
            return Outcome(job.digest, "no-space", _sentence(error))
        record = Failure(job.digest, in_words(job.spec), _sentence(error), f"{job.digest}.txt")
        try:
            write_failure(self.out, record, "".join(traceback.format_exception(error)))
        except OSError as full:  # the reason still reaches the sweep that is running
            if is_full(full):
                return Outcome(job.digest, "no-space", _sentence(full))
            raise
        return Outcome(job.digest, "failed", record.reason)


def write_failure(out: Path, record: Failure, text: str = "") -> None:
    """Write down why a run failed: a record, and the traceback as a text file beside it."""
    from adaptkit.storage import atomic_path

    folder = out / FAILURES
    if record.traceback:
        with atomic_path(folder / record.traceback) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    write_json(folder / f"{record.digest}.json", asdict(record))


def is_full(error: BaseException | None) -> bool:
    """Whether an error comes from a full disk or a used-up quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, AdaptKitError) else f"{type(error).__name__}: {text}"


def _drained(jobs: deque[Job]) -> Any:
    while jobs:
        yield jobs.popleft()


def _own_device(device: str, held: ExitStack) -> str:
    """The device meant; for "auto" a GPU that no other worker of this machine has, "cpu" without GPUs."""
    import tempfile

    import torch

    if device != "auto":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    user = os.getuid() if hasattr(os, "getuid") else 0
    for index in range(count):
        gpu = visible[index].strip() if index < len(visible) and visible[index].strip() else index
        handle = try_lock(Path(tempfile.gettempdir()) / f"adaptkit-gpu-{gpu}-{user}")
        if handle is not None:
            held.callback(os.close, handle)
            return f"cuda:{index}"
    return f"cuda:{os.getpid() % count}" if count else "cpu"
