"""FGVQA-like questions about several images: "same or not?" and "how many show it?", asked, parsed and scored.

    from adaptkit.evaluation.fgvqa import ask, read_questions, score
    questions = read_questions("questions.jsonl")
    print(score(questions, ask(backbone, questions)))          # a fitted `twin`: ask(method.mllm, questions)

A line of the file is {"images": ["a.jpg", "b.jpg"], "question": "...", "answer": "yes", "type": "pair"}, or of type
"count" with a reference, its candidates and a number from 0 to 3; "subset" is free. Paths are relative to the file.

Source: TWIN arXiv 2512.23592; mllm sheet `twin.md` (FGVQA: greedy, at most 1,024 tokens, parsing, metrics).
Differs from the sheet: digits that are part of a longer number ("10", "2.5") don't count as answers; images come as
the backbone reads them (whole, as one square).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from adaptkit.backbones.base import Backbone
from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.backbones.mllm.model import MLLM
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.data.images import load_rgb
from adaptkit.data.transforms import to_pixels
from adaptkit.errors import DataError, MissingPathError, UnsupportedError
from adaptkit.methods.tags import tagged_answer, without_tags
from adaptkit.storage import safe_join
from adaptkit.types import ProgressCallback

SUFFIX = "Explain your reasoning, then give the answer inside <answer> </answer> tags."
MOST_TOKENS = 1024
COUNTS = ("0", "1", "2", "3")

_PAIR = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
_COUNT = re.compile(r"(?<![\w.,-])([0-3])(?![\w-]|[.,]\d)")
_LARGEST = 2**20  # bytes of one line


@dataclass(frozen=True)
class Question:
    """A question about several images.

    Args:
        images: Their files.
        question: What is asked.
        answer: "yes" or "no" of a pair, "0" to "3" of a count.
        type: Which sort it is.
        subset: The part of the suite that it belongs to; "" for none.
    """

    images: tuple[Path, ...]
    question: str
    answer: str
    type: Literal["pair", "count"]
    subset: str = ""


# --- reading ----------------------------------------------------------------------------------------------------------


def read_questions(path: str | Path) -> list[Question]:
    """Questions of a JSONL file, all checked before any is asked.

    Raises:
        MissingPathError: The file, or an image of it, isn't there.
        DataError: A line isn't a question; the message says which, and what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingPathError(f"There is no file of questions {str(path)!r}.")
    questions = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    questions.append(_read(line, path.parent, f"Line {number} of {path}"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} isn't a text in UTF-8 ({error.reason}): save it as JSONL in UTF-8.") from error
    if not questions:
        raise DataError(f"{path} holds no questions: one JSON object per line is read.")
    return questions


def _read(line: str, folder: Path, where: str) -> Question:
    try:
        found = json.loads(line) if len(line) <= _LARGEST else None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} isn't JSON ({error}): one object per line is read.") from error
    if not isinstance(found, dict):
        raise DataError(f"{where} isn't a JSON object of at most {_LARGEST:,} characters: one per line is read.")
    missing = [key for key in ("images", "question", "answer", "type") if key not in found]
    if missing:
        raise DataError(f"{where} has no {missing[0]!r}: images, question, answer and type are needed.")
    kind, text, subset = found["type"], found["question"], found.get("subset", "")
    if kind not in ("pair", "count"):
        raise DataError(f"{where} has the type {kind!r}: 'pair' and 'count' are known.")
    if not isinstance(text, str) or not text.strip() or not isinstance(subset, str):
        raise DataError(f"{where} has a question or a subset that isn't a text.")
    return Question(
        _files(found["images"], kind, folder, where), text, _answer(found["answer"], kind, where), kind, subset
    )


def _answer(given: Any, kind: str, where: str) -> str:
    answer = str(given).strip().lower() if isinstance(given, (str, int)) and not isinstance(given, bool) else ""
    known = ("yes", "no") if kind == "pair" else COUNTS
    if answer not in known:
        raise DataError(f"{where} has the answer {given!r}: a {kind} question has one of {', '.join(known)}.")
    return answer


def _files(names: Any, kind: str, folder: Path, where: str) -> tuple[Path, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where} has images that aren't a list of paths.")
    if len(names) != 2 if kind == "pair" else len(names) < 2:
        wanted = "2 images" if kind == "pair" else "a reference and at least one candidate"
        raise DataError(f"{where} has {len(names)} images: a {kind} question has {wanted}.")
    files = tuple(safe_join(folder, name) for name in names)
    absent = [str(file) for file in files if not file.is_file()]
    if absent:
        raise MissingPathError(f"{where} shows {absent[0]!r}, which isn't there.")
    return files


