"""Decoder layers spread over processes, here over one: the same numbers, and what is trained stays whole."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor

from adaptkit.errors import ConfigError, UnsupportedError
from adaptkit.methods import methods
from adaptkit.methods.mllm.mllm_lora import MllmLora, MllmLoraConfig
from tests.backbones import tiny_mllm as tiny
from tests.methods.tiny import NAMES, query, tiny_clip


@pytest.fixture
def one_process(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def gradients(method):
    pixels, labels = query(method.backbone, "images", 3), torch.tensor([0, 1, 3])
    method.zero_grad()
    torch.autograd.backward(sum(method.losses(pixels, labels).values()))
    return {name: p.grad.clone() for name, p in method.named_parameters()}


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_layers_are_spread_and_nothing_else_changes(one_process, kind, checkpointing):
    backbone = tiny.load(kind)
    before = [(name, id(p)) for name, p in backbone.named_parameters()]
    config = MllmLoraConfig(dropout=0.0, checkpointing=checkpointing)
    plain, spread = (MllmLora(backbone, NAMES, config=config) for _ in range(2))
    spread.spread("cpu")
    frozen = [p for layer in spread.mllm.layers for p in layer.parameters() if not p.requires_grad]
    assert frozen
    assert all(isinstance(p, DTensor) for p in frozen)
    assert not any(isinstance(p, DTensor) for p in spread.parameters())
    theirs = gradients(spread)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-5, atol=1e-7)
    pixels = query(backbone, "images", 2)
    with torch.no_grad():
        torch.testing.assert_close(spread(pixels), plain(pixels))
    assert [(name, id(p)) for name, p in backbone.named_parameters()] == before
    assert not any(isinstance(p, DTensor) for p in backbone.parameters())


def test_micro_batches_of_different_number_are_refused():
    method = MllmLora(tiny.load("llava"), NAMES, config=MllmLoraConfig(micro_batch=2))
    with pytest.raises(ConfigError, match="micro_batch can't be set where layers are spread"):
        method.spread("cpu")


def test_methods_without_layers_refuse():
    with pytest.raises(UnsupportedError, match="coop trains no multimodal language model whose layers"):
        methods.get("coop")(tiny_clip(), NAMES).spread("cpu")
