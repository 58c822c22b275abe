"""Running a plan: who does the work, and what happens when something goes wrong.

    local    joblib's processes (loky), one GPU each where there are any
    ray      actors on a Ray cluster, or on one that Ray starts here
    joblib   whatever `joblib.parallel_config` says at the moment, for Dask:

        from joblib import parallel_config
        from dask.distributed import Client

        with Client("tcp://scheduler:8786"), parallel_config(backend="dask"):
            run_sweep(plan, Path("/shared/sweep"), executor="joblib", jobs=16)

Workers take runs themselves (see `adaptkit.sweeps.claims`), so that any number of them, of sweeps and of machines can
share one folder. A run is done when its folder is whole: a killed worker, Ctrl-C or a full disk cost the runs that were
in progress, and nothing else. When a worker's process dies, the runs in progress are done again, each alone in a
process of its own; one that dies there too is noted as failed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from adaptkit.errors import ConfigError, StorageError
from adaptkit.sweeps.claims import abandoned, in_progress
from adaptkit.sweeps.plan import FAILURES, Failure, Plan, in_words, read_failures, states
from adaptkit.sweeps.worker import Job, Outcome, Worker, WorkerSettings, jobs_file, write_failure
from adaptkit.types import ProgressCallback

ExecutorName = Literal["local", "ray", "joblib"]
LOG_FILE = "workers.log"
_POLL_SECONDS = 0.5
_TICK_SECONDS = 0.2  # how soon an interrupt is noticed
_KILLED = (
    "The process of this run was ended twice from outside, the second time with nothing beside it (is there too little"
    " memory?)."
)


class WorkerDiedError(Exception):
    """The process of a worker was ended from outside."""


@dataclass
class Summary:
    """What a call of `run_sweep` did.

    Args:
        done: Runs done now.
        before: Runs that were done before.
        failed: Runs that failed, now or before.
        left: Runs that are still to do.
        stopped: Why not all was done, "" where nothing stopped it.
        seconds: It took.
        run_seconds: Time within runs, added up over the workers.
        images_encoded: Image views put through an image tower.
    """

    done: int = 0
    before: int = 0
    failed: list[Failure] = field(default_factory=list)
    left: int = 0
    stopped: str = ""
    seconds: float = 0.0
    run_seconds: float = 0.0
    images_encoded: int = 0


def run_sweep(
    plan: Plan,
    out: str | Path,
    *,
    retry: bool = False,
    executor: ExecutorName = "local",
    jobs: int | None = None,
    address: str | None = None,
    device: str = "auto",
    batch_size: int = 64,
    cache: str | None = None,
    progress: ProgressCallback | None = None,
) -> Summary:
    """Do what is missing of a plan; with `retry`, do what failed.

    Args:
        plan: From `make_plan`.
        out: The sweep's folder; on a cluster, one that all machines see.
        retry: Do the failed runs again instead of the missing ones.
        executor: Who works, see the top of this module.
        jobs: How many workers; None for one per GPU, else one per core, as far as memory allows.
        address: Of a Ray cluster.
        device: "auto" gives each worker a GPU where there are any.
        batch_size: Images encoded at once.
        cache: Folder of stored features; None for the default one.
        progress: Called as ("runs: 2 failed", runs finished, runs to do).

    Raises:
        ConfigError: Ray isn't installed, or jobs is out of range.
        StorageError: The folder can't be written, or workers can't be started.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what is done is kept.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs is {jobs}; at least 1 worker is needed.")
    sweep = _Sweep(plan, Path(os.path.abspath(out)), progress)
    todo = sweep.todo(retry)
    settings = WorkerSettings(str(sweep.out), "", device, batch_size, cache)
    pools: dict[str, _Pool] = {"local": _LocalPool(), "ray": _RayPool(address), "joblib": _JoblibPool()}
    pool = pools[executor]
    workers = (jobs or pool.usual_workers(device)) if todo else 1
    try:
        with _sigterm_as_interrupt():
            sweep.work(pool, settings, workers, todo)
    finally:
        abandoned(sweep.out)  # what workers that were ended left half-made
    return sweep.summary()


