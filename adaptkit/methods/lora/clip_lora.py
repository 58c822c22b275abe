"""CLIP-LoRA: low-rank updates of the attention projections of both towers, trained with cross-entropy alone.

Source: arXiv 2405.18541; clip_lora sheet; reference code MaxZanella/CLIP-LoRA (lora.py, loralib/layers.py,
loralib/utils.py).
Differs from the reference: gradients are exact also without dropout (there the weight is un-merged before the backward
pass); words that all prompts share go through the text tower once, so dropout draws one mask of them for all classes;
nothing is merged for evaluation, the branch stays beside the frozen weight; positions are shares of the tower's depth
(there lists for twelve layers, which leave out the last three of ViT-L/14's 24); the optimiser's updates are in fp32
throughout, autocast only on request.
Kept: the logit scale is the constant 100 and not CLIP's own; rank-stabilised scaling alpha / sqrt(rank); class names
stand in "a photo of a {}." for every dataset; iterations count with the shots, not with the classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.backbones.tower import ImageTower, TextTower
from adaptkit.errors import ConfigError
from adaptkit.methods import methods
from adaptkit.methods.base import MethodConfig
from adaptkit.methods.lora._towers import TowerMethod, inject, load_peft
from adaptkit.types import NovelClasses, TrainingSettings

TEMPLATE = "a photo of a {}."
TARGETS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
Position = Literal["all", "bottom", "mid", "up", "half-bottom", "half-up", "top1", "top2", "top3"]
_TOWERS = {"both": ("image", "text"), "image": ("image",), "text": ("text",)}
_RELEASED_TOWERS = {"both": "both", "vision": "image", "text": "text"}
_METADATA = "The checkpoint's metadata"


def positions(position: Position, layers: int) -> range:
    """Which of a tower's layers get updates.

    Thirds ("bottom", "mid", "up") and halves of the depth, or its last one to three.

    Example:
        >>> [list(positions(name, 12)) for name in ("mid", "half-up", "top3")]
        [[4, 5, 6, 7], [6, 7, 8, 9, 10, 11], [9, 10, 11]]
    """
    third, half = layers / 3, layers // 2
    spans = {
        "all": (0, layers),
        "bottom": (0, round(third)),
        "mid": (round(third), round(2 * third)),
        "up": (round(2 * third), layers),
        "half-bottom": (0, half),
        "half-up": (half, layers),
        **{f"top{count}": (max(0, layers - count), layers) for count in (1, 2, 3)},
    }
    return range(*spans[position])


@dataclass(frozen=True)
class ClipLoraConfig(MethodConfig):
    """Settings of CLIP-LoRA."""

    rank: int = field(default=2, metadata={"help": "Rank of the updates."})
    alpha: float = field(default=1.0, metadata={"help": "Scale: updates are multiplied by alpha / sqrt(rank)."})
    dropout: float = field(default=0.25, metadata={"help": "Dropout on the updates' inputs, in training only."})
    targets: str = field(default="qkv", metadata={"help": "Attention matrices with updates, some of q, k, v, o."})
    towers: Literal["both", "image", "text"] = field(default="both", metadata={"help": "Towers with updates."})
    position: Position = field(
        default="all", metadata={"help": "Layers with updates: all, a third, a half, or the last one to three."}
    )
    logit_scale: float = field(default=100.0, metadata={"help": "What cosines are multiplied with."})

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank is {self.rank}; at least 1 is accepted.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}; at least 0 and below 1 is accepted.")
        if not self.alpha > 0 or not self.logit_scale > 0:
            raise ConfigError(f"alpha is {self.alpha} and logit_scale {self.logit_scale}; both must be positive.")
        unknown = sorted(set(self.targets) - set(TARGETS))
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ConfigError(
                f"targets is {self.targets!r}; letters out of q, k, v and o are accepted, each at most once, such as"
                " 'qkv'."
            )


@methods.register("clip-lora")
class ClipLora(TowerMethod):
    """CLIP-LoRA: `{tower}.blocks.{i}.attn.{q,k,v,out}_proj.lora_A.weight` [rank, width] and `….lora_B.weight`."""

    name = "clip-lora"
    config_class = ClipLoraConfig
    config: ClipLoraConfig
    novel_classes: NovelClasses = "open"
    fixed_templates = True
    default_training: ClassVar[TrainingSettings | None] = TrainingSettings(
        epochs=0,
        steps_per_shot=500,
        keep_last=True,
        optimiser="adamw",
        lr=2e-4,
        min_lr=1e-6,
        weight_decay=1e-2,
        schedule="cosine-step",
        warmup_epochs=0,
        views=4,
    )

    def build(self) -> None:
        super().build()
        self.templates = (TEMPLATE,)

    def tower_names(self) -> tuple[str, ...]:
        return _TOWERS[self.config.towers]

    def change(self, tower: ImageTower | TextTower, word: str) -> Any:
        config, width = self.config, tower.width
        if config.rank > width:
            raise ConfigError(
                f"rank is {config.rank}, but the layers of {self.backbone.spec.name!r}'s {word} tower have width"
                f" {width}: choose a rank of at most {width} (the paper's is 2)."
            )
        layers = positions(config.position, tower.layers)
        if not layers:
            raise ConfigError(
                f"position is {config.position!r}, which leaves no layer of the {word} tower's {tower.layers}: choose"
                " 'all'."
            )
        peft_config = load_peft().LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            use_rslora=True,
            target_modules=[f"blocks.{index}.attn.{TARGETS[letter]}" for index in layers for letter in config.targets],
        )
        inject(tower, peft_config, word=word, seed=self.draw_seed())
        return peft_config

    def scale_and_bias(self) -> tuple[float, float]:
        return self.config.logit_scale, 0.0

    def cosine_logits(self, features: Tensor, weights: Tensor) -> Tensor:
        """Constant · cosine; [batch, dim] and unit weights [classes, dim] to [batch, classes], fp32."""
        with torch.autocast(features.device.type, enabled=False):
            return self.config.logit_scale * (F.normalize(features.float(), dim=-1) @ weights.float().T)

    # --- the release's files ------------------------------------------------------------------------------------------

    def reference_key(self, key: str) -> str:
        word, _, index, _, matrix, side = key.removesuffix(".weight").split(".")
        start = "visual." if word == "image" else ""
        name = "proj" if matrix == "out_proj" else matrix
        return f"{start}transformer.resblocks.{index}.attn.{name}.w_{side}"

    def reference_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The files count adapted layers through, those of the text tower first: `layer_0.q_proj.w_lora_A`."""
        if not any(name.startswith("layer_") for name in state):
            return state
        named: dict[str, Tensor] = {}
        places = [
            (start, index)
            for word, start in (("text", ""), ("image", "visual."))
            if word in self.changed_towers
            for index in positions(self.config.position, getattr(self.backbone, f"{word}_tower").layers)
        ]
        for name, value in state.items():
            match = re.fullmatch(r"layer_(\d+)\.(\w+\.w_lora_[AB])", name)
            if match is None or int(match[1]) >= len(places):
                named[name] = value
                continue
            start, index = places[int(match[1])]
            named[f"{start}transformer.resblocks.{index}.attn.{match[2]}"] = value
        return named

    @classmethod
    def reference_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        found = {name: value for name, value in state.items() if name.rpartition(".")[2] in ("w_lora_A", "w_lora_B")}
        if not found:
            return {}
        parts = {name.split(".")[-2] for name in found}
        settings: dict[str, Any] = {
            "rank": next(len(value) for name, value in found.items() if name.endswith("A")),
            "targets": "".join(
                letter for letter, layer in TARGETS.items() if {layer, "proj" if letter == "o" else layer} & parts
            ),
        }
        sides = {name.startswith("visual.") for name in found if "resblocks" in name}
        if len(sides) == 1:
            settings["towers"] = "image" if True in sides else "text"
        return settings | _metadata_settings(getattr(state, "metadata", {}), settings)


def _metadata_settings(metadata: Mapping[str, Any], seen: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that the file's metadata gives, checked against what its tensors show.

    Raises:
        ConfigError: They contradict each other, or a value isn't known.
    """
    settings: dict[str, Any] = {}
    if "alpha" in metadata:
        settings["alpha"] = float(metadata["alpha"])
    if "encoder" in metadata:
        if metadata["encoder"] not in _RELEASED_TOWERS:
            raise ConfigError(f"{_METADATA} name the encoder {metadata['encoder']!r}; text, vision or both is known.")
        settings["towers"] = _RELEASED_TOWERS[metadata["encoder"]]
    if "position" in metadata:
        settings["position"] = "top1" if metadata["position"] == "top" else metadata["position"]
    if "r" in metadata and metadata["r"] != seen["rank"]:
        raise ConfigError(f"{_METADATA} say rank {metadata['r']}, and its tensors have {seen['rank']}.")
    if "params" in metadata and set(metadata["params"]) != set(seen["targets"]):
        raise ConfigError(
            f"{_METADATA} say matrices {', '.join(metadata['params'])}, and its tensors are of"
            f" {', '.join(seen['targets'])}."
        )
    return settings
