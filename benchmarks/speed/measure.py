"""What every benchmark shares: rows of results, timing in turn, memory, differences, and facts about the machine."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from adaptkit.backbones.base import Backbone

Unit = Literal["s", "bytes"]

Load = Callable[[], Backbone]
"""Gives the backbone, loaded once; benchmarks that need none don't call it."""


@dataclass(frozen=True)
class Scope:
    """What is asked of a run.

    Args:
        quick: Tiny sizes.
        device: Of the training steps.
        classes: Class counts of the training steps; empty for the usual ones.
    """

    quick: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    classes: tuple[int, ...] = ()


CPU = torch.device("cpu")

TOLERANCE = 1e-4
"""Largest difference between ours and the plain path that counts as the same numbers, relative to the largest entry."""

REPOSITORY = Path(__file__).resolve().parents[2]


# --- results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """How far two arrays are apart.

    Args:
        absolute: Largest absolute difference.
        relative: The same, divided by the largest absolute entry of the reference.
    """

    absolute: float
    relative: float

    @classmethod
    def between(cls, ours: Tensor, reference: Tensor) -> Difference:
        """Of one array [any shape]."""
        return cls.of_many([ours], [reference])

    @classmethod
    def of_many(cls, ours: Sequence[Tensor], references: Sequence[Tensor]) -> Difference:
        """The worst of several arrays, each measured by its own largest entry."""
        absolute = relative = 0.0
        for mine, theirs in zip(ours, references, strict=True):
            apart = float((mine.double() - theirs.double()).abs().max())
            largest = float(theirs.double().abs().max())
            absolute = max(absolute, apart)
            relative = max(relative, apart / largest if largest else apart)
        return cls(absolute, relative)


@dataclass(frozen=True)
class Row:
    """One measured thing.

    Args:
        benchmark: Its name on the command line.
        case: What was measured, in words.
        unit: Of `ours` and `plain`.
        ours: The toolkit's, the median of `samples["ours"]` where there are samples.
        plain: The plain way's; None where there is none to compare with.
        wanted_ratio: `plain / ours` must be at least this.
        wanted_most: `ours` must be at most this.
        extrapolated: Whether `plain` was computed from smaller cases instead of measured.
        differences: By name ("logits", "gradient"), ours against the plain path.
        exact: Whether the differences must stay below `TOLERANCE`.
        samples: Every single measurement, by side.
        note: What else must be known to read it.
        facts: More numbers.
    """

    benchmark: str
    case: str
    unit: Unit
    ours: float
    plain: float | None = None
    wanted_ratio: float | None = None
    wanted_most: float | None = None
    extrapolated: bool = False
    differences: Mapping[str, Difference] = field(default_factory=dict)
    exact: bool = True
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    note: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """How many times the plain way takes what we take."""
        return None if self.plain is None or self.ours <= 0 else self.plain / self.ours

    @property
    def met(self) -> bool | None:
        """Whether it is as fast as we want; None where nothing is asked."""
        if self.wanted_ratio is not None and self.ratio is not None:
            return self.ratio >= self.wanted_ratio
        return None if self.wanted_most is None else self.ours <= self.wanted_most

    @property
    def same_numbers(self) -> bool:
        """Whether ours and the plain path gave the same, as far as they were compared."""
        return not self.exact or all(difference.relative <= TOLERANCE for difference in self.differences.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "ratio": self.ratio, "met": self.met, "same_numbers": self.same_numbers}


# --- time -------------------------------------------------------------------------------------------------------------


def time_in_turn(
    sides: Mapping[str, Callable[[], object]], rounds: int, device: torch.device = CPU
) -> dict[str, list[float]]:
    """Seconds of each side in each round; sides take turns, so that all see the same neighbours on the machine."""
    # a GPU's work goes on behind Python's back
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, run in sides.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            seconds[side].append(time.perf_counter() - start)
    return seconds


def medians(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each side."""
    return {side: statistics.median(values) for side, values in samples.items()}


def on_line(points: Mapping[int, float], at: int) -> float:
    """The value at `at` of the straight line through the two largest measured points (through 0 where there is one)."""
    (high, top), *rest = sorted(points.items(), reverse=True)
    low, bottom = rest[0] if rest else (0, 0.0)
    return bottom + (top - bottom) * (at - low) / (high - low)


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_above(run: Callable[[], object], device: torch.device = CPU) -> int:
    """Bytes that `run` needs above what the process holds already, at its highest moment: resident, or on the GPU.

    Where the system can't set its high-water mark back (Linux can), whatever was higher before hides the peak; so this
    belongs into a process of its own, after a warm-up.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _high_water()
    run()
    return _high_water() - before


def _high_water() -> int:
    """Peak resident bytes. Linux's `ru_maxrss` won't do: a started process inherits that of whoever started it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- processes --------------------------------------------------------------------------------------------------------


class ProcessFailedError(RuntimeError):
    """A process that a benchmark started ended with an error."""


def run_process(command: Sequence[str], *, extra: Mapping[str, str] | None = None, timeout: float = 1800) -> str:
    """Run a command at the repository's root with as many threads as this process has; gives what it printed.

    Raises:
        ProcessFailedError: It can't be started, runs for longer than `timeout` seconds, or ends with an error.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **(extra or {})}
    shown = " ".join([Path(command[0]).name, *command[1:]])[:120]
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProcessFailedError(f"{shown}: {error}") from error
    if done.returncode:
        raise ProcessFailedError(f"{shown}: exit code {done.returncode}: {_last_words(done.stderr)}")
    return done.stdout


def _last_words(printed: str) -> str:
    """The last line of what a process complained, and the last place in the code where there is one."""
    lines = [line.strip() for line in printed.strip().splitlines()] or ["nothing on stderr"]
    places = [line for line in lines if line.startswith('File "')]
    return " in ".join([lines[-1], *places[-1:]])


# --- facts ------------------------------------------------------------------------------------------------------------


def machine_facts() -> dict[str, Any]:
    """What the seconds depend on; nothing that names the machine or its user."""
    return {
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average_before": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "open_clip_torch", "pillow", "numpy", "adaptkit")},
        "commit": _commit(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """The commit, with "+" where files differ from it; "" outside a repository."""
    try:
        commit = run_process(["git", "rev-parse", "HEAD"]).strip()
        changed = run_process(["git", "status", "--porcelain", "--", "adaptkit", "benchmarks"]).strip()
    except ProcessFailedError:
        return ""
    return commit + ("+" if changed else "")
