"""Cross-modal: a linear head, or an adapter and a head, trained on images and texts alike.

Source: arXiv 2301.06267, Sec. 3; cross_modal sheet; reference code linzhiqiu/cross_modal_adaptation, train.py.
Differs from the reference: all stored views are trained on (its loop keeps the last one only); the adapter's width
follows the backbone (512 and 1024 there); halves of a batch that can't be filled are cut (skipped there).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from adaptkit.errors import ConfigError
from adaptkit.methods import methods
from adaptkit.methods.adapters._cross_modal import CrossModalMethod, HeadConfig
from adaptkit.methods.base import draw_linear
from adaptkit.methods.folding import Bottleneck

Grid = tuple[Sequence[float], Sequence[float], Sequence[int]]

GRIDS: dict[str, Grid] = {
    "linear": ((1e-3, 1e-4), (0.0, 1e-2, 1e-4), (8, 32)),
    "adapter": ((1e-4, 1e-5, 1e-6, 1e-7), (0.0, 1e-3, 1e-5), (8,)),
}
"""Learning rates, weight decays and batch sizes that a variant's search tries."""

REDUCTION = 4


@dataclass(frozen=True)
class CrossModalConfig(HeadConfig):
    """Settings of cross-modal adaptation."""

    variant: Literal["linear", "adapter"] = field(
        default="linear", metadata={"help": "linear (a head), or adapter (CLIP-Adapter's bottleneck before the head)."}
    )
    ratio: float = field(default=0.2, metadata={"help": "Share of the adapted feature, in the adapter variant."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in GRIDS:
            raise ConfigError(
                f"variant is {self.variant!r}, but must be linear or adapter (partial fine-tuning is the method"
                " cross-modal-partial)."
            )
        if not 0 <= self.ratio <= 1:
            raise ConfigError(f"ratio is {self.ratio}, but must lie between 0 and 1.")


@methods.register("cross-modal")
class CrossModal(CrossModalMethod):
    """A head trained on images and texts alike, from the text features; with an adapter before it on request."""

    name = "cross-modal"
    config_class = CrossModalConfig
    config: CrossModalConfig

    def build(self) -> None:
        super().build()
        self.searched = GRIDS[self.config.variant]
        if self.config.variant == "adapter":
            dim = self.backbone.spec.embed_dim
            hidden = max(1, dim // REDUCTION)
            self.down = draw_linear(dim, hidden, self.generator, bias=False)
            self.up = draw_linear(hidden, dim, self.generator, bias=False)

    def fold_mixing(self) -> Bottleneck | None:
        if self.config.variant == "linear":
            return None
        return Bottleneck(self.down.weight, self.up.weight, self.config.ratio, normalise=True)

    def mixed(self, unit: Tensor) -> Tensor:
        """Not normalised again behind the adapter."""
        if self.config.variant == "linear":
            return unit
        adapted = F.relu(self.up(F.relu(self.down(unit))))
        return self.config.ratio * adapted + (1 - self.config.ratio) * unit
