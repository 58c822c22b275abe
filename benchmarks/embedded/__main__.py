"""`python -m benchmarks.embedded`: accuracies of the methods on the embedded backbone and datasets.

By default base, novel and H of the prompt methods; with `--protocol few-shot` all other methods at 1, 4 and 16 shots.
Every run has its default recipe for the embedded backbone. Runs that are in the results already (same key: settings,
backbone, dataset, shots, seed) aren't repeated, except with --fresh. These numbers compare methods with each other on
small drawn images; they never stand beside published figures.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from adaptkit.backbones.base import Backbone
from adaptkit.backbones.load import load_backbone
from adaptkit.commands import _console as console
from adaptkit.commands._options import NameList
from adaptkit.data.features import FeatureStore
from adaptkit.data.sources import load_dataset
from adaptkit.evaluation.protocols import RunPlan, plan_run, run_method
from adaptkit.evaluation.results import RunResult
from adaptkit.evaluation.tasks import make_task
from adaptkit.methods import methods
from adaptkit.storage import atomic_path, write_json
from benchmarks.embedded.table import Scores, base_to_novel_page, few_shot_page

FOLDER = Path(__file__).parent
SEEDS = (1, 2, 3)
SHOTS = 16


@dataclass(frozen=True)
class Table:
    """What one of the two tables holds.

    Args:
        methods: Registered names.
        datasets: Embedded ones.
        shots: Images per class.
        results: JSON file of the runs; the page lies beside it with the suffix `.md`.
        page: Makes the page of the runs.
    """

    methods: tuple[str, ...]
    datasets: tuple[str, ...]
    shots: tuple[int, ...]
    results: Path
    page: Callable[[Sequence[Scores]], str]


def prompt_methods() -> tuple[str, ...]:
    """Zero-shot and the prompt family, in the registry's order."""
    return ("zero-shot", *(name for name in methods if methods.entry(name).family == "prompts"))


def other_methods() -> tuple[str, ...]:
    """Zero-shot and all methods but the prompt family, in the registry's order; those of language models need another
    backbone."""
    left_out = ("prompts", "mllm")
    return ("zero-shot", *(n for n in methods if n != "zero-shot" and methods.entry(n).family not in left_out))


DATASETS = ("digits", "shapes", "textures")
TABLES = {
    "base-to-novel": Table(
        prompt_methods(),
        DATASETS,
        (SHOTS,),
        FOLDER / "base_to_novel.json",
        lambda runs: base_to_novel_page(runs, SHOTS),
    ),
    "few-shot": Table(other_methods(), (*DATASETS, "species"), (1, 4, 16), FOLDER / "few_shot.json", few_shot_page),
}


def run_all(
    plans: Sequence[RunPlan],
    known: dict[str, Scores],
    backbone: Backbone,
    store: FeatureStore,
    out: Path,
    head: Mapping[str, Any] | None = None,
) -> None:
    """Run what isn't known yet; written down after each run, so that an interruption loses one run at most.

    Args:
        plans: The runs.
        known: What is known, by the digest of a run's key; it grows.
        backbone: Of all the runs.
        store: Of features.
        out: The file.
        head: What stands there before the runs; by default the backbone's digest.
    """
    head = head or {"backbone_digest": backbone.spec.digest}
    for done, plan in enumerate(plans):
        digest = plan.key.digest
        if digest in known:
            continue
        with console.progress_bars(True) as progress:
            result = run_method(plan, backbone, store=store, progress=progress).result
        known[digest] = scores_of(result)
        write_json(out, {**head, "runs": known})
        click.echo(f"{done + 1}/{len(plans)} {_named(plan)}", err=True)


def _named(plan: RunPlan) -> str:
    key = plan.key
    return f"{key.dataset}, {key.method}, {key.shots} shots, seed {key.seed}"


def scores_of(result: RunResult) -> Scores:
    """What the table needs of a run."""
    harmonic = {} if result.harmonic_mean is None else {"h": result.harmonic_mean}
    return {
        "dataset": result.key.dataset,
        "method": result.key.method,
        "shots": result.key.shots,
        "seed": result.key.seed,
        **{part.name: part.accuracy for part in result.parts},
        **harmonic,
        "trained": result.trained_parameters,
        "seconds": sum(result.seconds.values()),
    }


def read_known(path: Path) -> dict[str, Scores]:
    """Runs by the digest of their key; none where there is no file yet."""
    if not path.exists():
        return {}
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return dict(content["runs"])


def plan_all(
    table: Table, protocol: str, names: Sequence[str], datasets: Sequence[str], backbone: Backbone
) -> list[RunPlan]:
    """Every run of a table; methods that need descriptions have none on datasets without."""
    plans = []
    for dataset in map(load_dataset, datasets):
        usable = [name for name in names if dataset.descriptions or methods.get(name).reads_descriptions != "needed"]
        for shots in table.shots:
            tasks = [make_task(dataset, protocol, shots, seed) for seed in SEEDS]
            plans += [plan_run(name, backbone, task) for name in usable for task in tasks]
    return plans


@click.command()
@click.option("--protocol", type=click.Choice(list(TABLES)), default="base-to-novel", show_default=True)
@click.option("--methods", "names", type=NameList(), help="By default all of the table.")
@click.option("--datasets", type=NameList(), help="By default all of the table.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file of the runs [default: the one kept here].")
@click.option("--fresh", is_flag=True, help="Repeat runs that are in the file already.")
@click.option("--threads", type=click.IntRange(min=1), default=os.cpu_count(), help="Threads of torch.")
def main(
    protocol: str,
    names: Sequence[str] | None,
    datasets: Sequence[str] | None,
    out: Path | None,
    fresh: bool,
    threads: int,
) -> None:
    """Run, write the JSON, and beside it the page of tables."""
    torch.set_num_threads(threads)
    table = TABLES[protocol]
    out = out or table.results
    backbone = load_backbone("mini")
    plans = plan_all(table, protocol, names or table.methods, datasets or table.datasets, backbone)
    known = read_known(out)
    wanted = [plan.key.digest for plan in plans]
    if fresh:
        known = {digest: scores for digest, scores in known.items() if digest not in wanted}
    with tempfile.TemporaryDirectory() as folder:
        run_all(plans, known, backbone, FeatureStore(folder), out)
    text = table.page([known[digest] for digest in wanted])
    with atomic_path(out.with_suffix(".md")) as part:
        part.write_text(text, encoding="utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
