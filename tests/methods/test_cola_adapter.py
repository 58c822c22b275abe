"""The COLA adapter: its tokens, its scores against torch's own layers written out, its two losses, its chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adaptkit.errors import BackboneError, ConfigError, DataError
from adaptkit.methods.adapters.cola_adapter import ColaAdapter, ColaAdapterConfig, word_means
from adaptkit.training.loop import fit_method
from adaptkit.types import FitTask, TensorInputs, TrainingSettings
from tests.methods.tiny import NAMES, NOVEL, closed_text, image_only, make_task, query, tiny_clip

BACKBONE = tiny_clip()
SMALL = ColaAdapterConfig(feedforward=32)


def plain_tokens(text: str) -> torch.Tensor:
    """All tokens of one text on entry to the last block [length, width], by running the whole row, uncut."""
    tower, tokens = BACKBONE.text_tower, BACKBONE.tokenize([text])
    x = (tower.token_embedding(tokens.ids[0]) + tower.positional_embedding)[None]
    for block in list(tower.blocks)[:-1]:
        x = block(x, causal=True)
    return x[0, : int(tokens.ends[0]) + 1]


def plain_attention(layer: torch.nn.MultiheadAttention, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    width, heads = queries.shape[-1], layer.num_heads
    parts = [
        F.linear(x, w, b)
        for x, w, b in zip(
            (queries, keys, keys), layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True
        )
    ]
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in parts)  # [heads, n, width / heads]
    mixed = ((q @ k.transpose(1, 2)) / (width // heads) ** 0.5).softmax(dim=-1) @ v
    return layer.out_proj(mixed.transpose(0, 1).flatten(1))


def plain_score(method: ColaAdapter, patches: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """One pair, post-norm layers written out; patches [P, image width], words [L, width] without padding."""
    encoder, decoder = method.transformer.encoder, method.transformer.decoder
    (e,), (d,) = encoder.layers, decoder.layers
    x = torch.cat([method.linear(patches), words])
    x = e.norm1(x + plain_attention(e.self_attn, x, x))
    x = e.norm2(x + e.linear2(F.relu(e.linear1(x))))
    memory = encoder.norm(x)
    o = method.query
    o = d.norm1(o + plain_attention(d.self_attn, o, o))
    o = d.norm2(o + plain_attention(d.multihead_attn, o, memory))
    o = d.norm3(o + d.linear2(F.relu(d.linear1(o))))
    o = decoder.norm(o)[0]
    return torch.stack([o @ word for word in words[1:-1]]).mean()


def plain_logits(method: ColaAdapter, pixels: torch.Tensor, names=NAMES, template="a photo of a {}.") -> torch.Tensor:
    with torch.no_grad():
        tokens = [plain_tokens(template.format(name.replace("_", " "))) for name in names]
        patches = BACKBONE.image_tower.hidden(pixels, stop=BACKBONE.image_tower.layers - 1)[:, 1:]
    return torch.stack([torch.stack([plain_score(method, image, words) for words in tokens]) for image in patches])


@pytest.mark.parametrize("names", [NAMES, NOVEL])
def test_scores_are_the_sheets(names):
    method, pixels = ColaAdapter(BACKBONE, NAMES), query(BACKBONE, "images", 3)
    method.set_classes(names)
    with torch.no_grad():
        torch.testing.assert_close(method(pixels), plain_logits(method, pixels, names), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("loss", "name"), [("sigmoid", "sigmoid"), ("cross-entropy", "cross_entropy")])
def test_losses_and_gradients_are_the_sheets(loss, name):
    """Without dropout, since the plain comparison has none."""
    config = ColaAdapterConfig(feedforward=32, dropout=0.0, loss=loss)
    method, pixels, labels = ColaAdapter(BACKBONE, NAMES, config=config), query(BACKBONE, "images", 3), torch.arange(3)
    terms = method.losses(pixels, labels)
    assert list(terms) == [name]
    logits = plain_logits(method, pixels)
    if loss == "sigmoid":
        truth = torch.eye(4)[labels]
        p = logits.sigmoid()
        wanted = -(truth * p.log() + (1 - truth) * (1 - p).log()).mean()
    else:
        wanted = -(logits.log_softmax(dim=1)[torch.arange(3), labels]).mean()
    torch.testing.assert_close(terms[name], wanted, rtol=1e-5, atol=1e-5)
    own = torch.autograd.grad(terms[name], list(method.parameters()))
    theirs = torch.autograd.grad(wanted, list(method.parameters()))
    assert len(own) == 37
    for mine, plain in zip(own, theirs, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)


def test_chunks_change_nothing():
    pixels, labels = query(BACKBONE, "images", 5), torch.tensor([0, 1, 2, 3, 0])
    method = ColaAdapter(BACKBONE, NAMES, config=SMALL)
    gradients, scores = [], []
    for limit in (1e9, 3e5, 1):
        method.activation_bytes = limit
        gradients.append(torch.autograd.grad(method.losses(pixels, labels)["sigmoid"], list(method.parameters())))
        with torch.no_grad():
            scores.append(method(pixels))
    method.activation_bytes = 3e5
    assert 1 < method._pairs_at_once(15) < 20  # several chunks, each of several pairs
    for other in (1, 2):
        torch.testing.assert_close(scores[other], scores[0], rtol=1e-5, atol=1e-5)
        for mine, plain in zip(gradients[other], gradients[0], strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)


def test_chunks_are_recomputed_with_the_same_dropout():
    """The gradient of a recomputed chunk is that of what it gave: finite differences agree."""
    method, pixels = ColaAdapter(BACKBONE, NAMES, config=SMALL).train(), query(BACKBONE, "images", 2)
    method.activation_bytes = 1

    def loss() -> torch.Tensor:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(3)
            return method(pixels).sum()

    (gradient,) = torch.autograd.grad(loss(), [method.query])
    step = 1e-2 * torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        method.query += step
        after = loss()
        method.query -= 2 * step
        before = loss()
    torch.testing.assert_close((after - before) / 2, (gradient * step).sum(), rtol=0.02, atol=1e-3)


def test_tokens_are_frozen_and_made_once():
    method = ColaAdapter(BACKBONE, NAMES, config=SMALL)
    with torch.inference_mode():  # tokens made here must serve training too
        tokens, mask = method.text_tokens()
    assert method.text_tokens()[0] is tokens
    assert not tokens.requires_grad
    assert not tokens.is_inference()
    assert not method.patch_tokens(query(BACKBONE, "images", 2)).requires_grad
    assert tokens.shape == (4, 11, 16)
    compared = 0
    for row, name in enumerate(NAMES):
        plain = plain_tokens(f"a photo of a {name.replace('_', ' ')}.")
        assert int(mask[row].sum()) == len(plain)
        torch.testing.assert_close(tokens[row, : len(plain)], plain, rtol=1e-5, atol=1e-5)
        assert not tokens[row, len(plain) :].any()
        compared += 1
    assert compared == 4
    method.set_classes(NOVEL)
    assert method.text_tokens()[0] is not tokens


def test_many_texts_go_through_in_parts(monkeypatch):
    method = ColaAdapter(BACKBONE, NAMES, config=SMALL)
    tokens, mask = method.text_tokens()
    monkeypatch.setattr("adaptkit.methods.adapters.cola_adapter._TEXTS_AT_ONCE", 3)
    method.set_classes(NAMES)
    again, mask_again = method.text_tokens()
    assert again is not tokens
    assert torch.equal(mask, mask_again)
    torch.testing.assert_close(again, tokens, rtol=1e-5, atol=1e-5)


def test_padding_and_other_classes_change_no_score():
    method, pixels = ColaAdapter(BACKBONE, NAMES, config=SMALL), query(BACKBONE, "images", 2)
    with torch.no_grad():
        patches, (tokens, mask) = method.patch_tokens(pixels), method.text_tokens()
        scores = method.pair_scores(patches, tokens, mask)
        noise = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
        longer = method.pair_scores(patches, torch.cat([tokens, noise], dim=1), F.pad(mask, (0, 5)))
        torch.testing.assert_close(longer, scores, rtol=1e-5, atol=1e-5)
        alone = method.pair_scores(patches, tokens[:1], mask[:1])
        torch.testing.assert_close(alone, scores[:, :1], rtol=1e-5, atol=1e-5)


def test_means_leave_out_first_and_last():
    tokens = torch.arange(10.0).reshape(2, 5, 1)
    mask = torch.tensor([[True, True, True, True, False], [True, True, False, False, False]])
    assert word_means(tokens, mask).tolist() == [[1.5], [0.0]]  # a text of start and end alone has no words


def test_templates_are_averaged():
    templates, pixels = ("a photo of a {}.", "{}"), query(BACKBONE, "images", 2)
    method = ColaAdapter(BACKBONE, NAMES, templates=templates, config=SMALL)
    with torch.no_grad():
        both = [plain_logits(method, pixels, template=template) for template in templates]
        torch.testing.assert_close(method(pixels), sum(both) / 2, rtol=1e-5, atol=1e-5)


def test_order_of_patches_does_not_matter():
    """The adapter has no positions: what it knows of order it was told by the towers."""
    method = ColaAdapter(BACKBONE, NAMES, config=SMALL)
    with torch.no_grad():
        patches, texts = method.patch_tokens(query(BACKBONE, "images", 2)), method.text_tokens()
        scores = method.pair_scores(patches, *texts)
        torch.testing.assert_close(method.pair_scores(patches.flip(1), *texts), scores, rtol=1e-5, atol=1e-5)


def test_it_learns():
    config = ColaAdapterConfig(feedforward=32, dropout=0.0, loss="cross-entropy")
    method, task = ColaAdapter(BACKBONE, NAMES, config=config), make_task(BACKBONE, "images")
    settings = TrainingSettings(epochs=60, batch_size=8, optimiser="adamw", lr=3e-3, warmup_epochs=0)
    report = fit_method(method, task, settings)
    assert report["losses"][-1] < 0.5 * report["losses"][0]
    assert report["accuracies"][-1] > 0.9


def test_query_starts_between_zero_and_one():
    query_vector = ColaAdapter(BACKBONE, NAMES, config=SMALL).query.detach()
    assert query_vector.shape == (1, 16)
    assert 0 <= float(query_vector.min()) < float(query_vector.max()) < 1


def test_bad_settings():
    with pytest.raises(ConfigError, match="heads is 5, but must divide 16, the width of 'tiny'"):
        ColaAdapter(BACKBONE, NAMES, config=ColaAdapterConfig(heads=5))
    with pytest.raises(ConfigError, match="heads is 0"):
        ColaAdapterConfig(heads=0)
    with pytest.raises(ConfigError, match="feedforward is 0"):
        ColaAdapterConfig(feedforward=0)
    with pytest.raises(ConfigError, match="dropout is 1"):
        ColaAdapterConfig(dropout=1.0)


def test_towers_it_must_open():
    with pytest.raises(BackboneError, match="text tower"):
        ColaAdapter(closed_text(), NAMES)
    with pytest.raises(Exception, match="no text encoder"):
        ColaAdapter(image_only(), NAMES)


def test_bad_pairs_and_pixels():
    method = ColaAdapter(BACKBONE, NAMES, config=SMALL)
    patches, (tokens, mask) = method.patch_tokens(query(BACKBONE, "images", 2)), method.text_tokens()
    with pytest.raises(DataError, match=r"Patch tokens must be \[images, patches, 24\]"):
        method.pair_scores(patches[..., :5], tokens, mask)
    with pytest.raises(DataError, match="mask must be bool"):
        method.pair_scores(patches, tokens, mask[:2])
    with pytest.raises(DataError, match="mask must be bool"):
        method.pair_scores(patches, tokens, mask.float())
    broken = TensorInputs(torch.full((1, 4, 3, 16, 16), float("nan")), torch.arange(4))
    with pytest.raises(DataError, match="pixels that aren't finite"):
        fit_method(method, FitTask(NAMES, broken), TrainingSettings(epochs=1))
