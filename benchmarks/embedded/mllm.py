"""`python -m benchmarks.embedded.mllm`: base, novel and H of the methods on `mini-mllm`, with CLIP's rows beside them.

Every run has its default recipe for the embedded backbone, the same classes asked about in each half, and seeds 1 to 3.
Runs that are in the results already (same key) aren't repeated, except with --fresh.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch

from adaptkit.backbones.load import load_backbone
from adaptkit.commands._options import NameList
from adaptkit.data.features import FeatureStore
from adaptkit.data.sources import load_dataset
from adaptkit.evaluation.protocols import RunPlan, plan_run
from adaptkit.evaluation.tasks import make_task
from adaptkit.storage import atomic_path
from benchmarks.embedded.__main__ import FOLDER, SEEDS, SHOTS, read_known, run_all
from benchmarks.embedded.table import Scores, mllm_page

DATASETS = ("digits", "shapes", "textures", "species")
CLIP = "mini"
MLLM = "mini-mllm"


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Args:
        method: Registered name.
        backbone: Which one.
        overrides: Settings other than the recipe's.
        more: What the row's name says beside the method.
    """

    method: str
    backbone: str = MLLM
    overrides: Mapping[str, Any] = field(default_factory=dict)
    more: str = ""

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.method, self.more)))


ENTRIES = (
    Entry("zero-shot", CLIP, more="CLIP"),
    Entry("clip-adapter", CLIP, more="CLIP"),
    Entry("mllm-zero-shot"),
    Entry("mllm-zero-shot", overrides={"route": "letters"}, more="letters"),
    Entry("mllm-icl"),
    Entry("mllm-soft-prompt"),
    Entry("mllm-bitfit"),
    Entry("mllm-lora"),
    Entry("mllm-lora", overrides={"variant": "letters"}, more="letters"),
    Entry("mllm-lora", overrides={"variant": "softmax"}, more="softmax"),
    Entry("mllm-qlora", f"{MLLM}@nf4", more="nf4"),
    Entry("virft"),
    Entry("dive-k"),
    Entry("vladva"),
    Entry("zero-shot", more="features"),
    Entry("clip-adapter", more="features"),
    Entry("taskres", more="features"),
    Entry("gda", more="features"),
)


def planned(entry: Entry, datasets: Sequence[str], seeds: Sequence[int]) -> Iterator[RunPlan]:
    """The runs of a row."""
    backbone = load_backbone(entry.backbone)
    for dataset in map(load_dataset, datasets):
        for seed in seeds:
            task = make_task(dataset, "base-to-novel", SHOTS, seed)
            yield plan_run(entry.method, backbone, task, overrides=entry.overrides)


def chosen(names: Sequence[str] | None) -> list[Entry]:
    """Rows by method or whole name; all where none are named.

    Raises:
        click.UsageError: No row has that name.
    """
    unknown = [name for name in names or () if name not in {n for e in ENTRIES for n in (e.name, e.method)}]
    if unknown:
        raise click.UsageError(f"No row is called {unknown[0]!r}; known: {'; '.join(e.name for e in ENTRIES)}.")
    return [entry for entry in ENTRIES if not names or entry.name in names or entry.method in names]


@click.command()
@click.option("--rows", "names", type=NameList(), help="Methods; by default all of the table.")
@click.option("--datasets", type=NameList(), default=",".join(DATASETS), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=FOLDER / "mllm.json", help="JSON file of the runs.")
@click.option("--fresh", is_flag=True, help="Repeat runs that are in the file already.")
@click.option("--threads", type=click.IntRange(min=1), default=os.cpu_count(), help="Threads of torch.")
def main(names: Sequence[str] | None, datasets: Sequence[str], out: Path, fresh: bool, threads: int) -> None:
    """Run, write the JSON, and beside it the page of tables."""
    torch.set_num_threads(threads)
    known = read_known(out)
    digests = {name: load_backbone(name).spec.digest for name in sorted({entry.backbone for entry in ENTRIES})}
    shown: list[Scores] = []
    for entry in chosen(names):
        plans = list(planned(entry, datasets, SEEDS))
        wanted = [plan.key.digest for plan in plans]
        if fresh:
            known = {digest: scores for digest, scores in known.items() if digest not in wanted}
        backbone = load_backbone(entry.backbone)
        with tempfile.TemporaryDirectory() as folder:
            run_all(plans, known, backbone, FeatureStore(folder), out, {"backbone_digests": digests})
        shown += [{**known[digest], "method": entry.name} for digest in wanted]
    text = mllm_page(sorted(shown, key=lambda run: list(datasets).index(run["dataset"])), SHOTS)
    with atomic_path(out.with_suffix(".md")) as part:
        part.write_text(text, encoding="utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
