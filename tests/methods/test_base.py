"""What the base classes do for every method: names, templates, the zero-shot classifier, remembered weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adaptkit.errors import BackboneError, ConfigError, DataError
from adaptkit.methods.adapters.zero_shot import ZeroShot
from adaptkit.methods.base import check_names, check_templates, draw_linear, read_all, zero_shot_weights
from adaptkit.methods.prompts.coop import CoOp, CoOpConfig
from adaptkit.types import TensorInputs
from tests.methods.tiny import DIM, NAMES, NOVEL, make_task, query, tiny_clip


@pytest.fixture(scope="module")
def backbone():
    return tiny_clip()


def test_ensemble_is_normalised_averaged_normalised(backbone):
    templates = ("a photo of a {}.", "{} texture.")
    wanted = []
    for name in NAMES:
        texts = [template.format(name.replace("_", " ")) for template in templates]
        rows = F.normalize(backbone.encode_text(backbone.tokenize(texts)), dim=-1)
        wanted.append(F.normalize(rows.mean(dim=0), dim=-1))
    torch.testing.assert_close(zero_shot_weights(backbone, NAMES, templates), torch.stack(wanted))


def test_zero_shot_logits_and_classes(backbone):
    method = ZeroShot(backbone, NAMES)
    features = query(backbone, "image_features")
    logits = method(features)
    wanted = 20.0 * F.normalize(features, dim=-1) @ zero_shot_weights(backbone, NAMES, method.templates).T
    torch.testing.assert_close(logits, wanted)
    assert torch.equal(method(features * 7.0).argmax(dim=1), logits.argmax(dim=1))
    assert method.set_classes(NOVEL)(features).shape == (9, 3)
    assert method.num_trained() == 0
    assert method.fit(make_task(backbone, "image_features")) == {"templates": 1}


def test_the_text_tower_runs_once_for_one_list_of_classes(backbone, monkeypatch):
    calls = []
    original = type(backbone).encode_text
    monkeypatch.setattr(type(backbone), "encode_text", lambda self, tokens: calls.append(1) or original(self, tokens))
    method = ZeroShot(backbone, ("one", "two"))
    for _ in range(3):
        method(query(backbone, "image_features"))
    assert len(calls) == 1


def test_learned_weights_are_remembered_until_they_change(backbone, monkeypatch):
    method = CoOp(backbone, NAMES, config=CoOpConfig(num_context=2))
    calls = []
    original = CoOp.class_weights
    monkeypatch.setattr(CoOp, "class_weights", lambda self: calls.append(1) or original(self))
    features = query(backbone, "image_features")
    with torch.no_grad():
        first = method(features)
        assert torch.equal(first, method(features))
        assert len(calls) == 1
        method.context.add_(0.1)
        assert not torch.equal(first, method(features))
        assert len(calls) == 2
        method.set_classes(NOVEL)
        method(features)
        assert len(calls) == 3
    method(features).sum().backward()  # with gradients nothing is remembered
    assert len(calls) == 4
    assert method.context.grad is not None


def test_zero_shot_weights_made_in_inference_mode_serve_training(backbone):
    from adaptkit.methods.adapters.clip_adapter import CLIPAdapter

    method = CLIPAdapter(backbone, ("fox", "hen"))
    features = query(backbone, "image_features")
    with torch.inference_mode():
        method(features)
    method(features.clone()).sum().backward()
    assert method.down.weight.grad is not None


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "No class names were given"),
        (["cat", ""], "Class 1 has an empty name"),
        (["cat", "dog", "cat"], r"Class name 'cat' occurs 2 times: make the names unique"),
    ],
)
def test_bad_class_names(names, said):
    with pytest.raises(DataError, match=said):
        check_names(names)


def test_templates():
    assert check_templates("a {}") == ("a {}",)
    for wrong in ((), ("no place",), ("{} and {}",), ("{0}",), ("{name}",), ("{} {",)):
        with pytest.raises(ConfigError):
            check_templates(wrong)


def test_a_name_that_does_not_fit_leaves_the_old_classes(backbone):
    method = CoOp(backbone, NAMES, config=CoOpConfig(num_context=2))
    with pytest.raises(DataError):
        method.set_classes(["word " * 80, "cat"])
    assert method.class_names == NAMES
    assert method(query(backbone, "image_features")).shape == (9, 4)


def test_features_that_are_not_finite_are_named(backbone):
    values = torch.zeros(1, 3, DIM)
    values[0, 1, 2] = float("nan")
    with pytest.raises(DataError, match=r"Image 1 has features that aren't finite"):
        read_all(TensorInputs(values, torch.zeros(3, dtype=torch.int64)))


def test_linear_draws():
    layer = draw_linear(64, 1000, torch.Generator().manual_seed(0)).requires_grad_(False)
    assert float(layer.weight.abs().max()) <= 64**-0.5
    assert float(layer.weight.std()) == pytest.approx(64**-0.5 / 3**0.5, rel=0.02)  # uniform
    assert float(layer.bias.abs().max()) == pytest.approx(64**-0.5, rel=0.05)
    assert draw_linear(4, 4, torch.Generator(), bias=False).bias is None


def test_long_texts_are_refused_by_name(backbone):
    with pytest.raises(BackboneError, match="too long"):
        ZeroShot(backbone, ["word " * 90])(query(backbone, "image_features"))
