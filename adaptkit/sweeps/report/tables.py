"""The tables of a report, as plain values: the page, Markdown, LaTeX and the terminal all show these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from adaptkit.sweeps.report.aggregate import (
    MEAN_OF_H,
    ZERO_SHOT,
    Average,
    Cell,
    Group,
    H,
    Section,
    averages_of,
    shots_text,
)
from adaptkit.sweeps.report.published import Beside
from adaptkit.sweeps.report.significance import FEWEST_DATASETS, LEVEL, Comparison, compare_averages

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
        side: Whether narrow places (a terminal, a paper) leave it out.
        long: Whether its texts are sentences, which may wrap.
    """

    title: str
    numeric: bool = True
    filtered: bool = False
    help: str = ""
    side: bool = False
    long: bool = False


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

    def narrow(self) -> Table:
        """The same without its side columns."""
        kept = [place for place, column in enumerate(self.columns) if not column.side]
        rows = tuple(tuple(row[place] for place in kept) for row in self.rows)
        return replace(self, columns=tuple(self.columns[place] for place in kept), rows=rows)


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
    columns += [
        Column("p", help=f"of no difference from the best, by {section.ranked_by}; corrected", side=True),
        Column("ECE", help="calibration error on the images of the first measure, 15 bins", side=True),
        Column("trained", help="numbers", side=True),
        Column("seconds", help="features, fitting and testing; stored features cost nothing", side=True),
    ]
    rows: list[tuple[Value, ...]] = []
    breaks: set[int] = set()
    for group, found in zip(section.groups, compared, strict=True):
        breaks.add(len(rows))
        for cell in group.cells:
            place = [Value(group.dataset)] * several + [Value(str(group.shots), group.shots)] * varied
            rows.append((Value(cell.label, link=cell.anchor), *place, *_cell_row(section, group, cell, found)))
    title = "Results" + ("" if several else f" on {datasets[0]}")
    title += "" if varied else f", {shots_text(section.shot_counts[0])}"
    return Table(title, tuple(columns), tuple(rows), LEGEND, frozenset(breaks))


_HELP = {
    H: "harmonic mean of the mean base and the mean novel accuracy, as papers print it",
    MEAN_OF_H: "mean over the seeds of each seed's harmonic mean",
}


def _cell_row(section: Section, group: Group, cell: Cell, found: Comparisons) -> list[Value]:
    row = [_measure(group, cell, measure, found) for measure in section.measures]
    row.append(Value(str(len(cell.runs)), len(cell.runs)))
    row.append(_gain(group, cell))
    row.append(_against(found.get((cell.label, group.ranked_by))))
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


def _against(comparison: Comparison | None) -> Value:
    """A corrected p-value: nothing for the best itself, "–" where it couldn't be tested."""
    if comparison is None:
        return Value("")
    p = comparison.p
    if p is None:
        return Value("–")
    return Value("<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}", p)


# --- averages ---------------------------------------------------------------------------------------------------------


def averages_table(section: Section) -> Table | None:
    """A line per method and number of shots, with the averages and every dataset; None with a single dataset."""
    counts = [shots for shots in section.shot_counts if len(section.at(shots)) > 1]
    if not counts:
        return None
    datasets = list(dict.fromkeys(group.dataset for shots in counts for group in section.at(shots)))
    names = [name for name in section.measures if all(name in group.measures for group in section.groups)]
    compared = {}
    for shots in counts:
        averages = averages_of(section, shots)
        compared[shots] = averages, compare_averages(averages, section.ranked_by)
    tested = any(item.p is not None for _, found in compared.values() for item in found.values())
    columns = [Column("method", numeric=False, filtered=len(counts) > 1)]
    columns += [Column("shots", filtered=True)] * (len(counts) > 1)
    columns += [Column(n if n in _HELP else f"mean {n}", help=_AVERAGE_HELP.get(n, "")) for n in names]
    columns += [Column("p", help="of no difference from the best, over the datasets", side=True)] * tested
    columns += [Column(dataset, help=section.ranked_by) for dataset in datasets]
    rows: list[tuple[Value, ...]] = []
    breaks: set[int] = set()
    for shots, (averages, found) in compared.items():
        breaks.add(len(rows))
        for row in averages:
            place = [Value(str(shots), shots)] * (len(counts) > 1)
            means = _average_values(section, row, names, found)
            against = [_against(found.get(row.label))] * tested
            head = Value(row.label, link=row.cells[0].anchor)
            rows.append((head, *place, *means, *against, *_dataset_values(section, row, datasets)))
    title = "Average over datasets" + (f", {shots_text(counts[0])}" if len(counts) == 1 else "")
    return Table(title, tuple(columns), tuple(rows), _averages_caption(section, datasets, tested), frozenset(breaks))


