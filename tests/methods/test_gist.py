"""GIST's three stages: matching, the pairs and their loss, and the probe; each against a plain computation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from adaptkit.errors import BackboneError, ConfigError, DataError
from adaptkit.methods.adapter import AdaptedModel, load_adapter, save_adapter
from adaptkit.methods.adapters.linear_probe import LinearProbe
from adaptkit.methods.descriptions import gist
from adaptkit.methods.descriptions.gist import GIST, GISTConfig, match_captions, probe_by_sgd
from adaptkit.training.loop import fit_method
from adaptkit.types import FitTask, TensorInputs, TrainingSettings
from tests.methods.tiny import DESCRIPTIONS, DIM, NAMES, NOVEL, make_task, query, tiny_clip

BACKBONE = tiny_clip()
TUNING = replace(GIST.default_training, epochs=2, batch_size=6, lr=1e-3)
LIGHT = {"probe_epochs": 60, "probe_lr": 0.1}


def make(descriptions=DESCRIPTIONS, **config):
    return GIST(BACKBONE, NAMES, config=GISTConfig(**{**LIGHT, **config}), descriptions=descriptions)


def fitted(reads="image_features", task=None, descriptions=DESCRIPTIONS, **config):
    method = make(descriptions, **config)
    return method, fit_method(method, task or make_task(BACKBONE, reads), TUNING)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- stage 1 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topk", [1, 2, 5, 9])
def test_matching_is_the_plain_ranking_within_the_class(topk):
    images, labels = 3 * draw(20, 8), torch.arange(20) % 4
    captions = [draw(count, 8, seed=count) for count in (6, 1, 3, 5)]
    matched = match_captions(images, labels, captions, topk)
    for image, label, places in zip(images, labels.tolist(), matched, strict=True):
        cosine = [float(F.cosine_similarity(image, caption, dim=0)) for caption in captions[label]]
        ranked = sorted(range(len(cosine)), key=lambda place: -cosine[place])
        assert list(places) == ranked[:topk]


def test_another_classes_caption_is_never_matched_however_near():
    images = F.normalize(draw(12, 8), dim=-1)
    labels = torch.arange(12) % 3
    captions = [images[labels != label][:4] for label in range(3)]  # each class's captions are others' images
    for label, places in zip(labels.tolist(), match_captions(images, labels, captions, 9), strict=True):
        assert sorted(places) == list(range(len(captions[label])))


def test_classes_without_images_or_captions_are_passed_over():
    assert match_captions(draw(2, 8), torch.tensor([0, 2]), [draw(1, 8), draw(2, 8), draw(0, 8)]) == [(0,), ()]


# --- stage 2 ----------------------------------------------------------------------------------------------------------


def pairs_of(method, task):
    tuned = method._pairs(task, method._matched(task))
    return tuned, method._texts


def test_one_caption_per_class_is_the_plain_contrastive_set():
    said = dict.fromkeys((*NAMES, *NOVEL), ("a thing",))
    method, task = make(said, fine_tune=True), make_task(BACKBONE, "images")
    tuned, texts = pairs_of(method, task)
    assert texts == [f"{NAMES[label].replace('_', ' ')}: a thing" for label in task.train.labels.tolist()]
    assert torch.equal(tuned.train.select(torch.arange(len(texts))), task.train.values[0])


def test_every_image_comes_with_its_own_first_captions():
    said = {name: tuple(f"{name} looks like {k}" for k in range(7)) for name in NAMES}
    method, task = make(said, fine_tune=True, topk=5, captions=3), make_task(BACKBONE, "images", views=3)
    matched = method._matched(task)
    tuned, texts = pairs_of(method, task)
    assert len(texts) == 3 * len(task.train.labels) == len(tuned.train.labels)
    assert tuned.train.num_views == 3
    seen = 0
    for sample, text in enumerate(texts):
        image, place = divmod(sample, 3)
        name = NAMES[int(task.train.labels[image])]
        assert text == f"{name.replace('_', ' ')}: {said[name][matched[image][place]]}"
        assert torch.equal(tuned.train.select(torch.tensor([sample]), 2)[0], task.train.values[2, image])
        seen += 1
    assert seen == 48


@pytest.mark.parametrize("targets", ["identity", "bags"])
def test_the_loss_is_the_plain_one(targets):
    method, task = make(fine_tune=True, targets=targets), make_task(BACKBONE, "images")
    tuned, texts = pairs_of(method, task)
    samples = torch.tensor([0, 1, 7, 30, 3])
    owners = [texts[place].partition(":")[0] for place in samples.tolist()]
    images = F.normalize(BACKBONE.encode_image(tuned.train.select(samples)), dim=-1)
    sentences = [texts[place] for place in samples.tolist()]
    logits = 20 * images @ F.normalize(BACKBONE.encode_text(BACKBONE.tokenize(sentences)), dim=-1).T
    wanted = 0.0
    for one in (logits, logits.T):
        for i in range(5):
            bag = [j for j in range(5) if (j == i if targets == "identity" else owners[i] == owners[j])]
            wanted += sum(one[i].logsumexp(0) - one[i, j] for j in bag) / len(bag) / 5 / 2
    terms = method.losses(tuned.train.select(samples), samples)
    torch.testing.assert_close(sum(terms.values()), wanted, rtol=1e-5, atol=1e-5)
    assert set(terms) == {"images", "texts"}


def test_fine_tuning_moves_both_towers_and_the_probe_reads_them():
    task = make_task(BACKBONE, "images", views=2)
    method, report = fitted(task=task, fine_tune=True)
    assert report["fine_tuned"]
    # two captions or three for each image of four classes: batches of six, the rest left out
    assert report["steps"] == 2 * (4 * (2 + 3 + 2 + 3) // 6)
    twin = dict(method.towers.named_parameters())
    assert report["trained_parameters"] == sum(value.numel() for value in twin.values()) + 1
    moved = [name for name, value in BACKBONE.named_parameters() if not torch.equal(twin[name], value)]
    assert {name.partition(".")[0] for name in moved} == {"image", "text"}
    assert len(moved) > 0.8 * len(twin)
    pixels = query(BACKBONE, "images")
    with torch.no_grad():
        seen = method.towers.encode_image(pixels)
        torch.testing.assert_close(method(pixels), seen @ method.weight.T + method.bias)
        accuracy = float((method(task.train.values[0]).argmax(dim=1) == task.train.labels).float().mean())
    assert accuracy > 0.9


def test_adam_decays_through_the_gradient():
    """The first step of Adam is the learning rate, whatever adds to the gradient; AdamW's is larger by lr · decay."""
    task = make_task(BACKBONE, "images")
    method = make(fine_tune=True)
    with torch.no_grad():
        method.log_scale.fill_(3.0)
    fit_method(method, task, replace(TUNING, epochs=1, batch_size=40, lr=1e-3, weight_decay=0.5))
    assert abs(method.log_scale.item() - 3.0) == pytest.approx(1e-3, rel=1e-2)


