"""AdaptCLIPZS against its loss and its inference written out plainly, what it moves, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from adaptkit.errors import BackboneError, ConfigError, DataError, TrainingError
from adaptkit.methods.adapter import AdaptedModel, load_adapter, save_adapter
from adaptkit.methods.descriptions.adaptclipzs import (
    AdaptCLIPZS,
    AdaptCLIPZSConfig,
    bag_losses,
    is_projection,
    is_published,
    mean_log_probabilities,
    shortened,
)
from adaptkit.training.loop import fit_method
from tests.methods.tiny import DESCRIPTIONS, NAMES, NOVEL, make_task, query, tiny_clip

BACKBONE = tiny_clip()
SETTINGS = replace(AdaptCLIPZS.default_training, epochs=2, batch_size=8, lr=1e-3)


def make(names=NAMES, descriptions=DESCRIPTIONS, seed=0, **config):
    return AdaptCLIPZS(BACKBONE, names, config=AdaptCLIPZSConfig(**config), seed=seed, descriptions=descriptions)


def fitted(task=None, **config):
    method = make(**config)
    return method, fit_method(method, task or make_task(BACKBONE, "images"), SETTINGS)


def scores(count, seed=0):
    return torch.randn(count, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the loss ---------------------------------------------------------------------------------------------------------


def plain_loss(logits, labels):
    """The sheet's sum, image by image and text by text."""
    total, count = 0.0, len(labels)
    for one in (logits, logits.T):
        for i in range(count):
            bag = [j for j in range(count) if labels[j] == labels[i]]
            total += sum(-(one[i, j] - torch.logsumexp(one[i], 0)) for j in bag) / len(bag) / count
    return total


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4], [0, 0, 1, 1, 1], [2, 2, 2, 2, 2], [3, 0, 3, 1, 0]])
def test_the_loss_and_its_gradient_are_the_sheets(labels):
    ours, plain = (scores(5).requires_grad_() for _ in range(2))
    labels = torch.tensor(labels)
    loss, wanted = sum(bag_losses(ours, labels).values()), plain_loss(plain, labels)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_one_image_per_class_is_twice_the_symmetric_infonce():
    logits, labels = scores(6), torch.randperm(6)
    targets = torch.arange(6)
    usual = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    torch.testing.assert_close(sum(bag_losses(logits, labels).values()), 2 * usual)


def test_the_order_of_a_batch_does_not_matter():
    logits, labels, order = scores(7), torch.tensor([0, 1, 0, 2, 2, 0, 1]), torch.randperm(7)
    mixed = bag_losses(logits[order][:, order], labels[order])
    for name, term in bag_losses(logits, labels).items():
        torch.testing.assert_close(mixed[name], term)


def test_a_step_divides_by_tau_and_draws_sentences_of_the_class():
    method = make(tau=4.0)
    method.prepare(make_task(BACKBONE, "images"))
    labels = torch.tensor([0, 3, 3, 1])
    terms = method.losses(query(BACKBONE, "images")[:4], labels)
    method.prepare(make_task(BACKBONE, "images"))
    drawn = method.draw_sentences(labels)
    assert all(text in method.sentences_of(NAMES[label]) for text, label in zip(drawn, labels.tolist(), strict=True))
    images = F.normalize(BACKBONE.encode_image(query(BACKBONE, "images")[:4]), dim=-1)
    texts = F.normalize(BACKBONE.encode_text(BACKBONE.tokenize(drawn)), dim=-1)
    torch.testing.assert_close(sum(terms.values()), plain_loss(20 / 4 * images @ texts.T, labels), rtol=1e-5, atol=1e-5)


def test_every_sentence_is_drawn_and_only_of_its_class():
    method = make()
    method.prepare(make_task(BACKBONE, "images"))
    for label, name in enumerate(NAMES):
        drawn = set(method.draw_sentences(torch.full((200,), label)))
        assert drawn == set(method.sentences_of(name))


