"""AdaptCLIPZS: both towers fine-tuned so that a class's images and its sentences match as bags.

Every image of a batch comes with one random sentence of its class, and is a positive of all sentences of its class
there. What is learned knows no class: it serves any class that has descriptions.

Source: arXiv 2401.02460, Sec. 3; adaptclipzs sheet; reference code cvl-umass/AdaptCLIPZS.
Kept from the reference: which weights move (`tune="published"`): a name filter meant for the two projections also holds
attention and the MLPs' second layers still, and the published numbers were trained so; `tune="all"` is what the paper
describes. Tau divides logits that already carry CLIP's scale.
Differs from the reference: weights stay in fp32 (half-precision weights there can't take most steps of 1e-7); batches
are shuffled (file order there); sentences are drawn from the task's seed (an unseeded stream there); sentences that
begin with the class's name are taken whole; a tau that falls to zero stops training; crops are resized with the
backbone's interpolation (bilinear there).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.backbones.base import Backbone
from adaptkit.errors import ConfigError, TrainingError
from adaptkit.methods import methods
from adaptkit.methods._tuned import TunedWeights
from adaptkit.methods.base import GradientMethod, MethodConfig, ParameterGroup, render_prompts
from adaptkit.methods.descriptions._sentences import is_whole
from adaptkit.methods.folding import Fold, SentenceHead
from adaptkit.types import FitTask, Reads, TrainingSettings

BETAS = (0.9, 0.98)
TAU_DECAY = 1e-6


@dataclass(frozen=True)
class AdaptCLIPZSConfig(MethodConfig):
    """Settings of AdaptCLIPZS."""

    tune: Literal["published", "all"] = field(
        default="published",
        metadata={"help": "published (attention and the MLPs' second layers stay, as in the release) or all weights."},
    )
    projection_lr: float = field(default=5e-7, metadata={"help": "Learning rate of the two projections."})
    tau: float = field(default=2.0, metadata={"help": "What tau, which divides the training logits, starts from."})
    tau_lr: float = field(default=1e-2, metadata={"help": "Learning rate of tau."})
    drop_words: int = field(
        default=2,
        metadata={"help": "Words taken off each sentence's beginning; the published files open all sentences alike."},
    )

    def __post_init__(self) -> None:
        if self.tune not in ("published", "all"):
            raise ConfigError(f"tune is {self.tune!r}: choose published or all.")
        for name in ("projection_lr", "tau", "tau_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be a positive number.")
        if self.drop_words < 0:
            raise ConfigError(f"drop_words is {self.drop_words}, but must be at least 0.")


def is_projection(name: str) -> bool:
    """Whether a backbone's parameter is one of the two projections into the joint space."""
    return any(part in ("projection", "proj", "text_projection", "visual_projection") for part in name.split(".")[1:3])


def is_published(name: str) -> bool:
    """Whether the release moves a parameter: names with "proj" in OpenAI's spelling stay, but for the projections.

    Attention's q, k and v are one "in_proj" there, and the MLP's second layer is "c_proj".
    """
    return is_projection(name) or not ("proj" in name or ".attn." in name or ".fc2." in name)


