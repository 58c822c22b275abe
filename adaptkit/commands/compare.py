"""`adaptkit compare`: many methods on one task, ranked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adaptkit.commands import _console as console
from adaptkit.commands import _options, _runs
from adaptkit.errors import DataError, StorageError

if TYPE_CHECKING:
    from adaptkit.commands._options import TaskOptions
    from adaptkit.evaluation.results import RunKey, RunResult
    from adaptkit.types import ProgressCallback

FAST_METHODS = ("zero-shot", "linear-probe", "tip-adapter", "tip-adapter-f", "clip-adapter")
BEST = "best"


@click.command("compare", short_help="many methods on one task, ranked")
@_options.task_options
@click.option("--methods", "names", type=_options.NameList(), help=f"a,b,c [default: {','.join(FAST_METHODS)}].")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting, for all methods that read it.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the results [default: below runs/].")
@click.option("--overwrite", is_flag=True, help="Replace runs that are in --out.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a report of it: one page.")
@_options.json_option
def command(
    options: TaskOptions,
    names: tuple[str, ...] | None,
    overrides: tuple[str, ...],
    out: Path | None,
    overwrite: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    """Which method for my images? Runs several on one task from one pass over the images, and ranks them.

    Runs that are already in --out with the same settings aren't repeated. The best adapter is saved as OUT/best.

    \b
    Examples:
      adaptkit compare my_photos --shots 4
      adaptkit compare digits --protocol base-to-novel --shots 16 --methods zero-shot,coop,maple
    """
    from adaptkit.methods import methods

    chosen = tuple(dict.fromkeys(names or FAST_METHODS))
    for name in chosen:
        methods.entry(name)
    target = out or _runs.default_out(options, "compare")
    for folder in (target, *([html.parent] if html else [])):
        _runs.check_writable(folder)

    with console.progress_bars(not as_json) as progress:
        results = run_all(options, chosen, overrides, target, overwrite, progress)
        if html:
            write_page(html, target, results, progress)
    ranked = rank(results)
    best = next((result for result in ranked if result.key.method != "zero-shot"), ranked[0])
    point_at_best(target, best.key.method)
    if as_json:
        console.print_json({"folder": str(target), "best": best.key.method, "runs": [_runs.summary(r) for r in ranked]})
        return
    show(ranked, _runs.settings_line(ranked[0]))
    console.say(f"Best adapter ({best.key.method}) saved: adaptkit predict {target / BEST} IMAGE")
    if html:
        console.say(f"Report written to {html}")


def run_all(
    options: TaskOptions,
    chosen: tuple[str, ...],
    overrides: tuple[str, ...],
    target: Path,
    overwrite: bool,
    progress: ProgressCallback,
) -> list[RunResult]:
    """Run what isn't done yet; everything is checked before the first method runs."""
    from adaptkit.backbones.load import load_backbone
    from adaptkit.data.features import FeatureStore
    from adaptkit.evaluation.protocols import plan_run, run_method
    from adaptkit.evaluation.recipes import share_overrides
    from adaptkit.evaluation.results import is_done, read_run, write_run
    from adaptkit.evaluation.tasks import load_task
    from adaptkit.methods import methods

    task = load_task(options.task, progress)
    model = load_backbone(options.backbone, device=options.device)
    shares = share_overrides([methods.get(name) for name in chosen], overrides)
    plans = [
        plan_run(name, model, task, overrides=share, precision=options.precision)
        for name, share in zip(chosen, shares, strict=True)
    ]
    check_replaceable(target, {plan.method: plan.key for plan in plans}, overwrite)
    store, results = FeatureStore(options.cache), []
    for plan in plans:
        folder = target / plan.method
        if not overwrite and is_done(folder, plan.key):
            results.append(read_run(folder))
            continue
        outcome = run_method(plan, model, store=store, batch_size=options.batch_size, progress=progress)
        write_run(folder, outcome.result, outcome.predictions, outcome.model, overwrite=True)
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


def show(ranked: list[RunResult], title: str) -> None:
    """The ranked table, and what a reader of it should know."""
    columns = ["", "method", *_runs.part_columns(ranked), "gain", "trained", "seconds"]
    reference = next((result.score for result in ranked if result.key.method == "zero-shot"), None)
    rows, place = [], 0
    for result in ranked:
        zero = result.key.method == "zero-shot"
        place += not zero
        gain = "" if reference is None or zero else f"{100 * (result.score - reference):+.1f}"
        cells = ["–" if zero else str(place), result.key.method, *_runs.scores(result), gain]
        rows.append([*cells, console.count(result.trained_parameters), f"{sum(result.seconds.values()):.1f}"])
    starred = any(part.fallback for result in ranked for part in result.parts)
    note = "* zero-shot: the method has no answer of its own for classes it never saw" if starred else ""
    console.print_table(title, columns, rows, left=["", "method"], note=note, wide=True)
    for warning in dict.fromkeys(
        warning for result in ranked for warning in result.warnings if ": zero-shot" not in warning
    ):
        console.say(f"note: {warning}")


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
