"""MLLM zero-shot: asks a multimodal language model for the class, by likelihood, letters, constrained or free answers.

Source: mllm sheet `few-shot-classifier.md`, routes 1 to 4 (likelihood scoring over a prefix tree, cyclic multiple
choice, constrained generation, open-ended generation with matching); sheet `base-to-novel.md` for the defaults.
Differs from the sheet: a multiple choice of more classes than options is shortlisted by the likelihood route, or by a
dual encoder (see `_shortlist.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.backbones.mllm.batches import Prefix
from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.backbones.mllm.trie import Trie
from adaptkit.errors import DataError
from adaptkit.methods import methods
from adaptkit.methods.base import at_least, refuse
from adaptkit.methods.mllm._asking import QUESTION, AskingMethod
from adaptkit.methods.mllm._credit import Credit, check_taxonomy, includes
from adaptkit.methods.mllm._decoding import constrained_beams
from adaptkit.methods.mllm._letters import LETTERS, MOST_OPTIONS, LetterTally, options_text, shifted, spread
from adaptkit.methods.mllm._likelihood import Normalisation, fit_calibration, normalised
from adaptkit.methods.mllm._matching import STEPS, Matcher
from adaptkit.methods.mllm._reducing import ReducingConfig
from adaptkit.methods.mllm._shortlist import Shortlister
from adaptkit.methods.tags import answer_of
from adaptkit.types import FitTask, TrainingLoop

Route = Literal["likelihood", "letters", "constrained", "open"]

_KEPT = 200_000  # answers that wait for the record; one that serves for long isn't asked for it

NOT_FOUND = -1e4
"""Logit of a class that constrained decoding dropped or a free answer doesn't name."""


