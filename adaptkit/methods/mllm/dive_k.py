"""DiVE-k: reinforcement tuning on multiple-choice questions whose options are the model's own likeliest answers.

Options are mined before training from sampled answers to the open question, which may show the training classes' names.
An image is then answered in two steps: sample, and choose among what was named most.

Source: DiVE-k arXiv 2511.18305; mllm sheets `dive-k.md` (all steps) and `base-to-novel.md` (grading by exact names and
aliases).
Differs from the paper: low-rank updates; at test, options are classes that samples name exactly or by an alias, and an
image none of whose samples does is answered wrong (or by `unmatched`); samples of an image are the same under all
seeds, since they are drawn by numbers that come from its pixels; without tags the letter is chosen by its likelihood.
Two cheaper or weaker ways are there for comparison: a shortlist by likelihood (route letters) and other sources of
options.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.backbones.mllm.sampling import Sampling
from adaptkit.methods import methods
from adaptkit.methods.base import at_least, progress_of, refuse
from adaptkit.methods.mllm._grpo import Question, as_bytes, from_bytes, numbers_for, roll
from adaptkit.methods.mllm._letters import LETTERS, options_text
from adaptkit.methods.mllm._likelihood import normalised
from adaptkit.methods.mllm._matching import STEPS, Matcher
from adaptkit.methods.mllm._mining import Mined, guess_of, mine, ranked
from adaptkit.methods.mllm._rewarded import THINK, RewardedConfig, RewardedMllm, letter_of
from adaptkit.methods.mllm.mllm_zero_shot import NOT_FOUND
from adaptkit.types import FitTask, ProgressCallback, TrainingLoop

_BELOW = 10.0
"""How far options that weren't chosen stand below the one that a written answer chose."""


