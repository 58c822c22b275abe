"""Folding: for every method which of the three kinds it becomes, or why it can't; the logits stay the adapter's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from adaptkit.backbones.tower import TextTower
from adaptkit.errors import UnsupportedError
from adaptkit.export.fold import Folded, fold
from adaptkit.methods import methods
from adaptkit.methods.adapter import AdaptedModel
from adaptkit.methods.folding import CacheHead, ClassBlocks, Fold, MatrixHead
from tests.contract.test_methods import fitted, make, suitable
from tests.methods.tiny import NAMES, NOVEL, query, tiny_clip

pytest.importorskip("peft")

KINDS = {
    "matrix": {
        "clap", "coop", "cross-modal", "cupl", "dclip", "gda", "gist", "kgcoop", "linear-probe", "lp-plus-plus",
        "proapo", "prograd", "taskres", "vdt-adapter", "waffleclip", "zero-shot", "zs-lp",
    },
    "head": {"ape", "ape-t", "clip-adapter", "tip-adapter", "tip-adapter-f"},
    "tower": {
        "adaptclipzs", "clip-lora", "cola-adapter", "cross-modal-partial", "ivlp", "maple", "mmrl", "mmrlpp", "peft",
        "promptsrc", "vpt",
    },
}  # fmt: skip
WHY_NOT = {
    "cocoop": "every image shifts its text prompts",
    "dive-k": "the language model reads every image",
    "em-dirichlet": "depends on the images it is asked about with it",
    "fed-mp": "depends on the images it is asked about with it",
    "mllm-bitfit": "the language model reads every image",
    "mllm-icl": "the language model reads every image",
    "mllm-lora": "the language model reads every image",
    "mllm-qlora": "the language model reads every image",
    "mllm-soft-prompt": "the language model reads every image",
    "mllm-zero-shot": "the language model reads every image",
    "transclip": "depends on the images it is asked about with it",
    "twin": "the language model reads every image",
    "unem": "depends on the images it is asked about with it",
    "virft": "the language model reads every image",
    "vladva": "the language model reads every image",
}


@pytest.fixture(scope="module")
def backbone():
    return tiny_clip(layers=12)


def close(given, wanted):
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5 * max(1.0, float(wanted.abs().max())))


def check(backbone, method):
    """Folded logits are the method's, from pixels, and from features where those are enough; no text tower is left."""
    folded, pixels = fold(method), query(backbone, "images")
    assert folded.class_names == method.class_names
    with torch.no_grad():
        wanted = AdaptedModel(method)(pixels)
        close(folded(pixels), wanted)
        if folded.reads_features:
            close(folded.from_features(backbone.encode_image(pixels)), wanted)
    assert not any(isinstance(module, TextTower) for module in folded.modules())
    assert not any(isinstance(module, nn.Dropout) and module.training for module in folded.modules())
    return folded


def test_every_method_is_one_of_the_kinds_or_says_why_not():
    named = set.union(*KINDS.values(), set(WHY_NOT))
    assert named == set(methods)
    assert [len(names) for names in KINDS.values()] == [17, 5, 11]
    assert len(WHY_NOT) == 15


@pytest.mark.parametrize("name", sorted(set.union(*KINDS.values())))
def test_folded_logits(backbone, name):
    method, _ = fitted(backbone, name)
    folded = check(backbone, method)
    assert name in KINDS[folded.kind]
    shared = {id(parameter) for parameter in backbone.parameters()}
    own = sum(v.numel() for v in [*folded.parameters(), *folded.buffers()] if id(v) not in shared)
    assert folded.kind == "tower" or own < 3000  # nothing of the towers comes along
    check(backbone, method.set_classes((NAMES[2], NAMES[0])))
    if method.novel_classes != "refused":
        assert len(check(backbone, method.set_classes(NOVEL)).class_names) == len(NOVEL)


@pytest.mark.parametrize("name", sorted(WHY_NOT))
def test_what_cannot_be_folded(name):
    with pytest.raises(UnsupportedError, match=f"{name} can't be folded: .*{WHY_NOT[name]}"):
        fold(make(suitable(name), name))


@pytest.mark.parametrize(
    ("name", "settings", "kind"),
    [
        ("dclip", {"aggregation": "max"}, "head"),
        ("dclip", {"aggregation": "sum"}, "matrix"),
        ("gist", {"fine_tune": True}, "tower"),
        ("cross-modal", {"variant": "adapter", "search": False, "iterations": 5}, "head"),
        ("clip-lora", {"towers": "text"}, "matrix"),
        ("ivlp", {"num_image_context": 0}, "matrix"),
        ("promptsrc", {"averaging": "reference"}, "tower"),
        ("peft", {"kind": "bitfit"}, "tower"),
        ("peft", {"kind": "dora"}, "tower"),
    ],
)
def test_settings_that_fold_otherwise(backbone, name, settings, kind):
    assert check(backbone, fitted_with(backbone, name, settings)).kind == kind


def fitted_with(backbone, name, settings):
    from adaptkit.training.loop import fit_method
    from tests.methods.tiny import DESCRIPTIONS, make_task

    made = methods.get(name)
    method = made(backbone, NAMES, config=replace(made.config_class(), **settings), descriptions=DESCRIPTIONS)
    training = method.default_training and replace(method.default_training, epochs=1, batch_size=8, lr=1e-2)
    fit_method(method, make_task(backbone, method.reads, views=2), training)
    return method


def test_unequal_shots_and_an_unfitted_cache(backbone):
    method = methods.get("tip-adapter")(backbone, NAMES)
    assert check(backbone, method).kind == "matrix"
    numbers = torch.Generator().manual_seed(3)
    keys = torch.nn.functional.normalize(torch.randn(6, 16, generator=numbers), dim=-1)
    method.set_keys(keys, torch.tensor([0, 0, 0, 1, 3, 1]))  # none of class 2
    assert isinstance(check(backbone, method).head, CacheHead)
    check(backbone, method.set_classes((NAMES[2], NAMES[3])))


def test_a_fold_keeps_what_was_learned_when_training_goes_on(backbone):
    method, _ = fitted(backbone, "vpt")
    folded, pixels = fold(method), query(backbone, "images")
    before = folded(pixels)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.mul_(-3.0)
    assert torch.equal(folded(pixels), before)
    assert not torch.allclose(method(pixels), before)
    assert not any(parameter.requires_grad for parameter in folded.parameters())


def test_a_fold_that_answers_otherwise_is_refused(backbone, monkeypatch):
    method = methods.get("zero-shot")(backbone, NAMES)
    monkeypatch.setattr(type(method), "fold", lambda self: Fold(MatrixHead(self.zero_shot(), scale=1.0)))
    with pytest.raises(UnsupportedError, match="answers otherwise"):
        fold(method)


def test_features_for_a_tower_are_refused(backbone):
    method, _ = fitted(backbone, "vpt")
    with pytest.raises(UnsupportedError, match="give pixels"):
        fold(method).from_features(torch.zeros(1, 16))


def test_blocks_of_classes():
    blocks = ClassBlocks(torch.tensor([2, 0, 2]), 3)
    assert blocks.index.tolist() == [[1, 0], [0, 0], [0, 2]]
    assert blocks.filled.tolist() == [[True, False], [False, False], [True, True]]
    assert isinstance(Folded(Fold(MatrixHead(torch.eye(2))), nn.Identity(), ("a", "b")), nn.Module)
