"""From a free-form answer to a class: in steps, each counted, and never by guessing.

Source: mllm sheet `few-shot-classifier.md`, route 4.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from adaptkit.methods.tags import answer_of

Step = Literal["exact", "alias", "containment", "embedding", "none"]
STEPS: tuple[Step, ...] = ("exact", "alias", "containment", "embedding", "none")

_ARTICLE = re.compile(r"^(?:a|an|the) ")


@dataclass(frozen=True)
class Match:
    """What an answer was taken for.

    Args:
        index: The class, or None.
        step: Which step found it.
    """

    index: int | None
    step: Step


def normalise(text: str) -> str:
    """Lower case, no possessives, no punctuation but hyphens inside words, single spaces, no leading article.

    Example:
        >>> normalise("  The Cat's-paw, (red)! ")
        'cat-paw red'
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("_", " ").replace("’", "'")
    text = re.sub(r"'s\b", "", text)
    text = re.sub(r"(?<!\w)-|-(?!\w)", " ", text)
    text = re.sub(r"[^\w\s-]", " ", text)
    return _ARTICLE.sub("", " ".join(text.split()))


class Matcher:
    """Maps answers to classes.

    Args:
        names: The classes.
        aliases: Other names of a class, by class name.
        lenient: Take any two-way containment as released graders do ("707" for "707-320"), the longest name first; for
            comparisons with their figures only.
    """

    def __init__(
        self, names: Sequence[str], aliases: Mapping[str, Sequence[str]] | None = None, *, lenient: bool = False
    ) -> None:
        self.names = [normalise(name) for name in names]
        self.lenient = lenient
        self._exact = _unique((name, index) for index, name in enumerate(self.names))
        known = {name: index for index, name in enumerate(names)}
        others = [(normalise(alias), known[name]) for name, more in (aliases or {}).items() if name in known
                  for alias in more]  # fmt: skip
        self._aliases = _unique(others)

    def match(self, text: str) -> Match:
        """What an answer names; ambiguous and empty ones name nothing."""
        answer = normalise(answer_of(text))
        if not answer:
            return Match(None, "none")
        if answer in self._exact:
            return Match(self._exact[answer], "exact")
        if answer in self._aliases:
            return Match(self._aliases[answer], "alias")
        found = self._lenient(answer) if self.lenient else self._contained(answer)
        return Match(found, "none" if found is None else "containment")

    def _contained(self, answer: str) -> int | None:
        """The only class whose words stand in the answer, else the only one in whose name the answer stands."""
        inside = {index for index, name in enumerate(self.names) if words_in(name, answer)}
        inside |= {index for alias, index in self._aliases.items() if words_in(alias, answer)}
        # "american robin" names it even where "robin" is a class as well
        longest = {i for i in inside if not any(i != j and words_in(self.names[i], self.names[j]) for j in inside)}
        if longest:
            return longest.pop() if len(longest) == 1 else None
        around = [index for index, name in enumerate(self.names) if words_in(answer, name)]
        return around[0] if len(around) == 1 else None

    def _lenient(self, answer: str) -> int | None:
        order = sorted(range(len(self.names)), key=lambda index: -len(self.names[index]))
        return next((i for i in order if self.names[i] in answer or answer in self.names[i]), None)


def words_in(part: str, whole: str) -> bool:
    """Whether `part` stands in `whole` as whole words; a hyphen joins words."""
    return bool(part) and re.search(rf"(?<![\w-]){re.escape(part)}(?![\w-])", whole) is not None


def _unique(pairs: object) -> dict[str, int]:
    """Texts that mean one class only."""
    places: dict[str, set[int]] = {}
    for text, index in pairs:  # type: ignore[attr-defined]
        places.setdefault(text, set()).add(index)
    return {text: next(iter(found)) for text, found in places.items() if text and len(found) == 1}
