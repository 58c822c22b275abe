"""The golden tiny CLIP through our towers: features and logits of the zero-shot case."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.golden.tiny_clip import build_tiny_clip, tiny_images

CASE = Path(__file__).parent.parent / "golden" / "zero-shot.json"


@pytest.fixture(scope="module")
def case():
    return json.loads(CASE.read_text())


@pytest.fixture(scope="module")
def backbone(case):
    return build_tiny_clip(case["clip"], case["seed"])


def assert_golden(ours, expected):
    expected = torch.tensor(expected)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_tokens_are_the_reference_ones(case, backbone):
    tokens = backbone.tokenize(case["prompts"])
    for row, (ids, end) in enumerate(zip(case["tokens"]["ids"], case["tokens"]["eot_index"], strict=True)):
        assert tokens.ids[row, : len(ids)].tolist() == ids
        assert int(tokens.ends[row]) == end
    lengths = [len(backbone.word_pieces(name)) for name in case["classnames"]]
    assert lengths == case["tokens"]["class_name_tokens"]


@torch.no_grad()
def test_features_and_logits(case, backbone):
    images = F.normalize(backbone.encode_image(tiny_images(case["clip"], case["seed"], case["B"])), dim=-1)
    assert_golden(images, case["expected"]["image_features"])
    for kind, prompts in (("base", case["prompts"]), ("novel", case["novel_prompts"])):
        texts = F.normalize(backbone.text_features(prompts), dim=-1)
        assert_golden(texts, case["expected"][f"text_features_{kind}"])
        assert_golden(backbone.logit_scale * images @ texts.T, case["expected"][f"logits_{kind}"])
