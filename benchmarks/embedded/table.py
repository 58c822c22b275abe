"""Results of the embedded runs as Markdown pages: means over seeds, and what should hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from adaptkit.evaluation.statistics import Summary, summarise

Scores = dict[str, Any]
"""One run: dataset, method, shots, seed, accuracy by part (all; or base, novel and h; fractions), trained, seconds."""

REGULARISED = ("kgcoop", "promptsrc", "mmrl", "maple")


def base_to_novel_page(runs: Sequence[Scores], shots: int) -> str:
    """The page: a table for each dataset, then the two rules with where they hold."""
    said = (
        f"Base-to-novel, {shots} shots, {_seeds(runs)}: mean ± sample standard deviation of the accuracy in percent; H"
        " is the harmonic mean of the mean base and the mean novel accuracy."
    )
    ending = ["## What should hold", "", *_rules(runs)]
    return _page("python -m benchmarks.embedded", "Prompt methods", said, runs, _dataset_table, ending)


def mllm_page(runs: Sequence[Scores], shots: int) -> str:
    """The page of the multimodal language model: a table for each dataset, and what DiVE-k's training does."""
    said = (
        f"Base-to-novel, {shots} shots, {_seeds(runs)}: mean ± sample standard deviation of the accuracy in percent,"
        " each half asked about its own classes; H is the harmonic mean of the mean base and the mean novel accuracy."
        " Rows marked CLIP are of `mini`, all others of `mini-mllm`; rows marked features treat it as a dual encoder."
    )
    ending = ["## DiVE-k beside supervised tuning, in points over zero-shot", "", *_tuned_gains(runs)]
    title = "Multimodal language models"
    return _page("python -m benchmarks.embedded.mllm", title, said, runs, _dataset_table, ending)


def _tuned_gains(runs: Sequence[Scores]) -> Iterator[str]:
    methods = ("mllm-lora", "mllm-lora, letters", "mllm-lora, softmax", "virft", "dive-k")
    yield f"| dataset | {' | '.join(f'{method}: base, novel' for method in methods)} |"
    yield "|---" * (len(methods) + 1) + "|"
    for dataset in dict.fromkeys(run["dataset"] for run in runs):
        own = [run for run in runs if run["dataset"] == dataset]
        there = {run["method"] for run in own}
        cells = []
        for method in methods:
            if {method, "mllm-zero-shot"} - there:
                cells.append("not run")
                continue
            gains = [_summary(own, method, w).mean - _summary(own, "mllm-zero-shot", w).mean for w in ("base", "novel")]
            cells.append(", ".join(f"{100 * gain:+.1f}" for gain in gains))
        yield f"| {dataset} | {' | '.join(cells)} |"


def _seeds(runs: Sequence[Scores]) -> str:
    return f"seeds {', '.join(map(str, sorted({run['seed'] for run in runs})))}"


def _page(
    command: str,
    title: str,
    said: str,
    runs: Sequence[Scores],
    table: Callable[[Sequence[Scores]], Iterator[str]],
    ending: Sequence[str],
) -> str:
    lines = [f"<!-- written by: {command} -->", f"# {title} on the embedded backbone", "", said]
    lines.append(
        "The backbone and the drawn datasets are adaptkit's own: nothing here compares with published figures."
    )
    for dataset in dict.fromkeys(run["dataset"] for run in runs):
        lines += ["", f"## {dataset}", "", *table([run for run in runs if run["dataset"] == dataset])]
    return "\n".join([*lines, "", *ending, ""])


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


# --- few-shot -----------------------------------------------------------------------------------------------------


def few_shot_page(runs: Sequence[Scores]) -> str:
    """The page: a table of methods by shots for each dataset, then which trained methods don't reach zero-shot."""
    said = (
        f"Few-shot (all classes), {_seeds(runs)}: mean ± sample standard deviation of the test accuracy in percent."
        " Gain is over zero-shot at the most shots; seconds are of one such run."
    )
    ending = ["## Trained, and not above zero-shot at the most shots", "", *_not_above(runs)]
    title = "Adapters, caches, LoRA, descriptions and transduction"
    return _page("python -m benchmarks.embedded --protocol few-shot", title, said, runs, _few_shot_table, ending)


def _few_shot_table(runs: Sequence[Scores]) -> Iterator[str]:
    shots = sorted({run["shots"] for run in runs})
    most = [run for run in runs if run["shots"] == shots[-1]]
    yield f"| method | {' | '.join(map(str, shots))} | gain | trained | seconds |"
    yield "|---" * (len(shots) + 4) + "|"
    for method in dict.fromkeys(run["method"] for run in runs):
        cells = [_shown(_summary([run for run in runs if run["shots"] == count], method, "all")) for count in shots]
        gain = _summary(most, method, "all").mean - _summary(most, "zero-shot", "all").mean
        trained = next(run["trained"] for run in most if run["method"] == method)
        seconds = _summary(most, method, "seconds").mean
        yield f"| {method} | {' | '.join(cells)} | {100 * gain:+.1f} | {trained:,} | {seconds:.1f} |"


def _not_above(runs: Sequence[Scores]) -> Iterator[str]:
    for dataset in dict.fromkeys(run["dataset"] for run in runs):
        most = max(run["shots"] for run in runs)
        own = [run for run in runs if run["dataset"] == dataset and run["shots"] == most]
        least = _summary(own, "zero-shot", "all").mean
        trained = dict.fromkeys(run["method"] for run in own if run["trained"])
        means = {method: _summary(own, method, "all").mean for method in trained}
        below = [f"{method} ({100 * mean:.1f})" for method, mean in means.items() if mean <= least]
        yield f"- {dataset} (zero-shot {100 * least:.1f}): {', '.join(below) or 'none'}"
