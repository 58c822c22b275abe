"""Every family: a tiny model saved in its hub layout, loaded by path, and compared with the library it comes from."""

from __future__ import annotations

import json

import pytest
import torch

from adaptkit.backbones import load_backbone
from adaptkit.errors import BackboneError
from tests.backbones.families import (
    OPEN_CLIP,
    OPEN_CLIP_OPAQUE,
    TEXTS,
    TRANSFORMERS,
    save_open_clip,
    save_transformers,
    save_vision_only,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def pixels(size: int):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_equal(ours, theirs):
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, float(theirs.abs().max())))


@torch.no_grad()
@pytest.mark.parametrize("kind", sorted(OPEN_CLIP))
def test_open_clip(kind, tmp_path):
    import open_clip

    model = save_open_clip(kind, tmp_path)
    backbone = load_backbone(f"local-dir:{tmp_path}")
    size = backbone.spec.preprocessing.image_size
    coca = {"normalize": False} if kind.startswith("coca") else {}
    assert_equal(backbone.encode_image(pixels(size)), model.encode_image(pixels(size), **coca))
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(TEXTS)
    tokens = backbone.tokenize(TEXTS)
    assert torch.equal(tokens.ids, ids)
    assert_equal(backbone.encode_text(tokens), model.encode_text(ids, **coca))
    assert float(backbone.logit_scale) == pytest.approx(float(model.logit_scale.exp()))
    assert float(backbone.logit_bias) == pytest.approx(float(model.logit_bias or 0.0))
    assert OPEN_CLIP_OPAQUE.get(kind, "") in backbone.spec.opaque_image
    assert (backbone.image_tower is None) == (kind in OPEN_CLIP_OPAQUE)
    assert backbone.text_tower is not None
    assert backbone.spec.preprocessing.mean == (0.4, 0.5, 0.6)
    assert backbone.spec.preprocessing.resize == "squash"
    assert backbone.spec.preprocessing.interpolation == "bilinear"


@torch.no_grad()
def test_coca_text_that_fills_the_context_or_holds_the_padding_id(tmp_path):
    """CoCa's mask takes id 0 ("!" within a word) for padding, and differs where no padding is left."""
    import open_clip

    model = save_open_clip("coca", tmp_path)
    backbone = load_backbone(f"local-dir:{tmp_path}")
    texts = ["cat " * 18, "a !$ b", "dog", "cat " * 17]
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(texts)
    assert ids[0, -1] == 49407
    assert 0 in ids[1, : int(ids[1].argmax())]
    assert_equal(backbone.text_features(texts), model.encode_text(ids, normalize=False))


@torch.no_grad()
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers(kind, tmp_path):
    model, tokenizer = save_transformers(kind, tmp_path)
    backbone = load_backbone(f"transformers:{tmp_path}")
    image = pixels(backbone.spec.preprocessing.image_size)
    inputs = {"pixel_values": image}
    if kind == "siglip2":  # patches in reading order, each flattened as (height, width, channel)
        patches = image.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(3, 16, -1)
        inputs = {"pixel_values": patches, "pixel_attention_mask": torch.ones(3, 16, dtype=torch.int64)}
        inputs["spatial_shapes"] = torch.full((3, 2), 4)
    assert_equal(backbone.encode_image(image), model.get_image_features(**inputs).pooler_output)
    bert = kind in ("chinese_clip", "altclip", "align")
    length = backbone.spec.context_length if not bert else 20
    encoded = tokenizer(TEXTS, padding="max_length", max_length=length, return_tensors="pt")
    mask = {"attention_mask": encoded.attention_mask} if bert else {}
    theirs = model.get_text_features(input_ids=encoded.input_ids, **mask).pooler_output
    if not bert:
        assert torch.equal(backbone.tokenize(TEXTS).ids, encoded.input_ids)
    assert_equal(backbone.text_features(TEXTS), theirs)
    assert (backbone.text_tower is None) == bert
    assert ("BERT" in backbone.spec.opaque_text) == bert
    assert (backbone.image_tower is None) == (kind == "align")
    logits = model(**inputs, input_ids=encoded.input_ids, **mask).logits_per_image
    normal = torch.nn.functional.normalize
    ours = normal(backbone.encode_image(image), dim=-1) @ normal(backbone.text_features(TEXTS), dim=-1).T
    assert_equal(backbone.logit_scale * ours + backbone.logit_bias, logits)


