"""`python -m benchmarks.own_features`: all feature-level methods at 1-16 shots on two published files of features.

The files lie in --folder or $ADAPTKIT_FEATURES_DIR. Every run has its default recipe; nothing is chosen on the images
that are tested on. Runs that are in the results already aren't repeated, except with --fresh.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from adaptkit.backbones.base import Backbone
from adaptkit.commands._options import NameList
from adaptkit.data.features import FeatureStore
from adaptkit.data.sources import load_dataset
from adaptkit.data.splits import TestSplit
from adaptkit.errors import AdaptKitError, ConfigError, DataError
from adaptkit.evaluation.protocols import plan_run, run_method
from adaptkit.evaluation.stored import backbone_for
from adaptkit.evaluation.tasks import Task, make_task
from adaptkit.methods import methods
from adaptkit.methods.base import Method
from adaptkit.storage import atomic_path, digest_json, write_json
from benchmarks.own_features.table import Scores, markdown
from benchmarks.own_features.tuning import AFTER_TRAINING, TUNED, chosen_overrides

FOLDER = Path(__file__).parent
LENGTHS = "image_length=10,text_length=8"
"""The published features were scaled to length 1, and some recipes are made for the model's own. Chosen among 1, 4, 8
and 16 on held-out training images of Cars; see the README."""
FILES = {
    "stanford_cars": f"stanford_cars.safetensors@test=val,{LENGTHS}",
    "dtd": f"dtd.safetensors@train=val,{LENGTHS}",
}
SEEDS = {"stanford_cars": (1,), "dtd": (1, 2, 3)}
"""Cars comes with one ready draw per number of shots."""
SHOTS = (1, 2, 4, 8, 16)


def tasks(folder: Path, datasets: Sequence[str], shots: Sequence[int]) -> Iterator[tuple[Backbone, Task]]:
    """Every dataset with every number of shots and seed."""
    for name in datasets:
        for count in shots:
            data = load_dataset(f"features:{folder / FILES[name]}", shots=count)
            backbone = backbone_for(data)
            for seed in SEEDS[name]:
                yield backbone, make_task(data, "few-shot", count, seed)


def why_left_out(name: str, backbone: Backbone, task: Task) -> str:
    """Why a method can't run on a file of features; "" where it can."""
    kind = methods.get(name)
    try:
        plan_run(name, backbone, task)
    except AdaptKitError:
        if kind.reads == "images":
            return "trains on images"
        return "needs a text encoder" if kind.writes_texts else "needs descriptions, and the files hold none"
    return ""


def run_one(name: str, backbone: Backbone, task: Task, store: FeatureStore) -> Scores:
    """Choose settings on held-out shots where the method has some to choose, fit on all shots, test."""
    began = time.perf_counter()
    facts = {
        "dataset": task.dataset.name,
        "method": name,
        "shots": task.few_shot.shots,
        "seed": task.seed,
        "tested": task.dataset.source["test"],
        "total": len(task.parts[0].split),
    }
    try:
        chosen = chosen_overrides(name, backbone, task, store)
        before = {} if name in AFTER_TRAINING else chosen
        outcome = run_method(plan_run(name, backbone, task, overrides=before), backbone, store=store)
    except DataError as error:  # too few shots for the method
        return {**facts, "failed": str(error)}
    correct, result = outcome.result.parts[0].correct, outcome.result
    if chosen and not before:
        correct = correct_with(outcome.model.method, chosen, task.parts[0].split, backbone, store)
    return {
        **facts,
        "correct": correct,
        "accuracy": correct / facts["total"],
        "chosen": chosen,
        "recipe": result.recipe,
        "trained": result.trained_parameters,
        "seconds": time.perf_counter() - began,
    }


@torch.no_grad()
def correct_with(
    method: Method, chosen: Mapping[str, float], split: TestSplit, backbone: Backbone, store: FeatureStore
) -> int:
    """Images that a fitted method gets right with some of its values (alpha, beta) replaced."""
    for key, value in chosen.items():
        getattr(method, key.removeprefix("method.")).fill_(value)
    predicted = method(store.features(backbone, split)).argmax(dim=1)
    return int((predicted == torch.from_numpy(split.labels)).sum())


def key_of(name: str, backbone: Backbone, task: Task) -> str:
    """Names a run: its plan before settings are chosen, and whether some are."""
    how = "after" if name in AFTER_TRAINING else name in TUNED
    return digest_json([plan_run(name, backbone, task).key.digest, how])


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), envvar="ADAPTKIT_FEATURES_DIR", help="Where the files lie.")
@click.option("--methods", "names", type=NameList(), help="[default: all that run on features]")
@click.option("--datasets", type=NameList(), default=",".join(FILES), show_default=True)
@click.option("--shots", type=NameList(), default=",".join(map(str, SHOTS)), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=FOLDER / "results.json", help="JSON file of the runs.")
@click.option("--fresh", is_flag=True, help="Repeat runs that are in the file already.")
def main(
    folder: Path | None,
    names: tuple[str, ...] | None,
    datasets: tuple[str, ...],
    shots: tuple[str, ...],
    out: Path,
    fresh: bool,
) -> None:
    """Run, write results.json, and beside it table.md."""
    torch.set_num_threads(1)
    if folder is None:
        raise ConfigError("Say where the files of features lie: --folder, or the variable ADAPTKIT_FEATURES_DIR.")
    jobs = list(tasks(folder, datasets, [int(count) for count in shots]))
    reasons = {name: why_left_out(name, *jobs[0]) for name in methods}
    chosen = [name for name in names or methods if not reasons[name]]
    known: dict[str, Any] = {} if fresh or not out.exists() else json.loads(out.read_text(encoding="utf-8"))["runs"]
    wanted, store = [], FeatureStore()
    for backbone, task in jobs:
        for name in chosen:
            key = key_of(name, backbone, task)
            wanted.append(key)
            if key in known:
                continue
            known[key] = scores = run_one(name, backbone, task, store)
            write_json(out, {"runs": known})
            said = scores.get("failed") or f"{100 * scores['accuracy']:.2f} {scores['chosen'] or ''}"
            click.echo(f"{task.dataset.name} {name}, {task.few_shot.shots} shots, seed {task.seed}: {said}", err=True)
    text = markdown([known[key] for key in wanted], {name: why for name, why in reasons.items() if why})
    with atomic_path(out.with_name("table.md")) as part:
        part.write_text(text, encoding="utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