# --- stage 3 ----------------------------------------------------------------------------------------------------------


def test_sgd_is_the_plain_one_and_keeps_the_best_epoch(monkeypatch):
    task = make_task(BACKBONE, "image_features")
    config = GISTConfig(probe_epochs=4, probe_lr=0.2, probe_batch=5)
    given = iter([0.5, 0.75, 0.75, 0.25])
    monkeypatch.setattr(gist, "accuracy_of", lambda head, features, labels: next(given))
    weight, bias, report = probe_by_sgd(task, config, torch.Generator().manual_seed(4), lambda *said: None)
    numbers = torch.Generator().manual_seed(4)
    head = gist.draw_linear(DIM, len(NAMES), numbers)
    w, b = head.weight.detach().clone(), head.bias.detach().clone()
    x, y = task.train.values[0], task.train.labels
    for _ in range(3):  # the third epoch ties with the second: the later one stays
        for part in torch.split(torch.randperm(16, generator=numbers), 5):
            wrong = (x[part] @ w.T + b).softmax(dim=1) - F.one_hot(y[part], 4)
            w, b = w - 0.2 * wrong.T @ x[part] / len(part), b - 0.2 * wrong.mean(dim=0)
    torch.testing.assert_close(weight, w, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias, b, rtol=1e-5, atol=1e-5)
    assert report == {
        "probe_epochs": 4,
        "probe_epoch_kept": 3,
        "searched": True,
        "val_accuracy": 0.75,
        "val_images": 16,
    }


