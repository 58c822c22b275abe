"""What bridges between a vision encoder and a frozen language model share: frozen states once, captions, a teacher.

An image's frozen part (`shown`) is computed once; the bridge (`bridged`) makes of it, in every step, the vectors that
stand at the image's placeholders in the model's own prompt, so that every way of answering works on them.

Source: mllm sheets `frozen.md`, `magma.md`, `fromage.md`, `blip2-qformer.md`, `p-former.md`.
Differs from the papers: bridges stand in the model's own chat template; captions are templates with the class's name,
and its descriptions where there are some.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.errors import ConfigError, UnsupportedError
from adaptkit.methods.base import at_least, progress_of, refuse, render_prompts
from adaptkit.methods.mllm._prompt_teacher import PromptTeacher, train_teacher
from adaptkit.methods.mllm._tuning import TunedMllm, TunedMllmConfig
from adaptkit.methods.mllm._vision import as_image
from adaptkit.types import FitTask, TrainingLoop


@dataclass(frozen=True)
class BridgedConfig(TunedMllmConfig):
    """Settings that bridges share."""

    answers: Literal["names", "captions"] = field(
        default="captions",
        metadata={
            "help": "What is trained and scored as an answer: the name, or a caption (a template with the name; trained"
            " on the class's descriptions too, where there are some)."
        },
    )
    align_to: Literal["none", "p-former"] = field(
        default="none",
        metadata={"help": "p-former: pull an image's vectors towards what a text-only teacher makes of its caption."},
    )
    align: float = field(
        default=100.0,
        metadata={"help": "p-former: weight of the mean squared difference; a tenth of it in stage 1 of qformer."},
    )
    teacher_steps: int = field(default=200, metadata={"help": "p-former: steps that the teacher is trained for."})

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, *at_least(self, 0, "align"), *at_least(self, 1, "teacher_steps"))
        if self.variant == "letters" and self.answers == "captions":
            raise ConfigError("Captions aren't letters: choose variant sft or softmax, or answers=names.")


class BridgedMllm(TunedMllm):
    """A tuned MLLM whose images go through a bridge that is trained, or that is the model's own."""

    config: Any
    reads_descriptions: ClassVar[Literal["never", "optional", "needed"]] = "optional"

    # --- what a method fills in ---------------------------------------------------------------------------------------

    def bridged(self, shown: ImageFeatures) -> ImageFeatures:
        """What the language model reads of what `shown` gave."""
        raise NotImplementedError(f"{type(self).__name__} doesn't define bridged.")

    # --- images -------------------------------------------------------------------------------------------------------

    def features(self, pixels: Tensor) -> ImageFeatures:
        return self.bridged(self.shown(pixels))

    def training_states(self, inputs: Tensor) -> ImageFeatures:
        """What `shown` gives of training images (see `losses` for `inputs`)."""
        return super().training_features(inputs)

    def training_features(self, inputs: Tensor) -> ImageFeatures:
        return self.bridged(self.training_states(inputs))

    @property
    def has_bridge(self) -> bool:
        """Whether images go through a bridge of the method's; else through the model's own."""
        return True

    def build(self) -> None:
        super().build()
        if self.config.thinning.active and self.has_bridge:
            raise UnsupportedError(
                f"{self.name} reads vectors of its own in the place of an image's tokens, so none of those can be left"
                " out: choose token_reduction=none."
            )
        self.shares_batches = self.shares_batches and self.config.align_to == "none"  # that term is a mean over images
        self._caption_ids: dict[str, list[int]] = {}
        self._teacher: tuple[PromptTeacher, ...] = ()  # a tuple, so that it isn't a part of what is learned
        self._teacher_facts: dict[str, Any] = {}
        self._drawn: list[str] | None = None  # captions of the batch under way
        for text in self.training_captions():
            self.mllm.prompter.check_text(text, "caption")

    def look(self, loop: TrainingLoop | None) -> None:
        prompt = len(self.prompt_ids([Turn(self.question)], [self.placeholders]))
        longest = max(map(len, self.caption_rows(self.training_captions())))
        self.mllm.prompter.check_length(prompt + longest, "The prompt with its longest caption")
        super().look(loop)
        if self.config.align_to == "p-former" and self.config.align:
            self._train_teacher(loop)

    # --- the teacher --------------------------------------------------------------------------------------------------

    def _train_teacher(self, loop: TrainingLoop | None) -> None:
        captions = self.training_captions()
        answers = self.caption_rows(captions)
        rows = [row[:-1] for row in answers]
        seeds = torch.randint(2**62, (2,), generator=self.generator).tolist()
        teacher = PromptTeacher(self.mllm, self.placeholders, max(map(len, rows)), seeds[0])

        def said(picked: Sequence[int], prompts: Tensor) -> Tensor:
            wanted = [answers[i] for i in picked]
            loss = self.answer_loss([self.question] * len(wanted), wanted, as_image(self.mllm, prompts))
            return loss / sum(map(len, wanted))

        numbers, steps = torch.Generator().manual_seed(seeds[1]), self.config.teacher_steps
        self._teacher_facts = train_teacher(teacher, rows, said, steps, numbers, progress_of(loop))
        self._teacher = (teacher,)

    @property
    def align_weight(self) -> float:
        """Weight of the teacher's term."""
        return float(self.config.align)

    def losses(self, inputs: Tensor, labels: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().losses(inputs, labels, frozen)
        return terms | self.aligned(inputs, labels, terms)

    def aligned(self, inputs: Tensor, labels: Tensor, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The teacher's term, and nothing without a teacher; its size against the others' goes into the record."""
        if not self._teacher:
            return {}
        vectors = torch.stack(self.training_features(inputs).tokens).float()
        with torch.no_grad():
            captions = self._drawn if self._drawn is not None else self.drawn_captions(labels)
            prompts, _ = self._teacher[0]([row[:-1] for row in self.caption_rows(captions)])
        self._drawn = None
        term = self.align_weight * F.mse_loss(vectors, prompts)
        others = float(torch.stack([value.detach() for value in terms.values()]).sum())
        self._teacher_facts["share_of_other_losses"] = float(term.detach()) / max(others, 1e-12)
        return {"align": term}

    def finish(self, task: FitTask) -> dict[str, Any]:
        facts = {"p_former": self._teacher_facts} if self._teacher else {}
        self._teacher = ()
        return {**super().finish(task), **facts}

    # --- captions -----------------------------------------------------------------------------------------------------

    def candidate_texts(self, names: Sequence[str]) -> list[str]:
        if self.config.answers == "names":
            return super().candidate_texts(names)
        return render_prompts(names, self.templates[0])

    def captions_of(self, name: str) -> list[str]:
        """What a class's images may be captioned with in training."""
        if self.config.answers == "names":
            return super().candidate_texts([name])
        return [*(render_prompts([name], template)[0] for template in self.templates), *self.descriptions.get(name, ())]

    def training_captions(self) -> list[str]:
        """All captions of the fitted classes, each once."""
        return list(dict.fromkeys(text for name in self.fitted_names for text in self.captions_of(name)))

    def drawn_captions(self, labels: Tensor) -> list[str]:
        """A caption for each image; the loop has seeded torch's own generator, from which they are drawn.

        The teacher reads those that were drawn last, so it is asked about what the model learns to say.
        """
        pools = [self.captions_of(self.fitted_names[label]) for label in labels.tolist()]
        self._drawn = [pool[int(torch.randint(len(pool), ()))] if len(pool) > 1 else pool[0] for pool in pools]
        return self._drawn

    def _questions(self, inputs: Tensor, labels: Tensor) -> tuple[list[str], list[list[int]]]:
        if self.config.variant != "sft" or self.config.answers == "names":
            return super()._questions(inputs, labels)
        return [self.question] * len(labels), self.caption_rows(self.drawn_captions(labels))

    def caption_rows(self, captions: Sequence[str]) -> list[list[int]]:
        """Tokens of captions as answers, each with the one that ends the turn; remembered."""
        new = [text for text in dict.fromkeys(captions) if text not in self._caption_ids]
        self._caption_ids |= zip(new, self.mllm.prompter.answers([Turn(self.question)], new), strict=True)
        return [self._caption_ids[text] for text in captions]

    def training_texts(self) -> list[str]:
        if self.config.answers == "names":
            return super().training_texts()
        prompter = self.mllm.prompter
        return [prompter.render([Turn(self.question, 1, text)]) for text in self.training_captions()]
