"""PromptSRC: independent prompts in both towers that are kept near the frozen model, and averaged over the epochs.

Source: arXiv 2307.06948, Sec. 3; promptsrc sheet; reference code muzairkhattak/PromptSRC, trainers/promptsrc.py and
clip/model.py.
Differs from the reference: fp32 throughout (there it runs in fp16 only, with the text anchors in fp32 but rounded in
the teacher's logits); the average over the epochs takes in the prompts alone, in fp32 (there it takes in every tensor
of the model, each in its own dtype, so that CLIP's weights come back rounded: `averaging="reference"` repeats that, but
leaves the logit scale and the token embeddings of class names as they are: the one would change by fp32 rounding alone,
the others are read anew when the reference loads its files); a training that was interrupted averages the epochs it
finished (there it keeps the last epoch's prompts).
Kept: the divergence is divided by batch · classes, so it weighs less the more classes there are; 60 templates whose
features are averaged before they are normalised, for every dataset; teacher and student see the same view.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.backbones.tower import ImageTower, TextTower
from adaptkit.errors import AdapterError, BackboneError, ConfigError, DataError
from adaptkit.methods import methods
from adaptkit.methods._imagenet_templates import IMAGENET_TEMPLATES
from adaptkit.methods.base import render_prompts
from adaptkit.methods.folding import EditedTower
from adaptkit.methods.prompts._deep import image_edits, prompted_image
from adaptkit.methods.prompts._layout import open_image
from adaptkit.methods.prompts.ivlp import IVLP, IVLPConfig
from adaptkit.types import FitTask, TrainingSettings

Averaging = Literal["prompts", "reference", "none"]
T = TypeVar("T", ImageTower, TextTower)

MOST_EPOCHS = 100_000
"""More than any training has: what a file says of its epochs is checked against it."""


_PLAIN = "a photo of a {}."
TEACHER_TEMPLATES = (_PLAIN, *(template for template in IMAGENET_TEMPLATES[:60] if template != _PLAIN))
"""60 of the 80 templates that CLIP was evaluated with on ImageNet, in the order of the reference."""


@dataclass(frozen=True)
class PromptSRCConfig(IVLPConfig):
    """Settings of PromptSRC."""

    num_text_context: int = field(default=4, metadata={"help": "Prompt vectors per text layer."})
    num_image_context: int = field(
        default=4, metadata={"help": "Prompt vectors per image layer; 0 leaves the image tower as it is."}
    )
    text_depth: int = field(default=9, metadata={"help": "Text layers that get prompts, the first one included."})
    image_depth: int = field(
        default=9,
        metadata={"help": "Image layers that get prompts, the first one included; 0 leaves the image tower as it is."},
    )
    text_weight: float = field(
        default=25.0, metadata={"help": "Weight of the class weights' distance from the frozen model's."}
    )
    image_weight: float = field(
        default=10.0, metadata={"help": "Weight of the image features' distance from the frozen model's."}
    )
    averaging: Averaging = field(
        default="prompts",
        metadata={
            "help": "What is averaged over the epochs: the prompts; with reference also the frozen weights, in half"
            " precision, as the official code does (results carry rounded towers); or none."
        },
    )
    averaging_mean: float = field(default=30.0, metadata={"help": "Epoch (from 1) that weighs most in the average."})
    averaging_std: float = field(default=30.0, metadata={"help": "Spread of the average's weights, in epochs."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("text_weight", "image_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be 0 or more.")
        if self.averaging not in ("prompts", "reference", "none"):
            raise ConfigError(f"averaging {self.averaging!r} is unknown: choose prompts, reference or none.")
        if not abs(self.averaging_mean) <= MOST_EPOCHS:
            raise ConfigError(f"averaging_mean is {self.averaging_mean}, but must be the number of an epoch.")
        if not 1e-3 <= self.averaging_std <= MOST_EPOCHS:
            raise ConfigError(
                f"averaging_std is {self.averaging_std}, but must be a number of epochs, from 0.001 to {MOST_EPOCHS}."
            )


# --- averaging over epochs --------------------------------------------------------------------------------------------


def gaussian_weights(epochs: int, mean: float, std: float) -> list[float]:
    """Weights of epochs 1 … `epochs` that sum to 1, proportional to a normal density.

    Those of the first epochs of a longer training are the longer one's, scaled.

    Source: promptsrc sheet ("Gaussian prompt aggregation"). Computed from logarithms, so that a mean far behind the
    last epoch gives weights all the same.
    """
    logs = torch.tensor([_log_weight(epoch, mean, std) for epoch in range(1, epochs + 1)], dtype=torch.float64)
    weights: list[float] = logs.softmax(dim=0).tolist()
    return weights


def _log_weight(epoch: int, mean: float, std: float) -> float:
    return -((epoch - mean) ** 2) / (2 * std**2)


class RunningMean:
    """A weighted mean of lists of tensors that come one after the other, with weights given as logarithms."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.log_total = -math.inf

    def add(self, values: Sequence[Tensor], log_weight: float) -> None:
        """Take in the next list."""
        high, low = max(self.log_total, log_weight), min(self.log_total, log_weight)
        self.log_total = high + math.log1p(math.exp(low - high))
        share = math.exp(log_weight - self.log_total)
        if not self.values:
            self.values = [value.detach().clone() for value in values]
            return
        self.values = [torch.lerp(old, new.detach(), share) for old, new in zip(self.values, values, strict=True)]


