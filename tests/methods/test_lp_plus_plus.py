"""LP++: its start, gradients and step sizes against plain ones, alpha's two gradients, the chosen epoch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adaptkit.errors import ConfigError, DataError
from adaptkit.methods.adapters.lp_plus_plus import LPPlusPlus, LPPlusPlusConfig, step_sizes
from adaptkit.methods.adapters.zero_shot import ZeroShot
from adaptkit.types import FitTask, TensorInputs
from tests.methods.tiny import NAMES, make_task, query, tiny_clip

BACKBONE = tiny_clip()


def started(**settings):
    method = LPPlusPlus(BACKBONE, NAMES, config=LPPlusPlusConfig(**settings))
    task = make_task(BACKBONE, "image_features")
    x = F.normalize(task.train.values[0], dim=-1)
    return method, method.start(x, task.train.labels), x, task.train.labels


def plain_run(method, x, labels, epochs, accumulate):
    """The sheet's loop by autograd, from the method's start."""
    text = ZeroShot(BACKBONE, NAMES).class_weights()
    weight, bias, alpha = (v.detach().clone().requires_grad_() for v in (method.weight, method.bias, method.alpha))
    lr_w = 4 * len(x) / float(torch.linalg.eigvalsh(x.T @ x)[-1])
    lr_alpha = len(x) / (4 * float((x @ text.T).square().sum(dim=0).max()))
    sgd = torch.optim.SGD([weight, bias], lr=lr_w, momentum=0.9)
    for epoch in range(epochs):
        loss = F.cross_entropy(x @ weight.T + bias + alpha * (x @ text.T), labels)
        sgd.zero_grad()
        if not accumulate:
            alpha.grad = None
        loss.backward()
        sgd.step()
        if (epoch + 1) % 10 == 0:
            with torch.no_grad():
                alpha -= lr_alpha * alpha.grad
    return weight, bias, alpha


@pytest.mark.parametrize("kind", ["accumulate", "fresh"])
def test_training_is_the_sheets(kind):
    method, support, x, labels = started(alpha_grad=kind, epochs=25)
    weight, bias, alpha = plain_run(method, x, labels, 25, kind == "accumulate")
    method.train_epochs(support)
    torch.testing.assert_close(method.weight.detach(), weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.bias.detach(), bias.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.alpha.detach(), alpha.detach(), rtol=1e-5, atol=1e-5)


def test_it_starts_at_the_sum_of_the_shots_and_one_alpha():
    method, _, x, labels = started()
    sums = torch.stack([x[labels == k].sum(dim=0) for k in range(len(NAMES))])
    torch.testing.assert_close(method.weight.detach(), sums, rtol=1e-5, atol=1e-5)
    cosines = x @ ZeroShot(BACKBONE, NAMES).class_weights().T
    means = torch.stack([cosines[labels == k, k].mean() for k in range(len(NAMES))])
    torch.testing.assert_close(method.alpha.detach(), (250 * means.mean()).expand(4), rtol=1e-5, atol=1e-5)


def test_the_loss_never_rises_without_momentum():
    method, support, _, _ = started(momentum=0.0, epochs=60, alpha_grad="fresh")
    losses = torch.tensor(method.train_epochs(support)["losses"])
    assert len(losses) == 60
    assert (losses.diff() <= 1e-6).all()


def test_the_largest_eigenvalue_is_found_from_either_side():
    for shape in ((40, 16), (9, 16)):
        x = F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(2)), dim=-1)
        lr_weight, _ = step_sizes(x, x[:, :3])
        v = torch.ones(16)
        for _ in range(2000):  # power iteration
            v = F.normalize(x.T @ (x @ v), dim=0)
        assert lr_weight == pytest.approx(4 * len(x) / float((x @ v).square().sum()), rel=1e-4)


def test_without_weights_it_answers_as_zero_shot():
    method, features = LPPlusPlus(BACKBONE, NAMES), query(BACKBONE, "image_features")
    with torch.no_grad():
        method.weight.zero_()
        method.bias.zero_()
        assert torch.equal(method(features).argmax(dim=1), ZeroShot(BACKBONE, NAMES)(features).argmax(dim=1))


def test_the_last_of_the_best_epochs_is_kept():
    task = make_task(BACKBONE, "image_features")
    method = LPPlusPlus(BACKBONE, NAMES, config=LPPlusPlusConfig(epochs=30))
    report = method.fit(task)
    again, scores = LPPlusPlus(BACKBONE, NAMES, config=LPPlusPlusConfig(epochs=30)), []

    def score(epoch):
        with torch.no_grad():
            scores.append(float((again(task.val.values[0]).argmax(dim=1) == task.val.labels).float().mean()))

    again.train_epochs(again.start(F.normalize(task.train.values[0], dim=-1), task.train.labels), after=score)
    assert len(scores) == report["settings_tried"] == 30
    assert report["val_accuracy"] == max(scores)
    assert report["chosen_epoch"] == max(i for i, s in enumerate(scores) if s == max(scores)) + 1
    score(0)
    without = method.fit(FitTask(NAMES, task.train))
    assert (without["searched"], "chosen_epoch" in without) == (False, False)


def test_unequal_shots():
    labels = torch.tensor([0, 0, 0, 1, 2, 3, 3])
    values = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(4))
    method = LPPlusPlus(BACKBONE, NAMES)
    method.fit(FitTask(NAMES, TensorInputs(values, labels)))
    assert torch.isfinite(method.weight).all()


def test_bad_input():
    with pytest.raises(ConfigError, match="accumulate or fresh"):
        LPPlusPlusConfig(alpha_grad="sum")
    with pytest.raises(ConfigError, match="epochs is 0"):
        LPPlusPlusConfig(epochs=0)
    one = TensorInputs(torch.ones(1, 2, 16), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(DataError, match="at least two classes"):
        LPPlusPlus(BACKBONE, NAMES[:1]).fit(FitTask(NAMES[:1], one))
    with pytest.raises(DataError, match="none of 'golden_retriever'"):
        LPPlusPlus(BACKBONE, NAMES).fit(FitTask(NAMES, one))
    broken = TensorInputs(torch.full((1, 4, 16), float("nan")), torch.arange(4))
    with pytest.raises(DataError, match="aren't finite"):
        LPPlusPlus(BACKBONE, NAMES).fit(FitTask(NAMES, broken))
