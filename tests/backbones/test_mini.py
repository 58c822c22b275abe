"""The embedded backbone: its size, its layout in open_clip, and that it knows something."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from adaptkit.backbones import load_backbone, mini
from adaptkit.backbones.mini import formula
from adaptkit.data.sources import load_dataset
from adaptkit.data.transforms import to_pixels
from adaptkit.errors import StorageError
from adaptkit.methods.base import zero_shot_weights

TEXTS = ["a photo of the digit three.", "red striped circle", "a vorlim, which has two horns."]


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("mini")


def test_the_weights_are_small():
    assert mini.WEIGHTS.stat().st_size <= 12 * 2**20
    blocks = [v.numel() for k, v in mini.mini_state_dict().items() if "resblocks" in k]
    assert 1_000_000 <= sum(blocks) <= 4_000_000


def test_missing_weights_are_said(monkeypatch, tmp_path):
    monkeypatch.setattr(mini, "WEIGHTS", tmp_path / "absent.safetensors")
    with pytest.raises(StorageError, match="install adaptkit again"):
        mini.mini_state_dict()


def test_untrained_tokens_come_from_the_formula():
    table = formula.token_rows()
    assert table.shape == (49408, 128)
    drawn = np.random.RandomState(20260101).standard_normal(3).astype(np.float32) * np.float32(0.02)
    np.testing.assert_array_equal(table[0, :3].numpy(), drawn)
    table[0] = 0  # a copy: the next caller gets the numbers of the formula
    assert float(formula.token_rows([0]).abs().sum()) > 0


def test_plain_open_clip_loads_it_with_equal_features(backbone, tmp_path):
    folder = mini.write_open_clip_folder(tmp_path / "mini")
    model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    with torch.no_grad():
        torch.testing.assert_close(backbone.encode_image(pixels), model.encode_image(pixels), atol=1e-5, rtol=1e-5)
        tokens = backbone.tokenize(TEXTS)
        torch.testing.assert_close(tokens.ids, ids)
        torch.testing.assert_close(backbone.encode_text(tokens), model.encode_text(ids), atol=1e-5, rtol=1e-5)
        assert float(model.logit_scale.exp()) == pytest.approx(float(backbone.logit_scale))
    again = load_backbone(f"local-dir:{folder}")
    torch.testing.assert_close(again.encode_image(pixels), backbone.encode_image(pixels), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("name", "times_chance"), [("digits", 3), ("shapes", 3)])
def test_zero_shot_is_well_above_chance(backbone, name, times_chance):
    data = load_dataset(name)
    images = data.test.images(range(len(data.test)))
    pixels = torch.stack([to_pixels(image, backbone.spec.preprocessing) for image in images])
    with torch.no_grad():
        weights = zero_shot_weights(backbone, data.class_names, data.templates)
        right = (F.normalize(backbone.encode_image(pixels), dim=-1) @ weights.T).argmax(1).numpy() == data.test.labels
    assert right.mean() > times_chance / len(data.class_names)
