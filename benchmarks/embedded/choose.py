"""`python -m benchmarks.embedded.choose METHOD --try … --try …`: compare settings on validation images.

The quick recipes' settings are chosen here. The embedded datasets' validation images, of base and of novel classes,
take the place of the test images, which are never looked at.

    python -m benchmarks.embedded.choose coop --try training.lr=0.02 --try training.lr=0.1,training.epochs=60
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace

import click
import numpy as np
import torch

from adaptkit.backbones.load import load_backbone
from adaptkit.commands import _console as console
from adaptkit.commands._options import NameList
from adaptkit.data.features import FeatureStore
from adaptkit.data.sources import load_dataset
from adaptkit.data.splits import Dataset, TestSplit, ValSplit, require_split
from adaptkit.evaluation.protocols import plan_run, run_method
from adaptkit.evaluation.statistics import summarise
from adaptkit.evaluation.tasks import make_task
from benchmarks.embedded.__main__ import DATASETS, SEEDS, SHOTS


def on_validation(name: str) -> Dataset:
    """The dataset with half of its validation images in the place of its test images.

    The other half stays for methods that search.
    """
    data = load_dataset(name)
    val = require_split(data.val, ValSplit, "Choosing settings")
    order = np.argsort(val.labels, kind="stable")  # every other image of each class
    kept, shown = val.subset(np.sort(order[::2])), val.subset(np.sort(order[1::2]))
    test = TestSplit(shown.ids, shown.labels, shown.class_names, shown.source, shown.positions)
    return replace(data, test=test, val=kept)


@click.command()
@click.argument("method")
@click.option("--try", "tries", multiple=True, help="key=value,key=value: settings to compare; may be repeated.")
@click.option("--datasets", type=NameList(), default=",".join(DATASETS), show_default=True)
@click.option("--protocol", default="base-to-novel", show_default=True)
@click.option("--backbone", "name", default="mini", show_default=True, help="mini or mini-mllm.")
@click.option("--seeds", type=NameList(), default=",".join(map(str, SEEDS)), show_default=True)
def main(
    method: str, tries: Sequence[str], datasets: Sequence[str], protocol: str, name: str, seeds: Sequence[str]
) -> None:
    """Mean validation accuracy over seeds, base / novel (or all), for each set of settings."""
    torch.set_num_threads(os.cpu_count() or 1)
    backbone = load_backbone(name)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(folder)
        for settings in tries or ("",):
            overrides = [part for part in settings.split(",") if part]
            cells = []
            for dataset in datasets:
                parts: dict[str, list[float]] = {}
                for seed in map(int, seeds):
                    task = make_task(on_validation(dataset), protocol, SHOTS, seed)
                    result = run_method(plan_run(method, backbone, task, overrides=overrides), backbone, store=store)
                    for part in result.result.parts:
                        parts.setdefault(part.name, []).append(part.accuracy)
                cells.append(" / ".join(f"{100 * summarise(values).mean:.1f}" for values in parts.values()))
            rows.append([settings or "(recipe)", *cells])
            click.echo(f"{rows[-1]}", err=True)
    title = f"{method} on {name}, {protocol}, validation accuracy"
    console.print_table(title, ["settings", *datasets], rows, left=["settings"])


if __name__ == "__main__":
    main()
