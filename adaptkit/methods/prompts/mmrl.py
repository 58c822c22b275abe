"""MMRL: tokens from one shared space stand in the upper layers of both towers and give a second image feature.

Source: arXiv 2503.08497, Sec. 3; mmrl sheet; reference code yunncheng/MMRL, trainers/mmrl.py and clip/model_mmrl.py.
Differs from the reference: text features remembered for evaluation are made anew after further training or loading
(the reference serves stale ones); the logits to answer with are chosen by whether the classes were fitted, or by the
attribute `branch`, never by a dataset's name; strengths that depend on the dataset are a recipe of their own, and an
unknown dataset doesn't silently get other ones; fp32 throughout unless autocast is asked for; without explicit layers
each tower begins in its own middle (6 of 12, as there); a tower without a causal mask keeps doing without one; with
several templates a class's weight is the mean over them, as for zero-shot; torch's own generator isn't moved.
Kept: the constant 100 in place of the logit scale, maps that start as copies of one draw, a random projection for the
second feature, logits (not probabilities) that are mixed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.backbones.tower import ImageTower, TextState
from adaptkit.errors import AdapterError, ConfigError
from adaptkit.methods import methods
from adaptkit.methods.base import ClassWeightMethod, GradientMethod, MethodConfig, draw_normal
from adaptkit.methods.folding import Fold, MatrixHead
from adaptkit.methods.prompts._deep import check_count
from adaptkit.methods.prompts._representation import (
    FIRST,
    SHARED_TOKENS,
    ReadOut,
    ResidualMaps,
    SeparateMaps,
    entry,
    mapped_layers,
    open_class_token_image,
    open_started_text,
    second_projection,
    template_rows,
    token_edits,
    token_layers,
)
from adaptkit.types import FitTask, Reads, TrainingSettings

INITIAL_STD = 0.02

Branch = Literal["by-classes", "class", "fused"]
"""Which logits MMRL answers with: fused where all classes were fitted and the class feature's otherwise, or one set."""


def check_share(name: str, value: float) -> None:
    """Refuse a share outside 0 … 1.

    Raises:
        ConfigError: It is.
    """
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} is {value}, but must be between 0 and 1.")


@dataclass(frozen=True)
class MMRLConfig(MethodConfig):
    """Settings of MMRL."""

    num_tokens: int = field(default=5, metadata={"help": "Representation tokens in each tower."})
    width: int = field(default=512, metadata={"help": "Width of the space that both towers' tokens come from."})
    first_layer: int = field(
        default=0, metadata={"help": "First layer with tokens, counted from 1; 0: each tower's middle (6 of 12)."}
    )
    last_layer: int = field(
        default=0, metadata={"help": "Last layer with tokens of its own, counted from 1; 0: each tower's last."}
    )
    alpha: float = field(default=0.7, metadata={"help": "Share of the class feature in loss and fused logits."})
    consistency_weight: float = field(
        default=1.0, metadata={"help": "Weight λ of what keeps both features near the frozen backbone's."}
    )
    scale: float = field(default=100.0, metadata={"help": "Factor of the cosines, in place of the logit scale."})

    def __post_init__(self) -> None:
        check_count("num_tokens", self.num_tokens)
        check_count("width", self.width)
        check_count("first_layer", self.first_layer, 0)
        check_count("last_layer", self.last_layer, 0)
        if self.last_layer and self.first_layer > self.last_layer:
            raise ConfigError(
                f"first_layer is {self.first_layer} and last_layer {self.last_layer}: choose a last_layer that is no"
                " smaller than first_layer."
            )
        check_share("alpha", self.alpha)
        if not 0 <= self.consistency_weight < math.inf:
            raise ConfigError(f"consistency_weight is {self.consistency_weight}, but must be 0 or more.")
        if not 0 < self.scale < math.inf:
            raise ConfigError(f"scale is {self.scale}, but must be a positive number.")


