from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from adaptkit.backbones.load import load_backbone
from adaptkit.config import from_mapping, to_mapping
from adaptkit.errors import ConfigError
from adaptkit.methods.adapter import AdaptedModel, load_adapter, save_adapter
from adaptkit.methods.lora.clip_lora import ClipLora, ClipLoraConfig
from adaptkit.methods.lora.peft import KINDS, Peft, PeftConfig
from adaptkit.storage import read_safetensors
from adaptkit.training.loop import fit_method
from adaptkit.types import TrainingSettings
from tests.backbones.families import save_transformers
from tests.methods.test_clip_lora import shaken
from tests.methods.tiny import NAMES, make_task, query, tiny_clip

peft = pytest.importorskip("peft")
WIDTHS = {"image": 24, "text": 16}
TRAINED = {
    "lora": 3 * sum(3 * 2 * 8 * width for width in WIDTHS.values()),
    "dora": 3 * sum(3 * (2 * 8 * width + width) for width in WIDTHS.values()),
    "ia3": 3 * sum(2 * width + 2 * width for width in WIDTHS.values()),  # keys, values, the MLP's inside
    "ln-tuning": 2 * ((3 * 2 + 2) * 24 + (3 * 2 + 1) * 16),
    "bitfit": 3 * sum((4 + 2 + 3) * width for width in WIDTHS.values()) + 2 * 24 + 16,
}
STEPS = TrainingSettings(epochs=12, batch_size=16, optimiser="adamw", lr=2e-2, schedule="constant", warmup_epochs=0)


@pytest.fixture(scope="module")
def backbone():
    return tiny_clip()


def make(backbone, kind="lora", towers="both", **settings):
    return Peft(backbone, NAMES, config=PeftConfig(kind, towers, settings))


