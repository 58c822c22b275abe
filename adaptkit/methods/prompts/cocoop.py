"""CoCoOp: context vectors shifted by what a small network makes of each image, so texts depend on the image.

Source: arXiv 2203.05557, Sec. 3.2; cocoop sheet; reference code KaiyangZhou/CoOp, trainers/cocoop.py.
Differs from the reference: fp32 throughout (there context and meta-net are fp16 without loss scaling); the images of a
batch go through the text tower together, in groups that memory holds (there one by one; the results are the same); a
phrase shorter than the context is refused (there it sets M silently). Batches of one image are the method's setting:
larger ones take fewer, smoother steps and give other results.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adaptkit.backbones.tower import VALUES_KEPT_PER_CHANNEL
from adaptkit.errors import UnsupportedError
from adaptkit.methods import methods
from adaptkit.methods.base import MethodConfig, draw_linear
from adaptkit.methods.folding import Fold
from adaptkit.methods.prompts._context import ContextMethod
from adaptkit.methods.prompts._deep import check_count, first_context
from adaptkit.types import TrainingSettings

REDUCTION = 16
"""How many times narrower than the features the meta-net's inside is."""

EVALUATION_BYTES = 1e8
"""What a group of images may take up without gradients: larger groups are slower on a CPU (1,000 classes: by half)."""


@dataclass(frozen=True)
class CoCoOpConfig(MethodConfig):
    """Settings of CoCoOp."""

    num_context: int = field(default=4, metadata={"help": "Learned context vectors."})
    context_init: str = field(
        default="a photo of a",
        metadata={
            "help": "Words before class names; the context starts from their first num_context tokens. Empty: random."
        },
    )

    def __post_init__(self) -> None:
        check_count("num_context", self.num_context)


@methods.register("cocoop")
class CoCoOp(ContextMethod):
    """Conditional context optimisation: `context` [M, width], and `meta_net` from a unit feature to a shift."""

    name = "cocoop"
    title = "CoCoOp"
    config_class = CoCoOpConfig
    config: CoCoOpConfig
    # no official few-shot setting exists (sheet); this is the base-to-novel one
    default_training = TrainingSettings(epochs=10, batch_size=1, views=10)

    def build(self) -> None:
        backbone, tower = self.open_text()
        self._phrase, self.context = first_context(
            backbone, self.config.context_init, self.config.num_context, self.generator
        )
        dim = self.backbone.spec.embed_dim
        hidden = max(1, dim // REDUCTION)
        layers = [
            ("linear1", draw_linear(dim, hidden, self.generator)),
            ("relu", nn.ReLU()),
            ("linear2", draw_linear(hidden, tower.width, self.generator)),
        ]
        self.meta_net = nn.Sequential(OrderedDict(layers))

    def image_contexts(self, features: Tensor) -> Tensor:
        """Each image's context vectors [batch, M, width], all of an image shifted alike, of features [batch, dim]."""
        shift = self.meta_net(F.normalize(features.float(), dim=-1))  # [batch, width]
        return self.context + shift[:, None]

    def image_class_weights(self, features: Tensor) -> Tensor:
        """Each image's own class weights [batch, classes, dim], unit rows, of features [batch, dim].

        It holds them all at once: `forward`, which needs logits alone, works through large batches in groups.
        """
        _, tower = self.open_text()
        contexts = self.image_contexts(features)
        return F.normalize(tower(self._rows.to(contexts.device), contexts), dim=-1)

    def forward(self, inputs: Tensor) -> Tensor:
        images = self._images_at_once()
        if len(inputs) <= images:
            return self._logits(inputs)
        groups = inputs.split(images)
        if torch.is_grad_enabled():  # each group's activations are computed again when its gradient is due
            return torch.cat([checkpoint(self._logits, group, use_reentrant=False) for group in groups])
        return torch.cat([self._logits(group) for group in groups])  # [batch, classes]

    def _logits(self, features: Tensor) -> Tensor:
        """Logits [batch, classes] of a group; fp32, as in `cosine_logits`."""
        weights = self.image_class_weights(features)
        with torch.autocast(features.device.type, enabled=False):
            cosine = (weights.float() @ F.normalize(features.float(), dim=-1)[:, :, None])[:, :, 0]  # [batch, classes]
            return self.backbone.logit_scale * cosine + self.backbone.logit_bias

    def fold(self) -> Fold:
        raise UnsupportedError(
            "cocoop can't be folded: every image shifts its text prompts, so the text tower runs for each of them. Keep"
            " the adapter folder, which 'adaptkit predict' reads, or train coop or kgcoop, which fold to a matrix."
        )

    def _images_at_once(self) -> int:
        """How many images' prompts go through the text tower together; of one that is too large it makes chunks."""
        _, tower = self.open_text()
        rows, learning = self._rows, torch.is_grad_enabled()
        tokens = rows.prefix + sum(length - rows.prefix for length in rows.lengths)
        kept = VALUES_KEPT_PER_CHANNEL * (tower.layers if learning else 1)
        kept += 4  # the embedded tokens, before and after contexts are put in and padding is taken out
        per_image = 4 * (tokens * tower.width * kept + 3 * len(rows.lengths) * self.backbone.spec.embed_dim)
        limit = tower.activation_bytes if learning else min(tower.activation_bytes, EVALUATION_BYTES)
        return max(1, int(limit / per_image))
