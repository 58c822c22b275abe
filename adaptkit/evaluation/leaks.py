"""Novel class names in what training shows a language model: a leak, which base-to-novel numbers mustn't rest on.

Source: mllm sheet `base-to-novel.md`, fairness rule 4.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from adaptkit.errors import DataError

_SHOWN = 5


def leaked_names(texts: Iterable[str], novel: Sequence[str], base: Sequence[str]) -> dict[str, str]:
    """Novel names that stand in a training text as whole words, each with the first such text.

    Case, hyphens, underscores, apostrophes and spaces make no difference. Where a novel name is part of a base class's
    own name ("frog" and "tree frog"), only what stands outside of the latter counts.

    Args:
        texts: As training shows them.
        novel: Names of the novel classes.
        base: Names of the base classes.
    """
    own = sorted({_plain(name) for name in base} - {""}, key=len, reverse=True)
    wanted = {name: re.compile(rf"\b{re.escape(_plain(name))}\b") for name in novel if _plain(name) not in ("", *own)}
    found: dict[str, str] = {}
    for text in texts:
        plain = _plain(text)
        for name in own:
            plain = re.sub(rf"\b{re.escape(name)}\b", "|", plain)
        for name, pattern in wanted.items():
            if name not in found and (pattern.search(plain) or _joined(pattern.pattern, plain)):
                found[name] = text
    return found


def check_leaks(texts: Iterable[str], novel: Sequence[str], base: Sequence[str]) -> None:
    """Refuse training texts that name novel classes (see `leaked_names`).

    Raises:
        DataError: One does; the message names the classes and shows a text.
    """
    found = leaked_names(texts, novel, base)
    if not found:
        return
    names = ", ".join(map(repr, list(found)[:_SHOWN])) + (", …" if len(found) > _SHOWN else "")
    text = " ".join(next(iter(found.values())).split())
    raise DataError(
        f"Training texts name novel classes ({names}), as in {text[:200]!r}: novel"
        " classes would no longer be new. Take them out of the question (setting 'prompt' or 'noun') and of the base"
        " classes' names."
    )


def _plain(text: str) -> str:
    """Lower case, words divided by single spaces; what joins the parts of a word counts as a space."""
    return " ".join(re.sub(r"[^\w|]|_", " ", re.sub(r"['’]", "", text.casefold())).split())


def _joined(pattern: str, plain: str) -> bool:
    """Whether a name of several words stands there written as one ("snow leopard" as "snowleopard")."""
    return "\\ " in pattern and re.search(pattern.replace("\\ ", " ?"), plain) is not None
