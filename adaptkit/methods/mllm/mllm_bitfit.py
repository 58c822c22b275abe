"""MLLM BitFit: trains the norms' scales and the layers' biases of a multimodal language model, and nothing else.

Source: BitFit arXiv 2106.10199; layer-norm tuning of multimodal models arXiv 2312.11420; mllm sheet `lora-sft.md`.
Differs from the papers: only the language model by default; language models without biases have their norms alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import nn

from adaptkit.backbones.mllm.families import Target
from adaptkit.backbones.mllm.model import MLLM
from adaptkit.errors import ConfigError
from adaptkit.methods import methods
from adaptkit.methods.mllm._tuning import TunedMllm, TunedMllmConfig, own_parameters
from adaptkit.types import TrainingSettings


@dataclass(frozen=True)
class MllmBitfitConfig(TunedMllmConfig):
    """Settings of MLLM BitFit."""

    what: Literal["both", "norms", "biases"] = field(
        default="both", metadata={"help": "norms (their scales), biases (the norms' too), or both."}
    )
    parts: tuple[Target, ...] = field(
        default=("language",), metadata={"help": "Parts of the model: language, vision, bridge."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            raise ConfigError("parts is empty, so nothing would be trained: name language, vision or bridge.")


@methods.register("mllm-bitfit")
class MllmBitfit(TunedMllm):
    """Own copies of norms and biases in the twin."""

    name = "mllm-bitfit"
    config_class = MllmBitfitConfig
    config: MllmBitfitConfig
    default_training: ClassVar[TrainingSettings | None] = TrainingSettings(
        epochs=10, batch_size=16, keep_last=True, optimiser="adamw", lr=1e-3, weight_decay=0.0, schedule="cosine-step",
        warmup_epochs=0,
    )  # fmt: skip

    def tune(self, twin: MLLM) -> None:
        self.vision_frozen = set(self.config.parts) == {"language"}
        twin.model.requires_grad_(False)
        found = sum(own_parameters(twin, part, self._wanted) for part in dict.fromkeys(self.config.parts))
        if not found:
            raise ConfigError(
                f"The {' and '.join(self.config.parts)} of {twin.spec.name!r} has no {self.config.what} to train:"
                " choose what=norms, or mllm-lora."
            )

    def _wanted(self, module: nn.Module, name: str) -> bool:
        bias, norm = name == "bias", "norm" in type(module).__name__.lower() and name == "weight"
        return {"both": bias or norm, "norms": norm, "biases": bias}[self.config.what]