# --- texts ------------------------------------------------------------------------------------------------------------


def test_sentences_follow_the_template_unless_they_name_the_class():
    said = {**DESCRIPTIONS, NAMES[1]: ("It has long fur", "golden retriever, which has fur.", "Furry")}
    method = make(descriptions=said)
    assert method.sentences_of(NAMES[1]) == [
        "a photo of a golden retriever long fur",
        "golden retriever, which has fur.",
        "a photo of a golden retriever Furry",
    ]
    assert make(descriptions=said, drop_words=0).sentences_of(NAMES[1])[0].endswith("retriever It has long fur")
    assert shortened("one two", 2) == "one two"


# --- inference --------------------------------------------------------------------------------------------------------


def test_class_logits_are_the_log_of_mean_probabilities():
    logits = 60 * torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    owners, sizes = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([2, 1, 3])
    shares = logits.softmax(dim=1)
    means = torch.stack([shares[:, :2].mean(1), shares[:, 2], shares[:, 3:].mean(1)], dim=1)
    ours = mean_log_probabilities(logits, owners, sizes)
    torch.testing.assert_close(ours - ours.logsumexp(1, keepdim=True), (means / means.sum(1, keepdim=True)).log())
    assert torch.isfinite(mean_log_probabilities(1e4 * logits, owners, sizes)).all()


def test_before_training_it_is_the_frozen_backbone_on_sentences():
    method, pixels = make(), query(BACKBONE, "images")
    images = F.normalize(BACKBONE.encode_image(pixels), dim=-1)
    plain = []
    every = [torch.as_tensor(F.normalize(BACKBONE.text_features(method.sentences_of(name)), dim=-1)) for name in NAMES]
    total = torch.logsumexp(20 * images @ torch.cat(every).T, dim=1)
    for texts in every:
        plain.append((20 * images @ texts.T - total[:, None]).exp().mean(dim=1))
    with torch.no_grad():
        shares = method(pixels).softmax(dim=1)
    plain = torch.stack(plain, dim=1)
    torch.testing.assert_close(shares, plain / plain.sum(dim=1, keepdim=True), rtol=1e-4, atol=1e-6)


# --- what moves -------------------------------------------------------------------------------------------------------


def test_only_the_listed_groups_get_gradients_and_move():
    method, report = fitted()
    groups = method.parameter_groups()
    assert [group.lr for group in groups] == [None, 5e-7, 1e-2]
    assert [group.weight_decay for group in groups] == [None, None, 1e-6]
    assert report["trained_parameters"] == method.num_trained()
    twin, moved = dict(method.towers.named_parameters()), set()
    for name, value in BACKBONE.named_parameters():
        if not torch.equal(twin[name], value):
            moved.add(name)
        else:
            assert not is_published(name) or name.endswith(("k_proj.bias",)), name
    assert moved == {name for name in twin if is_published(name)}
    assert {name for name in moved if is_projection(name)} == {"image.projection.weight", "text.projection.weight"}
    assert not any(".attn." in name or ".fc2." in name for name in moved)
    assert method.tau.item() != 2.0


def test_projections_and_tau_have_rates_of_their_own():
    """Adam's first step is its learning rate, for every value with a gradient."""
    task = make_task(BACKBONE, "images")
    method = make(projection_lr=1e-4, tau_lr=0.05)
    fit_method(method, task, replace(SETTINGS, epochs=1, batch_size=16, weight_decay=0.0))
    twin, own = dict(method.towers.named_parameters()), dict(BACKBONE.named_parameters())
    steps = {name: float((twin[name] - own[name]).detach().abs().max()) for name in twin}
    assert steps["image.projection.weight"] == pytest.approx(1e-4, rel=0.05)
    assert steps["image.blocks.0.fc1.weight"] == pytest.approx(1e-3, rel=0.05)
    assert abs(method.tau.item() - 2.0) == pytest.approx(0.05, rel=1e-3)


