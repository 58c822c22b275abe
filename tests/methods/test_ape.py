"""APE and APE-T: channels against the reference's loops, the search against a plain one, training, bad input."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaptkit.errors import AdapterError, ConfigError, DataError, UnsupportedError
from adaptkit.methods.adapters.zero_shot import ZeroShot
from adaptkit.methods.caches import _channels
from adaptkit.methods.caches._cache import CacheConfig, grid
from adaptkit.methods.caches._channels import Rivals, best_channels, channel_scores, count_channels, pooled_text_weights
from adaptkit.methods.caches.ape import APE, APEConfig
from adaptkit.methods.caches.ape_t import APET, APETConfig
from adaptkit.methods.caches.tip_adapter import TipAdapter
from adaptkit.training.loop import GradientLoop, fit_method
from adaptkit.types import FitTask, TensorInputs
from tests.methods.tiny import DIM, NAMES, NOVEL, make_task, query, tiny_clip

BACKBONE = tiny_clip()
SENTENCES = {NAMES[0]: ("a cat with stripes.", "a small animal"), NAMES[2]: ("water that flows",), "unasked": ("x",)}
TEN = {"channels": 10, "scale_channels": False}


def drawn(shots_per_class, seed, spread=2.0, views=1):
    numbers = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((shots,), index) for index, shots in enumerate(shots_per_class)])
    labels = labels[torch.randperm(len(labels), generator=numbers)]
    centres = torch.randn(len(shots_per_class), DIM, generator=torch.Generator().manual_seed(5))
    return TensorInputs(centres[labels] + spread * torch.randn(views, len(labels), DIM, generator=numbers), labels)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# --- channels and texts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shots", [[3, 3, 3, 3], [0, 0, 0, 0], [1, 4, 2, 0]])
def test_the_closed_form_is_the_loops(shots):
    text, labels = unit(4, DIM), torch.cat([torch.full((n,), k) for k, n in enumerate(shots)]).long()
    keys = unit(len(labels), DIM, seed=1)
    samples = [torch.cat([text[k : k + 1], keys[labels == k]]).double() for k in range(4)]
    pairs = [(samples[i][:, None] * samples[j][None]).mean(dim=(0, 1)) for i, j in permutations(range(4), 2)]
    assert len(pairs) == 12
    wanted = -0.3 * torch.stack(pairs).mean(dim=0) + 0.7 * text.double().var(dim=0)
    found = channel_scores(text, keys, labels, similarity_weight=0.3, variance_weight=0.7)
    torch.testing.assert_close(found, wanted)


def test_the_best_channels_in_their_order():
    assert best_channels(torch.tensor([3.0, -1.0, 9.0, 4.0]), 2).tolist() == [2, 3]


def test_the_number_of_channels_follows_the_width():
    assert count_channels(APEConfig(), 1024) == 500
    assert count_channels(APEConfig(), 512) == 250
    assert count_channels(APEConfig(channels=900), 512) == 450
    assert count_channels(APEConfig(channels=300, scale_channels=False), 512) == 300
    with pytest.raises(ConfigError, match="600 channels were asked for, but the features have 512"):
        count_channels(APEConfig(channels=600, scale_channels=False), 512)
    with pytest.raises(ConfigError, match="1100 of 1024"):
        APE(BACKBONE, NAMES, config=APEConfig(channels=1100))


def test_sentences_and_templates_count_the_same():
    templates = ("a photo of a {}.", "a drawing of a {}.")
    found = pooled_text_weights(BACKBONE, NAMES, templates, SENTENCES)
    for name, row in zip(NAMES, found, strict=True):
        texts = [one.format(name.replace("_", " ")) for one in templates] + list(SENTENCES.get(name, ()))
        wanted = F.normalize(F.normalize(BACKBONE.text_features(texts), dim=-1).mean(dim=0), dim=-1)
        torch.testing.assert_close(row, wanted)


@pytest.mark.parametrize("kind", [APE, APET])
def test_alpha_zero_is_zero_shot_with_all_texts(kind):
    config = kind.config_class(alpha=0, search=False)
    features = query(BACKBONE, "image_features")
    for given in ({}, SENTENCES):
        method = kind(BACKBONE, NAMES, config=config, descriptions=given)
        method.build_cache(make_task(BACKBONE, "image_features"))
        text = pooled_text_weights(BACKBONE, NAMES, method.templates, given)
        with torch.no_grad():
            torch.testing.assert_close(method(features), 100 * F.normalize(features, dim=-1) @ text.T)


# --- the search -------------------------------------------------------------------------------------------------------


def plain_logits(method, f, alpha, beta, gamma):
    """APE's formula in fp64, one-hot values and all."""
    text, keys, labels = method.zero_shot().double(), method.keys.double(), method.key_labels
    scores = channel_scores(text, keys, labels, similarity_weight=0.7, variance_weight=0.3)
    kept = scores.argsort(descending=True)[: method.num_channels()]
    small_f, small_keys = F.normalize(f[:, kept], dim=-1), F.normalize(keys[:, kept], dim=-1)
    chances = (small_keys @ F.normalize(text[:, kept], dim=-1).T).softmax(dim=1)
    one_hot = F.one_hot(labels, len(text)).double()
    divergence = (one_hot * torch.log2((one_hot + 1e-6) / (chances + 1e-6))).sum(dim=1, keepdim=True)
    cache = torch.exp(-beta * (1 - small_f @ small_keys.T)) @ (one_hot * torch.exp(gamma * divergence))
    return 100 * f @ text.T + alpha * cache


