"""Pairwise decisions: a query beside each shot, "do both show the same?"; the classes with the surest yes win.

Source: mllm sheet `few-shot-classifier.md`, route 6 (pairwise same-class decisions, arXiv 2607.00125).
Differs from the sheet: pairs are put in both orders by default, so that the order can't matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.errors import AdapterError
from adaptkit.methods.base import at_least, refuse
from adaptkit.methods.mllm._asking import QUESTION, AskingMethod, asked
from adaptkit.methods.mllm._likelihood import normalised
from adaptkit.methods.mllm._pairs import PairTally
from adaptkit.methods.mllm._reducing import ReducingConfig
from adaptkit.methods.mllm.mllm_zero_shot import MllmZeroShot, MllmZeroShotConfig

PAIR_QUESTION = "Do both images show the same {noun}? Answer yes or no."
UNLISTED = 1e3
"""How far classes that weren't compared pair by pair stay below those that were."""


@dataclass(frozen=True)
class PairwiseConfig(ReducingConfig):
    """Settings of pairwise decisions."""

    normalisation: Literal["sum", "mean"] = field(
        default="mean", metadata={"help": "Of the likelihoods of names, summed or mean over tokens."}
    )
    reduce: Literal["mean", "max"] = field(default="mean", metadata={"help": "pairwise: over a class's shots."})
    both_orders: bool = field(default=True, metadata={"help": "pairwise: ask in both orders and average."})
    shortlist: int = field(
        default=0, metadata={"help": "pairwise: classes compared, the likeliest by name; 0 compares all."}
    )
    prompt: str = field(default=QUESTION, metadata={"help": "The question for a name; {noun} is put in."})
    pair_prompt: str = field(default=PAIR_QUESTION, metadata={"help": "pairwise: the question; {noun} is put in."})
    noun: str = field(
        default="", metadata={"help": "What is asked for; empty: as the template says ('a type of pet'), else object."}
    )
    end_token: bool = field(
        default=True, metadata={"help": "Count the token that ends the answer as part of each name."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, *at_least(self, 0, "shortlist"))


class PairwiseMethod(AskingMethod):
    """A method that keeps the shots and can be asked whether an image shows the same as one of them."""

    keeps_images = True
    config: Any
    images: Tensor
    targets: Tensor

    def build(self) -> None:
        super().build()
        self.pair_question = self.mllm.prompter.check_text(asked(self.config.pair_prompt, self.noun), "question")
        side = self.backbone.spec.preprocessing.image_size
        self.register_buffer("images", torch.zeros(0, 3, side, side, dtype=torch.uint8))
        self.register_buffer("targets", torch.zeros(0, dtype=torch.int64))
        self._shots_memo: ImageFeatures | None = None
        self._pair_tally = PairTally()

    # --- the shots ----------------------------------------------------------------------------------------------------

    def resize_for(self, state: Mapping[str, Tensor]) -> None:
        images, targets = state.get("images"), state.get("targets")
        if images is None or targets is None:
            return  # the caller says what is missing
        side, classes = self.backbone.spec.preprocessing.image_size, len(self.fitted_names)
        fits = images.dtype == torch.uint8 and images.shape == (len(images), 3, side, side)
        if not fits or targets.dtype != torch.int64 or targets.shape != images.shape[:1]:
            raise AdapterError(
                f"The adapter's examples have shapes {tuple(images.shape)} and {tuple(targets.shape)}; images"
                f" [n, 3, {side}, {side}] with n labels were expected: it was made for another backbone."
            )
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
            raise AdapterError(f"The adapter's examples have labels outside its {classes} classes: save it again.")
        self._keep(images, targets)

    def _keep(self, images: Tensor, targets: Tensor) -> None:
        """Take over shots: uint8 images [n, 3, size, size] and labels, int64 [n]."""
        device = self.backbone.device
        self.register_buffer("images", images.to(device))
        self.register_buffer("targets", targets.to(device).clone())  # CIRCLE writes into them
        self._shots_memo = None

    def keep_pixels(self, pixels: Tensor, targets: Tensor) -> None:
        """Take over shots: pixels in [0, 1], [n, 3, size, size], and labels, int64 [n]."""
        self._keep((pixels * 255).round().clamp(0, 255).to(torch.uint8), targets)

    def shots(self) -> ImageFeatures:
        """Features of the kept images, for this route's question; computed once."""
        if self._shots_memo is None:
            with torch.no_grad():
                self._shots_memo = ImageFeatures.join(list(self.in_groups(self.images.float() / 255)))
        return self._shots_memo

    def features(self, pixels: Tensor) -> ImageFeatures:
        return self.seen(pixels, asked(self.config.pair_prompt, self.noun))

    def check_pair_length(self, answer: int = 0) -> None:
        """Refuse a pair question that doesn't fit into the context, with `answer` tokens behind it."""
        row = self.mllm.prompter.ids([Turn(self.pair_question, 2)], [self.placeholders] * 2, check=False)
        self.mllm.prompter.check_length(len(row) + answer, "A question about two images with its answer")

    # --- answers ------------------------------------------------------------------------------------------------------

    def zero_shot_answer(self, pixels: Tensor) -> Tensor:
        """Logits [images, classes] of the frozen model by the likelihood of the current names."""
        config = MllmZeroShotConfig(
            normalisation=self.config.normalisation,
            prompt=self.config.prompt,
            noun=self.noun,
            end_token=self.config.end_token,
            **{setting.name: getattr(self.config, setting.name) for setting in fields(ReducingConfig)},
        )
        plain = MllmZeroShot(self.backbone, self.class_names, templates=self.templates, config=config)
        logits: Tensor = plain(pixels)
        return logits

    def pair_logits(self, queries: ImageFeatures) -> Tensor:
        """Logits [images, classes]: how much rather yes than no, over the shots of each class."""
        return torch.stack([self._pairwise(queries.select([place])) for place in range(len(queries))])

    def _pairwise(self, query: ImageFeatures) -> Tensor:
        """Logits [classes] of one image."""
        plain = torch.zeros(len(self.class_names), device=self.backbone.device)
        if self.config.shortlist:
            trie = self.trie()
            scores = self.mllm.candidate_scores(self.asked(query), trie)
            plain = normalised(scores, trie.lengths, self.config.normalisation)[0]
        count = min(self.config.shortlist or len(plain), len(plain))
        own, found = self.fitted_indices(), plain - UNLISTED
        listed = plain.topk(count).indices.tolist()
        supports = [(self.targets == own[place]).nonzero()[:, 0].tolist() for place in listed]
        same = self._same(query, [index for indices in supports for index in indices])
        for place, values in zip(listed, same.split([len(indices) for indices in supports]), strict=True):
            if len(values):
                found[place] = values.mean() if self.config.reduce == "mean" else values.amax()
        return found

    def _same(self, query: ImageFeatures, supports: list[int]) -> Tensor:
        """log p(yes) - log p(no) of the query beside each support, [supports]."""
        if not supports:
            return torch.zeros(0, device=self.backbone.device)
        shots = self.shots()
        pairs = [(query, shots.select([index])) for index in supports]
        forth = self.margins_of(pairs)
        if not self.config.both_orders:
            self._pair_tally.add(forth[:, None])
            return forth
        both = torch.stack([forth, self.margins_of([(second, first) for first, second in pairs])], dim=1)
        self._pair_tally.add(both)
        return both.mean(dim=1)

    def margins_of(self, pairs: list[tuple[ImageFeatures, ImageFeatures]]) -> Tensor:
        """log p(yes) - log p(no) of pairs of single images in the order given, [pairs]; some at a time."""
        step = self.at_once(2)
        groups = [pairs[start : start + step] for start in range(0, len(pairs), step)]
        return torch.cat(
            [self.margins(ImageFeatures.join([one for pair in group for one in pair])) for group in groups]
        )

    def margins(self, features: ImageFeatures) -> Tensor:
        """log p(yes) - log p(no) that two neighbours in `features` show the same, fp32 [images / 2], differentiable."""
        words = self.word_scores(self.mllm.prefix(self.pair_rows(features), features), ("yes", "no"))
        return words[:, 0] - words[:, 1]

    def pair_rows(self, features: ImageFeatures) -> list[list[int]]:
        """Token ids of the question about each two neighbours, up to where the word begins."""
        return self.prompt_rows(features, [[Turn(self.pair_question, 2)]] * (len(features) // 2))

    def answer_facts(self) -> dict[str, Any]:
        tally, self._pair_tally = self._pair_tally, PairTally()
        return tally.facts()
