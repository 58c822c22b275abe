"""TaskRes: its weights and gradients, what trains, what unseen classes get, the base, and the search of alpha."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adaptkit.errors import AdapterError, ConfigError, DataError
from adaptkit.methods.adapters._texts import mean_text_features
from adaptkit.methods.adapters.taskres import SEARCHED_ALPHAS, TaskRes, TaskResConfig
from adaptkit.methods.adapters.zero_shot import ZeroShot
from adaptkit.storage import write_safetensors
from adaptkit.training.loop import fit_method
from adaptkit.types import FitTask, TensorInputs, TrainingSettings
from tests.methods.tiny import NAMES, NOVEL, make_task, query, tiny_clip

BACKBONE = tiny_clip()
TEMPLATES = ("a photo of a {}.", "{} texture.")
SHORT = TrainingSettings(epochs=3, optimiser="adam", lr=1e-2, batch_size=8)


def drawn(**settings) -> TaskRes:
    method = TaskRes(BACKBONE, NAMES, templates=TEMPLATES, config=TaskResConfig(**settings))
    with torch.no_grad():
        method.residual.copy_(torch.randn(method.residual.shape, generator=torch.Generator().manual_seed(1)))
    return method


def plain_text(names) -> torch.Tensor:
    """Mean over templates of unnormalised text features, one prompt at a time."""
    rows = []
    for name in names:
        prompts = [template.format(name.replace("_", " ")) for template in TEMPLATES]
        rows.append(torch.stack([BACKBONE.text_features([prompt])[0] for prompt in prompts]).mean(dim=0))
    return torch.stack(rows)


def test_logits_and_gradients_are_the_plain_ones():
    method, features = drawn(), query(BACKBONE, "image_features")
    labels = torch.arange(len(features)) % len(NAMES)
    sum(method.losses(features, labels).values()).backward()
    residual = method.residual.detach().clone().requires_grad_()
    weights = F.normalize(plain_text(NAMES) + 0.5 * residual, dim=-1)
    logits = 20 * F.normalize(features, dim=-1) @ weights.T
    F.cross_entropy(logits, labels).backward()
    torch.testing.assert_close(method(features), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(method.residual.grad, residual.grad, rtol=1e-5, atol=1e-5)
    assert [name for name, _ in method.named_parameters()] == ["residual"]


def test_it_starts_at_zero_shot():
    features = query(BACKBONE, "image_features")
    with torch.no_grad():
        wanted = ZeroShot(BACKBONE, NAMES)(features)
        torch.testing.assert_close(TaskRes(BACKBONE, NAMES)(features), wanted, rtol=1e-5, atol=1e-5)


def test_text_features_are_not_normalised():
    text = TaskRes(BACKBONE, NAMES, templates=TEMPLATES).base_weights()
    torch.testing.assert_close(text, plain_text(NAMES), rtol=1e-5, atol=1e-5)
    assert (text.norm(dim=-1) - 1).abs().min() > 0.05


def test_unseen_classes_are_zero_shot_also_among_seen_ones():
    method, features = drawn(), query(BACKBONE, "image_features")
    names = (NOVEL[0], NAMES[2], NOVEL[1])
    with torch.no_grad():
        own, mixed = method(features), method.set_classes(names)(features)
    assert not method.uses_fallback
    text = F.normalize(plain_text(names), dim=-1)
    torch.testing.assert_close(method.class_weights()[[0, 2]], text[[0, 2]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[:, 1], own[:, 2], rtol=1e-5, atol=1e-5)


def test_underscores_are_kept_on_request():
    kept = TaskRes(BACKBONE, NAMES, config=TaskResConfig(keep_underscores=True)).base_weights()
    plain = mean_text_features(BACKBONE, NAMES, ("a photo of a {}.",))
    changed = [not torch.allclose(a, b, atol=1e-4) for a, b in zip(kept, plain, strict=True)]
    assert changed == ["_" in name for name in NAMES]


def test_the_search_keeps_the_best_alpha_and_counts():
    config = TaskResConfig(search_alpha=True)
    method = TaskRes(BACKBONE, NAMES, config=config)
    task = make_task(BACKBONE, "image_features")
    report = fit_method(method, task, SHORT)
    scores = {}
    for alpha in SEARCHED_ALPHAS:
        single = TaskRes(BACKBONE, NAMES, config=TaskResConfig(alpha=alpha))
        fit_method(single, task, SHORT)
        with torch.no_grad():
            scores[alpha] = float((single(task.val.values[0]).argmax(dim=1) == task.val.labels).float().mean())
    best = max(SEARCHED_ALPHAS, key=scores.__getitem__)
    assert len(scores) == report["settings_tried"] == 5
    assert (report["searched"], report["alpha"], report["val_accuracy"]) == (True, best, scores[best])
    assert float(method.alpha) == pytest.approx(best)
    without = fit_method(TaskRes(BACKBONE, NAMES, config=config), FitTask(NAMES, task.train), SHORT)
    assert (without["alpha"], without["searched"]) == (0.5, False)
    assert "no validation" in without["why_not_searched"]


def test_a_given_base_is_read_saved_and_used(tmp_path):
    base = torch.randn(len(NAMES), 16, generator=torch.Generator().manual_seed(3))
    path = tmp_path / "base.safetensors"
    write_safetensors(path, {"base": base})
    method = TaskRes(BACKBONE, NAMES, config=TaskResConfig(base=str(path)))
    fit_method(method, make_task(BACKBONE, "image_features"), TrainingSettings(epochs=0))
    torch.testing.assert_close(method.class_weights(), F.normalize(base, dim=-1))
    path.unlink()
    other = TaskRes(BACKBONE, NAMES, config=TaskResConfig(base=str(path)))
    other.load_adapter_state(method.adapter_state())
    torch.testing.assert_close(other.class_weights(), F.normalize(base, dim=-1))
    with pytest.raises(AdapterError, match="one row a class"):
        other.set_base(base[:2])
    with pytest.raises(ConfigError, match='"zero-shot"'):
        TaskRes(BACKBONE, NAMES).set_base(base)


def test_bad_input():
    with pytest.raises(ConfigError, match="alpha is 0"):
        TaskResConfig(alpha=0)
    one = TensorInputs(torch.ones(1, 2, 16), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(DataError, match="at least two classes"):
        fit_method(TaskRes(BACKBONE, NAMES[:1]), FitTask(NAMES[:1], one), SHORT)
    with pytest.raises(DataError, match="at least one image of every class"):
        fit_method(TaskRes(BACKBONE, NAMES), FitTask(NAMES, one), SHORT)
