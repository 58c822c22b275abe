"""`adaptkit compare`: many methods on one task, ranked."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adaptkit.commands import _console as console
from adaptkit.commands import _options, _runs
from adaptkit.errors import DataError, StorageError, UnsupportedError
from adaptkit.methods import CLIP_ROWS

if TYPE_CHECKING:
    from adaptkit.backbones.base import Backbone
    from adaptkit.commands._options import TaskOptions
    from adaptkit.data.splits import Dataset
    from adaptkit.evaluation.protocols import RunPlan
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

MLLM_METHODS = ("mllm-zero-shot", "mllm-soft-prompt", "mllm-lora")
"""Compared on a multimodal language model where no methods are named."""

ZERO_SHOT = ("zero-shot", "mllm-zero-shot")

BEST = "best"


@click.command("compare", short_help="many methods on one task, ranked")
@_options.task_options
@click.option(
    "--methods",
    "names",
    type=_options.NameList(),
    help=f"a,b,c [default: {','.join(FAST_METHODS)}; with descriptions also {','.join(DESCRIBED_METHODS)}; on a"
    f" multimodal language model {','.join(MLLM_METHODS)}].",
)
@click.option(
    "--clip-backbone",
    default="mini",
    show_default=True,
    help=f"Where --backbone is a multimodal language model: the CLIP of the rows {' and '.join(CLIP_ROWS)} beside"
    " it; none leaves them out.",
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
    clip_backbone: str,
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
      adaptkit compare shapes --backbone mini-mllm --protocol base-to-novel
    """
    from adaptkit.methods import methods

    for name in names or ():
        methods.entry(name)
    target = out or _runs.default_out(options, "compare")
    for folder in (target, *([html.parent] if html else [])):
        _runs.check_writable(folder)

    logs = log_dir or target / "logs"
    with _runs.tracking(log, logs) as trackers, console.progress_bars(not as_json) as progress:
        rows = planned(options, names, clip_backbone, overrides, progress)
        check_replaceable(target, {row.folder: row.plan.key for row in rows}, overwrite)
        results = run_all(rows, options, target, overwrite, progress, trackers, checkpoint_minutes)
        if html:
            write_page(html, target, results, progress)
    ranked = rank(results)
    best_run = best_of(ranked)
    best = folder_of(best_run.key, results[0].key.backbone)
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


def default_methods(data: Dataset, model: Backbone) -> tuple[str, ...]:
    """What is compared where no methods are named."""
    if model.is_mllm:
        return MLLM_METHODS
    described = all(data.descriptions.get(name) for name in data.class_names)
    return FAST_METHODS + (DESCRIBED_METHODS if described else ())


@dataclass(frozen=True)
class Row:
    """A run of the comparison.

    Args:
        folder: Its name below --out.
        plan: The run.
        model: What it runs on.
    """

    folder: str
    plan: RunPlan
    model: Backbone


