"""What inference needs of a fitted method and no more: a head on image features, and a tower where it changed one.

`Method.fold` gives a `Fold`. Its parts are plain modules without conditions on data, so that torch.export and ONNX take
them as they are; they hold copies of what was learned, and share frozen weights with the backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.backbones.base import Backbone
from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.backbones.tower import DropTokens, Edits, ImageTower
from adaptkit.errors import UnsupportedError

Kind = Literal["matrix", "head", "tower"]
"""A class-weight matrix on frozen features, a small head on them, or an image tower of its own with a head."""


@dataclass(frozen=True)
class Fold:
    """A fitted method without its text tower, for one list of classes.

    Args:
        head: From features (the frozen backbone's, or the tower's output) to logits [batch, classes].
        tower: From pixels [batch, 3, size, size] to what the head takes; None for the frozen backbone's encoder.
    """

    head: nn.Module
    tower: nn.Module | None = None

    @property
    def kind(self) -> Kind:
        """Which of the three it is."""
        if self.tower is not None:
            return "tower"
        return "matrix" if isinstance(self.head, MatrixHead) else "head"


def image_encoder(backbone: Backbone) -> nn.Module:
    """The module that takes pixels [batch, 3, size, size] to the backbone's unnormalised features [batch, dim].

    Raises:
        UnsupportedError: A kind of backbone that has no such module.
    """
    if not isinstance(backbone, DualEncoder):
        raise UnsupportedError(
            f"{backbone.spec.name!r} has no image encoder that stands alone, so nothing folds on it."
        )
    return backbone.image


def _kept(value: Tensor) -> Tensor:
    """A copy that later training doesn't change."""
    return value.detach().clone()


