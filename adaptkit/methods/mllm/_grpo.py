"""Learning by rewards (GRPO): answers are drawn, judged, and compared with the others to the same question.

All answers to one question go on from one pass over its image and text, in drawing and in the loss. The frozen backbone
itself is the model that the trained one is kept near.

Source: GRPO arXiv 2402.03300; mllm sheet `dive-k.md` (step 2, traps, small-scale design).
Differs from the sheet: drawn answers can be trained on more than once (`reuse`); only then do the ratio and its
clipping matter. Log-probabilities are those at the temperature that was drawn with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from adaptkit.backbones.mllm.batches import Prefix
from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.backbones.mllm.model import MLLM
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.backbones.mllm.sampling import Sampling
from adaptkit.methods.base import at_least, refuse
from adaptkit.methods.mllm._reducing import TrainedReducingConfig
from adaptkit.methods.mllm._tuning import TwinMethod, summed
from adaptkit.types import FitTask

Aggregation = Literal["sequence-mean", "token-mean"]

_ADVANTAGE_EPS = 1e-4
_MOST_ROWS = 256


@dataclass(frozen=True)
class GrpoConfig(TrainedReducingConfig):
    """Settings of learning by rewards."""

    rollouts: int = field(default=4, metadata={"help": "Answers drawn per question; they are compared."})
    rollout_temperature: float = field(default=1.0, metadata={"help": "Temperature that these are drawn with."})
    max_tokens: int = field(default=1024, metadata={"help": "Most tokens of an answer that is written freely."})
    beta: float = field(
        default=0.04, metadata={"help": "Weight of staying near the untrained model (KL); 0 spares its pass."}
    )
    reuse: int = field(
        default=1, metadata={"help": "How often drawn answers are trained on before new ones are drawn."}
    )
    eps: float = field(
        default=0.2, metadata={"help": "How far probabilities of reused answers may move before they are clipped."}
    )
    aggregation: Aggregation = field(
        default="sequence-mean", metadata={"help": "Every answer counts alike (sequence-mean), or every token."}
    )
    scale_rewards: bool = field(
        default=True, metadata={"help": "Divide advantages by the rewards' standard deviation within a question."}
    )
    resample: int = field(
        default=0, metadata={"help": "How often to draw again where a question's answers are all rewarded alike."}
    )
    micro_batch: int = field(
        default=0, metadata={"help": "Questions that go through the model together; gradients add up. 0: all."}
    )
    clip: float = field(default=1.0, metadata={"help": "Largest norm of all gradients together; 0 doesn't clip."})

    def __post_init__(self) -> None:
        refuse(
            self,
            ("rollouts", "at least 2, which are compared", self.rollouts >= 2),
            ("rollout_temperature", "above 0", self.rollout_temperature > 0),
            *at_least(self, 1, "max_tokens", "reuse"),
            *at_least(self, 0, "beta", "resample", "micro_batch", "clip"),
            ("eps", "above 0 and below 1", 0 < self.eps < 1),
        )


def as_bytes(value: Any) -> Tensor:
    """Plain values as JSON in a tensor, for a checkpoint."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def from_bytes(kept: Tensor) -> Any:
    """What `as_bytes` was given; tuples come back as lists."""
    return json.loads(bytes(kept.tolist()))


# --- the objective ----------------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, *, scaled: bool = True) -> Tensor:
    """How much better each answer is than the mean of its question's, [questions, answers] like `rewards`.

    Args:
        rewards: [questions, answers], at least two answers.
        scaled: Divide by the sample standard deviation within the question (+ 1e-4).
    """
    above = rewards - rewards.mean(dim=1, keepdim=True)
    return above / (rewards.std(dim=1, keepdim=True) + _ADVANTAGE_EPS) if scaled else above