def test_without_validation_the_last_epoch_stays():
    task = make_task(BACKBONE, "image_features", val=False)
    _, report = fitted(task=task)
    assert (report["probe_epoch_kept"], report["searched"]) == (60, False)


def test_on_the_frozen_backbone_it_is_the_linear_probe_up_to_the_solver():
    task, features = make_task(BACKBONE, "image_features"), query(BACKBONE, "image_features")
    probe = LinearProbe(BACKBONE, NAMES)
    facts = fit_method(probe, task)
    method, report = fitted(task=task, solver="lbfgs")
    with torch.no_grad():
        assert torch.equal(method(features), probe(features))
        sgd, _ = fitted(task=task)
        assert torch.equal(sgd(features).argmax(dim=1), probe(features).argmax(dim=1))
    assert report["c"] == facts["c"]
    assert report["captions_matched"] == 4 * (2 + 3 + 2 + 3)


def test_captions_do_not_touch_the_light_mode():
    other = dict.fromkeys((*NAMES, *NOVEL), ("something else",))
    first, second = fitted()[0], fitted(descriptions=other)[0]
    assert torch.equal(first.weight, second.weight)


# --- classes, files and refusals --------------------------------------------------------------------------------------


def test_a_tuned_one_is_saved_whole_and_answers_novel_classes_by_its_own_towers(tmp_path):
    method, _ = fitted("images", fine_tune=True)
    assert method.reads == "images"
    assert make().reads == "image_features"
    pixels = query(BACKBONE, "images")
    save_adapter(tmp_path / "adapter", AdaptedModel(method))
    loaded = load_adapter(tmp_path / "adapter", BACKBONE)
    with torch.no_grad():
        assert torch.equal(loaded(pixels), AdaptedModel(method)(pixels))
        novel = loaded.set_classes(NOVEL)(pixels)
        twin = method.towers
        texts = twin.encode_text(twin.tokenize([f"a photo of a {name}." for name in NOVEL]))
        images = F.normalize(twin.encode_image(pixels), dim=-1)
        torch.testing.assert_close(novel, 20 * images @ F.normalize(texts, dim=-1).T, rtol=1e-4, atol=1e-4)
    assert loaded.method.uses_fallback


def test_what_it_refuses():
    task = make_task(BACKBONE, "image_features")
    part = TensorInputs(task.train.values[:, :8], task.train.labels[:8])
    with pytest.raises(DataError, match=r"none of 'river' \(2 such classes\)"):
        fitted(task=FitTask(NAMES, part))
    one = GIST(BACKBONE, NAMES[:1], descriptions=DESCRIPTIONS)
    with pytest.raises(DataError, match="at least two classes"):
        fit_method(one, FitTask(NAMES[:1], TensorInputs(task.train.values[:, :4], task.train.labels[:4])))
    broken = task.train.values.clone()
    broken[0, 5] = float("nan")
    with pytest.raises(DataError, match="Training image 5"):
        fitted(task=FitTask(NAMES, TensorInputs(broken, task.train.labels)))
    with pytest.raises(DataError, match="none: give a file"):
        make({})
    long = {**DESCRIPTIONS, NAMES[0]: ("word " * 90,)}
    with pytest.raises(BackboneError, match="77"):
        fitted("images", descriptions=long, fine_tune=True)
    with pytest.raises(ConfigError, match="hand its fit a loop"):
        make(fine_tune=True).fit(make_task(BACKBONE, "images"))
    for config, said in (
        ({"targets": "soft"}, "identity or bags"),
        ({"solver": "adam"}, "sgd or lbfgs"),
        ({"captions": 6}, "only topk = 5"),
        ({"probe_epochs": 0}, "at least 1"),
        ({"probe_lr": 0.0}, "positive"),
    ):
        with pytest.raises(ConfigError, match=said):
            GISTConfig(**config)


def test_its_defaults_are_the_papers():
    assert GIST.default_training == TrainingSettings(
        epochs=200,
        batch_size=20,
        optimiser="adam",
        lr=1e-6,
        weight_decay=1e-3,
        eps=1e-6,
        schedule="constant",
        warmup_epochs=0,
        views=10,
    )
    assert make(fine_tune=True).parameter_groups()[0].betas == (0.9, 0.98)