def weights_of(backbone):
    return {key: value.clone() for key, value in backbone.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_learns_and_leaves_the_backbone_alone(backbone, kind):
    before = weights_of(backbone)
    method = make(backbone, kind)
    pixels = query(backbone, "images")
    with torch.no_grad():
        frozen = method.cosine_logits(backbone.encode_image(pixels), method.zero_shot())
        torch.testing.assert_close(method(pixels), frozen, rtol=1e-4, atol=1e-4)  # it begins as zero-shot
    assert method.num_trained() == TRAINED[kind]
    report = fit_method(method, make_task(backbone, "images"), STEPS)
    assert report["losses"][-1] < 0.9 * report["losses"][0]
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert not {id(p) for p in method.parameters()} & {id(p) for p in backbone.parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("towers", ["image", "text"])
def test_one_tower(backbone, kind, towers):
    method = make(backbone, kind, towers)
    assert {name.split(".")[0] for name, _ in method.named_parameters()} == {towers}
    assert 0 < method.num_trained() < TRAINED[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_give_the_same_features(backbone, kind):
    method = shaken(make(backbone, kind))
    pixels = query(backbone, "images")
    towers = method.merged_towers()
    rows = backbone.text_rows(backbone.tokenize([f"a photo of a {name.replace('_', ' ')}." for name in NAMES]))
    with torch.no_grad():
        images = torch.func.functional_call(backbone.image_tower, towers["image"], (pixels,), strict=True)
        texts = torch.func.functional_call(backbone.text_tower, towers["text"], (rows,), strict=True)
        torch.testing.assert_close(images, method.encode_image(pixels), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(F.normalize(texts, dim=-1), method.class_weights(), rtol=1e-4, atol=1e-5)


def test_lora_is_that_of_clip_lora(backbone):
    """Peft's own settings say the same as CLIP-LoRA's."""
    one = shaken(ClipLora(backbone, NAMES, config=ClipLoraConfig(rank=3, logit_scale=20.0)))
    two = make(backbone, r=3, lora_alpha=1, use_rslora=True)
    two.load_adapter_state(one.adapter_state())
    with torch.no_grad():
        torch.testing.assert_close(one(query(backbone, "images")), two(query(backbone, "images")))


def test_biases_beside_lora_are_its_own(backbone):
    method = make(backbone, bias="all")
    names = [name for name, _ in method.named_parameters()]
    assert sum(name.endswith("bias") for name in names) == 3 * 2 * 8 + 3
    fit_method(method, make_task(backbone, "images"), STEPS)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_bitfit_of_some_layers(backbone):
    method = make(backbone, "bitfit", target_modules=["q_proj"])
    assert method.num_trained() == 3 * 24 + 3 * 16


def test_settings_from_the_command_line():
    settings = {"r": "4", "lora_dropout": "0.1", "use_rslora": "true"}
    config = from_mapping(PeftConfig, {"kind": "lora", "settings": settings})
    assert config.settings == {"r": 4, "lora_dropout": 0.1, "use_rslora": True}
    assert from_mapping(PeftConfig, to_mapping(config)) == config


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("lora", {"rank": 4}, "'rank', which lora doesn't take here; known: r, lora_alpha"),
        ("ia3", {"r": 4}, "'r', which ia3 doesn't take"),
        ("lora", {"r": 0}, "at least 1"),
        ("lora", {"r": "two"}, "whole number"),
        ("lora", {"lora_dropout": 1.0}, "below 1"),
        ("lora", {"init_lora_weights": "pissa"}, "would change the frozen weights"),
    ],
)
def test_settings_that_cannot_be(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        PeftConfig(kind, "both", settings)


def test_layers_and_ranks_that_are_not_there(backbone):
    with pytest.raises(ConfigError, match="the image tower"):
        make(backbone, target_modules=["no_such_layer"])
    with pytest.raises(ConfigError, match="the image tower"):
        make(backbone, "ln-tuning", target_modules=["q_proj_x"])
    with pytest.raises(ConfigError, match="with a bias is named 'nothing'"):
        make(backbone, "bitfit", target_modules="nothing")
    with pytest.raises(ConfigError, match="rank 20, but it has width 16"):
        make(backbone, r=20)


# --- the same adapter in plain peft -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A small transformers CLIP: our backbone, and transformers' own model as the folder has it."""
    folder = tmp_path_factory.mktemp("clip")
    _, tokenizer = save_transformers("clip", folder)
    return load_backbone(f"transformers:{folder}"), folder, tokenizer


CLASSES = ("cat", "red panda", "dog in the snow")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (ClipLora, ClipLoraConfig(targets="qkvo", position="half-up")),
        (ClipLora, ClipLoraConfig(towers="text")),
        (Peft, PeftConfig("lora", "both", {"r": 3, "rank_pattern": {"q_proj": 2}})),
        (Peft, PeftConfig("dora")),
        (Peft, PeftConfig("ia3")),
        (Peft, PeftConfig("ln-tuning")),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_it_loads_in_plain_peft(both, tmp_path, kind, settings):
    from transformers import CLIPModel

    backbone, source, tokenizer = both
    method = shaken(kind(backbone, CLASSES, config=settings))
    save_adapter(tmp_path / "adapter", AdaptedModel(method))
    model = peft.PeftModel.from_pretrained(CLIPModel.from_pretrained(source), tmp_path / "adapter" / "peft").eval()
    size = backbone.spec.preprocessing.image_size
    pixels = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    texts = [f"a photo of a {name}." for name in CLASSES]
    with torch.no_grad():
        length = backbone.spec.context_length
        tokens = tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt")
        out = model(**tokens, pixel_values=pixels)
        scale, _ = method.scale_and_bias()
        torch.testing.assert_close(
            scale * out.image_embeds @ out.text_embeds.T, method(pixels), rtol=1e-4, atol=1e-5 * scale
        )
        again = load_adapter(tmp_path / "adapter", backbone)
        assert torch.equal(again(pixels), method(pixels))
    written = read_safetensors(tmp_path / "adapter" / "peft" / "adapter_model.safetensors")
    assert sum(value.numel() for value in written.values()) == method.num_trained()
    config = json.loads((tmp_path / "adapter" / "peft" / "adapter_config.json").read_text())
    assert config["inference_mode"]


def test_bitfit_has_no_peft_folder(backbone, tmp_path):
    save_adapter(tmp_path / "adapter", AdaptedModel(make(backbone, "bitfit")))
    assert not (tmp_path / "adapter" / "peft").exists()
