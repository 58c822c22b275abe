"""Low-rank updates inside the twin of a multimodal language model, by peft.

Source: LoRA arXiv 2106.09685; mllm sheet `lora-sft.md`; peft 0.21.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptkit.backbones.mllm.model import MLLM
from adaptkit.errors import ConfigError
from adaptkit.methods.lora._towers import inject, load_peft, targeted, write_peft

PEFT_PREFIX = "base_model.model."
"""What peft's files write before a module's name."""


def add_low_rank(twin: MLLM, targets: str, generator: torch.Generator, **settings: Any) -> Any:
    """Put peft's LoRA layers into a twin, alone trainable and in fp32; returns peft's config.

    Args:
        twin: From `twin_of`.
        targets: Pattern of the layers' full names.
        generator: Seeds the draws.
        settings: Of peft's `LoraConfig`.

    Raises:
        ConfigError: peft refuses the settings, or the rank is larger than a layer.
    """
    config = load_peft().LoraConfig(target_modules=targets, **settings)
    inject(twin.model, config, word="language", seed=int(torch.randint(2**62, (), generator=generator)))
    for name in targeted(twin.model):
        layer: Any = twin.model.get_submodule(name)
        width = min(layer.in_features, layer.out_features)
        if config.r > width:
            raise ConfigError(
                f"r is {config.r}, but {name} of {twin.spec.name!r} has width {width}: choose r of at most {width}."
            )
    for name, parameter in twin.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()  # small steps would be lost in half precision
    return config


def write_low_rank(folder: Path, twin: MLLM, named: Iterable[tuple[str, nn.Parameter]], config: Any) -> None:
    """Write updates in peft's own layout, for transformers' model of the same weights.

    Args:
        folder: The adapter's folder.
        twin: Where they are.
        named: A `TwinMethod`'s parameters; others than updates are left out.
        config: From `add_low_rank`.
    """
    held = {name.removeprefix("adapter."): parameter for name, parameter in named if "lora_" in name}
    state = {f"{PEFT_PREFIX}{name}": parameter.detach() for name, parameter in held.items()}
    write_peft(folder, state, targeted(twin.model), config.to_dict())