# --- asking -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def ask(
    backbone: Backbone,
    questions: Sequence[Question],
    *,
    suffix: str = SUFFIX,
    max_tokens: int = MOST_TOKENS,
    progress: ProgressCallback | None = None,
) -> list[str]:
    """The model's answers, greedy.

    Args:
        backbone: A multimodal language model, or a tuned one (`method.mllm`).
        questions: From `read_questions`.
        suffix: What every question ends with; "" for nothing.
        max_tokens: Most tokens of an answer.
        progress: Called after every question.

    Raises:
        UnsupportedError: The backbone can't be asked.
        BackboneError: A question with its images and the longest answer doesn't fit into the context.
    """
    if not backbone.is_mllm:
        raise UnsupportedError(f"{backbone.spec.name!r} isn't a multimodal language model, which could be asked.")
    mllm, answers = cast(MLLM, backbone), list[str]()
    for place, question in enumerate(questions):
        text = mllm.prompter.check_text(f"{question.question} {suffix}".strip(), "question")
        features = _shown(mllm, question, text)
        row = mllm.prompter.ids([Turn(text, len(features))], features.counts)
        mllm.prompter.check_length(len(row) + max_tokens, "A question with its images and the longest answer")
        answers += [mllm.prompter.text(ids) for ids in mllm.generate(mllm.prefix([row], features), max_tokens)]
        if progress is not None:
            progress("questions", place + 1, len(questions))
    return answers


def _shown(mllm: MLLM, question: Question, text: str) -> ImageFeatures:
    pixels = [to_pixels(load_rgb(file), mllm.spec.preprocessing) for file in question.images]
    return mllm.image_features(torch.stack(pixels).to(mllm.device), text)


# --- scoring ----------------------------------------------------------------------------------------------------------


def parse_pair(text: str) -> str | None:
    """The last "yes" or "no" inside the last answer tag; where there is none, the last in the text without its tags."""
    return _last(_PAIR, text)


def parse_count(text: str) -> str | None:
    """The last digit from 0 to 3 inside the last answer tag; where there is none, the last in the text without tags."""
    return _last(_COUNT, text)


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.findall(tagged_answer(text) or "") or pattern.findall(without_tags(text))
    return str(found[-1]).lower() if found else None


_PARSERS: Mapping[str, Callable[[str], str | None]] = {"pair": parse_pair, "count": parse_count}


def score(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Any]:
    """Accuracy over all questions, by type and by subset, beside what the commonest answer alone would reach.

    An answer without a word or a digit is wrong, and counted as "unparsed".

    Args:
        questions: What was asked.
        answers: One text each.

    Raises:
        DataError: Not as many answers as questions, or none.
    """
    if len(questions) != len(answers) or not questions:
        raise DataError(
            f"{len(questions)} questions have {len(answers)} answers: one each is needed, and at least one."
        )
    parsed = [_PARSERS[question.type](text) for question, text in zip(questions, answers, strict=True)]
    pairs = list(zip(questions, parsed, strict=True))
    facts = _facts(pairs)
    subsets = sorted({question.subset for question in questions} - {""})
    if subsets:
        facts["subsets"] = {name: _facts([pair for pair in pairs if pair[0].subset == name]) for name in subsets}
    return facts


def _facts(pairs: Sequence[tuple[Question, str | None]]) -> dict[str, Any]:
    facts: dict[str, Any] = {"accuracy": _accuracy(pairs), "questions": len(pairs)}
    for kind in _PARSERS:
        own = [pair for pair in pairs if pair[0].type == kind]
        if own:
            given = Counter(found for _, found in own)
            facts[kind] = {
                "accuracy": _accuracy(own),
                "questions": len(own),
                "majority_rate": max(Counter(question.answer for question, _ in own).values()) / len(own),
                "unparsed": given[None],
            }
            if kind == "pair":
                facts[kind]["yes_rate"] = given["yes"] / len(own)
    return facts


def _accuracy(pairs: Sequence[tuple[Question, str | None]]) -> float:
    return sum(question.answer == found for question, found in pairs) / len(pairs)
