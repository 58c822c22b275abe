"""What `run` and `compare` share: loading, tables, writing. Heavy rooms are imported inside the functions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptkit.commands import _console as console
from adaptkit.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from adaptkit.backbones.base import Backbone
    from adaptkit.commands._options import TaskOptions
    from adaptkit.data.features import FeatureStore
    from adaptkit.evaluation.protocols import RunOutcome, RunPlan
    from adaptkit.evaluation.results import RunResult
    from adaptkit.evaluation.tracking import Trackers
    from adaptkit.training.checkpoints import Checkpoints
    from adaptkit.training.processes import Processes
    from adaptkit.types import ProgressCallback


_SOON, _AT_LAST = 2.0, 120.0  # seconds that trackers get to write what is left


def check_out(folder: Path) -> None:
    """Refuse an output folder that can't be used before any work is done for it.

    Raises:
        StorageError: It is a file, holds something, or can't be written to.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StorageError(f"{folder} is already there and not empty: choose another --out, or say --overwrite.")
    check_writable(folder)


def check_apart(out: Path, *sources: str | Path | None) -> None:
    """Refuse an output folder whose replacing would take away what is read.

    Raises:
        ConfigError: A source lies in it.
    """
    import os

    whole = Path(os.path.realpath(out))
    for source in sources:
        if source is not None and out.exists() and Path(os.path.realpath(source)).is_relative_to(whole):
            raise ConfigError(f"{source} lies in {out}, which would be replaced as a whole: choose another --out.")


def check_writable(folder: Path, option: str = "--out") -> None:
    """Refuse a folder below something that can't be written to.

    Args:
        folder: There already or not.
        option: Which one names it.

    Raises:
        StorageError: A part of the path is a file, or permission is denied.
    """
    import os

    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise StorageError(f"{folder} can't be written: {parent} is a file, not a folder. Choose another {option}.")
    if not os.access(parent, os.W_OK):
        raise StorageError(f"{folder} can't be written: permission is denied in {parent}. Choose another {option}.")


def checkpoints_of(
    plan: RunPlan, folder: Path, minutes: float, overwrite: bool, processes: Processes | None = None
) -> Checkpoints | None:
    """Where the training of a run whose result goes to `folder` keeps its checkpoints: beside it.

    Raises:
        StorageError: The training of another run is there, and isn't to be overwritten.
    """
    from adaptkit.training.checkpoints import Checkpoints

    if not minutes:
        return None
    place = folder.with_name(f"{folder.name}.unfinished")
    count = 1 if processes is None else processes.count
    return Checkpoints(place, plan.key.digest, 60 * minutes, replace=overwrite, processes=count)


def do(
    plan: RunPlan,
    model: Backbone,
    options: TaskOptions,
    store: FeatureStore,
    progress: ProgressCallback,
    trackers: Trackers,
    kept: Checkpoints | None,
    both_lists: bool = False,
) -> RunOutcome:
    """Do a run as the options say."""
    from adaptkit.evaluation.protocols import run_method

    return run_method(
        plan,
        model,
        store=store,
        batch_size=options.batch_size,
        progress=progress,
        on_epoch=trackers.epoch,
        checkpoints=kept,
        both_lists=both_lists,
    )


@contextmanager
def tracking(names: Sequence[str], folder: Path) -> Iterator[Trackers]:
    """Trackers for the runs of the block; how to look at them is said first, and what went wrong with them last.

    Raises:
        ConfigError: One isn't installed.
        StorageError: The folder can't be written.
    """
    from adaptkit.evaluation.tracking import Trackers, check_trackers

    check_trackers(names)
    if names:
        check_writable(folder, "--log-dir")
    trackers = Trackers(names, folder)
    for hint in trackers.hints:
        console.say(f"Follow with: {hint}")
    early = trackers.notes
    for note in early:
        console.say(f"note: {note}")
    try:
        yield trackers
    finally:
        if late := trackers.close(_SOON):
            console.say(f"Waiting for {', '.join(late)} to take what is left (Ctrl-C leaves it) …")
            late = trackers.close(_AT_LAST)
        unfinished = [f"{name} didn't finish in time: its log may be incomplete" for name in late]
        for note in (*(note for note in trackers.notes if note not in early), *unfinished):
            console.say(f"note: {note}")


def adapter_folder(path: Path) -> Path:
    """The adapter folder that a path means: itself, the one in the folder of a run, or one fetched from the Hub."""
    from adaptkit.export.hub import fetch, is_on_hub

    if is_on_hub(path):
        return fetch(path)
    return path / "adapter" if (path / "adapter" / "adapter_config.json").is_file() else path


def default_out(options: TaskOptions, what: str) -> Path:
    """runs/<dataset>/<what>/<settings>, each part made fit for a file name."""
    task = options.task
    settings = [task.protocol, f"{task.shots}shots", f"seed{task.seed}", *(["joint"] if task.joint else [])]
    settings += [] if task.class_split is None else [f"split{task.class_split}"]
    parts = (Path(task.dataset).name, what, "-".join(settings))
    return Path("runs", *(re.sub(r"[^A-Za-z0-9._-]+", "_", part).strip("._") or "run" for part in parts))


def part_columns(results: Sequence[RunResult]) -> list[str]:
    """Column titles of the tested parts, and of what any of the results sums them up to."""
    first = results[0]
    names = ["accuracy" if len(first.parts) == 1 else part.name for part in first.parts]
    return list(dict.fromkeys([*names, *(title for result in results for title in summarised(result))]))


def summarised(result: RunResult) -> dict[str, float]:
    """What the parts come to, by column title: H, or the targets' average and how far it is below the source.

    Where base and novel images were also answered among all classes, these follow.
    """
    figures = {"H": result.harmonic_mean, "average": result.target_average, "drop": result.drop}
    figures |= zip(("base/all", "novel/all", "H/all"), result.among_all, strict=False)
    return {title: figure for title, figure in figures.items() if figure is not None}


def scores(result: RunResult, columns: Sequence[str]) -> list[str]:
    """Cells under the titles of `part_columns`, in percent; zero-shot fallbacks carry a star."""
    cells = [console.percent(part.accuracy) + ("*" if part.fallback else "") for part in result.parts]
    summed = summarised(result)
    return cells + [console.percent(summed[title]) if title in summed else "–" for title in columns[len(cells) :]]


def summary(result: RunResult) -> dict[str, Any]:
    """A run as --json shows it."""
    from dataclasses import asdict

    return {**asdict(result), "target_average": result.target_average, "drop": result.drop}


def settings_line(result: RunResult) -> str:
    """One line that says what was run, and how it differs from the published protocol."""
    key = result.key
    words = (key.dataset, key.protocol, f"{key.shots} shots", f"seed {key.seed}", f"backbone {key.backbone}")
    return "; ".join([", ".join(words), *key.marks])


def next_step(result: RunResult, folder: Path) -> str:
    """What can be done with an adapter."""
    from adaptkit.backbones.stored import UNIDENTIFIED

    if result.key.backbone_digest.startswith(UNIDENTIFIED):
        return (
            "the file of features doesn't identify the model that made them, so the adapter can't answer images: run"
            " with --backbone to get one that can"
        )
    return f"predict with: adaptkit predict {folder} IMAGE"
