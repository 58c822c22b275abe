"""MAGMA: bottleneck adapters inside a frozen language model, and on request a visual prefix in place of the bridge.

Source: MAGMA arXiv 2112.05253; mllm sheet `magma.md` (three kinds and two places of adapters, their initialisation, a
prefix with dropout 0.1 and LayerNorm, the image encoder at a much smaller rate).
Differs from the paper: an existing model and its bridge by default (the sheet's second starting point), asked its usual
question; its image encoder stays frozen by default (`phi`); shots in the place of captioned images; no warm-up; the
rates fall by a cosine to 0; decay of adam's averages as in the other bridges, since the sheet has none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from adaptkit.backbones.mllm.model import MLLM
from adaptkit.errors import ConfigError, UnsupportedError
from adaptkit.methods import methods
from adaptkit.methods.base import at_least, refuse
from adaptkit.methods.folding import Fold
from adaptkit.methods.mllm._bottlenecks import Kind, add_bottlenecks
from adaptkit.methods.mllm._prefix import PrefixConfig, PrefixedMllm, VisualPrefix
from adaptkit.types import FitTask, TrainingSettings


@dataclass(frozen=True)
class MagmaConfig(PrefixConfig):
    """Settings of MAGMA."""

    answers: Literal["names", "captions"] = field(
        default="names",
        metadata={
            "help": "What is trained and scored as an answer: the name, or a caption (a template with the name; trained"
            " on the class's descriptions too, where there are some)."
        },
    )
    kind: Kind = field(
        default="sequential",
        metadata={
            "help": "What an adapter reads: a sub-layer's output (sequential) or its input (parallel, or with a learned"
            " scale: scaled_parallel)."
        },
    )
    mlp: int = field(default=4, metadata={"help": "Adapters behind MLPs are so many times narrower; 0: none there."})
    attention: int = field(
        default=0, metadata={"help": "Adapters behind attention are so many times narrower; 0: none there."}
    )
    norm: bool = field(default=False, metadata={"help": "Begin each adapter with a LayerNorm."})
    prefix: Literal["own", "pooled", "grid"] = field(
        default="own",
        metadata={
            "help": "What stands for an image: what the model's own bridge makes of it (own), a trained prefix of its"
            " pooled vision vector (pooled), or one of each of its vision states (grid)."
        },
    )
    phi_lr: float = field(default=2e-6, metadata={"help": "Learning rate of the vision encoder where it is trained."})

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, *at_least(self, 0, "mlp", "attention"))
        if self.align_to != "none" and self.prefix == "own":
            raise ConfigError("With the model's own bridge there is no prefix to align: choose prefix=pooled or grid.")
        if not self.mlp and not self.attention:
            raise ConfigError(
                "mlp and attention are both 0, so there are no adapters: give one of them, such as mlp=4."
            )


@methods.register("magma")
class Magma(PrefixedMllm):
    """Adapters of width D and factor f: 2 · D² / f + D / f + D numbers each."""

    name = "magma"
    config_class = MagmaConfig
    config: MagmaConfig
    default_training: ClassVar[TrainingSettings | None] = TrainingSettings(
        epochs=20, batch_size=16, keep_last=True, optimiser="adam", lr=8e-4, weight_decay=0.0, schedule="cosine-step",
        warmup_epochs=0,
    )  # fmt: skip

    def tune(self, twin: MLLM) -> None:
        super().tune(twin)
        config, width = self.config, int(twin._text_config.hidden_size)
        self._adapters = add_bottlenecks(
            twin.language,
            width,
            config.kind,
            {"mlp": config.mlp, "attention": config.attention},
            config.norm,
            self.generator,
        )

    def make_prefix(self, states: Tensor, width: int) -> VisualPrefix | None:
        if self.config.prefix == "own":
            return None
        tokens = self.config.tokens if self.config.prefix == "pooled" else 0
        return VisualPrefix(states.shape[-1], width, tokens, self.generator, norm=True)

    def chosen(self, states: Tensor) -> Tensor:
        return states if self.config.prefix == "grid" else super().chosen(states)

    def finish(self, task: FitTask) -> dict[str, Any]:
        return {**super().finish(task), "adapters": self._adapters}

    def fold(self) -> Fold:
        raise UnsupportedError(
            f"{self.name} can't be folded or merged: its adapters aren't linear, and the language model reads every"
            " image. Keep the adapter folder, which 'adaptkit predict' reads."
        )
