"""The towers' short cuts are exact: outputs and gradients equal those of a plain path, written here from scratch.

The plain path computes every token of every full-length row in every block, with one mask, and then picks what is
pooled. Nothing of the towers' own forward code is used in it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from adaptkit.backbones.dual_encoder import ClassToken
from adaptkit.backbones.tower import (
    EMBEDDING,
    BlockShape,
    DropTokens,
    ImageShape,
    ImageTower,
    InsertTokens,
    ReplaceContexts,
    ReplaceTokens,
    TextRows,
    TextShape,
    TextTower,
)
from adaptkit.errors import BackboneError

QUICK = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
LENGTH, LAYERS, WIDTH, VOCABULARY = 24, 4, 16, 30
START, END, DOT = 27, 28, 26  # END is the highest id but one; the last row serves as a class token


# --- the plain path ---------------------------------------------------------------------------------------------------


def plain_attention(attn, x: Tensor, allowed: Tensor) -> Tensor:
    """Tokens [rows, n, width]; allowed [rows or 1, n, n], True where a query may look."""
    rows, n, width = x.shape
    size = width // attn.heads
    q, k, v = (
        F.linear(x, p.weight, p.bias).view(rows, n, attn.heads, size) for p in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    scores = torch.einsum("rihd,rjhd->rhij", q, k) / size**0.5
    scores = scores + torch.zeros_like(scores).masked_fill(~allowed[:, None], float("-inf"))
    out = torch.einsum("rhij,rjhd->rihd", scores.softmax(-1), v).reshape(rows, n, width)
    return F.linear(out, attn.out_proj.weight, attn.out_proj.bias)


def plain_block(block, x: Tensor, allowed: Tensor) -> Tensor:
    def norm(layer, y):
        return F.layer_norm(y, y.shape[-1:], layer.weight, layer.bias, layer.eps)

    def gelu(y):
        if block.activation == "quick_gelu":
            return y * torch.sigmoid(1.702 * y)
        return F.gelu(y, approximate="tanh" if block.activation == "gelu_tanh" else "none")

    scale_1 = 1.0 if block.scale_1 is None else block.scale_1
    scale_2 = 1.0 if block.scale_2 is None else block.scale_2
    x = x + scale_1 * plain_attention(block.attn, norm(block.ln_1, x), allowed)
    hidden = gelu(F.linear(norm(block.ln_2, x), block.fc1.weight, block.fc1.bias))
    return x + scale_2 * F.linear(hidden, block.fc2.weight, block.fc2.bias)


def causal_mask(n: int) -> Tensor:
    return torch.ones(1, n, n, dtype=torch.bool).tril()


def plain_text(tower: TextTower, symbols, ends, contexts, deep, inserted=None, allowed=None) -> Tensor:
    """One group. `deep`: block -> contexts; `inserted`: block -> tokens that stand behind the start token from then on.

    An empty tensor takes the inserted tokens away again.
    """
    slots = torch.where(symbols < 0, -1 - symbols, 0)
    is_slot = (symbols < 0)[..., None]
    x = tower.token_embedding.weight[symbols.clamp(min=0)]
    if is_slot.any():
        x = torch.where(is_slot, contexts[slots], x)
    x = x + tower.positional_embedding[: symbols.shape[1]]
    extra = 0
    for index, block in enumerate(tower.blocks):
        if index in deep:
            body = x[:, 1 + extra :]
            x = torch.cat([x[:, : 1 + extra], torch.where(is_slot[:, 1:], deep[index][slots[:, 1:]], body)], dim=1)
        if inserted and index in inserted:
            tokens = inserted[index].expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], tokens, x[:, 1 + extra :]], dim=1)
            extra = tokens.shape[1]
        n = x.shape[1]
        seen = allowed if allowed is not None else causal_mask(n)
        x = plain_block(block, x, seen if tower.causal else torch.ones(1, n, n, dtype=torch.bool))
    pooled = x[torch.arange(len(x)), ends + extra * (ends > 0)]
    pooled = F.layer_norm(pooled, pooled.shape[-1:], tower.ln_final.weight, tower.ln_final.bias, tower.ln_final.eps)
    return F.linear(pooled, tower.projection.weight, tower.projection.bias)


def plain_image(tower: ImageTower, pixels, first=None, deep=None, inserted=None) -> Tensor:
    """`first`: tokens appended before the first norm, `deep`: block -> their replacement; `inserted`: as for texts."""
    x = F.conv2d(pixels, tower.patch_embedding.weight, tower.patch_embedding.bias, stride=tower.shape.patch_size)
    x = x.flatten(2).transpose(1, 2)
    if tower.class_embedding is not None:
        x = torch.cat([tower.class_embedding.expand(len(x), 1, -1), x], dim=1)
    x = x + tower.positional_embedding
    if first is not None:
        x = torch.cat([x, first.expand(len(x), -1, -1)], dim=1)
    if tower.shape.ln_pre:
        x = F.layer_norm(x, x.shape[-1:], tower.ln_pre.weight, tower.ln_pre.bias, tower.ln_pre.eps)
    extra = 0
    for index, block in enumerate(tower.blocks):
        if deep and index in deep:
            x = torch.cat([x[:, : -deep[index].shape[-2]], deep[index].expand(len(x), -1, -1)], dim=1)
        if inserted and index in inserted:
            tokens = inserted[index].expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], tokens, x[:, 1 + extra :]], dim=1)
            extra = tokens.shape[1]
        x = plain_block(block, x, torch.ones(1, x.shape[1], x.shape[1], dtype=torch.bool))
    post = tower.ln_post
    if not tower.shape.norm_after_pool:
        x = F.layer_norm(x, x.shape[-1:], post.weight, post.bias, post.eps)
    if tower.shape.pool == "class":
        pooled = x[:, 0]
    elif tower.shape.pool == "mean":
        pooled = x[:, int(tower.shape.class_token) :].mean(1)
    else:
        pooled = plain_attention_pool(tower.pool_head, x)
    if tower.shape.norm_after_pool:
        pooled = F.layer_norm(pooled, pooled.shape[-1:], post.weight, post.bias, post.eps)
    return F.linear(pooled, tower.projection.weight, tower.projection.bias)


def plain_attention_pool(head, x: Tensor) -> Tensor:
    reference = torch.nn.MultiheadAttention(x.shape[-1], head.attn.heads, batch_first=True)
    layers = (head.attn.q_proj, head.attn.k_proj, head.attn.v_proj)
    out, _ = F.multi_head_attention_forward(
        head.probe.expand(len(x), -1, -1).transpose(0, 1),
        x.transpose(0, 1),
        x.transpose(0, 1),
        x.shape[-1],
        head.attn.heads,
        torch.cat([layer.weight for layer in layers]),
        torch.cat([layer.bias for layer in layers]),
        None,
        None,
        False,
        0.0,
        head.attn.out_proj.weight,
        head.attn.out_proj.bias,
        need_weights=False,
    )
    assert reference.head_dim * head.attn.heads == x.shape[-1]
    out = out[0]
    y = F.layer_norm(out, out.shape[-1:], head.norm.weight, head.norm.bias, head.norm.eps)
    return out + F.linear(F.gelu(F.linear(y, head.fc1.weight, head.fc1.bias)), head.fc2.weight, head.fc2.bias)


# --- towers and prompts -----------------------------------------------------------------------------------------------


def randomise(tower, seed: int = 0):
    """Weights that make every part matter: nothing is zero, one or the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "ln_" in name or "norm" in name or "scale_" in name:
                parameter.copy_(0.1 * noise + (1.0 if name.endswith(("weight", "scale_1", "scale_2")) else 0.0))
            else:
                parameter.copy_(noise * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1))
    return tower.requires_grad_(False).eval()


