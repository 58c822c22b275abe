"""`adaptkit run`: one method on one task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adaptkit.commands import _console as console
from adaptkit.commands import _options, _runs

if TYPE_CHECKING:
    from adaptkit.backbones.base import Backbone
    from adaptkit.commands._options import TaskOptions
    from adaptkit.evaluation.protocols import RunOutcome, RunPlan
    from adaptkit.evaluation.results import RunResult
    from adaptkit.training.checkpoints import Checkpoints
    from adaptkit.training.processes import Processes
    from adaptkit.types import ProgressCallback


@click.command("run", short_help="one method on one task")
@click.option("--method", required=True, help="Registered name; 'adaptkit list methods' shows them.")
@_options.task_options
@click.option("--recipe", help="Recipe name, variant (csc), YAML file, or none for the method's own defaults.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting, such as training.lr=2e-3.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the result [default: below runs/].")
@click.option("--overwrite", is_flag=True, help="Replace what is in --out.")
@_options.checkpoint_option
@_options.log_options
@_options.json_option
def command(
    options: TaskOptions,
    method: str,
    recipe: str | None,
    overrides: tuple[str, ...],
    out: Path | None,
    overwrite: bool,
    checkpoint_minutes: float,
    log: tuple[str, ...],
    log_dir: Path | None,
    as_json: bool,
) -> None:
    """Fit one method on a few shots of a dataset, test it, and write result, predictions and adapter.

    A training that was killed goes on where its last checkpoint was when the same command is given again. Several
    processes can do one run of an mllm- method: torchrun -m adaptkit run …, or accelerate launch -m adaptkit run ….

    \b
    Examples:
      adaptkit run --method coop --dataset digits --protocol base-to-novel --shots 16
      adaptkit run my_photos --method tip-adapter --shots 4 --backbone ViT-B-16/openai
      adaptkit run shapes --method coop --protocol cross-dataset --targets textures,digits
      adaptkit run digits --method coop --log tensorboard
      torchrun --nproc-per-node 2 -m adaptkit run shapes --method mllm-lora --backbone mini-mllm
    """
    from adaptkit.methods import methods

    methods.entry(method)  # a misspelt name is said before anything is loaded
    target = out or _runs.default_out(options, method)
    if not overwrite:
        _runs.check_out(target)
    _runs.check_writable(target)
    _runs.check_apart(target, options.task.dataset, options.task.data_root)

    from adaptkit.data.features import FeatureStore
    from adaptkit.training.processes import together

    logs = log_dir or target.parent / "logs"
    with together(options.device) as processes:
        with (
            _runs.tracking(log if processes.main else (), logs) as trackers,
            console.progress_bars(processes.main and not as_json) as progress,
        ):
            plan, model = planned(options, method, recipe, overrides, processes, progress)
            kept = _runs.checkpoints_of(plan, target, checkpoint_minutes, overwrite, processes)
            trackers.begin(plan)
            outcome = _runs.do(plan, model, options, FeatureStore(options.cache), progress, trackers, kept)
            trackers.end(outcome.result)
            if processes.main:
                write_run(target, outcome, overwrite, kept)
        if processes.main:
            show(outcome.result, target, as_json)


def planned(
    options: TaskOptions,
    method: str,
    recipe: str | None,
    overrides: tuple[str, ...],
    processes: Processes,
    progress: ProgressCallback,
) -> tuple[RunPlan, Backbone]:
    """The run, with all checked that can be checked, and its backbone."""
    from adaptkit.evaluation.protocols import plan_run
    from adaptkit.evaluation.stored import backbone_for
    from adaptkit.evaluation.tasks import load_task

    task = load_task(options.task, progress)
    device = options.device if processes.count == 1 else processes.device
    model = backbone_for(task.dataset, options.backbone, device="cpu" if processes.sharded else device)
    return plan_run(method, model, task, recipe=recipe, overrides=overrides, precision=options.precision), model


def write_run(target: Path, outcome: RunOutcome, overwrite: bool, kept: Checkpoints | None) -> None:
    """Write what the run gave; its checkpoints aren't needed any more."""
    from adaptkit.evaluation import results

    results.write_run(target, outcome.result, outcome.predictions, outcome.model, overwrite=overwrite)
    if kept is not None:
        kept.clear()


def show(result: RunResult, target: Path, as_json: bool) -> None:
    """Print what came out."""
    if as_json:
        console.print_json({**_runs.summary(result), "folder": str(target)})
        return
    scored = _runs.part_columns([result])
    columns = ["method", *scored, "trained", "seconds"]
    row = [
        result.key.method,
        *_runs.scores(result, scored),
        console.count(result.trained_parameters),
        f"{sum(result.seconds.values()):.1f}",
    ]
    title = _runs.settings_line(result)
    if result.targets or result.among_all:  # many columns for one row: printed upright
        click.echo(title)  # on its own: the table is narrower
        console.print_table("", columns[:1] + row[:1], list(zip(columns[1:], row[1:], strict=True)), left=["method"])
    else:
        console.print_table(title, columns, [row], left=["method"])
    for warning in result.warnings:
        console.say(f"note: {warning}")
    console.say(f"Written to {target}; {_runs.next_step(result, target)}")
