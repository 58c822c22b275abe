"""What a free answer is worth beside right or wrong: it holds the name, it is near it, it is right but too general.

Source: mllm sheet `few-shot-classifier.md`, route 4 (open-world metrics, arXiv 2503.21851: text inclusion, embedding
similarity, hierarchical credit).
Differs from the sheet: hierarchical credit is the hierarchical F1 of what the answer names and the right class, over
each with all that it belongs to; the sheet leaves it open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adaptkit.errors import ConfigError
from adaptkit.methods.mllm._matching import Matcher, normalise, words_in
from adaptkit.methods.tags import answer_of


def check_taxonomy(taxonomy: Mapping[str, str]) -> None:
    """Refuse a taxonomy in which something belongs to itself.

    Raises:
        ConfigError: It does.
    """
    for name in taxonomy:
        if name in lineage(name, taxonomy)[1:]:
            raise ConfigError(f"In taxonomy {name!r} belongs to itself: give every class the group above it.")


def lineage(name: str, taxonomy: Mapping[str, str]) -> list[str]:
    """A name and all that it belongs to, from the bottom up; it ends where something comes again."""
    found = [name]
    while found[-1] in taxonomy and taxonomy[found[-1]] not in found[1:]:
        found.append(taxonomy[found[-1]])
    return found


def includes(text: str, name: str) -> bool:
    """Whether the name stands in the answer as whole words; case, punctuation and articles make no difference."""
    return words_in(normalise(name), normalise(answer_of(text)))


class Credit:
    """Hierarchical credit of free answers.

    Args:
        names: The classes.
        taxonomy: What each class, and each group, belongs to.
        aliases: Other names of classes.
    """

    def __init__(
        self, names: Sequence[str], taxonomy: Mapping[str, str], aliases: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self.taxonomy = {name.replace("_", " "): group.replace("_", " ") for name, group in taxonomy.items()}
        self.names = [name.replace("_", " ") for name in names]
        groups = [group for name in self.names for group in lineage(name, self.taxonomy)[1:]]
        self.nodes = list(dict.fromkeys([*self.names, *groups]))
        spelled = {name.replace("_", " "): more for name, more in (aliases or {}).items()}
        self._matcher = Matcher(self.nodes, spelled)

    def of(self, text: str, label: int) -> float:
        """From 0 (nothing in common) to 1 (the class itself); its group is worth more than another class of it."""
        index = self._matcher.match(text).index
        if index is None:
            return 0.0
        said, right = (set(lineage(name, self.taxonomy)) for name in (self.nodes[index], self.names[label]))
        return 2 * len(said & right) / (len(said) + len(right))
