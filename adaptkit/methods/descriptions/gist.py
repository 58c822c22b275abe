"""GIST: captions matched to each training image, towers fine-tuned on the pairs, and a linear probe on what they see.

Stage 1 gives each image the captions of its own class that it resembles most. Stage 2, on request, fine-tunes both
towers contrastively on these pairs. Stage 3 is a linear probe on image features; without stage 2 it is a probe on the
frozen backbone's, and captions have no part in its answers.

Source: arXiv 2307.11315; gist sheet; reference code emu1729/GIST.
Kept from the reference: `targets="identity"` takes every other pair of a batch as a negative, another caption of the
same image too; `targets="bags"` counts all pairs of a class as positives (adaptclipzs sheet). Adam's weight decay is
part of the gradient.
Differs from the reference: weights stay in fp32 (rounded to fp16 after each step there); captions are matched by the
backbone itself (by another one there) and aren't shortened by a language model; without validation images the probe's
last epoch is kept; novel classes are answered zero-shot by the towers as tuned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.backbones.base import Backbone
from adaptkit.errors import ConfigError, DataError
from adaptkit.methods import methods
from adaptkit.methods._tuned import TunedWeights
from adaptkit.methods.adapters.linear_probe import LinearProbe, LinearProbeConfig
from adaptkit.methods.base import (
    GradientMethod,
    MethodConfig,
    ParameterGroup,
    draw_linear,
    progress_of,
    read_all,
    zero_shot_weights,
)
from adaptkit.methods.descriptions._sentences import sentence_features
from adaptkit.methods.descriptions.adaptclipzs import bag_losses
from adaptkit.methods.folding import Fold, MatrixHead
from adaptkit.types import FitTask, Inputs, ProgressCallback, TensorInputs, TrainingLoop, TrainingSettings

BETAS = (0.9, 0.98)
_IMAGES_AT_ONCE = 64


@dataclass(frozen=True)
class GISTConfig(MethodConfig):
    """Settings of GIST."""

    topk: int = field(default=5, metadata={"help": "Captions matched to each image, of its own class."})
    captions: int = field(default=4, metadata={"help": "Matched captions that each image is trained with."})
    fine_tune: bool = field(
        default=False, metadata={"help": "Fine-tune both towers on images and captions before the probe (slow)."}
    )
    targets: Literal["identity", "bags"] = field(
        default="identity", metadata={"help": "identity (only the pair itself matches) or bags (its whole class does)."}
    )
    solver: Literal["sgd", "lbfgs"] = field(
        default="sgd", metadata={"help": "The probe's: sgd (the paper's) or lbfgs (linear-probe's, C searched)."}
    )
    probe_epochs: int = field(
        default=1000, metadata={"help": "Epochs of the probe's sgd; the best on validation stays."}
    )
    probe_lr: float = field(default=0.5, metadata={"help": "Learning rate of the probe's sgd."})
    probe_batch: int = field(default=64, metadata={"help": "Images per step of the probe's sgd."})

    def __post_init__(self) -> None:
        for name, known in (("targets", ("identity", "bags")), ("solver", ("sgd", "lbfgs"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: choose {' or '.join(known)}.")
        for name in ("topk", "captions", "probe_epochs", "probe_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        if self.captions > self.topk:
            raise ConfigError(f"captions is {self.captions}, but only topk = {self.topk} are matched: raise topk.")
        if not 0 < self.probe_lr < math.inf:
            raise ConfigError(f"probe_lr is {self.probe_lr}, but must be a positive number.")


def match_captions(
    image_features: Tensor, labels: Tensor, class_captions: Sequence[Tensor], topk: int = 5
) -> list[tuple[int, ...]]:
    """For each image its own class's most similar captions, by their place in the class's list, the best first.

    Args:
        image_features: Image features [n, dim], of any length.
        labels: int64 [n], class of each image.
        class_captions: Per class caption features [captions, dim].
        topk: At most how many; fewer where the class has fewer.
    """
    matched: list[tuple[int, ...]] = [()] * len(labels)
    units = F.normalize(image_features.float(), dim=-1)
    for owner, captions in enumerate(class_captions):
        mine = (labels == owner).nonzero()[:, 0]
        if not len(mine) or not len(captions):
            continue
        cosine = units[mine] @ F.normalize(captions.float(), dim=-1).T  # [images of the class, captions]
        best = cosine.topk(min(topk, len(captions)), dim=1).indices
        for image, places in zip(mine.tolist(), best.tolist(), strict=True):
            matched[image] = tuple(places)
    return matched


@dataclass(frozen=True)
class PairInputs:
    """Images once per caption: sample i is image `images[i]`, and its label is i itself.

    Args:
        inner: The images.
        images: int64 [samples].
    """

    inner: Inputs
    images: Tensor

    @property
    def labels(self) -> Tensor:
        return torch.arange(len(self.images))

    @property
    def num_views(self) -> int:
        return self.inner.num_views

    def select(self, indices: Tensor, view: int = 0) -> Tensor:
        return self.inner.select(self.images[indices], view)


@methods.register("gist")
class GIST(GradientMethod):
    """A linear probe, on request after fine-tuning both towers on captions matched to each image."""

    name = "gist"
    config_class = GISTConfig
    config: GISTConfig
    novel_classes = "zero-shot"
    reads_descriptions = "needed"
    writes_texts = True
    default_training = TrainingSettings(
        epochs=200,
        batch_size=20,
        optimiser="adam",
        lr=1e-6,
        weight_decay=1e-3,
        eps=1e-6,
        schedule="constant",
        warmup_epochs=0,
        views=10,
    )

    def build(self) -> None:
        classes, dim = len(self.fitted_names), self.backbone.spec.embed_dim
        self.weight = nn.Parameter(torch.zeros(classes, dim))
        self.bias = nn.Parameter(torch.zeros(classes))
        self.tuned: TunedWeights | None = None
        if self.config.fine_tune:
            self.reads = "images"  # type: ignore[misc]  # of this instance: its image tower isn't the frozen one
            self.tuned = TunedWeights(self.backbone, lambda name: True, self.name)
            self.log_scale = nn.Parameter(self.backbone.logit_scale.detach().float().log())
        self._texts: list[str] = []
        self._owners = torch.zeros(0, dtype=torch.long)
        self._novel_memo: tuple[Any, Tensor] | None = None

    @property
    def towers(self) -> Backbone:
        """The backbone with what was learned in its place."""
        return self.backbone if self.tuned is None else self.tuned.twin(self.backbone)

    def captions_of(self, name: str) -> list[str]:
        """The texts of a class, "class: caption"."""
        return [f"{name.replace('_', ' ')}: {caption}" for caption in self.descriptions[name]]

    # --- prediction ---------------------------------------------------------------------------------------------------

    def classes_changed(self) -> None:
        self._rows = None if self.uses_fallback else self.fitted_indices()

    def forward(self, inputs: Tensor) -> Tensor:
        features = inputs if self.tuned is None else self.towers.encode_image(inputs)
        if self._rows is None:
            return self.cosine_logits(features, self.zero_shot() if self.tuned is None else self._tuned_zero_shot())
        rows = self._rows.to(self.weight.device)
        return F.linear(features.to(self.weight.dtype), self.weight[rows], self.bias[rows])  # [batch, classes]

    def fold(self) -> Fold:
        tower = None if self.tuned is None else self.tuned.image_copy(self.backbone)
        if self._rows is None:
            return Fold(self.cosine_head(self.zero_shot() if self.tuned is None else self._tuned_zero_shot()), tower)
        rows = self._rows.to(self.weight.device)
        return Fold(MatrixHead(self.weight[rows], bias=self.bias[rows], normalise=False), tower)

    def _tuned_zero_shot(self) -> Tensor:
        """The zero-shot classifier of the tuned towers [classes, dim], remembered."""
        key = (self.texts_key, [(id(value), value._version) for value in self.parameters()])
        if self._novel_memo is None or self._novel_memo[0] != key:
            with torch.no_grad():
                weights = zero_shot_weights(self.towers, self.class_names, self.templates)
            self._novel_memo = (key, weights)
        return self._novel_memo[1]

    # --- fitting ------------------------------------------------------------------------------------------------------

    def fit(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        """Match, fine-tune where that is asked for, and fit the probe on view 0."""
        self.set_classes(self.fitted_names)
        _check_task(self.name, task)
        matched = self._matched(task)
        report: dict[str, Any] = {"captions_matched": sum(map(len, matched)), "fine_tuned": self.tuned is not None}
        if self.tuned is not None:
            if loop is None:
                raise ConfigError(f"{self.name} fine-tunes by gradient: hand its fit a loop (adaptkit.training.loop).")
            report |= loop(self, self._pairs(task, matched))
        train = TensorInputs(self._features(task.train)[None], task.train.labels)
        val = None
        if task.val is not None and len(task.val.labels):
            val = TensorInputs(self._features(task.val)[None], task.val.labels)
        return report | self._probe(FitTask(task.class_names, train, val, task.seed), loop)

    def _matched(self, task: FitTask) -> list[tuple[int, ...]]:
        """Stage 1, by the frozen backbone."""
        by_class = [list(self.descriptions[name]) for name in self.fitted_names]
        features = sentence_features(self.backbone, [caption for captions in by_class for caption in captions])
        images = self._features(task.train, self.backbone).to(features.device)
        captions = torch.split(features, [len(captions) for captions in by_class])
        return match_captions(images, task.train.labels.to(features.device), captions, self.config.topk)

    def _pairs(self, task: FitTask, matched: Sequence[tuple[int, ...]]) -> FitTask:
        """Each image with its first captions, as a task whose labels count the pairs."""
        labels = task.train.labels.tolist()
        pairs = [(image, place) for image, places in enumerate(matched) for place in places[: self.config.captions]]
        texts = [self.captions_of(name) for name in self.fitted_names]
        self._texts = [texts[labels[image]][place] for image, place in pairs]
        self.backbone.tokenize(list(dict.fromkeys(self._texts)))  # one that doesn't fit is refused before training
        images = torch.tensor([image for image, _ in pairs])
        self._owners = task.train.labels.cpu()[images]
        samples = tuple(str(index) for index in range(len(pairs)))
        return FitTask(samples, PairInputs(task.train, images), None, task.seed)

    def parameter_groups(self) -> tuple[ParameterGroup, ...]:
        """The towers and the scale; the probe comes after them."""
        if self.tuned is None:
            return ()
        return (ParameterGroup((*self.tuned.parameters(), self.log_scale), betas=BETAS),)

    def losses(self, inputs: Tensor, labels: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        """Stage 2's, where `labels` count the pairs of image and caption."""
        towers, places = self.towers, labels.tolist()
        texts = towers.encode_text(towers.tokenize([self._texts[place] for place in places]))  # [batch, dim]
        images = towers.encode_image(inputs)  # [batch, dim]
        with torch.autocast(images.device.type, enabled=False):
            cosine = F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T  # [batch, batch]
            positives = labels if self.config.targets == "identity" else self._owners[places].to(labels.device)
            terms = bag_losses(self.log_scale.exp() * cosine, positives)
        return {name: term / 2 for name, term in terms.items()}

    @torch.no_grad()
    def _features(self, inputs: Inputs, encoder: Backbone | None = None) -> Tensor:
        """Features [n, dim] of plain views: as given, or by an encoder, our own as tuned where none is named."""
        if self.tuned is None:
            return read_all(inputs)
        encoder = encoder or self.towers
        parts = []
        for indices in torch.split(torch.arange(len(inputs.labels)), _IMAGES_AT_ONCE):
            parts.append(encoder.encode_image(inputs.select(indices).to(self.backbone.device)).float())
        features = torch.cat(parts).cpu()
        return read_all(TensorInputs(features[None], inputs.labels))  # refuses what isn't finite

    def _probe(self, task: FitTask, loop: TrainingLoop | None) -> dict[str, Any]:
        """Stage 3, on features."""
        if self.config.solver == "lbfgs":
            probe = LinearProbe(self.backbone, self.fitted_names, config=LinearProbeConfig())
            report = probe.fit(task, loop)
            weight, bias = probe.weight.detach(), probe.bias.detach()
        else:
            weight, bias, report = probe_by_sgd(task, self.config, self.generator, progress_of(loop))
        with torch.no_grad():
            self.weight.copy_(weight)
            self.bias.copy_(bias)
        return report


