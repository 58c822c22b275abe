"""What methods that learn by rewards on questions about one image share: low-rank updates, think and answer tags.

Source: mllm sheet `dive-k.md` (step 2, ViRFT baseline, hyper-parameters).
Differs from the papers: low-rank updates of the language model in the place of all weights, at a rate for them; two
epochs and not one and a half; without tags, for models that weren't made to think in text, answers are the name or the
letter alone and no format is rewarded; a choice of several letters is none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from adaptkit.backbones.mllm.batches import Prefix
from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.backbones.mllm.model import MLLM
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.methods.base import at_least, refuse
from adaptkit.methods.mllm._grpo import GrpoConfig, GrpoMethod
from adaptkit.methods.mllm._lowrank import add_low_rank, write_low_rank
from adaptkit.methods.mllm.mllm_zero_shot import MllmZeroShot, MllmZeroShotConfig
from adaptkit.methods.tags import answer_of
from adaptkit.types import FitTask, TrainingSettings

PLAIN = "Answer with its name only."
THINK = "First think about it inside <think> </think> tags, then give {} inside <answer> </answer> tags."

_INSIDE = r"(?:(?!</?(?:think|answer)>).)*"
_FORMAT = re.compile(rf"<think>{_INSIDE}</think>\s*<answer>{_INSIDE}</answer>", re.DOTALL)
_LETTER = re.compile(r"(?<![\w'’-])([A-Z])(?=[^\S\n]*(?:[.,:;!?)\]}\"'*\n]|$))(?!['’]\w)")


def keeps_format(text: str) -> bool:
    """Whether an answer is one think block and one answer block, with nothing around them."""
    return _FORMAT.fullmatch(text.strip()) is not None


def letter_of(text: str, options: int) -> str | None:
    """The letter that an answer chooses: in its last answer block, or anywhere where it has none.

    A letter counts where it stands alone in front of punctuation or the end. None where there is none, or several are.

    Args:
        text: The answer.
        options: How many letters there were to choose from.
    """
    last = chr(ord("A") + options - 1)
    found = {letter for letter in _LETTER.findall(answer_of(text).strip()) if letter <= last}
    return found.pop() if len(found) == 1 else None


@dataclass(frozen=True)
class RewardedConfig(GrpoConfig, MllmZeroShotConfig):
    """Settings that `virft` and `dive-k` share."""

    prompt: str = field(
        default="What {noun} is shown in the image?",
        metadata={"help": "The question, without how it is to be answered; {noun} is put in."},
    )
    tags: bool = field(
        default=True,
        metadata={
            "help": "Ask for thoughts and the answer in tags and reward the format; off: for the name or letter alone."
            " Routes likelihood and constrained always ask for the name alone."
        },
    )
    r: int = field(default=16, metadata={"help": "Rank of the updates."})
    alpha: float = field(default=32, metadata={"help": "Scale of the updates: alpha / r."})

    def __post_init__(self) -> None:
        MllmZeroShotConfig.__post_init__(self)
        GrpoConfig.__post_init__(self)
        refuse(
            self,
            *at_least(self, 1, "r"),
            ("alpha", "above 0", self.alpha > 0),
            ("prompt", "a text", bool(self.prompt.strip())),
        )


class RewardedMllm(GrpoMethod, MllmZeroShot):
    """Low-rank updates of the language model, trained by rewards for answers to questions about one image."""

    config: Any
    default_training: ClassVar[TrainingSettings | None] = TrainingSettings(
        epochs=2, batch_size=8, keep_last=True, optimiser="adamw", lr=2e-5, weight_decay=0.0, schedule="cosine-step",
        warmup_epochs=0,
    )  # fmt: skip

    def tune(self, twin: MLLM) -> None:
        targets = twin.family.lora_targets("language")
        self._peft_config = add_low_rank(
            twin, targets, self.generator, r=self.config.r, lora_alpha=self.config.alpha, lora_dropout=0.0
        )

    def build(self) -> None:
        super().build()
        self.bare_question, self.question = self.question, f"{self.question} {PLAIN}"

    def shown(self, pixels: Tensor) -> ImageFeatures:
        return self.features(pixels)

    def open_question(self, names: Sequence[str] = ()) -> str:
        """The question that is answered freely.

        Args:
            names: Classes that it says there are; none for no such list.
        """
        choice = f" It is one of these: {', '.join(names)}." if names else ""
        if not self.config.tags:
            return f"{self.bare_question}{choice} {PLAIN}"
        return f"{self.bare_question}{choice} {THINK.format('its name alone')}"

    def classes_changed(self) -> None:
        super().classes_changed()
        self._prior_memo = None  # it depends on what was learned
        self.check_room(self.open_question())

    def check_room(self, question: str) -> None:
        """Refuse a question behind which the longest answer wouldn't fit."""
        prompt = self.mllm.prompter.ids([Turn(question)], [self.placeholders], check=False)
        self.mllm.prompter.check_length(
            len(prompt) + self.config.max_tokens, "A question with the longest answer (max_tokens)"
        )

    def asked_freely(self, features: ImageFeatures) -> Prefix:
        return self.prefix(features, [[Turn(self.open_question())]] * len(features))

    def format_reward(self, text: str) -> dict[str, float]:
        """What keeping to the tags is worth; nothing without them."""
        return {"format": float(keeps_format(text))} if self.config.tags else {}

    @property
    def fitted_shown(self) -> list[str]:
        """The fitted classes' names as the model reads them."""
        return [name.replace("_", " ") for name in self.fitted_names]

    def finish(self, task: FitTask) -> dict[str, Any]:
        self.classes_changed()
        if self.calibrated and self._numbered is not None:
            self._calibrate(replace(task, train=self._numbered.inputs))
        return {
            **super().finish(task),
            "route": self.config.route,
            "prompt": self.open_question(),
            **self.token_facts,
        }

    def write_extras(self, folder: Path) -> None:
        """Write the updates in peft's own layout too, for transformers' model of the same weights."""
        write_low_rank(folder, self.mllm, self.named_parameters(), self._peft_config)
