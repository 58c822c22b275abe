"""GDA: its estimators against the reference's formulas written out, novel classes class by class, and bad input."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from adaptkit.errors import AdapterError, ConfigError, DataError, UnsupportedError
from adaptkit.methods.adapters.zero_shot import ZeroShot
from adaptkit.methods.caches import gda
from adaptkit.methods.caches.gda import GDA, GDAConfig, estimate, synthesise
from adaptkit.training.loop import fit_method
from adaptkit.types import FitTask, TensorInputs
from tests.methods.tiny import DIM, NAMES, NOVEL, make_task, query, tiny_clip

BACKBONE = tiny_clip()


def drawn(shots=4, views=3, seed=0, spread=1.0):
    numbers = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(NAMES)).repeat(shots)
    centres = torch.randn(len(NAMES), DIM, generator=torch.Generator().manual_seed(5))
    values = centres[labels] + spread * torch.randn(views, len(labels), DIM, generator=numbers)
    return TensorInputs(values, labels)


def samples_of(inputs):
    views = inputs.values[1:] if inputs.num_views > 1 else inputs.values
    return F.normalize(views, dim=-1).flatten(0, 1).double(), inputs.labels.repeat(len(views))


@pytest.mark.parametrize(("shots", "views"), [(4, 3), (1, 3), (5, 1)])
def test_the_shrunken_estimate_is_the_formula(shots, views, monkeypatch):
    monkeypatch.setattr(gda, "_ROWS", 3)
    inputs = drawn(shots, views)
    x, y = samples_of(inputs)
    means = torch.stack([x[y == k].mean(dim=0) for k in range(4)])
    centred = x - means[y]
    s = torch.cov(centred.T)  # divisor n - 1
    precision = DIM * torch.linalg.pinv((len(x) - 1) * s + s.trace() * torch.eye(DIM))
    found = estimate(inputs, NAMES)
    torch.testing.assert_close(found.means, means, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.precision, precision, rtol=1e-4, atol=1e-4)
    weight, bias = found.classifier()
    torch.testing.assert_close(weight.double(), means @ precision, rtol=1e-4, atol=1e-4)
    wanted = torch.stack([math.log(1 / 4) - 0.5 * m @ precision @ m for m in means])
    torch.testing.assert_close(bias.double(), wanted, rtol=1e-4, atol=1e-4)


def test_the_estimate_without_shrinkage_is_the_formula():
    inputs = drawn(shots=10)
    keep = torch.cat([torch.arange(20), torch.arange(20, 40, 2)])  # classes of different size
    inputs = TensorInputs(inputs.values[:, keep], inputs.labels[keep])
    x, y = samples_of(inputs)
    mean_covariance = torch.stack([torch.cov(x[y == k].T) for k in range(4)]).mean(dim=0)
    found = estimate(inputs, NAMES, shrinkage=False)
    torch.testing.assert_close(found.precision, torch.linalg.pinv(mean_covariance), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 40])
def test_novel_classes_are_the_formula_class_by_class(rows, monkeypatch):
    monkeypatch.setattr(gda, "_NOVEL_BYTES", rows * 3 * 8 * 6 * DIM)
    numbers = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(3, DIM, generator=numbers), dim=-1)
    features = F.normalize(torch.randn(30, DIM, generator=numbers), dim=-1)
    precisions, means = [], []
    for w in text:
        near = features[(features @ w).argsort(descending=True)[:6]].double()
        away = near - w
        c = away.T @ away / 5
        precisions.append(DIM * torch.linalg.pinv(5 * c + c.trace() * torch.eye(DIM, dtype=c.dtype)))
        means.append(torch.cat([near, w.double().expand(4, -1)]).mean(dim=0))
    found = synthesise(text, features, neighbours=6, copies=4)
    torch.testing.assert_close(found.means, torch.stack(means))
    torch.testing.assert_close(found.precision, torch.stack(precisions).mean(dim=0), rtol=1e-9, atol=1e-9)


def test_novel_classes_take_the_same_alpha_and_come_alone():
    task, features = make_task(BACKBONE, "image_features", views=3), query(BACKBONE, "image_features")
    method = GDA(BACKBONE, NAMES, config=GDAConfig(neighbours=8))
    fit_method(method, task)
    alpha = float(method.alpha)
    with torch.no_grad():
        f = F.normalize(features, dim=-1)
        text = method.set_classes(NOVEL).zero_shot()
        weight, bias = synthesise(text, samples_of(task.train)[0].float(), 8, 16).classifier()
        wanted = 100 * f @ text.T + alpha * (f @ weight.T + bias)
        torch.testing.assert_close(method(features), wanted, rtol=1e-4, atol=1e-3)
    with pytest.raises(UnsupportedError, match="different scales"):
        method.set_classes((NAMES[0], NOVEL[0]))
    assert method.class_names == NOVEL


def test_novel_classes_are_zero_shot_where_no_features_are_kept():
    method = GDA(BACKBONE, NAMES, config=GDAConfig(max_features=0))
    report = fit_method(method, make_task(BACKBONE, "image_features", views=3))
    features = query(BACKBONE, "image_features")
    assert report["kept_features"] == 0
    with torch.no_grad():
        assert torch.equal(method.set_classes(NOVEL)(features), ZeroShot(BACKBONE, NOVEL)(features))
    assert method.uses_fallback


@pytest.mark.parametrize(("most", "kept"), [(1000, 32), (40, 32), (31, 16), (16, 16), (7, 7)])
def test_what_is_kept_is_bounded(most, kept):
    method = GDA(BACKBONE, NAMES, config=GDAConfig(max_features=most))
    report = fit_method(method, make_task(BACKBONE, "image_features", views=3))
    assert report["kept_features"] == len(method.features) == kept
    assert report["samples"] == 32


def test_search_keeps_the_first_of_the_best():
    task = FitTask(NAMES, drawn(spread=2.0), drawn(seed=7, views=1, spread=2.0))
    method = GDA(BACKBONE, NAMES)
    report = fit_method(method, task)
    f, best, chosen = F.normalize(task.val.values[0], dim=-1), -1, None
    for exponent in range(-4, 3):
        logits = 100 * f @ method.zero_shot().T + 10.0**exponent * (f @ method.weight.T + method.bias)
        right = int((logits.argmax(dim=1) == task.val.labels).sum())
        if right > best:
            best, chosen = right, 10.0**exponent
    assert report["alpha"] == pytest.approx(chosen)
    assert (report["settings_tried"], report["val_images"]) == (7, 16)
    assert report["val_accuracy"] == best / 16
    assert fit_method(method, replace(task, val=None))["alpha"] == pytest.approx(0.1)  # a second fit starts over


def test_alpha_zero_and_before_the_fit_are_zero_shot():
    features = query(BACKBONE, "image_features")
    with torch.no_grad():
        wanted = ZeroShot(BACKBONE, NAMES)(features) * 100 / 20
        method = GDA(BACKBONE, NAMES, config=GDAConfig(alpha=0, search=False))
        torch.testing.assert_close(method(features), wanted)
        report = fit_method(method, make_task(BACKBONE, "image_features"))
        torch.testing.assert_close(method(features), wanted)
    assert report["why_not_searched"] == "search is off"


def test_equal_spread_in_all_directions_is_nearest_mean():
    numbers = torch.Generator().manual_seed(3)
    means = torch.randn(4, DIM, generator=numbers, dtype=torch.float64)
    weight, bias = gda.Gaussians(means, 7 * torch.eye(DIM, dtype=torch.float64)).classifier()
    x = torch.randn(50, DIM, generator=numbers)
    nearest = torch.cdist(x.double(), means).argmin(dim=1)
    assert torch.equal((x @ weight.T + bias).argmax(dim=1), nearest)


def test_order_of_the_classes_does_not_matter():
    inputs, order = drawn(), torch.tensor([2, 0, 3, 1])
    weight, bias = estimate(inputs, NAMES).classifier()
    place = order.argsort()
    other, other_bias = estimate(TensorInputs(inputs.values, place[inputs.labels]), NAMES).classifier()
    torch.testing.assert_close(other, weight[order])
    torch.testing.assert_close(other_bias, bias[order])


def test_bad_input():
    one_each = drawn(shots=1, views=1)
    with pytest.raises(DataError, match="only one sample of a class"):
        estimate(one_each, NAMES)
    with pytest.raises(DataError, match="same features"):
        estimate(TensorInputs(one_each.values.repeat(2, 1, 1)[[0, 0, 0]], one_each.labels), NAMES)
    with pytest.raises(DataError, match="none of 'river'"):
        estimate(TensorInputs(one_each.values[:, :2], one_each.labels[:2]), NAMES)
    with pytest.raises(DataError, match="two classes"):
        estimate(TensorInputs(one_each.values, one_each.labels * 0), NAMES[:1])
    broken = drawn()
    broken.values[1, 3, 0] = float("nan")
    with pytest.raises(DataError, match="Image 3"):
        estimate(broken, NAMES)
    with pytest.raises(ConfigError, match="alpha is -1, but must be 0 or more; neighbours is 1"):
        GDAConfig(alpha=-1, neighbours=1)
    method = GDA(BACKBONE, NAMES)
    with pytest.raises(AdapterError, match="another backbone"):
        method.load_adapter_state({**method.adapter_state(), "features": torch.zeros(3, DIM + 1)})
