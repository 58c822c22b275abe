"""MMRL++ against a plain computation of its sheet, its start, what beta does, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adaptkit.errors import AdapterError, ConfigError
from adaptkit.methods.prompts.mmrlpp import MMRLpp, MMRLppConfig
from adaptkit.methods.reference import read_reference_checkpoint
from tests.methods.test_mmrl import (
    BACKBONE,
    TEMPLATE,
    assert_same_results,
    plain_images,
    plain_texts,
    towers_that_pool,
    uneven_clip,
)
from tests.methods.test_reference import dassl_file
from tests.methods.tiny import NAMES, query

SMALL = MMRLppConfig(num_tokens=3, width=12, projection_rank=5, residual_rank=2)


def make(config=SMALL, seed=3, backbone=BACKBONE):
    return MMRLpp(backbone, NAMES, templates=(TEMPLATE,), config=config, seed=seed)


def shake(method):
    with torch.no_grad():
        numbers = torch.Generator().manual_seed(1)
        for value in method.parameters():
            value += 0.3 * torch.randn(value.shape, generator=numbers)
    return method


def plain_tokens(method, maps):
    """F(R) = R (S + A B)ᵀ + b."""
    parts = zip(maps.left, maps.right, maps.bias, strict=True)
    return [method.tokens @ (maps.weight + left @ right).T + bias for left, right, bias in parts]


@pytest.mark.parametrize("beta", [0.9, 1.0, 0.3])
@pytest.mark.parametrize("first", [0, 1])
def test_equals_the_plain_way(beta, first):
    method = shake(make(MMRLppConfig(3, 12, first, beta=beta, projection_rank=5, residual_rank=2)))
    both = plain_tokens(method, method.text_maps), plain_tokens(method, method.image_maps)
    frozen = BACKBONE.image_tower.projection.weight.T  # [width, dim]

    def project(pooled):
        return pooled @ (frozen + method.projection_left @ method.projection_right)

    assert_same_results(method, both, project, beta)


def test_start():
    method = make(MMRLppConfig(3, 12, projection_rank=30, residual_rank=9))
    for maps in (method.text_maps, method.image_maps):
        assert len(maps) == 3
        assert all(torch.equal(bias, maps.bias[0]) for bias in maps.bias)
        assert maps.bias[0] is not maps.bias[1]
        assert not any(bool(right.any()) for right in maps.right)
        assert not torch.equal(maps.left[0], maps.left[1])  # each its own draw
        assert 0.8 / 3 < float(maps.left[0].detach().abs().max()) <= 1 / 3
        assert 0.8 * 12**-0.5 < float(maps.weight.detach().abs().max()) <= 12**-0.5
    assert 0.8 * 30**-0.5 < float(method.projection_left.detach().abs().max()) <= 30**-0.5
    assert not bool(method.projection_right.any())
    residuals = 3 * (16 * 9 + 9 * 12 + 16) + 3 * (24 * 9 + 9 * 12 + 24)
    assert method.num_trained() == 3 * 12 + 16 * 12 + 24 * 12 + residuals + 24 * 30 + 30 * 16


@torch.no_grad()
def test_with_zero_residuals_and_beta_one_it_is_the_shared_map_and_clips_projection():
    method, pixels = make(MMRLppConfig(3, 12, beta=1.0)), query(BACKBONE, "images")
    for maps in (method.text_maps, method.image_maps):
        first, *others = maps(method.tokens)
        torch.testing.assert_close(first, method.tokens @ maps.weight.T + maps.bias[0])
        assert all(torch.equal(first, other) for other in others)
    _, pooled = plain_images(method, pixels, method.image_maps(method.tokens))
    _, feature = method.encode_both(pixels)
    torch.testing.assert_close(feature, BACKBONE.image_tower.projection(pooled), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_beta_changes():
    """Nothing where the tokens are inserted; the blend, to 1e-6, where they are replaced."""
    method, pixels = shake(make()), query(BACKBONE, "images")
    image, seen = BACKBONE.image_tower, {}

    def look(beta):
        method.beta = beta
        entered = []
        hooks = [
            block.register_forward_pre_hook(lambda _m, args: entered.append(args[0][:, 1:4].clone()))
            for block in image.blocks[1:3]
        ]
        left = image.blocks[1].register_forward_hook(lambda _m, _a, out: entered.append(out[:, 1:4].clone()))
        method.encode_both(pixels)
        for hook in (*hooks, left):
            hook.remove()
        return entered

    seen = {beta: look(beta) for beta in (0.9, 0.4)}
    tokens = method.image_maps(method.tokens)
    assert torch.equal(seen[0.9][0], seen[0.4][0])
    for beta, (first, left, second) in seen.items():
        torch.testing.assert_close(first, tokens[0].expand_as(first), rtol=0, atol=1e-6)
        torch.testing.assert_close(second, beta * tokens[1] + (1 - beta) * left, rtol=0, atol=1e-6)


@torch.no_grad()
def test_another_beta_for_a_test():
    """The class weights follow it, although it is no parameter; the settings keep the trained one."""
    method, pixels = shake(make()), query(BACKBONE, "images")
    trained = method(pixels)
    method.beta = 0.3
    other = method(pixels)
    assert not torch.equal(trained, other)
    same = make(MMRLppConfig(3, 12, beta=0.3, projection_rank=5, residual_rank=2))
    same.load_adapter_state(method.adapter_state())
    assert torch.equal(other, same(pixels))
    torch.testing.assert_close(
        method.class_weights(), plain_texts(method, plain_tokens(method, method.text_maps), 0.3), rtol=1e-5, atol=1e-5
    )
    method.beta = method.config.beta
    assert torch.equal(method(pixels), trained)
    with pytest.raises(ConfigError, match=r"beta is 1.2, but must be between 0 and 1"):
        method.beta = 1.2
    assert method.beta == 0.9


def test_projections_with_a_bias_and_without_a_matrix():
    """The frozen projection stays as it is, whatever it is; the low-rank part comes on top."""
    pixels = query(BACKBONE, "images")
    checked = 0
    for kind in ({"projection_bias": True}, {}):
        backbone = uneven_clip(towers_that_pool(**kind))
        method = make(backbone=backbone)
        with torch.no_grad():
            method.projection_right += 0.1
            rows = torch.randn(5, 24)
            added = rows @ method.projection_left @ method.projection_right
            torch.testing.assert_close(method.project(rows) - added, backbone.image_tower.projection(rows))
            assert method(pixels).isfinite().all()
        checked += 1
    assert checked == 2


@pytest.mark.parametrize("field", ["projection_rank", "residual_rank"])
def test_bad_settings(field):
    with pytest.raises(ConfigError, match=f"{field} is 0"):
        MMRLppConfig(**{field: 0})
    with pytest.raises(ConfigError, match=r"beta is -0\.1"):
        MMRLppConfig(beta=-0.1)
    with pytest.raises(ConfigError, match="alpha is 2"):
        MMRLppConfig(alpha=2)


def official_state(layers=3):
    learner, state = "representation_learner", {}
    state[f"{learner}.compound_rep_tokens"] = torch.randn(3, 12)
    for tower, outputs in (("t", 16), ("v", 24)):
        state[f"{learner}.srra_r2{tower}proj.weight"] = torch.randn(outputs, 12)
        for layer in range(layers):
            name = f"{learner}.srra_r2{tower}proj.srra.{layer}"
            state |= {f"{name}.A": torch.randn(outputs, 2), f"{name}.B": torch.randn(2, 12)}
            state[f"{name}.bias"] = torch.randn(outputs)
    clip = {"image_encoder.class_embedding": torch.randn(24), "logit_scale": torch.tensor(4.6)}
    return state | {"image_encoder.A": torch.randn(24, 5), "image_encoder.B": torch.randn(5, 16)} | clip


def test_reference_checkpoint(tmp_path):
    state = official_state()
    read = read_reference_checkpoint(dassl_file(tmp_path / "model.pth.tar-10", state))
    settings = MMRLpp.reference_settings(read)
    assert settings == {"num_tokens": 3, "width": 12, "residual_rank": 2, "projection_rank": 5}
    method = make(MMRLppConfig(**settings))
    method.load_reference_state(read)
    place = "representation_learner.srra_r2vproj"
    assert torch.equal(method.image_maps.weight, state[f"{place}.weight"])
    assert torch.equal(method.image_maps.left[1], state[f"{place}.srra.1.A"])
    assert torch.equal(method.image_maps.right[2], state[f"{place}.srra.2.B"])
    assert torch.equal(method.text_maps.bias[0], state["representation_learner.srra_r2tproj.srra.0.bias"])
    assert torch.equal(method.projection_left, state["image_encoder.A"])
    assert torch.equal(method.projection_right, state["image_encoder.B"])
    with pytest.raises(AdapterError, match="tokens for 4 layers of the text tower, these settings for 3"):
        make().load_reference_state(official_state(4))


def test_class_weights_are_unit_vectors():
    weights = shake(make()).class_weights()
    torch.testing.assert_close(F.normalize(weights, dim=-1), weights)
    assert weights.shape == (len(NAMES), 16)