@pytest.mark.parametrize("rows", [16, 1000])
@pytest.mark.parametrize("shots", [[3, 3, 3, 3], [1, 5, 2, 3]])
def test_search_equals_the_triple_loop(shots, rows, monkeypatch):
    monkeypatch.setattr(_channels, "_SEARCH_BYTES", 0 if rows == 16 else 1e9)
    config = APEConfig(**TEN, max_alpha=30, alpha_steps=5, max_beta=9, beta_steps=9, max_gamma=1, gamma_steps=4)
    for seed in range(4):
        method, val = APE(BACKBONE, NAMES, config=config), drawn([8] * 4, seed + 100)
        report = fit_method(method, FitTask(NAMES, drawn(shots, seed), val))
        f, best, chosen = F.normalize(val.values[0].double(), dim=-1), -1, None
        for beta in grid(9, 9):
            for alpha in grid(30, 5):
                for gamma in (0, 0.25, 0.5, 0.75):
                    logits = plain_logits(method, f, alpha, beta, gamma)
                    right = int((logits.argmax(dim=1) == val.labels).sum())
                    if right > best:
                        best, chosen = right, (float(alpha), float(beta), gamma)
        assert (report["alpha"], report["beta"], report["gamma"]) == pytest.approx(chosen)
        assert report["val_accuracy"] == best / 32
        assert report["settings_tried"] == 9 * 5 * 4
        with torch.no_grad():
            wanted = plain_logits(method, f, *chosen).float()
            torch.testing.assert_close(method(val.values[0]), wanted, rtol=1e-4, atol=1e-3)


def test_bounds_on_alpha_are_what_each_alpha_gives():
    numbers = torch.Generator().manual_seed(0)
    clip, cache = torch.randn(7, 20, generator=numbers), torch.randn(7, 3, 20, generator=numbers)
    labels = torch.randint(7, (20,), generator=numbers)
    lowest, highest = Rivals(clip, labels).bounds(cache.clone())
    seen = 0
    for alpha in grid(9.0, 30):
        logits = clip[:, None] + alpha * cache  # [classes, variants, images]
        right = logits.argmax(dim=0) == labels
        assert torch.equal((lowest < 1 / alpha) & (1 / alpha < highest), right)
        seen += int(right.sum())
    assert seen > 100


def test_a_tie_is_not_a_hit():
    labels = torch.tensor([0, 1])
    clip = torch.zeros(3, 2)
    lowest, highest = Rivals(clip, labels).bounds(torch.zeros(3, 1, 2))
    assert not ((lowest < 0.5) & (highest > 0.5)).any()


