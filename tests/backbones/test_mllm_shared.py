"""Prompts that begin alike go through the model once, and give the numbers that they give alone."""

from __future__ import annotations

import pytest
import torch

from adaptkit.backbones.mllm import model
from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.backbones.mllm.trie import Trie
from tests.backbones import tiny_mllm as tiny


def conversation(backbone, queries=3, examples=2, last="What is it?"):
    """Rows of `examples` demonstrations that are the same for all, and a query each; and their images."""
    side = backbone.spec.preprocessing.image_size
    with torch.no_grad():
        shots, asked = (backbone.image_features(tiny.pixels(n, side, seed=n), "What?") for n in (examples, 5 + queries))
    turns = [Turn("What?", 1, answer) for answer in ("cat", "ship", "cow")[:examples]] + [Turn(last)]
    features = ImageFeatures.join([part for i in range(queries) for part in (shots, asked.select([i]))])
    rows = [backbone.prompter.ids(turns, features.counts[: examples + 1])] * queries
    return rows, features


def both_ways(backbone, rows, features, monkeypatch):
    """Prefixes with and without a shared start, and the tokens that went through the model."""
    passed, found = [], []
    hidden = backbone.hidden

    def counted(batch, *args, **more):
        passed[-1] += batch.ids.numel()
        return hidden(batch, *args, **more)

    monkeypatch.setattr(backbone, "hidden", counted)
    for share in (0.25, 2.0):
        monkeypatch.setattr(model, "SHARED_SHARE", share)
        passed.append(0)
        with torch.no_grad():
            found.append(backbone.prefix(rows, features))
    monkeypatch.undo()
    return (*found, *passed)


def check_alike(backbone, ours, wanted):
    torch.testing.assert_close(ours.hidden, wanted.hidden, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.next_position, wanted.next_position)
    trie = Trie.build(backbone.prompter.answers([Turn("What?")], ["cat", "cattle", "ship"]))
    with torch.no_grad():
        scores = [backbone.candidate_scores(prefix, trie) for prefix in (ours, wanted)]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_shared_examples_give_the_same_numbers(kind, monkeypatch):
    backbone = tiny.load(kind)
    rows, features = conversation(backbone)
    ours, wanted, few, many = both_ways(backbone, rows, features, monkeypatch)
    check_alike(backbone, ours, wanted)
    assert many == 3 * len(rows[0])
    if backbone.family.token_types:
        assert few == many  # tokens see each other both ways there
    else:
        assert few < 0.65 * many


def test_a_shared_first_image_of_pairs(monkeypatch):
    backbone = tiny.load("llava")
    with torch.no_grad():
        images = backbone.image_features(tiny.pixels(4))
    features = images.select([0, 1, 0, 2, 0, 3])
    rows = [backbone.prompter.ids([Turn("Same?", 2)], features.counts[:2])] * 3
    ours, wanted, few, many = both_ways(backbone, rows, features, monkeypatch)
    check_alike(backbone, ours, wanted)
    assert few < many
    other = images.select([1, 0, 2, 0, 3, 0])  # the second image is the shared one
    _, _, few, many = both_ways(backbone, rows, other, monkeypatch)
    assert few == many


def test_what_is_not_shared(monkeypatch):
    backbone = tiny.load("llava")
    rows, features = conversation(backbone)

    def start(rows, features):
        with torch.no_grad():
            return backbone._shared_start(rows, features)

    cut, images = start(rows, features)
    assert images == 2
    assert rows[0][cut] == backbone.image_token
    assert start(rows[:1], features.select(range(3))) == (0, 0)  # one row
    assert start([*rows[:2], [*rows[2], 9]], features) == (0, 0)  # another length
    assert start([*rows[:2], [9, *rows[2][1:]]], features) == (0, 0)  # another first token
    copied = ImageFeatures(tuple(vectors.clone() for vectors in features.tokens))
    assert start(rows, copied)[1] == 0  # images that only look alike aren't compared
    assert start(rows, None) == (0, 0)
    changed = [*rows[:2], [*rows[2][: cut - 3], 9, *rows[2][cut - 2 :]]]
    assert start(changed, features) == (cut - 3, 2)  # the examples' text ends otherwise
    assert backbone._shared_start(rows, features) == (0, 0)  # training
    same = features.select([0, 1, 2] * 3)
    ours, wanted, few, _ = both_ways(backbone, rows, same, monkeypatch)
    check_alike(backbone, ours, wanted)
    assert few == len(rows[0]) - 1 + 3  # all but the last token
