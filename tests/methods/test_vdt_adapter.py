"""VDT-Adapter: its forward pass and gradients written out, ragged sentences, and the search of its ratio."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from adaptkit.errors import ConfigError, DataError
from adaptkit.methods.descriptions.vdt_adapter import SEARCHED_RATIOS, VDTAdapter, VDTAdapterConfig
from adaptkit.methods.importing import import_reference
from adaptkit.training.loop import fit_method
from adaptkit.types import TrainingSettings
from tests.methods.tiny import DESCRIPTIONS, DIM, NAMES, NOVEL, make_task, query, tiny_clip

BACKBONE = tiny_clip()
FEATURES = query(BACKBONE, "image_features")
QUICK = TrainingSettings(epochs=3, batch_size=8, lr=1e-2)


def vdt(descriptions=DESCRIPTIONS, seed=0, **settings):
    return VDTAdapter(BACKBONE, NAMES, config=VDTAdapterConfig(**settings), seed=seed, descriptions=descriptions)


def plain_weights(method, names):
    """Each class on its own, as many sentences as it has."""
    rows = []
    for name in names:
        x = BACKBONE.text_features(DESCRIPTIONS[name])  # [M, dim]
        q, k, v = (x @ layer.weight.T for layer in (method.query, method.key, method.value))
        a = ((q @ k.T) / math.sqrt(DIM // 4)).softmax(dim=-1)
        h = a @ v @ method.output.weight.T + method.output.bias
        y = 2 * (0.2 * h + 0.8 * x)
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        y = y * method.norm.weight + method.norm.bias
        rows.append(F.normalize(y.mean(dim=0), dim=-1))
    return torch.stack(rows)


def test_forward_and_gradients_are_the_sheets():
    method, labels = vdt(), torch.arange(9) % 4
    assert len({len(DESCRIPTIONS[name]) for name in NAMES}) == 2  # ragged: padding must not count
    logits = 20 * F.normalize(FEATURES, dim=-1) @ plain_weights(method, NAMES).T
    torch.testing.assert_close(method(FEATURES), logits, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(F.cross_entropy(logits, labels), list(method.parameters()))
    (loss,) = method.losses(FEATURES, labels).values()
    found = torch.autograd.grad(loss, list(method.parameters()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        novel = 20 * F.normalize(FEATURES, dim=-1) @ plain_weights(method, NOVEL).T
        torch.testing.assert_close(method.set_classes(NOVEL)(FEATURES), novel, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapter", ["linear", "linear-residual"])
def test_linear_adapters(adapter):
    method = vdt(adapter=adapter, ratio=0.3)
    means = torch.stack([BACKBONE.text_features(DESCRIPTIONS[name]).mean(dim=0) for name in NAMES])
    adapted = F.relu(F.relu(means @ method.down.weight.T) @ method.up.weight.T)
    wanted = adapted if adapter == "linear" else 0.3 * adapted + 0.7 * means
    torch.testing.assert_close(method.class_weights(), F.normalize(wanted, dim=-1), rtol=1e-5, atol=1e-6)
    assert method.num_trained() == 2 * DIM * DIM // 4


@pytest.mark.parametrize("renormalise", [False, True])
def test_zero_shot_with_sentences(renormalise):
    method = vdt(adapter="none", renormalise=renormalise)
    means = torch.stack([F.normalize(BACKBONE.text_features(DESCRIPTIONS[n]), dim=-1).mean(dim=0) for n in NAMES])
    wanted = F.normalize(means, dim=-1) if renormalise else means
    torch.testing.assert_close(method.class_weights(), wanted, rtol=1e-5, atol=1e-6)
    assert method.num_trained() == 0
    assert fit_method(method, make_task(BACKBONE, "image_features"))["sentences"] == 10


def test_parameters_and_start():
    method = vdt()
    assert method.num_trained() == DIM**2 + 3 * DIM
    assert torch.equal(method.norm.weight, torch.ones(DIM))
    assert method.output.bias.abs().max().item() <= (DIM // 4) ** -0.5
    assert torch.equal(vdt(seed=1).query.weight, vdt(seed=1).query.weight)
    assert not torch.equal(vdt(seed=1).query.weight, vdt(seed=2).query.weight)
    big = VDTAdapter(tiny_clip(), NAMES, config=VDTAdapterConfig(reduction=1), descriptions=DESCRIPTIONS)
    assert big.query.weight.std().item() == pytest.approx((2 / (2 * DIM)) ** 0.5, rel=0.2)  # Xavier, gain 1
    assert big.value.weight.std().item() == pytest.approx(0.67 * (2 / (2 * DIM)) ** 0.5, rel=0.2)


def test_order_means_nothing_and_evaluation_is_deterministic():
    turned = vdt({name: given[::-1] for name, given in DESCRIPTIONS.items()})
    torch.testing.assert_close(turned.class_weights(), vdt().class_weights(), rtol=1e-5, atol=1e-6)
    method = vdt()
    assert torch.equal(method.class_weights(), method.class_weights())
    method.train()
    assert not torch.equal(method.class_weights(), method.class_weights())  # both dropouts are on


def test_ratio_zero_is_not_zero_shot():
    """The layer norm stays: text features are standardised channel by channel."""
    none = vdt(ratio=0.0)
    plain = F.normalize(torch.stack([BACKBONE.text_features(DESCRIPTIONS[n]).mean(dim=0) for n in NAMES]), dim=-1)
    assert not torch.allclose(none.class_weights(), plain, atol=1e-2)


def test_the_ratio_is_searched_on_validation_alone():
    method, task = vdt(search_ratio=True), make_task(BACKBONE, "image_features", views=2)
    report = fit_method(method, task, QUICK)
    accuracies = {}
    for ratio in SEARCHED_RATIOS:
        alone = vdt(ratio=ratio)
        fit_method(alone, task, QUICK)
        with torch.no_grad():
            right = alone(task.val.values[0]).argmax(dim=1) == task.val.labels
        accuracies[ratio] = float(right.float().mean())
    best = max(SEARCHED_RATIOS, key=accuracies.get)
    assert report["ratio"] == pytest.approx(best)
    assert report["val_accuracy"] == accuracies[best]
    assert (report["settings_tried"], report["searched"]) == (5, True)
    alone = vdt(ratio=best)
    fit_method(alone, task, QUICK)
    assert torch.equal(method(FEATURES), alone(FEATURES))


def test_without_validation_the_ratio_stays():
    report = fit_method(vdt(search_ratio=True), make_task(BACKBONE, "image_features", val=False), QUICK)
    assert report["ratio"] == pytest.approx(0.2)
    assert (report["settings_tried"], report["searched"]) == (0, False)
    assert report["why_not_searched"] == "there are no validation images"


def test_training_helps():
    method, task = vdt(), make_task(BACKBONE, "image_features", shots=8)
    labels, features = task.train.labels, task.train.values[0]
    before = F.cross_entropy(method(features), labels).item()
    fit_method(method, task, TrainingSettings(epochs=60, batch_size=8, lr=1e-1))
    assert F.cross_entropy(method(features), labels).item() < 0.9 * before


def test_features_that_are_not_finite():
    task = make_task(BACKBONE, "image_features")
    task.val.values[0, 3] = float("nan")
    with pytest.raises(DataError, match="Validation image 3 "):
        fit_method(vdt(search_ratio=True), task, QUICK)


def test_bad_settings():
    for settings, says in (
        ({"adapter": "x"}, "adapter is 'x'"),
        ({"ratio": 1.1}, "ratio is 1.1"),
        ({"reduction": 0}, "reduction is 0"),
        ({"adapter": "linear", "search_ratio": True}, "the adapter 'linear' has none"),
    ):
        with pytest.raises(ConfigError, match=says):
            VDTAdapterConfig(**settings)
    with pytest.raises(ConfigError, match="reduction 17 leaves nothing"):
        vdt(reduction=17)
    with pytest.raises(DataError, match="vdt-adapter reads descriptions"):
        vdt({})


def test_reference_settings():
    state = {"adapter.attn.w_qs.weight": torch.zeros(8, 32)}
    assert VDTAdapter.reference_settings(state) == {"adapter": "self-attention", "reduction": 4}
    assert VDTAdapter.reference_settings({"adapter.fc.0.weight": torch.zeros(4, 16)})["adapter"] == "linear"
    assert VDTAdapter.reference_settings({}) == {}


def test_a_release_of_the_reference_is_imported(tmp_path):
    """Its file holds the adapter alone, without the name of the model's part around it."""
    trained = vdt(seed=3)
    state = {trained.reference_key(key).partition(".")[2]: value for key, value in trained.named_parameters()}
    imported = import_reference("vdt-adapter", state, BACKBONE, NAMES, descriptions=DESCRIPTIONS)
    assert torch.equal(imported.model.method(FEATURES), trained(FEATURES))
    with pytest.raises(DataError, match="vdt-adapter reads descriptions"):
        import_reference("vdt-adapter", state, BACKBONE, NAMES)
