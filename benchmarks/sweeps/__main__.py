"""`python -m benchmarks.sweeps`: what a sweep costs beyond its runs, as ratios and one JSON.

Wanted: a sweep of ten feature-level methods × 5 shot counts × 3 seeds costs at most 1.2 times one feature pass and the
methods' own fitting, every view encoded once; at most 50 ms beyond each run; memory flat over 1,000 runs; 10,000 result
files read in under 10 s.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from adaptkit.storage import write_json
from adaptkit.sweeps.results import read_runs
from benchmarks.sweeps.measure import QUICK, Sizes, measure_overhead, measure_reading, measure_sharing

SCHEMA = 1
MOST_RATIO = 1.2
MOST_MS = 50.0
MOST_GROWTH = 20 * 2**20
MOST_READING = 10.0
PARTS = ("sharing", "overhead", "reading")


def judged(found: dict[str, Any]) -> dict[str, bool]:
    """What is as wanted, of what was measured."""
    verdicts: dict[str, bool] = {}
    if "sharing" in found:
        sharing = found["sharing"]
        verdicts["each view encoded once"] = sharing["encoded_by_sweep"] == sharing["image_views"]
        verdicts[f"at most {MOST_RATIO} × one pass and fitting"] = sharing["ratio"] <= MOST_RATIO
    if "overhead" in found:
        verdicts[f"overhead at most {MOST_MS:g} ms"] = found["overhead"]["overhead_ms"] <= MOST_MS
        verdicts["memory flat"] = found["overhead"]["memory_growth_bytes"] <= MOST_GROWTH
    if "reading" in found:
        verdicts[f"10,000 files in {MOST_READING:g} s"] = (
            1e4 / found["reading"]["files"] * found["reading"]["seconds"]["wall"] <= MOST_READING
        )
    return verdicts


def measure(sizes: Sizes, parts: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """The parts asked for; reading needs a run to vary, so overhead comes before it."""
    found: dict[str, Any] = {}
    if "sharing" in parts:
        found["sharing"] = measure_sharing(sizes, folder)
    if "overhead" in parts or "reading" in parts:
        overhead = measure_overhead(sizes, folder)
        if "overhead" in parts:
            found["overhead"] = overhead
    if "reading" in parts:
        found["reading"] = measure_reading(sizes, folder, read_runs([folder / "overhead"])[0][0].result)
    return found


@click.command()
@click.option("--quick", is_flag=True, help="Tiny sizes, to see that it works.")
@click.option("--only", multiple=True, type=click.Choice(PARTS), help="Only this part; repeatable.")
@click.option("--threads", default=1, show_default=True, help="For the arithmetic.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="File for the JSON.")
def main(quick: bool, only: tuple[str, ...], threads: int, out: Path | None) -> None:
    """What a sweep costs beyond its runs."""
    import torch

    from benchmarks.speed.measure import machine_facts

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="adaptkit-sweeps-") as folder:
        found = measure(QUICK if quick else Sizes(), only or PARTS, Path(folder))
    verdicts = judged(found)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    content = {"schema": SCHEMA, "quick": quick, "machine": machine_facts(), "load": load, **found, "met": verdicts}
    click.echo(json.dumps({**found, "load": load}, indent=2))
    for what, met in verdicts.items():
        click.echo(f"{'ok    ' if met else 'MISSED'} {what}")
    if out is not None:
        write_json(out, content)
    sys.exit(0 if quick or all(verdicts.values()) else 1)


if __name__ == "__main__":
    main()
