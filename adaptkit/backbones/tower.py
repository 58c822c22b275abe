"""One plain transformer tower of ours, filled from other libraries' weights, with openings for methods.

A tower has three steps, embed → blocks → pool. Before any block a caller may replace, insert or drop tokens (`Edit`);
block index `EMBEDDING` (-1) stands for the embedded tokens before the first normalisation. Four facts make it fast, all
of them exact (tests compare outputs and gradients with the plain path):

* In a causal text tower no token sees what comes after it. What follows the end token is cut off, and the leading
  tokens that all rows share are computed once, as keys and values, for all classes (the shared prefix).
* Only the pooled token leaves the tower, so the last block computes the others' keys and values alone.
* Rows differ in length. Everything but attention works on one token at a time, so it sees the rows' tokens one behind
  the other, without padding (`_Packing`).
* Rows (classes) go through in chunks, recomputed in the backward pass where memory would not hold them all.

Source: pre-norm transformer of CLIP (arXiv 2103.00020); protocol-training sheet, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adaptkit.errors import BackboneError

EMBEDDING = -1
"""Edit key: after the positional embedding is added and before the first normalisation."""

VALUES_KEPT_PER_CHANNEL = 16
"""What a block keeps of a token for the backward pass, in multiples of the width: inputs of norms, queries, keys,
values, attention's output, and twice the MLP's inside."""

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
KeysValues = tuple[Tensor, Tensor]


def activate(x: Tensor, kind: Activation) -> Tensor:
    """The MLP's activation, any shape; "quick_gelu" is x·sigmoid(1.702 x), written to keep one tensor for backward."""
    if kind == "quick_gelu":
        return F.silu(1.702 * x) / 1.702
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


@dataclass(frozen=True)
class BlockShape:
    """The sizes of a tower's blocks."""

    width: int
    heads: int
    layers: int
    mlp_width: int
    activation: Activation = "gelu"
    norm_eps: float = 1e-5
    layer_scale: bool = False


class Attention(nn.Module):
    """Multi-head attention with separate projections, so that peft and bitsandbytes apply as they are."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)  # [..., heads, n, head_dim]

    def keys_values(self, x: Tensor, packing: _Packing | None = None) -> KeysValues:
        """Keys and values [..., heads, n, head_dim] of normalised tokens [..., n, width].

        With a packing, of packed tokens [groups, total, width]: [groups, rows, heads, length, head_dim].
        """
        k, v = self.k_proj(x), self.v_proj(x)
        if packing is not None:
            k, v = packing.unpack(k), packing.unpack(v)
        return self._split(k), self._split(v)

    def forward(
        self,
        queries: Tensor,
        keys_values: KeysValues,
        *,
        causal: bool = False,
        mask: Tensor | None = None,
        prefix: KeysValues | None = None,
        packing: _Packing | None = None,
    ) -> Tensor:
        """Attend from normalised `queries` [..., q, width] to the keys; output [..., q, width].

        Args:
            queries: [..., q, width]; with a packing [groups, total, width], or [groups, rows, width] for one per row.
            keys_values: Of the tokens themselves, [..., heads, n, head_dim].
            causal: Token i sees tokens 0 … i only (q = n).
            mask: True where a query may look, broadcastable to [..., heads, q, n].
            prefix: Keys and values [groups, heads, p, head_dim] shared by all rows of a group, seen by every query.
            packing: Where rows lie in packed queries.
        """
        q = self.q_proj(queries)
        one_per_row = packing is not None and queries.shape[1] == packing.rows
        if packing is not None:
            q = q[:, :, None] if one_per_row else packing.unpack(q)  # [groups, rows, q, width]
        q, (k, v) = self._split(q), keys_values
        if prefix is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        else:
            out = _attend_with_prefix(q, k, v, prefix, causal, mask)
        out = out.transpose(-2, -3).flatten(-2)  # [..., q, width]
        if packing is not None:
            out = out[:, :, 0] if one_per_row else packing.pack(out)
        attended: Tensor = self.out_proj(out)
        return attended


def _attend_with_prefix(
    q: Tensor, k: Tensor, v: Tensor, prefix: KeysValues, causal: bool, mask: Tensor | None
) -> Tensor:
    """One softmax over the shared prefix and each row's own tokens; the prefix is never copied per row.

    Shapes: q [g, r, h, q, d], k and v [g, r, h, n, d], prefix [g, h, p, d]; result [g, r, h, q, d].
    """
    prefix_k, prefix_v = prefix
    q = q * q.shape[-1] ** -0.5
    to_prefix = torch.einsum("grhqd,ghpd->grhqp", q, prefix_k)
    to_own = q @ k.transpose(-1, -2)  # [g, r, h, q, n]
    if causal:
        mask = torch.ones(to_own.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        to_own = to_own.masked_fill(~mask, float("-inf"))
    weights = torch.cat([to_prefix, to_own], dim=-1).softmax(dim=-1).to(v.dtype)  # [g, r, h, q, p + n]
    p = prefix_k.shape[-2]
    return torch.einsum("grhqp,ghpd->grhqd", weights[..., :p], prefix_v) + weights[..., p:] @ v


class Block(nn.Module):
    """A pre-norm transformer block, optionally with layer scale."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.activation: Activation = shape.activation
        self.ln_1 = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.attn = Attention(shape.width, shape.heads)
        self.ln_2 = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.fc1 = nn.Linear(shape.width, shape.mlp_width)
        self.fc2 = nn.Linear(shape.mlp_width, shape.width)
        self.scale_1 = nn.Parameter(torch.ones(shape.width)) if shape.layer_scale else None
        self.scale_2 = nn.Parameter(torch.ones(shape.width)) if shape.layer_scale else None

    def keys_values(self, x: Tensor) -> KeysValues:
        """What other tokens see of tokens `x` [..., n, width]."""
        return self.attn.keys_values(self.ln_1(x))

    def forward(
        self,
        x: Tensor,
        *,
        select: Callable[[Tensor], Tensor] | None = None,
        causal: bool = False,
        mask: Tensor | None = None,
        prefix: KeysValues | None = None,
        keys_values: KeysValues | None = None,
        packing: _Packing | None = None,
    ) -> Tensor:
        """Tokens [..., n, width] to tokens [..., n, width], or only those that `select` picks (the last block).

        `keys_values` are the tokens' own, where the caller has them already; the rest as in `Attention.forward`.
        """
        normed = self.ln_1(x)
        if keys_values is None:
            keys_values = self.attn.keys_values(normed, packing)
        if select is not None:
            x, normed = select(x), select(normed)
        attended = self.attn(normed, keys_values, causal=causal, mask=mask, prefix=prefix, packing=packing)
        x = x + (attended if self.scale_1 is None else attended * self.scale_1)
        hidden = self.fc2(activate(self.fc1(self.ln_2(x)), self.activation))
        return x + (hidden if self.scale_2 is None else hidden * self.scale_2)


