"""CLIP-Adapter: its mix, its ratio at prediction time, and the optional search."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adaptkit.errors import ConfigError
from adaptkit.methods.adapters.clip_adapter import CLIPAdapter, CLIPAdapterConfig
from adaptkit.methods.adapters.zero_shot import ZeroShot
from adaptkit.training.loop import fit_method
from adaptkit.types import FitTask, TensorInputs, TrainingSettings
from tests.methods.tiny import NAMES, make_task, query, tiny_clip

BACKBONE = tiny_clip()


def test_ratio_zero_is_zero_shot_bit_for_bit():
    features = query(BACKBONE, "image_features")
    method = CLIPAdapter(BACKBONE, NAMES)
    with torch.no_grad():
        zero_shot = ZeroShot(BACKBONE, NAMES)(features)
        assert not torch.equal(method(features), zero_shot)
        method.set_ratio(0)
        assert torch.equal(method(features), zero_shot)


def test_forward_is_the_sheets():
    features = query(BACKBONE, "image_features")
    method = CLIPAdapter(BACKBONE, NAMES, config=CLIPAdapterConfig(ratio=0.6, reduction=2))
    with torch.no_grad():
        adapted = (features @ method.down.weight.T).clamp(min=0) @ method.up.weight.T
        mixed = 0.6 * adapted.clamp(min=0) + 0.4 * features
        wanted = 20 * F.normalize(mixed, dim=-1) @ ZeroShot(BACKBONE, NAMES).class_weights().T
        torch.testing.assert_close(method(features), wanted)
        assert method.down.weight.shape == (8, 16)


def test_ratio_is_saved_with_the_adapter():
    method = CLIPAdapter(BACKBONE, NAMES)
    method.set_ratio(0.7)
    other = CLIPAdapter(BACKBONE, NAMES, seed=3)
    other.load_adapter_state(method.adapter_state())
    assert float(other.ratio) == pytest.approx(0.7)


def test_searched_ratio_is_the_smallest_of_the_best():
    method = CLIPAdapter(BACKBONE, NAMES, config=CLIPAdapterConfig(search_ratio=True))
    numbers = torch.Generator().manual_seed(1)
    val = TensorInputs(torch.randn(1, 60, 16, generator=numbers), torch.randint(4, (60,), generator=numbers))
    task = FitTask(NAMES, val, val)
    report = method.finish(task)
    scores = {}
    for step in range(1, 10):
        method.set_ratio(step / 10)
        with torch.no_grad():
            right = method(task.val.values[0]).argmax(dim=1) == task.val.labels
        scores[step / 10] = float(right.float().mean())
    best = min(ratio for ratio, score in scores.items() if score == max(scores.values()))
    assert report["searched"] is True
    assert report["ratio"] == best
    assert report["val_accuracy"] == scores[best]
    assert len(set(scores.values())) > 1  # there was something to choose


def test_without_validation_the_ratio_stays():
    method = CLIPAdapter(BACKBONE, NAMES, config=CLIPAdapterConfig(search_ratio=True))
    report = fit_method(method, make_task(BACKBONE, "image_features", val=False), TrainingSettings(epochs=1))
    assert report["ratio"] == pytest.approx(0.2)
    assert report["searched"] is False


def test_bad_settings():
    with pytest.raises(ConfigError, match=r"ratio is 1.5, but must lie between 0 \(zero-shot\) and 1"):
        CLIPAdapterConfig(ratio=1.5)
    with pytest.raises(ConfigError, match="ratio is nan"):
        CLIPAdapterConfig(ratio=float("nan"))
    with pytest.raises(ConfigError, match="reduction is 0"):
        CLIPAdapterConfig(reduction=0)
    with pytest.raises(ConfigError, match="reduction 17 leaves nothing of 16 features"):
        CLIPAdapter(BACKBONE, NAMES, config=CLIPAdapterConfig(reduction=17))
    with pytest.raises(ConfigError, match="ratio is -1"):
        CLIPAdapter(BACKBONE, NAMES).set_ratio(-1)
