"""Backbone names: taken apart, answered with near matches, never taken for folders; and random weights by name."""

from __future__ import annotations

import warnings

import open_clip
import pytest
import torch

from adaptkit.backbones import load as load_module
from adaptkit.backbones.load import BackboneName, load_backbone, parse_backbone_name
from adaptkit.errors import AdaptKitWarning, BackboneError, MissingPathError, UnknownNameError

# --- taking names apart -----------------------------------------------------------------------------------------------

GOOD = [
    ("mini", "mini", "mini", ""),
    ("ViT-B-16/openai", "open_clip", "ViT-B-16", "openai"),
    ("ViT-B-16/random", "open_clip", "ViT-B-16", "random"),
    ("ViT-B-16", "open_clip", "ViT-B-16", ""),
    ("hf-hub:timm/ViT-B-16-SigLIP", "hf-hub", "timm/ViT-B-16-SigLIP", ""),
    ("local-dir:/models/my clip", "local-dir", "/models/my clip", ""),
    ("local-dir:../here", "local-dir", "../here", ""),
    ("local-dir:C:\\models", "local-dir", "C:\\models", ""),
    ("transformers:openai/clip-vit-base-patch16", "transformers", "openai/clip-vit-base-patch16", ""),
    ("timm:vit_base_patch14_dinov2.lvd142m", "timm", "vit_base_patch14_dinov2.lvd142m", ""),
    ("timm:hf-hub:org/repo", "timm", "hf-hub:org/repo", ""),
]


@pytest.mark.parametrize(("name", "scheme", "identifier", "tag"), GOOD)
def test_names(name, scheme, identifier, tag):
    parsed = parse_backbone_name(name)
    assert parsed == BackboneName(scheme, identifier, tag)
    assert str(parsed) == name
    assert parse_backbone_name(str(parsed)) == parsed


def test_every_scheme_is_among_the_cases():
    assert {case[1] for case in GOOD} == {"mini", "open_clip", *load_module.SCHEMES}
    assert len(load_module.SCHEMES) == 4


@pytest.mark.parametrize("name", ["", "  ", None, 5, b"mini", ["mini"]])
def test_no_name(name):
    with pytest.raises(BackboneError, match="needs a name, such as 'mini'"):
        parse_backbone_name(name)


@pytest.mark.parametrize(
    "name", ["/models/clip", "./clip", "../clip", ".", "..", "~/clip", "~", ".\\clip", "..\\clip", "/", "./"]
)
def test_path_like_names_are_answered_with_the_forms_to_write(name):
    with pytest.raises(BackboneError, match="looks like a path") as caught:
        parse_backbone_name(name)
    for scheme in ("local-dir", "transformers", "timm"):
        assert f"'{scheme}:{name}'" in str(caught.value)


@pytest.mark.parametrize("name", ["openai/clip/x", "a/b/c/d", "a/", "a//b"])
def test_names_with_other_slashes_are_answered_with_the_hubs(name):
    with pytest.raises(BackboneError, match="isn't ARCHITECTURE/TAG") as caught:
        parse_backbone_name(name)
    assert f"'hf-hub:{name}'" in str(caught.value)
    assert f"'transformers:{name}'" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("HF-HUB:a/b", "Did you mean 'hf-hub'"),
        ("transformer:a/b", "Did you mean 'transformers'"),
        ("localdir:a", "Did you mean 'local-dir'"),
        ("https://huggingface.co/a/b", "Known: hf-hub, local-dir, timm, transformers"),
        ("ViT-B-16:openai", "A name is SCHEME:NAME"),
        (":x", "A name is SCHEME:NAME"),
    ],
)
def test_unknown_schemes(name, hint):
    with pytest.raises(UnknownNameError, match="Unknown backbone scheme") as caught:
        parse_backbone_name(name)
    assert hint in str(caught.value)
    assert "adaptkit list backbones" in str(caught.value)


