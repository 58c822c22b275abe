"""The linear probe: both solvers against each other and against scikit-learn, and the search of C step by step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from adaptkit.errors import ConfigError, DataError, UnsupportedError
from adaptkit.methods.adapters.linear_probe import MOST_FITS, Fit, LinearProbe, LinearProbeConfig, _search
from adaptkit.training.loop import fit_method
from adaptkit.types import FitTask, TensorInputs
from tests.methods.tiny import DIM, NAMES, NOVEL, image_only, make_task, query, tiny_clip

BACKBONE = tiny_clip()


def blobs(classes, shots, seed=0, spread=1.0):
    numbers = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(shots)
    centres = torch.randn(classes, DIM, generator=torch.Generator().manual_seed(77))
    return TensorInputs((centres[labels] + spread * torch.randn(len(labels), DIM, generator=numbers))[None], labels)


def fit(classes=4, shots=6, val=None, spread=1.0, **config):
    names = tuple(f"class {index}" for index in range(classes))
    method = LinearProbe(BACKBONE, names, config=LinearProbeConfig(**config))
    report = fit_method(method, FitTask(names, blobs(classes, shots, spread=spread), val))
    return method, report


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("c", [0.01, 0.316, 30.0])
def test_solvers_agree(classes, c):
    """Both minimise one objective; scikit-learn's own tolerance leaves it up to 0.05 off at C = 30, ours is exact."""
    ours, report = fit(classes, c=c, solver="torch-lbfgs")
    assert report["fits_not_converged"] == 0
    data = blobs(classes, 6)
    exact = LogisticRegression(C=c, max_iter=10_000, tol=1e-9).fit(data.values[0].double().numpy(), data.labels.numpy())
    weight, bias = torch.from_numpy(exact.coef_).float(), torch.from_numpy(exact.intercept_).float()
    if classes == 2:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    torch.testing.assert_close(ours.weight.data, weight, rtol=0, atol=2e-4)
    torch.testing.assert_close(ours.bias.data, bias, rtol=0, atol=2e-4)
    scikit, _ = fit(classes, c=c)
    torch.testing.assert_close(scikit.weight, ours.weight, rtol=0, atol=1e-3 if c < 1 else 0.1)


@pytest.mark.parametrize("classes", [2, 5])
def test_probabilities_are_scikit_learns(classes):
    method, _ = fit(classes, c=0.5)
    data = blobs(classes, 6)
    model = LogisticRegression(C=0.5, max_iter=1000).fit(data.values[0].numpy(), data.labels.numpy())
    features = blobs(classes, 3, seed=5).values[0]
    with torch.no_grad():
        ours = method(features).softmax(dim=1)
    np.testing.assert_allclose(ours, model.predict_proba(features.numpy()), atol=1e-5)


def test_features_are_not_normalised():
    method, _ = fit()
    features = query(BACKBONE, "image_features")
    with torch.no_grad():
        torch.testing.assert_close(method(2 * features), 2 * (method(features) - method.bias) + method.bias)


def test_weak_and_strong_regularisation():
    method, _ = fit(c=1e6)
    data = blobs(4, 6)
    with torch.no_grad():
        assert bool((method(data.values[0]).argmax(dim=1) == data.labels).all())
        prior, _ = fit(c=1e-9)
        torch.testing.assert_close(prior(data.values[0]).softmax(dim=1), torch.full((24, 4), 0.25), atol=1e-3, rtol=0)


# --- the search -------------------------------------------------------------------------------------------------------


def searched(accuracy_of_log10_c):
    """Search with fits whose validation accuracy is given: a fit that scores k of 100 images right."""
    tried = []

    def fit_at(c):
        tried.append(c)
        right = round(100 * accuracy_of_log10_c(math.log10(c)))
        return Fit(torch.tensor([[0.0], [1.0]]), torch.tensor([0.0, 0.0]), True), right

    # labels say class 1 for the first `right` images: emulate by a bias that depends on the fit is not possible, so the
    # features carry the image's number and the weight flips at it
    def as_fit(c):
        _, right = fit_at(c)
        return Fit(torch.tensor([[1.0], [-1.0]]), torch.tensor([-(right - 0.5), right - 0.5]), True)

    features = torch.arange(100.0)[:, None]  # image i is right where i < right
    return _search(as_fit, features, torch.ones(100, dtype=torch.int64)), tried