@dataclass(frozen=True)
class DiveKConfig(RewardedConfig):
    """Settings of DiVE-k."""

    route: Literal["two-step", "letters", "likelihood", "constrained", "open"] = field(  # type: ignore[assignment]
        default="two-step",
        metadata={
            "help": "How it answers: two-step (samples, then a choice among them), letters (a choice among the"
            " likeliest names, cheaper), likelihood, constrained or open."
        },
    )
    options: int = field(default=5, metadata={"help": "Most options of a question, in training and for an answer."})
    samples: int = field(default=20, metadata={"help": "Answers sampled per image, for mining and two-step."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of these samples."})
    top_p: float = field(default=0.95, metadata={"help": "Share of the likeliest tokens that samples are drawn from."})
    repetition_penalty: float = field(
        default=1.1, metadata={"help": "Penalty of tokens that the question or the sample had before; 1: none."}
    )
    mined_from: Literal["samples", "random", "text-neighbours", "likelihood"] = field(
        default="samples",
        metadata={
            "help": "Where training options come from: the model's samples, or, to compare, random classes, the names"
            " with the nearest text features, or the classes that the model finds likeliest."
        },
    )
    class_list: Literal["mining", "always", "never"] = field(
        default="mining",
        metadata={"help": "Where the open question lists the classes: in mining, in answering too, or never."},
    )
    refresh_every: int = field(
        default=0, metadata={"help": "Epochs after which options are mined anew from the model as it is; 0: never."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            self,
            *at_least(self, 1, "samples"),
            *at_least(self, 0, "temperature", "refresh_every"),
            ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            ("repetition_penalty", "above 0", self.repetition_penalty > 0),
        )

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.repetition_penalty)


@dataclass(frozen=True)
class _Guessed:
    """What the samples of one image named.

    Args:
        first: The first sample's class, or None.
        majority: The class named most, or None.
        named: All classes named.
        final: The second step's answer, or None.
    """

    first: int | None
    majority: int | None
    named: frozenset[int]
    final: int | None


@methods.register("dive-k")
class DiveK(RewardedMllm):
    """Learns to choose among what it would have said itself, and answers that way."""

    name = "dive-k"
    config_class = DiveKConfig
    config: DiveKConfig
    scores_by_class_list: ClassVar[bool] = True

    def build(self) -> None:
        self._mined: list[Mined | None] = []
        self._forget_answers()
        super().build()

    def _forget_answers(self) -> None:
        self._guessed: list[_Guessed] = []
        self._named: Counter[str] = Counter()
        self._letterless = 0

    def classes_changed(self) -> None:
        super().classes_changed()
        for names in (self._listed_in_mining, self._listed_in_answering):
            self.check_room(self.open_question(names))

    @property
    def _listed_in_mining(self) -> list[str]:
        """Classes that the open question lists before training."""
        return [] if self.config.class_list == "never" else self.fitted_shown

    @property
    def _listed_in_answering(self) -> list[str]:
        return self.shown_names if self.config.class_list == "always" else []

    # --- step 1: options ----------------------------------------------------------------------------------------------

    def look(self, loop: TrainingLoop | None) -> None:
        self._mine(0, progress_of(loop))

    def after_epoch(self, epoch: int, epochs: int) -> None:
        super().after_epoch(epoch, epochs)
        every = self.config.refresh_every
        if every and (epoch + 1) % every == 0 and epoch + 1 < epochs:
            self._mine(epoch + 1, lambda what, done, total: None)

    @torch.no_grad()
    def _mine(self, after: int, show: ProgressCallback) -> None:
        """Find every training image's options, by the model as it is after some epochs."""
        if self._numbered is None:
            return
        labels, mined = self._numbered.labels.tolist(), list[Mined | None]()
        self._neighbours: list[list[int]] | None = None
        for group in torch.arange(len(labels)).split(self.at_once()):
            places = group.tolist()
            numbers = [numbers_for(self.generator.initial_seed(), "options", after, place) for place in places]
            features = self._numbered.features(group)
            mined += self._options_of(features, [labels[place] for place in places], numbers)
            show(f"{self.name}: options", len(mined), len(labels))
        self._mined = mined

    def training_state(self) -> dict[str, Tensor]:
        mined = [None if one is None else asdict(one) for one in self._mined]
        return {**super().training_state(), "mined": as_bytes(mined)}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_training_state(state)
        rows = from_bytes(state["mined"])
        self._mined = [None if one is None else Mined(tuple(one["options"]), one["truth"], one["how"]) for one in rows]

    def _options_of(
        self, features: ImageFeatures, labels: Sequence[int], numbers: Sequence[torch.Generator]
    ) -> list[Mined | None]:
        """The options of some images; None for one that is too easy."""
        most, names = self.config.options, self.fitted_shown
        if self.config.mined_from == "samples":
            texts = self._sampled(features, numbers, self._listed_in_mining)
            return [mine(*one, most) for one in zip(texts, [names] * len(texts), labels, numbers, strict=True)]
        return [
            ranked(*one, most) for one in zip(self._rankings(features, labels, numbers), labels, numbers, strict=True)
        ]

    def _rankings(
        self, features: ImageFeatures, labels: Sequence[int], numbers: Sequence[torch.Generator]
    ) -> list[list[int]]:
        """All classes for each image, those first that make its hardest options by `mined_from`."""
        classes = len(self.fitted_names)
        if self.config.mined_from == "random":
            drawn = [torch.randperm(classes, generator=own).tolist() for own in numbers]
            return [[label, *(c for c in order if c != label)] for label, order in zip(labels, drawn, strict=True)]
        if self.config.mined_from == "likelihood":
            trie = self.trie()
            scores = normalised(self.mllm.candidate_scores(self.asked(features), trie), trie.lengths, "mean")
            return cast(list[list[int]], scores.argsort(dim=1, descending=True).tolist())
        if self._neighbours is None:
            texts = F.normalize(self.backbone.text_features(self.fitted_shown), dim=-1)
            self._neighbours = (texts @ texts.T).argsort(dim=1, descending=True).tolist()
        return [self._neighbours[label] for label in labels]

    def _sampled(
        self, features: ImageFeatures, numbers: Sequence[torch.Generator], names: Sequence[str]
    ) -> list[list[str]]:
        """Sampled answers to the open question about each image, decoded."""
        rows = self.prompt_rows(features, [[Turn(self.open_question(names))]] * len(features))
        prefix = self.mllm.prefix(rows, features)
        config = self.config
        drawn = roll(self.mllm, prefix, config.samples, config.max_tokens, config.sampling, numbers, rows)
        return [[self.mllm.prompter.text(answer) for answer in answers] for answers in drawn]

    # --- step 2: training ---------------------------------------------------------------------------------------------

    def questions(self, inputs: Tensor, labels: Tensor) -> list[Question]:
        """The multiple-choice question about each image that isn't too easy; its options keep their order."""
        found, names = list[Question](), self.fitted_shown
        for place, label in enumerate(labels.tolist()):
            if self._numbered is not None and inputs.dim() == 1:
                mined = self._mined[int(inputs[place]) % len(self._mined)]
            else:
                order = [label, *(c for c in range(len(names)) if c != label)]
                mined = ranked(order, label, torch.default_generator, self.config.options)
            if mined is not None:
                text = self._choice([names[option] for option in mined.options])
                found.append(Question((Turn(text),), (place,), (LETTERS[mined.place], len(mined.options))))
        return found

    def _choice(self, options: Sequence[str]) -> str:
        """The multiple-choice question with these options."""
        if self.config.tags:
            return options_text(self.bare_question, options, THINK.format("the letter of the right option"))
        return options_text(self.question, options)

    def rewards(self, text: str, question: Question) -> dict[str, float]:
        letter, options = question.truth
        return {**self.format_reward(text), "choice": float(letter_of(text, options) == letter)}

    def training_texts(self) -> list[str]:
        names, turns = self.fitted_shown, [Turn(self.open_question(self._listed_in_mining))]
        for start in range(0, len(names), self.config.options):
            turns.append(Turn(self._choice(names[start : start + self.config.options]), 1, LETTERS[0]))
        return [self.mllm.prompter.render([turn]) for turn in turns]

    def finish(self, task: FitTask) -> dict[str, Any]:
        mined, facts = [one for one in self._mined if one is not None], super().finish(task)
        listed = self.config.mined_from == "samples" and self._listed_in_mining
        return {
            **facts,
            "options_from": f"{self.config.mined_from}, with the list of training classes" if listed
            else self.config.mined_from,
            "options_by_source": dict(Counter(one.how for one in mined)),
            "images_too_easy": len(self._mined) - len(mined),
            "mean_options": sum(len(one.options) for one in mined) / max(1, len(mined)),
        }  # fmt: skip

    # --- step 3: answering --------------------------------------------------------------------------------------------

    def forward(self, inputs: Tensor) -> Tensor:
        if self.config.route != "two-step":
            return super().forward(inputs)
        with torch.no_grad():
            return torch.cat([self._two_step(group) for group in inputs.split(self.at_once())])

    def _two_step(self, pixels: Tensor) -> Tensor:
        """Logits [images, classes]; all NaN for images none of whose samples names a class (see `unmatched`)."""
        features, matcher = self.features(pixels), Matcher(self.class_names, self.config.aliases)
        numbers = [numbers_for("samples", _digest(image)) for image in pixels]
        texts = self._sampled(features, numbers, self._listed_in_answering)
        named = [[self._class_of(text, matcher) for text in own] for own in texts]
        counts = [Counter(index for index in own if index is not None) for own in named]
        options = [self._shortlist(count, own) for count, own in zip(counts, numbers, strict=True)]
        logits = torch.full((len(pixels), len(self.class_names)), NOT_FOUND, device=self.backbone.device)
        asked = [place for place, own in enumerate(options) if len(own) > 1]
        if asked:
            scores = self._asked_letters(features.select(asked), [options[i] for i in asked])
            for place, row in zip(asked, scores, strict=True):
                logits[place, options[place]] = row[: len(options[place])]
        for place, own in enumerate(options):
            if len(own) == 1:
                logits[place, own[0]] = 0.0
            elif not own:
                self._without(logits[place], texts[place])
            final = None if bool(logits[place].isnan().any()) else int(logits[place].argmax())
            majority = max(counts[place], key=counts[place].__getitem__, default=None)
            self._guessed.append(_Guessed(named[place][0], majority, frozenset(counts[place]), final))
        return logits

    def _class_of(self, text: str, matcher: Matcher) -> int | None:
        """The class that a sample names exactly or by an alias."""
        found = matcher.match(guess_of(text))
        step = found.step if found.step in ("exact", "alias") else "none"
        self._named[step] += 1
        return found.index if step != "none" else None

    def _shortlist(self, counts: Counter[int], numbers: torch.Generator) -> list[int]:
        """The classes named most, shuffled."""
        most = [index for index, _ in counts.most_common(self.config.options)]
        return [most[place] for place in torch.randperm(len(most), generator=numbers).tolist()]

    def _without(self, row: Tensor, texts: Sequence[str]) -> None:
        """Logits [classes] of an image none of whose samples names a class."""
        guesses = Counter(guess for guess in map(guess_of, texts) if guess)
        if self.config.unmatched == "nearest" and guesses:
            row[self._nearest(guesses.most_common(1)[0][0])] = 0.0
        else:
            row.fill_(torch.nan)

    def _asked_letters(self, features: ImageFeatures, options: Sequence[Sequence[int]]) -> Tensor:
        """log p of each letter, [images, most options], -inf beyond an image's own.

        With tags the answer is written: 0 for its letter and `-_BELOW` for the others.
        """
        names, most = self.shown_names, max(map(len, options))
        turns = [[Turn(self._choice([names[index] for index in row]))] for row in options]
        prefix = self.prefix(features, turns)
        beyond = torch.arange(most) >= torch.tensor([[len(row)] for row in options])
        if not self.config.tags:
            scores = self.word_scores(prefix, LETTERS[:most])
            return scores.masked_fill(beyond.to(scores.device), float("-inf")).log_softmax(dim=1)
        scores = torch.full((len(options), most), -_BELOW, device=self.backbone.device)
        for place, ids in enumerate(self.mllm.generate(prefix, self.config.max_tokens)):
            letter = letter_of(self.mllm.prompter.text(ids), len(options[place]))
            self._letterless += letter is None
            scores[place, 0 if letter is None else LETTERS.index(letter)] = 0.0
        return scores.masked_fill(beyond.to(scores.device), float("-inf"))

    def _letter_scores(self, features: ImageFeatures, options: Tensor) -> Tensor:
        return self._asked_letters(features, options.tolist())

    # --- the record ---------------------------------------------------------------------------------------------------

    def answer_facts(self) -> dict[str, Any]:
        facts, total = super().answer_facts(), sum(self._named.values())
        if total:
            facts |= {f"share_{step}": self._named[step] / total for step in STEPS if self._named[step]}
            facts |= {"samples_per_image": self.config.samples, "temperature": self.config.temperature}
            facts |= {"top_p": self.config.top_p, "repetition_penalty": self.config.repetition_penalty}
            nothing = sum(not one.named for one in self._guessed)
            facts["share_without_options"] = nothing / len(self._guessed)
        if self.config.tags:
            facts["answers_without_letter"] = self._letterless
        self._forget_answers()
        return facts

    def judged_facts(self, labels: Sequence[int]) -> dict[str, Any]:
        """Accuracies of what the same samples give with and without a second step; pass@K is the upper bound of all."""
        if len(self._guessed) != len(labels) or not len(labels):
            return {}  # answered by another route
        pairs = list(zip(self._guessed, map(int, labels), strict=True))
        hits = {
            "first_sample": [one.first == label for one, label in pairs],
            "majority_vote": [one.majority == label for one, label in pairs],
            f"pass_at_{self.config.samples}": [label in one.named for one, label in pairs],
            "two_step": [one.final == label for one, label in pairs],
        }
        return {f"accuracy_{what}": sum(hit) / len(pairs) for what, hit in hits.items()}


def _digest(image: Tensor) -> str:
    """What an image's samples are drawn by: its pixels in 8 bits, as the model gets them."""
    bytes_ = (image.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)
    return hashlib.sha256(bytes_.cpu().contiguous().numpy().tobytes()).hexdigest()