@pytest.mark.parametrize("scheme", load_module.SCHEMES)
def test_a_scheme_needs_something_behind_it(scheme):
    for rest in ("", "  "):
        with pytest.raises(BackboneError, match=f"Nothing follows '{scheme}:{rest}': write {scheme}:"):
            parse_backbone_name(f"{scheme}:{rest}")


def test_parsing_does_not_depend_on_the_working_folder(tmp_path, monkeypatch):
    """A folder of results may well be called like the backbone."""
    (tmp_path / "ViT-B-16" / "openai").mkdir(parents=True)
    (tmp_path / "my" / "own" / "clip").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_backbone_name("ViT-B-16/openai") == BackboneName("open_clip", "ViT-B-16", "openai")
    assert parse_backbone_name("ViT-B-16") == BackboneName("open_clip", "ViT-B-16")
    for name in ("my/own", "my/own/clip", "my"):  # no architectures, so the folder is worth a hint
        with pytest.raises(BackboneError, match=f"'{name}' looks like a path"):
            load_backbone(name)


def test_very_long_and_odd_names_end_in_a_sentence():
    for name in ("x" * 5000, "x/" + "y" * 5000, "a\0b", "ViT-B-16\n", " ViT-B-16/openai"):
        with pytest.raises(UnknownNameError, match="Unknown backbone"):
            load_backbone(name)
    with pytest.raises(MissingPathError, match="There is no folder"):
        load_backbone("local-dir:" + "x" * 5000)
    with pytest.raises(MissingPathError, match="There is no folder"):
        load_backbone("local-dir:a\0b")


# --- names that nothing has -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("ViT-B16/openai", "ViT-B-16"),
        ("vit-b-32/openai", "ViT-B-32"),
        ("RN-50/openai", "RN50"),
        ("Mini", "mini"),
        ("mimi", "mini"),
    ],
)
def test_unknown_architectures_get_near_matches(name, near):
    with pytest.raises(UnknownNameError, match="Unknown backbone") as caught:
        load_backbone(name)
    assert f"{near!r}" in str(caught.value)


def test_an_unknown_architecture_with_a_slash_may_be_a_hub_id():
    with pytest.raises(UnknownNameError, match="Unknown backbone 'openai'") as caught:
        load_backbone("openai/clip-vit-base-patch16")
    assert "'transformers:openai/clip-vit-base-patch16'" in str(caught.value)
    assert "'hf-hub:openai/clip-vit-base-patch16'" in str(caught.value)


def test_unknown_tags_list_the_tags_there_are():
    with pytest.raises(UnknownNameError, match="Unknown weights of ViT-B-16 'opnai'") as caught:
        load_backbone("ViT-B-16/opnai")
    assert "Did you mean 'openai'" in str(caught.value)
    assert "laion400m_e32" in str(caught.value)
    assert "random" in str(caught.value)


def test_the_activation_is_the_weights_own():
    compared, by_architecture = 0, []
    for architecture in open_clip.list_models():
        config = open_clip.get_model_config(architecture) or {}
        for tag in open_clip.list_pretrained_tags_by_model(architecture):
            wants = bool(open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu", False))
            found = load_module._activation_of_tag(BackboneName("open_clip", architecture, tag))  # none is refused
            if found is not wants:
                by_architecture.append(f"{architecture}/{tag}")
                assert found is config["quick_gelu"] is True
            compared += 1
    assert compared > 150
    assert by_architecture in (
        [],
        ["roberta-ViT-B-32/laion2b_s12b_b32k"],
    )  # its tag says nothing, its architecture does
    assert load_module._activation_of_tag(BackboneName("open_clip", "ViT-B-32", "openai")) is True
    assert load_module._activation_of_tag(BackboneName("open_clip", "ViT-B-32-quickgelu", "openai")) is True
    assert load_module._activation_of_tag(BackboneName("open_clip", "ViT-B-32", "laion2b_s34b_b79k")) is False


def test_weights_trained_with_gelu_are_not_put_into_a_quick_gelu_twin(monkeypatch):
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda architecture, tag: {"url": "x"})
    with pytest.raises(BackboneError, match="write 'ViT-B-32/laion2b_s34b_b79k'"):
        load_module._activation_of_tag(BackboneName("open_clip", "ViT-B-32-quickgelu", "laion2b_s34b_b79k"))


