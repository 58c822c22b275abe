"""Runs followed in TensorBoard, Weights & Biases or MLflow, through accelerate's trackers; no run depends on one.

A tracker is talked to in a thread of its own, every few seconds, so that a slow one holds nothing up; the first thing
that goes wrong with it is kept as a note, and it is left alone from then on.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptkit.errors import ConfigError

if TYPE_CHECKING:
    from adaptkit.evaluation.protocols import RunPlan
    from adaptkit.evaluation.results import RunResult

Values = dict[str, Any]
Steps = list[tuple[int, dict[str, float]]]

TRACKERS = ("tensorboard", "wandb", "mlflow")
_PROJECT = "adaptkit"
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
_MLFLOW_RETRIES = "2"  # a server that isn't there is given up after seconds; by itself mlflow tries for minutes
_MLFLOW_BATCH = 1000  # figures that a server takes at once
_SECONDS_BETWEEN = 2.0  # epochs may take milliseconds, and a thread that writes all the time slows the others
_LONGEST_NOTE = 300


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that aren't installed, all in one message.

    Raises:
        ConfigError: Packages are missing.
    """
    missing = [name for name in names if not (_installed("accelerate") and _installed(name))]
    if missing:
        raise ConfigError(
            f"Logging to {' and '.join(missing)} needs packages that aren't installed:"
            f" pip install 'adaptkit[{','.join(missing)}]', or leave --log out."
        )


def _installed(package: str) -> bool:
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None  # a mere folder of that name, as wandb makes, is no package


class Trackers:
    """What follows the runs of one command, one run after the other.

    Args:
        names: Of `TRACKERS`; none for no tracking at all.
        folder: Where they keep what they write.
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        names = tuple(dict.fromkeys(names))
        check_trackers(names)
        self._workers = [_Worker(name, folder.absolute()) for name in names]
        self._method, self._epochs = "", 0
        self._waiting: Steps = []
        self._sent = -math.inf

    @property
    def notes(self) -> tuple[str, ...]:
        """What went wrong so far, a sentence per tracker."""
        return tuple(worker.problem for worker in self._workers if worker.problem)

    @property
    def hints(self) -> tuple[str, ...]:
        """How to look at what is logged, as far as a command does it."""
        return tuple(filter(None, (_HINTS[worker.name](worker.folder) for worker in self._workers)))

    def begin(self, plan: RunPlan) -> None:
        """A run starts: its key and settings are logged."""
        self._send()  # of a run that failed
        self._method, self._epochs, self._sent = plan.method, 0, -math.inf
        key = plan.key
        parts = (key.method, Path(key.dataset).name, key.protocol, f"{key.shots}shots", f"seed{key.seed}")
        name = _plain("-".join((*parts, time.strftime("%Y%m%d-%H%M%S"))))
        for worker in self._workers:
            worker.put(partial(worker.begin, name, config_of(plan)))

    def epoch(self, method: str, numbers: Mapping[str, float]) -> None:
        """An epoch is over; an `EpochCallback`. Epochs of a method that is fitted first stand under its name."""
        self._epochs += 1
        where = "train" if method == self._method else f"train/{method}"
        self._log({f"{where}/{name}": value for name, value in numbers.items()})
        if time.monotonic() - self._sent > _SECONDS_BETWEEN:
            self._send()

    def end(self, result: RunResult) -> None:
        """A run is over: what came out is logged."""
        self._log(numbers_of(result))
        self._send()
        for worker in self._workers:
            worker.put(worker.finish)

    def close(self, seconds: float) -> tuple[str, ...]:
        """Wait for all that was logged to be written, at most so long; the names of those that need longer."""
        self._send()
        until = time.monotonic() + seconds
        return tuple(worker.name for worker in self._workers if not worker.close(until - time.monotonic()))

    def _log(self, values: Mapping[str, float]) -> None:
        finite = {_plain(key): value for key, value in values.items() if math.isfinite(value)}
        self._waiting.append((self._epochs, finite))

    def _send(self) -> None:
        steps, self._waiting, self._sent = self._waiting, [], time.monotonic()
        for worker in self._workers if steps else ():
            worker.put(partial(worker.log, steps))


class _Worker:
    """One tracker and its thread: some trackers know a run only in the thread that started it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.problem = ""
        self._tracker: Any = None
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # imported here and not in the thread: two threads that import at a time may see half a module
        self._do(lambda: _prepare(name))
        # a daemon: one that never answers doesn't keep the process from ending
        self._thread = threading.Thread(target=self._work, name=f"adaptkit-{name}", daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], None]) -> None:
        """Have something done in the thread, in order."""
        self._jobs.put(job)

    def begin(self, name: str, config: Values) -> None:
        self.finish()  # the last run failed
        self.folder.mkdir(parents=True, exist_ok=True)
        tracker = _MAKERS[self.name](name, self.folder)
        tracker.start()
        self._tracker = tracker
        tracker.store_init_configuration(config)

    def log(self, steps: Steps) -> None:
        if self.name == "mlflow":
            _log_to_mlflow(self._tracker, steps)
            return
        for step, values in steps:
            self._tracker.log(values, step=step)

    def finish(self) -> None:
        if self._tracker is not None:
            tracker, self._tracker = self._tracker, None
            tracker.finish()

    def close(self, seconds: float) -> bool:
        """End the run that is still open, and the thread; whether that was done in time."""
        self.put(self.finish)
        self._jobs.put(None)
        self._thread.join(max(0.0, seconds))
        return not self._thread.is_alive()

    def _work(self) -> None:
        for job in iter(self._jobs.get, None):
            self._do(job)

    def _do(self, job: Callable[[], object]) -> None:
        if self.problem:
            return
        try:
            job()
        except (Exception, SystemExit) as error:  # anything: none of it is the run's concern
            self.problem = f"{self.name} failed and logs no more, the run isn't touched: {_reason(error)}"


