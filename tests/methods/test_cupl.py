"""CuPL: the sentence ensemble, its three pools, and its place beside the template ensemble."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adaptkit.errors import ConfigError, DataError
from adaptkit.methods.adapters.zero_shot import ZeroShot
from adaptkit.methods.base import render_prompts
from adaptkit.methods.descriptions.cupl import CuPL, CuPLConfig
from tests.methods.tiny import DESCRIPTIONS, NAMES, query, tiny_clip

BACKBONE = tiny_clip()
FEATURES = query(BACKBONE, "image_features")
TEMPLATES = ("a photo of a {}.", "a drawing of a {}.")


def cupl(descriptions=DESCRIPTIONS, **settings):
    return CuPL(BACKBONE, NAMES, templates=TEMPLATES, config=CuPLConfig(**settings), descriptions=descriptions)


def mean_unit(sentences):
    return F.normalize(BACKBONE.text_features(sentences), dim=-1).mean(dim=0)


@pytest.mark.parametrize("renormalise", [True, False])
def test_weights_are_the_sheets(renormalise):
    wanted = torch.stack([mean_unit(DESCRIPTIONS[name]) for name in NAMES])
    wanted = F.normalize(wanted, dim=-1) if renormalise else wanted
    torch.testing.assert_close(cupl(renormalise=renormalise).class_weights(), wanted, rtol=1e-5, atol=1e-6)


def test_templates_as_sentences_are_the_template_ensemble():
    templates = {name: [render_prompts([name], one)[0] for one in TEMPLATES] for name in NAMES}
    zero_shot = ZeroShot(BACKBONE, NAMES, templates=TEMPLATES)
    torch.testing.assert_close(cupl(templates)(FEATURES), zero_shot(FEATURES))
    torch.testing.assert_close(cupl(prompts="standard")(FEATURES), zero_shot(FEATURES))


def test_the_combined_pool_weighs_every_prompt_alike():
    pools = [[*DESCRIPTIONS[name], *(render_prompts([name], one)[0] for one in TEMPLATES)] for name in NAMES]
    wanted = F.normalize(torch.stack([mean_unit(pool) for pool in pools]), dim=-1)
    torch.testing.assert_close(cupl(prompts="combined").class_weights(), wanted, rtol=1e-5, atol=1e-6)


def test_a_sentence_twice_counts_twice():
    twice = {name: (*given, given[0]) for name, given in DESCRIPTIONS.items()}
    wanted = F.normalize(torch.stack([mean_unit(twice[name]) for name in NAMES]), dim=-1)
    torch.testing.assert_close(cupl(twice).class_weights(), wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(cupl(twice).class_weights(), cupl().class_weights())


def test_long_sentences_are_shortened_on_request():
    long = {**DESCRIPTIONS, "river": ("wide " * 90,)}
    assert torch.isfinite(cupl(long)(FEATURES)).all()
    with pytest.raises(ValueError, match="is too long"):
        cupl(long, shorten=False)(FEATURES)


def test_what_is_needed():
    with pytest.raises(DataError, match="cupl reads descriptions"):
        cupl({})
    assert torch.isfinite(cupl({}, prompts="standard")(FEATURES)).all()
    partial = cupl({"river": ("wide",)}, fallback=True)
    assert partial.sentences("tabby cat") == ["a photo of a tabby cat.", "a drawing of a tabby cat."]
    assert partial.sentences("river") == ["wide"]
    with pytest.raises(ConfigError, match="prompts is 'x'"):
        CuPLConfig(prompts="x")
