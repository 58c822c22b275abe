"""Answers, estimates and proposals, checked against what the rooms below give."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from adaptkit import FewShotClassifier
from adaptkit.data.features import FeatureStore
from adaptkit.errors import DataError, UnknownNameError, UnsupportedError
from adaptkit.evaluation.statistics import wilson_interval
from adaptkit.methods import methods
from adaptkit.methods.base import zero_shot_weights
from adaptkit.studio.engine import OFFERED, Engine, OvertakenError
from adaptkit.studio.workshop import Workshop
from adaptkit.types import DEFAULT_TEMPLATES
from tests.studio.conftest import png


@pytest.fixture
def three(project, fill):
    """Three classes; five labelled pictures of each and three without a label."""
    ids = dict(zip(("red", "green", "blue"), project.add_classes(["red", "green", "blue"]), strict=True))
    for colour, key in ids.items():
        fill(colour, 5, key)
        fill(colour, 3, first=100)
    return ids


def test_zero_shot_guesses_come_before_any_label(project, engine, fill, mini):
    (image,) = fill("red", 1)
    engine.encode()
    assert engine.answers().by == ""
    red, green = project.add_classes(["red thing", "green thing"])
    answers = engine.answers()
    assert answers.by == "zero-shot"
    assert "Missing: red thing, green thing" in answers.note
    assert answers.classes == (green, red)  # in the order of the names
    weights = zero_shot_weights(mini, ["green thing", "red thing"], DEFAULT_TEMPLATES)
    features = F.normalize(engine._features[image], dim=-1)
    expected = torch.softmax(mini.logit_scale * features @ weights.T, dim=0)
    np.testing.assert_allclose(answers.odds[0], expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("method", ["tip-adapter", "gda", "linear-probe"])
def test_answers_are_those_of_the_estimator(project, engine, three, method, mini):
    project.set_method(method)
    engine.encode()
    answers = engine.answers()
    assert (answers.by, answers.note) == (method, "")
    labelled = [image for image in project.state.images.values() if image.label]
    training = None if methods.get(method).default_training is None else {"views": 0}
    classifier = FewShotClassifier(method, mini, training=training)
    classifier.fit(
        [project.folder / "images" / image.file for image in labelled],
        [project.state.classes[image.label] for image in labelled],
    )
    expected = classifier.predict_proba([project.image_path(key) for key in answers.images])
    np.testing.assert_allclose(answers.odds, expected, atol=1e-5)
    assert [project.state.classes[key] for key in answers.classes] == classifier.classes_.tolist()


def test_an_estimate_answers_every_image_without_having_seen_it(project, engine, three, monkeypatch):
    engine.encode()
    seen = []
    fit = Engine._fit

    def watched(self, name, names, features, labels):
        seen.append({tuple(row.tolist()) for row in features})
        return fit(self, name, names, features, labels)

    monkeypatch.setattr(Engine, "_fit", watched)
    estimate = engine.estimate("gda")
    assert len(seen) == 5
    assert len(estimate.images) == 15
    for image in estimate.images:
        row = tuple(engine._features[image].tolist())
        assert sum(row not in fold for fold in seen) == 1
    plain = estimate.to_dict()
    assert plain["correct"] == estimate.correct == 15
    assert tuple(plain["interval"]) == wilson_interval(15, 15)
    assert plain["per_class"] == {key: [5, 5] for key in three.values()}
    assert plain["confusions"] == [] == list(plain["wrong"])
    assert engine.estimate("gda") is estimate  # remembered
    assert len(seen) == 5


def test_wrong_labels_show_as_confusions(project, engine, three):
    engine.encode()
    reds = project.state.labelled(three["red"])
    project.label(reds[:1], three["blue"])
    plain = engine.estimate("gda").to_dict()
    assert plain["wrong"] == {reds[0]: three["red"]}
    assert plain["confusions"] == [{"true": three["blue"], "taken_for": three["red"], "images": [reds[0]]}]
    assert plain["per_class"][three["blue"]] == [5, 6]


def test_a_class_with_one_image_is_not_tested_and_said_so(project, engine, fill):
    red, blue = project.add_classes(["red", "blue"])
    fill("red", 4, red)
    fill("blue", 1, blue)
    engine.encode()
    estimate = engine.estimate("tip-adapter")
    assert estimate.untested == (blue,)
    assert len(estimate.images) == 4


def test_what_is_missing_for_an_estimate_is_said(project, engine, fill):
    with pytest.raises(DataError, match="at least two classes"):
        engine.estimate("gda")
    red, blue = project.add_classes(["red", "blue"])
    fill("red", 1, red)
    engine.encode()
    with pytest.raises(DataError, match="Missing: blue"):
        engine.estimate("gda")
    fill("blue", 1, blue)
    engine.encode()
    with pytest.raises(DataError, match="second image"):
        engine.estimate("gda")
    with pytest.raises(UnknownNameError, match="'gda'"):
        engine.estimate("gdaa")
    with pytest.raises(UnsupportedError, match="doesn't offer 'coop'"):
        engine.estimate("coop")


def test_an_overtaken_estimate_stops(project, engine, three, monkeypatch):
    engine.encode()
    fit = Engine._fit

    def while_labelling(self, *given):
        project.label([next(key for key, p in project.state.images.items() if p.label is None)], three["red"])
        return fit(self, *given)

    monkeypatch.setattr(Engine, "_fit", while_labelling)
    with pytest.raises(OvertakenError):
        engine.estimate("gda")


def test_proposals_are_unlabelled_and_different(project, engine, three, fill):
    engine.encode()
    chosen = engine.next_to_label(engine.answers(), 4)
    assert len(set(chosen)) == 4
    assert all(project.state.images[key].label is None for key in chosen)
    project.label([key for key, p in project.state.images.items() if p.label is None], three["red"])
    assert engine.next_to_label(engine.answers(), 4) == []


def test_features_are_made_once_ever(project, mini, fill, tmp_path):
    fill("red", 5)
    store = FeatureStore(tmp_path / "features")
    Engine(project, mini, store).encode()
    assert store.encoded == 5
    again = FeatureStore(tmp_path / "features")
    other = Engine(project, mini, again)
    other.encode()
    assert again.encoded == 0
    assert len(other.known(list(project.state.images))) == 5


def test_lost_and_damaged_files_are_named_and_left_out(project, engine, three):
    lost, broken, *_ = project.state.images
    project.image_path(lost).unlink()
    project.image_path(broken).write_bytes(b"no picture")
    engine.encode()
    assert engine.missing() == []
    assert set(engine.failed) == {lost, broken}
    assert "gone" in engine.failed[lost]
    assert "isn't an image" in engine.failed[broken]
    assert set(engine.answers().images) == set(project.state.images) - {lost, broken}
    assert engine.estimate("gda").correct == 13


@pytest.mark.parametrize("method", OFFERED)
def test_every_method_offered_works_on_few_images(project, engine, three, method):
    project.set_method(method)
    engine.encode()
    answers = engine.answers()
    assert answers.by == method
    assert np.allclose(answers.odds.sum(axis=1), 1)
    assert engine.estimate(method).method == method


def test_an_image_taken_out_while_it_waits_is_no_failure(project, engine, fill):
    """Undo brings it back, and it is looked at then."""
    first, second = fill("red", 2)
    waiting = engine.missing()
    project.remove_images([second])
    engine._encode_part(waiting)
    assert engine.failed == {}
    assert engine.known([first, second]) == [first]
    project.undo()
    engine.encode()
    assert engine.known([first, second]) == [first, second]


def test_a_file_that_comes_back_is_looked_at_again(project, mini):
    workshop = Workshop(project, mini)
    ((image,), _) = workshop.take_in([("red.png", BytesIO(png("red", 0)).read)])
    workshop.engine._thread.join()
    workshop.engine._features.clear()
    project.image_path(image).unlink()
    workshop.engine.encode()
    assert list(workshop.engine.failed) == [image]
    assert workshop.take_in([("red.png", BytesIO(png("red", 0)).read)]) == ([], [])
    workshop.engine.encode()
    assert workshop.engine.failed == {}
    assert workshop.engine.known([image]) == [image]