def test_settings_stay_where_there_is_nothing_to_search_on():
    report = fit_method(APE(BACKBONE, NAMES), make_task(BACKBONE, "image_features", val=False))
    assert report == {
        "keys": 16,
        "channels": 8,
        "alpha": 2.0,
        "beta": 1.0,
        "gamma": pytest.approx(0.1),
        "searched": False,
        "why_not_searched": "there are no validation images",
    }


# --- other classes ----------------------------------------------------------------------------------------------------


def test_channels_are_chosen_for_the_classes_asked_for():
    task, features = make_task(BACKBONE, "image_features"), query(BACKBONE, "image_features")
    method = APE(BACKBONE, NAMES, config=APEConfig(search=False))
    fit_method(method, task)
    asked = (NAMES[3], NAMES[1])
    rows = (task.train.labels == 3) | (task.train.labels == 1)
    small = TensorInputs(task.train.values[:, rows], (task.train.labels[rows] == 1).long())
    alone = APE(BACKBONE, asked, config=APEConfig(search=False))
    fit_method(alone, FitTask(asked, small))
    with torch.no_grad():
        torch.testing.assert_close(method.set_classes(asked)(features), alone(features))
        assert method.set_classes((NAMES[2],))(features).shape == (len(features), 1)


@pytest.mark.parametrize("kind", [APE, APET])
def test_novel_classes_are_zero_shot_and_said_to_be(kind):
    method, features = kind(BACKBONE, NAMES), query(BACKBONE, "image_features")
    with torch.no_grad():
        assert torch.equal(method.set_classes(NOVEL)(features), ZeroShot(BACKBONE, NOVEL)(features))
    assert method.uses_fallback


# --- APE-T ------------------------------------------------------------------------------------------------------------


def test_ape_t_starts_as_tip_adapter():
    task, features = make_task(BACKBONE, "image_features", views=3), query(BACKBONE, "image_features")
    method = APET(BACKBONE, NAMES)
    method.prepare(task)
    tip = TipAdapter(BACKBONE, NAMES, config=CacheConfig(alpha=2, search=False))
    tip.fit(task)
    with torch.no_grad():
        torch.testing.assert_close(method(features), tip(features))
    assert method.num_trained() == 4 * 8 + 16


