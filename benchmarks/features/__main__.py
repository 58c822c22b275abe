"""`python -m benchmarks.features`: every method on frozen features at ImageNet's size, as a table and one JSON.

1,000 classes × 16 shots of random features as wide as ViT-B/16's; encoded texts are given. Training-free methods should
fit and predict in seconds; a trained one's epoch should be at least 20 times shorter than encoding the images again.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from adaptkit.backbones import load_backbone
from adaptkit.methods import methods
from adaptkit.storage import write_json
from benchmarks.features.measure import Sizes, job, measure_encoding, why_left_out
from benchmarks.speed.measure import ProcessFailedError, machine_facts, run_process
from benchmarks.speed.table import quantity

SCHEMA = 1
BACKBONE = "ViT-B-16/random"
RESULTS = Path(__file__).parent / "results.json"
MOST_SECONDS = 60.0  # "seconds": what a training-free method's fit may take
WANTED_RATIO = 20.0
QUICK = Sizes(classes=20, shots=2, val_shots=1, queries=50, dim=32, encoded=2)

_COLUMNS = "{:<16}{:<15}{:>10}{:>10}{:>10}{:>10}{:>10}{:>9}  {}"
HEADER = _COLUMNS.format("method", "kind", "fit", "predict", "memory", "settings", "epoch", "ratio", "wanted")


def judged(row: dict[str, Any], encoding: float) -> dict[str, Any]:
    """A method's numbers with its ratio to encoding again, and whether it is as fast as wanted (None: nothing is).

    Args:
        row: From `measure_method`.
        encoding: Seconds that one pass of the encoder takes.
    """
    epoch = row["epoch_seconds"]
    ratio = encoding / epoch if epoch else None
    met = None
    if row["kind"] == "training-free":
        met = row["fit_seconds"] <= MOST_SECONDS
    elif ratio is not None:
        met = ratio >= WANTED_RATIO
    return {**row, "ratio": ratio, "met": met}


def line(name: str, row: dict[str, Any], *, quick: bool) -> str:
    """One row for people."""
    if "kind" not in row:
        return f"{name:<16}{row.get('left_out') or row.get('failed')}"
    wanted = {"training-free": f"fit <= {MOST_SECONDS:g} s", "trained": f"ratio >= {WANTED_RATIO:g}"}.get(
        row["kind"], ""
    )
    verdict = "" if quick or row["met"] is None else " met" if row["met"] else " MISSED"
    return _COLUMNS.format(
        name,
        row["kind"],
        quantity(row["fit_seconds"], "s"),
        quantity(row["predict_seconds"], "s"),
        quantity(row["peak_bytes"], "bytes"),
        row["settings_tried"] or "",
        quantity(row["epoch_seconds"], "s") if row["epoch_seconds"] else "",
        f"~{row['ratio']:.3g}x" if row["ratio"] else "",
        wanted + verdict,
    ).rstrip()


def measure_all(
    names: Sequence[str], sizes: Sizes, encoding: float, limit: float, show: Callable[[str], object]
) -> dict[str, dict[str, Any]]:
    """Each method in a process of its own; one that fails or takes too long doesn't stop the others."""
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        reason = why_left_out(name)
        row: dict[str, Any] = {"left_out": reason}
        if not reason:
            command = [sys.executable, "-m", "benchmarks.features.measure", job(name, sizes)]
            try:
                row = json.loads(run_process(command, timeout=limit).splitlines()[-1])
            except ProcessFailedError as error:
                why = f"took more than {limit:g} s" if "timed out" in str(error) else str(error)
                row = {"failed": why}
        rows[name] = judged(row, encoding) if "kind" in row else row
        show(line(name, rows[name], quick=sizes is QUICK))
    return rows


@click.command()
@click.option("--only", multiple=True, help="A method; may be repeated. By default all on frozen features.")
@click.option("--quick", is_flag=True, help="Tiny sizes, to see that it works: its numbers mean nothing.")
@click.option("--limit", default=600.0, show_default=True, help="Seconds that a method may take.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON file; by default results.json here.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of torch.")
def main(only: Sequence[str], quick: bool, limit: float, out: Path | None, threads: int | None) -> None:
    """Measure methods on frozen features at ImageNet's size.

    Exits 1 when a method failed; one that is slower than wanted is shown, and isn't an error.
    """
    if threads:
        torch.set_num_threads(threads)
    for name in only:
        methods.entry(name)  # an unknown one is refused before anything is measured
    sizes = QUICK if quick else Sizes()
    backbone = "mini" if quick else BACKBONE
    started = time.strftime("%Y-%m-%dT%H%M%S", time.gmtime())
    encoding = measure_encoding(load_backbone(backbone), sizes)
    click.echo(
        f"Encoding {encoding['images']} images again with {backbone}: ~{quantity(encoding['seconds'], 's')}"
        f" (from {encoding['measured_images']} images)\n\n{HEADER}"
    )
    rows = measure_all(only or tuple(methods), sizes, encoding["seconds"], limit, click.echo)
    facts = {"schema": SCHEMA, "started": started, "quick": quick, "sizes": vars(sizes), "backbone": backbone}
    out = out or (None if quick or only else RESULTS)
    if out is not None:
        write_json(out, {**facts, "machine": machine_facts(), "encoding": encoding, "methods": rows})
        click.echo(f"\nWritten to {out}")
    if any("failed" in row for row in rows.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # that weights are random is meant
    main()
