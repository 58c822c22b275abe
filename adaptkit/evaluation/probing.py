"""Probes of hallucination: yes-or-no questions about images in a file, put to a method's multimodal language model.

    probe.jsonl   a line for each question: {"image": "a/1.png", "question": "…", "answer": "yes", "type": "colour"}

Images lie below one folder. Nothing is trained, and the answers are written freely and read by their first yes or no.

Source: POPE arXiv 2305.10355 and FGHE arXiv 2312.01701 by the mllm sheet `recaption.md`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adaptkit.data.images import load_rgb
from adaptkit.data.transforms import to_pixels
from adaptkit.errors import DataError, MissingPathError
from adaptkit.methods.base import Method
from adaptkit.methods.probe import ProbeQuestion, parsed, probe_results
from adaptkit.storage import atomic_path, safe_join
from adaptkit.types import ProgressCallback

MAX_BYTES = 64 * 2**20
MAX_QUESTIONS = 100_000

_AT_ONCE = 8

_KEYS = ("image", "question", "answer", "type")


def read_probe(path: str | Path) -> list[ProbeQuestion]:
    """The questions of a file; see the top of this file.

    Raises:
        MissingPathError: Nothing is there.
        DataError: It is too large, a line isn't such an object, or there is no question; the message says which line.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise MissingPathError(f"There is no probe at {path}: give a file with a JSON object on each line.")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path} is too large: a probe has at most {MAX_BYTES:,} bytes.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} can't be read as UTF-8 text: {error}.") from error
    found = [_question(line, f"{path}, line {number},") for number, line in enumerate(lines, start=1) if line.strip()]
    if not 0 < len(found) <= MAX_QUESTIONS:
        raise DataError(f"{path} holds {len(found):,} questions; from 1 to {MAX_QUESTIONS:,} are accepted.")
    return found


def _question(line: str, where: str) -> ProbeQuestion:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} isn't JSON: write one object on each line.") from error
    if not isinstance(given, dict):
        raise DataError(f"{where} isn't an object with {', '.join(_KEYS)}.")
    values: dict[str, Any] = {key: given.get(key, "all" if key == "type" else None) for key in _KEYS}
    for key, value in values.items():
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where} has no text for {key!r}: {', '.join(_KEYS)} are read.")
    answer = values["answer"].strip().casefold()
    if answer not in ("yes", "no"):
        raise DataError(f"{where} has the answer {values['answer']!r}; yes or no is accepted.")
    return ProbeQuestion(values["image"], values["question"], answer == "yes", values["type"])


def write_probe(path: str | Path, questions: Sequence[ProbeQuestion]) -> None:
    """Write questions as `read_probe` reads them."""
    rows = [
        {"image": one.image, "question": one.question, "answer": "yes" if one.answer else "no", "type": one.type}
        for one in questions
    ]
    with atomic_path(path) as made:
        made.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@torch.no_grad()
def run_probe(
    method: Method,
    questions: Sequence[ProbeQuestion],
    folder: str | Path,
    *,
    max_tokens: int = 8,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Ask every question; fractions of all and of each type (see `probe_results`), and the first answers as written.

    Args:
        method: Asks a multimodal language model, fitted or not.
        questions: From `read_probe` or `make_probe`.
        folder: Where the images lie.
        max_tokens: Most tokens of an answer.
        progress: Called as questions are answered.

    Raises:
        UnsupportedError: The method asks no such model.
        MissingPathError: An image isn't there.
    """
    paths = {one.image: safe_join(folder, one.image) for one in questions}
    lost = next((name for name, path in paths.items() if not path.is_file()), None)
    if lost is not None:
        raise MissingPathError(f"The probe's image {lost!r} isn't in {folder}.")
    preprocessing, texts = method.backbone.spec.preprocessing, list[str]()
    for start in range(0, len(questions), _AT_ONCE):
        group = questions[start : start + _AT_ONCE]
        pixels = torch.stack([to_pixels(load_rgb(paths[one.image]), preprocessing) for one in group])
        texts += method.ask(pixels, [one.question for one in group], max_tokens)
        if progress is not None:
            progress("probe", len(texts), len(questions))
    return {**probe_results(questions, [parsed(text) for text in texts]), "first_answers": texts[:5]}
