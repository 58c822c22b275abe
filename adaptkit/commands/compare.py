"""`adaptkit compare`: many methods on one task, ranked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adaptkit.commands import _console as console
from adaptkit.commands import _options, _runs
from adaptkit.errors import DataError, StorageError, UnsupportedError

if TYPE_CHECKING:
    from adaptkit.commands._options import TaskOptions
    from adaptkit.data.splits import Dataset
    from adaptkit.evaluation.results import RunKey, RunResult
    from adaptkit.evaluation.tracking import Trackers
    from adaptkit.types import ProgressCallback

FAST_METHODS = (
    "zero-shot",
    "linear-probe",
    "tip-adapter",
    "tip-adapter-f",
    "clip-adapter",
    "ape",
    "ape-t",
    "gda",
    "taskres",
    "lp-plus-plus",
    "zs-lp",
    "clap",
    "cross-modal",
)
"""What is compared where no methods are named: they read stored features only, learn from the shots, and are fitted in
about a second each on digits with mini. Transductive methods answer another question and are left out."""

DESCRIBED_METHODS = ("dclip", "cupl")
"""Compared as well where every class has sentences."""

BEST = "best"


@click.command("compare", short_help="many methods on one task, ranked")
@_options.task_options
@click.option(
    "--methods",
    "names",
    type=_options.NameList(),
    help=f"a,b,c [default: {','.join(FAST_METHODS)}; with descriptions also {','.join(DESCRIBED_METHODS)}].",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting, for all methods that read it.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the results [default: below runs/].")
@click.option("--overwrite", is_flag=True, help="Replace runs that are in --out.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a report of it: one page.")
@_options.checkpoint_option
@_options.log_options
@_options.json_option
def command(
    options: TaskOptions,
    names: tuple[str, ...] | None,
    overrides: tuple[str, ...],
    out: Path | None,
    overwrite: bool,
    html: Path | None,
    checkpoint_minutes: float,
    log: tuple[str, ...],
    log_dir: Path | None,
    as_json: bool,
) -> None:
    """Which method for my images? Runs several on one task from one pass over the images, and ranks them.

    Runs that are already in --out with the same settings aren't repeated. The best adapter is saved as OUT/best; it is
    a transductive one, whose answers depend on the other images asked about, only where no other was compared.

    \b
    Examples:
      adaptkit compare my_photos --shots 4
      adaptkit compare digits --protocol base-to-novel --shots 16 --methods zero-shot,coop,maple
      adaptkit compare digits --methods coop,maple --log tensorboard --log mlflow
    """
    from adaptkit.methods import methods

    for name in names or ():
        methods.entry(name)
    target = out or _runs.default_out(options, "compare")
    for folder in (target, *([html.parent] if html else [])):
        _runs.check_writable(folder)

    logs = log_dir or target / "logs"
    with _runs.tracking(log, logs) as trackers, console.progress_bars(not as_json) as progress:
        results = run_all(options, names, overrides, target, overwrite, progress, trackers, checkpoint_minutes)
        if html:
            write_page(html, target, results, progress)
    ranked = rank(results)
    best_run = best_of(ranked)
    best = best_run.key.method
    point_at_best(target, best)
    if as_json:
        together = [result.key.method for result in ranked if is_transductive(result)]
        runs = [_runs.summary(result) for result in ranked]
        console.print_json({"folder": str(target), "best": best, "transductive": together, "runs": runs})
        return
    show(ranked, _runs.settings_line(ranked[0]))
    console.say(f"Best adapter ({best}) saved; {_runs.next_step(best_run, target / BEST)}")
    if html:
        console.say(f"Report written to {html}")


def default_methods(data: Dataset) -> tuple[str, ...]:
    """What is compared where no methods are named."""
    described = all(data.descriptions.get(name) for name in data.class_names)
    return FAST_METHODS + (DESCRIBED_METHODS if described else ())


def run_all(
    options: TaskOptions,
    names: tuple[str, ...] | None,
    overrides: tuple[str, ...],
    target: Path,
    overwrite: bool,
    progress: ProgressCallback,
    trackers: Trackers,
    checkpoint_minutes: float = 0.0,
) -> list[RunResult]:
    """Run what isn't done yet; everything is checked before the first method runs."""
    from adaptkit.data.features import FeatureStore
    from adaptkit.evaluation.protocols import plan_run
    from adaptkit.evaluation.recipes import share_overrides
    from adaptkit.evaluation.results import is_done, read_run, write_run
    from adaptkit.evaluation.stored import backbone_for
    from adaptkit.evaluation.tasks import load_task
    from adaptkit.methods import methods

    task = load_task(options.task, progress)
    chosen = tuple(dict.fromkeys(names or default_methods(task.dataset)))
    model = backbone_for(task.dataset, options.backbone, device=options.device)
    shares = share_overrides([methods.get(name) for name in chosen], overrides)
    plans, refused = [], []
    for name, share in zip(chosen, shares, strict=True):
        try:
            plans.append(plan_run(name, model, task, overrides=share, precision=options.precision))
        except UnsupportedError as error:
            refused.append(str(error))
    if refused:
        raise UnsupportedError("\n".join(refused))
    check_replaceable(target, {plan.method: plan.key for plan in plans}, overwrite)
    store, results = FeatureStore(options.cache), []
    for plan in plans:
        folder = target / plan.method
        if not overwrite and is_done(folder, plan.key):
            results.append(read_run(folder))
            continue
        kept = _runs.checkpoints_of(plan, folder, checkpoint_minutes, overwrite)
        trackers.begin(plan)
        outcome = _runs.do(plan, model, options, store, progress, trackers, kept)
        trackers.end(outcome.result)
        write_run(folder, outcome.result, outcome.predictions, outcome.model, overwrite=True)
        if kept is not None:
            kept.clear()
        results.append(outcome.result)
        if outcome.result.fit.get("interrupted"):  # Ctrl-C means to stop, not to go on with the next method
            break
    return results


