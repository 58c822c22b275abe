"""Results of the embedded runs as one Markdown page: means over seeds, and what should hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from adaptkit.evaluation.statistics import Summary, summarise

Scores = dict[str, Any]
"""One run: dataset, method, seed, base, novel, h (fractions), trained, seconds."""

REGULARISED = ("kgcoop", "promptsrc", "mmrl", "maple")


def markdown(runs: Sequence[Scores], shots: int) -> str:
    """The page: a table for each dataset, then the two rules with where they hold."""
    seeds = sorted({run["seed"] for run in runs})
    lines = [
        "<!-- written by: python -m benchmarks.embedded -->",
        "# Prompt methods on the embedded backbone",
        "",
        f"Base-to-novel, {shots} shots, seeds {', '.join(map(str, seeds))}: mean ± sample standard deviation of the"
        " accuracy in percent; H is the harmonic mean of the mean base and the mean novel accuracy.",
        "The backbone and the drawn datasets are adaptkit's own: nothing here compares with published figures.",
    ]
    for dataset in dict.fromkeys(run["dataset"] for run in runs):
        lines += ["", f"## {dataset}", "", *_dataset_table([run for run in runs if run["dataset"] == dataset])]
    return "\n".join([*lines, "", "## What should hold", "", *_rules(runs), ""])


def _summary(runs: Sequence[Scores], method: str, what: str) -> Summary:
    return summarise([run[what] for run in runs if run["method"] == method])


def _shown(summary: Summary) -> str:
    spread = "" if summary.sample_std is None else f" ± {100 * summary.sample_std:.1f}"
    return f"{100 * summary.mean:.1f}{spread}"


def _dataset_table(runs: Sequence[Scores]) -> Iterator[str]:
    yield "| method | base | novel | H | trained | seconds |"
    yield "|---|---|---|---|---|---|"
    for method in dict.fromkeys(run["method"] for run in runs):
        base, novel = _summary(runs, method, "base"), _summary(runs, method, "novel")
        h = 2 * base.mean * novel.mean / (base.mean + novel.mean) if base.mean + novel.mean else 0.0
        own = next(run for run in runs if run["method"] == method)
        seconds = _summary(runs, method, "seconds").mean
        yield (f"| {method} | {_shown(base)} | {_shown(novel)} | {100 * h:.1f} | {own['trained']:,} | {seconds:.1f} |")


def _rules(runs: Sequence[Scores]) -> Iterator[str]:
    """Base above zero-shot for all; the regularised ones lose no more on novel classes than CoOp, where any is lost."""
    yield "| dataset | base not above zero-shot | CoOp's loss on novel classes | regularised, and losing more |"
    yield "|---|---|---|---|"
    for dataset in dict.fromkeys(run["dataset"] for run in runs):
        own = [run for run in runs if run["dataset"] == dataset]
        methods = [method for method in dict.fromkeys(run["method"] for run in own) if method != "zero-shot"]
        if {"zero-shot", "coop"} - {run["method"] for run in own}:
            continue
        least = _summary(own, "zero-shot", "base").mean
        below = [method for method in methods if _summary(own, method, "base").mean <= least]
        lost = {method: _loss(own, method) for method in methods}
        more = [f"{m} ({100 * lost[m]:.1f})" for m in methods if m in REGULARISED and lost[m] > max(0.0, lost["coop"])]
        yield f"| {dataset} | {', '.join(below) or 'none'} | {100 * lost['coop']:.1f} | {', '.join(more) or 'none'} |"


def _loss(runs: Sequence[Scores], method: str) -> float:
    """Novel accuracy given up against zero-shot, a fraction; negative where it was gained."""
    return _summary(runs, "zero-shot", "novel").mean - _summary(runs, method, "novel").mean
