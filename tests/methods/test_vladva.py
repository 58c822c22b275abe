"""VladVA: summary tokens, both losses, exact gradients in parts, and as a backbone for other methods."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from adaptkit.backbones.mllm.model import IMAGE_PROMPT
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.errors import ConfigError, DataError
from adaptkit.methods import methods
from adaptkit.methods.adapter import AdaptedModel, load_adapter, save_adapter
from adaptkit.methods.mllm.vladva import Vladva, VladvaConfig, contrast
from adaptkit.training.loop import fit_method
from tests.backbones import tiny_mllm as tiny
from tests.methods.tiny import DESCRIPTIONS, NAMES, NOVEL, make_task, query

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def llava():
    return tiny.load("llava")


def make(backbone, descriptions=DESCRIPTIONS, templates=("a photo of a {}.",), **settings):
    return Vladva(
        backbone, NAMES, config=VladvaConfig(**settings), descriptions=descriptions, templates=templates, seed=0
    )


def shaken(method, size=0.05):
    numbers = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if name != "log_scale":
                parameter.add_(size * torch.randn(parameter.shape, generator=numbers))
    return method


def gradients(method, pixels, labels):
    method.zero_grad()
    torch.manual_seed(0)  # the captions' draws
    terms = method.losses(pixels, labels)
    torch.autograd.backward(sum(terms.values()))
    return {k: v.detach() for k, v in terms.items()}, {n: p.grad for n, p in method.named_parameters()}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_it_begins_as_the_summaries_of_the_model(kind):
    backbone = tiny.load(kind)
    method = make(backbone)
    pixels = query(backbone, "images", 2)
    with torch.no_grad():
        torch.testing.assert_close(method.encode_image(pixels), backbone.encode_image(pixels), rtol=1e-5, atol=1e-5)
        wanted = F.normalize(backbone.text_features([f"a photo of a {n.replace('_', ' ')}." for n in NAMES]), dim=-1)
        torch.testing.assert_close(method.class_weights(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "gemma3", "paligemma", "blip2"])
def test_both_losses_fall_on_eight_pairs(kind):
    backbone = tiny.load(kind)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    method, seen = make(backbone), []
    settings = replace(method.default_training, epochs=8, lr=1e-2, batch_size=8)
    losses = method.losses
    method.losses = lambda *given: seen.append(losses(*given)) or seen[-1]
    fit_method(method, make_task(backbone, "images", shots=2), settings)
    assert seen[0].keys() == {"contrastive", "next_token"}
    for name in seen[0]:
        assert seen[-1][name] < 0.98 * seen[0][name]
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


def test_one_loss_alone(llava):
    pixels, labels = query(llava, "images", 4), torch.arange(4)
    both, _ = gradients(make(llava), pixels, labels)
    for weights, name in (({"next_token": 0.0}, "contrastive"), ({"contrastive": 0.0}, "next_token")):
        alone, _ = gradients(make(llava, **weights), pixels, labels)
        assert alone.keys() == {name}
        torch.testing.assert_close(alone[name], both[name], rtol=1e-5, atol=1e-5)
    half, _ = gradients(make(llava, reduction="mean"), pixels, labels)
    torch.testing.assert_close(2 * half["contrastive"], both["contrastive"])


def test_the_contrastive_loss_by_hand():
    images, texts = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)), torch.eye(5)[:3]
    s = (2.0 * F.normalize(images, dim=1) @ texts.T).tolist()

    def share(values, right):
        return -math.log(math.exp(values[right]) / sum(map(math.exp, values)))

    wanted = sum(share(s[k], k) + share([row[k] for row in s], k) for k in range(3)) / 3
    assert float(contrast(torch.tensor(2.0), images, texts, torch.arange(3))) == pytest.approx(wanted, rel=1e-5)
    # the first two of one class: neither is compared with the other
    wanted = (share([s[0][0], s[0][2]], 0) + share([s[0][0], s[2][0]], 0)) / 3
    wanted += (share([s[1][1], s[1][2]], 0) + share([s[1][1], s[2][1]], 0)) / 3
    wanted += (share(s[2], 2) + share([row[2] for row in s], 2)) / 3
    found = contrast(torch.tensor(2.0), images, texts, torch.tensor([4, 4, 1]))
    assert float(found) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_the_next_token_loss_is_the_captions_likelihood(kind):
    """One pass gives the summary and the caption's likelihood; both are those of passes of their own."""
    backbone = tiny.load(kind)
    method = shaken(make(backbone))
    pixels = query(backbone, "images", 2)
    long = method.mllm.prompter.answers([Turn(IMAGE_PROMPT)], ["stripes", "a much longer tail of a cat"])
    with torch.no_grad():
        images, following = method._image_pass(pixels, long)
        torch.testing.assert_close(images, method.encode_image(pixels), rtol=1e-5, atol=1e-5)
        alone = sum(method._image_pass(pixels[[i]], [long[i]])[1] for i in range(2))
    torch.testing.assert_close(following, alone, rtol=1e-5, atol=1e-4)


