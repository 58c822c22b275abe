"""MMRL++: MMRL with low-rank maps, tokens that keep a share of the layer before, and CLIP's own projection as a start.

Source: arXiv 2505.10088, Sec. 4; mmrlpp sheet; reference code yunncheng/MMRL, trainers/mmrlpp.py and
clip/model_mmrlpp.py.
Differs from the reference: as for MMRL (see mmrl.py); one beta serves training and every test, unless a caller sets
`beta` itself (the released scripts change it for each target dataset, knowing the target); what is trained is what the
method owns, not what has "A" or "B" in its name. A frozen projection with a bias keeps it, and one that is the identity
gets the low-rank part on top.
Kept: the large first draw of the residuals' left factors beside right factors of 0; the blend in the text tower too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.methods import methods
from adaptkit.methods.prompts._deep import check_count
from adaptkit.methods.prompts._representation import ResidualMaps, draw_kaiming, entry
from adaptkit.methods.prompts.mmrl import MMRL, MMRLConfig, check_share
from adaptkit.types import TrainingSettings


@dataclass(frozen=True)
class MMRLppConfig(MMRLConfig):
    """Settings of MMRL++."""

    beta: float = field(
        default=0.9, metadata={"help": "Share of a layer's own tokens; the rest is what the layer before made of them."}
    )
    projection_rank: int = field(default=64, metadata={"help": "Rank of what is added to the frozen projection."})
    residual_rank: int = field(default=4, metadata={"help": "Rank of what each layer adds to the shared map."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("beta", self.beta)
        check_count("projection_rank", self.projection_rank)
        check_count("residual_rank", self.residual_rank)


@methods.register("mmrlpp")
class MMRLpp(MMRL):
    """MMRL with shared-residual maps and progressive tokens.

    Trains `tokens` [K, width], `text_maps` and `image_maps`, and what is added to the frozen projection:
    `projection_left` [image width, rank] · `projection_right` [rank, dim].
    """

    name = "mmrlpp"
    title = "MMRL++"
    config_class = MMRLppConfig
    config: MMRLppConfig
    settable = ("beta",)
    default_training = TrainingSettings(epochs=100, optimiser="adamw", lr=2e-3, views=10, crop_scale=0.5)

    def build(self) -> None:
        self._beta = self.config.beta
        super().build()

    def make_maps(self, layers: int, outputs: int) -> ResidualMaps:
        return ResidualMaps(layers, self.config.width, outputs, self.config.residual_rank, self.generator)

    def build_projection(self, width: int, dim: int) -> None:
        rank = self.config.projection_rank
        self.projection_left = draw_kaiming(width, rank, self.generator)
        self.projection_right = nn.Parameter(torch.zeros(rank, dim))

    def project(self, pooled: Tensor) -> Tensor:
        frozen: Tensor = self._image.projection(pooled)
        return frozen + (pooled @ self.projection_left.to(pooled.dtype)) @ self.projection_right.to(pooled.dtype)

    def classes_changed(self) -> None:
        check_share("beta", self.beta)
        super().classes_changed()

    @property
    def beta(self) -> float:
        """Share of a layer's own tokens from the second layer with tokens on; the settings', unless it was set or the
        other dataset that is answered has a value of its own.

        Such values are for protocols that reproduce the released scripts, which chose them knowing the target dataset:
        results must say so.
        """
        return self._beta if self.other is None else float(self.other.settings.get("beta", self._beta))

    @beta.setter
    def beta(self, beta: float) -> None:
        check_share("beta", beta)
        self._beta = beta
        self._memo = None  # class weights depend on it, and it is no parameter

    @property
    def share(self) -> float:
        return self.beta

    def reference_key(self, key: str) -> str:
        if key.startswith("projection_"):
            return "image_encoder.A" if key == "projection_left" else "image_encoder.B"
        if key == "tokens":
            return super().reference_key(key)
        maps, kind, *index = key.split(".")  # "text_maps.weight", "text_maps.left.3"
        place = f"representation_learner.srra_r2{'t' if maps == 'text_maps' else 'v'}proj"
        theirs = {"left": "A", "right": "B"}.get(kind, kind)
        return f"{place}.srra.{index[0]}.{theirs}" if index else f"{place}.{theirs}"

    @classmethod
    def reference_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        settings = super().reference_settings(state)
        residual = entry(state, "representation_learner.srra_r2tproj.srra.0.B")
        projection = entry(state, "image_encoder.B")
        if residual is not None:
            settings["residual_rank"] = len(residual)
        if projection is not None:
            settings["projection_rank"] = len(projection)
        return settings
