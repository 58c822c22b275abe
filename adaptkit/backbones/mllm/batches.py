"""Prompts as tensors: rows of tokens that go through a language model together, and what is kept of them.

Source: mllm sheet `backbones.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Token rows of one length, padded on the left.

    Args:
        ids: int64 [rows, length].
        mask: 1 at tokens, 0 at padding, int64 [rows, length].
        positions: int64 [rows, length], or [3, rows, length].
        next_position: Position of the token after each row, int64 [rows].
        types: Token types [rows, length], or None for families without.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    next_position: Tensor
    types: Tensor | None

    def part(self, rows: slice, columns: slice) -> Batch:
        """Some rows and columns; the mask still covers what stands in front of them."""
        types = None if self.types is None else self.types[rows, columns]
        mask, positions = self.mask[rows, : columns.stop], self.positions[..., rows, columns]
        return Batch(self.ids[rows, columns], mask, positions, self.next_position[rows], types)


@dataclass(frozen=True)
class Prefix:
    """Prompts that went through the model, ready to be continued in many ways.

    Args:
        layers: Keys and values of each layer, each [rows, heads, length, size].
        mask: As in `Batch`.
        next_position: As in `Batch`.
        hidden: Last hidden state of each prompt, [rows, width].
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    mask: Tensor
    next_position: Tensor
    hidden: Tensor

    def __len__(self) -> int:
        return len(self.mask)

    def select(self, rows: Sequence[int]) -> Prefix:
        """Some of the rows, in any order and as often as asked for (rollouts of one prompt)."""
        at = torch.as_tensor(list(rows), device=self.mask.device)
        layers = tuple((keys[at], values[at]) for keys, values in self.layers)
        return Prefix(layers, self.mask[at], self.next_position[at], self.hidden[at])
