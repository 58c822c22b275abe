"""Tasks and runs: what is drawn, what is tested, what is recorded."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from adaptkit.backbones import load_backbone
from adaptkit.data.features import FeatureStore
from adaptkit.data.sources import load_dataset
from adaptkit.data.splits import TestSplit, TrainSplit, ValSplit
from adaptkit.errors import ConfigError, DataError, UnknownNameError
from adaptkit.evaluation.protocols import choose_recipe, plan_run, run_method
from adaptkit.evaluation.recipes import list_recipes, load_recipe
from adaptkit.evaluation.results import is_done, read_run, write_run
from adaptkit.evaluation.tasks import make_task
from adaptkit.methods import methods
from tests.backbones import tiny_mllm
from tests.quick import described, quick_overrides

DIGITS = described(load_dataset("digits"))
TEXTURES = described(load_dataset("textures"))


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("mini")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return FeatureStore(tmp_path_factory.mktemp("features"))


def run(backbone, store, method="linear-probe", protocol="base-to-novel", seed=1, **arguments):
    task = make_task(DIGITS, protocol, 4, seed)
    progress = arguments.pop("progress", None)
    return run_method(plan_run(method, backbone, task, **arguments), backbone, store=store, progress=progress)


def test_base_to_novel_halves_the_classes_and_shares_the_shots():
    every, halves = make_task(DIGITS, "few-shot", 4, 2), make_task(DIGITS, "base-to-novel", 4, 2)
    assert halves.class_names == DIGITS.class_names[:5]
    assert [part.name for part in halves.parts] == ["base", "novel"]
    assert halves.parts[1].split.class_names == DIGITS.class_names[5:]
    assert sum(len(part.split) for part in halves.parts) == len(DIGITS.test)
    of_base = {name for name, label in zip(every.train.ids, every.train.labels, strict=True) if label < 5}
    assert set(halves.train.ids) == of_base
    for part in halves.parts:
        assert isinstance(part.split, TestSplit)
        names = [DIGITS.class_names[label] for label in DIGITS.test.labels[part.positions]]
        assert names == [part.split.class_names[label] for label in part.split.labels]
    assert isinstance(halves.train, TrainSplit)
    assert isinstance(halves.val, ValSplit)


def test_no_image_is_in_two_places():
    task = make_task(DIGITS, "few-shot", 16, 1)
    assert not {*task.train.ids, *task.val.ids} & set(DIGITS.test.ids)
    assert not set(task.train.ids) & set(task.val.ids)


@pytest.mark.parametrize("size", [0, 100])
def test_batches_of_a_transductive_method_are_drawn_from_the_whole_test_set(backbone, store, monkeypatch, size):
    """In the order of the files, often class by class, a batch would give its classes away."""
    kind, batches = methods.get("em-dirichlet"), []

    def plain(self, inputs):
        batches.append(inputs)
        return self.cosine_logits(inputs, self.zero_shot())

    monkeypatch.setattr(kind, "forward", plain)
    outcome = run(backbone, store, "em-dirichlet", "few-shot", overrides=[f"query_batch={size}"])
    images = len(DIGITS.test)
    sizes = [len(batch) for batch in batches]
    assert sizes == ([images] if size == 0 else [100] * (images // 100) + [images % 100] * bool(images % 100))
    wanted = run(backbone, store, "zero-shot", "few-shot")
    assert np.array_equal(outcome.predictions[0].predicted, wanted.predictions[0].predicted)  # each in its place
    in_file_order = store.inputs(backbone, DIGITS.test).select(torch.arange(sizes[0]))
    assert torch.equal(batches[0].cpu(), in_file_order) == (size == 0)


def test_wrong_names_and_empty_tests_are_refused():
    with pytest.raises(UnknownNameError, match="few-shot"):
        make_task(DIGITS, "few-shots")
    empty = dataclasses.replace(DIGITS, test=DIGITS.test.subset([]))
    with pytest.raises(DataError, match="no test images"):
        make_task(empty)


def test_the_record_agrees_with_the_predictions(backbone, store):
    outcome = run(backbone, store, "tip-adapter", overrides=["beta_steps=5", "training.views=1"])
    result = outcome.result
    for part, predictions in zip(result.parts, outcome.predictions, strict=True):
        right = predictions.predicted == predictions.labels
        assert (int(right.sum()), len(right)) == (part.correct, part.total)
        counted = [(int(right[predictions.labels == c].sum()), int((predictions.labels == c).sum())) for c in range(5)]
        assert tuple(counted) == part.per_class
        assert ((predictions.confidence > 0) & (predictions.confidence <= 1)).all()
    base, novel = (part.accuracy for part in result.parts)
    assert result.harmonic_mean == pytest.approx(2 * base * novel / (base + novel))
    assert [part.fallback for part in result.parts] == [False, True]
    assert any("zero-shot" in warning for warning in result.warnings)
    assert result.tuned_on == "val"


def test_the_same_seed_gives_the_same_result_and_encodes_nothing_again(backbone, store):
    arguments = {"overrides": ["training.epochs=3"], "method": "coop"}
    first, second = run(backbone, store, **arguments), run(backbone, store, **arguments)
    assert first.result.parts == second.result.parts
    assert second.result.images_encoded == 0
    other = run(backbone, store, seed=2, **arguments)
    assert other.result.key_digest != first.result.key_digest
    assert other.result.few_shot_digest != first.result.few_shot_digest


def test_interrupted_training_is_tested_and_said(backbone, store):
    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("coop epoch 2"):
            raise KeyboardInterrupt

    outcome = run(backbone, store, "coop", overrides=["training.epochs=9"], progress=stop)
    assert outcome.result.fit["epochs"] < 9
    assert any("interrupted" in warning for warning in outcome.result.warnings)


def test_a_written_run_reads_back_and_damage_is_noticed(backbone, store, tmp_path):
    outcome = run(backbone, store, "zero-shot", "few-shot")
    folder = write_run(tmp_path / "run", outcome.result, outcome.predictions, outcome.model)
    assert read_run(folder) == outcome.result
    assert is_done(folder, outcome.result.key)
    assert not is_done(folder, dataclasses.replace(outcome.result.key, seed=7))
    path = folder / "result.json"
    content = json.loads(path.read_text())
    for change in ({"key_digest": "0"}, {"parts": []}, {"seconds": {"fit": None}}):
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(DataError):
            read_run(folder)
    path.write_text(json.dumps(content)[:-40])
    with pytest.raises(DataError, match="damaged"):
        read_run(folder)
    assert not is_done(tmp_path / "nowhere", outcome.result.key)


def test_the_embedded_backbone_gets_the_quick_recipe(backbone):
    assert choose_recipe("coop", "few-shot", backbone).name == "coop/few-shot-quick"
    assert choose_recipe("coop", "few-shot", backbone, "csc").name == "coop/few-shot-csc"
    assert choose_recipe("coop", "few-shot", backbone, "none") is None
    language = load_backbone("mini-mllm")
    assert choose_recipe("mllm-lora", "base-to-novel", language).name == "mllm-lora/base-to-novel-quick"
    other = dataclasses.replace(language.spec, name="transformers:mini-mllm")
    language.spec = other
    assert choose_recipe("mllm-lora", "base-to-novel", language).name == "mllm-lora/base-to-novel"


def task_for(recipe, target="textures"):
    targets = [dataclasses.replace(TEXTURES, name=target)] if recipe.protocol == "cross-dataset" else []
    return make_task(DIGITS, recipe.protocol, 4, 1, targets=targets)


def test_every_recipe_can_be_planned(backbone):
    planned = 0
    for name in list_recipes():
        recipe = load_recipe(name)
        task = task_for(recipe)
        if recipe.tuned_on == "per-dataset-config":
            continue  # knows none of the embedded datasets
        plan = plan_run(recipe.method, backbone, task, recipe=name)
        assert plan.key.method == recipe.method
        planned += 1
    assert planned == sum(load_recipe(name).tuned_on != "per-dataset-config" for name in list_recipes()) >= 80


def test_templates_reach_the_text_tower(backbone, store):
    plain = run(backbone, store, "zero-shot", "few-shot").result
    task = make_task(dataclasses.replace(DIGITS, templates=("{}",)), "few-shot", 4, 1)
    other = run_method(plan_run("zero-shot", backbone, task), backbone, store=store).result
    assert other.templates == ("{}",)
    assert other.key_digest != plain.key_digest
    assert np.isfinite(other.score)


@pytest.mark.parametrize("method", sorted(methods))
def test_every_method_gives_the_same_answers_twice(backbone, store, method):
    data = DIGITS
    if methods.get(method).needs_mllm:  # slow on many images
        backbone, few = tiny_mllm.load(tiny_mllm.kind_for(method)), np.arange(0, len(DIGITS.test), 12)
        data = dataclasses.replace(DIGITS, test=DIGITS.test.subset(few))
    task = make_task(data, "base-to-novel", 2, 0)
    first, second = (
        run_method(plan_run(method, backbone, task, overrides=quick_overrides(method)), backbone, store=store)
        for _ in range(2)
    )
    assert first.result.parts == second.result.parts
    assert first.result.key_digest == second.result.key_digest
    for one, other in zip(first.predictions, second.predictions, strict=True):
        np.testing.assert_array_equal(one.predicted, other.predicted)
        np.testing.assert_array_equal(one.confidence, other.confidence)


@pytest.mark.parametrize("method", ["linear-probe", "tip-adapter", "tip-adapter-f", "clip-adapter"])
def test_validation_images_of_novel_classes_alone_search_nothing(backbone, store, method):
    data = dataclasses.replace(DIGITS, val=DIGITS.val.subset(np.flatnonzero(DIGITS.val.labels >= 5)))
    task = make_task(data, "base-to-novel", 2, 1)
    result = run_method(
        plan_run(method, backbone, task, overrides=quick_overrides(method)), backbone, store=store
    ).result
    assert result.tuned_on == "none"
    assert 0 <= result.score <= 1


def test_what_the_sampler_did_is_in_the_warnings(backbone, store):
    task = make_task(DIGITS, "few-shot", 2, 3, "tip")
    assert task.val is not None
    assert len(task.val) == len(DIGITS.val)  # Tip-Adapter searches on all of them
    result = run_method(plan_run("zero-shot", backbone, task), backbone, store=store).result
    assert result.key.sampler == "tip"
    assert any("same images for every seed" in warning for warning in result.warnings)
    with pytest.raises(DataError, match="--allow-fewer"):
        make_task(DIGITS, "few-shot", 10_000, 1)
    short = make_task(DIGITS, "few-shot", 10_000, 1, allow_fewer=True)
    assert len(short.train) == len(DIGITS.train)
    assert any("fewer than 10000" in note for note in short.few_shot.notes)


def test_recipes_with_settings_per_dataset_know_theirs_only(backbone):
    names = [name for name in list_recipes() if load_recipe(name).tuned_on == "per-dataset-config"]
    planned = 0
    for name in names:
        recipe = load_recipe(name)
        with pytest.raises(ConfigError, match=r"none for '(digits|textures)'"):
            plan_run(recipe.method, backbone, task_for(recipe), recipe=name)
        for dataset in recipe.by_dataset:
            task = make_task(dataclasses.replace(DIGITS, name=dataset), recipe.protocol, 4, 1)
            assert plan_run(recipe.method, backbone, task, recipe=name).key.dataset == dataset
            planned += 1
        for target in recipe.by_target:
            plan = plan_run(recipe.method, backbone, task_for(recipe, target), recipe=name)
            assert plan.key.settings["target_settings"] == {target: recipe.by_target[target]}
            planned += 1
    expected = sum(len(load_recipe(name).by_dataset) + len(load_recipe(name).by_target) for name in names)
    assert planned == expected >= 74


def test_ctrl_c_before_anything_was_learned_is_passed_on(backbone, store):
    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(backbone, store, "linear-probe", "few-shot", seed=11, progress=stop)


def test_colour_jitter_is_in_a_key_only_where_it_is_on(backbone):
    """Runs made before there was such a setting keep their keys."""
    task = make_task(DIGITS, "few-shot", 4, 1)
    off, zero, on = (
        plan_run("clip-adapter", backbone, task, overrides=overrides).key
        for overrides in ([], ["colour_jitter=0"], ["colour_jitter=0.4"])
    )
    assert "colour_jitter" not in off.settings["training"]
    assert off.digest == zero.digest != on.digest
    assert on.settings["training"]["colour_jitter"] == 0.4
    assert plan_run("adaptclipzs", backbone, task, recipe="none").resolved.training.colour_jitter == 0.4


@pytest.mark.parametrize(
    ("method", "setting", "other"),
    [("unem", "likelihood", "gaussian"), ("transclip", "start_from", "taskres")],
)
def test_settings_that_came_later_are_in_a_key_only_where_they_are_changed(backbone, method, setting, other):
    task = make_task(DIGITS, "few-shot", 4, 1)
    assert setting not in plan_run(method, backbone, task).key.settings["method"]
    changed = plan_run(method, backbone, task, overrides=[f"{setting}={other}"]).key
    assert changed.settings["method"][setting] == other


# --- both candidate lists ---------------------------------------------------------------------------------------------


def few_images():
    return dataclasses.replace(DIGITS, test=DIGITS.test.subset(np.arange(40)))


@pytest.mark.parametrize("method", ["mllm-zero-shot", "vladva"])
def test_mllms_answer_among_half_and_among_all_classes_from_one_pass(method, store, monkeypatch):
    backbone, passes = tiny_mllm.load("llava"), []
    kind, data = methods.get(method), few_images()
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: passes.append(len(x)) or forward(self, x))
    if method == "mllm-zero-shot":  # whose own forward is what it looks for
        monkeypatch.setattr(kind, "scores_alone", True)
    given = {"overrides": quick_overrides(method)}

    def done(**task):
        plan = plan_run(method, backbone, make_task(data, "base-to-novel", 1, 1, **task), **given)
        return run_method(plan, backbone, store=store).result

    both = done()
    assert sum(passes) == 40  # every image once
    joint = done(joint=True)
    base, novel, h = both.among_all
    assert (base, novel) == (joint.part("base").accuracy, joint.part("novel").accuracy)
    assert h == pytest.approx(joint.harmonic_mean)
    assert base <= both.part("base").accuracy
    assert novel <= both.part("novel").accuracy
    assert joint.among_all == ()
    assert both.part("base").metrics["among_all"]["classes"] == 10


def test_answers_that_depend_on_the_list_are_not_picked_from_another(store):
    backbone = tiny_mllm.load("llava")
    task = make_task(few_images(), "base-to-novel", 1, 1)
    plan = plan_run("mllm-zero-shot", backbone, task, overrides=["route=letters", "shifts=1"])
    assert run_method(plan, backbone, store=store).result.among_all == ()


def test_others_do_on_request(backbone, store):
    task = make_task(few_images(), "base-to-novel", 2, 1)
    for method, can in (("zero-shot", True), ("linear-probe", False)):  # one can't mix fitted and new classes
        plan = plan_run(method, backbone, task)
        assert run_method(plan, backbone, store=store).result.among_all == ()
        assert bool(run_method(plan, backbone, store=store, both_lists=True).result.among_all) == can
