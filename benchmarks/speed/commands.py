"""The command line as a user starts it: `adaptkit --help`, and a whole run on the embedded default."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.speed.measure import Load, Row, Scope, medians, run_process, time_in_turn

STARTS = 10
RUN = ["run", "--method", "coop", "--dataset", "digits", "--protocol", "base-to-novel", "--shots", "16"]


def adaptkit_command(*arguments: str) -> list[str]:
    """The installed script beside this Python, or the same without it."""
    script = Path(sys.executable).with_name("adaptkit")
    start = [str(script)] if script.exists() else [sys.executable, "-m", "adaptkit.commands.main"]
    return [*start, *arguments]


def bench_startup(load: Load, scope: Scope) -> Iterator[Row]:
    """`adaptkit --help`, against a Python that imports torch (what it would cost at least if it wasn't lazy)."""
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: run_process(adaptkit_command("--help")),
        "plain": lambda: run_process([sys.executable, "-c", "import torch"]),
    }
    for run in sides.values():
        run()  # files into the page cache
    samples = time_in_turn(sides, 2 if scope.quick else STARTS)
    seconds = medians(samples)
    yield Row(
        "startup",
        "adaptkit --help; plain: python -c 'import torch'",
        "s",
        seconds["ours"],
        seconds["plain"],
        wanted_most=0.3,
        samples=samples,
    )


def bench_run(load: Load, scope: Scope) -> Iterator[Row]:
    """A whole run with nothing cached: data, features, training, evaluation, result and adapter on disk."""
    yield time_run(["--set", "training.epochs=1"] if scope.quick else [])


def time_run(more: Sequence[str]) -> Row:
    """Seconds of `adaptkit run` on the embedded default, with more options."""
    with tempfile.TemporaryDirectory(prefix="adaptkit-bench-") as folder:
        command = adaptkit_command(*RUN, *more, "--out", str(Path(folder) / "run"))
        cache = {"ADAPTKIT_CACHE": str(Path(folder) / "cache")}
        samples = time_in_turn({"ours": lambda: run_process(command, extra=cache)}, 1)
    return Row(
        "run",
        " ".join(["adaptkit run: CoOp, digits, base-to-novel, 16 shots", *more[1:]]),
        "s",
        samples["ours"][0],
        wanted_most=60.0,
        samples=samples,
        note="empty cache",
        facts={"command": " ".join(["adaptkit", *RUN, *more])},
    )