def test_ape_t_against_the_reference_written_out():
    task = make_task(BACKBONE, "image_features")
    method = APET(BACKBONE, NAMES, config=APETConfig(**TEN))
    method.prepare(task)
    numbers = torch.Generator().manual_seed(0)
    with torch.no_grad():
        method.residual.copy_(0.1 * torch.randn(4, 10, generator=numbers))
        method.values.copy_(1 + 0.1 * torch.randn(16, generator=numbers))
    residual = method.residual.detach().clone().requires_grad_()
    values = method.values.detach().clone().requires_grad_()
    features, labels = task.val.values[0], task.val.labels
    f = F.normalize(features, dim=-1)
    text = method.zero_shot()
    scores = channel_scores(text, f[:0], labels[:0], similarity_weight=0.2, variance_weight=0.8)
    kept = scores.argsort(descending=True)[:10].sort().values
    wide = torch.zeros(4, DIM).index_copy(1, kept, residual)
    keys, one_hot = method.keys + wide[method.key_labels], F.one_hot(method.key_labels).float()
    logits = 100 * f @ (text + wide).T + 2 * torch.exp(-(1 - f @ keys.T)) @ (one_hot * values[:, None])
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    ours = method(features)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)
    F.cross_entropy(ours, labels).backward()
    torch.testing.assert_close(method.residual.grad, residual.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(method.values.grad, values.grad, rtol=1e-5, atol=1e-5)
    found = method.set_classes((NAMES[2], NAMES[0]))(features)
    torch.testing.assert_close(found, logits[:, [2, 0]], rtol=1e-5, atol=1e-5)


def test_the_best_epoch_on_validation_counts(monkeypatch):
    task, seen = make_task(BACKBONE, "image_features"), []
    method = APET(BACKBONE, NAMES)
    original = APET.after_epoch

    def worse_after_two(self, epoch, epochs):
        if epoch >= 2:  # spoilt
            with torch.no_grad():
                self.residual.add_(100 * torch.randn(4, 8, generator=torch.Generator().manual_seed(epoch)))
        original(self, epoch, epochs)
        seen.append(self.residual.detach().clone())

    monkeypatch.setattr(APET, "after_epoch", worse_after_two)
    report = fit_method(method, task, replace(APET.default_training, epochs=4))
    assert len(seen) == report["epochs_tried"] == 4
    assert report["best_epoch"] in (1, 2)
    assert torch.equal(method.residual, seen[report["best_epoch"] - 1])
    assert report["settings_tried"] == 4000
    last = APET(BACKBONE, NAMES, config=APETConfig(best_epoch=False))
    report = fit_method(last, task, replace(APET.default_training, epochs=4))
    assert "best_epoch" not in report
    assert torch.equal(last.residual, seen[-1])


def test_ape_t_searches_with_what_it_trained():
    task = FitTask(NAMES, drawn([3] * 4, 0), drawn([8] * 4, 9))
    config = APETConfig(**TEN, max_alpha=30, alpha_steps=5, beta_steps=9)
    method = APET(BACKBONE, NAMES, config=config)
    report = fit_method(method, task, replace(APET.default_training, lr=0.05))
    best, chosen = -1, None
    with torch.no_grad():
        for beta in grid(7, 9):
            for alpha in grid(30, 5):
                method.alpha.fill_(float(alpha))
                method.beta.fill_(float(beta))
                right = int((method(task.val.values[0]).argmax(dim=1) == task.val.labels).sum())
                if right > best:
                    best, chosen = right, (float(alpha), float(beta))
    assert (report["alpha"], report["beta"]) == pytest.approx(chosen)
    assert report["val_accuracy"] == best / 32


def test_training_goes_down_and_leaves_the_cache_alone():
    task = make_task(BACKBONE, "image_features", views=3)
    method = APET(BACKBONE, NAMES, config=APETConfig(search=False, best_epoch=False))
    method.prepare(task)
    keys = method.keys.clone()
    report = fit_method(method, task, replace(APET.default_training, lr=1e-2))
    assert report["losses"][-1] < report["losses"][0]
    assert torch.equal(method.keys, keys)
    assert {name for name, _ in method.named_parameters()} == {"residual", "values"}
    assert isinstance(method.values, nn.Parameter)
    assert GradientLoop(APET.default_training).settings.schedule == "cosine-step"


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [APE, APET])
def test_bad_input(kind):
    task = make_task(BACKBONE, "image_features")
    with pytest.raises(DataError, match="at least two classes"):
        fit_method(
            kind(BACKBONE, NAMES[:1]), FitTask(NAMES[:1], TensorInputs(torch.ones(1, 2, DIM), torch.zeros(2).long()))
        )
    broken = TensorInputs(task.train.values.clone(), task.train.labels)
    broken.values[0, 5, 2] = float("inf")
    with pytest.raises(DataError, match="Training image 5"):
        fit_method(kind(BACKBONE, NAMES), replace(task, train=broken))
    with pytest.raises(DataError, match="Validation image 5"):
        fit_method(kind(BACKBONE, NAMES), replace(task, val=broken))
    with pytest.raises(ConfigError, match="channels is 0, but must be at least 1"):
        kind.config_class(channels=0)
    with pytest.raises(UnsupportedError, match="no reference checkpoints"):
        kind(BACKBONE, NAMES).load_reference_state({})
    if kind is APE:
        with pytest.raises(ConfigError, match="gamma is -1"):
            APEConfig(gamma=-1)
        return
    method = APET(BACKBONE, NAMES)
    method.prepare(task)
    state = method.adapter_state()
    with pytest.raises(AdapterError, match="numbers below 16"):
        APET(BACKBONE, NAMES).load_adapter_state({**state, "channels": state["channels"] + 12})
