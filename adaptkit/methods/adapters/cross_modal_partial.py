"""Cross-modal partial fine-tuning: a copy of the image tower's last block, and a head, trained on images and texts.

What enters the last block never changes, so it is computed once for all training images (as long as it fits into
memory) and the blocks before it don't run in training. The text tower stays frozen.

Source: arXiv 2301.06267, Sec. 4; cross_modal sheet; reference code linzhiqiu/cross_modal_adaptation, train.py.
Differs from the reference: a copy is trained, the backbone keeps its own; ResNets (whose attention pool is trained
there) can't be opened and are refused; the plain image is trained on beside its mirrored view.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from adaptkit.backbones.tower import ImageTower
from adaptkit.methods import methods
from adaptkit.methods.adapters._cross_modal import CrossModalMethod, Examples, HeadConfig
from adaptkit.methods.folding import rebuilt_tower
from adaptkit.types import Inputs, Reads

CACHE_BYTES = 2**31
"""Room for the tokens that enter the last block; where there would be more, they are computed in every step."""

_BATCH = 64
_END = ("ln_post.", "pool_head.", "projection.")


@dataclass(frozen=True)
class CrossModalPartialConfig(HeadConfig):
    """Settings of partial fine-tuning."""

    lr: float = field(default=1e-5, metadata={"help": "Learning rate without a search."})
    weight_decay: float = field(default=1e-3, metadata={"help": "Weight decay without a search."})
    scale: float = field(default=54.598150033, metadata={"help": "Factor of the cosine; exp(4), a constant."})


@methods.register("cross-modal-partial")
class CrossModalPartial(CrossModalMethod):
    """The image tower's last block, final norm and projection, and a head, trained on images and texts alike.

    Attributes:
        tail: The copy that is trained; a tower of one block that takes tokens.
    """

    name = "cross-modal-partial"
    config_class = CrossModalPartialConfig
    config: CrossModalPartialConfig
    reads: ClassVar[Reads] = "images"
    searched = ((1e-5, 1e-6, 1e-7), (0.0, 1e-3, 1e-5), (8,))

    def build(self) -> None:
        self.backbone.require_open(self.name, image=True)
        super().build()
        self.tail = copy_tail(self.tower)

    @property
    def tower(self) -> ImageTower:
        return cast(ImageTower, self.backbone.image_tower)

    @torch.no_grad()
    def tokens(self, pixels: Tensor) -> Tensor:
        """What enters the last block, [batch, n, width], of pixels [batch, 3, h, w]; frozen."""
        return self.tower.hidden(pixels, stop=self.tower.layers - 1)

    def image_features(self, selected: Tensor) -> Tensor:
        features: Tensor = self.tail.pool(selected)
        return features

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head_logits(self.image_features(self.tokens(inputs)), self.current_head())

    def fold_tower(self) -> ImageTower:
        """The backbone's tower with the trained end in place of its own."""
        state = {name: value for name, value in self.tower.state_dict().items() if not name.startswith(_END)}
        last = f"blocks.{self.tower.layers - 1}."
        for name, value in self.tail.state_dict().items():
            state[name.replace("blocks.0.", last)] = value.detach().clone()
        return rebuilt_tower(self.tower, state)

    def examples(self, inputs: Inputs, views: int) -> Examples:
        """Tokens that enter the last block, of all images in the first `views` views, kept where they fit."""
        images, device = len(inputs.labels), self.backbone.device
        tower = self.tower
        per_image = (tower.num_patches + int(tower.shape.class_token)) * tower.width * 4

        def compute(rows: Tensor) -> Tensor:
            return self._tokens_of(inputs, rows.cpu() % images, torch.div(rows.cpu(), images, rounding_mode="floor"))

        labels = inputs.labels.repeat(views)
        if len(labels) * per_image > CACHE_BYTES:
            return Examples(compute, labels)
        kept = torch.cat([compute(rows) for rows in torch.arange(len(labels)).split(_BATCH)])
        return Examples(lambda rows: kept[rows.to(device)], labels)

    def _tokens_of(self, inputs: Inputs, images: Tensor, views: Tensor) -> Tensor:
        """Tokens of images [k], each in its own view [k], in that order."""
        parts = [inputs.select(images[index : index + 1], int(view)) for index, view in enumerate(views.tolist())]
        pixels = torch.cat(parts).to(self.backbone.device)
        return self.tokens(pixels)


def copy_tail(tower: ImageTower) -> ImageTower:
    """The end of an image tower from its last block on, copied, as a tower of one block without an embedding."""
    shape = replace(tower.shape, blocks=replace(tower.shape.blocks, layers=1))
    with torch.device("meta"), torch.random.fork_rng(devices=()):  # its own draws must not move torch's generator
        tail = ImageTower(shape)
    tail.blocks = nn.ModuleList([copy.deepcopy(tower.blocks[-1])])
    tail.ln_post = copy.deepcopy(tower.ln_post)
    tail.pool_head = copy.deepcopy(tower.pool_head)
    tail.projection = copy.deepcopy(tower.projection)
    for name in ("patch_embedding", "class_embedding", "positional_embedding", "ln_pre"):
        delattr(tail, name)
    return tail.requires_grad_(True)