def blocks(activation="quick_gelu", layer_scale=False):
    return BlockShape(WIDTH, 2, LAYERS, 2 * WIDTH, activation, layer_scale=layer_scale)


def text_tower(causal=True, bias=False, extra_position=0, **kind):
    shape = TextShape(blocks(**kind), VOCABULARY, LENGTH + extra_position, 12, causal=causal, projection_bias=bias)
    return randomise(TextTower(shape))


CAUSAL, BIDIRECTIONAL = text_tower(), text_tower(causal=False, bias=True, activation="gelu")
SCALED = text_tower(activation="gelu_tanh", layer_scale=True)


@dataclass
class Prompts:
    """Rows of symbols with context slots, as CoOp lays them out."""

    symbols: Tensor
    ends: Tensor
    num_contexts: int
    slots: list[list[int]] = field(default_factory=list)


def lay_out(names, num_context, position, class_specific) -> Prompts:
    rows, slots = [], []
    for row, name in enumerate(names):
        own = [row * num_context + j if class_specific else j for j in range(num_context)]
        context = [-1 - j for j in own]
        half = len(context) // 2
        body = {
            "end": context + name,
            "middle": context[:half] + name + context[half:],
            "front": name + context,
        }[position]
        rows.append([START, *body, DOT, END])
        slots.append(own)
    symbols = torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])
    ends = torch.tensor([len(row) - 1 for row in rows])
    return Prompts(symbols, ends, num_context * (len(names) if class_specific else 1), slots)