def default_jobs(device: str = "auto") -> int:
    """Workers for this machine: one per GPU, else one per core as far as free memory allows (1.5 GB each)."""
    import torch

    if device == "auto" and torch.cuda.is_available():
        return torch.cuda.device_count()
    if device not in ("auto", "cpu"):
        return 1
    return max(1, min(_cores(), int(_free_memory() // 1.5e9)))


def _cores() -> int:
    import joblib

    return int(joblib.cpu_count())  # knows containers' limits and affinities


def _free_memory() -> float:
    """Bytes that can still be used; a great many where the system doesn't say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return float(line.split()[1]) * 1024
    return 1e15


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a sweep as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _interrupts_noted() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM are noted, for the block to end at a good moment; a second one interrupts it at once.

    One that falls into loky's own bookkeeping can leave its processes waiting for each other.
    """
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(number: int, frame: Any) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()

    heeded = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Sweep:
    """One call of `run_sweep`."""

    def __init__(self, plan: Plan, out: Path, progress: ProgressCallback | None) -> None:
        self.plan, self.out, self.progress = plan, out, progress
        self.runs = {run.digest: run for run in plan.runs}
        self.found = Summary()
        self.finished = self.failed = self.total = 0
        self.began = time.monotonic()

    def todo(self, retry: bool) -> list[str]:
        """Digests of the runs to do; records of failures that are tried again go."""
        state = states(self.plan, self.out, self.progress)
        self.found.before = sum(value == "done" for value in state.values())
        wanted = ("failed",) if retry else ("missing", "damaged")
        todo = [digest for digest, value in state.items() if value in wanted]
        if retry:
            for digest in todo:
                (self.out / FAILURES / f"{digest}.json").unlink(missing_ok=True)
                (self.out / FAILURES / f"{digest}.txt").unlink(missing_ok=True)
        self.total = len(todo)
        return todo

    # --- rounds -------------------------------------------------------------------------------------------------------

    def work(self, pool: _Pool, settings: WorkerSettings, workers: int, todo: list[str]) -> None:
        """Rounds over what is left, until nothing is; most sweeps need one."""
        idle = 0
        self._show()
        while todo and not self.found.stopped:
            before = self.finished
            self._round(pool, settings, workers, todo)
            todo = self._left(todo)
            elsewhere = in_progress(self.out).intersection(todo)
            if len(elsewhere) == len(todo) or self.finished > before:
                idle = 0
            else:
                idle += 1
            if idle == 3:
                raise StorageError(
                    f"The workers can't start: nothing was done in three attempts. {self.out / LOG_FILE} says more."
                )
            if todo and len(elsewhere) == len(todo):  # another sweep is at them; should it die, we take over
                time.sleep(_POLL_SECONDS)

    def _round(self, pool: _Pool, settings: WorkerSettings, workers: int, digests: Sequence[str]) -> None:
        try:
            self._with(pool, settings, workers, digests)
        except WorkerDiedError:
            for digest in set(abandoned(self.out)).intersection(digests):
                self._alone(pool, settings, digest)

    def _with(self, pool: _Pool, settings: WorkerSettings, workers: int, digests: Sequence[str]) -> None:
        """Let a pool work on some runs."""
        workers = min(workers, len(digests))
        with jobs_file(self.out, [Job(digest, self.runs[digest].spec) for digest in digests]) as jobs:
            told = replace(settings, jobs=jobs, threads=pool.threads(workers))
            with contextlib.closing(pool.work(told, workers, len(digests))) as outcomes:
                for outcome in outcomes:
                    self._count(outcome)
                    if self.found.stopped:
                        return

    def _alone(self, pool: _Pool, settings: WorkerSettings, digest: str) -> None:
        """A run during which a process died, again, with nothing beside it."""
        if self.found.stopped:
            return
        try:
            self._with(pool, settings, 1, [digest])
        except WorkerDiedError:
            if abandoned(self.out):
                record = Failure(digest, in_words(self.runs[digest].spec), _KILLED)
                write_failure(self.out, record)
                self._count(Outcome(digest, "failed", _KILLED))

    def _left(self, digests: Sequence[str]) -> list[str]:
        now = states(replace(self.plan, runs=tuple(self.runs[digest] for digest in digests)), self.out)
        return [digest for digest, state in now.items() if state in ("missing", "damaged")]

    # --- telling ------------------------------------------------------------------------------------------------------

    def _count(self, outcome: Outcome) -> None:
        if outcome.state == "no-space":
            self.found.stopped = f"{outcome.reason.rstrip('.')}. Nothing that was done is lost; then run it again."
            return
        self.finished += 1
        self.failed += outcome.state == "failed"
        self.found.done += outcome.state == "done"
        self.found.run_seconds += outcome.seconds
        self.found.images_encoded += outcome.images_encoded
        self._show()

    def _show(self) -> None:
        if self.progress and self.total:
            self.progress(f"runs: {self.failed} failed" if self.failed else "runs", self.finished, self.total)

    def summary(self) -> Summary:
        """What was done, and what is left."""
        state = states(self.plan, self.out)
        self.found.failed = read_failures(self.out, [digest for digest, value in state.items() if value == "failed"])
        self.found.left = sum(value in ("missing", "damaged") for value in state.values())
        self.found.seconds = time.monotonic() - self.began
        return self.found


# --- workers' processes -----------------------------------------------------------------------------------------------

_worker: Worker | None = None


def _work_once(settings: WorkerSettings) -> Outcome | None:
    """In a worker's process: do one run, with the worker of this sweep that the process keeps."""
    global _worker
    if _worker is None or _worker.settings != settings:
        if _worker is not None:
            _worker.close()
        _set_threads(settings.threads)
        _worker = Worker(settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a run's own warnings are kept in its result
        return _worker.next()


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _begin(out: str, parent: int) -> None:
    """A new local process: quiet, deaf to Ctrl-C (the sweep ends it), and gone when the sweep is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.WARNING)
    with contextlib.suppress(OSError):
        log = os.open(Path(out) / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: what it does then is half-done, and counts for nothing."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)


class _Pool:
    """Processes that work."""

    def usual_workers(self, device: str) -> int:
        """How many workers there are when nobody says."""
        return default_jobs(device)

    def threads(self, workers: int) -> int:
        """Threads for the arithmetic of each of some workers."""
        return max(1, _cores() // workers)

    def work(self, settings: WorkerSettings, workers: int, count: int) -> Any:
        """A generator of the outcomes of at most `count` runs.

        Raises:
            WorkerDiedError: A process was ended from outside.
        """
        raise NotImplementedError


class _LocalPool(_Pool):
    """loky's processes, as joblib brings them."""

    def work(self, settings: WorkerSettings, workers: int, count: int) -> Iterator[Outcome]:
        from concurrent.futures import FIRST_COMPLETED, wait

        from joblib.externals.loky.process_executor import BrokenProcessPool, ProcessPoolExecutor

        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        executor = ProcessPoolExecutor(
            max_workers=workers,
            initializer=_begin,
            initargs=(settings.out, os.getpid()),
            env=dict.fromkeys(names, str(settings.threads)),
        )
        ended = ExitStack()
        try:
            interrupted = ended.enter_context(_interrupts_noted())
            # no more at a time than there are workers: loky can't be ended cleanly while others wait in its queue
            waiting = {executor.submit(_work_once, settings) for _ in range(workers)}
            left = count - workers
            while waiting:
                ready, waiting = wait(waiting, timeout=_TICK_SECONDS, return_when=FIRST_COMPLETED)
                if interrupted.is_set():
                    raise KeyboardInterrupt
                for future in ready:
                    outcome = future.result()
                    if outcome is None:
                        left = 0
                        continue
                    if left > 0:
                        waiting.add(executor.submit(_work_once, settings))
                        left -= 1
                    yield outcome
            if interrupted.is_set():
                raise KeyboardInterrupt
        except BrokenProcessPool as error:
            raise WorkerDiedError from error
        finally:
            executor.shutdown(wait=True, kill_workers=True)
            ended.close()


class _JoblibPool(_Pool):
    """The backend that `joblib.parallel_config` has chosen."""

    def work(self, settings: WorkerSettings, workers: int, count: int) -> Iterator[Outcome]:
        from joblib import Parallel, delayed
        from joblib.externals.loky.process_executor import BrokenProcessPool

        parallel = Parallel(n_jobs=workers, batch_size=1, return_as="generator_unordered")
        try:
            for outcome in parallel(delayed(_work_once)(settings) for _ in range(count)):
                if outcome is not None:
                    yield outcome
        except BrokenProcessPool as error:
            raise WorkerDiedError from error


class _RayPool(_Pool):
    """Actors on a Ray cluster.

    Args:
        address: Of the cluster ("auto", "ray://…"); None for one that Ray starts here.
    """

    def __init__(self, address: str | None) -> None:
        self.address = address

    def usual_workers(self, device: str) -> int:
        have = self._cluster().cluster_resources()
        return max(1, int(have.get("GPU", 0) if device == "auto" else 0) or int(have.get("CPU", 1)))

    def threads(self, workers: int) -> int:
        cores = [int(node["Resources"].get("CPU", 0)) for node in self._cluster().nodes() if node["Alive"]]
        return max(1, min(sum(cores) // workers, max(cores, default=1)))  # a worker lives on one node

    def _cluster(self) -> Any:
        """Ray's module, connected."""
        try:
            import ray
        except ImportError as error:
            raise ConfigError("Ray isn't installed: pip install adaptkit[ray], or use --executor local.") from error
        if not ray.is_initialized():
            try:
                ray.init(self.address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ConfigError(f"There is no Ray cluster at {self.address!r}: {error}.") from error
        return ray

    def work(self, settings: WorkerSettings, workers: int, count: int) -> Iterator[Outcome]:
        ray = self._cluster()
        gpu = 1 if ray.cluster_resources().get("GPU") and settings.device == "auto" else 0
        actor = ray.remote(num_cpus=settings.threads, num_gpus=gpu)(_RayWorker)
        actors = [actor.remote(settings) for _ in range(workers)]
        died = False
        try:
            waiting = {one.work.remote(): one for one in actors}
            while waiting:
                ready, _ = ray.wait(list(waiting), num_returns=1)
                one = waiting.pop(ready[0])
                try:
                    outcome = ray.get(ready[0])
                except ray.exceptions.RayActorError:
                    died = True
                    continue
                if outcome is None:
                    ray.kill(one)  # others may wait for its place
                    continue
                waiting[one.work.remote()] = one
                yield outcome
        finally:
            for one in actors:
                ray.kill(one)
        if died:
            raise WorkerDiedError


class _RayWorker:
    """A worker as a Ray actor."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings

    def work(self) -> Outcome | None:
        """Do one run."""
        return _work_once(self.settings)
