"""Fewer image tokens as a setting of every method that asks a multimodal language model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adaptkit.errors import AdaptKitError, ConfigError, UnsupportedError
from adaptkit.evaluation.protocols import _key_values
from adaptkit.methods import methods
from adaptkit.methods.adapter import AdaptedModel, load_adapter, save_adapter
from adaptkit.training.loop import fit_method
from tests.backbones import tiny_mllm as tiny
from tests.methods.tiny import DESCRIPTIONS, NAMES, make_task, query
from tests.quick import short_answers

OWN_VECTORS = ("frozen", "fromage", "qformer")
"""They read a bridge of their own, and refuse."""

ASKING = tuple(name for name in methods if methods.get(name).needs_mllm and name not in OWN_VECTORS)
TRAINED = tuple(name for name in ASKING if methods.get(name).default_training is not None)
HALF = {"token_reduction": "vscan", "token_keep": 0.5}
ALLOWED: dict[bool, dict] = {True: {"allow_training": True}, False: {}}


@pytest.fixture(scope="module")
def llava():
    return tiny.load("llava")


def make(backbone, name, **settings):
    kind = methods.get(name)
    few = {"examples": 2} if name == "mllm-icl" else {}
    config = replace(short_answers(kind.config_class()), **few, **settings)
    return kind(backbone, NAMES, config=config, descriptions=DESCRIPTIONS)


def fitted(method, epochs=1):
    settings = method.default_training
    settings = settings and replace(settings, epochs=epochs, batch_size=4, lr=1e-2)
    return fit_method(method, make_task(method.backbone, "images", shots=2), settings)


def ask(method, pixels):
    with torch.no_grad():
        return method(pixels)


def test_how_many_methods_have_it():
    assert len(ASKING) >= 7
    assert len(TRAINED) >= 5
    for name in ASKING:
        settings = methods.get(name).config_class()
        assert settings.token_reduction == "none"
        later = {"token_reduction", "token_keep", "token_window", "allow_training"}
        assert not later & set(_key_values(settings))  # runs that were made before keep their keys
        assert hasattr(settings, "allow_training") == (name in TRAINED)


@pytest.mark.parametrize("name", ASKING)
def test_every_method_answers_with_fewer_tokens(llava, name):
    pixels = query(llava, "images", 3)
    plain, few = make(llava, name), make(llava, name, **HALF, **ALLOWED[name in TRAINED])
    facts, report = fitted(plain), fitted(few)
    assert facts["tokens_per_image"] == 4
    assert "tokens_per_image_before" not in facts
    assert (report["tokens_per_image"], report["tokens_per_image_before"]) == (2, 4)
    logits = ask(few, pixels)
    assert torch.isfinite(logits).all()
    assert not torch.allclose(logits, ask(plain, pixels))
    torch.testing.assert_close(ask(few, pixels[1:2]), logits[1:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ASKING)
def test_all_tokens_are_no_reduction(llava, name):
    pixels = query(llava, "images", 2)
    both = make(llava, name), make(llava, name, token_reduction="vscan", token_keep=1.0)
    for method in both:
        if name not in TRAINED:
            fitted(method)
    assert torch.equal(*(ask(method, pixels) for method in both))


@pytest.mark.parametrize("name", TRAINED)
def test_training_must_be_allowed(llava, name):
    method = make(llava, name, **HALF)
    with pytest.raises(ConfigError, match="allow_training=true"):
        fitted(method)
    assert ask(method, query(llava, "images", 1)).shape == (1, len(NAMES))


def test_trained_whole_and_asked_with_fewer(llava, tmp_path):
    """What an adapter learned from all tokens answers with some of them under other settings."""
    method = make(llava, "mllm-lora")
    fitted(method)
    few = make(llava, "mllm-lora", **HALF)
    few.load_adapter_state(method.adapter_state())
    pixels = query(llava, "images", 2)
    assert not torch.allclose(ask(few, pixels), ask(method, pixels))
    save_adapter(tmp_path / "out", AdaptedModel(few))
    again = load_adapter(tmp_path / "out", llava).method
    assert again.config.token_reduction == "vscan"
    assert torch.equal(ask(again, pixels), ask(few, pixels))


@pytest.mark.parametrize(
    "settings",
    [
        {"route": "letters"},
        {"route": "constrained"},
        {"route": "open", "max_tokens": 2, "unmatched": "nearest"},
        {"normalisation": "pmi"},
        {"normalisation": "pmi-null"},
        {"normalisation": "calibrated"},
    ],
)
def test_every_route(llava, settings):
    method = make(llava, "mllm-zero-shot", **settings, **HALF)
    fitted(method)
    assert torch.isfinite(ask(method, query(llava, "images", 2))).all()


@pytest.mark.parametrize("name", OWN_VECTORS)
def test_methods_with_a_bridge_of_their_own_refuse(name):
    with pytest.raises(UnsupportedError, match=r"can't be left\s*out|can be left out"):
        make(tiny.load(tiny.kind_for(name)), name, **HALF)


def test_families_that_cannot_are_refused_before_any_work():
    for kind in ("blip2", "qwen3_vl"):
        with pytest.raises(UnsupportedError, match="can't be left out"):
            make(tiny.load(kind), "mllm-zero-shot", token_reduction="random")


@pytest.mark.parametrize("name", ASKING)
def test_bad_values(name):
    kind = methods.get(name).config_class
    with pytest.raises(ConfigError, match="token_keep is 0"):
        kind(token_reduction="vscan", token_keep=0)
    with pytest.raises(AdaptKitError, match="token_window is -2"):
        kind(token_window=-2)