def _prepare(name: str) -> None:
    """Import what a tracker needs, and set up the state that accelerate's trackers log through."""
    module = importlib.import_module(_MODULES[name])
    if name == "wandb" and os.environ.get("WANDB_MODE", "online") == "online":
        module.login()  # it may ask for a key, which it had better do before the work starts
    importlib.import_module("accelerate").PartialState()
    importlib.import_module("accelerate.tracking")


def _reason(error: BaseException) -> str:
    """An error in one line, without passwords that stand in addresses."""
    text = " ".join(str(error).split())[:_LONGEST_NOTE]
    return f"{type(error).__name__}: {re.sub(r'//[^/@ ]*@', '//', text)}"


# --- the trackers -----------------------------------------------------------------------------------------------------


def _tensorboard(name: str, folder: Path) -> Any:
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker(name, logging_dir=folder / "tensorboard")


def _wandb(name: str, folder: Path) -> Any:
    from accelerate.tracking import WandBTracker

    project = os.environ.get("WANDB_PROJECT", _PROJECT)
    # console: what is printed belongs to the command, not to one of its runs
    return WandBTracker(project, name=name, dir=str(folder), settings={"console": "off"})


def _mlflow(name: str, folder: Path) -> Any:
    import mlflow
    from accelerate.tracking import MLflowTracker

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", _MLFLOW_RETRIES)
    elsewhere = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(elsewhere or _mlflow_store(folder))
    artifacts = None if elsewhere else (folder / "mlartifacts").as_uri()
    return MLflowTracker(_PROJECT, run_name=name, logging_dir=artifacts)


def _log_to_mlflow(tracker: Any, steps: Steps) -> None:
    """All steps in one transaction: accelerate writes them one by one, which takes mlflow 25 ms each."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    now = int(1000 * time.time())
    metrics = [Metric(name, value, now, step) for step, values in steps for name, value in values.items()]
    for first in range(0, len(metrics), _MLFLOW_BATCH):
        MlflowClient().log_batch(tracker.tracker.info.run_id, metrics=metrics[first : first + _MLFLOW_BATCH])


def _mlflow_store(folder: Path) -> str:
    return f"sqlite:///{(folder / 'mlflow.db').as_posix()}"


def _mlflow_hint(folder: Path) -> str:
    return f"mlflow ui --backend-store-uri {os.environ.get('MLFLOW_TRACKING_URI') or _mlflow_store(folder)}"


_MAKERS: dict[str, Callable[[str, Path], Any]] = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
_HINTS: dict[str, Callable[[Path], str]] = {
    "tensorboard": lambda folder: f"tensorboard --logdir {folder / 'tensorboard'}",
    "wandb": lambda folder: "",  # prints its own
    "mlflow": _mlflow_hint,
}


# --- what is logged ---------------------------------------------------------------------------------------------------


def config_of(plan: RunPlan) -> Values:
    """The key and the settings of a run as flat names and plain values; lists are JSON."""
    flat: Values = {"key_digest": plan.key.digest, "recipe": "" if plan.recipe is None else plan.recipe.name}
    _flatten("", asdict(plan.key), flat)
    return flat


def _flatten(prefix: str, content: Mapping[str, Any], flat: Values) -> None:
    for name, value in content.items():
        if isinstance(value, Mapping):
            _flatten(f"{prefix}{_plain(str(name))}.", value, flat)
        else:
            plain = value is None or isinstance(value, (str, int, float))
            flat[prefix + _plain(str(name))] = value if plain else json.dumps(value, ensure_ascii=False)


def numbers_of(result: RunResult) -> dict[str, float]:
    """A run's figures under flat names: accuracies and other metrics by part, seconds by step, sizes."""
    numbers: dict[str, float] = {}
    for part in result.parts:
        metrics = {name: value for name, value in part.metrics.items() if isinstance(value, float)}  # no curves
        for name, value in {"accuracy": part.accuracy, **metrics}.items():
            numbers[f"test/{part.name}/{name}"] = value
    summaries = {
        "harmonic_mean": result.harmonic_mean,
        "target_average": result.target_average,
        "drop": result.drop,
    }
    numbers |= {f"test/{name}": value for name, value in summaries.items() if value is not None}
    numbers |= {f"seconds/{name}": value for name, value in result.seconds.items()}
    numbers["trained_parameters"] = result.trained_parameters
    numbers["adapter_bytes"] = result.adapter_bytes
    numbers["peak_memory_bytes"] = result.peak_memory_bytes
    return numbers


def _plain(name: str) -> str:
    """A name that every tracker takes."""
    return re.sub(r"[^A-Za-z0-9_./-]+", "_", name)
