"""`adaptkit report`: tables, plots and one HTML page from result folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adaptkit.commands import _console as console
from adaptkit.commands import _options, _runs

if TYPE_CHECKING:
    from adaptkit.sweeps.report.aggregate import Report
    from adaptkit.sweeps.report.exporters import Compared
    from adaptkit.sweeps.report.writing import Format

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
    asked: dict[Format, Path | None] = {"html": html, "markdown": markdown, "latex": latex, "csv": csv}
    files = {kind: path for kind, path in asked.items() if path is not None}
    for path in files.values():
        _runs.check_writable(path.parent)

    from adaptkit.sweeps.report import exporters
    from adaptkit.sweeps.report.aggregate import gather
    from adaptkit.sweeps.report.writing import write_report
    from adaptkit.sweeps.results import read_runs

    with console.progress_bars(not as_json) as progress:
        records, damaged = read_runs(runs)
        for bad in damaged:
            console.say(f"left out: {bad.reason}")
        report = gather(records, damaged)
        compared = write_report(report, files, pictures=not no_pictures, progress=progress)
    for note in report.notes:
        console.say(f"note: {note}")
    if as_json:
        written = {kind: str(path) for kind, path in files.items()}
        console.print_json({**exporters.to_data(report, compared), "written": written})
        return
    for path in files.values():
        console.say(f"Written to {path}")
    if not files:
        show(report, compared)


def show(report: Report, compared: Compared) -> None:
    """The tables on the terminal."""
    from adaptkit.sweeps.report import exporters

    for title, whole in exporters.all_tables(report, compared):
        table = whole.narrow()
        left = [column.title for column in table.columns if not column.numeric]
        rows = [[value.marked for value in row] for row in table.rows]
        columns = [column.title for column in table.columns]
        console.print_table(f"{title}: {table.title}", columns, rows, left=left, note=table.caption)
    for what, why in exporters.refusals(report):
        console.say(f"not comparable with published figures: {what}: {why}")
