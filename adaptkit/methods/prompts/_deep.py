"""Deep prompts: vectors of their own for the first layers of a tower, shared by MaPLe, VPT, IVLP and PromptSRC.

The prompts of layer 0 stand among the embedded tokens; on entry to each further prompted layer its own prompts take the
place of what the layer before made of them; behind the last prompted layer they flow on.

Source: ivlp and vpt sheets ("Forward pass").
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.backbones.tower import (
    EMBEDDING,
    Edit,
    ImageTower,
    InsertTokens,
    ReplaceContexts,
    ReplaceTokens,
    TextRows,
    TextTower,
)
from adaptkit.errors import ConfigError
from adaptkit.methods.base import draw_normal
from adaptkit.methods.prompts._layout import embed_pieces, open_text, phrase_pieces, placeholder

INITIAL_STD = 0.02

_LATER = re.compile(r"(image|text)_encoder\.transformer\.resblocks\.(\d+)\.VPT_shallow")


def check_count(name: str, value: int, least: int = 1) -> None:
    """Refuse a number of prompts or layers below `least`.

    Raises:
        ConfigError: It is.
    """
    if value < least:
        raise ConfigError(f"{name} is {value}, but must be at least {least}.")


def check_depth(name: str, depth: int, layers: int, tower: str, backbone: str) -> None:
    """Refuse more prompted layers than a tower has.

    Args:
        name: Of the setting.
        depth: Prompted layers, the first one included.
        layers: Of the tower.
        tower: "text" or "image".
        backbone: Its name.

    Raises:
        ConfigError: There are more.
    """
    if depth > layers:
        raise ConfigError(
            f"{name} is {depth}, but the {tower} tower of {backbone!r} has {layers} layers: choose a depth of at most"
            f" {layers}."
        )


def first_context(backbone: DualEncoder, phrase: str, count: int, numbers: torch.Generator) -> tuple[str, nn.Parameter]:
    """The words that stand before class names, and the context [count, width] that replaces the first of them.

    Without a phrase the words are placeholders, and the context is drawn.

    Raises:
        ConfigError: The phrase has fewer tokens than there are context vectors.
    """
    _, tower = open_text(backbone, "A text prompt")
    phrase = " ".join(phrase.replace("_", " ").split())
    if not phrase:
        return placeholder(backbone, count), draw_normal((count, tower.width), INITIAL_STD, numbers)
    pieces = phrase_pieces(backbone, phrase)
    if len(pieces) < count:
        raise ConfigError(
            f"context_init {phrase!r} has {len(pieces)} tokens, fewer than the {count} context vectors: write a longer"
            " phrase, set a smaller number of context vectors, or leave context_init empty to start from random ones."
        )
    return phrase, nn.Parameter(embed_pieces(tower, pieces[:count]))


def deeper_prompts(layers: int, count: int, width: int, numbers: torch.Generator) -> list[nn.Parameter]:
    """Drawn prompts [count, width] of `layers` layers."""
    return [draw_normal((count, width), INITIAL_STD, numbers) for _ in range(layers)]


def prompted_text(tower: TextTower, rows: TextRows, prompts: Sequence[Tensor]) -> Tensor:
    """Unnormalised text features [rows, dim]; `prompts[l]` [M, width] fills the rows' context slots at layer l."""
    first, *deeper = prompts
    edits = {layer: [ReplaceContexts(context)] for layer, context in enumerate(deeper, start=1)}
    features: Tensor = tower(rows.to(first.device), first, edits)
    return features


def prompted_image(tower: ImageTower, pixels: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Unnormalised image features [batch, dim]; `prompts[l]` [M, width] stand behind the patches at layer l.

    Those of layer 0 get no position but pass the tower's first norm; deeper ones are put in as they are. Without any
    it is the frozen tower.
    """
    features: Tensor = tower(pixels, image_edits(prompts))
    return features


def image_edits(prompts: Sequence[Tensor]) -> dict[int, Sequence[Edit]]:
    """What `prompted_image` does to a tower on entry to each layer."""
    if not prompts:
        return {}
    first, *deeper = prompts
    edits: dict[int, Sequence[Edit]] = {EMBEDDING: [InsertTokens(first)]}
    for layer, vectors in enumerate(deeper, start=1):
        edits[layer] = [ReplaceTokens(vectors, at=-len(vectors))]
    return edits


# --- the official releases' names -------------------------------------------------------------------------------------


def reference_name(tower: str, layer: int) -> str:
    """What MaPLe's and PromptSRC's releases call the prompts of a layer of a tower, "image" or "text"."""
    if layer:
        return f"{tower}_encoder.transformer.resblocks.{layer}.VPT_shallow"
    return "image_encoder.VPT" if tower == "image" else "prompt_learner.ctx"


def reference_sizes(state: Mapping[str, Tensor], tower: str) -> tuple[int, int]:
    """How many prompts a checkpoint of those releases has per layer of a tower, and in how many layers; 0, 0 for none.

    Args:
        state: As `adaptkit.methods.reference.read_reference_checkpoint` gives it.
        tower: "image" or "text".
    """
    name = reference_name(tower, 0)
    first = state.get(name, state.get(name.partition(".")[2]))
    if first is None or first.dim() != 2:
        return 0, 0
    found = (_LATER.fullmatch(key) for key in state)
    layers = [int(match[2]) for match in found if match and match[1] == tower]
    return len(first), 1 + max(layers, default=0)
