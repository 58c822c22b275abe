"""The runs as one Markdown page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adaptkit.evaluation.statistics import Summary, summarise

Scores = dict[str, Any]
"""One run: dataset, method, shots, seed, tested, total, and correct, accuracy (a fraction), chosen, recipe, trained,
seconds; or failed, a sentence."""


def markdown(runs: Sequence[Scores], left_out: Mapping[str, str]) -> str:
    """A table for each dataset, methods by shots, and the methods that can't run on features with the reason."""
    lines = [
        "<!-- written by: python -m benchmarks.own_features -->",
        "# Methods on published features of real images",
        "",
        "Accuracy in percent on features of OpenAI's CLIP ViT-B/32. Recipes are the papers' (the default ones);",
        "settings that a recipe chooses on validation images are chosen on a held-out quarter of the shots, and all",
        "shots are fitted with them. Best of each column in bold.",
    ]
    for dataset in dict.fromkeys(run["dataset"] for run in runs):
        own = [run for run in runs if run["dataset"] == dataset]
        seeds = sorted({run["seed"] for run in own})
        spread = f"mean ± sample standard deviation of seeds {', '.join(map(str, seeds))}"
        what = spread if len(seeds) > 1 else "one ready draw per number of shots, training seed 1"
        lines += ["", f"## {dataset}", "", f"{own[0]['total']:,} images of the {own[0]['tested']} split; {what}.", ""]
        lines += _table(own)
    lines += ["", "## Left out", "", "| method | why |", "|---|---|"]
    lines += [f"| {name} | {why} |" for name, why in left_out.items()]
    return "\n".join([*lines, ""])


def _table(runs: Sequence[Scores]) -> Iterator[str]:
    """A row per method, zero-shot first, the others by accuracy at the most shots; "–" where a method can't run."""
    shots = sorted({run["shots"] for run in runs})
    methods = list(dict.fromkeys(run["method"] for run in runs))
    done = [run for run in runs if "failed" not in run]
    cells: dict[tuple[str, int], Summary] = {}
    for method, count in {(run["method"], run["shots"]) for run in done}:
        cells[method, count] = summarise([r["accuracy"] for r in done if (r["method"], r["shots"]) == (method, count)])
    best = {count: max(cell.mean for (_, number), cell in cells.items() if number == count) for count in shots}
    most = max(shots)
    yield "| method | " + " | ".join(map(str, shots)) + f" | gain at {most} | seconds at {most} |"
    yield "|---" * (len(shots) + 3) + "|"
    last = {method: cells[method, most].mean if (method, most) in cells else -1.0 for method in methods}
    for method in sorted(methods, key=lambda name: (name != "zero-shot", -last[name])):
        row = [_cell(cells.get((method, count)), best[count]) for count in shots]
        gain = f"{100 * (last[method] - last['zero-shot']):+.1f}" if {method, "zero-shot"} <= set(methods) else ""
        seconds = [run["seconds"] for run in done if (run["method"], run["shots"]) == (method, most)]
        spent = f"{summarise(seconds).mean:.1f}" if seconds else "–"
        yield f"| {method} | " + " | ".join(row) + f" | {gain if last[method] >= 0 else '–'} | {spent} |"


def _cell(cell: Summary | None, best: float) -> str:
    if cell is None:
        return "–"
    text = f"{100 * cell.mean:.1f}" + ("" if cell.sample_std is None else f" ± {100 * cell.sample_std:.1f}")
    return f"**{text}**" if cell.mean == best else text
