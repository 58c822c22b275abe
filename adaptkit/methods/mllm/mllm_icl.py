"""MLLM in-context learning: the few shots are shown in the prompt, as examples or pair by pair; nothing is trained.

Source: mllm sheet `few-shot-classifier.md`, routes 5 (in-context examples, with CIRCLE's pseudo-labels, arXiv
2602.23229) and 6 (pairwise same-class decisions, arXiv 2607.00125).
Differs from the sheet: CIRCLE relabels from the shots' images alone, whose true labels it doesn't look at; pairs are
put in both orders by default, so that the order can't matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.errors import AdapterError, ConfigError
from adaptkit.methods import methods
from adaptkit.methods.base import progress_of
from adaptkit.methods.mllm._asking import QUESTION, AskingMethod, asked
from adaptkit.methods.mllm._likelihood import normalised
from adaptkit.methods.mllm._reducing import ReducingConfig
from adaptkit.types import FitTask, TrainingLoop

PAIR_QUESTION = "Do both images show the same {noun}? Answer yes or no."
UNLISTED = 1e3
"""How far classes that weren't compared pair by pair stay below those that were."""


@dataclass(frozen=True)
class MllmIclConfig(ReducingConfig):
    """Settings of MLLM in-context learning."""

    route: Literal["context", "pairwise"] = field(
        default="context", metadata={"help": "context (examples in front of the question) or pairwise (yes or no)."}
    )
    examples: int = field(default=8, metadata={"help": "context: examples shown per question."})
    selection: Literal["nearest", "balanced"] = field(
        default="nearest",
        metadata={"help": "context: the nearest by image features, nearest last; or drawn, balanced over classes."},
    )
    orders: int = field(default=1, metadata={"help": "context: orders of the examples that scores are averaged over."})
    labels: Literal["given", "circle"] = field(
        default="given",
        metadata={"help": "context: the shots' labels, or CIRCLE's pseudo-labels (labels not looked at)."},
    )
    rounds: int = field(default=5, metadata={"help": "circle: most rounds of relabelling; it stops when none changes."})
    normalisation: Literal["sum", "mean"] = field(
        default="mean", metadata={"help": "context: of likelihoods, summed or mean over tokens."}
    )
    reduce: Literal["mean", "max"] = field(default="mean", metadata={"help": "pairwise: over a class's shots."})
    both_orders: bool = field(default=True, metadata={"help": "pairwise: ask in both orders and average."})
    shortlist: int = field(
        default=0, metadata={"help": "pairwise: classes compared, the likeliest by name; 0 compares all."}
    )
    prompt: str = field(default=QUESTION, metadata={"help": "context: the question; {noun} is put in."})
    pair_prompt: str = field(default=PAIR_QUESTION, metadata={"help": "pairwise: the question; {noun} is put in."})
    noun: str = field(
        default="", metadata={"help": "What is asked for; empty: as the template says ('a type of pet'), else object."}
    )
    end_token: bool = field(
        default=True, metadata={"help": "Count the token that ends the answer as part of each name."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = {"examples": 1, "orders": 1, "rounds": 1, "shortlist": 0}
        wrong = [f"{name} is {getattr(self, name)}" for name, least in limits.items() if getattr(self, name) < least]
        if wrong:
            raise ConfigError(f"These settings can't be used: {', '.join(wrong)}; at least 1 is needed (shortlist: 0).")


@methods.register("mllm-icl")
class MllmIcl(AskingMethod):
    """Few-shot without training: the shots' images go into the prompt."""

    name = "mllm-icl"
    config_class = MllmIclConfig
    config: MllmIclConfig
    keeps_images = True
    images: Tensor
    targets: Tensor

    def build(self) -> None:
        super().build()
        if self.config.route == "pairwise":
            self.novel_classes = "zero-shot"  # there are no shots to compare with
        pair = asked(self.config.pair_prompt, self.noun)
        self.pair_question = self.mllm.prompter.check_text(pair, "question")
        side = self.backbone.spec.preprocessing.image_size
        self.register_buffer("images", torch.zeros(0, 3, side, side, dtype=torch.uint8))
        self.register_buffer("targets", torch.zeros(0, dtype=torch.int64))
        self._shots_memo: ImageFeatures | None = None

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
        device = self.backbone.device
        self.register_buffer("images", images.to(device))
        self.register_buffer("targets", targets.to(device).clone())  # CIRCLE writes into them
        self._shots_memo = None

    def classes_changed(self) -> None:
        super().classes_changed()
        if self.config.route == "pairwise":
            self.mllm.prompter.ids([Turn(self.pair_question, 2)], [self.placeholders] * 2)
            return
        count = min(self.config.examples, len(self.targets) or self.config.examples)
        longest = max((name.replace("_", " ") for name in self.fitted_names), key=len)
        turns = [Turn(self.question, 1, longest)] * count + [Turn(self.question)]
        length = len(self.mllm.prompter.ids(turns, [self.placeholders] * len(turns), check=False))
        what = f"A question behind {count} examples (setting 'examples')"
        self.mllm.prompter.check_length(length + int(self.trie().lengths.max()), what)

    # --- fitting ------------------------------------------------------------------------------------------------------

    def fit(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        self.set_classes(self.fitted_names)
        labels = task.train.labels
        pixels = task.train.select(torch.arange(len(labels)))
        self._keep((pixels * 255).round().clamp(0, 255).to(torch.uint8), labels)
        facts: dict[str, Any] = {"route": self.config.route, **self.token_facts}
        facts["prompt"] = self.question if self.config.route == "context" else self.pair_question
        if self.config.route == "context" and self.config.labels == "circle":
            facts |= self._circle(loop)
        return facts

    @torch.no_grad()
    def _circle(self, loop: TrainingLoop | None) -> dict[str, Any]:
        """Label the shots by the model: first without context, then each with the others as context, until stable."""
        shots, trie, show = self.shots(), self.trie(), progress_of(loop)
        groups = [group.tolist() for group in torch.arange(len(shots)).split(self.at_once(self.config.examples + 1))]
        scores = torch.cat([self.mllm.candidate_scores(self.asked(shots.select(group)), trie) for group in groups])
        self.targets.copy_(normalised(scores, trie.lengths, self.config.normalisation).argmax(dim=1))
        changed, done = len(shots), 0
        while changed and done < self.config.rounds:
            before = self.targets.clone()
            for group in groups:
                logits = self._in_context(shots.select(group), leave_out=group, targets=before)
                self.targets[group] = logits.argmax(dim=1)
                show(f"{self.name}: round {done + 1}", group[-1] + 1, len(shots))
            changed, done = int((before != self.targets).sum()), done + 1
        return {"circle_rounds": done, "circle_stable": changed == 0}

    def shots(self) -> ImageFeatures:
        """Features of the kept images, for this route's question; computed once."""
        if self._shots_memo is None:
            with torch.no_grad():
                self._shots_memo = ImageFeatures.join(list(self.in_groups(self.images.float() / 255)))
        return self._shots_memo

    def features(self, pixels: Tensor) -> ImageFeatures:
        question = self.question if self.config.route == "context" else asked(self.config.pair_prompt, self.noun)
        return self.seen(pixels, question)

    # --- answers ------------------------------------------------------------------------------------------------------

    def forward(self, inputs: Tensor) -> Tensor:
        answer = self._in_context if self.config.route == "context" else self._pairs
        with torch.no_grad():
            return torch.cat(
                [answer(group) for group in self.in_groups(inputs, self.at_once(self.config.examples + 1))]
            )

    def _in_context(
        self, queries: ImageFeatures, *, leave_out: Sequence[int] = (), targets: Tensor | None = None
    ) -> Tensor:
        """Logits [images, classes], with examples in front of each image.

        Args:
            queries: The images.
            leave_out: For each of them the shot that it is itself; empty where they are others.
            targets: Labels of the shots, where not those that are kept.
        """
        labels = (self.targets if targets is None else targets).tolist()
        names = [name.replace("_", " ") for name in self.fitted_names]
        chosen = [
            self._chosen(queries.select([place]), labels, leave_out[place] if leave_out else None)
            for place in range(len(queries))
        ]
        trie = self.trie()
        total = torch.zeros(len(queries), len(self.class_names), device=self.backbone.device)
        for order in range(self.config.orders):
            shown = [row if order == 0 else _reordered(row, order) for row in chosen]
            turns = [
                [*(Turn(self.question, 1, names[labels[index]]) for index in row), Turn(self.question)] for row in shown
            ]
            images = [
                part for place, row in enumerate(shown) for part in (self.shots().select(row), queries.select([place]))
            ]
            scores = self.mllm.candidate_scores(self.prefix(ImageFeatures.join(images), turns), trie)
            total += normalised(scores, trie.lengths, self.config.normalisation) / self.config.orders
        return total

    def _chosen(self, query: ImageFeatures, labels: list[int], leave_out: int | None) -> list[int]:
        """Which shots are shown, the last one next to the question."""
        usable = [index for index in range(len(labels)) if index != leave_out]
        if self.config.selection == "balanced":
            return _balanced(usable, labels, self.config.examples)
        if not usable:
            return []
        shots = F.normalize(_means(self.shots().select(usable)), dim=-1)
        near = (shots @ F.normalize(_means(query), dim=-1)[0]).topk(min(self.config.examples, len(usable))).indices
        return [usable[index] for index in near.flip(0).tolist()]

    def _pairs(self, queries: ImageFeatures) -> Tensor:
        """Logits [images, classes] of the pairwise route."""
        return torch.stack([self._pairwise(queries.select([place])) for place in range(len(queries))])

    def _pairwise(self, query: ImageFeatures) -> Tensor:
        """Logits [classes] of one image: how much rather yes than no, over the shots of each class."""
        plain = torch.zeros(len(self.class_names), device=self.backbone.device)
        if self.config.shortlist or self.uses_fallback:
            trie = self.trie()
            scores = self.mllm.candidate_scores(self.asked(query), trie)
            plain = normalised(scores, trie.lengths, self.config.normalisation)[0]
        if self.uses_fallback:
            return plain
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
        turn, shots = Turn(self.pair_question, 2), self.shots()
        directions = (1, -1) if self.config.both_orders else (1,)
        parts, step = [], self.at_once(2)
        for start in range(0, len(supports), step):
            some = supports[start : start + step]
            total = torch.zeros(len(some), device=self.backbone.device)
            for direction in directions:
                pairs = [image for index in some for image in (query, shots.select([index]))[::direction]]
                prefix = self.prefix(ImageFeatures.join(pairs), [[turn]] * len(some))
                words = self.word_scores(prefix, ("yes", "no"))
                total += (words[:, 0] - words[:, 1]) / len(directions)
            parts.append(total)
        return torch.cat(parts)


def _means(features: ImageFeatures) -> Tensor:
    """Mean over each image's vectors, fp32 [images, width]."""
    return torch.stack([vectors.float().mean(dim=0) for vectors in features.tokens])


def _reordered(chosen: list[int], order: int) -> list[int]:
    """The examples in another order, the same for every image."""
    moves = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(order)).tolist()
    return [chosen[move] for move in moves]


def _balanced(usable: list[int], labels: list[int], count: int) -> list[int]:
    """As many shots of each class as can be, in an order that mixes the classes; always the same ones."""
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(0)).tolist()
    taken: dict[int, int] = {}
    ranked = []
    for move in order:
        label = labels[usable[move]]
        ranked.append((taken.get(label, 0), usable[move]))
        taken[label] = taken.get(label, 0) + 1
    ranked.sort(key=lambda item: item[0])
    return [index for _, index in ranked[:count]]