names_strategy = st.lists(st.lists(st.integers(1, 25), min_size=1, max_size=4), min_size=1, max_size=6)


@st.composite
def prompts(draw):
    return lay_out(
        draw(names_strategy),
        draw(st.integers(1, 5)),
        draw(st.sampled_from(["end", "middle", "front"])),
        draw(st.booleans()),
    )


def vectors(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def assert_same(ours: Tensor, plain: Tensor, leaves: list[Tensor]) -> None:
    """Outputs and gradients agree to 1e-5, relative to the array's largest entry where that exceeds 1."""

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1.0, float(b.detach().abs().max())))

    close(ours, plain)
    direction = torch.randn(plain.shape, generator=torch.Generator().manual_seed(99))
    expected = torch.autograd.grad((plain * direction).sum(), leaves, allow_unused=True, retain_graph=True)
    got = torch.autograd.grad((ours * direction).sum(), leaves, allow_unused=True)
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            assert float(theirs.abs().max()) > 0
            close(mine, theirs)


# --- texts ------------------------------------------------------------------------------------------------------------


@QUICK
@given(
    layout=prompts(),
    depth=st.integers(0, LAYERS - 1),
    groups=st.sampled_from([None, 1, 3]),
    kind=st.sampled_from(["causal", "bidirectional", "scaled"]),
    tiny_chunks=st.booleans(),
    seed=st.integers(0, 100),
)
def test_text_equals_the_plain_path(layout, depth, groups, kind, tiny_chunks, seed):
    tower = {"causal": CAUSAL, "bidirectional": BIDIRECTIONAL, "scaled": SCALED}[kind]
    tower.activation_bytes = 4e5 if tiny_chunks else 3e9
    size = (groups or 1, layout.num_contexts, WIDTH)
    contexts = vectors(*size, seed=seed)
    deep = {index: vectors(*size, seed=seed + index) for index in range(1, depth + 1)}
    rows = TextRows.build(layout.symbols, layout.ends, causal=tower.causal)
    assert tower.causal or rows.prefix == 0
    whole = groups is None
    edits = {index: [ReplaceContexts(v[0] if whole else v)] for index, v in deep.items()}
    ours = tower(rows, contexts[0] if whole else contexts, edits)
    plain = torch.stack(
        [
            plain_text(tower, layout.symbols, layout.ends, contexts[g], {i: v[g] for i, v in deep.items()})
            for g in range(groups or 1)
        ]
    )
    assert_same(ours, plain[0] if whole else plain, [contexts, *deep.values()])


@QUICK
@given(
    layout=prompts(),
    first=st.integers(0, LAYERS - 1),
    count=st.integers(1, 3),
    dropped=st.booleans(),
    ahead=st.booleans(),
    tiny_chunks=st.booleans(),
)
def test_tokens_inserted_behind_the_start_token_from_a_later_block_on(
    layout, first, count, dropped, ahead, tiny_chunks
):
    """MMRL: inserted before block `first`, replaced before each later one, perhaps dropped before the last."""
    tower = CAUSAL
    tower.activation_bytes = 4e5 if tiny_chunks else 3e9
    contexts = vectors(layout.num_contexts, WIDTH, seed=1)
    inserted = {index: vectors(count, WIDTH, seed=10 + index) for index in range(first, LAYERS)}
    edits = {index: [ReplaceTokens(v, at=1)] for index, v in inserted.items()}
    edits[first] = [InsertTokens(inserted[first], at=1)]
    if dropped and first < LAYERS - 1:
        edits[LAYERS - 1] = [DropTokens(at=1, count=count)]
        inserted[LAYERS - 1] = torch.zeros(0, WIDTH)
    rows = TextRows.build(layout.symbols, layout.ends, causal=True)
    if ahead:  # what lies below the first prompted block, computed apart
        ours = tower.pool(tower.advance(tower.embed(rows, contexts), stop=first), edits)[0]
    else:
        ours = tower(rows, contexts, edits)
    plain = plain_text(tower, layout.symbols, layout.ends, contexts, {}, inserted)
    assert_same(ours, plain, [contexts, *(v for v in inserted.values() if len(v))])