class MatrixHead(nn.Module):
    """scale · weight · feature + bias: a class-weight matrix.

    Args:
        weight: [classes, dim].
        scale: What products are multiplied with.
        bias: Added to the logits: a number, or [classes].
        normalise: Whether features are brought to unit length first.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self, weight: Tensor, *, scale: float = 1.0, bias: Tensor | float = 0.0, normalise: bool = True
    ) -> None:
        super().__init__()
        self.scale, self.normalise = float(scale), normalise
        self.register_buffer("weight", _kept(weight.float()))
        self.register_buffer("bias", _kept(torch.as_tensor(bias, dtype=torch.float32, device=weight.device)))

    def forward(self, features: Tensor) -> Tensor:
        """Logits [batch, classes] of features [batch, dim]."""
        x = F.normalize(features.float(), dim=-1) if self.normalise else features.float()
        return self.scale * (x @ self.weight.T) + self.bias


class ClassBlocks:
    """Rows that belong to classes, as a block per class [classes, most rows of one]; short classes are filled up.

    Args:
        labels: Class of each row, int64 [rows].
        classes: How many there are.

    Attributes:
        index: Row at each place, int64 [classes, most]; row 0 where there is none.
        filled: Whether a row of the class stands there, bool [classes, most].
    """

    def __init__(self, labels: Tensor, classes: int) -> None:
        counts = labels.bincount(minlength=classes)
        most = int(counts.max()) if len(labels) else 0
        order = labels.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        place = torch.arange(len(labels), device=labels.device) - starts[labels[order]]
        self.index = torch.zeros(classes, most, dtype=torch.int64, device=labels.device)
        self.index[labels[order], place] = order
        self.filled = torch.zeros(classes, most, dtype=torch.bool, device=labels.device)
        self.filled[labels[order], place] = True


class CacheHead(nn.Module):
    """Zero-shot logits, and alpha times the sum of value · exp(beta (key · f - 1)) over a class's keys.

    Args:
        text: Zero-shot classifier on unit features; its own normalisation is left out.
        keys: [keys, dim], or [keys, kept channels].
        labels: Class of each key among the current ones, int64 [keys].
        classes: How many current classes there are.
        values: What each key weighs, [keys].
        alpha: Weight of the cache.
        beta: Sharpness of similarity.
        channels: Channels that keys are compared on, unit length there; None for all of the unit feature.
    """

    keys: Tensor
    values: Tensor
    channels: Tensor | None

    def __init__(
        self,
        text: MatrixHead,
        keys: Tensor,
        labels: Tensor,
        classes: int,
        values: Tensor,
        *,
        alpha: float,
        beta: float,
        channels: Tensor | None = None,
    ) -> None:
        super().__init__()
        blocks = ClassBlocks(labels, classes)
        self.text, self.alpha, self.beta = text, alpha, beta
        self.shape = (classes, blocks.index.shape[1])
        self.register_buffer("keys", _kept(keys[blocks.index.flatten()]))  # [classes · most, dim]
        self.register_buffer("values", _kept(torch.where(blocks.filled, values[blocks.index], 0.0).flatten()))
        self.register_buffer("channels", None if channels is None else _kept(channels))

    def forward(self, features: Tensor) -> Tensor:
        """Logits [batch, classes] of features [batch, dim]."""
        f = F.normalize(features.float(), dim=-1)
        logits: Tensor = self.text(f)
        compared = f if self.channels is None else F.normalize(f[:, self.channels], dim=-1)
        similar = torch.exp(self.beta * (compared @ self.keys.T - 1)) * self.values  # [batch, classes · most]
        return logits + self.alpha * similar.unflatten(1, self.shape).sum(dim=-1)


class SentenceHead(nn.Module):
    """Logits of several rows per class, of which the largest counts, or the log of the mean of their exponentials.

    Args:
        rows: Unit rows [rows, dim], for all sentences.
        owners: Class of each, int64 [rows].
        classes: How many there are; each has at least one row.
        scale: Of the cosine.
        bias: Added to it.
        how: "max" or "log-mean".
    """

    gaps: Tensor
    log_sizes: Tensor

    def __init__(
        self,
        rows: Tensor,
        owners: Tensor,
        classes: int,
        *,
        scale: float,
        bias: float = 0.0,
        how: Literal["max", "log-mean"],
    ) -> None:
        super().__init__()
        blocks = ClassBlocks(owners, classes)
        self.how, self.shape = how, (classes, blocks.index.shape[1])
        self.rows = MatrixHead(rows[blocks.index.flatten()], scale=scale, bias=bias)
        self.register_buffer("gaps", torch.zeros_like(blocks.index, dtype=torch.float32))
        self.gaps.masked_fill_(~blocks.filled, -torch.inf)  # [classes, most]
        self.register_buffer("log_sizes", blocks.filled.sum(dim=1).float().log())

    def forward(self, features: Tensor) -> Tensor:
        """Logits [batch, classes] of features [batch, dim]."""
        by_class = self.rows(features).unflatten(1, self.shape) + self.gaps  # [batch, classes, most]
        if self.how == "max":
            return by_class.amax(dim=-1)
        return by_class.logsumexp(dim=-1) - self.log_sizes


class Bottleneck(nn.Module):
    """x ↦ ratio · relu(up(relu(down(x)))) + (1 - ratio) · x.

    Args:
        down: [hidden, dim].
        up: [dim, hidden].
        ratio: Share of the adapted feature.
        normalise: Whether x is brought to unit length first.
    """

    down: Tensor
    up: Tensor

    def __init__(self, down: Tensor, up: Tensor, ratio: float, *, normalise: bool = False) -> None:
        super().__init__()
        self.ratio, self.normalise = ratio, normalise
        self.register_buffer("down", _kept(down))
        self.register_buffer("up", _kept(up))

    def forward(self, features: Tensor) -> Tensor:
        """Mixed features [batch, dim]."""
        x = F.normalize(features.float(), dim=-1) if self.normalise else features.float()
        adapted = F.relu(F.linear(F.relu(F.linear(x, self.down)), self.up))
        return self.ratio * adapted + (1 - self.ratio) * x


class EditedTower(nn.Module):
    """An image tower with fixed edits: prompts and tokens that were learned.

    Args:
        tower: Frozen, shared with the backbone.
        edits: What is put in before which block; the vectors are copied.
    """

    def __init__(self, tower: ImageTower, edits: Edits) -> None:
        super().__init__()
        self.tower = tower
        self._places: list[tuple[int, str, Any]] = []
        for layer, several in edits.items():
            for edit in several:
                name = "" if isinstance(edit, DropTokens) else f"vectors_{len(self._places)}"
                if name:
                    self.register_buffer(name, _kept(edit.vectors))  # type: ignore[union-attr]  # all others have some
                self._places.append((layer, name, edit))

    def edits(self) -> Edits:
        """The edits, as a tower takes them."""
        made: dict[int, list[Any]] = {}
        for layer, name, edit in self._places:
            made.setdefault(layer, []).append(replace(edit, vectors=getattr(self, name)) if name else edit)
        return made

    def forward(self, pixels: Tensor) -> Tensor:
        """Unnormalised features [batch, dim] of preprocessed pixels [batch, 3, size, size]."""
        features: Tensor = self.tower(pixels, self.edits())
        return features


def rebuilt_tower(tower: ImageTower, state: dict[str, Tensor]) -> ImageTower:
    """A plain tower of the same shape with other weights, which it takes over without copying them."""
    with torch.device("meta"), torch.random.fork_rng(devices=()):  # its own draws must not move torch's generator
        plain = ImageTower(tower.shape)
    plain.load_state_dict(state, assign=True)
    return plain.requires_grad_(False).eval()


def sentence_owners(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Class of each row, int64 [rows], where class i has `sizes[i]` rows one behind the other."""
    return torch.arange(len(sizes), device=device).repeat_interleave(torch.tensor(sizes, device=device))