# --- edits ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReplaceContexts:
    """Put `vectors` [contexts, width] (or [groups, contexts, width]) wherever the row layout has a context slot."""

    vectors: Tensor


@dataclass(frozen=True)
class InsertTokens:
    """Insert `vectors` [k, width] (or [batch or groups, k, width]) so that the first stands at position `at`.

    A negative `at` counts from the end, -1 meaning after the last token. Inserted tokens get no positional embedding.
    """

    vectors: Tensor
    at: int = -1


@dataclass(frozen=True)
class ReplaceTokens:
    """Put `vectors` in the place of the tokens from position `at` on; a negative `at` counts from the end.

    With a `share` below 1 the tokens become share · vectors + (1 - share) · what they were.
    """

    vectors: Tensor
    at: int
    share: float = 1.0


@dataclass(frozen=True)
class DropTokens:
    """Remove `count` tokens from position `at` on; a negative `at` counts from the end."""

    at: int
    count: int


Edit = ReplaceContexts | InsertTokens | ReplaceTokens | DropTokens
Edits = Mapping[int, Sequence[Edit]]
"""Edits by the index of the block they are made before."""


def _check_depth(edits: Edits, first: int, layers: int) -> None:
    wrong = [index for index in edits if not first <= index < layers]
    if wrong:
        raise BackboneError(
            f"Prompts were given for block {wrong[0]}, but this tower's blocks run from {max(first, 0)} to"
            f" {layers - 1}: choose a depth of at most {layers}."
        )


