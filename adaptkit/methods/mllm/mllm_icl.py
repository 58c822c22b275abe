"""MLLM in-context learning: the few shots are shown in the prompt, as examples or pair by pair; nothing is trained.

Source: mllm sheet `few-shot-classifier.md`, routes 5 (in-context examples, with CIRCLE's pseudo-labels, arXiv
2602.23229) and 6 (pairwise same-class decisions, arXiv 2607.00125; see `_pairwise.py`).
Differs from the sheet: CIRCLE relabels from the shots' images alone, whose true labels it doesn't look at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.methods import methods
from adaptkit.methods.base import at_least, progress_of, refuse
from adaptkit.methods.mllm._likelihood import normalised
from adaptkit.methods.mllm._pairwise import PairwiseConfig, PairwiseMethod
from adaptkit.types import FitTask, TrainingLoop


@dataclass(frozen=True)
class MllmIclConfig(PairwiseConfig):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, *at_least(self, 1, "examples", "orders", "rounds"))


@methods.register("mllm-icl")
class MllmIcl(PairwiseMethod):
    """Few-shot without training: the shots' images go into the prompt."""

    name = "mllm-icl"
    config_class = MllmIclConfig
    config: MllmIclConfig

    def build(self) -> None:
        super().build()
        if self.config.route == "pairwise":
            self.novel_classes = "zero-shot"  # there are no shots to compare with

    def classes_changed(self) -> None:
        super().classes_changed()
        if self.config.route == "pairwise":
            self.check_pair_length()
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
        self.keep_pixels(task.train.select(torch.arange(len(labels))), labels)
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

    def features(self, pixels: Tensor) -> ImageFeatures:
        return super().features(pixels) if self.config.route == "pairwise" else self.seen(pixels, self.question)

    # --- answers ------------------------------------------------------------------------------------------------------

    def forward(self, inputs: Tensor) -> Tensor:
        answer = self._in_context if self.config.route == "context" else self.pair_logits
        with torch.no_grad():
            if self.uses_fallback:
                return self.zero_shot_answer(inputs)
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
            for places in _together(shown):
                picked = [shown[place] for place in places]
                turns = [[Turn(self.question, 1, names[labels[index]]) for index in row] for row in picked]
                images = [
                    part
                    for place, row in zip(places, picked, strict=True)
                    for part in (self.shots().select(row), queries.select([place]))
                ]
                asked = [[*row, Turn(self.question)] for row in turns]
                scores = self.mllm.candidate_scores(self.prefix(ImageFeatures.join(images), asked), trie)
                total[places] += normalised(scores, trie.lengths, self.config.normalisation) / self.config.orders
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


def _together(shown: Sequence[Sequence[int]]) -> list[list[int]]:
    """Places of questions that are asked together: those with the same examples, which then go through the model once
    (`MLLM.prefix` sees to it), and all that have no like."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for place, row in enumerate(shown):
        alike.setdefault(tuple(row), []).append(place)
    single = [places[0] for places in alike.values() if len(places) == 1]
    return [places for places in alike.values() if len(places) > 1] + ([single] if single else [])


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