def test_long_captions_weighed_by_what_text_foretells():
    """Each token's loss by prior's weights, divided by their sum; flat weights are none at all."""
    from adaptkit.methods.mllm._weights import text_probabilities, token_weights

    backbone, kinds = tiny.load("llava"), ("none", "linear", "focal")
    pixels, labels, found = query(backbone, "images", 3), torch.tensor([0, 1, 2]), {}
    for kind in kinds:
        method = make(backbone, contrastive=0.0, caption_weights=kind)
        losses = []
        for micro in (0, 2):
            method.config = replace(method.config, micro_batch=micro)
            with torch.no_grad():
                torch.manual_seed(0)
                losses.append(method.losses(pixels, labels)["next_token"])
        torch.testing.assert_close(*losses)
        found[kind] = float(losses[0])
    assert len(set(found.values())) == 3
    torch.manual_seed(0)
    _, long = method._captions(labels)
    p = text_probabilities(backbone, IMAGE_PROMPT, long[:1])[0]
    torch.testing.assert_close(method._weights_of(long[:1]), token_weights(p, "focal", 1.0, 5.0))
    method._weights = {tuple(caption): torch.full((len(caption),), 0.3) for caption in long}
    with torch.no_grad():
        torch.manual_seed(0)
        assert float(method.losses(pixels, labels)["next_token"]) == pytest.approx(found["none"], rel=1e-5)


@pytest.mark.parametrize("weights", [{}, {"next_token": 0.0}, {"contrastive": 0.0}])
def test_parts_have_the_whole_batchs_gradient(llava, weights):
    method = shaken(make(llava, **weights))
    pixels, labels = query(llava, "images", 5), torch.tensor([0, 1, 2, 3, 1])
    whole, one = gradients(method, pixels, labels)
    method.config = replace(method.config, micro_batch=2)
    parts, other = gradients(method, pixels, labels)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-5)
    for name, grad in one.items():
        if grad is not None:
            torch.testing.assert_close(other[name], grad, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        torch.manual_seed(0)
        for name, value in method.losses(pixels, labels).items():
            torch.testing.assert_close(value, parts.get(name, value), rtol=1e-5, atol=1e-5)


def test_gradients_reach_what_is_trained_and_nothing_else(llava):
    method = shaken(make(llava))
    _, grads = gradients(method, query(llava, "images", 3), torch.tensor([0, 1, 2]))
    assert {"image_soft", "text_soft", "log_scale"} < grads.keys()
    assert len(grads) == 3 + 2 * 2 * 7
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())
    assert not any(parameter.requires_grad for parameter in llava.parameters())
    alone = make(llava, lora=False, learn_temperature=False)
    assert {name for name, _ in alone.named_parameters()} == {"image_soft", "text_soft"}
    assert not torch.equal(alone.image_soft[:5], alone.text_soft[:5])


def test_texts_see_no_image_and_no_padding(llava):
    method = shaken(make(llava))
    short, long = method.text_row("a cat"), method.text_row("a cat that lies on a very long mat in the sun")
    with torch.no_grad():
        together = method.encode_rows([short, long])
        torch.testing.assert_close(together[:1], method.encode_rows([short]), rtol=1e-5, atol=1e-5)
        weights = method.class_weights()
        method.encode_image(query(llava, "images", 2))
        assert torch.equal(weights, method.class_weights())


def test_saved_and_loaded(llava, tmp_path):
    method = shaken(make(llava))
    save_adapter(tmp_path / "out", AdaptedModel(method))
    assert (tmp_path / "out" / "peft" / "adapter_model.safetensors").is_file()
    again = load_adapter(tmp_path / "out", llava).method
    pixels = query(llava, "images", 3)
    with torch.no_grad():
        assert torch.equal(again(pixels), method(pixels))
        assert torch.equal(again.set_classes(NOVEL)(pixels), method.set_classes(NOVEL)(pixels))


@pytest.mark.parametrize("name", ["zero-shot", "tip-adapter", "linear-probe", "gda"])
def test_a_backbone_for_methods_on_features(llava, name):
    method = shaken(make(llava))
    backbone = method.as_backbone()
    assert backbone.spec.digest != llava.spec.digest
    assert shaken(make(llava), 0.06).as_backbone().spec.digest != backbone.spec.digest
    kind = methods.get(name)
    other = kind(backbone, NAMES)
    fit_method(other, make_task(backbone, "image_features"))
    pixels = query(backbone, "images", 3)
    with torch.no_grad():
        logits = other(backbone.encode_image(pixels))
        assert torch.isfinite(logits).all()
        if name == "zero-shot":
            torch.testing.assert_close(logits, method(pixels), rtol=1e-4, atol=1e-4)


def test_long_captions_are_the_descriptions(llava):
    torch.manual_seed(0)
    decode = llava.prompter.tokenizer.decode
    for descriptions, wanted in ((DESCRIPTIONS, DESCRIPTIONS[NAMES[0]]), ({}, ("a sketch of a tabby cat.",))):
        method = make(llava, descriptions, ("a sketch of a {}.",))
        short, long = method._captions(torch.zeros(6, dtype=torch.int64))
        assert set(short) == {"a sketch of a tabby cat."}
        texts = {decode(row[:-1]).strip() for row in long}
        assert texts == set(wanted)


def test_settings_that_cannot_be_used(llava):
    with pytest.raises(ConfigError, match="r is 0, but must be at least 1; temperature"):
        VladvaConfig(r=0, temperature=0)
    with pytest.raises(ConfigError, match="both 0"):
        VladvaConfig(contrastive=0, next_token=0)
    with pytest.raises(ConfigError, match="image_prompt is ' '"):
        VladvaConfig(image_prompt=" ")
    with pytest.raises(DataError, match="control token"):
        make(llava, image_prompt="<image> what?")
    with pytest.raises(DataError, match="description 'an <image>'"):
        make(llava, {NAMES[0]: ("an <image>",)})
    with pytest.raises(DataError, match="control token"):
        make(llava).set_classes(("cat", "</s>"))