def write_page(path: Path, target: Path, results: list[RunResult], progress: ProgressCallback) -> None:
    """The report of these runs, as one page."""
    from adaptkit.sweeps.report.aggregate import gather
    from adaptkit.sweeps.report.writing import write_report
    from adaptkit.sweeps.results import RunRecord

    records = [RunRecord(target / result.key.method, result) for result in results]
    write_report(gather(records), {"html": path}, progress=progress)


def rank(results: list[RunResult]) -> list[RunResult]:
    """Zero-shot first, as what the others must beat; then by H or accuracy, falling."""
    first = [result for result in results if result.key.method == "zero-shot"]
    others = [result for result in results if result.key.method != "zero-shot"]
    return first + sorted(others, key=lambda result: -result.score)


def is_transductive(result: RunResult) -> bool:
    """Whether its answers used the other test images."""
    from adaptkit.methods import methods

    return methods.get(result.key.method).transductive


def best_of(ranked: list[RunResult]) -> RunResult:
    """The first that learned something and answers image by image; where there is none, the first that learned."""
    learned = [result for result in ranked if result.key.method != "zero-shot"]
    return next((result for result in learned if not is_transductive(result)), (learned or ranked)[0])


def show(ranked: list[RunResult], title: str) -> None:
    """The ranked table, and what a reader of it should know."""
    columns = ["", "method", *_runs.part_columns(ranked), "gain", "trained", "seconds"]
    reference = next((result.score for result in ranked if result.key.method == "zero-shot"), None)
    rows, place = [], 0
    for result in ranked:
        zero = result.key.method == "zero-shot"
        place += not zero
        gain = "" if reference is None or zero else f"{100 * (result.score - reference):+.1f}"
        name = result.key.method + ("†" if is_transductive(result) else "")
        cells = ["–" if zero else str(place), name, *_runs.scores(result), gain]
        rows.append([*cells, console.count(result.trained_parameters), f"{sum(result.seconds.values()):.1f}"])
    starred = any(part.fallback for result in ranked for part in result.parts)
    notes = ["* zero-shot: the method has no answer of its own for classes it never saw"] if starred else []
    if any(map(is_transductive, ranked)):
        notes.append("† answers all test images together: not comparable with the others, and not chosen before them")
    note = "\n".join(notes)
    console.print_table(title, columns, rows, left=["", "method"], note=note, wide=True)
    for line in warnings_of(ranked):
        console.say(f"note: {line}")


def warnings_of(ranked: list[RunResult]) -> list[str]:
    """Each warning once, with the methods it is about where it isn't about all; the table shows fallbacks itself."""
    about: dict[str, list[str]] = {}
    for result in ranked:
        for warning in dict.fromkeys(result.warnings):
            if ": zero-shot" not in warning:
                about.setdefault(warning, []).append(result.key.method)
    return [f"{', '.join(who)}: {what}" if len(who) < len(ranked) else what for what, who in about.items()]


def check_replaceable(target: Path, keys: Mapping[str, RunKey], overwrite: bool) -> None:
    """Refuse, before any work, to delete what isn't a run of ours, or (unless asked to) one with other settings.

    A run that can't be read may be replaced: it is of no use.

    Raises:
        StorageError: Something else lies where a result is to be written.
    """
    from adaptkit.evaluation.results import RESULT_FILE, read_run

    for folder in (target / BEST, *(target / method for method in keys)):
        occupied = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
        if occupied and not (folder / RESULT_FILE).is_file():
            raise StorageError(f"{folder} holds something else than a run, which would be lost: choose another --out.")
        if overwrite or not occupied or folder.name not in keys:
            continue
        try:
            found = read_run(folder).key
        except DataError:
            continue
        if found.digest != keys[folder.name].digest:
            raise StorageError(
                f"{folder} holds a run with other settings or data: choose another --out, or say --overwrite."
            )


def point_at_best(target: Path, method: str) -> None:
    """Make OUT/best a link to the best run; where links can't be made, a copy."""
    import shutil

    from adaptkit.storage import new_folder

    link, temporary = target / BEST, target / f".{BEST}-{os.getpid()}"
    try:
        temporary.symlink_to(method, target_is_directory=True)
        temporary.replace(link)
        return
    except OSError:  # a system without links, or a copy made on one
        temporary.unlink(missing_ok=True)
    if link.is_symlink():
        link.unlink()
    with new_folder(link, overwrite=True) as building:
        shutil.copytree(target / method, building, dirs_exist_ok=True)
