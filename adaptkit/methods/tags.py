"""Answers that are asked for in tags, `<answer>yes</answer>`: where they are, and what a text is without the tags.

Source: mllm sheets `dive-k.md` and `twin.md` (the last answer block counts).
"""

from __future__ import annotations

import re

OPENING_TAG = "<answer>"
"""What stands in front of an answer that is asked for in tags."""

_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"</?answer>", re.IGNORECASE)


def tagged_answer(text: str) -> str | None:
    """The last `<answer>` span, or None where there is none; one that isn't closed goes to the end."""
    spans: list[str] = _TAGGED.findall(text)
    return spans[-1] if spans else None


def answer_of(text: str) -> str:
    """The last `<answer>` span, or the whole text where it has none."""
    found = tagged_answer(text)
    return text if found is None else found


def without_tags(text: str) -> str:
    """The text with a blank in the place of every answer tag."""
    return _TAG.sub(" ", text)
