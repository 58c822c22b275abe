"""Every method on a GPU: fits there, predicts there, and agrees with the CPU. Skipped where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adaptkit.methods import methods
from adaptkit.training.loop import fit_method
from tests.backbones import tiny_mllm
from tests.methods.tiny import DESCRIPTIONS, NAMES, NOVEL, make_task, query, tiny_clip
from tests.quick import short_answers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def fitted(name, device, **changes):
    kind = methods.get(name)
    backbone = tiny_mllm.load.__wrapped__("llava") if kind.needs_mllm else tiny_clip(layers=12)
    task = make_task(backbone, kind.reads, views=3)
    inputs = query(backbone, kind.reads)
    backbone.to(device)
    config = kind.config_class()
    if hasattr(config, "examples"):  # as many as fit into the tiny model's context
        config = replace(config, examples=2)
    config = short_answers(config)
    method = kind(backbone, NAMES, config=config, descriptions=DESCRIPTIONS)
    settings = kind.default_training
    if settings is not None:
        settings = replace(settings, epochs=min(settings.epochs or 2, 2), batch_size=8, **changes)
    report = fit_method(method, task, settings)
    with torch.no_grad():
        return method, method(inputs.to(device)).cpu(), report


@pytest.mark.parametrize("name", methods)
def test_agrees_with_the_cpu(name):
    _, on_cpu, _ = fitted(name, "cpu")
    method, on_gpu, _ = fitted(name, "cuda")
    assert all(value.is_cuda for value in method.adapter_state().values())
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-2)
    if method.novel_classes != "refused":
        method.set_classes(NOVEL)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["coop", "maple", "clip-adapter", "tip-adapter-f"])
def test_autocast(name, precision):
    _, logits, report = fitted(name, "cuda", precision=precision)
    assert torch.isfinite(logits).all()
    assert report["skipped_steps"] == 0