def probe_by_sgd(
    task: FitTask, config: GISTConfig, numbers: torch.Generator, progress: ProgressCallback
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Weight [classes, dim] and bias [classes] of the epoch with the best validation accuracy, ties: the later one.

    Without validation images it is the last epoch.
    """
    features, labels = read_all(task.train).cpu(), task.train.labels.cpu()
    head = draw_linear(features.shape[1], len(task.class_names), numbers)
    optimiser = torch.optim.SGD(head.parameters(), lr=config.probe_lr)
    val = None if task.val is None else (read_all(task.val).cpu(), task.val.labels.cpu())
    best, kept, kept_epoch = -1.0, head.state_dict(), config.probe_epochs
    for epoch in range(config.probe_epochs):
        if epoch % 50 == 0:
            progress("gist: probe", epoch, config.probe_epochs)
        for indices in torch.split(torch.randperm(len(labels), generator=numbers), config.probe_batch):
            optimiser.zero_grad()
            with torch.enable_grad():
                torch.autograd.backward(F.cross_entropy(head(features[indices]), labels[indices]))
            optimiser.step()
        if val is not None:
            accuracy = accuracy_of(head, *val)
            if accuracy >= best:
                best, kept_epoch = accuracy, epoch + 1
                kept = {name: value.clone() for name, value in head.state_dict().items()}
    report: dict[str, Any] = {
        "probe_epochs": config.probe_epochs,
        "probe_epoch_kept": kept_epoch,
        "searched": val is not None,
    }
    if val is not None:
        report |= {"val_accuracy": best, "val_images": len(val[1])}
    return kept["weight"], kept["bias"], report


@torch.no_grad()
def accuracy_of(head: nn.Linear, features: Tensor, labels: Tensor) -> float:
    """Share of features [n, dim] that a head answers right."""
    return float((head(features).argmax(dim=1) == labels).float().mean())


def _check_task(name: str, task: FitTask) -> None:
    if len(task.class_names) < 2:
        raise DataError(f"{name} needs at least two classes to tell apart: add another class.")
    present = set(task.train.labels.tolist())
    absent = [one for index, one in enumerate(task.class_names) if index not in present]
    if absent:
        raise DataError(
            f"{name}'s probe needs at least one image of every class, and there is none of {absent[0]!r}"
            f" ({len(absent)} such classes): add images, or leave the class out."
        )