def folder_of(key: RunKey, main: str) -> str:
    """The name of a run's folder: its method's, with the backbone where that isn't the comparison's main one."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", key.backbone)
    return key.method if key.backbone == main else f"{key.method}@{plain}"


def planned(
    options: TaskOptions,
    names: tuple[str, ...] | None,
    clip_backbone: str,
    overrides: tuple[str, ...],
    progress: ProgressCallback,
) -> list[Row]:
    """All runs, with everything checked that can be checked before the first."""
    from adaptkit.evaluation.protocols import plan_run
    from adaptkit.evaluation.recipes import share_overrides
    from adaptkit.evaluation.stored import backbone_for
    from adaptkit.evaluation.tasks import load_task
    from adaptkit.methods import methods

    task = load_task(options.task, progress)
    model = backbone_for(task.dataset, options.backbone, device=options.device)
    chosen = [(name, model) for name in dict.fromkeys(names or default_methods(task.dataset, model))]
    if model.is_mllm and clip_backbone != "none":
        clip = backbone_for(task.dataset, clip_backbone, device=options.device)
        if clip.is_mllm:
            raise UnsupportedError(
                f"--clip-backbone {clip_backbone!r} is a multimodal language model itself: choose a CLIP, or none."
            )
        chosen += [(name, clip) for name in CLIP_ROWS]
    shares = share_overrides([methods.get(name) for name, _ in chosen], overrides)
    rows, refused = [], []
    for (name, on), share in zip(chosen, shares, strict=True):
        try:
            plan = plan_run(name, on, task, overrides=share, precision=options.precision)
            rows.append(Row(folder_of(plan.key, model.spec.name), plan, on))
        except UnsupportedError as error:
            refused.append(str(error))
    if refused:
        raise UnsupportedError("\n".join(refused))
    return rows


def run_all(
    rows: list[Row],
    options: TaskOptions,
    target: Path,
    overwrite: bool,
    progress: ProgressCallback,
    trackers: Trackers,
    checkpoint_minutes: float,
) -> list[RunResult]:
    """Run what isn't done yet; all rows answer among the same lists of classes."""
    from adaptkit.data.features import FeatureStore
    from adaptkit.evaluation.results import is_done, read_run, write_run

    store, results = FeatureStore(options.cache), []
    both = any(row.model.is_mllm for row in rows)
    for row in rows:
        folder, plan = target / row.folder, row.plan
        if not overwrite and is_done(folder, plan.key):
            results.append(read_run(folder))
            continue
        kept = _runs.checkpoints_of(plan, folder, checkpoint_minutes, overwrite)
        trackers.begin(plan)
        outcome = _runs.do(plan, row.model, options, store, progress, trackers, kept, both_lists=both)
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

    main = results[0].key.backbone
    records = [RunRecord(target / folder_of(result.key, main), result) for result in results]
    write_report(gather(records), {"html": path}, progress=progress)


def rank(results: list[RunResult]) -> list[RunResult]:
    """Zero-shot first, as what the others must beat; then by H or accuracy, falling."""
    first = [result for result in results if result.key.method in ZERO_SHOT]
    others = [result for result in results if result.key.method not in ZERO_SHOT]
    return first + sorted(others, key=lambda result: -result.score)


def is_transductive(result: RunResult) -> bool:
    """Whether its answers used the other test images."""
    from adaptkit.methods import methods

    return methods.get(result.key.method).transductive


def best_of(ranked: list[RunResult]) -> RunResult:
    """The first that learned something and answers image by image; where there is none, the first that learned."""
    learned = [result for result in ranked if result.key.method not in ZERO_SHOT]
    return next((result for result in learned if not is_transductive(result)), (learned or ranked)[0])


def show(ranked: list[RunResult], title: str) -> None:
    """The ranked table, and what a reader of it should know."""
    scored = _runs.part_columns(ranked)
    several = len({result.key.backbone for result in ranked}) > 1
    columns = ["", "method", *(["backbone"] if several else []), *scored, "gain", "trained", "seconds"]
    references: dict[str, float] = {}
    for result in ranked:
        if result.key.method in ZERO_SHOT:  # a language model may have two: the better one is to be beaten
            references[result.key.backbone] = max(result.score, references.get(result.key.backbone, 0.0))
    rows, place = [], 0
    for result in ranked:
        zero, reference = result.key.method in ZERO_SHOT, references.get(result.key.backbone)
        place += not zero
        gain = "" if reference is None or zero else f"{100 * (result.score - reference):+.1f}"
        name = result.key.method + ("†" if is_transductive(result) else "")
        cells = ["–" if zero else str(place), name, *([result.key.backbone] if several else [])]
        cells += [*_runs.scores(result, scored), gain]
        rows.append([*cells, console.count(result.trained_parameters), f"{sum(result.seconds.values()):.1f}"])
    left, note = ["", "method", "backbone"], notes_of(ranked, several)
    console.print_table(title, columns, rows, left=left, note=note, wide=True)
    for line in warnings_of(ranked):
        console.say(f"note: {line}")


def notes_of(ranked: list[RunResult], several: bool) -> str:
    """What stands below the table."""
    notes = []
    if any(part.fallback for result in ranked for part in result.parts):
        notes.append("* zero-shot: the method has no answer of its own for classes it never saw")
    if any(map(is_transductive, ranked)):
        notes.append("† answers all test images together: not comparable with the others, and not chosen before them")
    if several:
        notes.append("gain: over zero-shot on the same backbone")
    if any(result.among_all for result in ranked):
        notes.append("base/all, novel/all, H/all: among the classes of both halves")
    return "\n".join(notes)


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
