"""What `run` and `compare` share: loading, tables, writing. Heavy rooms are imported inside the functions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptkit.commands import _console as console
from adaptkit.errors import StorageError

if TYPE_CHECKING:
    from adaptkit.data.splits import Dataset
    from adaptkit.evaluation.results import RunResult


def load_data(
    name: str,
    data_root: str | None,
    templates: Sequence[str],
    shots: int | None = None,
    display_names: str | None = None,
    skip_unreadable: bool = False,
) -> Dataset:
    """The dataset as the command line asks for it; skipped images are counted in its notes."""
    from dataclasses import replace

    from adaptkit.data.checks import drop_unreadable
    from adaptkit.data.sources import load_dataset

    data = load_dataset(
        name, data_root=data_root, templates=list(templates) or None, shots=shots, display_names=display_names
    )
    if not skip_unreadable:
        return data
    train, dropped = drop_unreadable(data.train)
    val = data.val
    if val is not None:
        val, more = drop_unreadable(val)
        dropped += more
    notes = [f"{len(dropped)} unreadable images left out, the first: {dropped[0][0]}"] if dropped else []
    return replace(data, train=train, val=val, notes=(*data.notes, *notes))


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


def default_out(*parts: str) -> Path:
    """runs/<parts>, each part made fit for a file name."""
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


def settings_line(task_name: str, protocol: str, shots: int, seed: int, backbone: str) -> str:
    """One line that says what was run."""
    return f"{task_name}, {protocol}, {shots} shots, seed {seed}, backbone {backbone}"
