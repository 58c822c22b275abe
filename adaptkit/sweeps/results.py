"""Reading many runs back: every finished run below some folders, and what couldn't be read and why."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from adaptkit.errors import DataError, MissingPathError
from adaptkit.evaluation.results import RESULT_FILE, RunResult, read_run


@dataclass(frozen=True)
class RunRecord:
    """A finished run.

    Args:
        folder: Where it lies.
        result: What it gave.
    """

    folder: Path
    result: RunResult


@dataclass(frozen=True)
class BadRun:
    """A run's folder whose result can't be used.

    Args:
        folder: Where it lies.
        reason: Why, in one sentence.
    """

    folder: Path
    reason: str


def run_folders(folder: str | Path) -> Iterator[Path]:
    """Every folder at or below `folder` that has a `result.json`, in the order of their names.

    Links to folders aren't followed (`compare` keeps one to its best run), nor are hidden folders entered: those are
    being written.
    """
    for place, folders, files in os.walk(folder):
        if RESULT_FILE in files:
            folders.clear()  # a run holds its adapter, and no other runs
            yield Path(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def read_runs(folders: Sequence[Path]) -> tuple[list[RunRecord], list[BadRun]]:
    """Read and check every run at or below some folders; a run that two of them reach is read once.

    Args:
        folders: Folders of runs, of sweeps, or of several of them.

    Returns:
        The runs, and those that are damaged.

    Raises:
        MissingPathError: Some of the folders aren't there; all of them are named.

    Example:
        >>> records, damaged = read_runs([Path("sweeps/embedded")])  # doctest: +SKIP
        >>> records[0].result.key.method  # doctest: +SKIP
        'ape'
    """
    missing = [str(folder) for folder in folders if not Path(folder).is_dir()]
    if missing:
        raise MissingPathError(f"There is no folder {', '.join(missing)}: give folders that hold runs.")
    records: list[RunRecord] = []
    damaged: list[BadRun] = []
    seen: set[str] = set()
    for folder in folders:
        for place in run_folders(folder):
            real = os.path.realpath(place)
            if real in seen:
                continue
            seen.add(real)
            try:
                records.append(RunRecord(place, read_run(place)))
            except DataError as error:
                damaged.append(BadRun(place, str(error)))
    return records, damaged