@dataclass(frozen=True)
class MllmZeroShotConfig(ReducingConfig):
    """Settings of MLLM zero-shot."""

    route: Route = field(
        default="likelihood",
        metadata={
            "help": "likelihood of each name, letters (multiple choice), constrained (the answer can only become a"
            " name) or open (a free answer, matched)."
        },
    )
    normalisation: Normalisation = field(
        default="mean",
        metadata={
            "help": "Of likelihoods: sum; mean over tokens; pmi (less the likelihood without image); pmi-null (less"
            " that of blank images); calibrated (scale and shift per class, fitted on the shots)."
        },
    )
    prompt: str = field(default=QUESTION, metadata={"help": "The question; {noun} is put in."})
    noun: str = field(
        default="", metadata={"help": "What is asked for; empty: as the template says ('a type of pet'), else object."}
    )
    end_token: bool = field(
        default=True, metadata={"help": "Count the token that ends the answer as part of each name."}
    )
    options: int = field(default=4, metadata={"help": "letters: options per question; more classes are shortlisted."})
    shortlist: str = field(
        default="",
        metadata={"help": "letters: a CLIP-like backbone that chooses the options, such as mini; empty: likelihood."},
    )
    shifts: int = field(
        default=0, metadata={"help": "letters: rotations averaged over; 0 is one per option, at most 5."}
    )
    beams: int = field(default=5, metadata={"help": "constrained: beam width; 1 is greedy."})
    max_tokens: int = field(default=32, metadata={"help": "open: most tokens of an answer."})
    aliases: dict[str, tuple[str, ...]] = field(
        default_factory=dict, metadata={"help": "open: other names that count, by class name."}
    )
    lenient: bool = field(
        default=False, metadata={"help": "open: take any two-way containment, as some released graders do."}
    )
    unmatched: Literal["wrong", "nearest"] = field(
        default="wrong",
        metadata={"help": "open: an answer that names no class is wrong, or counts as the class nearest to its text."},
    )
    taxonomy: dict[str, str] = field(
        default_factory=dict,
        metadata={"help": "open: what each class, or group, belongs to; the record then has credit for near misses."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        endless = self.route == "constrained" and not self.end_token
        check_taxonomy(self.taxonomy)
        refuse(
            self,
            ("options", f"from 2 to {MOST_OPTIONS}", 2 <= self.options <= MOST_OPTIONS),
            ("shifts", f"from 0 to {MOST_OPTIONS}", 0 <= self.shifts <= MOST_OPTIONS),
            *at_least(self, 1, "beams", "max_tokens"),
            more=["end_token is off, but constrained decoding needs it to tell where a name ends"] * endless,
        )


@methods.register("mllm-zero-shot")
class MllmZeroShot(AskingMethod):
    """The model's own answer; nothing is learned but, on request, a calibration of its likelihoods."""

    name = "mllm-zero-shot"
    config_class = MllmZeroShotConfig
    config: MllmZeroShotConfig
    scale: Tensor
    shift: Tensor

    def build(self) -> None:
        super().build()
        self._prior_memo: tuple[Any, Tensor] | None = None
        self._letters = LetterTally()
        self._steps: Counter[str] = Counter()
        self._said: list[str] = []
        lists = self.config.route == "letters" and self.config.shortlist
        self._shortlister = Shortlister(self.config.shortlist, self.backbone.device) if lists else None
        if self.calibrated:
            classes = len(self.fitted_names)
            self.register_buffer("scale", torch.ones(classes))
            self.register_buffer("shift", torch.zeros(classes))

    @property
    def calibrated(self) -> bool:
        """Whether likelihoods are calibrated on the shots."""
        return self.config.route in ("likelihood", "letters") and self.config.normalisation == "calibrated"

    @property
    def scores_alone(self) -> bool:
        return self.config.route == "likelihood" and type(self).forward is MllmZeroShot.forward

    # --- fitting ------------------------------------------------------------------------------------------------------

    def fit(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        self.set_classes(self.fitted_names)
        if self.calibrated:
            self._calibrate(task)
        return {
            "route": self.config.route,
            "normalisation": self.config.normalisation,
            "prompt": self.question,
            **self.token_facts,
        }

    def _calibrate(self, task: FitTask) -> None:
        labels = task.train.labels
        fewest = int(torch.bincount(labels.cpu(), minlength=len(self.fitted_names)).min())
        if fewest < 2:
            raise DataError(
                f"{self.name} calibrates on at least 2 images of every class, and one has {fewest}: give more shots, or"
                " choose another normalisation."
            )
        rows = [
            self._plain_scores(group)
            for indices in torch.arange(len(labels)).split(64)
            for group in self.in_groups(task.train.select(indices))
        ]
        with torch.inference_mode(False):
            scale, shift = fit_calibration(torch.cat(rows).clone(), labels.to(self.backbone.device))
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    # --- scores -------------------------------------------------------------------------------------------------------

    def forward(self, inputs: Tensor) -> Tensor:
        answer = {
            "likelihood": self._likelihood,
            "letters": self._lettered,
            "constrained": self._constrained,
            "open": self._free,
        }[self.config.route]
        with torch.no_grad():
            if self._shortlister is not None:
                scores = self._shortlister.scores(inputs.to(self.backbone.device), self.class_names, self.templates)
                groups = zip(self.in_groups(inputs), scores.split(self.at_once()), strict=True)
                return torch.cat([self._lettered(group, own) for group, own in groups])
            return torch.cat([answer(group) for group in self.in_groups(inputs)])

    def _plain_scores(self, features: ImageFeatures) -> Tensor:
        """Likelihoods before any calibration, [images, classes]."""
        trie = self.trie()
        with torch.no_grad():
            scores = self.mllm.candidate_scores(self.asked(features), trie)
            return normalised(scores, trie.lengths, self.config.normalisation, self._prior(trie))

    def _likelihood(self, features: ImageFeatures) -> Tensor:
        scores = self._plain_scores(features)
        if not self.calibrated:
            return scores
        place = {name: index for index, name in enumerate(self.fitted_names)}
        own = [place.get(name, -1) for name in self.class_names]
        scale = torch.stack([self.scale[i] if i >= 0 else torch.ones_like(self.scale[0]) for i in own])
        shift = torch.stack([self.shift[i] if i >= 0 else torch.zeros_like(self.shift[0]) for i in own])
        return scores * scale + shift

    def _prior(self, trie: Trie) -> Tensor | None:
        """Likelihoods that owe nothing to an image, [k, classes]; the same for all images, so computed once."""
        kind = self.config.normalisation
        if kind not in ("pmi", "pmi-null"):
            return None
        if self._prior_memo is None or self._prior_memo[0] != self.class_names:
            if kind == "pmi":
                prefix = self.prefix(ImageFeatures(()), [[Turn(self.question, 0)]])
            else:
                prefix = self.asked(self.features(self.blank_images()))
            self._prior_memo = (self.class_names, self.mllm.candidate_scores(prefix, trie))
        return self._prior_memo[1]

    # --- letters ------------------------------------------------------------------------------------------------------

    def _lettered(self, features: ImageFeatures, scores: Tensor | None = None) -> Tensor:
        """Mean log-probability of each option over the shifts; classes that aren't among the options come below.

        Args:
            features: The images.
            scores: What options are chosen by, [images, classes]; None for the likelihood route's.
        """
        count = min(self.config.options, len(self.class_names))
        if count == len(self.class_names):
            scores = torch.zeros(len(features), count, device=self.backbone.device)
            shortlist = torch.arange(count, device=scores.device).expand(len(features), -1)
        else:
            scores = self._likelihood(features) if scores is None else scores
            shortlist = scores.topk(count, dim=1).indices
        shifts = min(self.config.shifts or 5, count)
        total = scores.new_zeros(shortlist.shape)
        for step in range(shifts):
            order = shifted(range(count), step * count // shifts)
            log_probs = self._letter_scores(features, shortlist[:, order])
            self._letters.add(log_probs)
            total[:, order] += log_probs / shifts
        return spread(shortlist, total, scores) if count < len(self.class_names) else total

    def _letter_scores(self, features: ImageFeatures, options: Tensor) -> Tensor:
        """log p of each letter among the letters, [images, options]; `options` are classes, int64 [images, options]."""
        names = self.shown_names
        texts = [options_text(self.question, [names[index] for index in row]) for row in options.tolist()]
        prefix = self.prefix(features, [[Turn(text)] for text in texts])
        return self.word_scores(prefix, LETTERS[: options.shape[1]]).log_softmax(dim=1)

    # --- decoding -----------------------------------------------------------------------------------------------------

    def _constrained(self, features: ImageFeatures) -> Tensor:
        trie = self.trie()
        nodes = self.mllm.node_scores(self.asked(features), trie)
        return constrained_beams(nodes, trie, self.config.beams).clamp(min=NOT_FOUND)

    def asked_freely(self, features: ImageFeatures) -> Prefix:
        """The question about each image that is answered freely."""
        return self.asked(features)

    def _free(self, features: ImageFeatures) -> Tensor:
        """0 for the class that the answer names and `NOT_FOUND` for the others; all NaN where it names none."""
        matcher = Matcher(self.class_names, self.config.aliases, lenient=self.config.lenient)
        logits = torch.full((len(features), len(self.class_names)), NOT_FOUND, device=self.backbone.device)
        answers = self.mllm.generate(self.asked_freely(features), self.config.max_tokens)
        for row, ids in enumerate(answers):
            text = self.mllm.prompter.text(ids)
            self._said += [text] * (len(self._said) < _KEPT)
            index, step = (found := matcher.match(text)).index, found.step
            if index is None and text and self.config.unmatched == "nearest":
                index, step = self._nearest(text), "embedding"
            self._steps[step] += 1
            if index is None:
                logits[row] = torch.nan
            else:
                logits[row, index] = 0.0
        return logits

    def _nearest(self, text: str) -> int:
        """The class whose name's text feature is nearest to the answer's."""
        features = F.normalize(self.backbone.text_features(self.shown_names), dim=-1)
        own = F.normalize(self.backbone.text_features([self._without_control(text)]), dim=-1)
        return int((features @ own[0]).argmax())

    # --- the record ---------------------------------------------------------------------------------------------------

    def judged_facts(self, labels: Sequence[int]) -> dict[str, Any]:
        """What free answers are worth beside right or wrong: inclusion of the name, similarity, credit by taxonomy."""
        if len(self._said) != len(labels) or not self._said:
            return {}  # answered by another route
        pairs = [(text, int(label)) for text, label in zip(self._said, labels, strict=True)]
        plain = [self._without_control(answer_of(text)) for text, _ in pairs]
        texts = list(dict.fromkeys(plain))
        said, right = (F.normalize(self.backbone.text_features(some), dim=-1) for some in (texts, self.shown_names))
        places = {text: place for place, text in enumerate(texts)}
        similar = said[[places[text] for text in plain]] * right[[label for _, label in pairs]]
        names = self.shown_names
        facts = {
            "text_inclusion": sum(includes(text, names[label]) for text, label in pairs) / len(pairs),
            "embedding_similarity": float(similar.sum(dim=1).mean()),
        }
        if self.config.taxonomy:
            credit = Credit(self.class_names, self.config.taxonomy, self.config.aliases)
            facts["hierarchical_credit"] = sum(credit.of(text, label) for text, label in pairs) / len(pairs)
        return facts

    def _without_control(self, text: str) -> str:
        """An answer as a text that can be read again."""
        for token in self.mllm.prompter.control_tokens:
            text = text.replace(token, " ")
        return text.strip() or "nothing"

    def answer_facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        if self._letters.counts:
            facts = {"letters": dict(zip(LETTERS, self._letters.counts, strict=False))}
            facts["letter_bias"] = self._letters.bias
        total = sum(self._steps.values())
        if total:
            facts |= {f"share_{step}": self._steps[step] / total for step in STEPS}
        self._letters, self._steps, self._said = LetterTally(), Counter(), []
        return {key: value for key, value in facts.items() if not (isinstance(value, float) and math.isnan(value))}
