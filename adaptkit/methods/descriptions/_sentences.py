"""What the methods of this folder share: sentences to features, DCLIP's linking words, and classes nobody described."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.backbones.base import Backbone
from adaptkit.errors import BackboneError
from adaptkit.methods.base import Method

CHUNK = 256
"""Sentences encoded at once, so that thousands of them don't fill the memory."""

_VERBS = ("has", "often", "typically", "may", "can")
_BEHIND_A_NAME = (",", " is ", " are ", " has ", " have ", " with ", " which ", " that ")


def plain_name(name: str) -> str:
    """A class name as a sentence holds it: blanks for underscores."""
    return name.replace("_", " ")


def linked(descriptor: str, *, compat: bool = False) -> str:
    """A descriptor behind the words that make it a clause: "which is", "which" or "which has".

    Args:
        descriptor: A phrase, such as "a long tail" or "used for cutting".
        compat: The reference's rule, which looks at first letters: "amber eyes" and "antlers" begin with "a", "canine
            teeth" with "can". Otherwise whole words count.

    Source: dclip sheet, "Prompt composition".

    Example:
        >>> linked("amber eyes"), linked("amber eyes", compat=True), linked("has stripes")
        ('which has amber eyes', 'which is amber eyes', 'which has stripes')
    """
    if compat:
        an_article = descriptor.startswith("a")
        verb, used = descriptor.startswith(_VERBS), descriptor.startswith("used")
    else:
        first = descriptor.partition(" ")[0].lower()
        an_article = first in ("a", "an") and " " in descriptor
        verb, used = first in _VERBS, first == "used"
    if an_article or used:
        return f"which is {descriptor}"
    return f"which {descriptor}" if verb else f"which has {descriptor}"


def is_whole(descriptor: str, name: str) -> bool:
    """Whether a descriptor is a sentence that begins with the class name already.

    Example:
        >>> is_whole("Oak, which has lobed leaves", "oak"), is_whole("oak leaves", "oak")
        (True, False)
    """
    word = plain_name(name).lower()
    return descriptor.lower().startswith(tuple(word + behind for behind in _BEHIND_A_NAME))


def shortened(backbone: Backbone, sentence: str) -> str:
    """The sentence, with words left out at its end until it fits the text tower.

    Raises:
        BackboneError: Not even its first word fits.
    """
    words = sentence.split()
    fits, too_many = 0, len(words)  # the first `fits` words fit, the first `too_many` don't
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if _fits(backbone, " ".join(words[:middle])) else (fits, middle)
    if not fits:
        backbone.tokenize([words[0]])  # its own message says by how much it is too long
    return " ".join(words[:fits])


def _fits(backbone: Backbone, sentence: str) -> bool:
    try:
        backbone.tokenize([sentence])
    except BackboneError:
        return False
    return True


@torch.no_grad()
def sentence_features(backbone: Backbone, sentences: Sequence[str], *, shorten: bool = False) -> Tensor:
    """Unnormalised fp32 features [sentences, dim]; each different sentence is encoded once, some at a time.

    Args:
        backbone: With text.
        sentences: In any order, repeated or not.
        shorten: Cut sentences that are too long at a word; otherwise they are refused.

    Raises:
        BackboneError: A sentence is too long.
    """
    different = list(dict.fromkeys(sentences))
    parts = []
    # made in inference mode, or in half precision, they couldn't serve training
    with torch.inference_mode(False), torch.autocast(backbone.device.type, enabled=False):
        for start in range(0, len(different), CHUNK):
            part = different[start : start + CHUNK]
            if shorten:
                part = [one if _fits(backbone, one) else shortened(backbone, one) for one in part]
            parts.append(backbone.encode_text(backbone.tokenize(part)).float())
        features = torch.cat(parts)  # [different, dim]
        place = {sentence: row for row, sentence in enumerate(different)}
        return features[torch.tensor([place[sentence] for sentence in sentences], device=features.device)]


def unit_means(features: Sequence[Tensor]) -> Tensor:
    """Per class the mean of its unit sentence features, [classes, dim]; shorter the more the sentences differ.

    Args:
        features: Per class [sentences, dim].
    """
    return torch.stack([F.normalize(rows, dim=-1).mean(dim=0) for rows in features])


class DescribedMethod(Method):
    """A method that reads sentences about its classes.

    Where its settings have a field `fallback` and it is on, a class that no sentence describes is accepted, as long as
    one class is described.
    """

    reads_descriptions: ClassVar[Literal["never", "optional", "needed"]] = "needed"

    def _require_descriptions(self, names: Sequence[str]) -> None:
        if not (getattr(self.config, "fallback", False) and any(self.descriptions.values())):
            super()._require_descriptions(names)

    def class_sentence_features(self, by_class: Sequence[Sequence[str]], *, shorten: bool = False) -> list[Tensor]:
        """Per class the unnormalised features [sentences, dim] of its sentences, all encoded in one go."""
        everything = [sentence for sentences in by_class for sentence in sentences]
        features = sentence_features(self.backbone, everything, shorten=shorten)
        return list(torch.split(features, [len(sentences) for sentences in by_class]))

    def sentence_facts(self, by_class: Sequence[Sequence[str]]) -> dict[str, Any]:
        """How many sentences describe the fitted classes, for the result."""
        without = [name for name in self.fitted_names if not self.descriptions.get(name)]
        facts: dict[str, Any] = {"sentences": sum(map(len, by_class))}
        return {**facts, "classes_without_descriptions": without} if without else facts
