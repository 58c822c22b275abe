"""`python -m benchmarks.report`: reading and aggregating 10,000 made-up results, and the size of a usual page.

The results have the size of real ones (24 classes) and no predictions: 20 methods × 10 datasets × 5 shots × 10 seeds.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import click

from adaptkit.evaluation.results import RESULT_FILE, PartResult, RunKey, RunResult
from adaptkit.sweeps.report.aggregate import averages_of, gather
from adaptkit.sweeps.report.writing import write_report
from adaptkit.sweeps.results import read_runs

SEEDS, SHOTS, DATASETS = 10, (1, 2, 4, 8, 16), 10
_CLASSES, _IMAGES = 24, 960


def made_up(method: str, dataset: int, shots: int, seed: int, numbers: random.Random) -> RunResult:
    """A result as large as a real one."""
    settings = {"method": {}, "training": {f"setting_{n}": n for n in range(20)}, "templates": ["a photo of a {}."]}
    key = RunKey(
        method, "mini", "b" * 64, f"set-{dataset:02d}", f"{dataset:064x}", "few-shot", shots, seed, "coop", settings
    )
    correct = numbers.randint(400, _IMAGES)
    metrics = {f"metric_{n}": numbers.random() for n in range(10)} | {"ece": 0.1}
    per_class = tuple((correct // _CLASSES, _IMAGES // _CLASSES) for _ in range(_CLASSES))
    part = PartResult("all", _CLASSES, correct, _IMAGES, metrics, per_class)
    names = tuple(f"class {n}" for n in range(_CLASSES))
    origins = {f"training.setting_{n}": "default" for n in range(20)}
    plain = RunResult(1, key, key.digest, (part,), None, 512, 2048, {"fit": 1.0}, 1, 0, "f" * 64, names, ())
    return replace(plain, origins=origins, recipe=f"{method}/few-shot")


def write(root: Path, count: int) -> int:
    """`count` results below `root`."""
    numbers, written = random.Random(0), 0
    per_method = DATASETS * len(SHOTS) * SEEDS
    for method in range(-(-count // per_method)):
        for place in range(per_method):
            if written == count:
                break
            dataset, rest = divmod(place, len(SHOTS) * SEEDS)
            shots, seed = divmod(rest, SEEDS)
            name = f"method-{method:02d}" if method else "zero-shot"
            result = made_up(name, dataset, SHOTS[shots], seed + 1, numbers)
            folder = root / result.key_digest[:2] / result.key_digest
            folder.mkdir(parents=True)
            (folder / RESULT_FILE).write_text(json.dumps(asdict(result)))
            written += 1
    return written


@click.command()
@click.option("--count", default=10_000, show_default=True, help="How many results.")
@click.option("--page", is_flag=True, help="Draw the page too.")
def main(count: int, page: bool) -> None:
    """Measure, and print one JSON."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        facts: dict[str, float] = {"results": write(root, count)}
        began, cpu = time.perf_counter(), time.process_time()
        records, damaged = read_runs([root])
        facts["read_seconds"] = time.perf_counter() - began
        report = gather(records, damaged)
        for section in report.sections:
            for shots in section.shot_counts:
                for row in averages_of(section, shots):
                    row.value(section.ranked_by)
        facts |= {
            "seconds": time.perf_counter() - began,
            "processor_seconds": time.process_time() - cpu,
            "cells": len(report.cells),
        }
        if page:
            began = time.perf_counter()
            write_report(report, {"html": root / "page.html"})
            facts |= {
                "page_seconds": time.perf_counter() - began,
                "page_bytes": (root / "page.html").stat().st_size,
            }
    click.echo(json.dumps({name: round(value, 2) for name, value in facts.items()}, indent=2))


if __name__ == "__main__":
    main()
