"""Twins of a backbone: what they share, what is their own, and that the backbone never notices."""

from __future__ import annotations

import pytest
import torch

from adaptkit.errors import UnsupportedError
from adaptkit.methods._tuned import TunedWeights
from tests.methods.tiny import closed_text, query, tiny_clip


def norms(name):
    return ".ln_1." in name


def test_a_twin_shares_all_but_the_tuned_tensors():
    backbone = tiny_clip()
    tuned = TunedWeights(backbone, norms, "a test")
    twin = tuned.twin(backbone)
    own = dict(tuned.values())
    compared = 0
    for (name, mine), (_, theirs) in zip(twin.named_parameters(), backbone.named_parameters(), strict=True):
        assert (mine is own[name]) if norms(name) else (mine is theirs)
        assert mine.requires_grad == norms(name)
        assert torch.equal(mine, theirs)
        compared += 1
    assert compared > 60
    assert len(own) == 2 * 2 * 3  # weight and bias of three layers in both towers
    assert twin._tokenizer is backbone._tokenizer
    assert tuned.twin(backbone) is twin


def test_tuned_values_reach_the_twin_alone():
    backbone = tiny_clip()
    pixels, texts = query(backbone, "images"), ["a cat", "two dogs"]
    images, sentences = backbone.encode_image(pixels), backbone.text_features(texts)
    tuned = TunedWeights(backbone, norms, "a test")
    torch.testing.assert_close(tuned.twin(backbone).encode_image(pixels), images, rtol=0, atol=0)
    torch.testing.assert_close(tuned.twin(backbone).text_features(texts), sentences, rtol=0, atol=0)
    with torch.no_grad():
        for _, value in tuned.values():
            value.mul_(1.5)
    assert not torch.allclose(tuned.twin(backbone).encode_image(pixels), images)
    assert not torch.allclose(tuned.twin(backbone).text_features(texts), sentences)
    assert torch.equal(backbone.encode_image(pixels), images)


def test_names_are_the_backbones_and_moves_keep_the_twin_right():
    backbone = tiny_clip()
    tuned = TunedWeights(backbone, norms, "a test")
    assert set(tuned.state_dict()) == {name for name, _ in backbone.named_parameters() if norms(name)}
    before = tuned.twin(backbone)
    tuned.to(torch.float64)
    assert tuned.twin(backbone) is not before
    assert dict(tuned.twin(backbone).named_parameters())["image.blocks.0.ln_1.weight"].dtype == torch.float64


def test_an_encoder_that_cannot_be_opened_has_a_twin_too():
    backbone = closed_text()
    tuned = TunedWeights(backbone, lambda name: True, "a test")
    pixels = query(backbone, "images")
    assert torch.equal(tuned.twin(backbone).encode_image(pixels), backbone.encode_image(pixels))


def test_nothing_to_tune_is_refused():
    with pytest.raises(UnsupportedError, match="a test tunes the weights"):
        TunedWeights(tiny_clip(), lambda name: False, "a test")
