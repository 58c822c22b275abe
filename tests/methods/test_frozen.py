"""Frozen: counts, what gradients reach, the language model as it was, every family, captions, bad input."""

from __future__ import annotations

import pytest
import torch

from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.errors import AdapterError, BackboneError, ConfigError, DataError
from adaptkit.methods.mllm._vision import vision_states
from adaptkit.methods.mllm.frozen import Frozen, FrozenConfig
from tests.backbones import tiny_mllm as tiny
from tests.backbones.test_mllm import brute_force
from tests.methods.tiny import DESCRIPTIONS, NAMES, ask, query, trained


@pytest.fixture(scope="module")
def llava():
    return tiny.load("llava")


def make(backbone, descriptions=None, seed=0, **settings):
    return Frozen(backbone, NAMES, config=FrozenConfig(**settings), seed=seed, descriptions=descriptions)


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_how_much_it_trains(llava, tokens):
    width, inputs = tiny.WIDTH, 64
    assert make(llava, tokens=tokens).num_trained() == inputs * tokens * width + tokens * width
    assert 2048 * 2 * 4096 + 2 * 4096 == 16_785_408  # the sheet's figure by the same formula


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_family_learns_and_stays_as_it_was(kind):
    backbone = tiny.load(kind)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    method = make(backbone)
    pixels = query(backbone, "images", 2)
    logits = ask(method, pixels)
    assert (logits[0] - logits[1]).abs().max() > 1e-4  # the prefix shows the image
    report = trained(method)
    assert report["losses"][-1] < report["losses"][0]
    assert report["prefix_norm_ratio"] > 0
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    assert not any(module.training for module in method.mllm.model.modules())


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "paligemma"])
def test_scores_are_brute_force_with_the_same_prefix(kind):
    """The likelihood of each caption behind the prefix; training minimises that of the right one."""
    backbone = tiny.load(kind)
    method = make(backbone, tokens=3)
    pixels, labels = query(backbone, "images", 3), torch.tensor([2, 0, 3])
    with torch.no_grad():
        features = method.features(pixels)
    assert features.counts == (3, 3, 3)
    rows = method.prompt_rows(features, [[_turn(method)]] * 3)
    assert [row.count(backbone.image_token) for row in rows] == [3, 3, 3]
    answers = method._name_answers()
    scores = ask(method, pixels)
    torch.testing.assert_close(scores, brute_force(method.mllm, rows, features, answers), rtol=1e-5, atol=1e-4)
    tokens = sum(len(answers[label]) for label in labels)
    loss = method.losses(pixels, labels)["answer"] * tokens
    torch.testing.assert_close(loss, -scores[torch.arange(3), labels].sum(), rtol=1e-5, atol=1e-4)


def _turn(method):
    return Turn(method.question)


@pytest.mark.parametrize("phi", ["frozen", "lora", "full"])
def test_gradients_reach_what_is_trained(llava, phi):
    """Through the frozen language model into the layer, and into the vision encoder where that is asked for."""
    method = make(llava, phi=phi, phi_r=4)
    torch.autograd.backward(method.losses(query(llava, "images", 2), torch.tensor([0, 3]))["answer"])
    assert method.prefix_map.linear.weight.grad.abs().max() > 0
    encoder = [name for name, _ in method.named_parameters() if name.startswith("adapter.model.vision_tower.")]
    assert bool(encoder) == (phi != "frozen")
    reached = [name for name in encoder if (p := method.get_parameter(name)).grad is not None and p.grad.any()]
    assert bool(reached) == bool(encoder)
    assert all(parameter.grad is None for parameter in llava.parameters())
    assert len(method.parameter_groups()) == 1 + (phi != "frozen")
    assert method.vision_frozen == (phi == "frozen")
    losses = trained(make(llava, phi=phi, phi_r=4))["losses"]
    assert losses[-1] < losses[0]


def test_vision_is_computed_once_where_it_is_frozen(llava, monkeypatch):
    counted = []
    for phi, wanted in (("frozen", 4), ("lora", 4 * 3)):
        method = make(llava, phi=phi)
        encode = method.mllm.image_features
        monkeypatch.setattr(
            method.mllm, "image_features", lambda pixels, *a, e=encode: counted.append(len(pixels)) or e(pixels, *a)
        )
        counted.clear()
        trained(method, epochs=3)
        assert sum(counted) - (4 if phi == "lora" else 0) == wanted  # for the record's facts once more
        assert counted


def test_pooling(llava):
    pixels = query(llava, "images", 3)
    with torch.no_grad():
        states = vision_states(llava, pixels)
        mean, token = make(llava).shown(pixels), make(llava, pool="class").shown(pixels)
    assert states.shape == (3, 5, 64)
    torch.testing.assert_close(torch.stack(mean.tokens)[:, 0], states.mean(dim=1))
    torch.testing.assert_close(torch.stack(token.tokens)[:, 0], states[:, 0])
    with pytest.raises(ConfigError, match="no class token"):
        make(tiny.load("gemma3"), pool="class")


def test_captions_are_templates_and_descriptions(llava):
    plain, described = make(llava), make(llava, DESCRIPTIONS)
    assert plain.captions_of(NAMES[1]) == ["a photo of a golden retriever."]
    assert described.captions_of(NAMES[1]) == ["a photo of a golden retriever.", *DESCRIPTIONS[NAMES[1]]]
    torch.manual_seed(0)
    drawn = described.drawn_captions(torch.zeros(40, dtype=torch.int64))
    assert set(drawn) == set(described.captions_of(NAMES[0]))
    assert all(any(caption in text for text in described.training_texts()) for caption in described.training_captions())
    names = make(llava, answers="names")
    assert names.candidate_texts(NAMES)[1] == "golden retriever"
    end = llava.prompter.end_tokens()
    assert all(row[-1] in end for row in described.caption_rows(described.training_captions()))


def test_the_number_of_tokens_belongs_to_the_adapter(llava):
    with pytest.raises(AdapterError, match="shape"):
        make(llava, tokens=3).load_adapter_state(make(llava).adapter_state())


@pytest.mark.parametrize(
    "settings", [{"route": "letters", "answers": "names"}, {"route": "constrained"}, {"variant": "softmax"}]
)
def test_other_ways_of_answering_and_training(llava, settings):
    method = make(llava, **settings)
    losses = trained(method)["losses"]
    assert losses[-1] < losses[0]
    assert torch.isfinite(ask(method, query(llava, "images", 2))).all()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"phi_r": 0, "phi_lr": 0}, "phi_r is 0, but must be at least 1; phi_lr is 0"),
        ({"variant": "letters"}, "aren't letters"),
    ],
)
def test_settings_that_cannot_be_used(settings, says):
    with pytest.raises(ConfigError, match=says):
        FrozenConfig(**settings)


def test_captions_that_cannot_be_read(llava):
    with pytest.raises(DataError, match="control token"):
        make(llava, {NAMES[0]: ("a cat</s>",)})
    with pytest.raises(BackboneError, match="longest caption has 6"):
        trained(make(llava, {NAMES[0]: ("word " * 120,)}))
