"""A report into files: the tests once, then every format asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from adaptkit.storage import atomic_path
from adaptkit.sweeps.report import exporters
from adaptkit.sweeps.report.aggregate import Report
from adaptkit.sweeps.report.html import write_html
from adaptkit.sweeps.report.predictions import PredictionReader
from adaptkit.sweeps.report.significance import compare_report
from adaptkit.types import ProgressCallback

Format = Literal["html", "markdown", "latex", "csv"]

_TEXTS = {"markdown": exporters.to_markdown, "latex": exporters.to_latex, "csv": exporters.to_csv}


def write_report(
    report: Report,
    files: Mapping[Format, Path],
    *,
    pictures: bool = True,
    progress: ProgressCallback | None = None,
) -> exporters.Compared:
    """Compare the methods and write the files.

    Args:
        report: From `adaptkit.sweeps.report.aggregate.gather`.
        files: What goes where; {} to compare only.
        pictures: Whether the page may show test images.
        progress: Called as (what, done, total).

    Returns:
        Each section's comparisons, for what else is made of them.
    """
    reader = PredictionReader()
    compared = compare_report(report, reader, progress)
    for kind, path in files.items():
        if kind == "html":
            write_html(path, report, compared, reader, pictures=pictures, progress=progress)
            continue
        text = _TEXTS[kind](report, compared)
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="replace")
    return compared
