"""ProGrad against a plain 77-token computation: losses, the projection, its start, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from adaptkit.errors import ConfigError
from adaptkit.methods.prompts.prograd import ProGrad, ProGradConfig, hint_first, without_conflict
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
from tests.methods.tiny import NAMES, make_task, tiny_clip


def plain_prograd(method, labels, context, phrase, template, temperature, share):
    """Losses and the context's gradient, computed as the sheet writes them."""
    weights = plain_weights(NAMES, context, phrase)
    z, q = plain_logits(FEATURES, weights), plain_logits(FEATURES, frozen_weights(NAMES, template))
    entropy = F.cross_entropy(z, labels)
    soft = (q / temperature).softmax(dim=-1)
    distillation = -(temperature**2) / len(z) * (soft * (z / temperature).log_softmax(dim=-1)).sum()
    (teacher,) = torch.autograd.grad(distillation, context, retain_graph=True)
    (ours,) = torch.autograd.grad(entropy, context)
    direction = teacher / teacher.norm()
    along = (ours * direction).sum()
    conflict = bool(along < 0)
    return entropy, distillation, ours - share * along * direction if conflict else ours, conflict


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("share", [1.0, 0.8, 0.0])
def test_prograd_equals_the_plain_way_with_and_without_conflict(temperature, share):
    config = ProGradConfig(num_context=10, temperature=temperature, projection=share)
    method = moved(ProGrad(BACKBONE, NAMES, templates=[PETS], config=config))
    context = method.context.detach().clone().requires_grad_()
    seen = set()
    with torch.no_grad():
        agreeing = plain_logits(FEATURES, frozen_weights(NAMES, hint_first(PETS))).argmax(dim=-1)
        opposed = plain_logits(FEATURES, frozen_weights(NAMES, hint_first(PETS))).argmin(dim=-1)
    for labels in (agreeing, opposed):
        wanted = plain_prograd(
            method, labels, context, "X X a type of pet, a photo of a", hint_first(PETS), temperature, share
        )
        terms = method.losses(FEATURES, labels)
        torch.testing.assert_close(terms["cross_entropy"], wanted[0], **TIGHT)
        torch.testing.assert_close(terms["distillation"], wanted[1], **TIGHT)
        method.backward(terms, lambda loss: loss)
        tolerance = {"rtol": 1e-5, "atol": 1e-5 * float(wanted[2].abs().max())}
        torch.testing.assert_close(method.context.grad, wanted[2], **tolerance)
        seen.add(wanted[3])
    assert seen == {False, True}


def test_the_projection():
    ours, theirs = torch.tensor([[3.0, -4.0]]), torch.tensor([[0.0, 2.0]])
    assert without_conflict(ours, theirs, 1.0).tolist() == [[3.0, 0.0]]
    assert without_conflict(ours, theirs, 0.5).tolist() == [[3.0, -2.0]]
    assert torch.equal(without_conflict(-ours, theirs, 1.0), -ours)  # no conflict
    assert torch.equal(without_conflict(ours, torch.zeros(1, 2), 1.0), ours)  # no direction
    assert torch.equal(without_conflict(ours, torch.tensor([[1.0, 0.75]]), 1.0), ours)  # at right angles
    assert without_conflict(ours, 1e-30 * theirs, 1.0).tolist() == [[3.0, 0.0]]
    assert without_conflict(ours, 1e30 * theirs, 1.0).tolist() == [[3.0, 0.0]]
    assert not torch.isfinite(without_conflict(ours, torch.tensor([[0.0, float("inf")]]), 1.0)).all()


def test_prograd_with_scaled_losses():
    """A scaler's factor passes through: the gradient is the factor times the unscaled one."""
    method = moved(ProGrad(BACKBONE, NAMES))
    opposed = plain_logits(FEATURES, method.zero_shot()).argmin(dim=-1)
    method.backward(method.losses(FEATURES, opposed), lambda loss: loss)
    plain = method.context.grad.clone()
    method.backward(method.losses(FEATURES, opposed), lambda loss: 1024 * loss)
    torch.testing.assert_close(method.context.grad, 1024 * plain)


