"""`python -m benchmarks.speed`: run the speed benchmarks, show a table, write one JSON."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import click
import torch

from adaptkit.backbones import load_backbone
from adaptkit.backbones.base import Backbone
from adaptkit.errors import AdaptKitError
from adaptkit.storage import write_json
from benchmarks.speed.commands import bench_run, bench_startup
from benchmarks.speed.extraction import bench_extraction
from benchmarks.speed.measure import Load, ProcessFailedError, Row, machine_facts
from benchmarks.speed.table import HEADER, line
from benchmarks.speed.training import bench_coop, bench_maple

SCHEMA = 1
BACKBONE = "ViT-B-16/random"
RESULTS = Path(__file__).parent / "results"

BENCHMARKS: dict[str, Callable[[Load, bool], Iterator[Row]]] = {
    "coop": bench_coop,
    "maple": bench_maple,
    "extraction": bench_extraction,
    "startup": bench_startup,
    "run": bench_run,
}


def run_benchmarks(
    names: Sequence[str], load: Load, quick: bool, show: Callable[[str], object] = click.echo
) -> tuple[list[Row], dict[str, str]]:
    """Run benchmarks one after the other; a row is shown as soon as it is measured.

    Returns:
        The rows, and by name why a benchmark failed (the others run all the same).
    """
    rows: list[Row] = []
    failed: dict[str, str] = {}
    show(HEADER)
    for name in names:
        try:
            for row in BENCHMARKS[name](load, quick):
                rows.append(row)
                show(line(row, judged=not quick))
        except (AdaptKitError, ProcessFailedError) as error:
            failed[name] = str(error)
            show(f"{name:<11}FAILED: {error}")
    return rows, failed


def report(rows: Sequence[Row], failed: dict[str, str], facts: dict[str, Any]) -> dict[str, Any]:
    """What is written down.

    Args:
        rows: What was measured.
        failed: Why benchmarks failed.
        facts: About the run: machine, backbone, quick, when.
    """
    return {"schema": SCHEMA, **facts, "rows": [row.to_dict() for row in rows], "failed": failed}


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(BENCHMARKS)), help="One benchmark; may be repeated.")
@click.option("--quick", is_flag=True, help="Tiny sizes, to see that it works: its ratios mean nothing.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON file; by default a new one in results/."
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of torch, here and in what is started.")
def main(only: Sequence[str], quick: bool, out: Path | None, threads: int | None) -> None:
    """Measure speed as ratios: the toolkit against a plain path in the same run, with the same numbers out.

    Exits 1 when a benchmark failed or the numbers differ; a ratio below what we want is shown, and isn't an error.
    """
    if threads:
        torch.set_num_threads(threads)
    started = time.strftime("%Y-%m-%dT%H%M%S", time.gmtime())
    facts = {"started": started, "backbone": BACKBONE, "quick": quick, "machine": machine_facts()}

    @cache
    def load() -> Backbone:
        return load_backbone(BACKBONE)

    rows, failed = run_benchmarks(only or list(BENCHMARKS), load, quick)
    if out is None and not quick:
        out = RESULTS / f"{started}.json"
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, report(rows, failed, facts))
        click.echo(f"\nWritten to {out}")
    if failed or not all(row.same_numbers for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torch's and open_clip's would stand between the table's lines:
    logging.disable(logging.WARNING)  # that weights are random is meant
    main()
