from __future__ import annotations

import open_clip
import pytest
import torch
import torch.nn.functional as F

from adaptkit.backbones.load import load_backbone
from adaptkit.errors import StorageError, UnsupportedError
from adaptkit.export.merge import merge_adapter
from adaptkit.export.open_clip import open_clip_config, open_clip_state
from adaptkit.methods import methods
from adaptkit.methods.adapter import AdaptedModel
from adaptkit.methods.base import render_prompts
from adaptkit.methods.lora.clip_lora import ClipLora, ClipLoraConfig
from adaptkit.methods.lora.peft import KINDS, Peft, PeftConfig
from tests.backbones.families import OPEN_CLIP, save_open_clip, save_transformers
from tests.methods.test_clip_lora import shaken

pytest.importorskip("peft")
NAMES = ("tabby cat", "golden_retriever", "river")


@pytest.fixture(scope="module")
def mini():
    return load_backbone("mini")


def pixels_for(backbone, count=5):
    size = backbone.spec.preprocessing.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def zero_shot_logits(backbone, template):
    texts = backbone.encode_text(backbone.tokenize(render_prompts(NAMES, template)))
    images = backbone.encode_image(pixels_for(backbone))
    return backbone.logit_scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T


def open_clip_logits(folder, template):
    model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(render_prompts(NAMES, template))
    size = model.visual.image_size
    size = size if isinstance(size, int) else size[0]
    pixels = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    images, texts = model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True)
    return model.logit_scale.exp() * images @ texts.T


def check_merged(method, folder):
    backbone = method.backbone
    merge_adapter(AdaptedModel(method), folder)
    with torch.no_grad():
        wanted = method(pixels_for(backbone))
        allowed = 1e-5 * max(1.0, float(wanted.abs().max()))
        loaded = load_backbone(f"local-dir:{folder}")
        assert loaded.spec.preprocessing == backbone.spec.preprocessing
        torch.testing.assert_close(zero_shot_logits(loaded, method.templates[0]), wanted, rtol=0, atol=allowed)
        torch.testing.assert_close(open_clip_logits(folder, method.templates[0]), wanted, rtol=0, atol=allowed)


@pytest.mark.parametrize("config", [ClipLoraConfig(targets="qkvo", rank=4), ClipLoraConfig(towers="image")])
def test_clip_lora(mini, tmp_path, config):
    check_merged(shaken(ClipLora(mini, NAMES, config=config)), tmp_path / "merged")


@pytest.mark.parametrize("kind", KINDS)
def test_peft(mini, tmp_path, kind):
    check_merged(shaken(Peft(mini, NAMES, config=PeftConfig(kind))), tmp_path / "merged")


@pytest.mark.parametrize("kind", ["clip-quickgelu", "layer-scale", "clipa-text", "mean-pooled"])
def test_other_open_clip_models(tmp_path, kind):
    assert kind in OPEN_CLIP
    save_open_clip(kind, tmp_path / "source")
    backbone = load_backbone(f"local-dir:{tmp_path / 'source'}")
    check_merged(shaken(ClipLora(backbone, NAMES)), tmp_path / "merged")


def test_nothing_changed_gives_the_same_backbone(mini, tmp_path):
    """What is written for an untouched backbone is the backbone: every weight and every setting."""
    towers = {"image": mini.image_tower.state_dict(), "text": mini.text_tower.state_dict()}
    state = open_clip_state(towers, float(mini.logit_scale))
    from adaptkit.backbones.mini import mini_state_dict

    theirs = mini_state_dict()
    assert state.keys() == theirs.keys()
    for key, value in state.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-6, atol=0)
    config = open_clip_config(mini)
    assert config["model_cfg"]["text_cfg"]["heads"] == 4
    assert not config["model_cfg"]["quick_gelu"]


# --- what can't be written --------------------------------------------------------------------------------------------


def test_methods_with_nothing_to_merge(mini, tmp_path):
    seen = 0
    for name in ("zero-shot", "coop", "tip-adapter", "linear-probe"):
        method = methods.get(name)(mini, NAMES)
        with pytest.raises(UnsupportedError, match=name):
            merge_adapter(AdaptedModel(method), tmp_path / "merged")
        seen += 1
    assert seen == 4
    assert not (tmp_path / "merged").exists()


def test_another_tokenizer(tmp_path):
    save_transformers("clip", tmp_path / "source")
    backbone = load_backbone(f"transformers:{tmp_path / 'source'}")
    with pytest.raises(UnsupportedError, match=r"different activations|another tokenizer than CLIP's"):
        merge_adapter(AdaptedModel(ClipLora(backbone, ("cat", "dog"))), tmp_path / "merged")


def test_siglip(tmp_path):
    save_transformers("siglip", tmp_path / "source")
    backbone = load_backbone(f"transformers:{tmp_path / 'source'}")
    with pytest.raises(UnsupportedError, match="SigLIP"):
        merge_adapter(AdaptedModel(ClipLora(backbone, ("cat", "dog"))), tmp_path / "merged")


def test_a_folder_that_is_taken(mini, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("keep")
    with pytest.raises(StorageError):
        merge_adapter(AdaptedModel(ClipLora(mini, NAMES)), tmp_path / "merged")
    assert (tmp_path / "merged" / "mine.txt").read_text() == "keep"