# --- image tower ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageShape:
    """The sizes and kinds of an image tower.

    Args:
        blocks: Sizes of the blocks.
        image_size: Side of the input in pixels.
        patch_size: Side of a patch in pixels.
        embed_dim: Size of the feature; 0 for no projection (the feature is the width).
        class_token: Whether a class token leads the patches.
        ln_pre: Whether embedded tokens are normalised before the first block.
        patch_bias: Whether the patch convolution has a bias.
        projection_bias: Whether the projection has a bias.
        pool: "class" (class token), "mean" (patch tokens), or "attention" (a learned query, SigLIP).
        norm_after_pool: Whether the last norm comes after pooling instead of before (only matters for "mean").
    """

    blocks: BlockShape
    image_size: int
    patch_size: int
    embed_dim: int
    class_token: bool = True
    ln_pre: bool = True
    patch_bias: bool = False
    projection_bias: bool = False
    pool: Literal["class", "mean", "attention"] = "class"
    norm_after_pool: bool = False


class AttentionPool(nn.Module):
    """One learned query attends to all tokens, then an MLP with a residual (SigLIP's head)."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.activation: Activation = shape.activation
        self.probe = nn.Parameter(torch.zeros(1, shape.width))
        self.attn = Attention(shape.width, shape.heads)
        self.norm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.fc1 = nn.Linear(shape.width, shape.mlp_width)
        self.fc2 = nn.Linear(shape.mlp_width, shape.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool [batch, n, width] to [batch, width]."""
        queries = self.probe.expand(tokens.shape[0], -1, -1)  # [batch, 1, width]
        x = self.attn(queries, self.attn.keys_values(tokens))[:, 0]  # [batch, width]
        return x + self.fc2(activate(self.fc1(self.norm(x)), self.activation))


