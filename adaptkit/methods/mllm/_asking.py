"""What methods on a multimodal language model share: the question, the candidates, and images in small groups.

Source: mllm sheets `few-shot-classifier.md` and `base-to-novel.md`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from adaptkit.backbones.mllm.batches import Batch, Prefix
from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.backbones.mllm.model import MLLM
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.backbones.mllm.reading import blank_images
from adaptkit.backbones.mllm.trie import Trie
from adaptkit.errors import ConfigError, UnsupportedError
from adaptkit.methods.base import Method
from adaptkit.methods.folding import Fold
from adaptkit.methods.mllm._reducing import token_facts
from adaptkit.types import NovelClasses, Reads

QUESTION = "What {noun} is shown in the image? Answer with its name only."
_NOUN = re.compile(r"a (?:type|kind) of (?P<noun>[a-z ]+?)\W*$")


class AskingMethod(Method):
    """A method that puts questions about images to an MLLM.

    Its settings must have `prompt`, `noun` and `end_token`, and those of `ReducingConfig`.
    """

    reads: ClassVar[Reads] = "images"
    needs_mllm: ClassVar[bool] = True
    novel_classes: NovelClasses = "open"
    config: Any

    def build(self) -> None:
        self.question = self.mllm.prompter.check_text(asked(self.config.prompt, self.noun), "question")
        with torch.no_grad():
            self.token_facts = token_facts(self.features(self.blank_images()[:1]))
        self.placeholders = int(self.token_facts["tokens_per_image"])
        self._trie_memo: tuple[Any, Trie] | None = None
        self._word_memo: dict[tuple[str, ...], tuple[Trie, list[int]]] = {}

    def fold(self) -> Fold:
        raise UnsupportedError(
            f"{self.name} can't be folded: the language model reads every image. Keep the adapter folder, which"
            " 'adaptkit predict' reads, or put a method on features on this backbone."
        )

    @property
    def scores_alone(self) -> bool:
        return False  # letters, decoding and matching choose among those asked for

    @property
    def mllm(self) -> MLLM:
        return cast(MLLM, self.backbone)

    @property
    def noun(self) -> str:
        """What kind of thing is asked for: the setting, else what a template says ("a type of pet"), else "object"."""
        if self.config.noun:
            return str(self.config.noun)
        found = [match["noun"] for match in map(_NOUN.search, self.templates) if match]
        return found[0] if found else "object"

    @property
    def shown_names(self) -> list[str]:
        """The current class names as the model reads them."""
        return [name.replace("_", " ") for name in self.class_names]

    def classes_changed(self) -> None:
        prompter = self.mllm.prompter
        for name in self.shown_names:
            prompter.check_text(name, "class name")
        longest = int(self.trie().lengths.max())
        prompt = len(self.prompt_ids([Turn(self.question)], [self.placeholders]))
        prompter.check_length(prompt + longest, "The question with the longest class name")

    def trie(self) -> Trie:
        """The current classes' candidate answers; remembered for one class list and its texts."""
        if self._trie_memo is None or self._trie_memo[0] != self.texts_key:
            turns, texts = [Turn(self.question)], self.candidate_texts(self.class_names)
            answers = self.mllm.prompter.answers(turns, texts, end=self.config.end_token)
            self._trie_memo = (self.texts_key, Trie.build(answers))
        return self._trie_memo[1]

    def candidate_texts(self, names: Sequence[str]) -> list[str]:
        """The answer that stands for each class: here its name, as the model reads it."""
        return [name.replace("_", " ") for name in names]

    # --- images -------------------------------------------------------------------------------------------------------

    def features(self, pixels: Tensor) -> ImageFeatures:
        """Image features for this method's question."""
        return self.seen(pixels, self.question)

    def seen(self, pixels: Tensor, question: str) -> ImageFeatures:
        """Image features for a question, thinned out as the settings say."""
        return self.mllm.image_features(pixels.to(self.backbone.device), question, self.config.thinning)

    def blank_images(self) -> Tensor:
        """Two images without content, pixels [2, 3, size, size]: grey, and noise (always the same)."""
        return blank_images(self.backbone.spec.preprocessing.image_size).to(self.backbone.device)

    def at_once(self, images: int = 1, text: int = 0) -> int:
        """How many prompts go through the model together; it bounds memory, and changes no number.

        Args:
            images: How many images a prompt shows, each with the question.
            text: Further tokens.
        """
        question = len(self.mllm.prompter.ids([Turn(self.question)], [self.placeholders]))
        return self.mllm.rows_at_once(images * question + text)

    def in_groups(self, pixels: Tensor, at_once: int = 0) -> Iterator[ImageFeatures]:
        """Features of images in groups that are asked about together; 0 leaves their size to `at_once`."""
        for group in pixels.split(at_once or self.at_once()):
            yield self.features(group)

    def prompt_ids(self, turns: Sequence[Turn], counts: Sequence[int]) -> list[int]:
        """Token ids of a conversation whose images have `counts` placeholders."""
        return self.mllm.prompter.ids(turns, counts)

    def embedded(self, batch: Batch) -> Tensor | None:
        """Token embeddings [rows, length, width] in place of those of the ids; None for the ids' own."""
        return None

    def prompt_rows(self, features: ImageFeatures, turns: Sequence[Sequence[Turn]]) -> list[list[int]]:
        """Token ids of one conversation per row; `features` are all images in reading order."""
        rows, at = [], 0
        for conversation in turns:
            shown = sum(turn.images for turn in conversation)
            rows.append(self.prompt_ids(conversation, features.counts[at : at + shown]))
            at += shown
        return rows

    def prefix(self, features: ImageFeatures, turns: Sequence[Sequence[Turn]]) -> Prefix:
        """Put one conversation per row through the model; `features` are all images in reading order."""
        return self.mllm.prefix(self.prompt_rows(features, turns), features, self.embedded)

    def asked(self, features: ImageFeatures) -> Prefix:
        """The plain question about each image."""
        return self.prefix(features, [[Turn(self.question)]] * len(features))

    def ask(self, pixels: Tensor, questions: Sequence[str], max_tokens: int = 32) -> list[str]:
        for question in questions:
            self.mllm.prompter.check_text(question, "question")
        prefix = self.prefix(self.features(pixels), [[Turn(question)] for question in questions])
        return [self.mllm.prompter.text(ids) for ids in self.mllm.generate(prefix, max_tokens)]

    def word_scores(self, prefix: Prefix, words: Sequence[str]) -> Tensor:
        """log p that the answer begins with each of some words ("A", "yes"), fp32 [rows, words].

        Spellings with and without a space before the word count together. Where all are single tokens, as letters are
        in real vocabularies, this is read off the prompt's last position and costs no further pass.
        """
        key = tuple(words)
        if key not in self._word_memo:
            self._word_memo[key] = self._spelled(key)
        trie, owners = self._word_memo[key]
        scores = self.mllm.candidate_scores(prefix, trie)
        rows = [scores[:, [i for i, owner in enumerate(owners) if owner == word]] for word in range(len(key))]
        return torch.stack([row.logsumexp(dim=1) for row in rows], dim=1)

    def _spelled(self, words: tuple[str, ...]) -> tuple[Trie, list[int]]:
        """All spellings as a tree, and the word that each belongs to."""
        prompter = self.mllm.prompter
        spellings: dict[tuple[int, ...], int] = {}
        for place, row in enumerate(prompter.answers([Turn("?")], words, end=False)):
            spellings[tuple(row)] = place
            for text in (words[place], f" {words[place]}"):
                ids = prompter.tokenizer(text, add_special_tokens=False).input_ids
                if len(ids) == 1:
                    spellings[tuple(ids)] = place
        return Trie.build(list(spellings)), list(spellings.values())


def asked(prompt: str, noun: str) -> str:
    """The question with its noun put in.

    Raises:
        ConfigError: It has another field than {noun}.
    """
    try:
        return prompt.format(noun=noun)
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(f"prompt is {prompt!r}, but may hold no other field than {{noun}}.") from error
