"""Tokens that keep a share of what the layer before made of them, and a pooled token that stands before an edit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adaptkit.backbones.tower import (
    BlockShape,
    ImageShape,
    ImageTower,
    InsertTokens,
    ReplaceTokens,
    TextRows,
    TextShape,
    TextTower,
)

LAYERS, WIDTH, LENGTH, K = 4, 16, 20, 3


def filled(tower):
    numbers = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, value in tower.named_parameters():
            scale = value.shape[-1] ** -0.5 if value.dim() > 1 else 0.1
            value.copy_(torch.randn(value.shape, generator=numbers) * scale + ("ln_" in name and "weight" in name))
    return tower.requires_grad_(False).eval()


BLOCKS = BlockShape(WIDTH, 2, LAYERS, 2 * WIDTH, "quick_gelu")
IMAGE = filled(ImageTower(ImageShape(BLOCKS, 8, 4, 12)))
CAUSAL = filled(TextTower(TextShape(BLOCKS, 30, LENGTH, 12)))
BOTH_WAYS = filled(TextTower(TextShape(BLOCKS, 30, LENGTH, 12, causal=False)))


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def token_edits(tokens: dict[int, Tensor], at: int, share: float):
    first = min(tokens)
    edits = {layer: [ReplaceTokens(vectors, at=at, share=share)] for layer, vectors in tokens.items()}
    return edits | {first: [InsertTokens(tokens[first], at=at)]}


def plain_blocks(tower, x: Tensor, tokens: dict[int, Tensor], at: int, share: float) -> Tensor:
    """All tokens of all rows [rows, n, width] through whole blocks."""
    first = min(tokens)
    for layer, block in enumerate(tower.blocks):
        if layer in tokens:
            new = tokens[layer]
            new = new if new.dim() == 3 else new.expand(len(x), -1, -1)
            old = x[:, at : at + (0 if layer == first else K)]
            if layer != first:
                new = share * new + (1 - share) * old
            x = torch.cat([x[:, :at], new, x[:, at + old.shape[1] :]], dim=1)
        causal = torch.ones(x.shape[1], x.shape[1]).tril().bool() if getattr(tower, "causal", False) else None
        x = block(x, mask=causal)
    return x


def assert_same(ours: Tensor, plain: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    direction = torch.randn(plain.shape, generator=torch.Generator().manual_seed(5))
    got = torch.autograd.grad((ours * direction).sum(), leaves)
    wanted = torch.autograd.grad((plain * direction).sum(), leaves, retain_graph=True)
    for mine, theirs in zip(got, wanted, strict=True):
        assert float(theirs.abs().max()) > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [1.0, 0.9, 0.25])
@pytest.mark.parametrize("per_image", [False, True])
def test_share_in_images(share, per_image):
    pixels = drawn(2, 3, 8, 8, seed=0)
    shape = (2, K, WIDTH) if per_image else (K, WIDTH)
    tokens = {layer: drawn(*shape, seed=layer) for layer in (1, 2, 3)}
    plain = IMAGE.ln_post(plain_blocks(IMAGE, IMAGE.ln_pre(IMAGE.embed(pixels)), tokens, 1, share))
    below = IMAGE.hidden(pixels, stop=1)
    edits = token_edits(tokens, 1, share)
    leaves = [pixels, *tokens.values()]
    assert_same(IMAGE.tokens(below, edits, start=1, rows=range(1 + K)), plain[:, : 1 + K], leaves)
    assert_same(IMAGE(pixels, edits), IMAGE.projection(plain[:, 0]), leaves)


def rows_of(tower, texts: list[list[int]], ends: list[int] | None = None):
    symbols = torch.tensor([text + [0] * (LENGTH - len(text)) for text in texts])
    at = torch.tensor([len(text) - 1 for text in texts] if ends is None else ends)
    return symbols, at, TextRows.build(symbols, at, causal=tower.causal)


TEXTS = [[27, 5, 6, 1, 28], [27, 5, 6, 2, 3, 28], [27, 5, 6, 4, 4, 4, 28]]


def plain_text(tower, symbols, ends, tokens, at, share):
    embedded = tower.token_embedding(symbols) + tower.positional_embedding[:LENGTH]
    x = plain_blocks(tower, embedded, tokens, at, share)
    pooled = x[torch.arange(len(x)), ends + K * (ends >= at)]
    return tower.projection(tower.ln_final(pooled))


@pytest.mark.parametrize("share", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("tower", "at", "prefix"),
    [(CAUSAL, 1, 3), (CAUSAL, 3, 3), (BOTH_WAYS, 1, 0)],
    ids=["in the shared tokens", "at their end", "in each row"],
)
def test_share_in_texts(tower, at, prefix, chunked, share, monkeypatch):
    """The tokens may belong to what all rows share or to each row; activations below may be kept."""
    monkeypatch.setattr(tower, "activation_bytes", 2e4 if chunked else 3e9)
    symbols, ends, rows = rows_of(tower, TEXTS)
    assert rows.prefix == prefix
    tokens = {layer: drawn(K, WIDTH, seed=layer) for layer in (1, 2, 3)}
    leaves = [tokens[1]] if share == 0 else list(tokens.values())
    plain = plain_text(tower, symbols, ends, tokens, at, share)
    edits = token_edits(tokens, at, share)
    assert_same(tower(rows, edits=edits), plain, leaves)
    kept = tower.advance(tower.embed(rows), stop=1).detach()
    assert kept.block == 1
    assert_same(tower.pool(kept, edits)[0], plain, leaves)


def test_share_in_rows_of_their_own():
    """Without a common beginning beyond the start token, the replaced tokens stand behind what is shared."""
    symbols, ends, rows = rows_of(CAUSAL, [[27, 7, 8, 28], [27, 9, 10, 11, 28]])
    assert rows.prefix == 1
    tokens = {layer: drawn(K, WIDTH, seed=layer) for layer in (1, 2)}
    edits = token_edits(tokens, 2, 0.6)
    assert_same(CAUSAL(rows, edits=edits), plain_text(CAUSAL, symbols, ends, tokens, 2, 0.6), list(tokens.values()))


def test_a_pooled_first_token_stays_when_tokens_are_inserted_behind_it():
    symbols, ends, rows = rows_of(BOTH_WAYS, TEXTS, ends=[0, 0, 0])
    tokens = {layer: drawn(K, WIDTH, seed=layer) for layer in (1, 2)}
    plain = plain_text(BOTH_WAYS, symbols, ends, tokens, 1, 1.0)
    assert_same(BOTH_WAYS(rows, edits=token_edits(tokens, 1, 1.0)), plain, list(tokens.values()))