class ImageTower(nn.Module):
    """A vision transformer, opened."""

    def __init__(self, shape: ImageShape) -> None:
        super().__init__()
        width = shape.blocks.width
        self.shape = shape
        self.num_patches = (shape.image_size // shape.patch_size) ** 2
        self.patch_embedding = nn.Conv2d(3, width, shape.patch_size, shape.patch_size, bias=shape.patch_bias)
        self.class_embedding = nn.Parameter(torch.zeros(width)) if shape.class_token else None
        self.positional_embedding = nn.Parameter(torch.zeros(self.num_patches + int(shape.class_token), width))
        self.ln_pre = nn.LayerNorm(width, eps=shape.blocks.norm_eps) if shape.ln_pre else nn.Identity()
        self.blocks = nn.ModuleList(Block(shape.blocks) for _ in range(shape.blocks.layers))
        self.ln_post = nn.LayerNorm(width, eps=shape.blocks.norm_eps)
        self.pool_head = AttentionPool(shape.blocks) if shape.pool == "attention" else None
        self.projection = (
            nn.Linear(width, shape.embed_dim, bias=shape.projection_bias) if shape.embed_dim else nn.Identity()
        )

    @property
    def layers(self) -> int:
        return self.shape.blocks.layers

    @property
    def width(self) -> int:
        return self.shape.blocks.width

    def embed(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels [batch, 3, size, size] to tokens [batch, n, width], before the first normalisation."""
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [batch, patches, width]
        if self.class_embedding is not None:
            x = torch.cat(
                [self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1
            )  # [batch, 1 + patches, w]
        return x + self.positional_embedding.to(x.dtype)

    def advance(self, x: Tensor, edits: Edits, start: int, stop: int) -> Tensor:
        """Run tokens [batch, n, width] through blocks `start` … `stop` - 1, with the edits before each."""
        for index in range(start, stop):
            x = self.blocks[index](_edit_tokens(x, edits.get(index, ())))
        return x

    def hidden(self, pixels: Tensor, edits: Edits | None = None, *, stop: int) -> Tensor:
        """Tokens [batch, n, width] on entry to block `stop`, its own edits not yet made."""
        edits = edits or {}
        x = self.ln_pre(_edit_tokens(self.embed(pixels), edits.get(EMBEDDING, ())))
        return self.advance(x, edits, 0, stop)

    def tokens(
        self, x: Tensor, edits: Edits | None = None, *, start: int = 0, rows: Sequence[int] | None = None
    ) -> Tensor:
        """Run tokens on from block `start`; the normalised outputs [batch, k, width] of positions `rows`.

        Only those positions' queries are computed in the last block. None gives every position.
        """
        edits = edits or {}
        _check_depth(edits, EMBEDDING, self.layers)
        last = self.layers - 1
        x = _edit_tokens(self.advance(x, edits, start, last), edits.get(last, ()))
        select = None if rows is None else lambda t: t[:, list(rows)]  # [batch, k, width]
        x = self.blocks[last](x, select=select)
        return x if self.shape.norm_after_pool else self.ln_post(x)

    def pool(self, x: Tensor, edits: Edits | None = None, *, start: int = 0) -> Tensor:
        """Run tokens [batch, n, width] on from block `start` and pool; unnormalised features [batch, embed_dim]."""
        if self.shape.pool == "class":
            pooled = self.tokens(x, edits, start=start, rows=(0,))[:, 0]  # [batch, width]
        else:
            x = self.tokens(x, edits, start=start)
            if self.pool_head is not None:
                pooled = self.pool_head(x)
            else:
                pooled = x[:, int(self.shape.class_token) :].mean(dim=1)  # [batch, width]
        return self.projection(self.ln_post(pooled) if self.shape.norm_after_pool else pooled)

    def forward(self, pixels: Tensor, edits: Edits | None = None) -> Tensor:
        """Unnormalised features [batch, embed_dim] of preprocessed pixels [batch, 3, size, size]."""
        edits = edits or {}
        _check_depth(edits, EMBEDDING, self.layers)
        return self.pool(self.hidden(pixels, edits, stop=0), edits)


def _edit_tokens(x: Tensor, edits: Sequence[Edit]) -> Tensor:
    """Apply position edits to image tokens [batch, n, width]."""
    for edit in edits:
        if isinstance(edit, ReplaceContexts):
            raise BackboneError("An image has no context slots: use ReplaceTokens with a position.")
        x = _splice(x, edit)
    return x


def _count(edit: InsertTokens | ReplaceTokens | DropTokens) -> int:
    return edit.count if isinstance(edit, DropTokens) else edit.vectors.shape[-2]


def _bounds(edit: InsertTokens | ReplaceTokens | DropTokens, length: int) -> tuple[int, int]:
    """Start and end of what the edit takes away from a row of `length` tokens (nothing, for an insertion)."""
    inserts = isinstance(edit, InsertTokens)
    start = edit.at if edit.at >= 0 else length + edit.at + int(inserts)
    end = start if inserts else start + _count(edit)
    if not 0 <= start <= end <= length:
        raise BackboneError(f"Position {edit.at} with {_count(edit)} tokens lies outside a row of {length} tokens.")
    return start, end


def _splice(x: Tensor, edit: InsertTokens | ReplaceTokens | DropTokens) -> Tensor:
    """Insert, replace or drop along the second-last axis of `x` [..., n, width]."""
    start, end = _bounds(edit, x.shape[-2])
    parts = [x[..., :start, :], x[..., end:, :]]
    if not isinstance(edit, DropTokens):
        vectors = edit.vectors.to(x.dtype)
        while vectors.dim() < x.dim():
            vectors = vectors.unsqueeze(-3)  # [..., 1, k, width]
        if isinstance(edit, ReplaceTokens) and edit.share != 1:
            vectors = torch.lerp(x[..., start:end, :], vectors.expand_as(x[..., start:end, :]), edit.share)
        parts.insert(1, vectors.expand(*x.shape[:-2], -1, -1))
    return torch.cat(parts, dim=-2)


def _splice_places(places: Tensor, mark: Tensor, edit: InsertTokens | ReplaceTokens | DropTokens) -> Tensor:
    """The same along the last axis of `places` [rows, n], facts about each place; new places get `mark` [rows, 1]."""
    start, end = _bounds(edit, places.shape[-1])
    parts = [places[:, :start], places[:, end:]]
    if not isinstance(edit, DropTokens):
        parts.insert(1, mark.expand(-1, _count(edit)))
    return torch.cat(parts, dim=-1)


# --- text tower -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextRows:
    """The layout of prompts, integers only: where each place takes its embedding from. Built once per class list.

    Args:
        symbols: int64 [rows, length]; a value ≥ 0 is a token id, -1 - j stands for context vector j.
        positions: int64 [rows, length], index into the positional embedding.
        ends: int64 [rows], position that is pooled.
        prefix: How many leading columns all rows share (0 for towers without a causal mask).
        lengths: How many columns each row needs, as Python integers (asking a GPU tensor would wait for the GPU).
        hidden: bool [rows, length], True where a token's key is hidden from every query (CoCa), or None.
        contexts_behind: Whether context slots stand behind the prefix (mid, front and class-specific ones do).
    """

    symbols: Tensor
    positions: Tensor
    ends: Tensor
    prefix: int
    lengths: tuple[int, ...]
    hidden: Tensor | None = None
    contexts_behind: bool = True

    @classmethod
    def build(
        cls,
        symbols: Tensor,
        ends: Tensor,
        *,
        causal: bool,
        positions: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> TextRows:
        """Cut what no pooled token can see, and find the longest run of leading columns that all rows share.

        Rows that are not causal keep every column: their padding is seen by the pooled token.
        """
        rows, length = symbols.shape
        if positions is None:
            positions = torch.arange(length, device=symbols.device).expand_as(symbols)
        if not causal:
            return cls(symbols, positions, ends, 0, (length,) * rows, hidden)
        lengths = tuple((ends + 1).tolist())
        symbols, positions = symbols[:, : max(lengths)], positions[:, : max(lengths)]
        shared = ((symbols == symbols[:1]) & (positions == positions[:1])).all(dim=0)  # [length]
        if hidden is not None:
            hidden = hidden[:, : max(lengths)]
            shared = shared & ~hidden.any(dim=0)  # what the prefix holds is seen by every query
        run = int(shared.long().cumprod(0).sum())
        prefix = min(run, min(lengths) - 1)  # the pooled token is never shared
        behind = bool((symbols[:, prefix:] < 0).any())
        return cls(symbols, positions, ends, prefix, lengths, hidden, behind)

    def to(self, device: torch.device) -> TextRows:
        """The same layout on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("symbols", "positions", "ends")}
        return replace(self, **moved, hidden=None if self.hidden is None else self.hidden.to(device))


@dataclass(frozen=True)
class TextState:
    """Text activations on entry to a block.

    Args:
        block: The block that comes next.
        prefix: [groups, p, width], shared by all rows of a group.
        prefix_slots: int64 [1, p], context vector at each place or -1.
        suffix: [groups, rows, s, width].
        suffix_slots: int64 [rows, s].
        ends: int64 [rows], index of the pooled token within the suffix.
        lengths: How many tokens of its suffix each row needs.
        hidden: bool [rows, s], True where a key of the suffix is hidden from every query, or None.
        contexts_behind: Whether the suffix has context slots.
    """

    block: int
    prefix: Tensor
    prefix_slots: Tensor
    suffix: Tensor
    suffix_slots: Tensor
    ends: Tensor
    lengths: tuple[int, ...]
    hidden: Tensor | None = None
    contexts_behind: bool = True

    def detach(self) -> TextState:
        """The same activations without their history (for what doesn't change during training)."""
        return replace(self, prefix=self.prefix.detach(), suffix=self.suffix.detach())

    def edit_prefix(self, edits: Sequence[Edit]) -> TextState:
        """Apply edits to the shared part."""
        state = self
        for edit in edits:
            prefix, slots = _edit_part(state.prefix, state.prefix_slots, edit)
            state = replace(state, prefix=prefix, prefix_slots=slots)
        return state

    def edit_suffix(self, edits: Sequence[Edit]) -> TextState:
        """Apply edits to each row's own part; positions count from its first token, and pooled tokens move along."""
        state = self
        for edit in edits:
            suffix, slots = _edit_part(state.suffix, state.suffix_slots, edit)
            hidden = state.hidden
            if hidden is not None and not isinstance(edit, ReplaceContexts):
                hidden = _splice_places(hidden, hidden.new_zeros(len(hidden), 1), edit)
            grown = suffix.shape[-2] - state.suffix.shape[-2]
            ends, lengths = state.ends, state.lengths
            if isinstance(edit, (InsertTokens, DropTokens)):
                # a pooled token stands behind the edit, but for a first one (where there is no causal mask)
                ends, lengths = ends + grown * (ends >= edit.at), tuple(n + grown for n in lengths)
            state = replace(state, suffix=suffix, suffix_slots=slots, ends=ends, lengths=lengths, hidden=hidden)
        return state

    def take(self, indices: Sequence[int]) -> TextState:
        """Some rows, cut to the longest of them."""
        rows = torch.tensor(indices, device=self.ends.device)
        lengths = tuple(self.lengths[index] for index in indices)
        length = max(lengths)
        return replace(
            self,
            suffix=self.suffix[:, rows, :length],
            suffix_slots=self.suffix_slots[rows, :length],
            ends=self.ends[rows],
            lengths=lengths,
            hidden=None if self.hidden is None else self.hidden[rows, :length],
        )


@dataclass(frozen=True)
class TextShape:
    """The sizes and kinds of a text tower.

    Args:
        blocks: Sizes of the blocks.
        vocabulary: Rows of the token embedding (an appended class token, as in CoCa, is one more row).
        context_length: Rows of the positional embedding.
        embed_dim: Size of the feature; 0 for no projection.
        causal: Whether a token sees only what comes before it.
        projection_bias: Whether the projection has a bias.
    """

    blocks: BlockShape
    vocabulary: int
    context_length: int
    embed_dim: int
    causal: bool = True
    projection_bias: bool = False


class TextTower(nn.Module):
    """A text transformer, opened.

    Attributes:
        activation_bytes: Rows go through in chunks whose activations stay below this many bytes.
    """

    activation_bytes: float = 3e9

    def __init__(self, shape: TextShape) -> None:
        super().__init__()
        width = shape.blocks.width
        self.shape = shape
        self.token_embedding = nn.Embedding(shape.vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.zeros(shape.context_length, width))
        self.blocks = nn.ModuleList(Block(shape.blocks) for _ in range(shape.blocks.layers))
        self.ln_final = nn.LayerNorm(width, eps=shape.blocks.norm_eps)
        self.projection = (
            nn.Linear(width, shape.embed_dim, bias=shape.projection_bias) if shape.embed_dim else nn.Identity()
        )

    @property
    def layers(self) -> int:
        return self.shape.blocks.layers

    @property
    def width(self) -> int:
        return self.shape.blocks.width

    @property
    def causal(self) -> bool:
        return self.shape.causal

    def forward(self, rows: TextRows, contexts: Tensor | None = None, edits: Edits | None = None) -> Tensor:
        """Unnormalised features [rows, embed_dim], or [groups, rows, embed_dim] where `contexts` has groups.

        Args:
            rows: The layout.
            contexts: Context vectors [contexts, width], or [groups, contexts, width].
            edits: What to change before each block; positions count from the row's first token.
        """
        features = self.pool(self.embed(rows, contexts), edits)
        return features if contexts is not None and contexts.dim() == 3 else features[0]

    def embed(self, rows: TextRows, contexts: Tensor | None = None) -> TextState:
        """Embed a layout; groups come from `contexts` [groups, contexts, width] (for one: a set per image)."""
        if contexts is None:
            contexts = self.positional_embedding.new_zeros(1, self.width)
        if contexts.dim() == 2:
            contexts = contexts[None]  # [1, contexts, width]
        slots = torch.where(rows.symbols < 0, -1 - rows.symbols, -1)  # [rows, length]
        p = rows.prefix
        prefix = self._embed_part(rows.symbols[:1, :p], slots[:1, :p], rows.positions[:1, :p], contexts)[:, 0]
        suffix = self._embed_part(rows.symbols[:, p:], slots[:, p:], rows.positions[:, p:], contexts)
        lengths = tuple(n - p for n in rows.lengths)
        hidden = None if rows.hidden is None else rows.hidden[:, p:]
        return TextState(
            0, prefix, slots[:1, :p], suffix, slots[:, p:], rows.ends - p, lengths, hidden, rows.contexts_behind
        )

    def _embed_part(self, symbols: Tensor, slots: Tensor, positions: Tensor, contexts: Tensor) -> Tensor:
        x = self.token_embedding(symbols.clamp(min=0)).to(contexts.dtype)  # [rows, n, width]
        x = _put_contexts(x.expand(len(contexts), *x.shape), slots, contexts)  # [groups, rows, n, width]
        return x + self.positional_embedding[positions].to(x.dtype)

    def advance(self, state: TextState, edits: Edits | None = None, *, stop: int) -> TextState:
        """Run every token through the blocks before `stop`, for activations that a method keeps."""
        ahead, shared, suffix_edits = self._prefix_ahead(state, edits or {}, stop)
        state, x = self._rows_ahead(state, shared, suffix_edits, stop)
        return replace(
            state,
            block=stop,
            prefix=ahead.prefix,
            prefix_slots=ahead.prefix_slots,
            suffix=_packing_of(state).unpack(x),
        )

    def pool(self, state: TextState, edits: Edits | None = None) -> Tensor:
        """Run on to the end and read the pooled tokens; unnormalised features [groups, rows, embed_dim].

        The prefix goes first and leaves its keys and values; the rows follow, in chunks.
        """
        edits = edits or {}
        _check_depth(edits, state.block, self.layers)
        _, shared, suffix_edits = self._prefix_ahead(state, edits, self.layers)

        def run(rows: TextState) -> Tensor:
            _, x = self._rows_ahead(rows, shared, suffix_edits, self.layers)  # [groups, rows, width], pooled tokens
            features: Tensor = self.projection(self.ln_final(x))
            return features

        limit = self._tokens_per_chunk(state)
        chunks = _row_chunks(state.lengths, limit)
        if len(chunks) == 1:
            return run(state)
        recompute = torch.is_grad_enabled()
        outputs, order = [], []
        for indices in chunks:
            rows = state.take(indices)
            outputs.append(checkpoint(run, rows, use_reentrant=False) if recompute else run(rows))
            order.extend(indices)
        inverse = torch.tensor(order, device=state.ends.device).argsort()
        return torch.cat(outputs, dim=1)[:, inverse]  # [groups, rows, embed_dim]

    def _tokens_per_chunk(self, state: TextState) -> int:
        """How many suffix tokens per group fit into `activation_bytes`."""
        if torch.is_grad_enabled():
            kept = VALUES_KEPT_PER_CHANNEL * (self.layers - state.block)
        else:  # only what the widest moment of one block holds: both sides of the MLP, and a few widths
            kept = VALUES_KEPT_PER_CHANNEL
        per_token = kept * self.width * 4 * len(state.suffix)
        return max(1, int(self.activation_bytes / per_token))

    def _prefix_ahead(
        self, state: TextState, edits: Edits, stop: int
    ) -> tuple[TextState, list[KeysValues | None], list[list[Edit]]]:
        """The prefix through the blocks before `stop`: its state there, and per block its keys and values and the edits
        that concern the rows' own parts.
        """
        shared: list[KeysValues | None] = []
        suffix_edits: list[list[Edit]] = []
        for index in range(state.block, stop):
            on_prefix, on_suffix = _divide(edits.get(index, ()), state.prefix.shape[1], state.contexts_behind)
            state = state.edit_prefix(on_prefix)
            prefix, keys_values = self._prefix_block(index, state.prefix, last=index == self.layers - 1)
            state = replace(state, prefix=prefix)
            shared.append(keys_values)
            suffix_edits.append(on_suffix)
        return state, shared, suffix_edits

    def _prefix_block(self, index: int, prefix: Tensor, last: bool) -> tuple[Tensor, KeysValues | None]:
        if not prefix.shape[1]:
            return prefix, None
        block = cast(Block, self.blocks[index])
        keys_values = block.keys_values(prefix)
        if last:  # nothing reads the prefix after the last block
            return prefix, keys_values
        return block(prefix, causal=True, keys_values=keys_values), keys_values

    def _rows_ahead(
        self, state: TextState, shared: Sequence[KeysValues | None], edits: Sequence[Sequence[Edit]], stop: int
    ) -> tuple[TextState, Tensor]:
        """The rows' own parts through the blocks before `stop`: the state as edited on the way, and the packed tokens
        [groups, total, width], or after the last block the pooled ones [groups, rows, width].
        """
        packing = _packing_of(state)
        x = packing.pack(state.suffix)
        for step, index in enumerate(range(state.block, stop)):
            if edits[step]:
                state = replace(state, suffix=packing.unpack(x)).edit_suffix(edits[step])
                packing = _packing_of(state)
                x = packing.pack(state.suffix)
            x = self._suffix_block(index, x, state, packing, shared[step])
        return state, x

    def _suffix_block(
        self, index: int, x: Tensor, state: TextState, packing: _Packing, shared: KeysValues | None
    ) -> Tensor:
        """Packed tokens [groups, total, width] through one block; the last gives only pooled ones [groups, rows, …]."""
        causal, select = self.causal, None
        mask = None if state.hidden is None else ~state.hidden[:, None, None]  # [rows, 1, 1, s]
        columns = torch.arange(packing.length, device=x.device)
        if index == self.layers - 1:
            at = packing.starts + state.ends  # [rows]

            def select(tokens: Tensor) -> Tensor:
                return tokens.index_select(1, at)  # [groups, rows, width]

            if causal:
                seen = (columns <= state.ends[:, None])[:, None, None]  # [rows, 1, 1, s]
                mask, causal = seen if mask is None else seen & mask, False
        elif causal and mask is not None:
            mask, causal = mask & (columns <= columns[:, None]), False  # [rows, 1, s, s]
        block = self.blocks[index]
        return block(x, select=select, causal=causal, mask=mask, prefix=shared, packing=packing)


@dataclass(frozen=True)
class _Packing:
    """Where rows of differing length lie in one run of tokens without padding.

    Args:
        rows: How many rows there are.
        length: Tokens of the longest.
        starts: int64 [rows], where each row begins in the run.
        places: int64 [total], each packed token's place among rows · length; None where no row is shorter.
        columns: int64 [rows · length], the packed token for each place (behind a row's end: its last one), or None.
    """

    rows: int
    length: int
    starts: Tensor
    places: Tensor | None
    columns: Tensor | None

    def pack(self, x: Tensor) -> Tensor:
        """[groups, rows, length, width] to [groups, total, width]."""
        flat = x.flatten(1, 2)
        return flat if self.places is None else flat.index_select(1, self.places)

    def unpack(self, x: Tensor) -> Tensor:
        """[groups, total, width] to [groups, rows, length, width]; what stands behind a row's end means nothing."""
        spread = x if self.columns is None else x.index_select(1, self.columns)
        return spread.unflatten(1, (self.rows, self.length))


def _packing_of(state: TextState) -> _Packing:
    return _make_packing(state.lengths, state.suffix.shape[2], state.suffix.device)


@lru_cache(maxsize=256)
def _make_packing(lengths: tuple[int, ...], length: int, device: torch.device) -> _Packing:
    """Made once per class list and chunk: moving indices to a GPU at every step would wait for it."""
    with torch.inference_mode(False):  # they are kept, and serve later calls that need gradients
        sizes = torch.tensor(lengths)
        starts = sizes.cumsum(0) - sizes  # [rows]
        if all(n == length for n in lengths):
            return _Packing(len(lengths), length, starts.to(device), None, None)
        column = torch.arange(length)
        inside = column < sizes[:, None]  # [rows, length]
        columns = starts[:, None] + torch.minimum(column, sizes[:, None] - 1)
        places = inside.flatten().nonzero()[:, 0]
        return _Packing(len(lengths), length, starts.to(device), places.to(device), columns.flatten().to(device))


def _put_contexts(x: Tensor, slots: Tensor, contexts: Tensor) -> Tensor:
    """Put contexts [groups, contexts, width] into tokens [groups, rows, n, width] where `slots` [rows, n] ≥ 0."""
    if not slots.numel() or contexts.shape[1] == 0:
        return x
    picked = contexts[:, slots.clamp(min=0)]  # [groups, rows, n, width]
    return torch.where((slots >= 0)[None, :, :, None], picked.to(x.dtype), x)


def _edit_part(x: Tensor, slots: Tensor, edit: Edit) -> tuple[Tensor, Tensor]:
    """One edit on tokens [groups, n, width] or [groups, rows, n, width] with their `slots` [rows, n]."""
    if isinstance(edit, ReplaceContexts):
        contexts = edit.vectors if edit.vectors.dim() == 3 else edit.vectors[None]
        if x.dim() == 3:
            return _put_contexts(x[:, None], slots, contexts)[:, 0], slots
        return _put_contexts(x, slots, contexts), slots
    marks = -torch.ones_like(slots[:, :1])
    return _splice(x, edit), _splice_places(slots, marks, edit)


def _divide(edits: Sequence[Edit], prefix: int, contexts_behind: bool) -> tuple[list[Edit], list[Edit]]:
    """Share edits out between a prefix of that many tokens and the rows' own parts."""
    on_prefix: list[Edit] = []
    on_suffix: list[Edit] = []
    for edit in edits:
        if isinstance(edit, ReplaceContexts):
            on_prefix.append(edit)
            on_suffix.extend([edit] if contexts_behind else [])
            continue
        count = 0 if isinstance(edit, InsertTokens) else _count(edit)
        if edit.at < 0:
            raise BackboneError("Text rows differ in length: count positions from the start, not from the end.")
        if prefix and edit.at + count <= prefix:
            on_prefix.append(edit)
            prefix += {InsertTokens: 1, DropTokens: -1}.get(type(edit), 0) * _count(edit)
        elif edit.at >= prefix:
            on_suffix.append(replace(edit, at=edit.at - prefix))
        else:
            raise BackboneError(
                f"Positions {edit.at} to {edit.at + count - 1} lie partly in the {prefix} tokens that all rows share:"
                " edit the shared tokens and the rest separately."
            )
    return on_prefix, on_suffix


def _row_chunks(lengths: tuple[int, ...], limit: int) -> list[list[int]]:
    """Row indices, in chunks of at most `limit` tokens; within a chunk rows are of similar length."""
    if sum(lengths) <= limit:
        return [list(range(len(lengths)))]
    chunks: list[list[int]] = [[]]
    size = 0
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if chunks[-1] and size + lengths[row] > limit:
            chunks.append([])
            size = 0
        chunks[-1].append(row)
        size += lengths[row]
    return chunks
