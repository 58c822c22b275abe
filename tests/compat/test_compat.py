"""Adapters that earlier versions wrote load and answer as they did."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import adaptkit
from adaptkit.methods import methods
from adaptkit.methods.adapter import SCHEMA_VERSION, read_adapter_config
from adaptkit.storage import read_safetensors
from tests.compat.make import HERE, LOGITS, METHODS, NAMES, picture, questions

KEPT = sorted(path.parent for path in HERE.glob("schema-*/*/adapter_config.json"))
NOT_KEPT = {"mllm"}  # their backbones are too large to come along


@pytest.mark.parametrize("folder", KEPT, ids=[f"{path.parent.name}/{path.name}" for path in KEPT])
def test_a_kept_adapter_answers_as_it_did(folder):
    if read_adapter_config(folder).method in ("clip-lora", "peft"):
        pytest.importorskip("peft")
    classifier = adaptkit.load(folder)
    with torch.no_grad():
        logits = classifier.to_module()(questions())
    wanted = read_safetensors(folder / LOGITS)["logits"]
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-3 * float(wanted.abs().max()))
    assert classifier.classes_.tolist() == list(NAMES)
    answers = classifier.predict([picture(label, 500 + label) for label in range(3)])
    assert (
        answers.tolist() == np.array(NAMES)[wanted[:3].argmax(dim=1)].tolist() or classifier.model_.method.transductive
    )


def test_every_schema_and_family_is_kept():
    assert {path.parent.name for path in KEPT} == {f"schema-{version}" for version in range(1, SCHEMA_VERSION + 1)}
    for version in range(1, SCHEMA_VERSION + 1):
        kept = {path.name for path in KEPT if path.parent.name == f"schema-{version}"}
        assert version < SCHEMA_VERSION or kept >= set(METHODS)
        families = {methods.entry(name).family for name in kept}
        assert families == {methods.entry(name).family for name in methods} - NOT_KEPT
    assert len(KEPT) >= 20


def test_the_collection_is_small():
    sizes = [path.stat().st_size for path in HERE.glob("schema-*/**/*") if path.is_file()]
    assert len(sizes) >= 4 * len(KEPT)
    assert sum(sizes) < 2_000_000
