"""ViRFT: reinforcement tuning of a multimodal language model on the open question for the class's name.

An answer is worth one point for keeping to the tags and one for holding the right name. It is the plain baseline of
`dive-k`, whose sheet names its known problems: brittle names, and training names that are learned by heart.

Source: Visual-RFT arXiv 2503.01785; mllm sheet `dive-k.md` (ViRFT baseline).
Differs from the paper: low-rank updates, as `dive-k` has them; a name in an answer without tags counts too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.methods import methods
from adaptkit.methods.mllm._grpo import Question
from adaptkit.methods.mllm._matching import normalise
from adaptkit.methods.mllm._rewarded import RewardedConfig, RewardedMllm
from adaptkit.methods.mllm.mllm_zero_shot import Route
from adaptkit.methods.tags import answer_of


@dataclass(frozen=True)
class VirftConfig(RewardedConfig):
    """Settings of ViRFT."""

    route: Route = field(
        default="open",
        metadata={
            "help": "How it answers: open (as it was trained, matched), likelihood of each name, letters (multiple"
            " choice) or constrained."
        },
    )


def holds_name(text: str, name: str) -> bool:
    """Whether the normalised name is contained in the normalised answer; an empty answer holds none.

    Args:
        text: The answer; its last answer block counts, where it has one.
        name: The right class's name.
    """
    answer, wanted = normalise(answer_of(text)), normalise(name)
    return bool(wanted) and wanted in answer


@methods.register("virft")
class Virft(RewardedMllm):
    """Is rewarded for the right name in an answer that it wrote freely."""

    name = "virft"
    config_class = VirftConfig
    config: VirftConfig

    def questions(self, inputs: Tensor, labels: Tensor) -> list[Question]:
        turns, names = (Turn(self.open_question()),), self.fitted_shown
        return [Question(turns, (place,), names[label]) for place, label in enumerate(labels.tolist())]

    def rewards(self, text: str, question: Question) -> dict[str, float]:
        return {**self.format_reward(text), "accuracy": float(holds_name(text, question.truth))}

    def training_texts(self) -> list[str]:
        return [self.mllm.prompter.render([Turn(self.open_question(), 1, name)]) for name in self.fitted_shown]