def token_weights(lengths: Sequence[int], aggregation: Aggregation) -> Tensor:
    """What each token counts in the loss, fp32 [tokens of all answers, in order]; together 1.

    Args:
        lengths: Tokens of each answer, up to its first ending token inclusive.
        aggregation: Whether answers count alike, or tokens.
    """
    counts = torch.tensor(list(lengths))
    if aggregation == "token-mean":
        return torch.full((int(counts.sum()),), 1 / int(counts.sum()))
    return (1 / (len(counts) * counts.float())).repeat_interleave(counts)


def token_losses(
    policy: Tensor, old: Tensor, reference: Tensor | None, advantages: Tensor, *, eps: float, beta: float
) -> tuple[Tensor, Tensor]:
    """Loss of each token and its distance from the reference (k3, at least 0), fp32 [tokens] each.

    Args:
        policy: Log-probabilities under the model that is trained, [tokens].
        old: Those under the model that drew the answers, without gradient.
        reference: Those under the untrained model; None leaves the distance out.
        advantages: Of each token's answer, [tokens].
        eps: Bound of the clipped ratio.
        beta: Weight of the distance.
    """
    ratio = (policy - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - eps, 1 + eps) * advantages)
    if reference is None:
        return -gain, torch.zeros_like(gain)
    apart = reference - policy
    distance = apart.exp() - apart - 1
    return beta * distance - gain, distance


# --- drawing ----------------------------------------------------------------------------------------------------------


def numbers_for(*what: object) -> torch.Generator:
    """A CPU generator for one purpose, the same wherever it is asked for."""
    text = "\x1f".join(map(str, what))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1)


