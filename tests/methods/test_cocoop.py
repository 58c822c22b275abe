"""CoCoOp against a plain 77-token computation of one image at a time, its groups, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.errors import BackboneError, ConfigError, DataError
from adaptkit.methods.prompts.cocoop import EVALUATION_BYTES, CoCoOp, CoCoOpConfig
from tests.methods.plain_context import (
    BACKBONE,
    FEATURES,
    LABELS,
    SCALE,
    TIGHT,
    gradients,
    moved,
    plain_weights,
    siglip_like,
)
from tests.methods.tiny import DIM, NAMES, NOVEL, closed_text, tiny_clip


def plain_cocoop(method, features, names, phrase):
    """One image at a time, from copies of the trainables: the copies, texts [batch, classes, dim], logits."""
    own = {name: value.detach().clone().requires_grad_() for name, value in method.named_parameters()}
    texts, logits = [], []
    for feature in F.normalize(features, dim=-1):
        hidden = torch.relu(own["meta_net.linear1.weight"] @ feature + own["meta_net.linear1.bias"])
        shift = own["meta_net.linear2.weight"] @ hidden + own["meta_net.linear2.bias"]
        texts.append(plain_weights(names, own["context"] + shift, phrase))
        logits.append(SCALE * texts[-1] @ feature)
    return own, torch.stack(texts), torch.stack(logits)


@settings(max_examples=8, deadline=None)
@given(
    words=st.sampled_from(["", "a photo of a", "a photo, of one"]),
    num_context=st.integers(1, 4),
    batch=st.integers(1, 5),
    limit=st.sampled_from([3e9, 2e5, 1.0]),
    seed=st.integers(0, 5),
)
def test_cocoop_equals_the_plain_way(words, num_context, batch, limit, seed):
    backbone = tiny_clip()
    backbone.text_tower.activation_bytes = limit  # all at once, in groups of images, in chunks of each image's rows
    config = CoCoOpConfig(num_context=num_context, context_init=words)
    method = moved(CoCoOp(backbone, NAMES, config=config, seed=seed), seed)
    features, labels = FEATURES[:batch], LABELS[:batch]
    phrase = words or " ".join(["X"] * num_context)
    own, texts, logits = plain_cocoop(method, features, NAMES, phrase)
    torch.testing.assert_close(method.image_class_weights(features), texts, **TIGHT)
    terms = method.losses(features, labels)
    method.backward(terms, lambda loss: loss)
    F.cross_entropy(logits, labels).backward()
    for name, gradient in gradients(method).items():
        atol = 1e-5 * max(1.0, float(own[name].grad.abs().max()))
        torch.testing.assert_close(gradient, own[name].grad, rtol=1e-5, atol=atol)
    with torch.no_grad():
        torch.testing.assert_close(method(features), logits, rtol=1e-5, atol=1e-4)
        novel = plain_cocoop(method, features, NOVEL, phrase)[2]
        torch.testing.assert_close(method.set_classes(NOVEL)(features), novel, rtol=1e-5, atol=1e-4)


def test_cocoop_in_groups_of_images():
    """Whole, in groups of images, in chunks of one image's rows: the same logits and gradients, with bounded groups."""
    names = [f"{first} {second}" for first in NAMES for second in ("one", "two black cats", "three")]
    found, sizes, calls = {}, {}, []
    for limit in (3e9, 1.5e6, 2e4):
        backbone = tiny_clip()
        backbone.text_tower.activation_bytes = limit
        method = moved(CoCoOp(backbone, names))
        inner = method._logits

        def counted(features, inner=inner):
            calls.append(len(features))
            return inner(features)

        method._logits = counted
        calls.clear()
        method.backward(method.losses(FEATURES, LABELS), lambda loss: loss)
        sizes[limit] = tuple(calls)
        with torch.no_grad():
            found[limit] = {"logits": method(FEATURES), **gradients(method)}
    assert sizes[3e9] == (6,)
    assert 1 < max(sizes[1.5e6]) < 6
    assert len(sizes[1.5e6]) == 2 * -(-6 // max(sizes[1.5e6]))  # each group again in the backward pass
    assert sizes[2e4] == (1,) * 12  # and the tower makes chunks of each image's rows
    for limit in (1.5e6, 2e4):
        assert found[limit].keys() == found[3e9].keys()
        for name, value in found[limit].items():
            torch.testing.assert_close(value, found[3e9][name], rtol=1e-5, atol=1e-5)


def test_cocoops_batch_is_the_mean_of_its_images():
    method = moved(CoCoOp(BACKBONE, NAMES))
    whole = method.losses(FEATURES, LABELS)["cross_entropy"]
    single = [method.losses(FEATURES[i : i + 1], LABELS[i : i + 1])["cross_entropy"] for i in range(6)]
    torch.testing.assert_close(whole, torch.stack(single).mean(), **TIGHT)


def test_cocoop_takes_the_features_direction_alone():
    method = moved(CoCoOp(BACKBONE, NAMES))
    with torch.no_grad():
        torch.testing.assert_close(method(7 * FEATURES), method(FEATURES), rtol=1e-5, atol=1e-4)


def test_cocoops_first_draws():
    method = CoCoOp(BACKBONE, NAMES, seed=3)
    net = method.meta_net
    assert (net.linear1.in_features, net.linear1.out_features, net.linear2.out_features) == (DIM, 1, 16)
    for layer in (net.linear1, net.linear2):
        for value in layer.parameters():
            assert float(value.detach().abs().max()) <= layer.in_features**-0.5
            assert float(value.detach().abs().max()) > 0  # nothing starts from zero
    assert torch.equal(method.context, BACKBONE.text.token_embedding.weight[BACKBONE.word_pieces("a photo of a")])
    assert not torch.equal(net.linear1.weight, CoCoOp(BACKBONE, NAMES, seed=4).meta_net.linear1.weight)


@pytest.mark.parametrize("limit", [3e9, 1e4])
def test_cocoop_on_a_text_tower_without_a_causal_mask(limit):
    backbone, names = siglip_like(), ["one bird", "dog", "a red fox"]
    tower = backbone.text_tower
    tower.activation_bytes = limit
    method = moved(CoCoOp(backbone, names))
    wanted = []
    for feature in F.normalize(FEATURES, dim=-1):
        context = method.context + method.meta_net(feature)
        rows = []
        for name in names:
            x = tower.token_embedding(backbone.tokenize([f"a photo of a {name}."]).ids[0])
            x = torch.cat([context, x[4:]]) + tower.positional_embedding
            for block in tower.blocks:
                x = block(x[None])[0]
            rows.append(tower.projection(tower.ln_final(x))[11])
        wanted.append(10 * F.normalize(torch.stack(rows), dim=-1) @ feature - 3)
    wanted = torch.stack(wanted)
    torch.testing.assert_close(method(FEATURES), wanted, rtol=1e-5, atol=1e-5)
    own = list(method.parameters())
    theirs = torch.autograd.grad(F.cross_entropy(wanted, LABELS % 3), own)
    ours = torch.autograd.grad(method.losses(FEATURES, LABELS % 3)["cross_entropy"], own)
    assert len(ours) == 5
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_context": 0}, "num_context is 0, but must be at least 1"),
        ({"num_context": -1}, "num_context is -1, but must be at least 1"),
    ],
)
def test_bad_settings(values, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        CoCoOpConfig(**values)


def test_a_phrase_shorter_than_the_context_is_refused():
    with pytest.raises(ConfigError, match=r"'a photo of a' has 4 tokens, fewer than the 16 context vectors"):
        CoCoOp(BACKBONE, NAMES, config=CoCoOpConfig(num_context=16))


def test_a_name_that_overflows_is_named():
    with pytest.raises(
        DataError, match=r"Class name '(very )+long' \(71 tokens\) doesn't fit beside \d+ context vecto"
    ):
        CoCoOp(BACKBONE, ["cat", "very " * 70 + "long"])


def test_a_closed_text_tower_is_refused():
    with pytest.raises(BackboneError, match=r"CoCoOp must reach inside the text tower.*it is a test's"):
        CoCoOp(closed_text(), NAMES)


def test_context_vectors():
    method = CoCoOp(BACKBONE, NAMES)
    found = method.context_vectors()
    assert list(found) == ["context"]
    assert torch.equal(found["context"], method.context)
    assert not found["context"].requires_grad


def test_evaluation_goes_in_small_groups_whatever_the_tower_holds():
    method = CoCoOp(BACKBONE, NAMES)
    with torch.no_grad():
        few = method._images_at_once()
        method.set_classes([f"class {index}" for index in range(1000)])
        assert 1 <= method._images_at_once() < few
    assert BACKBONE.text_tower.activation_bytes > EVALUATION_BYTES
