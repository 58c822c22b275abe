"""MLLM soft prompt: vectors of its own in the place of the question's tokens are all that is trained.

The vectors begin as the question's token embeddings, so that the untrained prompt answers as the question does, with
the same positions (three axes on Qwen) and token types.

Source: prompt tuning arXiv 2104.08691; mllm sheets `backbones.md` (positions with embeddings, peft's broken cases) and
`vladva.md` (a soft prompt in the place of a written instruction).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from adaptkit.backbones.mllm.batches import Batch
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.errors import ConfigError
from adaptkit.methods import methods
from adaptkit.methods.mllm._soft import question_span, with_soft
from adaptkit.methods.mllm._tuning import TunedMllm, TunedMllmConfig
from adaptkit.types import TrainingSettings


@dataclass(frozen=True)
class MllmSoftPromptConfig(TunedMllmConfig):
    """Settings of the MLLM soft prompt."""

    tokens: int = field(
        default=0,
        metadata={"help": "Vectors; 0: as many as the question has tokens. Those beyond the question's are drawn."},
    )

    def __post_init__(self) -> None:
        if self.variant == "letters" or self.route == "letters":
            raise ConfigError(
                "A soft prompt takes the place of the question, and a lettered choice has another text for every image:"
                " choose variant sft or softmax and a route other than letters, or mllm-lora."
            )
        super().__post_init__()

    def counts(self) -> tuple[str, ...]:
        return (*super().counts(), "tokens")


@methods.register("mllm-soft-prompt")
class MllmSoftPrompt(TunedMllm):
    """Learned vectors instead of a written question. In token rows, vector j is written as -1 - j."""

    name = "mllm-soft-prompt"
    config_class = MllmSoftPromptConfig
    config: MllmSoftPromptConfig
    soft: nn.Parameter
    default_training: ClassVar[TrainingSettings | None] = TrainingSettings(
        epochs=20, batch_size=16, keep_last=True, optimiser="adamw", lr=1e-3, weight_decay=0.0, schedule="cosine-step",
        warmup_epochs=0,
    )  # fmt: skip

    def build(self) -> None:
        self._rows: dict[tuple[int, ...], list[int]] = {}  # by the images' placeholders
        super().build()
        table = self.mllm.model.get_input_embeddings().weight
        ids, start, end = question_span(self.mllm.prompter, Turn(self.question), [self.placeholders])
        own = self.mllm.embed(torch.tensor(ids[start:end], device=table.device)).detach().float()
        count = self.config.tokens or len(own)
        drawn = torch.randn(max(0, count - len(own)), own.shape[1], generator=self.generator)
        self.soft = nn.Parameter(torch.cat([own[:count], drawn.to(own) * own.std()]))

    def prompt_ids(self, turns: Sequence[Turn], counts: Sequence[int]) -> list[int]:
        if len(turns) != 1 or turns[0].text != self.question or not hasattr(self, "soft"):
            return super().prompt_ids(turns, counts)
        key = tuple(counts)
        if key not in self._rows:
            ids, start, end = question_span(self.mllm.prompter, turns[0], counts)
            row = [*ids[:start], *(-1 - place for place in range(len(self.soft))), *ids[end:]]
            self.mllm.prompter.check_length(len(row), "The prompt with its soft vectors")
            self._rows[key] = row
        return list(self._rows[key])

    def embedded(self, batch: Batch) -> Tensor | None:
        return with_soft(self.mllm, batch, self.soft)
