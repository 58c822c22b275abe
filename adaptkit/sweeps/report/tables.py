"""The tables of a report, as plain values: the page, Markdown, LaTeX and the terminal all show these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adaptkit.sweeps.report.aggregate import (
    MEAN_OF_H,
    ZERO_SHOT,
    Average,
    Cell,
    Group,
    H,
    Section,
    averages_of,
)
from adaptkit.sweeps.report.published import Beside
from adaptkit.sweeps.report.significance import LEVEL, Comparison, compare_averages

Comparisons = Mapping[tuple[str, str], Comparison]
"""By (label, measure)."""

LEGEND = (
    f"Percent; ± is half the 95 % t-interval over n seeds. ● best, ≈ can't be told from the best (p > {LEVEL},"
    " corrected), * zero-shot: the method has no answer of its own there."
)


@dataclass(frozen=True)
class Column:
    """A column.

    Args:
        title: Its head.
        numeric: Whether it is aligned right and sorts as numbers.
        filtered: Whether the page offers a choice of its values.
        help: What it means, where the head doesn't say.
    """

    title: str
    numeric: bool = True
    filtered: bool = False
    help: str = ""


@dataclass(frozen=True)
class Value:
    """What stands in a table at one place.

    Args:
        text: As shown.
        sort: What it sorts by; the text where None.
        mark: "best", "tie" or "".
        link: Anchor of the runs behind it.
        note: A remark on it.
    """

    text: str
    sort: float | None = None
    mark: str = ""
    link: str = ""
    note: str = ""

    @property
    def marked(self) -> str:
        """The text with its mark, for places without styles."""
        return f"{self.text} {MARKS[self.mark]}" if self.mark else self.text


MARKS = {"best": "●", "tie": "≈"}


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        title: What it shows.
        columns: Its columns.
        rows: Values in the columns' order.
        caption: How to read it.
        breaks: Rows that begin a new group.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    caption: str = ""
    breaks: frozenset[int] = frozenset()


# --- results ----------------------------------------------------------------------------------------------------------


def results_table(section: Section, compared: Sequence[Comparisons]) -> Table:
    """Every cell of a section; what is the same in all rows stands in the title.

    Args:
        section: The section.
        compared: The comparisons of each group, from `significance.compare_group`.
    """
    datasets = list(dict.fromkeys(group.dataset for group in section.groups))
    several, varied = len(datasets) > 1, len(section.shot_counts) > 1
    columns = [Column("method", numeric=False, filtered=several or varied)]
    columns += [Column("dataset", numeric=False, filtered=True)] * several + [Column("shots", filtered=True)] * varied
    columns += [Column(name, help=_HELP.get(name, "")) for name in section.measures]
    columns += [Column("n", help="seeds"), Column("gain", help=f"over zero-shot, by {section.ranked_by}")]
    columns += [Column("p", help=f"of no difference from the best, by {section.ranked_by}; corrected")]
    columns += [Column("ECE", help="calibration error of the first column's images, 15 bins"), Column("trained"),
                Column("seconds", help="features, fitting and testing; stored features cost nothing")]  # fmt: skip
    rows, breaks = [], set()
    for group, found in zip(section.groups, compared, strict=True):
        breaks.add(len(rows))
        for cell in group.cells:
            place = [Value(group.dataset)] * several + [Value(str(group.shots), group.shots)] * varied
            rows.append((Value(cell.label, link=cell.anchor), *place, *_cell_row(section, group, cell, found)))
    title = "Results" + ("" if several else f" on {datasets[0]}")
    title += "" if varied else f", {section.shot_counts[0]} shots"
    return Table(title, tuple(columns), tuple(rows), LEGEND, frozenset(breaks))


_HELP = {
    H: "harmonic mean of the mean base and the mean novel accuracy, as papers print it",
    MEAN_OF_H: "mean over the seeds of each seed's harmonic mean",
}


def _cell_row(section: Section, group: Group, cell: Cell, found: Comparisons) -> list[Value]:
    row = [_measure(group, cell, measure, found) for measure in section.measures]
    row.append(Value(str(len(cell.runs)), len(cell.runs)))
    row.append(_gain(group, cell))
    against = found.get((cell.label, group.ranked_by))
    row.append(Value("", -1.0) if against is None else p_value(against))
    row.append(Value("–") if cell.ece is None else Value(percent(cell.ece), cell.ece))
    row.append(Value(f"{cell.first.trained_parameters:,}", cell.first.trained_parameters))
    row.append(Value(f"{cell.seconds:.1f}", cell.seconds))
    return row


def _measure(group: Group, cell: Cell, measure: str, found: Comparisons) -> Value:
    value = cell.value(measure)
    if value is None:
        return Value("–")
    summary = cell.summaries.get(measure)
    text = with_width(value, None if summary is None else summary.half_width)
    star = "*" if measure in cell.fallback_parts else ""
    tested = H if measure == MEAN_OF_H else measure
    return Value(text + star, value, _mark(group, cell, tested, found), cell.anchor)


def _mark(group: Group, cell: Cell, measure: str, found: Comparisons) -> str:
    """Whether a cell is the best of its group, or can't be told from it; nothing where it is alone."""
    others = [other for other in group.cells if other.value(measure) is not None]
    if len(others) < 2:
        return ""
    comparison = found.get((cell.label, measure))
    if comparison is None:
        return "best"
    return "tie" if comparison.tie or comparison.difference == 0 else ""


