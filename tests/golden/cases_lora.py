"""CLIP-LoRA's golden case: zero-shot before anything is learned, and one step of its optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.methods.lora.clip_lora import ClipLora
from adaptkit.training.loop import GradientLoop
from adaptkit.types import FitTask, TensorInputs, TrainingSettings

TOWERS = {"both": "both", "vision": "image", "text": "text"}


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "rank": config["r"],
        "alpha": config["alpha"],
        "dropout": config["dropout_rate"],
        "targets": "".join(config["params"]),
        "towers": TOWERS[config["encoder"]],
        "position": config["position"],
        "logit_scale": config["logit_scale"],
    }


def extra(case: Mapping[str, Any], method: Any, pixels: Tensor, labels: Tensor, compare: Any) -> None:
    with torch.no_grad():
        compare.check("logits_zero_shot", ClipLora(method.backbone, method.fitted_names, config=method.config)(pixels))
    if not compare.wants("cosine_after_one_step"):
        return
    other = ClipLora(method.backbone, method.fitted_names, config=method.config)
    other.load_adapter_state({key: value.clone() for key, value in method.adapter_state().items()})
    config = case["config"]
    step = TrainingSettings(
        epochs=1,
        batch_size=len(labels),
        optimiser="adamw",
        lr=config["lr"],
        weight_decay=config["weight_decay"],
        schedule="constant",
        warmup_epochs=0,
    )
    GradientLoop(step)(other, FitTask(other.fitted_names, TensorInputs(pixels[None], labels)))
    with torch.no_grad():
        cosine = F.normalize(other.encode_image(pixels), dim=-1) @ other.class_weights().T
    compare.check("cosine_after_one_step", cosine)
