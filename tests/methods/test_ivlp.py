"""IVLP against a plain computation of its sheet, its initial draws, text prompts alone, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adaptkit.errors import BackboneError, ConfigError, DataError
from adaptkit.methods.prompts.ivlp import IVLP, IVLPConfig
from adaptkit.training.loop import fit_method
from adaptkit.types import FitTask, TensorInputs, TrainingSettings
from tests.methods.deep import assert_same_gradients, plain_image, plain_text, siglip_like
from tests.methods.tiny import NAMES, NOVEL, closed_text, make_task, query, tiny_clip

BACKBONE = tiny_clip()
BACKBONES = {"clip": BACKBONE, "siglip": siglip_like()}
WORDS = "a photo of a"


def plain_logits(method, pixels, words, names=NAMES):
    backbone = method.backbone
    weights = plain_text(backbone, names, words, list(method.text_prompts))
    features = plain_image(backbone, pixels, list(method.image_prompts))
    return backbone.logit_scale * features @ weights.T + backbone.logit_bias


@pytest.mark.parametrize(
    ("sizes", "words"),
    [((2, 2, 3, 3), WORDS), ((4, 1, 1, 3), WORDS), ((1, 5, 3, 1), "a photo"), ((4, 0, 2, 3), WORDS)],
)
@pytest.mark.parametrize("kind", sorted(BACKBONES))
def test_equals_the_plain_way(kind, sizes, words):
    method = IVLP(BACKBONES[kind], NAMES, config=IVLPConfig(*sizes, words), seed=3)
    pixels, labels = query(BACKBONE, "images"), torch.arange(9) % 4
    wanted = plain_logits(method, pixels, words)
    torch.testing.assert_close(method(pixels), wanted, rtol=1e-5, atol=1e-5)
    loss = method.losses(pixels, labels)["cross_entropy"]
    assert_same_gradients(loss, F.cross_entropy(wanted, labels), method.parameters())
    method.set_classes(NOVEL)
    torch.testing.assert_close(method(pixels), plain_logits(method, pixels, words, NOVEL), rtol=1e-5, atol=1e-5)


def test_start():
    method = IVLP(BACKBONE, NAMES, config=IVLPConfig(2, 5, 3, 2))
    assert torch.equal(method.text_prompts[0], BACKBONE.text.token_embedding.weight[BACKBONE.word_pieces("a photo")])
    assert [tuple(p.shape) for p in method.text_prompts] == [(2, 16)] * 3
    assert [tuple(p.shape) for p in method.image_prompts] == [(5, 24)] * 2
    assert method.num_trained() == 3 * 2 * 16 + 2 * 5 * 24
    random = IVLP(BACKBONE, NAMES, config=IVLPConfig(40, 40, 2, 1, ""))
    for prompt in (*random.text_prompts, *random.image_prompts):
        assert float(prompt.detach().std()) == pytest.approx(0.02, rel=0.15)
    assert list(method.context_vectors()) == ["first layer"]
    assert torch.equal(method.context_vectors()["first layer"], method.text_prompts[0])


def test_words_and_no_other_prompts_are_zero_shot():
    method = IVLP(BACKBONE, NAMES, config=IVLPConfig(4, 0, 1, 0))
    torch.testing.assert_close(method.class_weights(), method.zero_shot(), rtol=1e-5, atol=1e-6)
    pixels = query(BACKBONE, "images")
    assert torch.equal(method.encode_image(pixels), BACKBONE.encode_image(pixels))


@pytest.mark.parametrize("config", [IVLPConfig(2, 0, 2, 3), IVLPConfig(2, 2, 2, 0)])
def test_text_prompts_alone_train_on_stored_features(config):
    """The image tower isn't run at all: the pixels given are nothing but zeros of no meaning."""
    method = IVLP(BACKBONE, NAMES, config=config)
    assert method.wants_frozen
    assert not IVLP.wants_frozen
    task, features = make_task(BACKBONE, "images", val=False), make_task(BACKBONE, "image_features")
    nothing = TensorInputs(torch.zeros(1, len(task.train.labels), 1, 1, 1), task.train.labels)
    given = FitTask(NAMES, nothing, None, 0, features.train)
    settings = TrainingSettings(epochs=2, batch_size=8, lr=1e-2)
    report = fit_method(method, given, settings)
    assert report["accuracies"][-1] is not None
    other = IVLP(BACKBONE, NAMES, config=config)  # the same, from pixels
    fit_method(other, task, settings)
    for ours, theirs in zip(method.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_order_within_a_layer():
    pixels = query(BACKBONE, "images")
    method = IVLP(BACKBONE, NAMES, config=IVLPConfig(2, 4, 3, 3))
    before = method(pixels)
    with torch.no_grad():
        for prompt in method.image_prompts:
            prompt.copy_(prompt[[2, 0, 3, 1]])
    torch.testing.assert_close(method(pixels), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (IVLPConfig(2, 2, 4, 3), "text_depth is 4, but the text tower of 'tiny' has 3 layers: choose a depth of at"),
        (IVLPConfig(2, 2, 3, 4), "image_depth is 4, but the image tower of 'tiny' has 3 layers"),
        (IVLPConfig(5, 2, 3, 3), r"context_init 'a photo of a' has 4 tokens, fewer than the 5 context vectors"),
    ],
)
def test_settings_that_do_not_fit_the_backbone(config, said):
    with pytest.raises(ConfigError, match=said):
        IVLP(BACKBONE, NAMES, config=config)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"text_depth": 0}, "text_depth is 0, but must be at least 1"),
        ({"num_text_context": 0}, "num_text_context is 0"),
        ({"num_image_context": -1}, "num_image_context is -1, but must be at least 0"),
        ({"image_depth": -2}, "image_depth is -2"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(ConfigError, match=said):
        IVLPConfig(**settings)


def test_names_and_backbones_that_do_not_fit():
    config = IVLPConfig(2, 2, 3, 3)
    with pytest.raises(DataError, match=r"Class name '(very )+bird' \(\d+ tokens\) doesn't fit beside 2 context"):
        IVLP(BACKBONE, ["cat", "very " * 80 + "bird"], config=config)
    with pytest.raises(BackboneError, match="IVLP must reach inside the text tower"):
        IVLP(closed_text(), NAMES, config=config)


def test_settings_that_a_checkpoint_shows():
    state = {"prompt_learner.ctx": torch.zeros(2, 16), "image_encoder.VPT": torch.zeros(3, 24)}
    state |= {f"text_encoder.transformer.resblocks.{layer}.VPT_shallow": torch.zeros(2, 16) for layer in (1, 2)}
    state |= {"image_encoder.transformer.resblocks.1.VPT_shallow": torch.zeros(3, 24)}
    sizes = {"num_text_context": 2, "text_depth": 3, "num_image_context": 3, "image_depth": 2}
    assert IVLP.reference_settings(state) == sizes
    alone = {"ctx": torch.zeros(6, 16)}
    sizes = {"num_text_context": 6, "text_depth": 1, "num_image_context": 0, "image_depth": 0, "context_init": ""}
    assert IVLP.reference_settings(alone) == sizes
    assert IVLP.reference_settings({"prompts": torch.zeros(2)}) == {}
