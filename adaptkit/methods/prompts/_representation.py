"""Representation tokens in the upper layers of both towers: the parts that MMRL and MMRL++ are made of.

Source: mmrl and mmrlpp sheets ("Forward pass").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.backbones.base import Backbone
from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.backbones.tower import Edit, Edits, ImageTower, InsertTokens, ReplaceTokens, TextRows, TextTower
from adaptkit.errors import BackboneError, ConfigError, DataError
from adaptkit.methods.base import draw_linear, render_prompts
from adaptkit.methods.folding import EditedTower
from adaptkit.methods.prompts._layout import open_image, open_text

FIRST = 1
"""Where the tokens begin in a row: behind the class token of an image and the start token of a text."""


# --- settings against a backbone --------------------------------------------------------------------------------------


def token_layers(first: int, last: int, layers: int, tower: str, backbone: str) -> range:
    """The layers of a tower that get tokens, counted from 0.

    Args:
        first: Counted from 1; 0 for the middle one (6 of 12).
        last: Counted from 1; 0 for the tower's last.
        layers: Of the tower.
        tower: "text" or "image".
        backbone: Its name.

    Raises:
        ConfigError: A layer lies beyond the tower, or the last one before the first.
    """
    for name, layer in (("first_layer", first), ("last_layer", last)):
        if layer > layers:
            raise ConfigError(
                f"{name} is {layer}, but the {tower} tower of {backbone!r} has {layers} layers: choose at most"
                f" {layers}, or 0 for the default."
            )
    begin, end = first or max(1, layers // 2), last or layers
    if begin > end:
        raise ConfigError(
            f"The tokens would begin in layer {begin} of the {tower} tower of {backbone!r} and end in layer {end}:"
            " choose a last_layer that is no smaller than first_layer."
        )
    return range(begin - 1, end)


def open_class_token_image(backbone: Backbone, needed_by: str) -> ImageTower:
    """The opened image tower, whose feature is that of its class token.

    Raises:
        BackboneError: The tower can't be opened, or pools something else.
    """
    image = open_image(backbone, needed_by)
    if image.shape.pool != "class" or image.class_embedding is None:
        pooled = {"mean": "the mean of its patches", "attention": "a learned query's view of its patches"}
        raise BackboneError(
            f"{needed_by} reads an image's feature from its class token, and the image tower of {backbone.spec.name!r}"
            f" takes {pooled.get(image.shape.pool, 'something else')}: choose a CLIP that pools its class token."
        )
    return image


def open_started_text(backbone: Backbone, needed_by: str) -> tuple[DualEncoder, TextTower]:
    """The backbone and its opened text tower, whose texts begin with a start token.

    Raises:
        BackboneError: The tower can't be opened, or its texts begin with their first word.
    """
    dual, text = open_text(backbone, needed_by)
    first, other = (int(ids[0]) for ids in dual.tokenize(["a", "photo"]).ids)
    if first != other:
        raise BackboneError(
            f"{needed_by} puts its tokens behind the start token of a text, and the tokenizer of"
            f" {backbone.spec.name!r} writes none: choose a CLIP whose texts begin with one."
        )
    return dual, text


def template_rows(backbone: DualEncoder, names: Sequence[str], templates: Sequence[str]) -> TextRows:
    """The layout of all templates with all class names in them, template by template.

    Raises:
        DataError: A class name doesn't fit into the context length; the message says which.
    """
    prompts = [prompt for template in templates for prompt in render_prompts(names, template)]
    try:
        tokens = backbone.tokenize(prompts)
    except BackboneError as error:
        sizes = [len(backbone.word_pieces(prompt)) for prompt in prompts]
        longest = max(range(len(prompts)), key=sizes.__getitem__)
        raise DataError(
            f"Class name {names[longest % len(names)]!r} is too long: with its template it has {sizes[longest]} tokens,"
            f" and {backbone.spec.name!r} reads {backbone.spec.context_length}, start and end included. Shorten the"
            " name or the template."
        ) from error
    return backbone.text_rows(tokens)


def token_edits(tokens: Sequence[Tensor], layers: range, share: float) -> dict[int, Sequence[Edit]]:
    """What is done to a tower on entry to each of `layers`.

    Args:
        tokens: Per layer, [K, width].
        layers: In the first the tokens are inserted; in each further one they take the place of the earlier ones.
        share: Of the new tokens in each further layer; the rest stays with what the layer before made of the old ones.
    """
    first, *others = tokens
    edits: dict[int, Sequence[Edit]] = {layers[0]: [InsertTokens(first, at=FIRST)]}
    for layer, vectors in zip(layers[1:], others, strict=True):
        edits[layer] = [ReplaceTokens(vectors, at=FIRST, share=share)]
    return edits


class ReadOut(EditedTower):
    """An image tower with representation tokens, and what is read from it: the class feature, or both features mixed.

    Args:
        tower: Frozen, shared with the backbone.
        edits: The tokens, as `token_edits` gives them.
        second: Projects the tokens' mean [batch, width] to the second feature; None to read the class feature alone.
        tokens: How many representation tokens there are.
        alpha: Share of the class feature in the mix of unit features.
    """

    def __init__(
        self, tower: ImageTower, edits: Edits, second: nn.Linear | None = None, *, tokens: int = 0, alpha: float = 1.0
    ) -> None:
        super().__init__(tower, edits)
        self.second, self.count, self.alpha = second, tokens, alpha

    def forward(self, pixels: Tensor) -> Tensor:
        """The unnormalised class feature, or the mix of unit features, [batch, dim]."""
        tower = self.tower
        x = tower.hidden(pixels, stop=0)
        rows = tower.tokens(x, self.edits(), rows=range(FIRST + self.count if self.second is not None else 1))
        normed = tower.ln_post(rows) if tower.shape.norm_after_pool else rows
        feature: Tensor = tower.projection(normed[:, 0])
        if self.second is None:
            return feature
        other = self.second(normed[:, FIRST:].mean(dim=1))
        return self.alpha * F.normalize(feature, dim=-1) + (1 - self.alpha) * F.normalize(other, dim=-1)


def second_projection(project: Callable[[Tensor], Tensor], width: int, device: torch.device) -> nn.Linear:
    """A projection [batch, width] → [batch, dim] that is linear, however it is computed, as one layer."""
    offset = project(torch.zeros(1, width, device=device))[0]  # [dim]
    matrix = project(torch.eye(width, device=device)) - offset  # [width, dim]
    layer = nn.utils.skip_init(nn.Linear, width, len(offset), device=device)
    with torch.no_grad():
        layer.weight.copy_(matrix.T)
        layer.bias.copy_(offset)
    return layer.requires_grad_(False)


# --- from the shared tokens to those of a layer -----------------------------------------------------------------------


class SeparateMaps(nn.ModuleList):
    """MMRL's maps: a linear layer for each layer of a tower, all copies of one draw at the start."""

    def __init__(self, layers: int, width: int, outputs: int, numbers: torch.Generator) -> None:
        drawn = draw_linear(width, outputs, numbers)
        super().__init__(deepcopy(drawn) for _ in range(layers))

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Shared tokens [K, width] to those of each layer, [K, outputs]."""
        return [layer(tokens) for layer in self]


class ResidualMaps(nn.Module):
    """MMRL++'s maps: weight + left[i] · right[i] and bias[i] for the i-th layer of a tower.

    All are one linear layer at the start, since `right` is 0.
    """

    def __init__(self, layers: int, width: int, outputs: int, rank: int, numbers: torch.Generator) -> None:
        super().__init__()
        drawn = draw_linear(width, outputs, numbers)
        self.weight = nn.Parameter(drawn.weight.detach())  # [outputs, width]
        self.left = nn.ParameterList(draw_kaiming(outputs, rank, numbers) for _ in range(layers))
        self.right = nn.ParameterList(nn.Parameter(torch.zeros(rank, width)) for _ in range(layers))
        self.bias = nn.ParameterList(nn.Parameter(drawn.bias.detach().clone()) for _ in range(layers))

    def __len__(self) -> int:
        return len(self.bias)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Shared tokens [K, width] to those of each layer, [K, outputs]."""
        shared = tokens @ self.weight.T  # [K, outputs]
        parts = zip(self.left, self.right, self.bias, strict=True)
        return [shared + (tokens @ right.T) @ left.T + bias for left, right, bias in parts]


def draw_kaiming(rows: int, columns: int, numbers: torch.Generator) -> nn.Parameter:
    """[rows, columns] by torch's Kaiming rule with a = √5, which means uniform in ±1/√columns."""
    bound = columns**-0.5
    return nn.Parameter(torch.empty(rows, columns).uniform_(-bound, bound, generator=numbers))


# --- checkpoints of the official releases -----------------------------------------------------------------------------

SHARED_TOKENS = "representation_learner.compound_rep_tokens"
_MAP_NAME = re.compile(r"r2([tv])proj\.(?:srra\.)?(\d+)\.")


def entry(state: Mapping[str, Tensor], name: str) -> Tensor | None:
    """A checkpoint's entry, whether it was saved with the whole model or by the learner alone."""
    found = state.get(name)
    return state.get(name.partition(".")[2]) if found is None else found


def mapped_layers(state: Mapping[str, Tensor]) -> dict[str, int]:
    """For how many layers a checkpoint has maps, by tower ("text", "image")."""
    found = {match.groups() for match in map(_MAP_NAME.search, state) if match}
    return {tower: sum(kind == letter for kind, _ in found) for tower, letter in (("text", "t"), ("image", "v"))}
