"""A report as Markdown, LaTeX, CSV and plain data."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from adaptkit.sweeps.report.aggregate import Cell, Group, Report, Section, averages_of, cell_measures
from adaptkit.sweeps.report.published import compare_section
from adaptkit.sweeps.report.repeat import command_text
from adaptkit.sweeps.report.tables import (
    Comparisons,
    Table,
    averages_table,
    published_table,
    results_table,
)

Compared = Mapping[str, Sequence[Comparisons]]
"""Each section's comparisons, group by group, by the section's anchor."""


def all_tables(report: Report, compared: Compared) -> Iterator[tuple[str, Table]]:
    """(section's title, table), in the order of the page."""
    found = []
    for section in report.sections:
        averages = averages_table(section)
        if averages is not None:
            yield section.title, averages
        yield section.title, results_table(section, compared[section.anchor])
        found += compare_section(section)[0]
    published = published_table(found)
    if published is not None:
        yield "Published figures", published


def refusals(report: Report) -> list[tuple[str, str]]:
    """(what, why) of results that no published figure may stand beside."""
    every = [item for section in report.sections for item in compare_section(section)[1]]
    return list(dict.fromkeys((item.what, item.reason) for item in every))


# --- Markdown ---------------------------------------------------------------------------------------------------------


def to_markdown(report: Report, compared: Compared) -> str:
    """Tables in GitHub's Markdown."""
    lines = ["# adaptkit report", ""]
    last = ""
    for title, table in all_tables(report, compared):
        if title != last:
            lines += [f"## {_markdown_text(title)}", ""]
            last = title
        lines += [f"### {_markdown_text(table.title)}", ""]
        lines.append("| " + " | ".join(_markdown_text(column.title) for column in table.columns) + " |")
        lines.append("|" + "|".join("---:" if column.numeric else "---" for column in table.columns) + "|")
        lines += ["| " + " | ".join(_markdown_text(value.marked) for value in row) + " |" for row in table.rows]
        lines += ["", _markdown_text(table.caption), ""] if table.caption else [""]
    lines += [f"Not comparable with published figures: {_markdown_text(what)}: {_markdown_text(why)}."
              for what, why in refusals(report)]  # fmt: skip
    lines += [f"Left out: {_markdown_text(str(bad.folder))}: {_markdown_text(bad.reason)}" for bad in report.damaged]
    return "\n".join([*lines, *(_markdown_text(note) for note in report.notes)]).rstrip() + "\n"


def _markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: no tags, links, emphasis or table lines come of it."""
    text = " ".join(text.split())
    for sign in "\\`*_[]<>|~#":
        text = text.replace(sign, f"\\{sign}")
    return text


# --- LaTeX ------------------------------------------------------------------------------------------------------------

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "±": r"$\pm$", "−": r"$-$", "≈": r"$\approx$", "●": r"$\bullet$", "–": "--", "·": r"$\cdot$", "×": r"$\times$",
}  # fmt: skip


def to_latex(report: Report, compared: Compared) -> str:
    """Tables for papers (booktabs): the best in bold, what can't be told from it underlined."""
    lines = ["% adaptkit report; needs \\usepackage{booktabs}"]
    for title, whole in all_tables(report, compared):
        table = whole.narrow()
        columns = "".join("r" if column.numeric else "l" for column in table.columns)
        lines += ["", r"\begin{table}", r"\centering", rf"\caption{{{latex_text(f'{title}. {table.title}.')}}}"]
        lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
        lines.append(" & ".join(latex_text(column.title) for column in table.columns) + r" \\")
        lines.append(r"\midrule")
        for number, row in enumerate(table.rows):
            if number and number in table.breaks:
                lines.append(r"\addlinespace")
            lines.append(" & ".join(_latex_value(value.text, value.mark) for value in row) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
        if table.caption:
            lines.append(f"% {' '.join(table.caption.split())}")
    lines += [f"% not comparable with published figures: {' '.join(f'{what}: {why}'.split())}"
              for what, why in refusals(report)]  # fmt: skip
    return "\n".join(lines) + "\n"


def latex_text(text: str) -> str:
    """Text that LaTeX sets as it is.

    Example:
        >>> latex_text("tip_adapter & 5 %")
        'tip\\\\_adapter \\\\& 5 \\\\%'
    """
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))


def _latex_value(text: str, mark: str) -> str:
    shown = latex_text(text)
    return rf"\textbf{{{shown}}}" if mark == "best" else rf"\underline{{{shown}}}" if mark == "tie" else shown


# --- CSV --------------------------------------------------------------------------------------------------------------

