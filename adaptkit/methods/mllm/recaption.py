"""ReCaption: LoRA on rewrites of captions, another one for each image in every epoch, stopped before it says only yes.

The rewrites come as descriptions: a class's first sentence is its caption, the others are rewrites of it (a store
{class: {"caption": …, "rewrites": […]}} reads so). Nothing here writes them. A gate keeps those that say the same.

Source: ReCaption arXiv 2312.01701; mllm sheet `recaption.md` (gate, sampling, yes-rate).
Differs from the paper: captions are of classes and not of single images; LoRA with the sheet's defaults, since the
paper's rates and epochs couldn't be verified. The questions that training is stopped by are about the class names of
validation images, answered by likelihood; without validation images it isn't stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.methods import methods
from adaptkit.methods.base import at_least, refuse
from adaptkit.methods.mllm._captions import CaptionConfig, CaptionMethod, captions_of
from adaptkit.methods.mllm._rewrites import Gated, VariantSampler, gate
from adaptkit.methods.probe import ProbeQuestion, make_probe, probe_metrics
from adaptkit.types import FitTask, Inputs, TrainingLoop, TrainingSettings

_QUESTION = "Does the image show a {value}? Answer yes or no."


@dataclass(frozen=True)
class RecaptionConfig(CaptionConfig):
    """Settings of ReCaption."""

    gate: bool = field(
        default=True,
        metadata={
            "help": "A class's first description is its caption, and of the others only good rewrites of it are kept;"
            " off: all descriptions are captions."
        },
    )
    stop: bool = field(
        default=True,
        metadata={"help": "Keep the epoch with the best balanced accuracy on yes-or-no questions (validation images)."},
    )
    patience: int = field(default=2, metadata={"help": "stop: epochs without a better one after which it ends."})
    probe_images: int = field(default=64, metadata={"help": "stop: most validation images that are asked about."})

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, *at_least(self, 1, "patience", "probe_images"))


@methods.register("recaption")
class Recaption(CaptionMethod):
    """MLLM LoRA on rewritten captions, a different one in every epoch."""

    name = "recaption"
    config_class = RecaptionConfig
    config: RecaptionConfig
    default_training: ClassVar[TrainingSettings | None] = TrainingSettings(
        epochs=5, batch_size=16, keep_last=True, optimiser="adamw", lr=1e-4, weight_decay=0.0, schedule="cosine-step",
        warmup_epochs=0,
    )  # fmt: skip

    def build(self) -> None:
        self._gated: list[Gated] = []
        super().build()
        self._sampler = VariantSampler()
        self._forget()

    def _forget(self) -> None:
        self._probe: list[tuple[ProbeQuestion, ImageFeatures | Tensor]] = []
        self._epochs: list[dict[str, float]] = []
        self._best: dict[str, Tensor] | None = None
        self.enough = False

    # --- captions -----------------------------------------------------------------------------------------------------

    def class_captions(self, name: str) -> tuple[str, ...]:
        given = self.descriptions.get(name, ())
        if not self.config.gate or not given:
            return captions_of(name, self.templates, given)
        found = gate(given[0], given[1:])
        self._gated.append(found)
        return captions_of(name, self.templates, (given[0], *found.accepted))

    def choose(self, inputs: Tensor, labels: Tensor) -> list[int]:
        """For each image a variant that it hasn't had, until it has had all."""
        images = inputs.tolist() if inputs.dim() == 1 else (-1 - labels).tolist()  # without numbers, by class
        counts = [len(self.captions[label]) for label in labels.tolist()]
        return [self._sampler.draw(image, count) for image, count in zip(images, counts, strict=True)]

    # --- when to stop -------------------------------------------------------------------------------------------------

    def fit(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        self._forget()
        self._sampler = VariantSampler()
        if self.config.stop and task.val is not None and len(task.val.labels) and len(self.fitted_names) > 1:
            self._ask_about(task.val, task.seed)
        report = super().fit(task, loop)
        self._probe = []
        return report

    @torch.no_grad()
    def _ask_about(self, images: Inputs, seed: int) -> None:
        """A question about each of some validation images, half of them with another class's name."""
        labels = images.labels.cpu()
        count = min(len(labels), self.config.probe_images)
        places = torch.linspace(0, len(labels) - 1, count).round().long()
        names = [name.replace("_", " ") for name in self.fitted_names]
        table = {str(place): {self.noun: names[int(labels[place])]} for place in places.tolist()}
        questions = make_probe(table, seed, question=_QUESTION)
        for group in torch.arange(count).split(self.at_once()):
            pixels = images.select(places[group])
            shown = self.features(pixels) if self.vision_frozen else None
            for row, place in enumerate(group.tolist()):
                image: ImageFeatures | Tensor = pixels[row : row + 1] if shown is None else shown.select([row])
                self._probe.append((questions[place], image))

    @torch.no_grad()
    def _probed(self) -> dict[str, float]:
        """How the model answers the questions now, by which of yes and no is likelier."""
        answers: list[bool | None] = []
        for start in range(0, len(self._probe), step := self.at_once()):
            group = self._probe[start : start + step]
            shown = [image if isinstance(image, ImageFeatures) else self.features(image) for _, image in group]
            turns = [[Turn(question.question)] for question, _ in group]
            scores = self.word_scores(self.prefix(ImageFeatures.join(shown), turns), ("yes", "no"))
            answers += (scores[:, 0] > scores[:, 1]).tolist()
        return probe_metrics(answers, [question.answer for question, _ in self._probe])

    def after_epoch(self, epoch: int, epochs: int) -> None:
        if not self._probe:
            return
        self.eval()
        self._epochs.append(self._probed())
        self.train()
        best = self._best_epoch()
        if best == epoch:
            self._best = {key: value.clone() for key, value in self.adapter_state().items()}
        self.enough = epoch - best >= self.config.patience

    def training_state(self) -> dict[str, Tensor]:
        kept = {f"best.{key}": value for key, value in (self._best or {}).items()}
        kinds = sorted(self._epochs[0]) if self._epochs else []
        probed = [[one[kind] for kind in kinds] for one in self._epochs]
        kept |= {
            f"probed.{kind}": torch.tensor(row, dtype=torch.float64)
            for kind, row in zip(kinds, zip(*probed, strict=True), strict=True)
        }
        return kept | {"variants": self._sampler.state, "enough": torch.tensor(self.enough)}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        best = {key.removeprefix("best."): value for key, value in state.items() if key.startswith("best.")}
        probed = {key.removeprefix("probed."): v.tolist() for key, v in state.items() if key.startswith("probed.")}
        self._best = best or None
        self._epochs = [dict(zip(probed, row, strict=True)) for row in zip(*probed.values(), strict=True)]
        self._sampler, self.enough = VariantSampler.from_state(state["variants"]), bool(state["enough"])

    def _best_epoch(self) -> int:
        """The epoch that tells true from false best, of equal ones the one that says yes as often as no; the first.

        Where the best always says the same, the questions don't tell epochs apart, and it is the last.
        """
        ranks = [(one["balanced_accuracy"], -abs(one["yes_rate"] - 0.5)) for one in self._epochs]
        best = ranks.index(max(ranks))
        return best if 0 < self._epochs[best]["yes_rate"] < 1 else len(ranks) - 1

    def finish(self, task: Any) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        if self._best is not None:
            self.load_state_dict(self._best)
            facts = {"best_epoch": self._best_epoch() + 1, "probe": self._epochs}
        if self._gated:
            refused = sum((found.reasons() for found in self._gated), Counter[str]())
            accepted = sum(len(found.accepted) for found in self._gated)
            given = accepted + sum(refused.values())
            facts["rewrites"] = {"given": given, "accepted": accepted, "refused": dict(refused)}
            facts["rewrites"] |= {"acceptance_rate": accepted / given} if given else {}
        return {**super().finish(task), **facts}
