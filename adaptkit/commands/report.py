"""`adaptkit report`: tables, plots and one HTML page from result folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adaptkit.commands import _console as console
from adaptkit.commands import _options, _runs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adaptkit.sweeps.report.aggregate import Report
    from adaptkit.sweeps.report.tables import Comparisons
    from adaptkit.sweeps.results import BadRun, RunRecord
    from adaptkit.types import ProgressCallback

_file = click.Path(path_type=Path, dir_okay=False)


@click.command("report", short_help="tables, plots and one HTML page from results")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--html", type=_file, help="Write one page that loads nothing from anywhere.")
@click.option("--markdown", type=_file, help="Write the tables in Markdown.")
@click.option("--latex", type=_file, help="Write the tables in LaTeX (booktabs).")
@click.option("--csv", type=_file, help="Write all numbers in full precision, a line each.")
@click.option("--no-pictures", is_flag=True, help="Show no test images on the page, names only.")
@_options.json_option
def command(
    runs: tuple[Path, ...],
    html: Path | None,
    markdown: Path | None,
    latex: Path | None,
    csv: Path | None,
    no_pictures: bool,
    as_json: bool,
) -> None:
    """Report on all runs below the folders RUNS: means with intervals, ties, plots, published figures beside ours.

    Without an option the tables are printed.

    \b
    Examples:
      adaptkit report runs/first
      adaptkit report sweeps/embedded --html report.html --csv numbers.csv
    """
    files = {"html": html, "markdown": markdown, "latex": latex, "csv": csv}
    for path in filter(None, files.values()):
        _runs.check_writable(path.parent)

    from adaptkit.sweeps.report import exporters
    from adaptkit.sweeps.report.aggregate import gather
    from adaptkit.sweeps.results import read_runs

    with console.progress_bars(not as_json) as progress:
        records, damaged = read_runs(runs)
        for bad in damaged:
            console.say(f"left out: {bad.reason}")
        report = gather(records, damaged)
        compared = write_all(report, files, not no_pictures, progress)
    for note in report.notes:
        console.say(f"note: {note}")
    if as_json:
        written = {name: str(path) for name, path in files.items() if path is not None}
        console.print_json({**exporters.to_data(report, compared), "written": written})
        return
    for path in filter(None, files.values()):
        console.say(f"Written to {path}")
    if not any(files.values()):
        show(report, compared)


def write_all(
    report: Report, files: dict[str, Path | None], pictures: bool, progress: ProgressCallback
) -> dict[str, list[Comparisons]]:
    """Compare the methods and write the files asked for; returns each section's comparisons."""
    from adaptkit.storage import atomic_path
    from adaptkit.sweeps.report import exporters
    from adaptkit.sweeps.report.html import write_html
    from adaptkit.sweeps.report.predictions import PredictionReader
    from adaptkit.sweeps.report.significance import compare_report

    reader = PredictionReader()
    compared = compare_report(report, reader, progress)
    writers = {"markdown": exporters.to_markdown, "latex": exporters.to_latex, "csv": exporters.to_csv}
    for name, write in writers.items():
        path = files.get(name)
        if path is not None:
            text = write(report, compared)
            with atomic_path(path) as temporary:
                temporary.write_text(text, encoding="utf-8", errors="replace")
    html = files.get("html")
    if html is not None:
        write_html(html, report, compared, reader, pictures=pictures, progress=progress)
    return compared


def write_page(path: Path, records: Sequence[RunRecord], damaged: Sequence[BadRun], progress: ProgressCallback) -> None:
    """The page alone, for `compare --html`."""
    from adaptkit.sweeps.report.aggregate import gather

    write_all(gather(records, damaged), {"html": path}, True, progress)


def show(report: Report, compared: dict[str, list[Comparisons]]) -> None:
    """The tables on the terminal."""
    from adaptkit.sweeps.report import exporters

    for title, table in exporters.all_tables(report, compared):
        left = [column.title for column in table.columns if not column.numeric]
        rows = [[value.marked for value in row] for row in table.rows]
        columns = [column.title for column in table.columns]
        console.print_table(f"{title}: {table.title}", columns, rows, left=left, note=table.caption)
    for what, why in exporters.refusals(report):
        console.say(f"not comparable with published figures: {what}: {why}")
