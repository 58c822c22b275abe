"""What `run` and `compare` share: loading, tables, writing. Heavy rooms are imported inside the functions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptkit.commands import _console as console
from adaptkit.errors import StorageError

if TYPE_CHECKING:
    from adaptkit.commands._options import TaskOptions
    from adaptkit.evaluation.results import RunResult


def check_out(folder: Path) -> None:
    """Refuse an output folder that can't be used before any work is done for it.

    Raises:
        StorageError: It is a file, holds something, or can't be written to.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StorageError(f"{folder} is already there and not empty: choose another --out, or say --overwrite.")
    check_writable(folder)


def check_writable(folder: Path) -> None:
    """Refuse a folder below something that can't be written to.

    Raises:
        StorageError: A part of the path is a file, or permission is denied.
    """
    import os

    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise StorageError(f"{folder} can't be written: {parent} is a file, not a folder. Choose another --out.")
    if not os.access(parent, os.W_OK):
        raise StorageError(f"{folder} can't be written: permission is denied in {parent}. Choose another --out.")


def adapter_folder(path: Path) -> Path:
    """The adapter folder that a path means: itself, or the one in the folder of a run."""
    return path / "adapter" if (path / "adapter" / "adapter_config.json").is_file() else path


def default_out(options: TaskOptions, what: str) -> Path:
    """runs/<dataset>/<what>/<settings>, each part made fit for a file name."""
    task = options.task
    parts = (Path(task.dataset).name, what, f"{task.protocol}-{task.shots}shots-seed{task.seed}")
    return Path("runs", *(re.sub(r"[^A-Za-z0-9._-]+", "_", part).strip("._") or "run" for part in parts))


def part_columns(results: Sequence[RunResult]) -> list[str]:
    """Column titles of the tested parts."""
    names = [part.name for part in results[0].parts]
    return [*("accuracy" if name == "all" else name for name in names), *(["H"] if len(names) > 1 else [])]


def scores(result: RunResult) -> list[str]:
    """Cells of the tested parts, in percent; zero-shot fallbacks carry a star."""
    cells = [console.percent(part.accuracy) + ("*" if part.fallback else "") for part in result.parts]
    return [*cells, *([console.percent(result.harmonic_mean)] if result.harmonic_mean is not None else [])]


def summary(result: RunResult) -> dict[str, Any]:
    """A run as --json shows it."""
    from dataclasses import asdict

    return asdict(result)


def settings_line(options: TaskOptions, dataset: str) -> str:
    """One line that says what was run."""
    task = options.task
    return f"{dataset}, {task.protocol}, {task.shots} shots, seed {task.seed}, backbone {options.backbone}"
