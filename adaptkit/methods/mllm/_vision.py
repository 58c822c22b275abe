"""What a model's own vision encoder says of images before any bridge, and which of its parts are trained.

Source: mllm sheets `frozen.md`, `magma.md`, `fromage.md` (pooled vector or grid of the encoder); transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.backbones.mllm.model import MLLM
from adaptkit.errors import ConfigError
from adaptkit.methods.mllm._lowrank import add_low_rank
from adaptkit.methods.mllm._tuning import own_parameters

Pool = Literal["mean", "class"]
Phi = Literal["frozen", "lora", "full"]

_CLASS_TOKENS = ("class_embedding", "cls_token")


def vision_states(mllm: MLLM, pixels: Tensor) -> Tensor:
    """The vision encoder's last states of square images, fp32 [images, positions, width], in one layout for all.

    Args:
        mllm: The model.
        pixels: RGB in [0, 1], [images, 3, size, size].
    """
    kept: list[Any] = []
    encoder = mllm.model.get_submodule(mllm.family.vision)
    hook = encoder.register_forward_hook(lambda module, given, output: kept.append(output.last_hidden_state))
    try:
        mllm.image_features(pixels, "image")  # the words don't reach the encoder
    finally:
        hook.remove()
    states: Tensor = kept[0].float()
    return states.reshape(len(pixels), -1, states.shape[-1])  # [images, positions, width]


def pooled(mllm: MLLM, states: Tensor, pool: Pool) -> Tensor:
    """One vector per image [images, 1, width] of the encoder's states [images, positions, width].

    Raises:
        ConfigError: The class token is asked for and the encoder has none.
    """
    if pool == "mean":
        return states.mean(dim=1, keepdim=True)
    encoder = mllm.model.get_submodule(mllm.family.vision)
    if not any(name.rpartition(".")[2] in _CLASS_TOKENS for name, _ in encoder.named_parameters()):
        raise ConfigError(f"The vision encoder of {mllm.spec.name!r} has no class token: choose pool=mean.")
    return states[:, :1]


def open_vision(twin: MLLM, phi: Phi, rank: int, generator: torch.Generator) -> None:
    """Make the parts of a twin's vision encoder trainable that `phi` names, and nothing else."""
    twin.model.requires_grad_(False)
    if phi == "lora":
        add_low_rank(twin, twin.family.lora_targets("vision"), generator, r=rank, lora_alpha=rank)
    elif phi == "full":
        own_parameters(twin, "vision")


def vision_parameters(method: nn.Module, twin: MLLM) -> Iterator[nn.Parameter]:
    """Those of a method's trainables that are parts of the vision encoder."""
    for name, parameter in method.named_parameters():
        if name.startswith(f"adapter.{twin.family.vision}."):
            yield parameter


def as_image(mllm: MLLM, tokens: Tensor) -> ImageFeatures:
    """Vectors [images, n, width] that stand where images stand in a prompt, n placeholders each."""
    images, count, _ = tokens.shape
    grids = None
    if mllm.family.positions == "mrope":  # as if each were one row of patches
        merge = int(mllm.model.config.vision_config.spatial_merge_size)
        grids = torch.tensor([[1, merge, merge * count]] * images, device=tokens.device)
    return ImageFeatures(tuple(tokens.to(mllm.model.dtype).unbind()), grids=grids)
