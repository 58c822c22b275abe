"""KgCoOp against a plain 77-token computation, what its knowledge term does, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.errors import ConfigError
from adaptkit.methods.prompts.coop import CoOp, CoOpConfig
from adaptkit.methods.prompts.kgcoop import KgCoOp, KgCoOpConfig
from adaptkit.training.loop import fit_method
from adaptkit.types import TrainingSettings
from tests.methods.plain_context import (
    BACKBONE,
    FEATURES,
    LABELS,
    PETS,
    TIGHT,
    frozen_weights,
    moved,
    plain_logits,
    plain_weights,
    siglip_like,
)
from tests.methods.tiny import NAMES, NOVEL, make_task


@settings(max_examples=10, deadline=None)
@given(
    words=st.sampled_from(["", "a photo of a", "a photo, of one", "a very_large photo of"]),
    num_context=st.integers(1, 4),
    weight=st.sampled_from([0.0, 1.0, 8.0]),
    seed=st.integers(0, 5),
)
def test_kgcoop_equals_the_plain_way(words, num_context, weight, seed):
    config = KgCoOpConfig(num_context=num_context, context_init=words, weight=weight)
    method = moved(KgCoOp(BACKBONE, NAMES, templates=[PETS], config=config, seed=seed), seed)
    context = method.context.detach().clone().requires_grad_()
    phrase = words.replace("_", " ") or " ".join(["X"] * num_context)
    weights = plain_weights(NAMES, context, phrase)
    terms = method.losses(FEATURES, LABELS)
    entropy = F.cross_entropy(plain_logits(FEATURES, weights), LABELS)
    knowledge = weight * (1 - F.cosine_similarity(weights, frozen_weights(NAMES, PETS), dim=-1).mean())
    torch.testing.assert_close(terms["cross_entropy"], entropy, **TIGHT)
    torch.testing.assert_close(terms["knowledge"], knowledge, **TIGHT)
    method.backward(terms, lambda loss: loss)
    (entropy + knowledge).backward()
    torch.testing.assert_close(
        method.context.grad, context.grad, rtol=1e-5, atol=1e-5 * float(context.grad.abs().max())
    )
    with torch.no_grad():
        novel = plain_logits(FEATURES, plain_weights(NOVEL, context, phrase))
        torch.testing.assert_close(method.set_classes(NOVEL)(FEATURES), novel, rtol=1e-5, atol=1e-4)


def test_kgcoop_starts_at_the_hand_crafted_prompts_unless_they_have_a_hint():
    method = KgCoOp(BACKBONE, NAMES)
    assert float(method.losses(FEATURES, LABELS)["knowledge"].detach()) == pytest.approx(0, abs=1e-5)
    hinted = KgCoOp(BACKBONE, NAMES, templates=[PETS])
    assert float(hinted.losses(FEATURES, LABELS)["knowledge"].detach()) > 1e-3


def test_kgcoop_averages_over_all_classes_whatever_the_batch_holds():
    method = moved(KgCoOp(BACKBONE, NAMES))
    whole = method.losses(FEATURES, LABELS)["knowledge"]
    assert torch.equal(method.losses(FEATURES[:1], LABELS[:1])["knowledge"], whole)


def test_kgcoop_writes_dtds_anchors_as_its_reference_does():
    method = KgCoOp(BACKBONE, NAMES, templates=["{} texture."])
    torch.testing.assert_close(
        method.zero_shot(), frozen_weights(NAMES, "a photo of a {}, a type of texture."), **TIGHT
    )
    assert KgCoOp(BACKBONE, NAMES, templates=method.templates).templates == method.templates  # saved and loaded again


def test_kgcoop_without_weight_trains_as_coop_does():
    task, training = make_task(BACKBONE, "image_features"), TrainingSettings(epochs=3, batch_size=8, lr=1e-2)
    ours = KgCoOp(BACKBONE, NAMES, config=KgCoOpConfig(weight=0.0))
    theirs = CoOp(BACKBONE, NAMES, config=CoOpConfig(context_init="a photo of a"))
    start = ours.context.detach().clone()
    ours.name = theirs.name  # the batches are drawn by the method's name
    report = fit_method(ours, task, training)
    fit_method(theirs, task, training)
    torch.testing.assert_close(ours.context, theirs.context)
    assert not torch.equal(ours.context, start)
    assert all(0 <= accuracy <= 1 for accuracy in report["accuracies"])  # the loop sees the logits


def test_kgcoop_stays_nearer_to_the_hand_crafted_prompts_than_coop():
    task, training = make_task(BACKBONE, "image_features"), TrainingSettings(epochs=20, batch_size=16, lr=0.1)
    distance = {}
    for weight in (0.0, 8.0):
        method = KgCoOp(BACKBONE, NAMES, config=KgCoOpConfig(weight=weight))
        fit_method(method, task, training)
        with torch.no_grad():
            distance[weight] = float(1 - (method.class_weights() * method.zero_shot()).sum(dim=-1).mean())
    assert distance[8.0] < 0.5 * distance[0.0]


def test_on_a_text_tower_without_a_causal_mask():
    method = moved(KgCoOp(siglip_like(), ["one bird", "dog"]))
    method.backward(method.losses(FEATURES, LABELS % 2), lambda loss: loss)
    assert float(method.context.grad.norm()) > 0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_context": 0}, "num_context is 0, but must be at least 1"),
        ({"weight": -1.0}, "weight is -1.0, but must be 0 or a positive number"),
        ({"weight": float("nan")}, "weight is nan"),
    ],
)
def test_bad_settings(values, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        KgCoOpConfig(**values)


def test_a_phrase_shorter_than_the_context_is_refused():
    with pytest.raises(ConfigError, match=r"'a photo of a' has 4 tokens, fewer than the 16 context vectors"):
        KgCoOp(BACKBONE, NAMES, config=KgCoOpConfig(num_context=16))
