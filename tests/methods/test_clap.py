"""CLAP and ZS-LP: the start, the multipliers, the penalty and its gradient, the heap of views."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from adaptkit.errors import ConfigError, DataError
from adaptkit.methods.adapters.clap import CLAP, CLAPConfig
from adaptkit.methods.adapters.zero_shot import ZeroShot
from adaptkit.methods.adapters.zs_lp import ZSLP
from adaptkit.training.loop import fit_method
from adaptkit.types import FitTask, TensorInputs, TrainingSettings
from tests.methods.tiny import NAMES, NOVEL, make_task, query, tiny_clip

BACKBONE = tiny_clip()
SHORT = TrainingSettings(epochs=4, lr=0.1, weight_decay=0.0, batch_size=256, warmup_epochs=0)


def moved(constraint: str) -> CLAP:
    """With a residual, and multipliers of the tiny task's shots."""
    method = CLAP(BACKBONE, NAMES, config=CLAPConfig(constraint))
    method.set_multipliers(make_task(BACKBONE, "image_features", views=3).train)
    with torch.no_grad():
        method.residual.copy_(0.3 * torch.randn(method.residual.shape, generator=torch.Generator().manual_seed(1)))
    return method


@pytest.mark.parametrize("kind", [CLAP, ZSLP])
def test_it_starts_at_zero_shot(kind):
    features = query(BACKBONE, "image_features")
    with torch.no_grad():
        torch.testing.assert_close(
            kind(BACKBONE, NAMES)(features), ZeroShot(BACKBONE, NAMES)(features), rtol=1e-5, atol=1e-5
        )


def test_multipliers_are_zero_shots_mean_probabilities_over_augmented_views():
    task, method = make_task(BACKBONE, "image_features", views=3), moved("l2")
    values, labels = task.train.values, task.train.labels
    with torch.no_grad():
        p = torch.stack([ZeroShot(BACKBONE, NAMES)(view).softmax(dim=-1) for view in values[1:]])  # the plain one: no
    wanted = torch.stack([p[:, labels == k, k].mean() for k in range(len(NAMES))])
    torch.testing.assert_close(method.multipliers, wanted, rtol=1e-5, atol=1e-5)
    assert ((wanted >= 0) & (wanted <= 1)).all()
    torch.testing.assert_close(moved("l2-balanced").multipliers, torch.ones(4))
    torch.testing.assert_close(moved("l2-constant").multipliers, wanted.mean().expand(4), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved("l2-corrected").multipliers, wanted / wanted.mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_the_penalty_is_the_sheets(distance):
    method, features = moved(distance), query(BACKBONE, "image_features")
    labels = torch.arange(len(features)) % len(NAMES)
    text, x = method.base_weights(), method.residual.detach()
    if distance == "l2":
        distances = x.square().sum(dim=-1)
    else:
        distances = 1 - (F.normalize(text + x, dim=-1) * F.normalize(text, dim=-1)).sum(dim=-1)
    terms = method.losses(features, labels)
    torch.testing.assert_close(terms["constraint"], (method.multipliers * distances).mean(), rtol=1e-5, atol=1e-5)
    terms["constraint"].backward()
    if distance == "l2":
        wanted = 2 * method.multipliers[:, None] * x / len(NAMES)
        torch.testing.assert_close(method.residual.grad, wanted, rtol=1e-5, atol=1e-5)
    assert set(ZSLP(BACKBONE, NAMES).losses(features, labels)) == {"ce"}


def test_adaptative_multipliers_grow_after_an_epoch_and_others_stay():
    plain, growing = moved("l2"), moved("l2-adaptative")
    before, squared = growing.multipliers.clone(), growing.residual.detach().square().sum(dim=-1)
    for _ in range(2):
        plain.after_epoch(0, 2)
        growing.after_epoch(0, 2)
    torch.testing.assert_close(growing.multipliers, before + squared * squared)
    torch.testing.assert_close(plain.multipliers, before)


def test_a_huge_multiplier_keeps_the_text_features(monkeypatch):
    task = make_task(BACKBONE, "image_features", views=3)
    free = ZSLP(BACKBONE, NAMES)
    fit_method(free, task, SHORT)
    held = CLAP(BACKBONE, NAMES)
    monkeypatch.setattr(held, "set_multipliers", lambda inputs: held.multipliers.fill_(1e6))
    fit_method(held, task, replace(SHORT, lr=1e-7))
    assert free.residual.norm() > 1e-2
    assert held.residual.norm() < 1e-6


def test_few_shots_fill_the_batch_with_several_views():
    task, seen = make_task(BACKBONE, "image_features", views=5), []
    method = ZSLP(BACKBONE, NAMES)
    method.register_forward_hook(lambda _module, given, _out: seen.append(given[0]))
    report = fit_method(method, task, replace(SHORT, batch_size=40))
    assert [len(batch) for batch in seen] == [40] * 4  # one step an epoch, of 16 images · 4 augmented views
    assert report["batch_size"] == 40
    assert report["steps"] == 4
    pool = {tuple(row.tolist()) for row in task.train.values[1:].flatten(0, 1)}
    rows = [tuple(row.tolist()) for row in seen[0]]
    assert len(set(rows)) == 40
    assert set(rows) <= pool
    seen.clear()
    fit_method(method, task, replace(SHORT, batch_size=8))  # enough images: the usual epoch
    assert [len(batch) for batch in seen] == [8, 8] * 4
    assert method._pool is None


def test_unseen_classes_keep_their_text_features():
    method = moved("l2").set_classes(NOVEL)
    wanted = ZeroShot(BACKBONE, NOVEL).class_weights()
    torch.testing.assert_close(method.class_weights(), wanted, rtol=1e-5, atol=1e-5)


def test_bad_input():
    for wrong in ("l1", "l2-balance", "", "balanced-l2"):
        with pytest.raises(ConfigError, match="l2 or cosine"):
            CLAPConfig(wrong)
    labels = torch.arange(4)
    broken = TensorInputs(torch.full((1, 4, 16), float("nan")), labels)
    with pytest.raises(DataError, match="aren't finite"):
        fit_method(CLAP(BACKBONE, NAMES), FitTask(NAMES, broken), SHORT)
    one = TensorInputs(torch.ones(1, 2, 16), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(DataError, match="at least two classes"):
        fit_method(CLAP(BACKBONE, NAMES[:1]), FitTask(NAMES[:1], one), SHORT)
