"""MaPLe against a plain computation of its sheet, its initial draws, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adaptkit.errors import BackboneError, ConfigError
from adaptkit.methods.prompts.maple import MaPLe, MaPLeConfig
from tests.methods.tiny import NAMES, closed_text, query, tiny_clip

BACKBONE = tiny_clip()


def plain_logits(method, pixels, words):
    """The sheet's forward pass: 77 tokens, prompts overwritten before each block, nothing shared or cut."""
    text, image, m = BACKBONE.text_tower, BACKBONE.image_tower, method.config.num_context
    tokens = BACKBONE.tokenize([f"{words} {name.replace('_', ' ')}." for name in NAMES])
    x = text.token_embedding(tokens.ids)  # [classes, 77, width]
    x = (
        torch.cat([x[:, :1], method.contexts[0].expand(len(x), -1, -1), x[:, 1 + m :]], dim=1)
        + text.positional_embedding
    )
    for layer, block in enumerate(text.blocks):
        if 0 < layer < method.config.depth:
            x = torch.cat([x[:, :1], method.contexts[layer].expand(len(x), -1, -1), x[:, 1 + m :]], dim=1)
        x = block(x, mask=torch.ones(77, 77).tril().bool())
    weights = F.normalize(text.projection(text.ln_final(x))[range(len(x)), tokens.ids.argmax(dim=1)], dim=-1)

    def prompts(layer):
        coupling = method.couplings[layer]
        return (method.contexts[layer] @ coupling.weight.T + coupling.bias).expand(len(pixels), -1, -1)

    y = image.ln_pre(torch.cat([image.embed(pixels), prompts(0)], dim=1))
    for layer, block in enumerate(image.blocks):
        if 0 < layer < method.config.depth:
            y = torch.cat([y[:, :-m], prompts(layer)], dim=1)
        y = block(y)
    features = F.normalize(image.projection(image.ln_post(y[:, 0])), dim=-1)
    return 20.0 * features @ weights.T


@pytest.mark.parametrize(
    ("count", "depth", "words"), [(2, 3, "a photo of a"), (1, 1, "a photo"), (4, 2, "a photo of a")]
)
def test_equals_the_plain_way(count, depth, words):
    method = MaPLe(BACKBONE, NAMES, config=MaPLeConfig(count, depth, words), seed=3)
    pixels = query(BACKBONE, "images")
    ours, wanted = method(pixels), plain_logits(method, pixels, words)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    labels = torch.arange(9) % 4
    parameters = list(method.parameters())
    got = torch.autograd.grad(F.cross_entropy(ours, labels), parameters)
    for ours_, theirs in zip(got, torch.autograd.grad(F.cross_entropy(wanted, labels), parameters), strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-3, atol=1e-5)


def test_start():
    method = MaPLe(BACKBONE, NAMES, config=MaPLeConfig(depth=3))
    ids = BACKBONE.word_pieces("a photo")
    assert torch.equal(method.contexts[0], BACKBONE.text.token_embedding.weight[ids])
    assert not torch.equal(method.couplings[0].weight, method.couplings[1].weight)
    assert torch.equal(method.couplings[1].weight, method.couplings[2].weight)  # copies of one draw
    assert method.couplings[1].weight is not method.couplings[2].weight
    assert float(method.couplings[0].weight.detach().abs().max()) <= 16**-0.5
    random = MaPLe(BACKBONE, NAMES, config=MaPLeConfig(6, 1, ""))
    assert random.contexts[0].shape == (6, 16)
    assert float(random.contexts[0].detach().std()) == pytest.approx(0.02, rel=0.3)
    assert method.num_trained() == 3 * 2 * 16 + 3 * (16 * 24 + 24)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MaPLeConfig(depth=4), "depth is 4, but the text tower of 'tiny' has 3 layers: choose a depth of at most 3"),
        (MaPLeConfig(5, 2), r"context_init 'a photo of a' has 4 tokens, fewer than the 5 context vectors"),
    ],
)
def test_settings_that_do_not_fit_the_backbone(config, said):
    with pytest.raises(ConfigError, match=said):
        MaPLe(BACKBONE, NAMES, config=config)


def test_bad_settings_and_backbones():
    with pytest.raises(ConfigError, match="depth is 0"):
        MaPLeConfig(depth=0)
    with pytest.raises(ConfigError, match="num_context is 0"):
        MaPLeConfig(num_context=0)
    with pytest.raises(BackboneError, match="MaPLe must reach inside the text tower"):
        MaPLe(closed_text(), NAMES)
