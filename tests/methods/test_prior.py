"""PRIOR: weights of caption tokens, the reference without an image, and the weighted loss against plain sums."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.errors import BackboneError, ConfigError, DataError
from adaptkit.methods.mllm import prior as module
from adaptkit.methods.mllm._captions import CAPTION_PROMPT, captions_of
from adaptkit.methods.mllm._weights import text_probabilities, text_rows, token_weights
from adaptkit.methods.mllm.mllm_lora import MllmLora, MllmLoraConfig
from adaptkit.methods.mllm.prior import Prior, PriorConfig
from adaptkit.training.loop import fit_method
from tests.backbones import tiny_mllm as tiny
from tests.methods.tiny import DESCRIPTIONS, NAMES, make_task, query

SENTENCES = {name: (f"a small {name} here", f"{name}.") for name in NAMES}
EXACT = {"dropout": 0.0}


@pytest.fixture(scope="module")
def llava():
    return tiny.load("llava")


def make(backbone, descriptions=SENTENCES, **settings):
    return Prior(backbone, NAMES, config=PriorConfig(**{**EXACT, **settings}), descriptions=descriptions)


def losses(method, pixels, labels, seed=0):
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(seed)
        return method.losses(pixels, labels)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_by_hand():
    p = torch.tensor([0.0, 0.01, 0.25, 1.0])
    assert token_weights(p, "linear", 1.0, 5.0).tolist() == pytest.approx([2.0, 1.99, 1.75, 1.0])
    assert token_weights(p, "linear", 3.0, 5.0).tolist() == pytest.approx([4.0, 3.97, 3.25, 1.0])
    assert token_weights(p, "power", 0.5, 5.0).tolist() == pytest.approx([5.0, 5.0, 2.0, 1.0])
    assert token_weights(p, "power", 0.5, 1000.0).tolist() == pytest.approx([100.0, 10.0, 2.0, 1.0], rel=1e-4)
    assert token_weights(p, "focal", 1.0, 5.0).tolist() == pytest.approx([1.0, 0.99, 0.75, 0.0])
    assert token_weights(p, "focal", 2.0, 5.0).tolist() == pytest.approx([1.0, 0.9801, 0.5625, 0.0])


@pytest.mark.parametrize("kind", ["linear", "power", "focal"])
def test_weights_fall_in_p_and_carry_no_gradient(kind):
    p = torch.linspace(0, 1, 50, requires_grad=True)
    found = token_weights(p, kind, 0.7, 5.0)
    assert bool((found.diff() <= 1e-6).all())
    assert not found.requires_grad
    assert token_weights(p, kind, 0.0, 5.0).tolist() == pytest.approx([1.0] * 50)


# --- the reference ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "gemma3", "paligemma", "smolvlm", "blip2"])
def test_the_reference_reads_a_text_without_placeholders(kind):
    """Placeholders are deleted and not masked: the row is the conversation that shows no image."""
    backbone = tiny.load(kind)
    rows = backbone.prompter.answers([Turn(CAPTION_PROMPT)], ["a red bird", "an oak"])
    texts = text_rows(backbone, CAPTION_PROMPT, rows)
    for row, caption in zip(texts, rows, strict=True):
        assert backbone.image_token not in row
        assert row == backbone.prompter.ids([Turn(CAPTION_PROMPT, 0)]) + caption
    found = text_probabilities(backbone, CAPTION_PROMPT, rows)
    assert [len(p) for p in found] == [len(row) for row in rows]
    for p, row in zip(found, rows, strict=True):  # alone and step by step, in one row and padded in another
        ids = backbone.prompter.ids([Turn(CAPTION_PROMPT, 0)])
        for place, token in enumerate(row[:3]):
            with torch.no_grad():
                hidden = backbone.hidden(backbone.batch([[*ids, *row[:place]]], None, [place]))
                logits = backbone.logits(hidden[:, -1])[0]
            assert float(logits.softmax(dim=-1)[token]) == pytest.approx(float(p[place]), rel=1e-3, abs=1e-6)


def test_the_reference_is_frozen_and_without_adapters(llava):
    method = make(llava)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.3)
    fresh = make(llava)
    assert torch.equal(method.weights_of(0, 0), fresh.weights_of(0, 0))
    pixels = query(llava, "images", 2)
    torch.autograd.backward(sum(method.losses(pixels, torch.tensor([0, 1])).values()))
    assert all(parameter.grad is None for parameter in llava.parameters())


def test_cached_weights_are_those_on_the_fly(llava):
    method = make(llava)
    fit_method(method, make_task(llava, "images", shots=1), replace(method.default_training, epochs=1))
    done = 0
    for label, rows in enumerate(method.caption_rows):
        for place, row in enumerate(rows):
            p = text_probabilities(llava, CAPTION_PROMPT, [row])[0]
            torch.testing.assert_close(method._weights[label, place], 1 + (1 - p))
            done += 1
    assert done == 2 * len(NAMES)


def test_each_caption_is_weighted_once(llava, monkeypatch):
    counted = []
    plain = module.text_probabilities
    monkeypatch.setattr(module, "text_probabilities", lambda *given: counted.extend(given[-1]) or plain(*given))
    method = make(llava)
    fit_method(method, make_task(llava, "images", shots=2), replace(method.default_training, epochs=3))
    assert len(counted) == sum(map(len, SENTENCES.values()))


def test_a_tuned_reference_knows_the_captions_better(llava):
    before = {key: value.clone() for key, value in llava.state_dict().items()}
    method = make(llava, reference="self-text-tuned", reference_lr=1e-2, reference_epochs=5)
    method.look(None)
    plain = make(llava)
    plain.look(None)
    ours, theirs = (torch.cat([*one._weights.values()]) for one in (method, plain))
    assert ours.mean() < theirs.mean()  # better foretold, so lighter
    assert all(torch.equal(before[key], value) for key, value in llava.state_dict().items())
    assert not any(parameter.requires_grad for parameter in llava.parameters())
    again = make(llava, reference="self-text-tuned", reference_lr=1e-2, reference_epochs=5)
    again.look(None)
    assert torch.equal(torch.cat([*again._weights.values()]), ours)


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_flat_weights_are_the_plain_loss(llava):
    """Whatever they are, as long as they are all alike."""
    pixels, labels = query(llava, "images", 4), torch.tensor([0, 1, 2, 3])
    plain = losses(make(llava, strength=0.0), pixels, labels)
    method = make(llava)
    method.weights_of = lambda label, place: torch.full((len(method.caption_rows[label][place]),), 1.7)
    flat = losses(method, pixels, labels)
    torch.testing.assert_close(flat["caption"], plain["caption"])
    assert set(flat) == {"answer", "caption"}


@pytest.mark.parametrize(("divide_by", "micro"), [("weights", 0), ("weights", 1), ("tokens", 0), ("tokens", 2)])
def test_the_loss_by_hand(llava, divide_by, micro):
    """Captions of different lengths: padding has no weight, and parts of a batch add up."""
    pixels, labels = query(llava, "images", 3), torch.tensor([0, 1, 3])
    method = make(llava, divide_by=divide_by, micro_batch=micro, names=0.5)
    found = losses(method, pixels, labels)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # the names' loss draws nothing
        chosen = method.choose(pixels, labels)
    total, over = 0.0, 0.0
    with torch.no_grad():
        for pixel, label, place in zip(pixels, labels.tolist(), chosen, strict=True):
            features = method.features(pixel[None])
            row, weights = method.caption_rows[label][place], method.weights_of(label, place)
            prompt = method.mllm.prompter.ids([Turn(CAPTION_PROMPT)], features.counts)
            for position, token in enumerate(row):
                hidden = method.mllm.prefix([prompt + row[:position]], features).hidden
                log_p = method.mllm.logits(hidden)[0].log_softmax(dim=-1)[token]
                total -= float(weights[position] * log_p)
                over += float(weights[position]) if divide_by == "weights" else 1
    assert float(found["caption"]) == pytest.approx(total / over, rel=1e-4)
    lora = MllmLora(llava, NAMES, config=MllmLoraConfig(**EXACT))
    assert float(found["answer"]) == pytest.approx(0.5 * float(losses(lora, pixels, labels)["answer"]), rel=1e-5)


def test_it_learns_and_answers_like_mllm_lora(llava):
    pixels = query(llava, "images", 3)
    method, lora = make(llava), MllmLora(llava, NAMES, config=MllmLoraConfig(**EXACT))
    with torch.no_grad():
        assert torch.equal(method(pixels), lora(pixels))
    report = fit_method(
        method, make_task(llava, "images", shots=2), replace(method.default_training, epochs=4, lr=1e-2)
    )
    assert report["losses"][-1] < report["losses"][0]
    facts = report["caption_weights"]
    assert 1 <= facts["least"] < facts["mean"] < facts["most"] <= 2
    assert (report["captions"], report["caption_count"]) == ("descriptions", 2 * len(NAMES))


def test_captions():
    templates = ("a photo of a {}.", "art of a {}")
    assert captions_of("snow_leopard", templates, ()) == ("a photo of a snow leopard.", "art of a snow leopard")
    said = captions_of("snow_leopard", templates, ("A Snow Leopard with spots", "a long tail"))
    assert said == ("A Snow Leopard with spots", "a photo of a snow leopard. a long tail")


def test_templates_where_nothing_is_described(llava):
    method = make(llava, descriptions={})
    assert method.captions == [("a photo of a tabby cat.",), ("a photo of a golden retriever.",)] + [
        (f"a photo of a {name}.",) for name in NAMES[2:]
    ]
    texts = make(llava, DESCRIPTIONS).training_texts()
    assert any("stripes" in text for text in texts)
    assert not any("spots" in text for text in texts)  # a novel class's


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"strength": -1}, "strength is -1, but must be at least 0"),
        ({"most": 0.5, "reference_lr": 0}, "most is 0.5, but must be at least 1; reference_lr"),
        ({"reference_epochs": 0}, "reference_epochs is 0"),
        ({"names": -1}, "names is -1"),
        ({"caption_prompt": " "}, "caption_prompt is ' ', but must be a text"),
        ({"r": 0}, "r is 0"),
    ],
)
def test_settings_that_cannot_be_used(settings, says):
    with pytest.raises(ConfigError, match=says):
        PriorConfig(**settings)


def test_captions_that_cannot_be_read(llava):
    with pytest.raises(DataError, match="reads as a control token"):
        make(llava, {NAMES[0]: ("a cat <image> here",)})
    with pytest.raises(BackboneError, match="more than the 512"):
        make(llava, {NAMES[0]: ("long " * 120,)})