def test_coarse_ties_keep_the_first_and_fine_ties_the_left():
    report, _ = searched(lambda log_c: 0.5)  # all equal: 1e6 wins the coarse round, then always the left end
    assert report["c"] == pytest.approx(1e5)
    assert report["val_accuracy"] == 0.5


def test_search_follows_the_better_end():
    report, tried = searched(lambda log_c: 1 - abs(log_c - 2.6) / 20)
    # coarse: 1e2 (distance 0.6) over 1e4 (1.4); then bisection of [1, 3] towards 2.6
    assert abs(math.log10(report["c"]) - 2.6) < 2 * 2.0**-7 + 0.15  # accuracy has steps of 1 %: 0.2 in log10 C
    assert tried[:7] == [1e6, 1e4, 1e2, 1.0, 1e-2, 1e-4, 1e-6]


def test_the_last_step_counts():
    """Right is better while its end is 1e3; every later middle is worse, and the last step's winner is what is kept."""
    report, _ = searched(lambda log_c: 0.9 if abs(log_c - 2) < 1e-9 else 0.2 + 0.1 * (log_c > 1))
    left, right, winner = 1.0, 3.0, None
    for _ in range(8):
        better_right = (0.3 if right > 1 else 0.2) > (0.9 if abs(left - 2) < 1e-9 else 0.3 if left > 1 else 0.2)
        middle = 0.5 * (left + right)
        winner, left, right = (right, middle, right) if better_right else (left, left, middle)
    assert math.log10(report["c"]) == pytest.approx(winner)
    assert report["val_accuracy"] < 0.9


def test_search_uses_validation_and_counts_its_fits():
    method, report = fit(val=blobs(4, 2, seed=9), spread=2.0)
    assert report["searched"] is True
    assert report["val_images"] == 8
    assert report["fits"] <= MOST_FITS == 16
    again, _ = fit(c=report["c"], search=False, spread=2.0)
    assert torch.equal(method.weight, again.weight)


def test_without_validation_the_stated_default():
    _, report = fit()
    assert report == {
        "c": 0.316,
        "searched": False,
        "why_not_searched": "there are no validation images",
        "fits": 1,
        "fits_not_converged": 0,
    }


def test_a_fit_that_does_not_converge_is_counted():
    _, report = fit(c=1e4, max_iterations=1)
    assert report["fits_not_converged"] == 1


# --- classes and refusals ---------------------------------------------------------------------------------------------


def test_it_needs_no_text_and_then_refuses_novel_classes():
    backbone = image_only()
    task = make_task(backbone, "image_features")
    method = LinearProbe(backbone, NAMES)
    fit_method(method, task)
    with torch.no_grad():
        assert float((method(task.train.values[0]).argmax(dim=1) == task.train.labels).float().mean()) > 0.9
    assert method.novel_classes == "refused"
    with pytest.raises(UnsupportedError, match="can't predict 'snow leopard'"):
        method.set_classes(NOVEL)


def test_bad_tasks():
    names = ("a", "b", "c")
    method = LinearProbe(BACKBONE, names)
    with pytest.raises(DataError, match=r"none of 'c' \(1 such classes\)"):
        fit_method(method, FitTask(names, blobs(2, 3)))
    with pytest.raises(DataError, match="at least two classes"):
        fit_method(LinearProbe(BACKBONE, ("a",)), FitTask(("a",), blobs(1, 3)))
    broken = blobs(3, 2)
    broken.values[0, 4, 0] = float("inf")
    with pytest.raises(DataError, match="Training image 4"):
        fit_method(method, FitTask(names, broken))
    for config, said in (
        ({"solver": "sgd"}, "lbfgs or torch-lbfgs"),
        ({"c": 0}, "positive"),
        ({"max_iterations": 0}, "1"),
    ):
        with pytest.raises(ConfigError, match=said):
            LinearProbeConfig(**config)