@QUICK
@given(layout=prompts(), data=st.data())
def test_deep_contexts_and_insertion_together_per_group(layout, data):
    tower = CAUSAL
    tower.activation_bytes = data.draw(st.sampled_from([4e5, 3e9]))
    groups, block = 2, data.draw(st.integers(1, LAYERS - 1))  # before block 0 the first contexts would not matter
    contexts = vectors(groups, layout.num_contexts, WIDTH, seed=3)
    deep = vectors(groups, layout.num_contexts, WIDTH, seed=4)
    tokens = vectors(groups, 2, WIDTH, seed=5)
    edits = {block: [ReplaceContexts(deep), InsertTokens(tokens, at=1)]}
    ours = tower(TextRows.build(layout.symbols, layout.ends, causal=True), contexts, edits)
    plain = [
        plain_text(tower, layout.symbols, layout.ends, contexts[g], {block: deep[g]}, {block: tokens[g]})
        for g in range(groups)
    ]
    assert_same(ours, torch.stack(plain), [contexts, deep, tokens])


@QUICK
@given(names=names_strategy, pads_inside=st.booleans(), fills=st.booleans())
def test_a_class_token_behind_the_text(names, pads_inside, fills):
    """CoCa: the last position pools, its mask is one place off; the plain path uses that mask at full length."""
    tower = text_tower(extra_position=1)
    layout = lay_out(names, 2, "end", False)
    symbols, ends = layout.symbols.clone(), layout.ends.clone()
    if pads_inside:
        symbols[0, 3] = 0  # CLIP's id 0 is "!", and also the padding
    if fills:  # a text without any padding
        symbols[0, 5:-1], symbols[0, -1], ends[0] = 7, END, LENGTH - 1
    contexts = vectors(2, WIDTH, seed=2)
    full = torch.cat([symbols, torch.full((len(symbols), 1), VOCABULARY - 1)], dim=1)
    keys = torch.cat([torch.ones(len(symbols), 1, dtype=torch.bool), symbols != 0], dim=1)  # [rows, LENGTH + 1]
    allowed = causal_mask(LENGTH + 1) & keys[:, None]
    plain = plain_text(tower, full, torch.full((len(full),), LENGTH), contexts, {}, allowed=allowed)
    rows = ClassToken(VOCABULARY - 1, 0).rows(symbols, ends)
    assert_same(tower(rows, contexts), plain, [contexts])


def test_the_cost_is_prefix_plus_classes_times_name():
    names = [[1], [2, 3], [4, 5, 6]]
    rows = TextRows.build(*(lambda p: (p.symbols, p.ends))(lay_out(names, 4, "end", False)), causal=True)
    assert rows.prefix == 1 + 4
    assert [n - rows.prefix for n in rows.lengths] == [len(name) + 2 for name in names]
    specific = lay_out(names, 4, "end", True)
    assert TextRows.build(specific.symbols, specific.ends, causal=True).prefix == 1


def test_many_classes_go_through_in_recomputed_chunks():
    """The chunked path really is taken: one block's activations at a time are kept, not all rows'."""
    tower = text_tower()
    layout = lay_out([[1 + i % 20] * (1 + i % 4) for i in range(300)], 4, "end", False)
    contexts = vectors(4, WIDTH, seed=0)
    rows = TextRows.build(layout.symbols, layout.ends, causal=True)

    def saved_bytes():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            out = tower(rows, contexts)
        return sum(kept), out

    whole, plain = saved_bytes()
    tower.activation_bytes = 1e6
    chunked, ours = saved_bytes()
    assert chunked < whole / 4
    assert_same(ours, plain, [contexts])


def test_full_length_77_in_single_precision():
    shape = TextShape(BlockShape(64, 4, 6, 256, "quick_gelu"), 100, 77, 32)
    tower = randomise(TextTower(shape))
    names = [[1 + i, 2 + i][: 1 + i % 2] for i in range(20)]
    symbols = torch.zeros(20, 77, dtype=torch.int64)
    ends = []
    for row, name in enumerate(names):
        ids = [97, *(-1 - j for j in range(16)), *name, 96, 98]
        symbols[row, : len(ids)] = torch.tensor(ids)
        ends.append(len(ids) - 1)
    contexts = vectors(16, 64, seed=0)
    rows = TextRows.build(symbols, torch.tensor(ends), causal=True)
    plain = plain_text(tower, symbols, torch.tensor(ends), contexts, {})
    assert_same(tower(rows, contexts), plain, [contexts])


@pytest.mark.parametrize("at", [-1, 40])
def test_positions_that_make_no_sense_are_refused(at):
    layout = lay_out([[1], [2]], 2, "end", False)
    rows = TextRows.build(layout.symbols, layout.ends, causal=True)
    with pytest.raises(BackboneError, match=r"count positions|outside a row"):
        CAUSAL(rows, torch.zeros(2, WIDTH), {1: [InsertTokens(torch.zeros(1, WIDTH), at=at)]})


