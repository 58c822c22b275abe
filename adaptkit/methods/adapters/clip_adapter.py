"""CLIP-Adapter: a bottleneck MLP on the image feature, mixed with the feature itself.

Source: arXiv 2110.04544, Sec. 3.2; clip_adapter sheet; reference code gaopengcuhk/CLIP-Adapter, clip_adapter.py.
Differs from the reference: the width follows the backbone (1024 there); text features are computed once (in every step
there); the ratio can be changed after training and, on request, chosen on validation shots (fixed at 0.2 there).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.errors import ConfigError
from adaptkit.methods import methods
from adaptkit.methods.adapters._texts import not_searched
from adaptkit.methods.base import ClassWeightMethod, GradientMethod, MethodConfig, draw_linear, read_all
from adaptkit.methods.folding import Bottleneck, Fold
from adaptkit.types import FitTask, TrainingSettings

SEARCHED_RATIOS = tuple(step / 10 for step in range(1, 10))


@dataclass(frozen=True)
class CLIPAdapterConfig(MethodConfig):
    """Settings of CLIP-Adapter."""

    ratio: float = field(default=0.2, metadata={"help": "Share of the adapted feature in the mix, 0 (zero-shot) to 1."})
    reduction: int = field(default=4, metadata={"help": "The bottleneck is the feature's width divided by this."})
    search_ratio: bool = field(
        default=False, metadata={"help": "After training, choose the ratio among 0.1 … 0.9 on the validation shots."}
    )

    def __post_init__(self) -> None:
        _check_ratio(self.ratio)
        if self.reduction < 1:
            raise ConfigError(f"reduction is {self.reduction}, but must be at least 1.")


def _check_ratio(ratio: float) -> None:
    if not 0 <= ratio <= 1:
        raise ConfigError(f"ratio is {ratio}, but must lie between 0 (zero-shot) and 1 (the adapted feature alone).")


@methods.register("clip-adapter")
class CLIPAdapter(ClassWeightMethod, GradientMethod):
    """feature ↦ ratio · relu(up(relu(down(feature)))) + (1 - ratio) · feature, before normalisation.

    Attributes:
        ratio: Float buffer []; set it with `set_ratio`.
    """

    name = "clip-adapter"
    config_class = CLIPAdapterConfig
    config: CLIPAdapterConfig
    # the trainer ships without a training config; this is the CoOp line's, which it was written for (sheet)
    default_training = TrainingSettings(epochs=200, views=10)
    ratio: Tensor

    def build(self) -> None:
        dim = self.backbone.spec.embed_dim
        hidden = dim // self.config.reduction
        if hidden < 1:
            raise ConfigError(
                f"reduction {self.config.reduction} leaves nothing of {dim} features: choose at most {dim}."
            )
        self.down = draw_linear(dim, hidden, self.generator, bias=False)
        self.up = draw_linear(hidden, dim, self.generator, bias=False)
        self.register_buffer("ratio", torch.tensor(float(self.config.ratio)))

    def set_ratio(self, ratio: float) -> None:
        """Mix differently from now on; 0 gives zero-shot exactly."""
        _check_ratio(ratio)
        self.ratio.fill_(ratio)

    def class_weights(self) -> Tensor:
        return self.zero_shot()

    def adapted(self, features: Tensor) -> Tensor:
        """The adapted branch alone, unnormalised, non-negative, [batch, dim]."""
        return F.relu(self.up(F.relu(self.down(features))))

    def forward(self, inputs: Tensor) -> Tensor:
        features = inputs.to(self.ratio.dtype)
        mixed = self.ratio * self.adapted(features) + (1 - self.ratio) * features  # [batch, dim]
        return self.cosine_logits(mixed, self.folded_weights())

    def fold(self) -> Fold:
        mixing = Bottleneck(self.down.weight, self.up.weight, float(self.ratio))
        return Fold(nn.Sequential(mixing, self.cosine_head(self.folded_weights())))

    @torch.no_grad()
    def finish(self, task: FitTask) -> dict[str, Any]:
        why = not_searched(self.config.search_ratio, task.val)
        if why or task.val is None:
            return {"ratio": float(self.ratio), **(why if self.config.search_ratio else {"searched": False})}
        features = read_all(task.val).to(self.ratio.device)
        labels = task.val.labels.to(features.device)

        def accuracy(ratio: float) -> float:
            self.set_ratio(ratio)
            return float((self(features).argmax(dim=-1) == labels).float().mean())

        best = max(SEARCHED_RATIOS, key=accuracy)  # the smallest of equals comes first
        tried = {"searched": True, "settings_tried": len(SEARCHED_RATIOS), "val_images": len(labels)}
        return {"ratio": best, **tried, "val_accuracy": accuracy(best)}

    def reference_key(self, key: str) -> str | None:
        return {"down.weight": "adapter.fc.0.weight", "up.weight": "adapter.fc.2.weight", "ratio": None}[key]

    @classmethod
    def reference_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The ratio can't be seen in a checkpoint."""
        down = next((state[name] for name in ("adapter.fc.0.weight", "fc.0.weight") if name in state), None)
        if down is None or down.dim() != 2 or not down.shape[0]:
            return {}
        return {"reduction": max(1, down.shape[1] // down.shape[0])}
