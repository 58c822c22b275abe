"""Fewer image tokens for the language model: which of an image's vectors are kept, and what becomes of the others.

Kept vectors keep the positions that they had among all of them (`ImageFeatures.kept`).

Source: VScan arXiv 2505.22654, stage 1; mllm sheet `vscan.md` (selection, merging, traps, alternatives).
Differs from the paper: the quota rule of its Qwen code chooses in every family, since it alone gives exactly as many
tokens as asked for; what every window's quota leaves over goes to the best of the rest. Layers are found by their share
of the depth (5 of 24, as in its LLaVA; 7 of 32, as in its Qwen2.5-VL). Stage 2, which drops tokens between layers of
the language model, is left out: each layer would have keys of another length, which continuations don't share.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.errors import BackboneError, ConfigError

Rule = Literal["none", "vscan", "attention", "merge", "norm", "uniform", "random"]

PATCH_WINDOW = 6
"""Side of a window where an encoder has a class token and every patch is a token (LLaVA)."""
MERGED_WINDOW = 4
"""Side of a window for all others (Qwen), in tokens."""


@dataclass(frozen=True)
class Reduction:
    """How image tokens are thinned out.

    Args:
        rule: vscan (half by shallow attention spread over windows, half by deep attention, the rest merged), attention
            (the deepest alone), merge (an even grid, the rest merged), norm (the longest vectors), uniform (an even
            grid) or random (drawn from the image's own bytes); "none" keeps all.
        keep: Share of an image's tokens that is kept, above 0 and at most 1.
        window: Side of a window in tokens; 0 for the family's.
    """

    rule: Rule = "none"
    keep: float = 1.0
    window: int = 0

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value}, but must be {wanted}"
            for name, value, wanted, ok in (
                ("token_keep", self.keep, "above 0 and at most 1", 0 < self.keep <= 1),
                ("token_window", self.window, "at least 0 (0: the family's)", self.window >= 0),
            )
            if not ok
        ]
        if problems:
            raise ConfigError(f"These settings can't be used: {'; '.join(problems)}.")

    @property
    def active(self) -> bool:
        """Whether anything is dropped."""
        return self.rule != "none" and self.keep < 1

    @property
    def attends(self) -> bool:
        """Whether it needs the vision encoder's attention."""
        return self.active and self.rule in ("vscan", "attention")

    def count(self, tokens: int) -> int:
        """How many of an image's tokens stay, at least 1."""
        return min(tokens, max(1, math.floor(self.keep * tokens + 0.5)))


def thinned(
    features: ImageFeatures,
    reduction: Reduction,
    pixels: Tensor,
    maps: Sequence[Tensor] = (),
    window: int = MERGED_WINDOW,
) -> ImageFeatures:
    """Image features with fewer tokens per image, as many for each.

    Args:
        features: All tokens; they aren't changed.
        reduction: The rule.
        pixels: The images, [images, 3, size, size]: random choices depend on them alone, so on no other image.
        maps: Shallow and deep attention, [images, tokens on the grid] each, for rules that need it.
        window: Side of a window where the reduction doesn't say.

    Raises:
        BackboneError: The tokens aren't a square grid, with at most a class token in front.
    """
    odd = next((count for count in features.counts if count - math.isqrt(count) ** 2 > 1), None)
    if odd is not None:
        raise BackboneError(f"{odd} tokens of an image are no square grid, so none can be left out by where they lie.")
    kept, places = [], []
    for image, tokens in enumerate(features.tokens):
        keep = reduction.count(len(tokens))
        attention = (maps[0][image], maps[1][image]) if maps else None
        seed = zlib.crc32((pixels[image].detach().float() * 255).round().to(torch.uint8).cpu().numpy().tobytes())
        vectors, own = reduced(tokens, keep, reduction.rule, attention, reduction.window or window, seed)
        kept.append(vectors)
        places.append(own)
    return replace(features, tokens=tuple(kept), kept=tuple(places), whole=features.counts)


def reduced(
    tokens: Tensor,
    keep: int,
    rule: Rule,
    attention: tuple[Tensor, Tensor] | None = None,
    window: int = MERGED_WINDOW,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """An image's kept vectors in reading order [keep, width], and their places among all of them, int64 [keep].

    Vectors in front of the grid (a class token) are always kept first and never merged into.

    Args:
        tokens: All of the image's vectors [n, width]; they aren't changed.
        keep: How many are kept, from 1 to n.
        rule: As in `Reduction`.
        attention: Shallow and deep attention of the tokens on the grid, [grid] each, for rules that need it.
        window: Side of a window.
        seed: Of random choices.
    """
    side = math.isqrt(len(tokens))
    lead = len(tokens) - side**2
    if keep <= lead:
        places = torch.arange(keep, device=tokens.device)
        return tokens[places], places
    grid = tokens[lead:]
    chosen = _chosen(grid, side, keep - lead, rule, attention, window, seed).to(tokens.device)
    kept = merged(grid, chosen) if rule in ("vscan", "merge") else grid[chosen]
    places = torch.cat([torch.arange(lead, device=tokens.device), lead + chosen])
    return torch.cat([tokens[:lead], kept]), places


def _chosen(
    grid: Tensor,
    side: int,
    keep: int,
    rule: Rule,
    attention: tuple[Tensor, Tensor] | None,
    window: int,
    seed: int,
) -> Tensor:
    """Sorted places on the grid, int64 [keep]."""
    if rule in ("vscan", "attention"):
        shallow, deep = cast(tuple[Tensor, Tensor], attention)
        local = local_choice(shallow, side, keep // 2, window) if rule == "vscan" else deep.new_zeros(0).long()
        rest = deep.index_fill(0, local, -torch.inf)
        return torch.cat([local, _top(rest, keep - len(local))]).sort().values
    if rule == "norm":
        return _top(grid.detach().float().norm(dim=-1), keep).sort().values
    if rule == "random":
        return torch.randperm(len(grid), generator=torch.Generator().manual_seed(seed))[:keep].sort().values
    return even_choice(side, keep)


def _top(scores: Tensor, count: int) -> Tensor:
    """Places of the highest scores, the first of equal ones, int64 [count]."""
    return scores.argsort(descending=True, stable=True)[:count]


def window_of(side: int, window: int) -> Tensor:
    """The window of each place of a grid, int64 [side · side]; what is left over belongs to the last row and column."""
    windows = max(1, side // window)
    along = (torch.arange(side) // window).clamp(max=windows - 1)
    return (along[:, None] * windows + along).flatten()


def local_choice(scores: Tensor, side: int, count: int, window: int) -> Tensor:
    """The highest scores such that no window has more than its share, int64 [count].

    Args:
        scores: [side · side].
        side: Of the grid.
        count: How many, at most all.
        window: Side of a window.
    """
    windows = window_of(side, window)
    quota = math.ceil(count / (int(windows.max()) + 1))
    order = _top(scores, len(scores)).cpu()
    taken = [0] * (int(windows.max()) + 1)
    chosen, others = list[int](), list[int]()
    for place in order.tolist():
        own = int(windows[place])
        if taken[own] < quota:
            taken[own] += 1
            chosen.append(place)
        else:
            others.append(place)
    # a window may be smaller than its quota
    return torch.tensor((chosen + others)[:count], dtype=torch.int64, device=scores.device)


def even_choice(side: int, count: int) -> Tensor:
    """Places spread evenly over a grid, sorted, int64 [count]; every row of them has as many as the next, or one more.

    Args:
        side: Of the grid.
        count: How many, from 1 to side².
    """
    rows = min(side, max(math.ceil(count / side), round(math.sqrt(count))))
    places = []
    for row in range(rows):
        own = (row + 1) * count // rows - row * count // rows
        line = (2 * row + 1) * side // (2 * rows)
        places += [line * side + (2 * column + 1) * side // (2 * own) for column in range(own)]
    return torch.tensor(places, dtype=torch.int64)


def merged(tokens: Tensor, chosen: Tensor) -> Tensor:
    """Kept vectors [k, width], each the mean of itself and the dropped ones that are most similar to it.

    Args:
        tokens: All vectors [n, width]; they aren't changed.
        chosen: Which are kept, int64 [k].
    """
    dropped = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    dropped[chosen] = False
    if not bool(dropped.any()):
        return tokens[chosen]
    with torch.no_grad():
        unit = F.normalize(tokens.float(), dim=-1)
        nearest = (unit[dropped] @ unit[chosen].T).argmax(dim=1)  # [dropped]
    sums = tokens[chosen].float().index_add(0, nearest, tokens[dropped].float())
    counts = torch.ones(len(chosen), device=tokens.device).index_add(0, nearest, torch.ones_like(nearest).float())
    return (sums / counts[:, None]).to(tokens.dtype)
