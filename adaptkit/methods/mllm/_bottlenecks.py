"""Bottleneck adapters inside any transformers decoder: behind a block's MLP or attention, by hooks.

A hook leaves the module it is on as it is, so names of shared weights stay, and what the block returns keeps its type.
A decoder's blocks are found by what they hold; where the MLP has no module of its own (OPT), the adapter sits behind
its second layer, before the residual is added.

Source: MAGMA arXiv 2112.05253; mllm sheet `magma.md` (three kinds, initialisation); transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.errors import UnsupportedError

Kind = Literal["sequential", "parallel", "scaled_parallel"]
Place = Literal["mlp", "attention"]

SPREAD = 1e-3
"""Standard deviation of the first weights, which are cut off at twice of it."""

_ATTENTION = ("self_attn", "attn", "attention")


class Bottleneck(nn.Module):
    """What an adapter adds: up(relu(down(x))), times a learned scale where there is one.

    Args:
        width: Of the language model.
        hidden: Of the bottleneck.
        kind: Where x comes from, and whether it is scaled.
        norm: Whether a LayerNorm comes first.
        numbers: Draws the weights.
    """

    def __init__(self, width: int, hidden: int, kind: Kind, norm: bool, numbers: torch.Generator) -> None:
        super().__init__()

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(shape, generator=numbers) * SPREAD).clamp(-2 * SPREAD, 2 * SPREAD))

        self.kind = kind
        self.norm = nn.LayerNorm(width) if norm else None
        self.down, self.down_bias = drawn(hidden, width), drawn(hidden)
        self.up, self.up_bias = drawn(width, hidden), drawn(width)
        self.scale = nn.Parameter(torch.ones(())) if kind == "scaled_parallel" else None

    def forward(self, states: Tensor) -> Tensor:
        """What is added, fp32 [..., width], for states [..., width]."""
        states = states.float() if self.norm is None else self.norm(states.float())
        added = F.linear(F.relu(F.linear(states, self.down, self.down_bias)), self.up, self.up_bias)
        return added if self.scale is None else self.scale * added


def blocks_of(language: nn.Module) -> list[nn.Module]:
    """A decoder's blocks: the first list of modules that all hold an attention and an MLP, as we know them.

    Raises:
        UnsupportedError: There is no such list.
    """
    for module in language.modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(map(_is_block, module)):
            return list(module)
    raise UnsupportedError(
        f"Adapters need blocks with a module mlp (or fc1 and fc2) and one of {', '.join(_ATTENTION)}, and a"
        f" {type(language).__name__} has none: choose a model with a Llama-, OPT- or GPT-like language model, or"
        " mllm-lora."
    )


def _is_block(module: nn.Module) -> bool:
    attention = any(isinstance(getattr(module, name, None), nn.Module) for name in _ATTENTION)
    mlp = isinstance(getattr(module, "mlp", None), nn.Module) or (hasattr(module, "fc1") and hasattr(module, "fc2"))
    return attention and mlp


def sub_layer(block: nn.Module, place: Place) -> tuple[nn.Module, nn.Module]:
    """The module whose input a sub-layer of a block reads, and the one whose output it gives."""
    if place == "mlp" and not hasattr(block, "mlp"):
        return block.fc1, block.fc2  # type: ignore[return-value]
    names = ("mlp",) if place == "mlp" else _ATTENTION
    found: nn.Module = next(getattr(block, name) for name in names if hasattr(block, name))
    return found, found


def add_bottlenecks(
    language: nn.Module, width: int, kind: Kind, factors: dict[Place, int], norm: bool, numbers: torch.Generator
) -> int:
    """Put adapters into every block of a decoder, as modules of the block, trainable.

    Args:
        language: The decoder; its modules get hooks, so it must not be anybody else's.
        width: Of its states.
        kind: Of adapter.
        factors: By place, how much narrower the bottleneck is; 0: no adapter there.
        norm: Whether each begins with a LayerNorm.
        numbers: Draws the weights.

    Returns:
        How many were put in.
    """
    count = 0
    for block in blocks_of(language):
        for place, factor in factors.items():
            if factor:
                first, last = sub_layer(block, place)
                adapter = Bottleneck(width, max(1, width // factor), kind, norm, numbers)
                block.add_module(f"{place}_adapter", adapter.to(next(first.parameters()).device))
                _attach(first, last, adapter)
                count += 1
    return count


def _attach(first: nn.Module, last: nn.Module, adapter: Bottleneck) -> None:
    """Let `adapter` add to what `last` returns, by what `first` reads or `last` gives."""
    read: list[Tensor] = []

    def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        read[:] = [given[0] if given else named["hidden_states"]]

    def add(module: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        plain: Tensor = output[0] if isinstance(output, tuple) else output
        states = plain if adapter.kind == "sequential" else read.pop()
        changed = plain + adapter(states).to(plain.dtype).reshape(plain.shape)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    if adapter.kind != "sequential":
        hook: Callable[..., None] = note
        first.register_forward_pre_hook(hook, with_kwargs=True)
    last.register_forward_hook(add)