def bag_losses(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Both halves of the loss of logits [batch images, batch texts], text j being of image j's class.

    Each row's mean of -log softmax over its class's places; rows are averaged, and the two halves are summed.
    """
    same = (labels[:, None] == labels).to(logits.dtype)  # [batch, batch]
    bags = same / same.sum(dim=1, keepdim=True)

    def half(scores: Tensor) -> Tensor:
        return -(bags * scores.log_softmax(dim=1)).sum(dim=1).mean()

    return {"images": half(logits), "texts": half(logits.T)}


@methods.register("adaptclipzs")
class AdaptCLIPZS(GradientMethod):
    """Fine-tunes both towers on bags of images and sentences; sentences of any class then classify it."""

    name = "adaptclipzs"
    config_class = AdaptCLIPZSConfig
    config: AdaptCLIPZSConfig
    reads: ClassVar[Reads] = "images"
    reads_descriptions = "needed"
    tunes_towers = True
    default_training = TrainingSettings(
        epochs=15,
        batch_size=256,
        keep_last=True,
        optimiser="adamw",
        lr=1e-7,
        weight_decay=1e-2,
        eps=1e-6,
        schedule="cosine-restarts",
        warmup_epochs=0,
        views=10,
        colour_jitter=0.4,
    )
    _memo: tuple[Any, Tensor] | None = None

    def build(self) -> None:
        published = self.config.tune == "published"
        self.tuned = TunedWeights(self.backbone, is_published if published else lambda name: True, self.name)
        self.log_scale = nn.Parameter(self.backbone.logit_scale.detach().float().log())
        self.tau = nn.Parameter(torch.tensor(float(self.config.tau)))
        self._draws = torch.Generator()

    @property
    def towers(self) -> Backbone:
        """The backbone with what was learned in its place."""
        return self.tuned.twin(self.backbone)

    # --- sentences ----------------------------------------------------------------------------------------------------

    def classes_changed(self) -> None:
        self._memo = None
        by_class = [self.sentences_of(name) for name in self.class_names]
        self._sentences = [sentence for sentences in by_class for sentence in sentences]
        self.backbone.tokenize(self._sentences)  # one that doesn't fit is refused here, not while training
        sizes = torch.tensor([len(sentences) for sentences in by_class])
        self._sizes = sizes.to(self.backbone.device)
        self._owners = torch.arange(len(sizes)).repeat_interleave(sizes).to(self.backbone.device)

    def sentences_of(self, name: str) -> list[str]:
        """The prompts of a class: its first template without the full stop, then a sentence without its opening words.

        A sentence that begins with the class's name is a prompt already.
        """
        start = render_prompts([name], self.templates[0])[0].rstrip(". ")
        return [
            sentence if is_whole(sentence, name) else f"{start} {shortened(sentence, self.config.drop_words)}"
            for sentence in self.descriptions[name]
        ]

    def draw_sentences(self, labels: Tensor) -> list[str]:
        """One random sentence of each label's class."""
        starts = self._sizes.cumsum(0) - self._sizes
        share = torch.rand(len(labels), generator=self._draws, dtype=torch.float64)
        labels = labels.cpu()
        places = starts.cpu()[labels] + (share * self._sizes.cpu()[labels]).long()
        return [self._sentences[place] for place in places.tolist()]

    # --- training -----------------------------------------------------------------------------------------------------

    def prepare(self, task: FitTask) -> None:
        self._draws.manual_seed(task.seed % 2**63)

    def parameter_groups(self) -> tuple[ParameterGroup, ...]:
        projections = [value for name, value in self.tuned.values() if is_projection(name)]
        main = [value for name, value in self.tuned.values() if not is_projection(name)]
        groups = (
            ParameterGroup((*main, self.log_scale), betas=BETAS),
            ParameterGroup(tuple(projections), lr=self.config.projection_lr, betas=BETAS),
            ParameterGroup((self.tau,), lr=self.config.tau_lr, weight_decay=TAU_DECAY, betas=BETAS),
        )
        return tuple(group for group in groups if group.parameters)

    def losses(self, inputs: Tensor, labels: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        towers = self.towers
        texts = towers.encode_text(towers.tokenize(self.draw_sentences(labels)))  # [batch, dim]
        images = towers.encode_image(inputs)  # [batch, dim]
        with torch.autocast(images.device.type, enabled=False):
            cosine = F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
            return bag_losses(self.log_scale.exp() * cosine / self.tau, labels)

    def after_epoch(self, epoch: int, epochs: int) -> None:
        tau = float(self.tau.detach())
        if tau <= 0:
            raise TrainingError(f"{self.name}'s tau fell to {tau:.3g} in epoch {epoch + 1}: lower tau_lr.")

    def training_state(self) -> dict[str, Tensor]:
        return {"draws": self._draws.get_state()}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        self._draws.set_state(state["draws"])

    # --- prediction ---------------------------------------------------------------------------------------------------

    def sentence_weights(self) -> Tensor:
        """Unit features [sentences, dim] of the current classes' sentences, remembered where no gradient is wanted."""
        if torch.is_grad_enabled():
            return self._encode_sentences()
        key = [(id(value), value._version, value.device, value.dtype) for value in self.parameters()]
        if self._memo is None or self._memo[0] != key:
            self._memo = (key, self._encode_sentences())
        return self._memo[1]

    def _encode_sentences(self) -> Tensor:
        towers = self.towers
        return F.normalize(towers.encode_text(towers.tokenize(self._sentences)).float(), dim=-1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Log of each class's mean probability over its sentences, up to a number per image that softmax takes away."""
        features = self.towers.encode_image(inputs)
        with torch.autocast(features.device.type, enabled=False):
            cosine = F.normalize(features.float(), dim=-1) @ self.sentence_weights().T  # [batch, sentences]
            return mean_log_probabilities(self.log_scale.exp() * cosine, self._owners, self._sizes)

    def fold(self) -> Fold:
        scale = float(self.log_scale.detach().exp())
        rows = self.sentence_weights()
        head = SentenceHead(rows, self._owners, len(self._sizes), scale=scale, how="log-mean")
        return Fold(head, self.tuned.image_copy(self.backbone))


def shortened(sentence: str, words: int) -> str:
    """A sentence without its first words; all of it where nothing would be left."""
    kept = sentence.split()[words:]
    return " ".join(kept) if kept else sentence


def mean_log_probabilities(logits: Tensor, owners: Tensor, sizes: Tensor) -> Tensor:
    """Sentence logits [batch, sentences] to class logits [batch, classes]: log of the mean of exp over a class.

    Args:
        logits: scale · cosine of each sentence.
        owners: int64 [sentences], class of each.
        sizes: int64 [classes], sentences of each.
    """
    places = owners.expand_as(logits)
    peaks = torch.full((len(logits), len(sizes)), -torch.inf, dtype=logits.dtype, device=logits.device)
    peaks = peaks.scatter_reduce(1, places, logits.detach(), "amax")  # [batch, classes], keeps every exp in range
    total = torch.zeros_like(peaks).scatter_add(1, places, (logits - peaks.gather(1, places)).exp())
    return peaks + total.log() - sizes.log()
