"""`adaptkit sweep`: many runs from one YAML file, planned, run, watched and tried again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptkit.commands import _console as console
from adaptkit.commands import _options, _runs

if TYPE_CHECKING:
    from adaptkit.sweeps.costs import Estimate
    from adaptkit.sweeps.executor import Summary
    from adaptkit.sweeps.plan import Failure, Plan, State

_MOST_SHOWN = 20
_HOW = ("jobs", "device", "batch_size", "cache", "executor", "address")

_suite_options = _options.apply(
    [
        click.argument("suite", metavar="SUITE"),
        click.option("--out", type=click.Path(path_type=Path), help="Folder of the sweep [default: sweeps/SUITE]."),
        click.option("--data-root", type=click.Path(file_okay=False), help="Folder that holds the datasets' folders."),
        click.option(
            "--methods", "only_methods", type=_options.NameList(), help="Only these of the suite's methods: a,b,c."
        ),
        click.option("--datasets", "only_datasets", type=_options.NameList(), help="Only these of its datasets."),
        _options.json_option,
    ]
)
_work_options = _options.apply(
    [
        click.option(
            "--jobs", type=click.IntRange(min=1), help="Workers at a time [default: one per GPU, else per core]."
        ),
        click.option(
            "--device", default="auto", show_default=True, help="auto gives each worker a GPU; or cpu, cuda:1."
        ),
        click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Images at once."),
        click.option(
            "--cache", type=click.Path(file_okay=False), help="Folder of stored features [default: adaptkit's]."
        ),
        click.option(
            "--executor",
            type=click.Choice(["local", "ray"]),
            default="local",
            show_default=True,
            help="local: processes of this machine; ray: a Ray cluster that sees --out (pip install adaptkit[ray]).",
        ),
        click.option("--address", help="Of the Ray cluster, such as auto or ray://head:10001 [default: one here]."),
    ]
)


@click.group("sweep", short_help="many runs from a YAML suite")
def command() -> None:
    """Many runs from one YAML file: methods × datasets × shots × seeds × protocols × backbones.

    SUITE is a file, or the name of a suite that comes with adaptkit: embedded, coop-11, base-to-novel-11,
    cross-dataset, domain-generalisation. A sweep can be ended in any way and started again: what is done stays done.

    \b
    Examples:
      adaptkit sweep plan embedded                 what would be run, what is done, how long
      adaptkit sweep run embedded --jobs 2         do what is missing
      adaptkit sweep run coop-11 --data-root /data --executor ray --address auto
      adaptkit report sweeps/embedded              tables of what came out
    """


@command.command("plan")
@_suite_options
def plan_command(**given: Any) -> None:
    """Print the runs of SUITE, what of them is done, and what the rest will take.

    \b
    Example:
      adaptkit sweep plan my_suite.yaml --out results
    """
    plan, out, state, as_json = _planned(**given)
    found = _estimate(plan, out, state)
    if as_json:
        runs = [
            {"digest": run.digest, "folder": run.place, "state": state[run.digest], **_run_facts(run.spec)}
            for run in plan.runs
        ]
        facts = None if found is None else asdict(found)
        console.print_json({"suite": plan.name, "out": str(out), "runs": runs, "estimate": facts, "notes": plan.notes})
        return
    _show_plan(plan, state)
    for note in plan.notes[:_MOST_SHOWN]:
        console.say(f"note: {note}")
    _say_more(plan.notes, "notes")
    _say_estimate(found)


@command.command("run")
@_suite_options
@_work_options
def run_command(**given: Any) -> None:
    """Do those runs of SUITE that are neither done nor failed.

    \b
    Example:
      adaptkit sweep run embedded --methods zero-shot,tip-adapter --jobs 2
    """
    _work(given, retry=False)


@command.command("retry")
@_suite_options
@_work_options
def retry_command(**given: Any) -> None:
    """Do those runs of SUITE again that failed.

    \b
    Example:
      adaptkit sweep retry embedded
    """
    _work(given, retry=True)


@command.command("status")
@_suite_options
def status_command(**given: Any) -> None:
    """Say what of SUITE is done, what is being done, and what failed and why.

    \b
    Example:
      adaptkit sweep status embedded
    """
    from adaptkit.sweeps.claims import in_progress
    from adaptkit.sweeps.plan import read_failures

    plan, out, state, as_json = _planned(**given)
    running = in_progress(out) & set(state)
    counts = Counter(state.values())
    failures = read_failures(out, [digest for digest, value in state.items() if value == "failed"])
    if as_json:
        content = {"suite": plan.name, "out": str(out), "runs": len(plan.runs), **_all_states(counts)}
        console.print_json({**content, "running": len(running), "failures": [asdict(item) for item in failures]})
        return
    _show_plan(plan, state)
    if running:
        console.say(f"{len(running)} runs are being done right now.")
    _say_failures(failures, out, plan.name)


# --- what they share --------------------------------------------------------------------------------------------------


def _planned(
    suite: str,
    out: Path | None,
    data_root: str | None,
    only_methods: tuple[str, ...] | None,
    only_datasets: tuple[str, ...] | None,
    as_json: bool,
) -> tuple[Plan, Path, dict[str, State], bool]:
    """The suite's plan, the sweep's folder, and what there is of every run."""
    from adaptkit.sweeps.plan import make_plan, states
    from adaptkit.sweeps.suite import load_suite, narrowed

    found = load_suite(suite, data_root=data_root)
    if only_methods:
        found = narrowed(found, "methods", only_methods)
    if only_datasets:
        found = narrowed(found, "datasets", only_datasets)
    target = out or Path("sweeps") / found.name
    _runs.check_writable(target)
    with console.progress_bars(not as_json) as progress:
        plan = make_plan(found, progress=progress)
        return plan, target, states(plan, target, progress), as_json


def _work(given: dict[str, Any], retry: bool) -> None:
    """Do the missing runs, or the failed ones."""
    from adaptkit.sweeps.executor import run_sweep

    how = {name: given.pop(name) for name in _HOW}
    plan, out, _, as_json = _planned(**given)
    try:
        with console.progress_bars(not as_json) as progress:
            summary = run_sweep(plan, out, retry=retry, progress=progress, **how)
    except KeyboardInterrupt:
        console.say(f"Stopped. What is done is kept in {out}; the same command goes on from there.")
        raise click.exceptions.Exit(1) from None
    _tell(summary, plan, out, as_json)
    if summary.failed or summary.stopped or summary.left:
        raise click.exceptions.Exit(1)


def _tell(summary: Summary, plan: Plan, out: Path, as_json: bool) -> None:
    if as_json:
        console.print_json({"suite": plan.name, "out": str(out), "runs": len(plan.runs), **asdict(summary)})
        return
    parts = [f"{summary.done:,} done now", f"{summary.before:,} before"]
    parts += [f"{len(summary.failed):,} failed"] * bool(summary.failed) + [f"{summary.left:,} left"] * bool(
        summary.left
    )
    console.say(f"{len(plan.runs):,} runs: {', '.join(parts)}; {_duration(summary.seconds)}.")
    _say_failures(summary.failed, out, plan.name)
    if summary.stopped:
        console.say(f"Stopped: {summary.stopped}")
    if summary.done:
        console.say(f"Results are in {out}; tables of them: adaptkit report {out}")


def _run_facts(spec: Any) -> dict[str, Any]:
    task = {key: value for key, value in asdict(spec.task).items() if value not in (None, (), False)}
    return {"method": spec.method, "recipe": spec.recipe, "backbone": spec.backbone, **task}


def _all_states(counts: Counter[State]) -> dict[str, int]:
    return {state: counts[state] for state in ("done", "failed", "damaged", "missing")}


def _show_plan(plan: Plan, state: dict[str, State]) -> None:
    from adaptkit.sweeps.plan import counted

    rows = list(counted(plan, state))
    states = [name for name in ("done", "failed", "damaged", "missing") if any(row[name] for row in rows)]
    words: dict[str, Callable[[Any], str]] = {"shots": _numbers, "seeds": _numbers}
    said = {name: [words.get(name, str)(row[name]) for row in rows] for name in rows[0]}
    # what is the same everywhere goes into the title, so that the table fits a terminal
    same = [name for name in ("protocol", "backbone", "shots", "seeds") if len(set(said[name])) == 1]
    names = {"shots": "shots ", "seeds": "seeds "}
    title = ", ".join([f"{len(plan.runs):,} runs", *(names.get(name, "") + said[name][0] for name in same)])
    columns = [
        name for name in ("protocol", "backbone", "dataset", "methods", "shots", "seeds", "runs", *states)
        if name not in same
    ]  # fmt: skip
    cells = [list(row) for row in zip(*(said[name] for name in columns), strict=True)]
    if len(rows) > 1:
        sums = [console.count(sum(row[name] for row in rows)) for name in ("runs", *states)]
        cells.append(["all", *[""] * (len(columns) - len(sums) - 1), *sums])
    console.print_table(f"{plan.name}: {title}", columns, cells, left=["protocol", "backbone", "dataset"])


def _numbers(values: list[int]) -> str:
    """1, 2, 3 as "1-3"; others with spaces."""
    if len(values) > 2 and values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]}-{values[-1]}"
    return " ".join(map(str, values))


def _say_failures(failures: list[Failure], out: Path, name: str) -> None:
    for failure in failures[:_MOST_SHOWN]:
        more = f" ({out / 'failures' / failure.traceback})" if failure.traceback else ""
        console.say(f"failed: {failure.run}: {failure.reason}{more}")
    _say_more(failures, "failures")
    if failures:
        console.say(f"Try them again with: adaptkit sweep retry {name} --out {out}")


def _say_more(items: Any, what: str) -> None:
    if len(items) > _MOST_SHOWN:
        console.say(f"… and {len(items) - _MOST_SHOWN:,} more {what}; --json has them all.")


def _estimate(plan: Plan, out: Path, state: dict[str, State]) -> Estimate | None:
    """What the rest will take; None where there is none."""
    from adaptkit.sweeps.costs import estimate, probe
    from adaptkit.sweeps.results import read_runs

    rest = [run for run in plan.runs if state[run.digest] in ("missing", "damaged")]
    if not rest:
        return None
    earlier = read_runs([out])[0] if out.is_dir() else []
    return estimate(rest, earlier, {name: probe(name) for name in {run.spec.backbone for run in rest}})


def _say_estimate(found: Estimate | None) -> None:
    from adaptkit.sweeps.executor import default_jobs

    if found is None:
        console.say("Everything is done.")
        return
    jobs = min(default_jobs(), found.runs)
    console.say(
        f"The {found.runs:,} missing runs take about {_duration(found.seconds / jobs)} with {jobs}"
        f" worker{'s' if jobs > 1 else ''} here ({_duration(found.encoding_seconds)} of {_duration(found.seconds)} of"
        f" work for features that aren't stored yet),"
        f" {found.memory_bytes / 1e9:.1f} GB of memory per worker and {_bytes(found.disk_bytes)} on disk."
    )
    console.say(f"(Estimated {found.basis}.)")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} days"


def _bytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
