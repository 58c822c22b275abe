"""The embedded multimodal language model: its size, its picture tower, its tokenizer, and that it knows something."""

from __future__ import annotations

import pytest
import torch

from adaptkit.backbones import mini, mini_mllm
from adaptkit.backbones.load import load_backbone
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.backbones.mllm.trie import Trie
from adaptkit.data.sources import load_dataset
from adaptkit.data.transforms import to_pixels
from adaptkit.errors import DataError, StorageError
from adaptkit.methods.mllm.mllm_zero_shot import MllmZeroShot, MllmZeroShotConfig

NAMES = ("red striped circle", "Übergrößenträger", "日本の城", "🦜 parrot", "a-b_c/d (e)", "क्षत्रिय", "\u200d", "ﷺ")


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("mini-mllm")


def test_the_files_are_small_and_nothing_in_them_can_run():
    files = sorted(path for path in mini_mllm.FOLDER.rglob("*") if path.is_file())
    assert sum(path.stat().st_size for path in files) <= 15 * 2**20
    assert {path.suffix for path in files} == {".json", ".jinja", ".safetensors"}


def test_missing_files_are_said(monkeypatch, tmp_path):
    monkeypatch.setattr(mini_mllm, "FOLDER", tmp_path)
    with pytest.raises(StorageError, match="install adaptkit again"):
        load_backbone("mini-mllm")


def test_its_name_and_kind(backbone):
    assert (backbone.spec.name, backbone.spec.family, backbone.is_mllm) == ("mini-mllm", "llava", True)
    assert backbone.model.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_transformers_reads_the_same_folder(backbone):
    again = load_backbone(f"transformers:{mini_mllm.FOLDER}")
    assert again.spec.digest == backbone.spec.digest


def test_the_picture_tower_is_minis(backbone):
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pooled = backbone.model.model.vision_tower(pixels * 2 - 1).pooler_output
        ours = load_backbone("mini").encode_image(pixels * 2 - 1)
    torch.testing.assert_close(pooled @ mini.mini_state_dict()["visual.proj"], ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_any_name_can_be_written(backbone, name):
    ids = backbone.prompter.answers([Turn("?")], [name], end=False)[0]
    vocabulary = backbone.prompter.tokenizer.get_vocab()
    special = {vocabulary[token] for token in backbone.prompter.control_tokens}
    assert ids
    assert not special & set(ids)
    assert backbone.prompter.text(ids) == name


def test_control_tokens_in_names_are_refused(backbone):
    assert {"<image>", "<|user|>", "<|assistant|>", "<s>", "</s>"} <= set(backbone.prompter.control_tokens)
    with pytest.raises(DataError, match="control token"):
        backbone.prompter.check_text("a <|assistant|> b", "class name")


def test_other_pixels_give_other_logits(backbone):
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = backbone.image_features(pixels)
    assert features.counts == (17, 17)
    prompt = backbone.prompter.ids([Turn("What is it?")], [17])
    trie = Trie.build(backbone.prompter.answers([Turn("What is it?")], ["one", "red"]))
    with torch.no_grad():
        scores = backbone.candidate_scores(backbone.prefix([prompt] * 2, features), trie)
    assert (scores[0] - scores[1]).abs().min() > 1e-3


@pytest.mark.parametrize(("route", "least"), [("likelihood", 0.4), ("letters", 0.4)])
def test_it_names_shapes_well_above_chance(backbone, route, least):
    """Two test images of each of 24 classes, none of whose combinations it was trained on."""
    data = load_dataset("shapes")
    rows = range(0, len(data.test), 20)
    assert len(rows) == 48
    config = MllmZeroShotConfig(route=route)
    method = MllmZeroShot(backbone, data.class_names, templates=data.templates, config=config)
    pixels = torch.stack([to_pixels(image, backbone.spec.preprocessing) for image in data.test.images(rows)])
    right = method(pixels).argmax(1) == torch.tensor(data.test.labels[::20])
    assert float(right.float().mean()) >= least