def test_too_deep_prompts_are_refused():
    layout = lay_out([[1], [2]], 2, "end", False)
    rows = TextRows.build(layout.symbols, layout.ends, causal=True)
    with pytest.raises(BackboneError, match="depth of at most 4"):
        CAUSAL(rows, torch.zeros(2, WIDTH), {LAYERS: [ReplaceContexts(torch.zeros(2, WIDTH))]})


# --- images -----------------------------------------------------------------------------------------------------------


def image_tower(pool="class", activation="quick_gelu", **kind):
    shape = ImageShape(blocks(activation), 8, 4, 12, pool=pool, **kind)
    return randomise(ImageTower(shape))


IMAGE_TOWERS = {
    "clip": image_tower(),
    "mean": image_tower("mean", norm_after_pool=True, ln_pre=False),
    "siglip": image_tower("attention", "gelu", class_token=False, ln_pre=False, patch_bias=True),
    "eva": image_tower(ln_pre=False, patch_bias=True, projection_bias=True),
}


@QUICK
@given(
    kind=st.sampled_from(sorted(IMAGE_TOWERS)),
    batch=st.integers(1, 3),
    count=st.integers(0, 3),
    depth=st.integers(0, LAYERS - 1),
    per_image=st.booleans(),
    split=st.integers(0, LAYERS - 1),
)
def test_image_with_tokens_appended_before_the_first_norm(kind, batch, count, depth, per_image, split):
    """VPT, MaPLe: appended, replaced in later blocks; the last block computes what is pooled only."""
    tower = IMAGE_TOWERS[kind]
    pixels = vectors(batch, 3, 8, 8, seed=0)
    edits, first, deep = {}, None, {}
    if count:
        size = (batch, count, WIDTH) if per_image else (count, WIDTH)
        first = vectors(*size, seed=1)
        deep = {index: vectors(*size, seed=1 + index) for index in range(1, depth + 1)}
        edits = {EMBEDDING: [InsertTokens(first)]}
        edits |= {index: [ReplaceTokens(v, at=-count)] for index, v in deep.items()}
    plain = plain_image(tower, pixels, first, deep)
    leaves = [pixels, *([first] if count else []), *deep.values()]
    assert_same(tower(pixels, edits), plain, leaves)
    if kind == "clip":  # the same in two steps
        assert_same(tower.pool(tower.hidden(pixels, edits, stop=split), edits, start=split), plain, leaves)


@QUICK
@given(first=st.integers(0, LAYERS - 1), count=st.integers(1, 3))
def test_image_with_tokens_inserted_behind_the_class_token(first, count):
    """MMRL: inserted from block `first` on; class token and inserted tokens are both read."""
    tower = IMAGE_TOWERS["clip"]
    pixels = vectors(2, 3, 8, 8, seed=0)
    inserted = {index: vectors(count, WIDTH, seed=1 + index) for index in range(first, LAYERS)}
    edits = {index: [ReplaceTokens(v, at=1)] for index, v in inserted.items()}
    edits[first] = [InsertTokens(inserted[first], at=1)]
    plain = plain_image(tower, pixels, inserted=inserted)
    assert_same(tower(pixels, edits), plain, [pixels, *inserted.values()])
    start = tower.hidden(pixels, stop=first)
    some = tower.tokens(start, edits, start=first, rows=range(1 + count))
    every = tower.tokens(start, edits, start=first)
    torch.testing.assert_close(some, every[:, : 1 + count], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tower.projection(some[:, 0]), plain, rtol=1e-5, atol=1e-5)


def test_edits_of_images_are_checked():
    tower, pixels = IMAGE_TOWERS["clip"], torch.zeros(1, 3, 8, 8)
    with pytest.raises(BackboneError, match="outside a row of 5"):
        tower(pixels, {0: [DropTokens(at=4, count=2)]})
    with pytest.raises(BackboneError, match="context slots"):
        tower(pixels, {0: [ReplaceContexts(torch.zeros(1, WIDTH))]})
    with pytest.raises(BackboneError, match="depth"):
        tower(pixels, {7: [InsertTokens(torch.zeros(1, WIDTH))]})


def test_the_last_block_computes_one_token_only():
    """The MLP of the last block sees one token per image, that of the others all of them."""
    tower = IMAGE_TOWERS["clip"]
    seen = []
    hooks = [
        block.fc1.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[1])) for block in tower.blocks
    ]
    tower(torch.zeros(2, 3, 8, 8))
    for hook in hooks:
        hook.remove()
    assert seen == [*itertools.repeat(5, LAYERS - 1), 1]
