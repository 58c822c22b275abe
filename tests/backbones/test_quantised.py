"""Quantised towers: on the CPU, under LoRA, with the memory they take."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adaptkit.backbones import quantised
from adaptkit.backbones.load import load_backbone
from adaptkit.backbones.quantised import quantise, split_kind, weight_bytes
from adaptkit.errors import AdapterError, BackboneError, ConfigError, UnsupportedError
from adaptkit.methods import methods
from adaptkit.methods.adapter import AdaptedModel, load_adapter, save_adapter
from adaptkit.methods.lora._towers import shared_copy
from adaptkit.methods.lora.clip_lora import ClipLora
from adaptkit.methods.lora.peft import KINDS, Peft, PeftConfig
from adaptkit.training.loop import fit_method
from adaptkit.types import FitTask, TensorInputs, TrainingSettings

NAMES = ("cat", "dog", "bird", "car")
NEAR = {"int8": 0.999, "nf4": 0.98}
"""Least cosine of a feature with the full model's."""
SMALLER = {"int8": 3.7, "nf4": 6.4}
"""How many times smaller the blocks of both towers must be; biases, norms and scales stay in fp32."""


def test_names():
    assert split_kind("mini@int8") == ("mini", "int8")
    assert split_kind("local-dir:/a@b/c@nf4") == ("local-dir:/a@b/c", "nf4")
    assert split_kind("mini@int3") == ("mini@int3", "")
    assert split_kind("@nf4") == ("@nf4", "")


def test_without_bitsandbytes(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(quantised, "import_module", missing)
    with pytest.raises(UnsupportedError, match=r"pip install 'adaptkit\[quantised\]'"):
        load_backbone("mini@nf4")


def test_an_unknown_kind():
    with pytest.raises(BackboneError, match="choose int8 or nf4"):
        quantise(load_backbone("mini"), "int2")


def test_bytes_count_shared_tensors_once():
    layer = torch.nn.Linear(4, 4)
    assert weight_bytes(layer) == 4 * (16 + 4)
    assert weight_bytes(torch.nn.Sequential(layer, layer)) == 4 * (16 + 4)


@pytest.fixture(scope="module")
def full():
    return load_backbone("mini")


@pytest.fixture(scope="module", params=["int8", "nf4"])
def small(request):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed: pip install 'adaptkit[quantised]'")
    return load_backbone(f"mini@{request.param}")


def pixels(count=8):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def kind_of(backbone):
    return split_kind(backbone.spec.name)[1]


def train(method):
    task = FitTask(NAMES, TensorInputs(pixels()[None], torch.arange(8) % 4))
    settings = TrainingSettings(10, batch_size=8, optimiser="adamw", lr=5e-3, warmup_epochs=0, schedule="constant")
    return fit_method(method, task, settings)


def test_features_stay_near_and_memory_shrinks(full, small):
    with torch.no_grad():
        images = F.cosine_similarity(small.encode_image(pixels()), full.encode_image(pixels()))
        texts = F.cosine_similarity(small.text_features(NAMES), full.text_features(NAMES))
    assert min(images.min(), texts.min()) > NEAR[kind_of(small)]
    for tower in ("image_tower", "text_tower"):
        before, after = (weight_bytes(getattr(backbone, tower).blocks) for backbone in (full, small))
        assert before / after > SMALLER[kind_of(small)]
    assert small.spec.digest != full.spec.digest


def test_a_copy_shares_the_quantised_weights(small):
    copied = shared_copy(small.image_tower)
    both = torch.nn.ModuleList([small.image_tower, copied])
    assert weight_bytes(both) == weight_bytes(small.image_tower)


@pytest.mark.parametrize("kind", ["clip-lora", *(kind for kind in KINDS if kind != "dora")])
def test_training_inside_a_quantised_tower(small, kind):
    method = ClipLora(small, NAMES) if kind == "clip-lora" else Peft(small, NAMES, config=PeftConfig(kind))
    with torch.no_grad():
        before = small.encode_image(pixels())
    bytes_before = weight_bytes(small)
    report = train(method)
    assert report["losses"][-1] < 0.9 * report["losses"][0]
    assert weight_bytes(small) == bytes_before
    with torch.no_grad():
        assert torch.equal(small.encode_image(pixels()), before)


def test_dora_and_merging_are_refused(small):
    with pytest.raises(ConfigError, match="DoRA needs the norms of full weights"):
        Peft(small, NAMES, config=PeftConfig("dora"))
    with pytest.raises(UnsupportedError, match="can't be merged"):
        ClipLora(small, NAMES).merged_towers()


def test_an_adapter_of_a_quantised_backbone(full, small, tmp_path):
    method = ClipLora(small, NAMES)
    train(method)
    save_adapter(tmp_path / "adapter", AdaptedModel(method))
    with pytest.raises(AdapterError, match="load the backbone it was trained on"):
        load_adapter(tmp_path / "adapter", full)
    again = load_adapter(tmp_path / "adapter")
    assert again.backbone.spec.digest == small.spec.digest
    with torch.no_grad():
        torch.testing.assert_close(again(pixels()), method(pixels()), rtol=1e-4, atol=1e-3)


def test_methods_on_features_work_too(small):
    method = methods.get("zero-shot")(small, NAMES)
    assert torch.isfinite(method(small.encode_image(pixels()))).all()
