"""`python -m benchmarks.embedded`: base, novel and H of the prompt methods on the embedded backbone and datasets.

Every run has its default recipe for the embedded backbone. Runs that are in the results already (same key: settings,
backbone, dataset, shots, seed) aren't repeated, except with --fresh. These numbers compare methods with each other on
small drawn images; they never stand beside published figures.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
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
from adaptkit.storage import atomic_path, write_json
from benchmarks.embedded.table import Scores, markdown

FOLDER = Path(__file__).parent
METHODS = (
    "zero-shot",
    "coop",
    "cocoop",
    "kgcoop",
    "prograd",
    "vpt",
    "ivlp",
    "maple",
    "promptsrc",
    "mmrl",
    "mmrlpp",
)
DATASETS = ("digits", "shapes", "textures")
SEEDS = (1, 2, 3)
SHOTS = 16


def run_all(
    plans: Sequence[RunPlan], known: dict[str, Scores], backbone: Backbone, store: FeatureStore, out: Path
) -> None:
    """Run what isn't known yet; written down after each run, so that an interruption loses one run at most."""
    for done, plan in enumerate(plans):
        digest = plan.key.digest
        if digest in known:
            continue
        with console.progress_bars(True) as progress:
            result = run_method(plan, backbone, store=store, progress=progress).result
        known[digest] = scores_of(result)
        write_json(out, {"backbone_digest": backbone.spec.digest, "runs": known})
        click.echo(f"{done + 1}/{len(plans)} {plan.task.dataset.name}, {plan.method}, seed {plan.task.seed}", err=True)


def scores_of(result: RunResult) -> Scores:
    """What the table needs of a run."""
    accuracy = {part.name: part.accuracy for part in result.parts}
    return {
        "dataset": result.key.dataset,
        "method": result.key.method,
        "seed": result.key.seed,
        "base": accuracy["base"],
        "novel": accuracy["novel"],
        "h": result.harmonic_mean,
        "trained": result.trained_parameters,
        "seconds": sum(result.seconds.values()),
    }


def read_known(path: Path) -> dict[str, Scores]:
    """Runs by the digest of their key; none where there is no file yet."""
    if not path.exists():
        return {}
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return dict(content["runs"])


@click.command()
@click.option("--methods", type=NameList(), default=",".join(METHODS), show_default=True)
@click.option("--datasets", type=NameList(), default=",".join(DATASETS), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=FOLDER / "results.json", help="JSON file of the runs.")
@click.option("--fresh", is_flag=True, help="Repeat runs that are in the file already.")
def main(methods: Sequence[str], datasets: Sequence[str], out: Path, fresh: bool) -> None:
    """Run, write results.json, and beside it table.md."""
    torch.set_num_threads(os.cpu_count() or 1)
    backbone = load_backbone("mini")
    plans = [
        plan_run(method, backbone, make_task(load_dataset(name), "base-to-novel", SHOTS, seed))
        for name in datasets
        for method in methods
        for seed in SEEDS
    ]
    known = read_known(out)
    wanted = [plan.key.digest for plan in plans]
    if fresh:
        known = {digest: scores for digest, scores in known.items() if digest not in wanted}
    with tempfile.TemporaryDirectory() as folder:
        run_all(plans, known, backbone, FeatureStore(folder), out)
    text = markdown([known[digest] for digest in wanted], SHOTS)
    with atomic_path(out.with_name("table.md")) as part:
        part.write_text(text, encoding="utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
