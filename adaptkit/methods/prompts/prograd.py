"""ProGrad: CoOp's context, moved only along what doesn't contradict the zero-shot teacher.

Two losses have gradients of their own: the cross-entropy with the labels, g, and the distance to the teacher's
predictions, k. Their sum is never minimised. Where g and k point apart, the part of g against k is taken out of it, and
what is left moves the context; elsewhere g does, and k serves for nothing but this test. The loss that training shows
is the sum of both all the same, for want of another.

Source: arXiv 2205.14865, Sec. 3.2; prograd sheet; reference code BeierZhu/Prompt-align, trainers/prograd.py.
Differs from the reference: fp32 throughout (its student and the gradients' test are fp16); the teacher reads the same
stored features as the student, and with several templates their mean text feature; a context can also start from words
of one's own; contexts of each class's own and names in front of or amid the context aren't offered (its "middle" can't
run). Kept: zeros in front of the words; words that are several tokens push the phrase's last tokens out of the context,
where they stay as frozen words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.errors import ConfigError
from adaptkit.methods import methods
from adaptkit.methods.base import MethodConfig, draw_normal
from adaptkit.methods.prompts._context import INITIAL_STD, SharedContextMethod
from adaptkit.methods.prompts._deep import check_count
from adaptkit.methods.prompts._layout import embed_pieces, phrase_pieces, placeholder
from adaptkit.types import TrainingSettings

FROM_TEMPLATE = "template"
TEACHER_TEMPLATES = {"{} texture.": "a texture of {}."}
"""What the reference writes for DTD; the other templates follow by moving the hint (protocol sheet, section 9)."""


@dataclass(frozen=True)
class ProGradConfig(MethodConfig):
    """Settings of ProGrad."""

    num_context: int = field(default=16, metadata={"help": "Learned context vectors, at least as many as words."})
    context_init: str = field(
        default=FROM_TEMPLATE,
        metadata={
            "help": '"template": the last vectors start from the words before the name in the first zero-shot template,'
            ' its hint moved to the front ("a type of pet, a photo of a"), the others from zero. Other words do the'
            " same; empty: random vectors."
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "Softens the teacher's and the student's predictions."})
    projection: float = field(
        default=1.0, metadata={"help": "Share of the conflicting part that is taken out of the gradient (λ); 0: CoOp."}
    )

    def __post_init__(self) -> None:
        check_count("num_context", self.num_context)
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}, but must be a positive number.")
        if not 0 <= self.projection < math.inf:
            raise ConfigError(f"projection is {self.projection}, but must be 0 or a positive number.")


def hint_first(template: str) -> str:
    """The template with what follows the name behind a comma moved to the front; others stay as they are.

    Example:
        >>> hint_first("a photo of a {}, a type of pet.")
        'a type of pet, a photo of a {}.'
    """
    if template in TEACHER_TEMPLATES:
        return TEACHER_TEMPLATES[template]
    before, _, after = template.partition("{}")
    hint = after.strip().removesuffix(".").strip()
    if not hint.startswith(",") or not hint[1:].strip():
        return template
    return f"{hint[1:].strip()}, {before}{{}}."


def padded_start(backbone: DualEncoder, words: str, count: int) -> tuple[str, Tensor]:
    """The phrase before class names, and the start [count, width] of the context that replaces its first tokens.

    The n words are counted by spaces and embedded by tokens: the last n rows are the first n tokens' embeddings.

    Raises:
        ConfigError: There are more words than context vectors, or the tokenizer drops some.
    """
    number = len(words.split())
    if number > count:
        raise ConfigError(
            f"The context starts from {words!r}, {number} words, but has only {count} vectors: set num_context to at"
            f' least {number}, or context_init to fewer words ("a photo of a").'
        )
    pieces = phrase_pieces(backbone, words) if number else []
    if len(pieces) < number:
        raise ConfigError(
            f"The context can't start from {words!r}: its {number} words are {len(pieces)} tokens for the tokenizer of"
            f" {backbone.spec.name!r}. Set context_init to plain words, or leave it empty."
        )
    tower = backbone.text_tower
    width = 0 if tower is None else tower.width
    start = torch.zeros(count, width)
    if tower is not None and number:
        start[count - number :] = embed_pieces(tower, pieces[:number])
    padding = placeholder(backbone, count - number) if number < count else ""
    return f"{padding} {words}".strip(), start


def without_conflict(gradient: Tensor, teacher: Tensor, share: float) -> Tensor:
    """The gradient without (a share of) its part against the teacher's; as it is where it has none.

    Homogeneous in both, so scaled gradients may be given. A teacher's gradient of exactly zero has no direction and
    leaves the gradient as it is; one that overflowed makes the result non-finite, so that a loss scaler skips the step.

    Args:
        gradient: Of the cross-entropy, any shape; the test is one for the whole tensor.
        teacher: Of the distillation loss, same shape.
        share: How much of the part is taken out (λ).
    """
    peak = teacher.abs().amax()
    direction = teacher / torch.where(peak > 0, peak, torch.ones_like(peak))  # squares of tiny values would be zero
    direction = direction / direction.norm().clamp(min=1.0)  # at least 1, the peak's square, unless all is zero
    along = (gradient * direction).sum()
    return gradient - share * along.clamp(max=0.0) * direction


@methods.register("prograd")
class ProGrad(SharedContextMethod):
    """Prompt-aligned gradient: `context` is [M, width]; the zero-shot classifier is the teacher."""

    name = "prograd"
    title = "ProGrad"
    config_class = ProGradConfig
    config: ProGradConfig
    default_training = TrainingSettings(epochs=200, views=10)

    def build(self) -> None:
        backbone, tower = self.open_text()
        self.templates = tuple(hint_first(template) for template in self.templates)
        words, count = " ".join(self.config.context_init.replace("_", " ").split()), self.config.num_context
        if not words:
            self._phrase = placeholder(backbone, count)
            self.context = draw_normal((count, tower.width), INITIAL_STD, self.generator)
            return
        if words == FROM_TEMPLATE:
            words = " ".join(self.templates[0].partition("{}")[0].split())
        self._phrase, start = padded_start(backbone, words, count)
        self.context = nn.Parameter(start)

    def losses(self, inputs: Tensor, labels: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        """`cross_entropy` with the labels, and `distillation`: T² · cross-entropy with the teacher's softened answers.

        `backward` takes the gradient of each; nothing minimises their sum.
        """
        t = self.config.temperature
        logits = self(inputs)  # [batch, classes]
        with torch.no_grad():
            teacher = (self.cosine_logits(inputs, self.zero_shot()) / t).softmax(dim=-1)
        distillation = t**2 * F.cross_entropy(logits / t, teacher)
        return {"cross_entropy": F.cross_entropy(logits, labels), "distillation": distillation}

    def backward(self, terms: Mapping[str, Tensor], scale: Callable[[Tensor], Tensor]) -> None:
        """Two backward passes; each trained tensor gets the labels' gradient without its part against the teacher's."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        teacher = torch.autograd.grad(scale(terms["distillation"]), trained, retain_graph=True)
        labels = torch.autograd.grad(scale(terms["cross_entropy"]), trained)
        for parameter, ours, theirs in zip(trained, labels, teacher, strict=True):
            parameter.grad = without_conflict(ours, theirs, self.config.projection)

    @classmethod
    def reference_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        settings = super().reference_settings(state)
        settings.pop("context_init", None)  # words that are several tokens leave some behind the context
        return settings
