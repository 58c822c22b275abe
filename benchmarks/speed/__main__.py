"""`python -m benchmarks.speed`: run the speed benchmarks, show a table, write one JSON."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import click
import torch

from adaptkit.backbones import load_backbone
from adaptkit.backbones.base import Backbone
from adaptkit.errors import AdaptKitError
from adaptkit.storage import write_json
from benchmarks.speed.commands import bench_run, bench_startup
from benchmarks.speed.extraction import bench_extraction
from benchmarks.speed.measure import Load, ProcessFailedError, Row, Scope, machine_facts
from benchmarks.speed.mllm import bench_scoring, bench_steps
from benchmarks.speed.table import HEADER, line
from benchmarks.speed.training import SUBJECTS, bench_prompts

SCHEMA = 1
BACKBONE = "ViT-B-16/random"
RESULTS = Path(__file__).parent / "results"

BENCHMARKS: dict[str, Callable[[Load, Scope], Iterator[Row]]] = {
    **{name: partial(bench_prompts, name) for name in SUBJECTS},
    "extraction": bench_extraction,
    "startup": bench_startup,
    "run": bench_run,
    "mllm-score": bench_scoring,
    "mllm-lora": bench_steps,
}
GROUPS = {"prompts": tuple(SUBJECTS), "mllm": ("mllm-score", "mllm-lora")}


def run_benchmarks(
    names: Sequence[str], load: Load, scope: Scope, show: Callable[[str], object] = click.echo
) -> tuple[list[Row], dict[str, str]]:
    """Run benchmarks one after the other; a row is shown as soon as it is measured.

    Returns:
        The rows, and by name why a benchmark failed (the others run all the same).
    """
    rows: list[Row] = []
    failed: dict[str, str] = {}
    show(HEADER)
    for name in names:
        show("")
        try:
            for row in BENCHMARKS[name](load, scope):
                rows.append(row)
                show(line(row, judged=not scope.quick))
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


def chosen(only: Sequence[str], device: str) -> list[str]:
    """The benchmarks that were asked for, groups written out, in their usual order.

    Raises:
        click.UsageError: The device isn't there, or a benchmark doesn't run on it.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: torch sees no CUDA GPU here. Leave it out to measure on the CPU.")
    usual = GROUPS["prompts"] if device == "cuda" else BENCHMARKS
    wanted = {name for choice in only for name in GROUPS.get(choice, (choice,))} or set(usual)
    misplaced = sorted(wanted - set(usual))
    if misplaced:
        raise click.UsageError(f"{misplaced[0]} is measured on the CPU only: leave out --device cuda.")
    return [name for name in BENCHMARKS if name in wanted]


@click.command()
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([*GROUPS, *BENCHMARKS]),
    help="One benchmark, or all of a group (prompts); may be repeated.",
)
@click.option("--quick", is_flag=True, help="Tiny sizes, to see that it works: its ratios mean nothing.")
@click.option("--classes", multiple=True, type=click.IntRange(min=1), help="Class count of prompts; may be repeated.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    help="Where prompts run; on cuda with larger batches too, and nothing else.",
)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON file; by default a new one in results/."
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of torch, here and in what is started.")
def main(
    only: Sequence[str],
    quick: bool,
    classes: Sequence[int],
    device: Literal["cpu", "cuda"],
    out: Path | None,
    threads: int | None,
) -> None:
    """Measure speed as ratios: the toolkit against a plain path in the same run, with the same numbers out.

    Exits 1 when a benchmark failed or the numbers differ; a ratio below what we want is shown, and isn't an error.
    """
    names = chosen(only, device)
    if threads:
        torch.set_num_threads(threads)
    started = time.strftime("%Y-%m-%dT%H%M%S", time.gmtime())
    facts = {"started": started, "backbone": BACKBONE, "device": device, "quick": quick, "machine": machine_facts()}

    @cache
    def load() -> Backbone:
        return load_backbone(BACKBONE, device=device)

    rows, failed = run_benchmarks(names, load, Scope(quick, device, tuple(sorted(set(classes)))))
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