def weighted_sum(values: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    """What the reference's average makes of a tensor's values: products and sums rounded to `dtype`; fp32."""
    total = values[0].to(dtype) * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = value.to(dtype) * weight + total
    return total.float()


def rounded_tower(tower: T, weights: Sequence[float]) -> T:
    """A copy of a frozen tower that has gone through the reference's average with these weights.

    The reference keeps linear layers, convolutions, attention and projections in fp16, the rest in fp32. Token
    embeddings are shared with the original: they are no part of what it averages.
    """
    shared = {id(p): p for name, p in tower.named_parameters() if "token_embedding" in name}
    copy = deepcopy(tower, dict(shared))  # the memo holds what is not to be copied
    for module in copy.modules():
        dtype = torch.float16 if isinstance(module, nn.Linear | nn.Conv2d) else torch.float32
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in shared:
                parameter.data = weighted_sum([parameter.detach()] * len(weights), weights, dtype)
    return copy


# --- the method -------------------------------------------------------------------------------------------------------


@methods.register("promptsrc")
class PromptSRC(IVLP):
    """Self-regulated prompts: `text_prompts[l]` and `image_prompts[l]` as in IVLP.

    With averaging "reference" `epoch_weights` [epochs], says how the towers are to be rounded; it is empty
    before the fit.
    """

    name = "promptsrc"
    config_class = PromptSRCConfig
    config: PromptSRCConfig
    wants_frozen = True
    default_training = TrainingSettings(epochs=50, batch_size=4, lr=2.5e-3, views=10)
    epoch_weights: Tensor
    _anchor_memo: tuple[Any, Tensor] | None = None
    _rounded: tuple[ImageTower, TextTower] | None = None

    def build(self) -> None:
        super().build()
        self._forget_epochs()
        if self.config.averaging == "reference":
            open_image(self.backbone, "PromptSRC with averaging reference")
            self._set_epoch_weights([])

    # --- losses -------------------------------------------------------------------------------------------------------

    def text_anchors(self) -> Tensor:
        """The frozen model's class weights [classes, dim], unit rows, from 60 templates; remembered for a class list.

        Raises:
            DataError: A class name doesn't fit into a template.
        """
        key = (self.class_names, self.backbone.device)
        if self._anchor_memo is None or self._anchor_memo[0] != key:
            # made in inference mode it couldn't serve training; under autocast it would be rounded
            device = self.backbone.device.type
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
                features = (self._template_features(template) for template in TEACHER_TEMPLATES)
                # the direction of the mean is that of the sum
                self._anchor_memo = (key, F.normalize(sum(features, torch.zeros(())), dim=-1))
        return self._anchor_memo[1]

    def _template_features(self, template: str) -> Tensor:
        """Unnormalised frozen features [classes, dim]; one template at a time shares its beginning among classes."""
        try:
            tokens = self.backbone.tokenize(render_prompts(self.class_names, template))
        except BackboneError as error:
            longest = max(self.class_names, key=len)
            raise DataError(
                f"Class name {longest!r} doesn't fit into PromptSRC's template {template!r}: shorten the name."
                f" ({error})"
            ) from error
        return self.backbone.encode_text(tokens).float()

    def losses(self, inputs: Tensor, labels: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        config, teacher, anchors = self.config, self.frozen_features(inputs, frozen), self.text_anchors()
        features = self.encode_image(inputs) if config.prompts_images else teacher
        weights = self.class_weights()
        logits = self(inputs, features=features, weights=weights)
        student = F.log_softmax(logits, dim=-1)  # [batch, classes]
        taught = F.log_softmax(self.cosine_logits(teacher, anchors), dim=-1)
        divergence = F.kl_div(student, taught, reduction="sum", log_target=True)  # of the teacher from the student
        return {
            "cross_entropy": F.cross_entropy(logits, labels),
            "text_consistency": config.text_weight * F.l1_loss(weights.float(), anchors),
            "image_consistency": config.image_weight * F.l1_loss(F.normalize(features.float(), dim=-1), teacher),
            "logit_consistency": divergence / student.numel(),
        }

    # --- averaging ----------------------------------------------------------------------------------------------------

    def prepare(self, task: FitTask) -> None:
        self._forget_epochs()
        if self.config.averaging == "reference":  # training itself runs on the exact towers
            self._set_epoch_weights([])

    def _forget_epochs(self) -> None:
        self._epochs, self._mean = 0, RunningMean()
        self._history: list[list[Tensor]] = []  # of averaging "reference", whose sums need the final weights

    def after_epoch(self, epoch: int, epochs: int) -> None:
        if self.config.averaging == "none":
            return
        self._epochs += 1
        if self.config.averaging == "reference":
            self._history.append([prompt.detach().clone() for prompt in self.parameters()])
        else:
            log_weight = _log_weight(epoch + 1, self.config.averaging_mean, self.config.averaging_std)
            self._mean.add(list(self.parameters()), log_weight)

    def training_state(self) -> dict[str, Tensor]:
        state = {"epochs": torch.tensor(self._epochs)}
        if self._mean.values:
            state["log_total"] = torch.tensor(self._mean.log_total, dtype=torch.float64)
        state |= {f"mean.{at}": value for at, value in enumerate(self._mean.values)}
        past = [(epoch, at, value) for epoch, values in enumerate(self._history) for at, value in enumerate(values)]
        return state | {f"epoch.{epoch}.{at}": value for epoch, at, value in past}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        def listed(start: str) -> list[Tensor]:
            count = sum(name.startswith(start) for name in state)
            return [state[f"{start}{at}"].to(self.backbone.device) for at in range(count)]

        self._epochs, self._mean.values = int(state["epochs"]), listed("mean.")
        self._mean.log_total = float(state["log_total"]) if self._mean.values else -math.inf
        reference = self.config.averaging == "reference"
        self._history = [listed(f"epoch.{epoch}.") for epoch in range(self._epochs if reference else 0)]

    def finish(self, task: FitTask) -> dict[str, Any]:
        """The average over the epochs that finished takes the place of the last epoch's prompts."""
        weights = gaussian_weights(self._epochs, self.config.averaging_mean, self.config.averaging_std)
        averaged = self._mean.values
        if self._history:
            # the reference keeps the first text prompt in fp16, the other prompts in fp32
            averaged = [
                weighted_sum(values, weights, torch.float16 if at == 0 else torch.float32)
                for at, values in enumerate(zip(*self._history, strict=True))
            ]
            self._set_epoch_weights(weights)
        with torch.no_grad():
            for prompt, value in zip(self.parameters() if averaged else (), averaged, strict=True):
                prompt.copy_(value)
        self._forget_epochs()
        return {"epoch_weights": weights}

    def _set_epoch_weights(self, weights: Sequence[float]) -> None:
        values = torch.tensor(weights, dtype=torch.float32, device=self.backbone.device)
        self.register_buffer("epoch_weights", values)
        self._rounded = self._memo = None

    def _rounded_towers(self) -> tuple[ImageTower, TextTower] | None:
        """Copies of the towers as the reference's average leaves them; None where the towers are used as they are."""
        if self.config.averaging != "reference" or not len(self.epoch_weights):
            return None
        if self._rounded is None or self._rounded[1].positional_embedding.device != self.backbone.device:
            weights = self.epoch_weights.tolist()
            with torch.inference_mode(False), torch.no_grad():
                image, text = super().image_tower(), super().text_tower()
                self._rounded = (rounded_tower(image, weights), rounded_tower(text, weights))
        return self._rounded

    def image_tower(self) -> ImageTower:
        towers = self._rounded_towers()
        return super().image_tower() if towers is None else towers[0]

    def text_tower(self) -> TextTower:
        towers = self._rounded_towers()
        return super().text_tower() if towers is None else towers[1]

    def encode_image(self, pixels: Tensor) -> Tensor:
        if self._rounded_towers() is None:
            return super().encode_image(pixels)
        return prompted_image(self.image_tower(), pixels, list(self.image_prompts))

    def fold_tower(self) -> nn.Module | None:
        if self._rounded_towers() is None:
            return super().fold_tower()
        return EditedTower(self.image_tower(), image_edits(list(self.image_prompts)))

    # --- state --------------------------------------------------------------------------------------------------------

    def resize_for(self, state: Mapping[str, Tensor]) -> None:
        weights = state.get("epoch_weights")
        if self.config.averaging != "reference" or weights is None:
            return
        fits = weights.dim() == 1 and len(weights) <= MOST_EPOCHS and weights.is_floating_point()
        if not fits or (len(weights) and not (bool((weights >= 0).all()) and abs(float(weights.sum()) - 1) < 1e-4)):
            raise AdapterError(
                f"The adapter's 'epoch_weights', of shape {tuple(weights.shape)}, can't be used: one finite number of 0"
                f" or more per epoch (at most {MOST_EPOCHS}) was expected, with sum 1. Save the adapter again."
            )
        self._set_epoch_weights(weights.tolist())

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        before = self.epoch_weights.tolist() if self.config.averaging == "reference" else None
        try:
            super().load_adapter_state(state)
        except AdapterError:
            if before is not None:  # a state that is refused changes nothing
                self._set_epoch_weights(before)
            raise

    def reference_key(self, key: str) -> str | None:
        return None if key == "epoch_weights" else super().reference_key(key)