# --- folders ----------------------------------------------------------------------------------------------------------


def test_folders_that_are_not_there_or_not_in_the_layout(tmp_path, monkeypatch):
    with pytest.raises(MissingPathError, match="There is no folder"):
        load_backbone(f"local-dir:{tmp_path / 'missing'}")
    (tmp_path / "file").write_text("x")
    with pytest.raises(MissingPathError, match="There is no folder"):
        load_backbone(f"local-dir:{tmp_path / 'file'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BackboneError, match=r"has no open_clip_config\.json") as caught:
        load_backbone(f"local-dir:{tmp_path / 'empty'}")
    assert "transformers:" not in str(caught.value)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(BackboneError, match=f"try 'transformers:{tmp_path / 'other'}'"):
        load_backbone(f"local-dir:{tmp_path / 'other'}")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "open_clip_config.json").write_text("{")
    with pytest.raises(BackboneError, match="couldn't be loaded"):
        load_backbone(f"local-dir:{tmp_path / 'damaged'}")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(BackboneError, match=r"has no open_clip_config\.json"):
        load_backbone("local-dir:~/empty")  # the home folder is meant


# --- random weights ---------------------------------------------------------------------------------------------------

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture
def tiny(tmp_path):
    """Two small architectures that open_clip knows while the test runs."""
    from open_clip import factory

    before = dict(factory._MODEL_CONFIGS)
    factory._MODEL_CONFIGS.update({"adaptkit-tiny": TINY, "adaptkit-tiny-too": TINY})
    yield "adaptkit-tiny"
    factory._MODEL_CONFIGS.clear()
    factory._MODEL_CONFIGS.update(before)


def test_random_weights_are_the_same_every_time_and_leave_the_random_state_alone(tiny):
    torch.manual_seed(5)
    first = load_backbone(f"{tiny}/random")
    drawn = torch.rand(3)
    torch.manual_seed(6)
    second = load_backbone(f"{tiny}/random")
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
    assert first.spec == second.spec
    assert first.spec.name == "adaptkit-tiny/random"
    assert (first.spec.opaque_image, first.spec.opaque_text) == ("", "")
    assert (first.spec.embed_dim, first.spec.context_length, first.spec.preprocessing.image_size) == (16, 16, 32)
    other = load_backbone("adaptkit-tiny-too/random")
    assert other.spec.digest != first.spec.digest  # seeded by the name
    assert not first.training
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}
    with torch.no_grad():
        pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
        assert torch.equal(first.encode_image(pixels), second.encode_image(pixels))
        assert not torch.equal(first.encode_image(pixels), other.encode_image(pixels))
        assert first.text_features(["a cat"]).shape == (1, 16)


def test_a_name_without_weights_warns_and_random_does_not(tiny):
    with pytest.warns(AdaptKitWarning, match="names no weights, so they are random"):
        unnamed = load_backbone(tiny)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdaptKitWarning)
        named = load_backbone(f"{tiny}/random")
    assert unnamed.spec.digest == named.spec.digest


# --- devices ----------------------------------------------------------------------------------------------------------


def test_unknown_devices_are_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(load_module, "_load_open_clip", lambda name: pytest.fail("loaded first"))
    for device in ("gpu", "cuda:x", "", None):
        with pytest.raises(BackboneError, match="Unknown device"):
            load_backbone("ViT-B-16/openai", device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_here_is_a_sentence(monkeypatch):
    monkeypatch.setattr(load_module, "_load_open_clip", lambda name: pytest.fail("loaded first"))
    for device in ("cuda", "cuda:7", torch.device("cuda")):
        with pytest.raises(BackboneError, match=r"Device cuda.* can't be used here"):
            load_backbone("ViT-B-16/openai", device=device)