@methods.register("mmrl")
class MMRL(ClassWeightMethod, GradientMethod):
    """Multi-modal representation learning.

    Trains `tokens` [K, width], `text_maps` and `image_maps` (from the tokens to those of each layer), and `projection`
    [image width, dim] of the second feature.
    """

    name = "mmrl"
    title: ClassVar[str] = "MMRL"
    config_class = MMRLConfig
    config: MMRLConfig
    reads: ClassVar[Reads] = "images"
    wants_frozen = True
    default_training = TrainingSettings(epochs=50, optimiser="adamw", lr=1e-3, views=10, crop_scale=0.5)
    _below: TextState | None = None
    _branch: Branch = "by-classes"

    def build(self) -> None:
        config, spec = self.config, self.backbone.spec
        image = self._image
        _, text = open_started_text(self.backbone, self.title)
        ends = (config.first_layer, config.last_layer)
        self._text_layers = token_layers(*ends, text.layers, "text", spec.name)
        self._image_layers = token_layers(*ends, image.layers, "image", spec.name)
        self.tokens = draw_normal((config.num_tokens, config.width), INITIAL_STD, self.generator)
        self.text_maps = self.make_maps(len(self._text_layers), text.width)
        self.image_maps = self.make_maps(len(self._image_layers), image.width)
        self.build_projection(image.width, spec.embed_dim)

    def make_maps(self, layers: int, outputs: int) -> SeparateMaps | ResidualMaps:
        """From the shared tokens to those of each of a tower's layers."""
        return SeparateMaps(layers, self.config.width, outputs, self.generator)

    def build_projection(self, width: int, dim: int) -> None:
        """What projects the second feature, from the image tower's width to the joint space."""
        self.projection = draw_normal((width, dim), width**-0.5, self.generator)

    def project(self, pooled: Tensor) -> Tensor:
        """The second feature [batch, dim] of the tokens' mean [batch, image width]."""
        return pooled @ self.projection.to(pooled.dtype)

    @property
    def share(self) -> float:
        """Share of a layer's own tokens among what enters it; the rest comes from the layer before."""
        return 1.0

    @property
    def branch(self) -> Branch:
        """Which logits `forward` gives. "by-classes": fused where all current classes were fitted and the images are
        those of the dataset fitted on, else "class": also for the same names on shifted images."""
        return self._branch

    @branch.setter
    def branch(self, branch: Branch) -> None:
        if branch not in get_args(Branch):
            raise ConfigError(f"branch {branch!r} is unknown: choose {', '.join(get_args(Branch))}.")
        self._branch = branch

    # --- texts --------------------------------------------------------------------------------------------------------

    def classes_changed(self) -> None:
        super().classes_changed()
        backbone, _ = open_started_text(self.backbone, self.title)
        self._rows = template_rows(backbone, self.class_names, self.templates)
        self._below = None

    def text_below(self) -> TextState:
        """The prompts' activations on entry to the first layer with tokens: computed once for a class list.

        In fp32 also within autocast, since evaluation reads them too.
        """
        device = self.backbone.device
        if self._below is None or self._below.suffix.device != device:
            _, text = open_started_text(self.backbone, self.title)
            # made in inference mode, they couldn't serve training
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
                embedded = text.embed(self._rows.to(device))
                self._below = text.advance(embedded, stop=self._text_layers[0]).detach()
        return self._below

    def class_weights(self) -> Tensor:
        _, text = open_started_text(self.backbone, self.title)
        edits = token_edits(self.text_maps(self.tokens), self._text_layers, self.share)
        features = F.normalize(text.pool(self.text_below(), edits)[0].float(), dim=-1)  # [templates · classes, dim]
        if len(self.templates) == 1:
            return features
        by_template = features.unflatten(0, (len(self.templates), len(self.class_names)))
        return F.normalize(by_template.mean(dim=0), dim=-1)  # [classes, dim]

    # --- images -------------------------------------------------------------------------------------------------------

    @property
    def _image(self) -> ImageTower:
        return open_class_token_image(self.backbone, self.title)

    def image_below(self, pixels: Tensor) -> Tensor:
        """Tokens [batch, n, image width] on entry to the first layer with tokens of ours; nothing below it learns."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and pixels.requires_grad):
            return self._image.hidden(pixels, stop=self._image_layers[0])

    def _read_out(self, below: Tensor, count: int) -> Tensor:
        """Normalised outputs [batch, count, image width] of the class token and the representation tokens behind it."""
        image = self._image
        edits = token_edits(self.image_maps(self.tokens), self._image_layers, self.share)
        rows = image.tokens(below, edits, start=self._image_layers[0], rows=range(count))
        normed: Tensor = image.ln_post(rows) if image.shape.norm_after_pool else rows
        return normed

    def _both(self, below: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._read_out(below, FIRST + self.config.num_tokens)
        return self._image.projection(rows[:, 0]), self.project(rows[:, FIRST:].mean(dim=1))

    def encode_both(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Class feature and representation feature, [batch, dim] each, unnormalised."""
        return self._both(self.image_below(pixels))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Unnormalised class feature [batch, dim]."""
        feature: Tensor = self._image.projection(self._read_out(self.image_below(pixels), 1)[:, 0])
        return feature

    # --- logits and loss ----------------------------------------------------------------------------------------------

    def _scaled_cosine(self, features: Tensor, weights: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return self.config.scale * (F.normalize(features.float(), dim=-1) @ weights.float().T)  # [batch, classes]

    def _branches(self, features: tuple[Tensor, Tensor], weights: Tensor) -> dict[str, Tensor]:
        of_class, of_tokens = (self._scaled_cosine(feature, weights) for feature in features)
        alpha = self.config.alpha
        fused = alpha * of_class + (1 - alpha) * of_tokens
        return {"class": of_class, "representation": of_tokens, "fused": fused}

    def branch_logits(self, pixels: Tensor) -> dict[str, Tensor]:
        """All three sets of logits [batch, classes]: "class", "representation" and "fused"."""
        return self._branches(self.encode_both(pixels), self.folded_weights())

    def answers_fused(self) -> bool:
        """Whether `forward` gives the fused logits for the current classes."""
        if self.branch == "by-classes":
            return self.other is None and set(self.class_names) <= set(self.fitted_names)
        return self.branch == "fused"

    def forward(self, inputs: Tensor, branches: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits [batch, classes] of pixels [batch, 3, h, w], from all `branches` where they were computed already."""
        if branches is None and not self.answers_fused():
            return self._scaled_cosine(self.encode_image(inputs), self.folded_weights())  # one token to read
        branches = self.branch_logits(inputs) if branches is None else branches
        return branches["fused" if self.answers_fused() else "class"]

    def scale_and_bias(self) -> tuple[float, float]:
        return self.config.scale, 0.0

    def fold(self) -> Fold:
        """Both features mixed before the matrix: alpha · s·cosine + (1 - alpha) · s·cosine' is one product."""
        edits = token_edits(self.image_maps(self.tokens), self._image_layers, self.share)
        scale, _ = self.scale_and_bias()
        if not self.answers_fused():
            return Fold(MatrixHead(self.folded_weights(), scale=scale), ReadOut(self._image, edits))
        second = second_projection(self.project, self._image.width, self.backbone.device)
        tower = ReadOut(self._image, edits, second, tokens=self.config.num_tokens, alpha=self.config.alpha)
        return Fold(MatrixHead(self.folded_weights(), scale=scale, normalise=False), tower)

    def prepare(self, task: FitTask) -> None:
        self.zero_shot()  # before the loop, whose autocast would make anchors in half precision

    def losses(self, inputs: Tensor, labels: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        below = self.image_below(inputs)
        features, weights = self._both(below), self.class_weights()
        branches = self._branches(features, weights)
        self(inputs, branches)  # computes nothing; the loop's accuracy listens to what forward gives
        if frozen is None:  # the frozen tower goes the same way up to here
            with torch.no_grad():
                frozen = self._image.pool(below, start=self._image_layers[0])
        alpha, strength = self.config.alpha, self.config.consistency_weight
        image = F.cosine_similarity(features[0].float(), self.frozen_features(inputs, frozen), dim=-1)  # [batch]
        text = F.cosine_similarity(weights, self.zero_shot().float(), dim=-1)  # [classes]
        return {
            "class_cross_entropy": alpha * F.cross_entropy(branches["class"], labels),
            "representation_cross_entropy": (1 - alpha) * F.cross_entropy(branches["representation"], labels),
            "image_consistency": strength * (1 - image.mean()),
            "text_consistency": strength * (1 - text.mean()),
        }

    # --- checkpoints of the official release --------------------------------------------------------------------------

    def reference_key(self, key: str) -> str:
        if key == "tokens":
            return SHARED_TOKENS
        if key == "projection":
            return "image_encoder.proj_rep"
        maps, rest = key.split(".", 1)  # "text_maps.3.weight"
        return f"{SHARED_TOKENS}_r2{'t' if maps == 'text_maps' else 'v'}proj.{rest}"

    @classmethod
    def reference_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        tokens = entry(state, SHARED_TOKENS)
        return {} if tokens is None or tokens.dim() != 2 else {"num_tokens": len(tokens), "width": tokens.shape[1]}

    def load_reference_state(self, state: Mapping[str, Tensor]) -> None:
        own = {"text": len(self.text_maps), "image": len(self.image_maps)}
        for tower, count in mapped_layers(state).items():
            if count not in (0, own[tower]):  # without any, the message about the missing entry says more
                raise AdapterError(
                    f"The checkpoint has tokens for {count} layers of the {tower} tower, these settings for"
                    f" {own[tower]}: set first_layer and last_layer to those it was trained with."
                )
        super().load_reference_state(state)
