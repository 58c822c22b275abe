"""Tables and progress for people; JSON for machines. rich is imported on first use."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from adaptkit.types import ProgressCallback


def print_json(content: Any) -> None:
    """JSON on standard output, and nothing else there."""
    click.echo(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[str] = (),
    note: str = "",
    wide: bool = False,
) -> None:
    """A table with right-aligned columns, except those named in `left`; on request as wide as it is, where its reader
    is no terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", title_style="bold", caption=note or None)
    table.caption_justify = "left"
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: class names may look like rich's markup
    out = Console()
    if wide and not out.is_terminal:
        out = Console(width=max(out.width, sum(4 + max(map(len, cells)) for cells in zip(columns, *rows, strict=True))))
    out.print(table)


def print_facts(title: str, facts: Mapping[str, Any]) -> None:
    """Names and values, one a line."""
    print_table(title, ["", " "], [[str(key), str(value)] for key, value in facts.items()], left=["", " "])


def say(message: str) -> None:
    """A line for people, on standard error, so that --json output stays clean."""
    click.echo(message, err=True)


@contextmanager
def progress_bars(shown: bool) -> Iterator[ProgressCallback]:
    """A progress callback that draws a bar per step on standard error (none where `shown` is false)."""
    if not shown:
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    current: dict[str, Any] = {"label": None, "task": None}

    def show(what: str, done: int, total: int) -> None:
        # the text after the first colon (loss, accuracy) changes within one step; what stands before names the step
        bars.start()  # at the first step, so that an error before it leaves standard error clean
        label = what.split(":")[0]
        if current["label"] != label:
            if current["task"] is not None:
                bars.remove_task(TaskID(current["task"]))
            current.update(label=label, task=bars.add_task(what, total=total))
        bars.update(current["task"], description=what, completed=done, total=total)

    try:
        yield show
    finally:
        if current["task"] is not None:
            bars.stop()


def percent(fraction: float | None) -> str:
    """A fraction as a percentage with one decimal."""
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def count(number: int) -> str:
    """A whole number with thousands separated."""
    return f"{number:,}"
