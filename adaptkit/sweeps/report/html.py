"""A report as one HTML file that loads nothing from anywhere.

Every name from outside (classes, datasets, folders, settings) reaches the page through Jinja's escaping; what is put in
as it is, is ours: the style, the script, and matplotlib's SVG, in which matplotlib escapes the texts.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptkit import __version__
from adaptkit.evaluation.results import RunResult
from adaptkit.storage import atomic_path
from adaptkit.sweeps.report import plots
from adaptkit.sweeps.report.aggregate import (
    Cell,
    Group,
    Report,
    Section,
    averages_of,
    notes_of,
    setting_of,
    shots_text,
)
from adaptkit.sweeps.report.pictures import Images, class_gains_of, confusions, reliability_panels
from adaptkit.sweeps.report.predictions import PredictionReader
from adaptkit.sweeps.report.published import compare_section
from adaptkit.sweeps.report.repeat import command_text
from adaptkit.sweeps.report.significance import DRAWS, FEWEST_DATASETS, LEVEL
from adaptkit.sweeps.report.tables import (
    LEGEND,
    MARKS,
    Comparisons,
    Table,
    averages_table,
    percent,
    published_table,
    results_table,
    signed,
)
from adaptkit.types import ProgressCallback

_PAGE = Path(__file__).with_name("page")
_MARK_WORDS = {"best": "best", "tie": "can't be told from the best"}
MOST_GROUPS = 24
"""Groups of a section whose confidences, classes and confusions are shown: the page stays a page."""

MOST_PANELS = 6

EXPLANATIONS = (
    LEGEND,
    "H of means is the harmonic mean of the mean base and mean novel accuracy, the number papers print. Mean of H is"
    " the mean of the single harmonic means: another number, mostly a little lower.",
    "Intervals over seeds cover the randomness of the drawn shots and of training, not that of the test images; the"
    " tests below cover the test images.",
    "One accuracy is compared by McNemar's exact test (mid-p) on the images that exactly one of two methods gets right;"
    f" H and averages over targets by a paired bootstrap over the images ({DRAWS:,} draws). Of several seeds, twice the"
    " median p-value counts, and a seed with the order reversed counts as 1, since all seeds share their test images."
    f" p-values against the best are corrected by Holm's method; above {LEVEL} the page calls it a tie.",
    f"Averages over datasets are compared by a bootstrap over the datasets, from {FEWEST_DATASETS} datasets on.",
    "Seconds are those of the machine each run was made on; features that were stored already cost nothing.",
)


def write_html(
    path: str | Path,
    report: Report,
    compared: Mapping[str, Sequence[Comparisons]],
    reader: PredictionReader,
    *,
    pictures: bool = True,
    progress: ProgressCallback | None = None,
) -> None:
    """Write the page.

    Args:
        path: The file to be.
        report: What to show.
        compared: Each section's comparisons, group by group, by the section's anchor.
        reader: Reads the runs' predictions.
        pictures: Whether test images may be shown.
        progress: Called as (what, done, total).
    """
    page = _environment().get_template("page.html").render(_content(report, compared, reader, pictures, progress))
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")


def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["choices"] = _choices
    return environment


def _choices(table: Table, column: int) -> list[str]:
    """The values of a column that can be chosen from, in order."""
    found = {row[column].text: row[column].sort for row in table.rows}
    return sorted(found, key=lambda text: (found[text] or 0.0, text))


def _content(
    report: Report,
    compared: Mapping[str, Sequence[Comparisons]],
    reader: PredictionReader,
    pictures: bool,
    progress: ProgressCallback | None,
) -> dict[str, Any]:
    from markupsafe import Markup

    script = (_PAGE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    beside = [compare_section(section) for section in report.sections]
    steps = _Steps(report, progress)
    sections = [_section(section, compared[section.anchor], reader, pictures, steps) for section in report.sections]
    cells = report.cells
    datasets = {group.dataset for section in report.sections for group in section.groups}
    methods = {cell.method for cell in cells}
    notes = [*report.notes, *(f"{folder}: {why}" for folder, why in list(reader.problems.items())[:5])]
    return {
        "title": "adaptkit report",
        "facts": f"{_many(report.runs, 'run')} of {_many(len(methods), 'method')} on {_many(len(datasets), 'dataset')}",
        "style": Markup((_PAGE / "page.css").read_text(encoding="utf-8")),  # our own file
        "script": Markup(script),  # our own file
        "script_digest": f"sha256-{digest}",
        "sections": sections,
        "published": published_table([item for found, _ in beside for item in found]),
        "refused": list(dict.fromkeys(item for _, refused in beside for item in refused)),
        "notes": notes,
        "damaged": report.damaged,
        "explanations": EXPLANATIONS,
        "entries": [
            _entry(group, cell) for section in report.sections for group in section.groups for cell in group.cells
        ],
        "marks": MARKS,
        "mark_words": _MARK_WORDS,
        "version": __version__,
    }


class _Steps:
    """Tells how many groups are drawn."""

    def __init__(self, report: Report, progress: ProgressCallback | None) -> None:
        self._progress, self._done = progress, 0
        self._total = sum(min(MOST_GROUPS, len(section.at(section.shot_counts[-1]))) for section in report.sections)

    def next(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress("drawing", self._done, self._total)


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


# --- a section --------------------------------------------------------------------------------------------------------


def _section(
    section: Section, compared: Sequence[Comparisons], reader: PredictionReader, pictures: bool, steps: _Steps
) -> dict[str, Any]:
    style = plots.looks(section.labels)
    drawn = [*plots.curves(section, style), *plots.base_against_novel(section, style), *plots.costs(section, style)]
    averages = averages_table(section)
    groups = []
    for group in section.at(section.shot_counts[-1])[:MOST_GROUPS]:
        groups.append(_group(section, group, reader, pictures))
        reader.forget()
        steps.next()
    return {
        "title": section.title,
        "anchor": section.anchor,
        "sentences": list(_sentences(section, compared)),
        "tables": [*([averages] if averages else []), results_table(section, compared)],
        "plots": drawn,
        "legend": _legend(section.anchor, style) if drawn else [],
        "groups": groups,
    }


def _legend(name: str, style: Mapping[str, plots.Look]) -> list[dict[str, str]]:
    return [{"svg": plots.swatch(f"{name} {label}", look), "label": label} for label, look in style.items()]


def _sentences(section: Section, compared: Sequence[Comparisons]) -> Iterator[str]:
    """What is found, in words, at the most shots; and what a reader must know of the data."""
    shots = section.shot_counts[-1]
    shown = section.at(shots)
    places = {id(group): found for group, found in zip(section.groups, compared, strict=True)}
    for group in shown[:4]:
        yield _finding(group, places[id(group)])
    if len(shown) > 4:
        top = averages_of(section, shots)[0]
        value = top.value(section.ranked_by)
        if value is not None:
            where = f"Over all {len(shown)} datasets at {shots_text(shots)}"
            yield f"{where}, {top.label} is best on average ({percent(value)})."
    about: dict[str, list[str]] = {}
    for group in section.groups:
        for note in notes_of(group.first):
            about.setdefault(note, []).append(group.dataset)
    yield from (f"{', '.join(dict.fromkeys(datasets))}: {note}." for note, datasets in list(about.items())[:12])


def _finding(group: Group, found: Comparisons) -> str:
    best = group.cells[0]
    value = best.value(group.ranked_by)
    text = f"On {group.dataset} at {shots_text(group.shots)}, {best.label} is best by {group.ranked_by}"
    text += "" if value is None else f" ({percent(value)})"
    reference = None if group.zero_shot is None else group.zero_shot.value(group.ranked_by)
    if reference is not None and value is not None and best is not group.zero_shot:
        text += f", {signed(value - reference)} over zero-shot"
    ties = [cell.label for cell in group.cells[1:] if (c := found.get((cell.label, group.ranked_by))) and c.tie]
    return text + (f"; {', '.join(ties)} can't be told from it." if ties else ".")


# --- a group ----------------------------------------------------------------------------------------------------------


def _group(section: Section, group: Group, reader: PredictionReader, pictures: bool) -> dict[str, Any]:
    """Reliability, gains by class and confusions of a group, as far as there is something to show."""
    images = Images(group.best.runs[0], wanted=pictures)
    name = f"{section.anchor} {group.dataset} {group.shots}"
    panels = reliability_panels(group, reader, MOST_PANELS)
    best, zero = group.best, group.zero_shot
    gains = class_gains_of(best, zero, images) if zero is not None and best is not zero else []
    pairs = confusions(best, reader, images)
    sentences = []
    if not panels:
        sentences.append("No predictions are stored beside these results, so nothing can be said about single images.")
    if pairs and images.problem:
        sentences.append(f"Names only: {images.problem.rstrip('.')}.")
    kinds = list(dict.fromkeys(kind for parts in panels.values() for kind in parts))
    return {
        "title": f"{group.dataset}, {shots_text(group.shots)}",
        "method": best.label,
        "reliability": plots.reliability(f"reliability {name}", group, panels) if panels else None,
        "gains": plots.class_gains(f"gains {name}", group, best, gains) if gains else None,
        "kinds": _legend(name, plots.looks(kinds)) if len(kinds) > 1 else [],
        "confusions": pairs,
        "sentences": sentences,
    }


# --- single runs ------------------------------------------------------------------------------------------------------


def _entry(group: Group, cell: Cell) -> dict[str, Any]:
    """What is known about a cell's runs: numbers, commands, settings."""
    results = [record.result for record in cell.runs]
    parts = [part.name for part in cell.first.parts]
    commands = [command_text(result) for result in results]
    runs = [
        {
            "seed": record.result.key.seed,
            "counts": [f"{part.correct:,} / {part.total:,}" for part in record.result.parts],
            "seconds": f"{sum(record.result.seconds.values()):.1f}",
            "key": record.result.key_digest,
            "drawn": record.result.few_shot_digest,
            "folder": str(record.folder),
        }
        for record in cell.runs
    ]
    return {
        "anchor": cell.anchor,
        "label": cell.label,
        "where": f"on {group.dataset}, {cell.key.protocol}, {shots_text(group.shots)}, {_many(len(results), 'seed')}",
        "parts": parts,
        "runs": runs,
        "commands": [text for text in commands if text],
        "no_command": "" if all(commands) else "Made from Python on data that the result can't name: no command.",
        "warnings": list(dict.fromkeys(text for result in results for text in result.warnings)),
        "facts": list(_facts(cell.first)),
    }


def _facts(result: RunResult) -> Iterator[tuple[str, str]]:
    """Settings and surroundings, by name."""
    key = result.key
    yield "recipe", result.recipe or "none"
    yield "settings chosen on", {"none": "nothing: fixed"}.get(result.tuned_on, result.tuned_on)
    usual = []
    for name, origin in sorted(result.origins.items()):
        value = json.dumps(setting_of(result, name))
        if origin == "default":
            usual.append(f"{name} {value}")
        else:
            yield name, f"{value} ({origin})"
    if usual:
        yield "left at their defaults", ", ".join(usual)
    yield "templates", " | ".join(result.templates)
    yield "backbone", f"{key.backbone}, digest {key.backbone_digest[:12]}"
    yield "split", f"digest {key.split_digest[:12]}, sampler {key.sampler}"
    yield "trained", f"{result.trained_parameters:,} numbers, {result.adapter_bytes:,} bytes"
    surroundings = result.environment
    versions = surroundings.get("versions")
    known = versions if isinstance(versions, Mapping) else {}
    shown = ", ".join(f"{name} {known[name]}" for name in ("torch", "numpy") if name in known)
    yield "made with", f"{surroundings.get('device', '?')}, {surroundings.get('platform', '?')}, {shown}"
