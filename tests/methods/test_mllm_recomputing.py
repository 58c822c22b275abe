"""Gradient checkpointing of tuned MLLMs: the same gradients from less memory, and a word where none arrives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adaptkit.errors import ConfigError, TrainingError
from adaptkit.methods import methods
from adaptkit.methods.mllm._recomputing import require_gradients
from adaptkit.methods.mllm.mllm_lora import MllmLora, MllmLoraConfig
from adaptkit.training.loop import fit_method
from tests.backbones import tiny_mllm as tiny
from tests.methods.tiny import NAMES, make_task, query


def gradients(method):
    """Gradients of one batch, and how often each decoder layer's first part was computed."""
    calls = []
    parts = [next(layer.children()) for layer in method.mllm.layers]
    hooks = [part.register_forward_hook(lambda *given: calls.append(1)) for part in parts]
    pixels, labels = query(method.backbone, "images", 3), torch.tensor([0, 1, 3])
    torch.autograd.backward(sum(method.losses(pixels, labels).values()))
    for hook in hooks:
        hook.remove()
    return {name: p.grad for name, p in method.named_parameters()}, len(calls) / len(parts)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_family_gives_the_same_gradients(kind):
    backbone = tiny.load(kind)
    plain, once = gradients(MllmLora(backbone, NAMES, config=MllmLoraConfig(dropout=0.0)))
    again, twice = gradients(MllmLora(backbone, NAMES, config=MllmLoraConfig(dropout=0.0, checkpointing=True)))
    assert (once, twice) == (1, 2)
    reached = 0
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)
        if ".lora_B." in name:
            assert gradient.any(), name  # every one
            reached += 1
    assert reached > 0


@pytest.mark.parametrize("name", ["mllm-soft-prompt", "mllm-bitfit", "vladva"])
def test_training_ends_at_the_same_place(name):
    backbone, kind = tiny.load("llava"), methods.get(name)
    states = []
    for checkpointing in (False, True):
        method = kind(backbone, NAMES, config=kind.config_class(checkpointing=checkpointing))
        training = replace(kind.default_training, epochs=2, batch_size=4)
        fit_method(method, make_task(backbone, "images", shots=1), training)
        states.append(method.adapter_state())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-6)


def test_answers_are_computed_once():
    method = MllmLora(tiny.load("llava"), NAMES, config=MllmLoraConfig(checkpointing=True))
    plain = MllmLora(tiny.load("llava"), NAMES)
    with torch.no_grad():
        assert torch.equal(method(query(method.backbone, "images", 2)), plain(query(plain.backbone, "images", 2)))


def test_where_no_gradient_arrives_it_is_said():
    parameter = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(TrainingError, match="No gradient reached what x trains"):
        require_gradients("x", [parameter])
    parameter.grad = torch.zeros(2)
    with pytest.raises(TrainingError, match="No gradient"):
        require_gradients("x", [parameter])
    parameter.grad = torch.tensor([0.0, 1.0])
    require_gradients("x", [parameter])


def test_it_saves_nothing_where_keys_are_kept():
    with pytest.raises(ConfigError, match="saves nothing with variant softmax"):
        MllmLoraConfig(variant="softmax", checkpointing=True)