def _gain(group: Group, cell: Cell) -> Value:
    reference = None if group.zero_shot is None else group.zero_shot.value(group.ranked_by)
    value = cell.value(group.ranked_by)
    if reference is None or value is None or cell.method == ZERO_SHOT:
        return Value("")
    return Value(signed(value - reference), value - reference)


def p_value(comparison: Comparison) -> Value:
    """A corrected p-value, "–" where it couldn't be tested."""
    if comparison.p is None:
        return Value("–", note="not tested: no predictions of the same images and seeds, or too few datasets")
    p = comparison.p
    return Value("<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}", p)


# --- averages ---------------------------------------------------------------------------------------------------------


def averages_table(section: Section, shots: int) -> Table | None:
    """A line per method with every dataset and the averages; None with a single dataset."""
    groups = section.at(shots)
    if len(groups) < 2:
        return None
    rows = averages_of(section, shots)
    found = compare_averages(rows, section.ranked_by)
    names = [name for name in section.measures if all(name in group.measures for group in groups)]
    columns = [Column("method", numeric=False)]
    columns += [
        Column(f"mean {name}" if name not in _HELP else name, help=_AVERAGE_HELP.get(name, "")) for name in names
    ]
    columns += [Column("p", help="of no difference from the best, over the datasets")]
    columns += [Column(group.dataset, help=section.ranked_by) for group in groups]
    content = tuple(_average_row(row, names, groups, found, section.ranked_by) for row in rows)
    caption = (
        f"Means over {len(groups)} datasets; the columns of single datasets show {section.ranked_by}. Incomplete rows"
        " have no mean. " + _over_datasets(len(groups))
    )
    return Table(f"Average over datasets, {shots} shots", tuple(columns), content, caption)


_AVERAGE_HELP = {
    H: "harmonic mean of the average base and the average novel accuracy, as papers print it",
    MEAN_OF_H: "mean over the datasets of each dataset's H",
}


def _over_datasets(count: int) -> str:
    from adaptkit.sweeps.report.significance import FEWEST_DATASETS

    if count < FEWEST_DATASETS:
        return f"Ties aren't marked: with fewer than {FEWEST_DATASETS} datasets a bootstrap over them says nothing."
    return "● best, ≈ can't be told from the best by a bootstrap over the datasets."


def _average_row(
    row: Average, names: Sequence[str], groups: Sequence[Group], found: Mapping[str, Comparison], ranked_by: str
) -> tuple[Value, ...]:
    values = [Value(row.label, link=row.cells[0].anchor)]
    comparison = found.get(row.label)
    for name in names:
        value = row.value(name)
        mark = ""
        if name == ranked_by and value is not None and found:
            mark = "best" if comparison is None else "tie" if comparison.tie else ""
        missing = f"{len(row.cells)} of {row.datasets} datasets"
        text = (
            Value("–", note=missing) if value is None else Value(with_width(value, row.half_width(name)), value, mark)
        )
        values.append(text)
    values.append(Value("", -1.0) if comparison is None else p_value(comparison))
    for group in groups:
        cell = group.cell(row.label)
        score = None if cell is None else cell.value(group.ranked_by)
        shown = Value("–") if cell is None or score is None else Value(percent(score), score, link=cell.anchor)
        values.append(shown)
    return tuple(values)


# --- published figures ------------------------------------------------------------------------------------------------


def published_table(found: Sequence[Beside]) -> Table | None:
    """Published figures beside ours; None where there are none."""
    if not found:
        return None
    columns = (
        Column("dataset", numeric=False, filtered=True), Column("shots"), Column("method", numeric=False),
        Column("measure", numeric=False), Column("ours"), Column("n", help="our seeds"), Column("published"),
        Column("difference"), Column("source", numeric=False), Column("what else differs", numeric=False),
    )  # fmt: skip
    rows = []
    for item in found:
        theirs = item.figure.accuracy / 100
        shots = item.cell.key.shots
        rows.append(
            (
                Value(item.dataset),
                Value(str(shots), shots),
                Value(item.cell.label),
                Value(item.measure),
                Value(with_width(item.ours, item.half_width), item.ours, link=item.cell.anchor),
                Value(str(item.seeds), item.seeds),
                Value(f"{item.figure.accuracy:g}", theirs),
                Value(signed(item.ours - theirs), item.ours - theirs),
                Value(item.figure.shown_source),
                Value("; ".join(item.cautions)),
            )
        )
    caption = "Percent. Only where backbone, protocol, shots, split and sampler agree. Published figures of most"
    caption += " papers are means of three seeds from logs rounded to 0.1: smaller differences mean nothing."
    return Table("Beside published figures", columns, tuple(rows), caption)


# --- numbers ----------------------------------------------------------------------------------------------------------


def percent(fraction: float) -> str:
    """A fraction in percent, with one decimal."""
    return f"{100 * fraction:.1f}"


def signed(fraction: float) -> str:
    """A difference in points, with its sign."""
    return f"{100 * fraction:+.1f}".replace("-", "−")


def with_width(value: float, half_width: float | None) -> str:
    """A mean and half its interval, in percent."""
    return percent(value) if half_width is None else f"{percent(value)} ± {percent(half_width)}"