def _averages_caption(section: Section, datasets: Sequence[str], tested: bool) -> str:
    caption = f"Columns of single datasets show {section.ranked_by}. A row that lacks a dataset has no mean. "
    if tested:
        return caption + "● best, ≈ can't be told from the best by a bootstrap over the datasets."
    reason = f"with fewer than {FEWEST_DATASETS} datasets a bootstrap over them says nothing"
    return caption + "Ties aren't marked here" + (f": {reason}." if len(datasets) < FEWEST_DATASETS else ".")


_AVERAGE_HELP = {
    H: "harmonic mean of the average base and the average novel accuracy, as papers print it",
    MEAN_OF_H: "mean over the datasets of each dataset's H",
}


def _average_values(
    section: Section, row: Average, names: Sequence[str], found: Mapping[str, Comparison]
) -> list[Value]:
    """A row's averages; how many datasets it has where they aren't all there."""
    values = []
    for name in names:
        value = row.value(name)
        if value is None:
            values.append(Value("–", note=f"{len(row.cells)} of {row.datasets}"))
            continue
        mark = ""
        if name == section.ranked_by and found:
            comparison = found.get(row.label)
            mark = "best" if comparison is None else "tie" if comparison.tie else ""
        values.append(Value(with_width(value, row.half_width(name)), value, mark))
    return values


def _dataset_values(section: Section, row: Average, datasets: Sequence[str]) -> list[Value]:
    """The ranking measure on each dataset."""
    cells = {group.dataset: group.cell(row.label) for group in section.at(row.shots)}
    values = []
    for dataset in datasets:
        cell = cells.get(dataset)
        score = None if cell is None else cell.value(section.ranked_by)
        values.append(Value("–") if cell is None or score is None else Value(percent(score), score, link=cell.anchor))
    return values


# --- published figures ------------------------------------------------------------------------------------------------


def published_table(found: Sequence[Beside]) -> Table | None:
    """Published figures beside ours; None where there are none."""
    if not found:
        return None
    columns = (
        Column("dataset", numeric=False, filtered=True), Column("shots"), Column("method", numeric=False),
        Column("measure", numeric=False), Column("ours"), Column("n", help="our seeds"), Column("published"),
        Column("difference"), Column("source", numeric=False, long=True),
        Column("what else differs", numeric=False, long=True),
    )  # fmt: skip
    rows: list[tuple[Value, ...]] = []
    breaks: set[int] = set()
    for place, item in enumerate(found):
        if place and item.dataset != found[place - 1].dataset:
            breaks.add(place)
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
                Value(item.figure.printed, theirs),
                Value(signed(item.ours - theirs), item.ours - theirs),
                Value(item.figure.shown_source),
                Value("; ".join(item.cautions)),
            )
        )
    caption = "Percent. Only where backbone, protocol, shots, split and sampler agree. Published figures of most"
    caption += " papers are means of three seeds from logs rounded to 0.1: smaller differences mean nothing."
    return Table("Beside published figures", columns, tuple(rows), caption, frozenset(breaks))


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
