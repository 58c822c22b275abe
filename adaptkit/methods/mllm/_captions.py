"""What methods share that train MLLM LoRA on captions of the shots: the captions, and their loss beside the names'.

Source: mllm sheets `prior.md`, `recaption.md` and `lora-sft.md`.
Differs from the sheets: the class name as an answer is trained too (weight `names`), since captions alone don't teach
the question by which images are classified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.methods.base import at_least, refuse, render_prompts
from adaptkit.methods.mllm._tuning import summed
from adaptkit.methods.mllm.mllm_lora import MllmLora, MllmLoraConfig

CAPTION_PROMPT = "Describe the image."


@dataclass(frozen=True)
class CaptionConfig(MllmLoraConfig):
    """Settings that methods trained on captions share."""

    caption_prompt: str = field(default=CAPTION_PROMPT, metadata={"help": "What a caption is the answer to."})
    names: float = field(
        default=1.0, metadata={"help": "Weight of the class name's own loss (see variant); 0 trains captions alone."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, ("caption_prompt", "a text", bool(self.caption_prompt.strip())), *at_least(self, 0, "names"))


def captions_of(name: str, templates: Sequence[str], descriptions: Sequence[str]) -> tuple[str, ...]:
    """Captions of a class's images: its descriptions, else what the templates say.

    A description that doesn't name its class stands behind the first template's sentence.
    """
    sentences = [render_prompts([name], template)[0] for template in templates]
    if not descriptions:
        return tuple(dict.fromkeys(sentences))
    shown, lead = name.replace("_", " ").casefold(), sentences[0].rstrip(".")
    return tuple(one if shown in one.replace("_", " ").casefold() else f"{lead}. {one}" for one in descriptions)


class CaptionMethod(MllmLora):
    """MLLM LoRA with a second loss, on captions of the training images."""

    reads_descriptions: ClassVar[Literal["never", "optional", "needed"]] = "optional"
    shares_batches: bool = False  # names and captions are means over different tokens
    config: Any

    def build(self) -> None:
        super().build()
        self.mllm.prompter.check_text(self.config.caption_prompt, "caption_prompt")
        self.captions = [self.class_captions(name) for name in self.fitted_names]
        turns = [Turn(self.config.caption_prompt)]
        for caption in (caption for own in self.captions for caption in own):
            self.mllm.prompter.check_text(caption, "caption")
        self.caption_rows = [self.mllm.prompter.answers(turns, own) for own in self.captions]
        longest = max(len(row) for rows in self.caption_rows for row in rows)
        prompt = len(self.mllm.prompter.ids(turns, [self.placeholders]))
        self.mllm.prompter.check_length(prompt + longest, "An image with its longest caption")

    # --- what a method fills in ---------------------------------------------------------------------------------------

    def class_captions(self, name: str) -> tuple[str, ...]:
        """Captions of a fitted class's images."""
        return captions_of(name, self.templates, self.descriptions.get(name, ()))

    def choose(self, inputs: Tensor, labels: Tensor) -> list[int]:
        """Which of its class's captions each image of a batch gets.

        The loop has seeded torch's own generator, from which they are drawn.
        """
        counts = [len(self.captions[label]) for label in labels.tolist()]
        return [int(torch.randint(count, ())) for count in counts]

    def weights_of(self, label: int, place: int) -> Tensor | None:
        """Weights of a caption's tokens, [tokens]; None for all alike."""
        return None

    @property
    def weights_divide(self) -> bool:
        """Whether the loss is divided by the sum of the weights, and not by the number of tokens."""
        return True

    # --- training -----------------------------------------------------------------------------------------------------

    def losses(self, inputs: Tensor, labels: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        """The captions' loss, and that of the names.

        Args:
            inputs: Numbers of training images, int64 [batch], or pixels [batch, 3, h, w].
            labels: int64 [batch].
            frozen: Not used.
        """
        terms = dict[str, Tensor]()
        if self.config.names:
            terms = {name: self.config.names * term for name, term in super().losses(inputs, labels, frozen).items()}
        chosen = list(zip(labels.tolist(), self.choose(inputs, labels), strict=True))
        rows = [self.caption_rows[label][place] for label, place in chosen]
        given = [self.weights_of(label, place) for label, place in chosen]
        weights = [torch.ones(len(row)) if own is None else own for row, own in zip(rows, given, strict=True)]
        divided = self.weights_divide
        total = sum(float(own.sum()) if divided else len(own) for own in weights) or 1.0

        def part(picked: Tensor) -> Tensor:
            places = picked.tolist()
            features = self.training_features(inputs[picked])
            texts, answers = [self.config.caption_prompt] * len(places), [rows[place] for place in places]
            loss = self.answer_loss(texts, answers, features, torch.cat([weights[place] for place in places]))
            return loss / total

        chunks = torch.arange(len(labels), device=labels.device).split(self.config.micro_batch or len(labels))
        return terms | {"caption": summed(part, chunks, self.trainables())}

    def finish(self, task: Any) -> dict[str, Any]:
        return {
            **super().finish(task),
            "captions": "descriptions" if any(map(self.descriptions.get, self.fitted_names)) else "templates",
            "caption_count": sum(map(len, self.captions)),
        }

    def training_texts(self) -> list[str]:
        shown = [Turn(self.config.caption_prompt, 1, caption) for own in self.captions for caption in own]
        return [*super().training_texts(), *(self.mllm.prompter.render([turn]) for turn in shown)]
