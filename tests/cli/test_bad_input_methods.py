"""Bad input of methods through the command line: exit code 2, one clear sentence, no traceback, nothing written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.data.features import FeatureStore
from adaptkit.evaluation.results import read_run
from adaptkit.methods import methods
from adaptkit.types import TensorInputs
from tests.cli.conftest import CLASSES
from tests.quick import backbone_words, description_words, quick_overrides, sentences

ON_FEATURES = sorted(name for name in methods if methods.get(name).reads == "image_features")
SEARCHING = {
    name: field
    for name in sorted(methods)
    for field in methods.get(name).config_class.__dataclass_fields__
    if field.startswith("search") and field != "searched"
}
"""Methods that can choose settings on validation images, with the setting that asks for it."""


@pytest.fixture
def words(tmp_path):
    """A quick run of a method, as words of the command line."""

    def make(method: str, photos: Path, *more: object, names: object = CLASSES) -> list[object]:
        given = ["run", photos, "--method", method, "--shots", 2, "--out", tmp_path / "out"]
        given += [*description_words(method, names, tmp_path), *backbone_words(method)]
        return [*given, *(word for setting in quick_overrides(method) for word in ("--set", setting)), *more]

    return make


@pytest.fixture
def sentence(refused, tmp_path):
    """Run a command that must be refused in one sentence, before anything is written; returns the sentence."""

    def check(*given: object) -> str:
        output = refused(*given)
        lines = [line for line in output.splitlines() if not line.startswith(("Usage:", "Try "))]
        message = " ".join(" ".join(lines).split())
        assert message.startswith("Error: "), output
        assert message.count("Error: ") == 1
        assert message.endswith((".", ").")), output
        assert not (tmp_path / "out").exists()
        return message

    return check


def test_how_many_methods_are_looped_over():
    assert len(list(methods)) >= 38
    assert len(ON_FEATURES) >= 20
    assert len(SEARCHING) >= 9
    assert {"ape", "tip-adapter", "linear-probe", "clip-adapter", "transclip"} <= set(SEARCHING)


# --- one class --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(methods))
def test_a_task_of_one_class_works_or_is_refused(call, sentence, photos, words, tmp_path, method):
    for name in ("beech", "pine", "yew"):
        shutil.rmtree(photos / name)
    given = words(method, photos, names=["oak"])
    outcome = call(*given)
    if outcome.exit_code:
        assert re.search(r"two classes|at least 2", sentence(*given)), outcome.output
        return
    (part,) = read_run(tmp_path / "out").parts
    said = part.metrics.get("answers", {})
    missed = said.get("share_none", said.get("share_without_options", 0.0))  # of free answers, those that name nothing
    assert part.correct == round(part.total * (1 - missed))  # there is nothing else to answer
    assert part.total > 0


# --- descriptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(name for name in methods if methods.get(name).reads_descriptions == "needed"))
def test_descriptions_of_other_classes(sentence, photos, words, tmp_path, method):
    path = tmp_path / "others.json"
    path.write_text(json.dumps(sentences(["robin", "wren", "beech"])), encoding="utf-8")
    given = [word for word in words(method, photos) if word not in ("--descriptions", str(tmp_path / "sentences.json"))]
    message = sentence(*given, "--descriptions", path)
    for name in ("oak", "pine", "yew", "robin", "wren"):  # missing ones, and those that fit no class
        assert name in message
    allowed = sentence(*given, "--descriptions", path, "--allow-undescribed")
    assert f"{method} reads descriptions" in allowed
    assert "'oak'" in allowed
    assert "--descriptions" in sentence(*given)  # none at all


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "setting", "more"),
    [
        ("clip-lora", "rank={}", ()),
        ("peft", "method.settings={{r: {}}}", ("--set", "kind=lora")),
        ("peft", "method.settings={{r: {}}}", ("--set", "kind=dora")),
    ],
)
def test_ranks_above_the_layers_width(call, sentence, photos, words, method, setting, more):
    def of_rank(rank: int) -> list[object]:
        return words(method, photos, *more, "--set", setting.format(rank))

    message = sentence(*of_rank(100_000))
    assert "rank" in message
    width = int(re.findall(r"at most (\d+)", message)[0])
    assert f"at most {width}" in sentence(*of_rank(width + 1))
    assert "at least 1" in sentence(*of_rank(0))
    outcome = call(*of_rank(width))
    assert outcome.exit_code == 0, outcome.output


# --- searches ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_val(photos):
    """The photos as folders of training and test images, without any for validation."""
    for folder in sorted(photos.iterdir()):
        for index, path in enumerate(sorted(folder.glob("*.png"))):
            target = photos / ("train", "test")[index % 2] / folder.name
            target.mkdir(parents=True, exist_ok=True)
            path.rename(target / path.name)
        folder.rmdir()
    return photos


@pytest.mark.parametrize("method", sorted(SEARCHING))
def test_a_search_without_validation_images(call, sentence, without_val, words, tmp_path, method):
    """Asked for, it is refused; a default is left out, and the result says so."""
    setting = SEARCHING[method]
    given = words(method, without_val)
    message = sentence(*given, "--set", f"method.{setting}=true")
    assert f"method.{setting}" in message
    assert "none" in message
    outcome = call(*given)
    assert outcome.exit_code == 0, outcome.output
    result = read_run(tmp_path / "out")
    assert result.tuned_on == "none"
    by_default = result.key.settings["method"][setting]
    assert any("no validation images" in warning for warning in result.warnings) == by_default


@pytest.mark.parametrize("method", sorted(SEARCHING))
def test_a_search_on_validation_images_of_one_class(sentence, without_val, words, method):
    val = without_val / "val" / "oak"
    val.mkdir(parents=True)
    (without_val / "train/oak/0.png").rename(val / "0.png")
    given = words(method, without_val, "--set", f"method.{SEARCHING[method]}=true")
    assert "two classes" in sentence(*given)


# --- values that aren't finite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["train", "val", "test"])
@pytest.mark.parametrize("method", ON_FEATURES)
def test_features_that_are_not_finite(sentence, photos, words, monkeypatch, method, place):
    """Wherever the features come from: here the store gives them, which wouldn't keep such ones itself."""
    plain = FeatureStore.inputs

    def broken(self, backbone, split, **settings):
        found = plain(self, backbone, split, **settings)
        values = found.values.clone()
        if split.kind == place:
            values[0, 1, 2] = float("nan")
        return TensorInputs(values, found.labels)

    monkeypatch.setattr(FeatureStore, "inputs", broken)
    message = sentence(*words(method, photos))
    kind = {"train": "Training image 1", "val": "Validation image 1", "test": r"Image \d+"}[place]
    assert re.search(rf"{kind} has features that aren't finite", message)


def test_a_backbone_that_gives_values_that_are_not_finite(sentence, photos, words, monkeypatch):
    plain = DualEncoder.encode_image
    monkeypatch.setattr(DualEncoder, "encode_image", lambda self, pixels: plain(self, pixels) * float("inf"))
    assert "gave features that aren't finite" in sentence(*words("tip-adapter", photos))


def test_predicting_what_is_not_finite(call, refused, photos, words, tmp_path, monkeypatch):
    assert call(*words("tip-adapter", photos)).exit_code == 0
    monkeypatch.setattr(DualEncoder, "encode_image", lambda self, pixels: torch.full((len(pixels), 128), torch.nan))
    assert "aren't finite" in refused("predict", tmp_path / "out", photos / "oak" / "0.png").replace("\n", " ")
