"""TWIN: a multimodal language model learns to tell whether two images show the same class, and classifies by it.

Pairs are made of the shots: same-class pairs, and hard pairs of classes that look alike, are confused, or belong
together. Low-rank updates of the language model learn yes or no; a query is then put beside the shots of each class.

Source: TWIN arXiv 2512.23592; mllm sheets `twin.md` and `few-shot-classifier.md`, route 6.
Differs from the paper: pairs of one class stand for those of one object; LoRA of the language model in place of all
weights; images as the backbone reads them (whole, as one square); the default is a loss on the margin between yes and
no, and after GRPO it is read right behind the first tag, without an explanation. Training on written explanations
isn't offered: shots have none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.backbones.mllm.model import MLLM
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.errors import DataError, UnknownNameError
from adaptkit.methods import methods
from adaptkit.methods.base import at_least, progress_of, refuse
from adaptkit.methods.mllm._grpo import GrpoConfig, GrpoMethod, Question
from adaptkit.methods.mllm._likelihood import normalised
from adaptkit.methods.mllm._lowrank import add_low_rank, write_low_rank
from adaptkit.methods.mllm._pairs import Pairs, Sources, balanced, make_pairs, pair_facts, split_images
from adaptkit.methods.mllm._pairwise import PairwiseConfig, PairwiseMethod
from adaptkit.methods.mllm._tuning import NumberedInputs, answers_loss, summed
from adaptkit.methods.tags import OPENING_TAG, tagged_answer
from adaptkit.types import FitTask, Inputs, NovelClasses, TrainingLoop, TrainingSettings

MEASURED = 64
"""Most same-class pairs (and as many others) that are asked before and after training."""

EXPLAIN = "First explain what you compare, then give yes or no inside <answer> </answer> tags."

_ANSWERS = ("no", "yes")


@dataclass(frozen=True)
class TwinConfig(GrpoConfig, PairwiseConfig):
    """Settings of TWIN."""

    mode: Literal["logit", "sft", "grpo"] = field(
        default="logit",
        metadata={
            "help": "What is trained: logit (the margin between yes and no), sft (yes or no as the answer) or grpo"
            " (answers are drawn, and rewarded where they are right)."
        },
    )
    explain: bool = field(
        default=True,
        metadata={"help": "grpo: ask for an explanation and the answer in tags, as the paper does; off: for the word."},
    )
    rollouts: int = field(default=5, metadata={"help": "grpo: answers drawn per pair; they are compared."})
    beta: float = field(
        default=0.01, metadata={"help": "grpo: weight of staying near the untrained model (KL); 0 spares its pass."}
    )
    pairs: int = field(default=0, metadata={"help": "Same-class pairs; 0 takes two per shot."})
    ratio: float = field(default=1.0, metadata={"help": "Pairs of different classes per same-class pair."})
    near: float = field(
        default=0.5, metadata={"help": "Share of them: the images of other classes that are nearest by features."}
    )
    confused: float = field(
        default=0.5, metadata={"help": "Share of them: of the classes that the untrained model confuses an image with."}
    )
    related: float = field(
        default=0.0,
        metadata={"help": "Share of them: of classes with the same parent in taxonomy. The rest is random."},
    )
    taxonomy: dict[str, str] = field(default_factory=dict, metadata={"help": "related: the parent of each class."})
    balanced: bool = field(default=True, metadata={"help": "As many yes as no in every batch."})
    held_out: float = field(
        default=0.0,
        metadata={"help": "Share of each class's shots that pairs are measured on; 0: validation images, if any."},
    )
    r: int = field(default=16, metadata={"help": "Rank of the updates."})
    alpha: float = field(default=32, metadata={"help": "Scale of the updates: alpha / r."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout in front of the updates; 0 with grpo."})

    def __post_init__(self) -> None:
        PairwiseConfig.__post_init__(self)
        GrpoConfig.__post_init__(self)
        shares = {name: getattr(self, name) for name in ("near", "confused", "related")}
        total = sum(shares.values())
        refuse(
            self,
            *at_least(self, 0, "pairs"),
            ("ratio", "above 0", 0 < self.ratio < math.inf),
            *((name, "from 0 to 1", 0 <= share <= 1) for name, share in shares.items()),
            ("near", f"smaller: near, confused and related add up to {total:g}", total < 1 + 1e-9),
            ("taxonomy", "the parent of each class, since related is above 0", bool(self.taxonomy or not self.related)),
            ("held_out", "at least 0 and at most 0.5", 0 <= self.held_out <= 0.5),
            *at_least(self, 1, "r"),
            ("alpha", "above 0", self.alpha > 0),
            ("dropout", "at least 0 and below 1", 0 <= self.dropout < 1),
            ("dropout", "0 with mode grpo, whose answers are drawn without", self.mode != "grpo" or not self.dropout),
        )


def reward(text: str, wanted: str, *, tagged: bool) -> float:
    """1 for an answer whose word is the wanted one, else 0.

    Args:
        text: The answer.
        wanted: "yes" or "no".
        tagged: Whether the word must stand in tags, of which the last count; else the whole answer must be the word.
    """
    word = tagged_answer(text) if tagged else text
    return float(word is not None and re.sub(r"[^\w\s]", "", word.lower()).strip() == wanted)


class PairInputs:
    """Pairs in the place of training images: the loop's item is one pair, or two of them, one yes and one no.

    What is right follows from the pair's number and isn't among `labels`, which are all 0.

    Args:
        images: The training images.
        items: Numbers of pairs, int64 [items, 1 or 2].
    """

    def __init__(self, images: NumberedInputs, items: Tensor) -> None:
        self._images, self._items = images, items
        self.labels = torch.zeros(len(items), dtype=torch.int64)

    @property
    def num_views(self) -> int:
        return self._images.num_views

    def select(self, indices: Tensor, view: int = 0) -> Tensor:
        """Items as numbers of pairs, and behind them the view that their images are shown in, [k, 2 or 3]."""
        picked = self._items[indices]
        return torch.cat([picked, torch.full_like(picked[:, :1], view)], dim=1)


@dataclass(frozen=True)
class _Measured:
    """Pairs that are asked before and after training.

    Args:
        images: Where their images are.
        pairs: By place among those.
        on: What they are.
    """

    images: NumberedInputs
    pairs: Pairs
    on: str


@methods.register("twin")
class Twin(GrpoMethod, PairwiseMethod):
    """Yes or no to pairs of images, learned; classes by their shots."""

    name = "twin"
    config_class = TwinConfig
    config: TwinConfig
    novel_classes: NovelClasses = "zero-shot"  # there are no shots to compare with; see `for_classes`
    default_training: ClassVar[TrainingSettings | None] = TrainingSettings(
        epochs=5, batch_size=8, keep_last=True, optimiser="adamw", lr=1e-4, weight_decay=0.0, schedule="cosine-step",
        warmup_epochs=0,
    )  # fmt: skip

    def tune(self, twin: MLLM) -> None:
        config = self.config
        self._peft_config = add_low_rank(
            twin,
            twin.family.lora_targets("language"),
            self.generator,
            r=config.r,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
        )

    def build(self) -> None:
        if self.config.related:
            self._parents = [self._parent(name) for name in self.fitted_names]
        self._pairs = Pairs(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0), ())
        self._measured: _Measured | None = None
        super().build()
        if self.tagged:
            self.pair_question = f"{self.pair_question} {EXPLAIN}"

    def _parent(self, name: str) -> str:
        if name not in self.config.taxonomy:
            known = self.config.taxonomy
            raise UnknownNameError.for_name("class in taxonomy", name, known, "related needs every class's parent.")
        return self.config.taxonomy[name]

    @property
    def tagged(self) -> bool:
        """Whether answers explain, and have their word in tags."""
        return self.config.mode == "grpo" and self.config.explain

    def shown(self, pixels: Tensor) -> ImageFeatures:
        return self.features(pixels)

    def classes_changed(self) -> None:
        super().classes_changed()
        self.check_pair_length(self.config.max_tokens if self.config.mode == "grpo" else 0)

    # --- pairs --------------------------------------------------------------------------------------------------------

    def fit(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        labels = task.train.labels
        if len(set(labels.tolist())) < 2:
            raise DataError(f"{self.name} learns from pairs of different classes: give images of at least two classes.")
        self.keep_pixels(task.train.select(torch.arange(len(labels))), labels)
        self._seed, self._val = task.seed % 2**63, task.val
        try:
            return super().fit(task, loop)
        finally:
            self._val = self._measured = None

    @torch.no_grad()
    def look(self, loop: TrainingLoop | None) -> None:
        """Make the pairs, and ask those that are measured."""
        numbers = torch.Generator().manual_seed(self._seed)
        labels: list[int] = self.targets.tolist()
        kept, held = split_images(labels, self.config.held_out, numbers)
        if self._numbered is None:
            return
        sources = self._sources(self._numbered, loop)
        positives = self.config.pairs or 2 * len(kept)
        self._pairs = make_pairs(labels, kept, positives, self.config.ratio, numbers, sources, alone=True)
        if not 0 < int(self._pairs.same.sum()) < len(self._pairs):
            raise DataError(
                f"{self.name} needs pairs of one class and of two, and {len(kept)} images give none of one sort at"
                f" ratio {self.config.ratio:g}: choose a ratio nearer to 1, or give more shots."
            )
        self._measured = self._choose_measured(self._numbered, held, numbers)
        self._show = progress_of(loop)
        self._before = self._measure(self._measured, "before")

    def _sources(self, images: NumberedInputs, loop: TrainingLoop | None) -> Sources:
        """What hard negatives are found by."""
        config, places = self.config, torch.arange(len(self.targets))
        shares = {"near": config.near, "confused": config.confused, "related": config.related}
        features, scores, show = None, None, progress_of(loop)
        if config.near:
            vectors = [
                image.float().mean(dim=0) for group in places.split(64) for image in images.features(group).tokens
            ]
            features = torch.stack(vectors).cpu()
        if config.confused:
            trie, found = self.trie(), []
            for group in places.split(self.at_once()):
                found.append(self.mllm.candidate_scores(self.asked(images.features(group)), trie))
                show(f"{self.name}: confusions", int(group[-1]) + 1, len(places))
            scores = normalised(torch.cat(found), trie.lengths, config.normalisation).cpu()
        return Sources(shares, features, scores, self._parents if config.related else None)

    def _choose_measured(self, images: NumberedInputs, held: Sequence[int], numbers: torch.Generator) -> _Measured:
        """As many yes as no among held-out shots, else among validation images; else what is trained on."""
        pairs = make_pairs(self.targets.tolist(), held, MEASURED, 1.0, numbers)
        if len(pairs):
            return _Measured(images, pairs, "held-out shots")
        if self._val is not None:
            labels = self._val.labels.tolist()
            pairs = make_pairs(labels, range(len(labels)), MEASURED, 1.0, numbers)
            if len(pairs):
                return _Measured(NumberedInputs(self._val, self.shown, keep=True), pairs, "validation images")
        return _Measured(images, self._pairs, "training pairs")

    @torch.no_grad()
    def _measure(self, measured: _Measured, when: str) -> dict[str, float]:
        """`pair_facts` of the pairs for measuring."""
        found = list[Tensor]()
        for group in measured.pairs.places.split(self.at_once(2)):
            orders = (group, group.flip(1))
            margins = [self.margins(measured.images.features(order.flatten())) for order in orders]
            found.append(torch.stack(margins, dim=1))
            self._show(f"{self.name}: pairs {when} training", sum(map(len, found)), len(measured.pairs))
        return pair_facts(torch.cat(found), measured.pairs.same)

    def training_inputs(self, numbered: NumberedInputs) -> Inputs:
        numbers = torch.Generator().manual_seed(self._seed)
        if self.config.balanced:
            return PairInputs(numbered, balanced(self._pairs.same, numbers))
        return PairInputs(numbered, torch.arange(len(self._pairs))[:, None])

    def finish(self, task: FitTask) -> dict[str, Any]:
        facts: dict[str, Any] = {
            **super().finish(task),
            "mode": self.config.mode,
            "prompt": self.pair_question,
            **self.token_facts,
            "pairs": self._pairs.counts(),
        }
        if self._measured is not None:
            facts |= {"measured_on": self._measured.on, "measured_pairs": len(self._measured.pairs)}
            facts |= {"before": self._before, "after": self._measure(self._measured, "after")}
        return facts

    # --- losses -------------------------------------------------------------------------------------------------------

    def losses(self, inputs: Tensor, labels: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        """The mode's loss, mean over pairs.

        Args:
            inputs: Items of `PairInputs`, int64 [batch, 2 or 3].
            labels: Not used: a pair's number says what is right.
            frozen: Not used.
        """
        pairs = inputs[:, :-1].flatten().cpu()
        views = inputs[:, -1:].expand(-1, inputs.shape[1] - 1).flatten().cpu()
        if self.config.mode == "grpo":
            return super().losses(self._image_numbers(pairs, views).to(inputs.device), self._pairs.same[pairs])
        loss = self._logit_loss if self.config.mode == "logit" else self._answer_loss
        chunks = torch.arange(len(pairs)).split(self.config.micro_batch or len(pairs))

        def part(rows: Tensor) -> Tensor:
            features = self.training_features(self._image_numbers(pairs[rows], views[rows]))
            return loss(features, self._pairs.same[pairs[rows]]) / len(pairs)

        return {self.config.mode: summed(part, chunks, self.trainables())}

    def _image_numbers(self, pairs: Tensor, views: Tensor) -> Tensor:
        """Numbers of both images of each pair (see `NumberedInputs`), in reading order, int64 [2 · pairs].

        An image beside itself is shown in a drawn view and in the plain one.
        """
        places = self._pairs.places[pairs]
        shown = views[:, None].expand(-1, 2).clone()
        shown[places[:, 0] == places[:, 1], 1] = 0
        return (places + shown * len(self.targets)).flatten()

    def _logit_loss(self, features: ImageFeatures, same: Tensor) -> Tensor:
        """Binary cross-entropy of the margins, summed."""
        margins = self.margins(features)
        return F.binary_cross_entropy_with_logits(margins, same.to(margins.device), reduction="sum")

    def _answer_loss(self, features: ImageFeatures, same: Tensor) -> Tensor:
        """Minus the log-probability of the right word and of the token that ends its turn, summed."""
        turn = Turn(self.pair_question, 2)
        words = self.mllm.prompter.answers([turn], _ANSWERS)
        answers = [words[int(one)] for one in same.tolist()]
        return answers_loss(self, [[turn]] * len(answers), answers, features)

    def questions(self, inputs: Tensor, labels: Tensor) -> list[Question]:
        turns = (Turn(self.pair_question, 2),)
        return [Question(turns, (2 * i, 2 * i + 1), _ANSWERS[int(same)]) for i, same in enumerate(labels.tolist())]

    def rewards(self, text: str, question: Question) -> dict[str, float]:
        return {"accuracy": reward(text, question.truth, tagged=self.tagged)}

    def training_texts(self) -> list[str]:
        return [self.pair_question]

    # --- answers ------------------------------------------------------------------------------------------------------

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            if self.uses_fallback:
                return self.zero_shot_answer(inputs)
            return torch.cat([self.pair_logits(group) for group in self.in_groups(inputs)])

    def pair_rows(self, features: ImageFeatures) -> list[list[int]]:
        """The question about each pair; where words stand in tags, with the first tag behind it."""
        rows = super().pair_rows(features)
        if not self.tagged:
            return rows
        tag: list[int] = self.mllm.prompter.tokenizer(OPENING_TAG, add_special_tokens=False).input_ids
        return [row + tag for row in rows]

    def for_classes(self, names: Sequence[str], pixels: Tensor, labels: Tensor) -> Twin:
        """A method that answers among other classes by shots of theirs, with what was learned; nothing is trained.

        Args:
            names: The classes.
            pixels: Their shots, [n, 3, size, size].
            labels: Class of each shot, int64 [n].

        Raises:
            DataError: Labels outside the names, or a class without shots.
        """
        wrong = [label for label in labels.tolist() if not 0 <= label < len(names)]
        missing = sorted(set(range(len(names))) - set(labels.tolist()))
        if wrong or missing or len(labels) != len(pixels):
            what = f"a shot has label {wrong[0]}" if wrong else f"{len(pixels)} shots have {len(labels)} labels"
            what = f"{names[missing[0]]!r} has no shots" if missing and not wrong else what
            raise DataError(f"Shots of other classes need one label each, from 0 to {len(names) - 1}, and {what}.")
        other = type(self)(self.backbone, names, templates=self.templates, config=self.config)
        other.keep_pixels(pixels, labels)
        shots = {"images": other.images, "targets": other.targets}
        other.load_adapter_state({**self.adapter_state(), **shots})
        return other

    def write_extras(self, folder: Path) -> None:
        """Write the low-rank updates in peft's own layout too, for transformers' model of the same weights."""
        write_low_rank(folder, self.mllm, self.named_parameters(), self._peft_config)
