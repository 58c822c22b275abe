"""Results made by hand, for tests that need many and run none."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from adaptkit.evaluation.results import RESULT_FILE, PartResult, RunKey, RunResult
from adaptkit.storage import write_json


def made_result(classes: int = 3, **key: Any) -> RunResult:
    """A result of a run that never was; `key` overrides parts of its key."""
    facts: dict[str, Any] = {
        "method": "zero-shot",
        "backbone": "mini",
        "backbone_digest": "b" * 64,
        "dataset": "digits",
        "split_digest": "d" * 64,
        "protocol": "few-shot",
        "shots": 4,
        "seed": 1,
        "sampler": "coop",
        "settings": {},
    }
    made = RunKey(**{**facts, **key})
    part = PartResult("all", classes, classes, 2 * classes, {"accuracy": 0.5}, tuple((1, 2) for _ in range(classes)))
    names = tuple(f"class {index}" for index in range(classes))
    return RunResult(
        1, made, made.digest, (part,), None, 0, 0, {"fit": 0.25}, 1, 0, "f" * 64, names, ("a photo of a {}.",)
    )  # fmt: skip


def write_result(root: Path, result: RunResult) -> Path:
    """The result at the place in a sweep's folder that its key gives it."""
    folder = root / "runs" / result.key_digest[:2] / result.key_digest
    write_json(folder / RESULT_FILE, asdict(result))
    return folder