def test_prograd_where_the_teacher_has_nothing_to_say():
    """The teacher's loss has a gradient of exactly zero: the labels' is taken as it is."""
    method = moved(ProGrad(BACKBONE, NAMES))
    terms = method.losses(FEATURES, LABELS)
    method.backward(terms | {"distillation": 0 * method.context.sum()}, lambda loss: loss)
    ours = method.context.grad.clone()
    method.zero_grad()
    method.losses(FEATURES, LABELS)["cross_entropy"].backward()
    assert torch.equal(ours, method.context.grad)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_prograd_trains_in_every_precision(precision):
    training = TrainingSettings(epochs=4, batch_size=8, lr=1e-2, precision=precision)
    method = ProGrad(BACKBONE, NAMES)
    start = method.context.detach().clone()
    report = fit_method(method, make_task(BACKBONE, "image_features"), training)
    assert report["skipped_steps"] == 0
    assert set(report["loss_terms"]) == {"cross_entropy", "distillation"}
    assert not torch.equal(method.context, start)
    assert torch.isfinite(method.context).all()


def test_prograd_in_chunks():
    """Two backward passes through recomputed chunks of rows."""
    backbone = tiny_clip()
    method = moved(ProGrad(backbone, NAMES))
    opposed = plain_logits(FEATURES, method.zero_shot()).argmin(dim=-1)
    method.backward(method.losses(FEATURES, opposed), lambda loss: loss)
    whole = method.context.grad.clone()
    backbone.text_tower.activation_bytes = 1
    method.backward(method.losses(FEATURES, opposed), lambda loss: loss)
    torch.testing.assert_close(method.context.grad, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (PETS, "a type of pet, a photo of a {}."),
        ("a photo of {}, a type of food.", "a type of food, a photo of {}."),
        ("{} texture.", "a texture of {}."),
        ("a centered satellite photo of {}.", "a centered satellite photo of {}."),
        ("a type of pet, a photo of a {}.", "a type of pet, a photo of a {}."),
        ("a photo of a {}, ", "a photo of a {}, "),
        ("{}", "{}"),
    ],
)
def test_hints_move_to_the_front(template, wanted):
    assert hint_first(template) == wanted
    assert hint_first(wanted) == wanted  # a saved adapter's templates are moved already


def test_prograd_starts_from_its_templates_words_behind_zeros():
    method = ProGrad(BACKBONE, NAMES, templates=[PETS])
    pieces = BACKBONE.word_pieces("a type of pet, a photo of a")
    assert len(pieces) == 9  # eight words: the comma is a token of its own
    assert torch.equal(method.context[:8], torch.zeros(8, 16))
    assert torch.equal(method.context[8:], BACKBONE.text.token_embedding.weight[pieces[:8]])
    row = method._rows.symbols[0].tolist()
    assert row[1:17] == [-1 - slot for slot in range(16)]
    assert row[17] == pieces[8]  # the ninth token stays, as a frozen word, before the name
    assert row[18:20] == BACKBONE.word_pieces("tabby cat")
    torch.testing.assert_close(method.zero_shot(), frozen_weights(NAMES, "a type of pet, a photo of a {}."), **TIGHT)


def test_prograds_other_starts():
    words = ProGrad(BACKBONE, NAMES, templates=[PETS], config=ProGradConfig(num_context=4, context_init="a_photo of a"))
    assert torch.equal(words.context, BACKBONE.text.token_embedding.weight[BACKBONE.word_pieces("a photo of a")])
    drawn = ProGrad(BACKBONE, NAMES, config=ProGradConfig(context_init=" "))
    assert float(drawn.context.detach().std()) == pytest.approx(0.02, rel=0.15)
    bare = ProGrad(BACKBONE, NAMES, templates=["{}"])  # no words at all
    assert torch.equal(bare.context, torch.zeros(16, 16))
    with pytest.raises(
        ConfigError, match=r"starts from 'a type of pet, a photo of a', 8 words, but has only 4 vectors"
    ):
        ProGrad(BACKBONE, NAMES, templates=[PETS], config=ProGradConfig(num_context=4))


def test_on_a_text_tower_without_a_causal_mask():
    method = moved(ProGrad(siglip_like(), ["one bird", "dog"], config=ProGradConfig(num_context=6)))
    method.backward(method.losses(FEATURES, LABELS % 2), lambda loss: loss)
    assert float(method.context.grad.norm()) > 0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_context": 0}, "num_context is 0, but must be at least 1"),
        ({"temperature": 0.0}, "temperature is 0.0, but must be a positive number"),
        ({"projection": -0.1}, "projection is -0.1, but must be 0 or a positive number"),
    ],
)
def test_bad_settings(values, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        ProGradConfig(**values)