def test_all_weights_on_request():
    assert make(tune="all").num_trained() == sum(p.numel() for p in BACKBONE.parameters()) + 2
    method, _ = fitted(tune="all")
    assert not torch.equal(
        dict(method.towers.named_parameters())["image.blocks.0.attn.q_proj.weight"],
        dict(BACKBONE.named_parameters())["image.blocks.0.attn.q_proj.weight"],
    )


def test_openais_names_give_the_same_groups():
    moving = ("image.conv1.weight", "text.token_embedding.weight", "image.ln_post.bias")
    moving += ("text.blocks.1.mlp.c_fc.weight",)
    still = ("image.blocks.0.attn.in_proj_weight", "text.resblocks.3.mlp.c_proj.bias", "image.attnpool.k_proj.weight")
    projections = ("image.proj", "text.text_projection", "text.text_projection.weight", "image.projection.weight")
    assert all(is_published(name) and not is_projection(name) for name in moving)
    assert not any(is_published(name) for name in still)
    assert all(is_published(name) and is_projection(name) for name in projections)


def test_training_fits_the_classes():
    task = make_task(BACKBONE, "images", shots=6)
    method = make(tau=1.0)
    pixels, labels = task.train.values[0], task.train.labels
    with torch.no_grad():
        before = F.cross_entropy(method(pixels), labels)
    report = fit_method(method, task, replace(SETTINGS, epochs=30, batch_size=12, lr=2e-3))
    with torch.no_grad():
        after = F.cross_entropy(method(pixels), labels)
    assert after < before / 1.5
    assert report["losses"][-1] < report["losses"][0]


def test_a_seed_gives_the_same_fit():
    first, second = fitted()[0].adapter_state(), fitted()[0].adapter_state()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other, _ = fitted(task=replace(make_task(BACKBONE, "images"), seed=5))
    assert not torch.equal(other.tau, first["tau"])


# --- classes and files ------------------------------------------------------------------------------------------------


def test_novel_classes_by_their_sentences(tmp_path):
    method, _ = fitted()
    pixels = query(BACKBONE, "images")
    with torch.no_grad():
        novel = method.set_classes(NOVEL)(pixels)
        both = method.set_classes((*NAMES, *NOVEL))(pixels)
        torch.testing.assert_close(both[:, len(NAMES) :], novel, rtol=1e-4, atol=1e-4)
        save_adapter(tmp_path / "adapter", AdaptedModel(method.set_classes(NAMES)))
        loaded = load_adapter(tmp_path / "adapter", BACKBONE)
        assert torch.equal(loaded.set_classes(NOVEL)(pixels), novel)
    assert not method.uses_fallback
    with pytest.raises(DataError, match="'otter' has none"):
        method.set_classes(("otter", NAMES[0]))


def test_what_it_refuses():
    with pytest.raises(DataError, match="none: give a file"):
        make(descriptions={NAMES[0]: ("a",)})
    with pytest.raises(BackboneError, match="77"):
        make(descriptions={**DESCRIPTIONS, NAMES[0]: ("word " * 90,)})
    for config, said in (
        ({"tune": "some"}, "published or all"),
        ({"tau": 0.0}, "tau is 0.0"),
        ({"projection_lr": float("nan")}, "positive"),
        ({"drop_words": -1}, "at least 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            AdaptCLIPZSConfig(**config)


def test_a_tau_that_falls_to_zero_ends_training():
    class Falling(AdaptCLIPZS):
        def losses(self, inputs, labels, frozen=None):
            return {"tau": self.tau.clone()}  # whose gradient always points down

    method = Falling(BACKBONE, NAMES, config=AdaptCLIPZSConfig(tau_lr=1.0), descriptions=DESCRIPTIONS)
    with pytest.raises(TrainingError, match=r"tau fell to -?[\d.e-]+ in epoch 1"):
        fit_method(method, make_task(BACKBONE, "images"), SETTINGS)
