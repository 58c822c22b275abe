"""FROMAGe: linear maps and one retrieval token make a frozen language model caption images and find them.

An image becomes k vectors among the model's embeddings (W_c) and a point in a small space (W_i); a text becomes the
point that W_t makes of the last state of the token [RET] behind it. Classes are texts: the model then answers like a
dual encoder, or by the likelihood of each caption.

Source: FROMAGe arXiv 2301.13823; mllm sheet `fromage.md` (tensors, both modes and their losses, concatenation with
probability 0.5, the [RET] row rescaled after each step).
Differs from the paper: [RET] is a parameter of its own, tied to its output logit, so no row of the model's table is
trained; modes stand in the model's chat template with an empty question; images of one class in a batch aren't each
other's negatives; the row is rescaled before the next step instead of behind the last one; no warm-up and no step
decay; captions aren't cut; an image's vector is the mean of the encoder's states by default (`pool`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.backbones.mllm.batches import Batch
from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.methods import methods
from adaptkit.methods.base import ClassWeightMethod, at_least, draw_linear, refuse, render_prompts
from adaptkit.methods.mllm._prefix import PrefixConfig, PrefixedMllm, VisualPrefix
from adaptkit.methods.mllm._soft import with_soft
from adaptkit.methods.mllm._tuning import IGNORED
from adaptkit.methods.mllm.vladva import MOST_SCALE, contrast
from adaptkit.types import FitTask, TrainingSettings

RET = -1
"""The retrieval token in token rows (see `_soft.py`: vector 0)."""

_TEXTS_AT_ONCE = 32


@dataclass(frozen=True)
class FromageConfig(PrefixConfig):
    """Settings of FROMAGe."""

    prompt: str = field(default="", metadata={"help": "What stands in front of a caption; {noun} is put in."})
    tokens: int = field(default=1, metadata={"help": "Vectors that an image becomes (k)."})
    answer: Literal["retrieval", "likelihood"] = field(
        default="retrieval",
        metadata={"help": "By the cosine of an image and a caption's [RET], or by each caption's likelihood."},
    )
    dim: int = field(default=256, metadata={"help": "Dimensions of the space that images and texts meet in."})
    captioning: float = field(default=1.0, metadata={"help": "Weight of the captioning loss."})
    retrieval: float = field(default=1.0, metadata={"help": "Weight of the retrieval losses."})
    concatenate: float = field(
        default=0.5, metadata={"help": "Probability that a batch's images are captioned in pairs, one after the other."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        lossless = self.captioning + self.retrieval == 0
        refuse(
            self,
            *at_least(self, 1, "dim"),
            *at_least(self, 0, "captioning", "retrieval"),
            ("concatenate", "from 0 to 1", 0 <= self.concatenate <= 1),
            ("variant", "sft", self.variant == "sft"),
            ("answers", "captions", self.answers == "captions"),
            ("micro_batch", "0, since a whole batch is compared", self.micro_batch == 0),
            more=["captioning and retrieval are both 0, so there is no loss"] * lossless,
        )


@methods.register("fromage")
class Fromage(PrefixedMllm, ClassWeightMethod):
    """Maps of the vision width v and the model's width D: k·D·(v + 1) + dim·(v + 1) + dim·(D + 1) + D + 1 numbers."""

    name = "fromage"
    config_class = FromageConfig
    config: FromageConfig
    shares_batches: bool = False  # texts and images of a batch are compared
    ret: nn.Parameter
    log_scale: nn.Parameter
    default_training: ClassVar[TrainingSettings | None] = TrainingSettings(
        epochs=50, batch_size=16, keep_last=True, optimiser="adamw", lr=3e-4, weight_decay=0.0, schedule="constant",
        warmup_epochs=0,
    )  # fmt: skip

    def make_prefix(self, states: Tensor, width: int) -> VisualPrefix:
        """W_c; the other maps and [RET] are drawn with it."""
        device, inputs = states.device, states.shape[-1]
        made = VisualPrefix(inputs, width, self.config.tokens, self.generator)
        self.image_map = draw_linear(inputs, self.config.dim, self.generator).to(device)
        self.text_map = draw_linear(width, self.config.dim, self.generator).to(device)
        self._norm = float(self.mllm.model.get_input_embeddings().weight.detach().float().norm(dim=1).mean())
        self.ret = nn.Parameter(torch.randn(width, generator=self.generator).to(device))
        self._rescale()
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07), device=device))
        return made

    @torch.no_grad()
    def _rescale(self) -> None:
        """Give the [RET] row the mean norm of the model's own rows."""
        self.ret.mul_(self._norm / self.ret.norm())

    def embedded(self, batch: Batch) -> Tensor | None:
        return with_soft(self.mllm, batch, self.ret[None])

    # --- the two sides ------------------------------------------------------------------------------------------------

    @property
    def similarity_scale(self) -> Tensor:
        """What cosines are multiplied with, fp32 []."""
        return self.log_scale.float().exp().clamp(max=MOST_SCALE)

    def scale_and_bias(self) -> tuple[float, float]:
        return float(self.similarity_scale.detach()), 0.0

    def encode_states(self, shown: ImageFeatures) -> Tensor:
        """Points [images, dim] of what `shown` gave."""
        out: Tensor = self.image_map(torch.stack(shown.tokens)[:, 0].float())
        return out

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Points [images, dim] of pixels [images, 3, size, size]."""
        return self.encode_states(self.shown(pixels))

    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """Points [captions, dim] of texts, without any image."""
        groups = [captions[at : at + _TEXTS_AT_ONCE] for at in range(0, len(captions), _TEXTS_AT_ONCE)]
        return torch.cat([self.text_map(self._read(group)[0][:, -1].float()) for group in groups])

    def _read(self, captions: Sequence[str]) -> tuple[Tensor, list[list[int]]]:
        """Last hidden states [captions, length, width] of captions with [RET] behind, and those rows' own tokens."""
        prompt = self.mllm.prompter.ids([Turn(self.question, 0)])
        tails = self._tails(captions)
        for tail in tails:
            self.mllm.prompter.check_length(len(prompt) + len(tail), "A caption with its retrieval token")
        batch = self.mllm.batch([prompt + tail for tail in tails], None, [len(tail) for tail in tails])
        return self.mllm.hidden(batch, embeds=self.embedded(batch)), tails

    def _tails(self, captions: Sequence[str]) -> list[list[int]]:
        """Tokens of captions, each with [RET] in the place of the token that ends the turn."""
        return [[*row[:-1], RET] for row in self.caption_rows(captions)]

    def class_weights(self) -> Tensor:
        prompts = [text for template in self.templates for text in render_prompts(self.class_names, template)]
        points = F.normalize(self.encode_captions(prompts), dim=-1)
        return F.normalize(points.unflatten(0, (len(self.templates), -1)).mean(dim=0), dim=-1)  # [classes, dim]

    def classes_changed(self) -> None:
        super().classes_changed()
        self._memo = None
        longest = max(render_prompts(self.class_names, max(self.templates, key=len)), key=len)
        prompt = self.mllm.prompter.ids([Turn(self.question, 0)])
        self.mllm.prompter.check_length(len(prompt) + len(self._tails([longest])[0]), "A caption with its token")

    def forward(self, inputs: Tensor) -> Tensor:
        if self.config.answer == "likelihood":
            return super().forward(inputs)
        groups = inputs.split(self.at_once())
        points = F.normalize(torch.cat([self.encode_image(group) for group in groups]), dim=-1)
        return self.similarity_scale * points @ self.folded_weights().T

    # --- losses -------------------------------------------------------------------------------------------------------

    def losses(self, inputs: Tensor, labels: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        """Captioning; and the language loss of captions with [RET] beside their contrast with the images.

        Args:
            inputs: Numbers of training images, int64 [batch], or pixels [batch, 3, h, w].
            labels: int64 [batch].
            frozen: Not used.
        """
        self._rescale()
        states, captions, config = self.training_states(inputs), self.drawn_captions(labels), self.config
        terms: dict[str, Tensor] = {}
        if config.captioning:
            pairs = config.concatenate > 0 and float(torch.rand(())) < config.concatenate
            terms["captioning"] = config.captioning * self.captioning_loss(captions, self.bridged(states), pairs=pairs)
        if config.retrieval:
            hidden, tails = self._read(captions)
            terms["retrieval"] = config.retrieval * self._language_loss(hidden, tails)
            texts, images = self.text_map(hidden[:, -1].float()), self.encode_states(states)
            terms["contrast"] = config.retrieval * contrast(self.similarity_scale, images, texts, labels) / 2
        return terms | self.aligned(inputs, labels, terms)

    def captioning_loss(self, captions: Sequence[str], features: ImageFeatures, *, pairs: bool) -> Tensor:
        """Mean over the captions' tokens behind their images; [RET] and images aren't supervised.

        Args:
            captions: One for each image.
            features: Of the images.
            pairs: Put two images with their captions into one row, where they fit.
        """
        prompts = self.prompt_rows(features, [[Turn(self.question)]] * len(captions))
        tails, context = self._tails(captions), self.mllm.prompter.context
        begin = self.mllm.prompter.tokenizer.bos_token_id
        rows, labels, answers = list[list[int]](), list[list[int]](), list[int]()
        for place, (prompt, tail) in enumerate(zip(prompts, tails, strict=True)):
            second = pairs and place % 2 and len(rows[-1]) + len(prompt) + len(tail) <= context
            if not second:
                rows.append([])
                labels.append([])
                answers.append(0)
            more = [token for token in prompt if token != begin] if second else prompt  # a text begins once
            rows[-1] += more + tail
            labels[-1] += [IGNORED] * len(more) + [*tail[:-1], IGNORED]
            answers[-1] += len(tail) + (len(more) if second else 0)
        batch = self.mllm.batch(rows, features, answers)
        return self._language_loss(self.mllm.hidden(batch, features, embeds=self.embedded(batch)), labels)

    def _language_loss(self, hidden: Tensor, labels: Sequence[Sequence[int]]) -> Tensor:
        """Mean cross-entropy of the supervised tokens, over the vocabulary and [RET] behind it.

        Args:
            hidden: Last states [rows, length, width] of rows that are padded on the left.
            labels: What the last tokens of each row must be: tokens, `RET` or `IGNORED`.
        """
        length = hidden.shape[1]
        wanted = torch.tensor([[IGNORED] * (length - len(row)) + list(row) for row in labels], device=hidden.device)
        supervised = wanted[:, 1:] != IGNORED
        states = hidden[:, :-1][supervised]  # [tokens, width]
        logits = self.mllm.logits(states)
        own = states.float() @ self.ret  # tied: the row is read as it is written
        targets = wanted[:, 1:][supervised]
        targets = torch.where(targets == RET, logits.shape[1], targets)
        return F.cross_entropy(torch.cat([logits, own[:, None]], dim=1), targets)

    def finish(self, task: FitTask) -> dict[str, Any]:
        self._rescale()
        return {**super().finish(task), "scale": float(self.similarity_scale.detach()), "answer": self.config.answer}