_CSV_COLUMNS = (
    "protocol", "variants", "backbone", "dataset", "split_digest", "shots", "method", "measure", "mean", "half_width",
    "sample_std", "n", "seeds", "values", "difference_from_best", "p", "tie", "trained_parameters", "seconds", "ece",
)  # fmt: skip


def to_csv(report: Report, compared: Compared) -> str:
    """One line per method, dataset, shots and measure, in full precision; fractions, not percent."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, _CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for section in report.sections:
        for group, found in zip(section.groups, compared[section.anchor], strict=True):
            for cell in group.cells:
                for measure in cell_measures(cell):
                    writer.writerow({k: _csv_value(v) for k, v in _line(section, group, cell, measure, found).items()})
    return stream.getvalue()


def _csv_value(value: Any) -> Any:
    """Texts that a spreadsheet would take for a formula get an apostrophe in front."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return "" if value is None else value


def _line(section: Section, group: Group, cell: Cell, measure: str, found: Comparisons) -> dict[str, Any]:
    summary, against = cell.summaries.get(measure), found.get((cell.label, measure))
    return {
        "protocol": section.protocol,
        "variants": "; ".join(section.variants),
        "backbone": section.backbone,
        "dataset": group.dataset,
        "split_digest": cell.key.split_digest,
        "shots": group.shots,
        "method": cell.label,
        "measure": measure,
        "mean": cell.value(measure),
        "half_width": None if summary is None else summary.half_width,
        "sample_std": None if summary is None else summary.sample_std,
        "n": len(cell.runs),
        "seeds": " ".join(map(str, cell.seeds)),
        "values": "" if summary is None else " ".join(map(repr, summary.values)),
        "difference_from_best": None if against is None else against.difference,
        "p": None if against is None else against.p,
        "tie": None if against is None or against.p is None else against.tie,
        "trained_parameters": cell.first.trained_parameters,
        "seconds": cell.seconds,
        "ece": cell.ece,
    }


# --- plain data -------------------------------------------------------------------------------------------------------


def to_data(report: Report, compared: Compared) -> dict[str, Any]:
    """Everything of the tables as plain values, with the commands that repeat the runs; fractions, not percent."""
    return {
        "runs": report.runs,
        "sections": [_section_data(section, compared[section.anchor]) for section in report.sections],
        "not_comparable": [{"what": what, "reason": why} for what, why in refusals(report)],
        "damaged": [{"folder": str(bad.folder), "reason": bad.reason} for bad in report.damaged],
        "notes": list(report.notes),
    }


def _section_data(section: Section, compared: Sequence[Comparisons]) -> dict[str, Any]:
    return {
        "protocol": section.protocol,
        "variants": list(section.variants),
        "backbone": section.backbone,
        "ranked_by": section.ranked_by,
        "groups": [_group_data(section, group, found) for group, found in zip(section.groups, compared, strict=True)],
        "averages": [
            {
                "shots": shots,
                "method": row.label,
                "datasets": len(row.cells),
                "of": row.datasets,
                **{name: row.value(name) for name in section.measures},
            }
            for shots in section.shot_counts
            if len(section.at(shots)) > 1
            for row in averages_of(section, shots)
        ],
        "published": [
            {
                "dataset": item.dataset,
                "method": item.cell.label,
                "shots": item.cell.key.shots,
                "measure": item.measure,
                "ours": item.ours,
                "seeds": item.seeds,
                "published": {**asdict(item.figure), "accuracy": item.figure.accuracy},
                "what_else_differs": list(item.cautions),
            }
            for item in compare_section(section)[0]
        ],
    }


def _group_data(section: Section, group: Group, found: Comparisons) -> dict[str, Any]:
    return {"dataset": group.dataset, "shots": group.shots, "embedded": group.embedded, "methods": [
        {
            "method": cell.label,
            "measures": {
                measure: {
                    name: value
                    for name, value in _line(section, group, cell, measure, found).items()
                    if name in ("mean", "half_width", "sample_std", "difference_from_best", "p", "tie")
                    and not (isinstance(value, float) and not math.isfinite(value))
                }
                for measure in cell_measures(cell)
            },
            "trained_parameters": cell.first.trained_parameters,
            "seconds": cell.seconds,
            "ece": cell.ece,
            "runs": [
                {
                    "seed": record.result.key.seed,
                    "folder": str(record.folder),
                    "key_digest": record.result.key_digest,
                    "command": command_text(record.result),
                }
                for record in cell.runs
            ],
        }
        for cell in group.cells
    ]}  # fmt: skip