def test_pooled_position_of_clip_with_the_old_end_token(tmp_path):
    """Old configs say the end token is 2; the model then pools the highest id, and so do we."""
    save_transformers("clip-end-2", tmp_path)
    tokens = load_backbone(f"transformers:{tmp_path}").tokenize(["a cat", "a photo of a dog"])
    assert tokens.ends.tolist() == [3, 6]
    assert tokens.ids.gather(1, tokens.ends[:, None]).unique().tolist() == [int(tokens.ids.max())]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("clip", {"image_size": 32, "resize": "shortest", "resize_size": 40, "interpolation": "bicubic"}),
        ("siglip", {"image_size": 32, "resize": "squash", "resize_size": None, "mean": (0.4, 0.5, 0.6)}),
        ("siglip2", {"image_size": 32, "resize": "squash", "interpolation": "bilinear", "mean": (0.5, 0.5, 0.5)}),
        ("align", {"image_size": 64, "resize_size": 80, "interpolation": "bilinear"}),
    ],
)
def test_preprocessing_follows_the_processor(kind, expected, tmp_path):
    save_transformers(kind, tmp_path)
    found = load_backbone(f"transformers:{tmp_path}").spec.preprocessing.to_dict()
    assert {key: found[key] for key in expected} == expected
    if kind == "align":  # pixel / 127.5 - 1
        assert found["mean"] == pytest.approx((0.5, 0.5, 0.5))
        assert found["std"] == pytest.approx((0.5, 0.5, 0.5))


def test_a_processor_that_cannot_be_followed(tmp_path):
    save_transformers("siglip", tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "resample": 1}))
    with pytest.raises(BackboneError, match="can't be followed"):
        load_backbone(f"transformers:{tmp_path}")


def test_weights_that_are_missing(tmp_path):
    from safetensors.torch import load_file, save_file

    save_transformers("clip", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match="lack 1 weights"):
        load_backbone(f"transformers:{tmp_path}")


def test_pickled_weights_are_refused(tmp_path):
    from safetensors.torch import load_file

    save_transformers("clip", tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"model\.safetensors"):
        load_backbone(f"transformers:{tmp_path}")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dinov2", "vit", "convnext"])
def test_vision_only_of_transformers(kind, tmp_path):
    model = save_vision_only(kind, tmp_path)
    backbone = load_backbone(f"transformers:{tmp_path}")
    image = pixels(backbone.spec.preprocessing.image_size)
    out = model(image)
    theirs = out.pooler_output if kind != "vit" else out.last_hidden_state[:, 0]
    assert_equal(backbone.encode_image(image), theirs)
    assert backbone.spec.embed_dim == 32
    assert not backbone.has_text
    assert backbone.image_tower is None
    for call in (
        lambda: backbone.tokenize(["a"]),
        lambda: backbone.text_features(["a"]),
        lambda: backbone.word_pieces("a"),
    ):
        with pytest.raises(BackboneError, match="no text encoder"):
            call()
    with pytest.raises(BackboneError, match="MyMethod must reach inside the image tower"):
        backbone.require_open("MyMethod", image=True)


@torch.no_grad()
def test_timm_folder(tmp_path):
    import timm
    from safetensors.torch import save_file

    from tests.backbones.families import register_tiny_timm_models, shake

    register_tiny_timm_models()
    model = shake(timm.create_model("resnet10t", num_classes=5))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    data = {
        "input_size": [3, 64, 64],
        "crop_pct": 0.8,
        "interpolation": "bilinear",
        "mean": [0.4] * 3,
        "std": [0.3] * 3,
    }
    config = {
        "architecture": "resnet10t",
        "num_classes": 5,
        "pretrained_cfg": {**data, "num_classes": 5, "classifier": "fc"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    backbone = load_backbone(f"timm:{tmp_path}")
    image = pixels(64)
    assert_equal(backbone.encode_image(image), model.forward_head(model.forward_features(image), pre_logits=True))
    assert backbone.spec.preprocessing.to_dict() == {
        "image_size": 64,
        "mean": (0.4, 0.4, 0.4),
        "std": (0.3, 0.3, 0.3),
        "interpolation": "bilinear",
        "resize": "shortest",
        "resize_size": 80,
    }
