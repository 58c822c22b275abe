"""The run record: what counts as done, what is refused as damaged, and that nothing is half-written."""

from __future__ import annotations

import dataclasses
import errno
import json
import os

import pytest

from adaptkit import storage
from adaptkit.backbones import load_backbone
from adaptkit.data.features import FeatureStore
from adaptkit.data.sources import load_dataset
from adaptkit.errors import DataError, StorageError
from adaptkit.evaluation.protocols import plan_run, run_method
from adaptkit.evaluation.results import (
    adapter_facts,
    environment,
    headline,
    is_done,
    peak_memory_bytes,
    read_run,
    write_run,
)
from adaptkit.evaluation.tasks import make_task
from adaptkit.methods.adapter import load_adapter, read_adapter_config
from adaptkit.storage import read_safetensors


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("mini")


@pytest.fixture(scope="module")
def outcome(backbone, tmp_path_factory):
    """A base-to-novel run of linear-probe on digits."""
    task = make_task(load_dataset("digits"), "base-to-novel", 2, 1)
    store = FeatureStore(tmp_path_factory.mktemp("features"))
    return run_method(plan_run("linear-probe", backbone, task), backbone, store=store)


@pytest.fixture
def folder(outcome, tmp_path):
    return write_run(tmp_path / "run", outcome.result, outcome.predictions, outcome.model)


def change(folder, **changes):
    path = folder / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_holds_result_predictions_and_adapter(folder, outcome, backbone):
    assert read_run(folder) == outcome.result
    stored = read_safetensors(folder / "predictions.safetensors")
    assert len(stored) == 8
    for item in outcome.predictions:
        for name in ("index", "labels", "predicted", "confidence"):
            assert stored[f"{item.part}.{name}"].tolist() == pytest.approx(getattr(item, name).tolist())
    model = load_adapter(folder / "adapter", backbone)
    assert model.class_names == outcome.result.class_names
    facts = read_adapter_config(folder / "adapter").facts
    assert facts["few-shot digest"] == outcome.result.few_shot_digest
    assert "test accuracy, novel classes" in facts
    assert outcome.result.key.dataset in (folder / "adapter" / "README.md").read_text()


def test_scores_come_from_counts(outcome):
    result = outcome.result
    base, novel = (result.part(name) for name in ("base", "novel"))
    assert base.accuracy == base.correct / base.total == pytest.approx(base.metrics["accuracy"])
    assert result.score == result.harmonic_mean
    shown = headline(result)
    assert (shown["base"], shown["novel"], shown["H"]) == (base.accuracy, novel.accuracy, result.harmonic_mean)
    assert dataclasses.replace(result, harmonic_mean=None).score == base.accuracy
    with pytest.raises(DataError, match="no part 'all'; it has base, novel"):
        result.part("all")


def test_settings_chosen_on_test_images_are_said_on_the_card(outcome):
    assert "caution" not in adapter_facts(outcome.result)
    assert "test" in adapter_facts(dataclasses.replace(outcome.result, tuned_on="test"))["caution"]


@pytest.mark.parametrize(
    "name", ["method", "backbone_digest", "split_digest", "protocol", "shots", "seed", "sampler", "settings"]
)
def test_another_key_is_another_run(folder, outcome, name):
    key = outcome.result.key
    assert is_done(folder, key)
    other = {"shots": 3, "seed": 0, "settings": {**key.settings, "precision": "bf16"}}.get(name, "other")
    assert not is_done(folder, dataclasses.replace(key, **{name: other}))
    content = json.loads((folder / "result.json").read_text())["key"]
    change(folder, key={**content, name: other})  # by hand: the digest no longer fits
    with pytest.raises(DataError, match="doesn't match its own key"):
        read_run(folder)


def test_counts_that_cant_be_are_damage(folder, outcome):
    good = json.loads((folder / "result.json").read_text())["parts"]
    cases = [{"correct": -1}, {"total": 0, "correct": 0}, {"correct": good[0]["total"] + 1}, {"correct": "many"}]
    for case in cases:
        change(folder, parts=[{**good[0], **case}, good[1]])
        with pytest.raises(DataError, match="run it again"):
            read_run(folder)
        assert not is_done(folder, outcome.result.key)
    change(folder, parts=good)
    assert is_done(folder, outcome.result.key)


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"parts": NaN}', "[" * 5000, "\x80"])
def test_what_is_no_result_is_damage(folder, outcome, content):
    (folder / "result.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match="damaged"):
        read_run(folder)
    assert not is_done(folder, outcome.result.key)


def test_an_interrupted_run_is_kept_but_not_done(folder, outcome):
    change(folder, fit={**outcome.result.fit, "interrupted": True})
    assert read_run(folder).fit["interrupted"]
    assert not is_done(folder, outcome.result.key)


@pytest.mark.parametrize("failing", ["predictions.safetensors", "adapter_config.json", "result.json"])
def test_a_full_disk_leaves_the_old_run_whole(outcome, folder, tmp_path, monkeypatch, failing):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    plain = storage._sync

    def sync(path):
        if failing in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(path)

    monkeypatch.setattr(storage, "_sync", sync)
    for place, overwrite in ((folder, True), (tmp_path / "new", False)):
        with pytest.raises(StorageError, match="disk is full"):
            write_run(place, outcome.result, outcome.predictions, outcome.model, overwrite=overwrite)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_run_is_replaced_only_on_request(outcome, folder):
    with pytest.raises(StorageError, match="isn't empty"):
        write_run(folder, outcome.result, outcome.predictions, outcome.model)
    other = dataclasses.replace(outcome.result, warnings=("replaced",))
    write_run(folder, other, outcome.predictions, outcome.model, overwrite=True)
    assert read_run(folder).warnings == ("replaced",)


def test_numbers_that_arent_finite_are_never_written(outcome, tmp_path):
    for value in (float("nan"), float("inf")):
        broken = dataclasses.replace(outcome.result, seconds={"fit": value})
        with pytest.raises(StorageError, match="JSON"):
            write_run(tmp_path / "run", broken, outcome.predictions, outcome.model)
    assert list(tmp_path.iterdir()) == []


def test_the_environment_names_versions_and_memory(outcome):
    facts = environment("cpu", "fp32")
    assert facts["versions"]["torch"] != "not installed"
    assert facts == outcome.result.environment
    assert peak_memory_bytes() > 50 * 2**20
