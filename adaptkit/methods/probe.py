"""Yes-or-no questions about images: making them from a table of attributes, reading answers, and what they amount to.

Source: POPE arXiv 2305.10355 and FGHE arXiv 2312.01701 by the mllm sheet `recaption.md`, "FGHE probe".
Differs from the sheet: nothing; yes-rate and balanced accuracy are the sheet's own additions.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptkit.errors import DataError

PROBE_QUESTION = "Is this true of the image: {attribute} is {value}? Answer yes or no."
SEVERAL = "several"
"""The type of questions about several attributes at once."""

_ANSWER = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True)
class ProbeQuestion:
    """One question about an image.

    Args:
        image: Its name, as the table or file calls it.
        question: The question.
        answer: Whether yes is right.
        type: What it is about.
    """

    image: str
    question: str
    answer: bool
    type: str


def parsed(text: str) -> bool | None:
    """Yes or no, by whichever word comes first; None for neither."""
    found = _ANSWER.search(text)
    return None if found is None else found[1].lower() == "yes"


def probe_metrics(answers: Sequence[bool | None], truths: Sequence[bool]) -> dict[str, float]:
    """How a model did: yes is the positive class, and an unanswered question (None) is wrong.

    Returns:
        Fractions: accuracy, precision, recall, f1, yes_rate, balanced_accuracy (mean over the truths that occur),
        unanswered; precision, recall and f1 are 0 where they have no denominator.

    Raises:
        DataError: No questions, or not as many answers.
    """
    if not truths or len(answers) != len(truths):
        raise DataError(f"{len(answers)} answers came to {len(truths)} questions: there must be one for each.")
    counts = Counter(zip(answers, truths, strict=True))
    hits, right_no, alarms = counts[True, True], counts[False, False], counts[True, False]
    positives = sum(truths)
    negatives = len(truths) - positives
    recall = hits / positives if positives else 0.0
    precision = hits / (hits + alarms) if hits + alarms else 0.0
    shares = [hits / positives] * bool(positives) + [right_no / max(1, negatives)] * bool(negatives)
    return {
        "accuracy": (hits + right_no) / len(truths),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_rate": (hits + alarms) / len(truths),
        "balanced_accuracy": sum(shares) / len(shares),
        "unanswered": sum(answer is None for answer in answers) / len(truths),
    }


def probe_results(questions: Sequence[ProbeQuestion], answers: Sequence[bool | None]) -> dict[str, Any]:
    """`probe_metrics` of all questions, with those of each type under "types"."""
    truths = [question.answer for question in questions]
    found: dict[str, Any] = {**probe_metrics(answers, truths), "questions": len(questions), "types": {}}
    for kind in dict.fromkeys(question.type for question in questions):
        own = [place for place, question in enumerate(questions) if question.type == kind]
        found["types"][kind] = probe_metrics([answers[place] for place in own], [truths[place] for place in own])
    return found


def make_probe(
    table: Mapping[str, Mapping[str, str | Sequence[str]]],
    seed: int = 0,
    *,
    question: str = PROBE_QUESTION,
    several: bool = False,
) -> list[ProbeQuestion]:
    """Questions about every attribute of every image, half of them with a value that another image has.

    A swapped value is never one of the image's own (case and spaces make no difference). Attributes with no other value
    are only asked truly, and where these are more than half, so are more than half of the questions.

    Args:
        table: By image, its attributes; a value, or several that all are true.
        seed: Of the draws.
        question: With {attribute} and {value}.
        several: Ask about two attributes at once too; of a false pair, one value is swapped.

    Raises:
        DataError: The table is empty or holds an empty value.
    """
    numbers, own = random.Random(seed), {image: _values(image, row) for image, row in table.items()}
    facts = [(image, key) for image, row in own.items() for key in row]
    if not facts:
        raise DataError("The table has no attributes: give an object of attributes and values for each image.")
    known: dict[str, dict[str, str]] = {}  # by attribute: values by how they are compared, in their first spelling
    for image, key in facts:
        for value in own[image][key]:
            known.setdefault(key, {}).setdefault(_plain(value), value)
    false = {fact: _others(known[fact[1]], own[fact[0]][fact[1]]) for fact in facts}
    swappable = [fact for fact in facts if false[fact]]
    swapped = set(numbers.sample(swappable, min(len(facts) // 2, len(swappable))))

    def value_of(fact: tuple[str, str], *, swap: bool) -> str:
        return numbers.choice(false[fact] if swap else own[fact[0]][fact[1]])

    made = []
    for fact in facts:
        value = value_of(fact, swap=fact in swapped)
        made.append(ProbeQuestion(fact[0], _asked(question, [(fact[1], value)]), fact not in swapped, fact[1]))
    pairs = [(image, keys) for image, row in own.items() if len(keys := tuple(row)) > 1] if several else []
    for place, (image, keys) in enumerate(pairs):
        chosen = [(image, key) for key in numbers.sample(keys, 2)]
        wrong = next((fact for fact in chosen if false[fact]), None) if place % 2 else None
        stated = [(fact[1], value_of(fact, swap=fact == wrong)) for fact in chosen]
        made.append(ProbeQuestion(image, _asked(question, stated), wrong is None, SEVERAL))
    return made


def _asked(question: str, stated: Sequence[tuple[str, str]]) -> str:
    """The question about an attribute, or about two joined by "and"."""
    (attribute, value), *others = stated
    more = "".join(f" and {key} is {other}" for key, other in others)
    return question.replace("{attribute}", attribute).replace("{value}", value + more)


def _values(image: str, row: Mapping[str, str | Sequence[str]]) -> dict[str, tuple[str, ...]]:
    found = {key: (given,) if isinstance(given, str) else tuple(given) for key, given in row.items()}
    empty = [key for key, given in found.items() if not given or not all(map(_plain, given))]
    if empty:
        raise DataError(f"Image {image!r} has no value for {empty[0]!r}: leave the attribute out, or fill it in.")
    return found


def _others(known: Mapping[str, str], own: Sequence[str]) -> list[str]:
    mine = {_plain(value) for value in own}
    return [value for plain, value in known.items() if plain not in mine]


def _plain(value: str) -> str:
    return " ".join(str(value).casefold().split())
