"""Cross-modal adaptation: start, batches of two modalities, the adapter, the search, WiSE-FT, the partial variant."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from adaptkit.backbones.base import Backbone, BackboneSpec, Preprocessing
from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.backbones.tokenizing import ClipTokenizer
from adaptkit.errors import BackboneError, ConfigError, DataError
from adaptkit.methods.adapters import cross_modal_partial
from adaptkit.methods.adapters._cross_modal import Cell, Cycle, rate_at
from adaptkit.methods.adapters.cross_modal import CrossModal, CrossModalConfig
from adaptkit.methods.adapters.cross_modal_partial import CrossModalPartial, CrossModalPartialConfig
from adaptkit.methods.adapters.zero_shot import ZeroShot
from adaptkit.training.loop import fit_method
from adaptkit.types import FitTask, TensorInputs
from tests.methods.tiny import NAMES, NOVEL, make_task, query, tiny_clip

BACKBONE = tiny_clip()


def made(**settings) -> CrossModal:
    return CrossModal(BACKBONE, NAMES, config=CrossModalConfig(**{"iterations": 30, "eval_every": 10} | settings))


@pytest.mark.parametrize("reads", ["image_features", "images"])
def test_without_steps_it_is_zero_shot(reads):
    inputs = query(BACKBONE, reads)
    settings = {"iterations": 0, "scale": 20.0}
    if reads == "images":
        method = CrossModalPartial(BACKBONE, NAMES, config=CrossModalPartialConfig(**settings))
    else:
        method = made(**settings)
    method.fit(make_task(BACKBONE, reads))
    features = query(BACKBONE, "image_features")
    with torch.no_grad():
        torch.testing.assert_close(method(inputs), ZeroShot(BACKBONE, NAMES)(features), rtol=1e-4, atol=1e-4)


def test_adapter_logits_are_the_sheets():
    method, features = made(variant="adapter"), query(BACKBONE, "image_features")
    x = F.normalize(features, dim=-1)
    adapted = ((x @ method.down.weight.T).clamp(min=0) @ method.up.weight.T).clamp(min=0)
    wanted = 100 * (0.2 * adapted + 0.8 * x) @ method.head.T  # not normalised again
    torch.testing.assert_close(method(features), wanted, rtol=1e-5, atol=1e-4)
    images, texts = features[:2], BACKBONE.text_features(["a photo of a river."])
    torch.testing.assert_close(method.batch_logits(images, texts)[2:], method(texts), rtol=1e-5, atol=1e-4)


def test_batches_are_half_texts_and_seen_in_whole_passes():
    method, task = made(), make_task(BACKBONE, "image_features", views=2)
    images = method.examples(task.train, 2)
    assert len(images.labels) == 32
    draw = method._batches(Cell(1e-3, 0.0, 8), images, 0)
    text = method.zero_shot_rows(NAMES)
    counts = 0
    for _ in range(8):
        rows, texts, labels = draw()
        assert (len(rows), len(texts), len(labels)) == (4, 4, 8)
        torch.testing.assert_close(F.normalize(texts, dim=-1), text[labels[4:]], rtol=1e-5, atol=1e-5)
        assert sorted(labels[4:].tolist()) == [0, 1, 2, 3]
        counts += 1
    assert counts == 8
    rows, texts, labels = made(text_examples=False)._batches(Cell(1e-3, 0.0, 8), images, 0)()
    assert (len(rows), len(texts), len(labels)) == (8, 0, 8)
    cycle = Cycle(7, 3, torch.Generator().manual_seed(1))
    for _ in range(3):
        assert len({*cycle.take().tolist(), *cycle.take().tolist()}) == 6  # a pass has no repeats; a rest is left out


def test_a_texts_gradient_moves_its_row_towards_it():
    method = made()
    with torch.no_grad():
        method.head.copy_(F.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(1)), dim=-1))
    text = BACKBONE.text_features(["a photo of a river."])
    F.cross_entropy(method.head_logits(text, method.head), torch.tensor([2])).backward()
    step = -method.head.grad
    assert float(step[2] @ text[0]) > 0
    assert (step[[0, 1, 3]] @ text[0] < 0).all()


def test_learning_rates():
    assert rate_at(0, 1e-3, 1000) == 1e-5
    assert rate_at(10, 1e-3, 1000) == pytest.approx(2e-4)
    assert rate_at(550, 1e-3, 1000) == pytest.approx(5e-4)
    assert rate_at(1050, 1e-3, 1000) == pytest.approx(0)


def test_the_grid_leaves_out_batches_that_texts_cannot_fill():
    many = CrossModal(BACKBONE, [f"class {k}" for k in range(17)])
    assert len(many.cells()) == 12
    ten = CrossModal(BACKBONE, [f"class {k}" for k in range(10)])
    assert {cell.batch_size for cell in ten.cells()} == {8}
    assert {cell.batch_size for cell in made().cells()} == {8}  # four texts fill no half: the smallest stays
    assert len(made(variant="adapter").cells()) == 12
    assert len(CrossModalPartial(BACKBONE, NAMES).cells()) == 9


def test_the_best_cell_and_steps_are_kept():
    task, method = make_task(BACKBONE, "image_features"), made()
    report = method.fit(task)
    start = made()
    images, val = start.examples(task.train, 1), start.examples(task.val, 1)
    rights = []
    for cell in start.cells():
        fresh = made()
        rights.append(fresh.train_cell(cell, images, val, task.seed).right)
    assert len(rights) == report["settings_tried"] == 6
    assert report["val_accuracy"] == max(rights) / len(task.val.labels)
    best = start.cells()[rights.index(max(rights))]
    assert (report["lr"], report["weight_decay"], report["batch_size"]) == best
    assert method.count_right(val) == max(rights)
    without = made().fit(FitTask(NAMES, task.train))
    assert (without["searched"], without["steps"], without["lr"]) == (False, 30, 1e-3)
    assert "no validation" in without["why_not_searched"]


def test_wise_mixes_the_head_alone():
    task = make_task(BACKBONE, "image_features")
    plain, wise = made(search=False, variant="adapter"), made(search=False, variant="adapter", wise=0.5)
    plain.fit(task)
    wise.fit(task)
    mean = (plain.head + plain.zero_shot_rows(NAMES)) / 2
    torch.testing.assert_close(wise.head, mean, rtol=1e-5, atol=1e-6)
    assert torch.equal(wise.down.weight, plain.down.weight)


def test_unseen_classes_have_the_row_training_starts_from():
    method = made(search=False)
    method.fit(make_task(BACKBONE, "image_features"))
    head = method.set_classes((NOVEL[0], NAMES[1])).current_head()
    torch.testing.assert_close(head[0], method.zero_shot_rows(NOVEL)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head[1], method.head[1])


def test_partial_logits_and_gradients_are_those_of_the_whole_tower(monkeypatch):
    method, pixels = CrossModalPartial(BACKBONE, NAMES), query(BACKBONE, "images")
    labels = torch.arange(len(pixels)) % len(NAMES)
    whole = tiny_clip()
    for parameter in whole.image_tower.parameters():
        parameter.requires_grad_(True)
    wanted = 54.598150033 * F.normalize(whole.image_tower(pixels), dim=-1) @ method.zero_shot_rows(NAMES).T
    F.cross_entropy(wanted, labels).backward()
    logits = method(pixels)
    F.cross_entropy(logits, labels).backward()
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    ours, theirs = dict(method.tail.named_parameters()), dict(whole.image_tower.named_parameters())
    compared = 0
    for name, parameter in ours.items():
        grad = theirs[name.replace("blocks.0", f"blocks.{BACKBONE.image_tower.layers - 1}")].grad
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-5)
        compared += 1
    assert compared == 19
    task = make_task(BACKBONE, "images", views=2)
    kept = method.examples(task.train, 2)
    monkeypatch.setattr(cross_modal_partial, "CACHE_BYTES", 0)
    rows = torch.tensor([31, 3, 16])
    assert torch.allclose(kept.select(rows), method.examples(task.train, 2).select(rows), atol=1e-5)
    assert torch.allclose(kept.select(rows), method.tokens(task.train.values[[1, 0, 1], [15, 3, 0]]), atol=1e-5)


def test_partial_runs_the_frozen_blocks_once_an_image(monkeypatch):
    config = CrossModalPartialConfig(search=False, iterations=20, eval_every=10, lr=1e-3)
    method, task = CrossModalPartial(BACKBONE, NAMES, config=config), make_task(BACKBONE, "images", views=2)
    encoded, tokens = [], method.tokens
    monkeypatch.setattr(method, "tokens", lambda pixels: encoded.append(len(pixels)) or tokens(pixels))
    before = method.tail.projection.weight.detach().clone()
    method.fit(task)
    assert sum(encoded) == 2 * 16 + 16
    assert not torch.equal(before, method.tail.projection.weight)


def test_parameter_counts_on_imagenet():
    class Given(Backbone):
        def text_features(self, texts):
            return torch.ones(len(texts), 512)

    names = [f"class {index}" for index in range(1000)]
    backbone = Given(BackboneSpec("given", "test", "", 512, Preprocessing(1), 77), 100.0)
    assert CrossModal(backbone, names).num_trained() == 512_000
    config = CrossModalConfig(variant="adapter")
    assert CrossModal(backbone, names, config=config).num_trained() == 131_072 + 512_000


def test_bad_input():
    with pytest.raises(ConfigError, match="cross-modal-partial"):
        CrossModalConfig(variant="partial")
    with pytest.raises(ConfigError, match=r"wise is 2.*batch_size is 7"):
        CrossModalConfig(wise=2, batch_size=7)
    with pytest.raises(ConfigError, match="ratio is -1"):
        CrossModalConfig(ratio=-1)
    one = TensorInputs(torch.ones(1, 2, 16), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(DataError, match="at least two classes"):
        CrossModal(BACKBONE, NAMES[:1]).fit(FitTask(NAMES[:1], one))
    broken = TensorInputs(torch.full((1, 4, 16), float("nan")), torch.arange(4))
    with pytest.raises(DataError, match="aren't finite"):
        made().fit(FitTask(NAMES, broken))
    pixels = TensorInputs(torch.full((1, 4, 3, 16, 16), float("nan")), torch.arange(4))
    with pytest.raises(DataError, match="aren't finite"):
        fit_method(CrossModalPartial(BACKBONE, NAMES), FitTask(NAMES, pixels))


def test_partial_refuses_towers_it_cannot_open():
    class Closed(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.flatten(1)[:, :16]

    spec = replace(BACKBONE.spec, opaque_image="it is a test's")
    closed = DualEncoder(spec, Closed(), tiny_clip().text, ClipTokenizer(), logit_scale=20.0)
    with pytest.raises(BackboneError, match="reach inside the image tower"):
        CrossModalPartial(closed, NAMES)
    assert CrossModal(closed, NAMES).num_trained() == 4 * 16
