"""PRIOR: caption fine-tuning in which tokens that text alone doesn't foretell count more.

Source: PRIOR arXiv 2505.08971; mllm sheet `prior.md` (kinds of weights, reference models, normalisation).
Differs from the paper: few-shot captions in the place of pre-training, as LoRA; the paper's weights couldn't be
verified, so the default is the sheet's linear one. Its reference is a language model trained on captions alone; here it
is the model's own language model without the image (frozen, or first tuned on the captions). Another language model as
the reference isn't offered.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from adaptkit.backbones.mllm.model import MLLM
from adaptkit.methods import methods
from adaptkit.methods.base import at_least, progress_of, refuse
from adaptkit.methods.mllm._captions import CaptionConfig, CaptionMethod
from adaptkit.methods.mllm._lowrank import add_low_rank
from adaptkit.methods.mllm._tuning import twin_of
from adaptkit.methods.mllm._weights import USUAL, WeightKind, text_log_probs, text_probabilities, token_weights
from adaptkit.types import TrainingLoop

_CAPTIONS_AT_ONCE = 16


@dataclass(frozen=True)
class PriorConfig(CaptionConfig):
    """Settings of PRIOR."""

    weights: WeightKind = field(
        default="linear",
        metadata={
            "help": "By p, a token's probability without image: linear 1 + strength · (1 - p), power p^-strength, focal"
            " (1 - p)^strength."
        },
    )
    strength: float | None = field(
        default=None,
        metadata={"help": "How much weights differ; 0 weighs all tokens alike; null: 1, of power 0.5."},
    )
    most: float = field(default=5.0, metadata={"help": "power: largest weight."})
    divide_by: Literal["weights", "tokens"] = field(
        default="weights", metadata={"help": "The loss is divided by the weights' sum, or by the number of tokens."}
    )
    reference: Literal["self-text", "self-text-tuned"] = field(
        default="self-text",
        metadata={"help": "What p is of: the frozen model without image, or that after LoRA on the captions alone."},
    )
    reference_epochs: int = field(default=3, metadata={"help": "self-text-tuned: passes over the captions."})
    reference_lr: float = field(default=1e-4, metadata={"help": "self-text-tuned: learning rate."})

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            self,
            ("strength", "at least 0", self.strength is None or self.strength >= 0),
            *at_least(self, 1, "most", "reference_epochs"),
            ("reference_lr", "above 0", self.reference_lr > 0),
        )


@methods.register("prior")
class Prior(CaptionMethod):
    """MLLM LoRA on captions, each token weighted by how little the text before it tells about it."""

    name = "prior"
    config_class = PriorConfig
    config: PriorConfig

    def build(self) -> None:
        super().build()
        self._reference: MLLM | None = None
        self._weights: dict[tuple[int, int], Tensor] = {}  # by class and caption

    @property
    def weights_divide(self) -> bool:
        return self.config.divide_by == "weights"

    def look(self, loop: TrainingLoop | None) -> None:
        super().look(loop)
        self._weights, self._reference, show = {}, None, progress_of(loop)
        places = [(label, place) for label, rows in enumerate(self.caption_rows) for place in range(len(rows))]
        for done, (label, place) in enumerate(places, start=1):
            self.weights_of(label, place)
            show(f"{self.name}: caption weights", done, len(places))
        self._reference = None  # a tuned one isn't needed any more

    def weights_of(self, label: int, place: int) -> Tensor:
        """Weights of a caption's tokens, fp32 [tokens]; computed once."""
        if (label, place) not in self._weights:
            row, prompt = self.caption_rows[label][place], self.config.caption_prompt
            found = text_probabilities(self.reference(), prompt, [row])[0]
            kind, strength = self.config.weights, self.config.strength
            strength = USUAL[kind][0] if strength is None else strength
            self._weights[label, place] = token_weights(found, kind, strength, self.config.most)
        return self._weights[label, place]

    def reference(self) -> MLLM:
        """The model that sees no image: the frozen backbone, or a twin of it tuned on the captions."""
        backbone = cast(MLLM, self.backbone)
        if self.config.reference == "self-text":
            return backbone
        if self._reference is None:
            self._reference = self._tuned(backbone)
        return self._reference

    def _tuned(self, backbone: MLLM) -> MLLM:
        """A twin with LoRA, trained to write the captions behind the question, without an image."""
        config, twin = self.config, twin_of(backbone)
        numbers = torch.Generator().manual_seed(0)
        sizes = {"r": config.r, "lora_alpha": config.alpha}
        add_low_rank(twin, twin.family.lora_targets("language"), numbers, **sizes)
        own = [parameter for name, parameter in twin.model.named_parameters() if "lora_" in name]
        self.backbone.requires_grad_(False)  # whatever peft marked
        optimiser = torch.optim.AdamW(own, lr=config.reference_lr, weight_decay=0.0)
        captions = [row for rows in self.caption_rows for row in rows]
        with torch.enable_grad():
            for _ in range(config.reference_epochs):
                order = torch.randperm(len(captions), generator=numbers)
                for group in order.split(_CAPTIONS_AT_ONCE):
                    found = text_log_probs(twin, config.caption_prompt, [captions[index] for index in group.tolist()])
                    optimiser.zero_grad()
                    torch.autograd.backward(-torch.cat(found).mean())
                    optimiser.step()
        return twin

    def finish(self, task: Any) -> dict[str, Any]:
        found = torch.cat([*self._weights.values()])
        facts = {"least": float(found.min()), "mean": float(found.mean()), "most": float(found.max())}
        return {**super().finish(task), "reference": self.config.reference, "caption_weights": facts}
