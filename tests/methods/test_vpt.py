"""VPT against a plain computation of its sheet, what its prompts reach, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adaptkit.errors import BackboneError, ConfigError
from adaptkit.methods.prompts.vpt import VPT, VPTConfig
from adaptkit.training.loop import fit_method
from adaptkit.types import TrainingSettings
from tests.methods.deep import assert_same_gradients, plain_image, siglip_like
from tests.methods.tiny import NAMES, NOVEL, closed_text, make_task, query, tiny_clip

BACKBONE = tiny_clip()
BACKBONES = {"clip": BACKBONE, "siglip": siglip_like()}


def plain_logits(method, pixels, names=NAMES):
    backbone = method.backbone
    texts = [f"a photo of a {name.replace('_', ' ')}." for name in names]
    weights = F.normalize(backbone.encode_text(backbone.tokenize(texts)), dim=-1)
    features = plain_image(backbone, pixels, list(method.prompts))
    return backbone.logit_scale * features @ weights.T + backbone.logit_bias


@pytest.mark.parametrize(("count", "depth"), [(8, 3), (1, 2), (3, 1)])
@pytest.mark.parametrize("kind", sorted(BACKBONES))
def test_equals_the_plain_way(kind, count, depth):
    method = VPT(BACKBONES[kind], NAMES, config=VPTConfig(count, depth), seed=3)
    pixels, labels = query(BACKBONE, "images"), torch.arange(9) % 4
    wanted = plain_logits(method, pixels)
    torch.testing.assert_close(method(pixels), wanted, rtol=1e-5, atol=1e-5)
    loss = method.losses(pixels, labels)["cross_entropy"]
    assert_same_gradients(loss, F.cross_entropy(wanted, labels), method.parameters())
    method.set_classes(NOVEL)
    torch.testing.assert_close(method(pixels), plain_logits(method, pixels, NOVEL), rtol=1e-5, atol=1e-5)


def test_the_datasets_templates_change_nothing():
    pixels, config = query(BACKBONE, "images"), VPTConfig(2, 3)
    own = VPT(BACKBONE, NAMES, config=config)
    other = VPT(BACKBONE, NAMES, templates=("{} texture.", "a blurry {}."), config=config)
    assert torch.equal(own(pixels), other(pixels))
    assert other.templates == ("a photo of a {}.",)


def test_start():
    method = VPT(BACKBONE, NAMES, config=VPTConfig(50, 3))
    assert [tuple(prompt.shape) for prompt in method.prompts] == [(50, 24)] * 3
    assert all(float(prompt.detach().std()) == pytest.approx(0.02, rel=0.15) for prompt in method.prompts)
    assert method.num_trained() == 3 * 50 * 24
    assert method.context_vectors() == {}  # its prompts don't stand among token embeddings


def test_the_order_within_a_layer_and_shallow_prompts():
    pixels = query(BACKBONE, "images")
    method = VPT(BACKBONE, NAMES, config=VPTConfig(4, 3))
    before = method.encode_image(pixels)
    with torch.no_grad():
        for prompt in method.prompts:
            prompt.copy_(prompt[[2, 0, 3, 1]])
    torch.testing.assert_close(method.encode_image(pixels), before, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        method.prompts[0].zero_()
    assert not torch.allclose(method.encode_image(pixels), before, atol=1e-4)  # zero rows are attended to all the same


def test_the_text_side_is_computed_once_and_gets_no_gradient():
    texts = []

    class Counting(type(BACKBONE)):
        def encode_text(self, tokens):
            texts.append(len(tokens.ids))
            return super().encode_text(tokens)

    backbone = tiny_clip()
    backbone.__class__ = Counting
    method = VPT(backbone, NAMES, config=VPTConfig(2, 3))
    settings = TrainingSettings(epochs=3, batch_size=8, lr=1e-2, precision="bf16")
    fit_method(method, make_task(backbone, "images"), settings)
    assert texts == [len(NAMES)]
    weights = method.class_weights()
    assert not weights.requires_grad
    exact = VPT(BACKBONE, NAMES, config=VPTConfig(2, 3)).class_weights()
    torch.testing.assert_close(weights, exact, rtol=0, atol=0)  # not rounded by the training's autocast


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (VPTConfig(), "depth is 12, but the image tower of 'tiny' has 3 layers: choose a depth of at most 3"),
        (VPTConfig(depth=4), "choose a depth of at most 3"),
    ],
)
def test_a_depth_beyond_the_tower(config, said):
    with pytest.raises(ConfigError, match=said):
        VPT(BACKBONE, NAMES, config=config)


def test_bad_settings_and_names():
    with pytest.raises(ConfigError, match="depth is 0"):
        VPTConfig(depth=0)
    with pytest.raises(ConfigError, match="num_context is 0"):
        VPTConfig(num_context=0)
    with pytest.raises(BackboneError, match=r"'a photo of a (very )+bird.' is too long"):
        VPT(BACKBONE, ["cat", "very " * 80 + "bird"], config=VPTConfig(2, 3)).class_weights()


def test_a_closed_text_tower_is_no_hindrance():
    method = VPT(closed_text(), NAMES, config=VPTConfig(2, 3))
    assert torch.isfinite(method(query(BACKBONE, "images"))).all()


def test_settings_that_a_checkpoint_shows():
    state = {"image_encoder.VPT": torch.zeros(5, 24), "image_encoder.positional_embedding": torch.zeros(5, 24)}
    assert VPT.reference_settings(state) == {"num_context": 5, "depth": 1}
    state["image_encoder.transformer.resblocks.2.VPT_shallow"] = torch.zeros(5, 24)
    assert VPT.reference_settings(state) == {"num_context": 5, "depth": 3}
    assert VPT.reference_settings({"ctx": torch.zeros(4, 16)}) == {}
