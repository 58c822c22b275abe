"""WaffleCLIP: class names followed by random words and random characters, averaged as descriptions are.

Source: arXiv 2306.07282; waffleclip sheet; reference code ExplainableML/WaffleCLIP, waffle_tools.py.
Kept from the reference: lengths come from the class names, letters from the descriptions (without any, from the names);
linking words stand before random strings too; in the mixed mode each class keeps its own draw of the pool.
Differs from the reference: one bank is drawn and used for all classes, where the reference draws one for every class
and keeps one (`compat` does that, draw for draw); names are put in by formatting, not by replacing text; the word list,
a pickle there, is a setting, and without one it is CLIP's own whole words.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.backbones.clip_bpe import ClipBpe
from adaptkit.errors import AdapterError, ConfigError, DataError
from adaptkit.methods import methods
from adaptkit.methods.base import ClassWeightMethod, MethodConfig
from adaptkit.methods.descriptions._sentences import DescribedMethod, is_whole, linked, plain_name, unit_means
from adaptkit.types import FitTask, TrainingLoop

MODES = ("waffle", "words", "characters", "descriptions", "waffle-and-descriptions", "names")
_WITH_DESCRIPTIONS = ("descriptions", "waffle-and-descriptions")
_MAX_SEED = 2**32 - 1
_MAX_COUNT = 1000


@dataclass(frozen=True)
class WaffleCLIPConfig(MethodConfig):
    """Settings of WaffleCLIP."""

    mode: Literal["waffle", "words", "characters", "descriptions", "waffle-and-descriptions", "names"] = field(
        default="waffle",
        metadata={"help": f"What follows the class name: {', '.join(MODES)}; waffle is words and characters by turns."},
    )
    count: int = field(default=15, metadata={"help": "Random texts of each kind; waffle has twice as many in all."})
    repetition: int | None = field(
        default=None, metadata={"help": "Seed of the random texts (the paper's repetitions: 0 to 6); null: the run's."}
    )
    aggregation: Literal["mean", "merged"] = field(
        default="mean", metadata={"help": "mean of similarities, or merged (similarity to the renormalised mean)."}
    )
    concept: str = field(
        default="", metadata={"help": 'What all classes are, such as "bird": "A photo of a bird: a {class}, …".'}
    )
    before: str = field(default="A photo of a ", metadata={"help": "Text before the class name."})
    between: str = field(default=", ", metadata={"help": "Text between class name and what follows it."})
    after: str = field(default=".", metadata={"help": "Text at the end."})
    link: bool = field(default=True, metadata={"help": 'Put "which is", "which" or "which has" before what follows.'})
    shared: bool = field(default=True, metadata={"help": "All classes get the same random texts; else each its own."})
    words: tuple[str, ...] = field(
        default=(), metadata={"help": "Words to draw from; none given: the whole words of CLIP's vocabulary."}
    )
    compat: bool = field(
        default=False, metadata={"help": "Draw and link exactly as the reference does, for a class list in its order."}
    )

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode is {self.mode!r}, but must be one of {', '.join(MODES)}.")
        if self.aggregation not in ("mean", "merged"):
            raise ConfigError(f"aggregation is {self.aggregation!r}, but must be mean or merged.")
        if not 0 <= self.count <= _MAX_COUNT:
            raise ConfigError(f"count is {self.count}, but must lie between 0 and {_MAX_COUNT}.")
        if self.repetition is not None and not 0 <= self.repetition <= _MAX_SEED:
            raise ConfigError(f"repetition is {self.repetition}, but must lie between 0 and {_MAX_SEED}, or be null.")
        if any(not word.strip() for word in self.words):
            raise ConfigError("words holds an empty one: leave it out.")


@lru_cache(maxsize=1)
def clip_words() -> tuple[str, ...]:
    """The whole words of CLIP's vocabulary that are plain letters, three or more, in the vocabulary's order."""
    whole = [piece.removesuffix("</w>") for piece in ClipBpe().vocabulary if piece.endswith("</w>")]
    return tuple(word for word in whole if len(word) >= 3 and word.isascii() and word.isalpha())


@dataclass(frozen=True)
class Shape:
    """How long random texts are.

    Args:
        words: Words of a word text.
        letters: What each word is cut to.
        groups: Groups of a character text.
        characters: Characters of a group.
    """

    words: int
    letters: int
    groups: int
    characters: int


def shape_of(names: Sequence[str]) -> Shape:
    """The lengths that class names give; blanks count in names as they are stored, underscores don't.

    Source: waffleclip sheet, "Random descriptors".

    Example:
        >>> shape_of(["tabby cat", "airliner"])
        Shape(words=2, letters=6, groups=1, characters=8)
    """
    split = [plain_name(name).split(" ") for name in names]
    words = max(1, round(float(np.mean([len(parts) for parts in split]))))
    letters = round(float(np.mean([np.mean([len(word) for word in parts]) for parts in split])))
    groups = round(float(np.mean([name.count(" ") for name in names]))) + 1
    longest = math.ceil(float(np.mean([max(map(len, name.split(" "))) for name in names])))
    longest += groups - longest % groups  # a whole group more where it divides already, as in the reference
    return Shape(words, letters, groups, longest // groups)


@methods.register("waffleclip")
class WaffleCLIP(DescribedMethod, ClassWeightMethod):
    """Follows class names by random words and characters, the same for all classes; nothing is learned.

    Attributes:
        repetition: What seeds the random texts, int64 buffer []; saved with the adapter.
    """

    name = "waffleclip"
    config_class = WaffleCLIPConfig
    config: WaffleCLIPConfig
    reads_descriptions: ClassVar[Literal["never", "optional", "needed"]] = "optional"
    writes_texts: ClassVar[bool] = True
    repetition: Tensor
    _rows: tuple[Any, Tensor] | None = None

    def _require_descriptions(self, names: Sequence[str]) -> None:
        missing = [name for name in names if not self.descriptions.get(name)]
        if missing and self.config.mode in _WITH_DESCRIPTIONS:
            raise DataError(
                f"waffleclip in mode {self.config.mode!r} reads descriptions of the classes, and {missing[0]!r} has"
                " none: give a file with sentences for every class (--descriptions), or choose the mode waffle."
            )

    def build(self) -> None:
        given = self.config.repetition
        drawn = torch.randint(_MAX_SEED, (), generator=self.generator) if given is None else torch.tensor(given)
        self.register_buffer("repetition", drawn)

    def resize_for(self, state: Mapping[str, Tensor]) -> None:
        seed = state.get("repetition")
        if seed is not None and seed.numel() == 1 and not 0 <= float(seed) <= _MAX_SEED:
            raise AdapterError(f"The adapter's repetition is {float(seed):.0f}, which seeds nothing: it is damaged.")

    # --- random texts -------------------------------------------------------------------------------------------------

    def _alphabet(self) -> list[str]:
        """The characters to draw from, sorted: those of the descriptions, or of the class names where there are none.

        The descriptions of the fitted classes count, so that an adapter draws the same whatever else was in the file.
        """
        texts = [text for name in self.fitted_names for text in self.descriptions.get(name, ())]
        letters = "".join(texts) or "".join(map(plain_name, self.fitted_names))
        return sorted(set(letters) - set(" ,.")) or ["a"]

    def draws(self, numbers: np.random.RandomState, count: int) -> list[str]:
        """Random texts of the mode's kinds by turns, `count` of each."""
        shape, alphabet, mode = shape_of(self.fitted_names), self._alphabet(), self.config.mode
        words = [word[: shape.letters] for word in self.config.words or clip_words()]

        def one(choices: Sequence[str]) -> str:
            # the reference's call, which shuffles all choices to take the first; otherwise one plain draw
            place = numbers.choice(len(choices), 1, replace=False)[0] if self.config.compat else None
            return choices[int(numbers.randint(len(choices)) if place is None else place)]

        texts = []
        for _ in range(count):
            if mode != "characters":
                texts.append(" ".join(one(words) for _ in range(shape.words)))
            if mode != "words":
                groups = ("".join(one(alphabet) for _ in range(shape.characters)) for _ in range(shape.groups))
                texts.append(", ".join(groups))
        return texts

    def _banks(self) -> dict[str, list[str]]:
        """The descriptors of every current class, random and not."""
        mode, count = self.config.mode, self.config.count
        if mode == "names" or (count == 0 and mode != "descriptions"):
            return {name: [] for name in self.class_names}
        if mode == "descriptions":
            return {name: list(self.descriptions[name]) for name in self.class_names}
        mixed = mode == "waffle-and-descriptions"
        count = count * 2 // 3 if mixed else count
        numbers = np.random.RandomState(int(self.repetition))
        shared = self._shared(numbers, count) if self.config.shared else None
        banks = {name: list(shared or self.draws(self._numbers_of(name), count)) for name in self.class_names}
        return self._mix(banks, numbers, count) if mixed else banks

    def _shared(self, numbers: np.random.RandomState, count: int) -> list[str]:
        if not self.config.compat:
            return self.draws(numbers, count)
        everyone = [self.draws(numbers, count) for _ in self.fitted_names]
        return everyone[int(numbers.choice(len(everyone)))]

    def _numbers_of(self, name: str) -> np.random.RandomState:
        """A class's own generator, so that its texts don't depend on which others there are."""
        return np.random.RandomState(zlib.crc32(f"{int(self.repetition)}:{name}".encode()))

    def _mix(self, banks: dict[str, list[str]], numbers: np.random.RandomState, count: int) -> dict[str, list[str]]:
        """To each bank of 2 · count texts as many descriptions, drawn with replacement; of all, 3 · count are kept."""
        own = {name: numbers if self.config.compat else self._numbers_of(name) for name in banks}
        for name, bank in banks.items():
            given = self.descriptions[name]
            bank += [given[int(own[name].choice(len(given), 1)[0])] for _ in range(2 * count)]
        return {
            name: [bank[int(place)] for place in own[name].choice(len(bank), 3 * count, replace=False)]
            for name, bank in banks.items()
        }

    def sentences(self) -> dict[str, list[str]]:
        """The sentences of every current class; the bare name where nothing follows it."""
        return {
            name: [self._sentence(name, text) for text in bank] or [self._sentence(name)]
            for name, bank in self._banks().items()
        }

    def _sentence(self, name: str, text: str | None = None) -> str:
        config = self.config
        if text is not None and not config.compat and is_whole(text, name):
            return text
        subject = f"{config.concept}: a {plain_name(name)}" if config.concept else plain_name(name)
        clause = "" if text is None else linked(text, compat=config.compat) if config.link else text
        return f"{config.before}{subject}{config.between if clause else ''}{clause}{config.after}"

    # --- classes ------------------------------------------------------------------------------------------------------

    def class_weights(self) -> Tensor:
        """The mean of unit sentence features, [classes, dim]; unit rows only where they are merged."""
        key = (self.texts_key, int(self.repetition))
        if self._rows is None or self._rows[0] != key:
            means = unit_means(self.class_sentence_features(list(self.sentences().values())))
            self._rows = (key, F.normalize(means, dim=-1) if self.config.aggregation == "merged" else means)
        return self._rows[1]

    def fit(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        """Nothing is learned; the facts say what was drawn."""
        sentences = self.sentences()
        return {
            "mode": self.config.mode,
            "repetition": int(self.repetition),
            "sentences": sum(map(len, sentences.values())),
            "example": sentences[self.fitted_names[0]][0],
        }