@torch.no_grad()
def roll(
    mllm: MLLM,
    prefix: Prefix,
    count: int,
    max_tokens: int,
    sampling: Sampling,
    numbers: Sequence[torch.Generator],
    said: Sequence[Sequence[int]] | None = None,
) -> list[list[list[int]]]:
    """Answers to each prompt, all going on from one pass over it.

    Args:
        mllm: The model.
        prefix: The prompts.
        count: Answers per prompt.
        max_tokens: Most tokens of one.
        sampling: How tokens are chosen.
        numbers: Where a prompt's draws come from; what it is asked together with makes no difference.
        said: The prompts' token ids, for the repetition penalty.

    Returns:
        Token ids by prompt and answer; the token that ended an answer is its last.
    """
    found: list[list[int]] = []
    size = max(1, mllm.rows_at_once(prefix.mask.shape[1] + max_tokens, _MOST_ROWS) // count)
    for rows in torch.arange(len(prefix)).split(size):
        repeated = rows.repeat_interleave(count).tolist()
        draws = [torch.rand(count, max_tokens, generator=numbers[row], dtype=torch.float64) for row in rows.tolist()]
        found += mllm.generate(
            prefix.select(repeated),
            max_tokens,
            sampling=sampling,
            draws=torch.cat(draws).to(mllm.device),
            said=None if said is None else [said[row] for row in repeated],
            keep_end=True,
        )
    return [found[start : start + count] for start in range(0, len(found), count)]


@dataclass(frozen=True)
class Question:
    """What is asked in training.

    Args:
        turns: The conversation that answers go on from.
        images: Places in the batch of the images that it shows, in reading order.
        truth: What answers are judged by.
    """

    turns: tuple[Turn, ...]
    images: tuple[int, ...]
    truth: Any


@dataclass
class Rollouts:
    """Drawn answers to a question.

    Args:
        question: The question.
        answers: Their token ids, each with the token that ended it.
        rewards: By kind of reward, of each answer.
        advantages: fp32 [answers].
        reference: Log-probabilities of all their tokens under the untrained model, in order; None with beta 0.
        old: The same under the model that drew them, once it was asked.
        uses: How often they were trained on.
    """

    question: Question
    answers: list[list[int]]
    rewards: list[dict[str, float]]
    advantages: Tensor
    reference: Tensor | None = None
    old: Tensor | None = None
    uses: int = 0

    @property
    def alike(self) -> bool:
        """Whether all answers were rewarded alike, which teaches nothing."""
        return not bool(self.advantages.any())

    @property
    def token_advantages(self) -> Tensor:
        """The advantage of each token's answer, fp32 [tokens]."""
        return self.advantages.repeat_interleave(torch.tensor([len(answer) for answer in self.answers]))


@dataclass
class _Tally:
    """Sums over one epoch, by what is counted."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, what: str, value: float, count: int = 1) -> None:
        self.sums[what] = self.sums.get(what, 0.0) + value
        self.counts[what] = self.counts.get(what, 0) + count

    def means(self) -> dict[str, float]:
        return {what: total / self.counts[what] for what, total in self.sums.items()}


class GrpoMethod(TwinMethod):
    """A method that trains parts of a twin by rewards; its settings are a `GrpoConfig`.

    A method gives `questions` and `rewards`, and what TwinMethod asks for.
    """

    config: Any

    # --- what a method fills in ---------------------------------------------------------------------------------------

    def questions(self, inputs: Tensor, labels: Tensor) -> list[Question]:
        """What is asked about a batch, of all its images or some.

        Random choices come from torch's own generator, which the loop has seeded.

        Args:
            inputs: As `losses` takes them.
            labels: int64 [batch].
        """
        raise NotImplementedError(f"{type(self).__name__} doesn't define questions.")

    def rewards(self, text: str, question: Question) -> dict[str, float]:
        """What an answer is worth, by kind of reward; they add up. The text is decoded, without control tokens."""
        raise NotImplementedError(f"{type(self).__name__} doesn't define rewards.")

    # --- training -----------------------------------------------------------------------------------------------------

    def build(self) -> None:
        super().build()
        self._forget()

    def _forget(self) -> None:
        self._remembered: dict[tuple[int, ...], Rollouts] = {}
        self._tally, self._epochs = _Tally(), list[dict[str, float]]()

    def prepare(self, task: FitTask) -> None:
        self._forget()
        super().prepare(task)

    def losses(self, inputs: Tensor, labels: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        """The loss of answers drawn here, or of remembered ones.

        Args:
            inputs: Numbers of training images, int64 [batch] (see `NumberedInputs`), or pixels [batch, 3, h, w].
            labels: int64 [batch].
            frozen: Not used.
        """
        asked = self.questions(inputs, labels)
        if not asked:
            return {"grpo": torch.stack([0.0 * parameter.sum() for parameter in self.trainables()]).sum()}
        seeds = torch.randint(2**62, (len(asked),)).tolist()  # one per question, whatever goes together below
        chunks = torch.arange(len(asked), device=labels.device).split(self.config.micro_batch or len(asked))
        drawn: list[Rollouts] = []
        for chunk in chunks:
            # a batch in one piece goes through the model once: answers are drawn from the pass that is learned from
            with torch.set_grad_enabled(torch.is_grad_enabled() and len(chunks) == 1):
                places = chunk.tolist()
                group, prefix = self._drawn(inputs, [asked[i] for i in places], [seeds[i] for i in places])
            drawn += group
        lengths = [[len(answer) for answer in one.answers] for one in drawn]
        weights = token_weights([n for row in lengths for n in row], self.config.aggregation).split(
            [sum(row) for row in lengths]
        )

        def part(rows: Tensor) -> Tensor:
            group = [drawn[row] for row in rows.tolist()]
            own = prefix if len(chunks) == 1 else self._prefix(self.mllm, inputs, [one.question for one in group])
            return self._loss(own, group, torch.cat([weights[row] for row in rows.tolist()]))

        loss = summed(part, chunks, self.trainables())
        for one in drawn:
            one.uses += 1
        return {"grpo": loss}

    def _key(self, inputs: Tensor, question: Question) -> tuple[int, ...] | None:
        """What a question's answers are remembered under: the numbers of its images; None for images without any."""
        numbered = inputs.dim() == 1 and self.config.reuse > 1
        return tuple(int(inputs[place]) for place in question.images) if numbered else None

    def _drawn(self, inputs: Tensor, asked: Sequence[Question], seeds: Sequence[int]) -> tuple[list[Rollouts], Prefix]:
        """Remembered answers where there are any that weren't trained on often enough, else new ones."""
        keys = [self._key(inputs, question) for question in asked]
        group: list[Rollouts | None] = []
        for question, key in zip(asked, keys, strict=True):
            known = self._remembered.get(key) if key is not None else None
            if known is not None and known.uses < self.config.reuse:
                known.question = replace(known.question, images=question.images)
                group.append(known)
            else:
                group.append(None)
        posed = [q if one is None else one.question for q, one in zip(asked, group, strict=True)]
        prefix = self._prefix(self.mllm, inputs, posed)
        new = [place for place, one in enumerate(group) if one is None]
        if new:
            own = prefix if len(new) == len(asked) else prefix.select(new)
            fresh = self._roll(own, [posed[i] for i in new], [seeds[i] for i in new])
            self._compare(inputs, fresh)
            for place, made in zip(new, fresh, strict=True):
                group[place] = made
                key = keys[place]
                if key is not None:
                    self._remembered[key] = made
        return cast(list[Rollouts], group), prefix

    def _prefix(self, mllm: MLLM, inputs: Tensor, asked: Sequence[Question]) -> Prefix:
        """Questions put through a model; each image's features are computed once, however many ask about it."""
        used = sorted({place for question in asked for place in question.images})
        features = self.training_features(inputs[used]) if used else ImageFeatures(())
        at = {place: index for index, place in enumerate(used)}
        rows = []
        for question in asked:
            counts = [features.counts[at[place]] for place in question.images]
            row = mllm.prompter.ids(question.turns, counts)
            mllm.prompter.check_length(len(row) + self.config.max_tokens, "A question with the longest answer")
            rows.append(row)
        shown = features.select([at[place] for question in asked for place in question.images])
        return mllm.prefix(rows, shown)

    @torch.no_grad()
    def _roll(self, prefix: Prefix, asked: Sequence[Question], seeds: Sequence[int]) -> list[Rollouts]:
        """Draw answers and judge them; where all of a question's are rewarded alike, again as often as asked for."""
        config, found = self.config, dict[int, Rollouts]()
        sampling = Sampling(config.rollout_temperature)
        numbers = [torch.Generator().manual_seed(seed) for seed in seeds]
        left = list(range(len(asked)))
        for _ in range(1 + config.resample):
            own = prefix if len(left) == len(asked) else prefix.select(left)
            drawn = roll(self.mllm, own, config.rollouts, config.max_tokens, sampling, [numbers[i] for i in left])
            for place, answers in zip(left, drawn, strict=True):
                found[place] = self._judged(asked[place], answers)
            left = [place for place in left if found[place].alike]
            if not left:
                break
        made = [found[place] for place in range(len(asked))]
        self._count(made)
        return made

    def _judged(self, question: Question, answers: list[list[int]]) -> Rollouts:
        rewards = [self.rewards(self.mllm.prompter.text(answer), question) for answer in answers]
        return self._compared(question, answers, rewards)

    def _compared(
        self, question: Question, answers: list[list[int]], rewards: list[dict[str, float]], uses: int = 0
    ) -> Rollouts:
        totals = torch.tensor([[sum(reward.values()) for reward in rewards]])
        return Rollouts(
            question, answers, rewards, group_advantages(totals, scaled=self.config.scale_rewards)[0], uses=uses
        )

    @torch.no_grad()
    def _compare(self, inputs: Tensor, drawn: Sequence[Rollouts]) -> None:
        """Note the untrained model's log-probabilities; with beta 0 it isn't asked."""
        if not self.config.beta:
            return
        backbone = cast(MLLM, self.backbone)
        prefix = self._prefix(backbone, inputs, [one.question for one in drawn])
        scores = self._scores(backbone, prefix, drawn)
        for one, own in zip(drawn, scores, strict=True):
            one.reference = own

    def _scores(self, mllm: MLLM, prefix: Prefix, drawn: Sequence[Rollouts]) -> tuple[Tensor, ...]:
        """Log-probabilities of all tokens of each question's answers, fp32 [tokens] each."""
        rows = [place for place, one in enumerate(drawn) for _ in one.answers]
        answers = [answer for one in drawn for answer in one.answers]
        scores = mllm.answer_scores(prefix.select(rows), answers, self.config.rollout_temperature)
        return scores.split([sum(map(len, one.answers)) for one in drawn])

    def _loss(self, prefix: Prefix, drawn: Sequence[Rollouts], weights: Tensor) -> Tensor:
        scores = self._scores(self.mllm, prefix, drawn)
        for one, own in zip(drawn, scores, strict=True):
            one.old = own.detach() if one.old is None else one.old
        policy = torch.cat(scores)
        known = [one.reference for one in drawn if one.reference is not None]
        losses, distances = token_losses(
            policy,
            torch.cat([one.old for one in drawn if one.old is not None]),
            torch.cat(known) if known else None,
            torch.cat([one.token_advantages for one in drawn]).to(policy),
            eps=self.config.eps,
            beta=self.config.beta,
        )
        if known:
            self._tally.add("kl", float(distances.detach().sum()), len(distances))
        return (losses * weights.to(losses)).sum()

    # --- going on from a checkpoint -----------------------------------------------------------------------------------

    def training_state(self) -> dict[str, Tensor]:
        """The epochs' record, and drawn answers that are trained on again."""
        known = [(key, one) for key, one in self._remembered.items() if one.uses < self.config.reuse]
        rolled = [
            {"key": key, "turns": [asdict(turn) for turn in one.question.turns], "truth": one.question.truth,
             "answers": one.answers, "rewards": one.rewards, "uses": one.uses}
            for key, one in known
        ]  # fmt: skip
        scores = {
            f"{kind}.{place}": value
            for place, (_, one) in enumerate(known)
            for kind, value in (("reference", one.reference), ("old", one.old))
            if value is not None
        }
        return {**scores, "grpo": as_bytes({"epochs": self._epochs, "tally": asdict(self._tally), "rolled": rolled})}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        kept, device = from_bytes(state["grpo"]), self.backbone.device
        self._epochs, self._tally, self._remembered = kept["epochs"], _Tally(**kept["tally"]), {}
        for place, one in enumerate(kept["rolled"]):
            asked = Question(tuple(Turn(**turn) for turn in one["turns"]), (), one["truth"])
            made = self._compared(asked, one["answers"], one["rewards"], one["uses"])
            for kind in ("reference", "old"):
                value = state.get(f"{kind}.{place}")
                setattr(made, kind, None if value is None else value.to(device))
            self._remembered[tuple(one["key"])] = made

    # --- the record ---------------------------------------------------------------------------------------------------

    def _count(self, drawn: Sequence[Rollouts]) -> None:
        """Count what was drawn into this epoch's tally."""
        ends = set(self.mllm.prompter.end_tokens())
        for one in drawn:
            self._tally.add("equal_groups", float(one.alike))
            for answer, rewards in zip(one.answers, one.rewards, strict=True):
                self._tally.add("answer_tokens", len(answer))
                self._tally.add("cut_off", float(answer[-1] not in ends))
                for kind, value in rewards.items():
                    self._tally.add(f"reward_{kind}", value)

    def after_epoch(self, epoch: int, epochs: int) -> None:
        super().after_epoch(epoch, epochs)
        self._epochs.append(self._tally.means())
        self._tally = _Tally()

    def finish(self, task: FitTask) -> dict[str, Any]:
        """Means over each epoch: rewards, the share of questions whose answers were rewarded alike, lengths, KL."""
        kinds = sorted({kind for means in self._epochs for kind in means})
        found = {kind: [means.get(kind) for means in self._epochs] for kind in kinds}
        self._forget()
        return {**super().finish(task), **found}
