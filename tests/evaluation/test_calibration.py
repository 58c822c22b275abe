"""Temperatures and prediction sets: known cases, the promise over many draws, and what too few images are told."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from adaptkit.errors import AdapterError, ConfigError
from adaptkit.evaluation.calibration import (
    Calibration,
    calibrate,
    check_probability,
    fit_temperature,
    read_calibration,
    softmax,
    threshold,
    warning_about,
)


def draw(count, seed, factor=1.0, classes=5):
    """Logits whose softmax is the truth, multiplied by `factor`."""
    numbers = np.random.default_rng(seed)
    logits = numbers.normal(size=(count, classes)) * 1.5
    odds = softmax(logits).cumsum(axis=1)
    labels = (numbers.random((count, 1)) > odds).sum(axis=1).clip(max=classes - 1)
    return factor * logits, labels


@pytest.mark.parametrize("factor", [0.25, 1.0, 8.0])
def test_a_temperature_takes_a_factor_back(factor):
    assert fit_temperature(*draw(4000, 0, factor)) == pytest.approx(factor, rel=0.1)


def test_right_answers_alone_make_nobody_certain():
    """Plain cross-entropy would ask for a temperature of 0; the odds stay near those of n right answers out of n."""
    logits = np.eye(4)[np.arange(40) % 4] * 10
    found = calibrate(logits, np.arange(40) % 4)
    assert 0.97 < found.probabilities(logits).max() < 0.99


def test_probabilities_keep_their_order():
    logits, labels = draw(50, 1, 4.0)
    found = calibrate(logits, labels)
    odds = found.probabilities(logits)
    np.testing.assert_allclose(odds.sum(axis=1), 1)
    assert (odds.argmax(axis=1) == logits.argmax(axis=1)).all()
    assert list(found.scores) == sorted(found.scores)
    assert len(found.scores) == 50


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9])
def test_sets_hold_the_true_class_as_often_as_promised(coverage):
    """Over 200 held-out sets of 60 images, whatever the logits are worth (here four times too sure)."""
    hits, runs = [], 200
    for seed in range(runs):
        found = calibrate(*draw(60, seed, 4.0))
        logits, labels = draw(100, 1000 + seed, 4.0)
        inside = found.sets(found.probabilities(logits), coverage)
        assert inside.any(axis=1).all()
        hits.append(inside[np.arange(100), labels].mean())
    assert len(hits) == runs
    assert coverage - 0.015 < np.mean(hits) < max(coverage + 0.05, 0.63)  # the likeliest class is always in: 0.6 here


def test_thresholds():
    scores = tuple(np.linspace(0.01, 0.99, 99).round(2).tolist())
    assert threshold(scores, 0.9) == 0.9
    assert threshold(scores, 0.5) == 0.5
    assert threshold(scores[:9], 0.9) == 0.09
    assert threshold(scores[:8], 0.9) == math.inf
    every = Calibration(1.0, scores[:8]).sets(np.array([[0.7, 0.2, 0.1]]), 0.9)
    assert every.tolist() == [[True, True, True]]
    assert Calibration(1.0, (0.0,) * 99).sets(np.array([[0.5, 0.3, 0.2]]), 0.9).tolist() == [[True, False, False]]


def test_warnings_say_how_many_images_are_needed():
    assert "hold out at least 9" in warning_about(5, 0.9)
    assert "hold out at least 99" in warning_about(98, 0.99)
    assert "lies between 0.82 and 0.97" in warning_about(40, 0.9)
    assert warning_about(9, 0.9).startswith("With 9 held-out images")
    assert warning_about(2000, 0.9) == ""


@pytest.mark.parametrize("value", [0, 1, -0.5, 2, math.nan, "0.9", True, None])
def test_what_is_no_probability(value):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        check_probability("coverage", value)


def test_reading_back():
    found = calibrate(*draw(20, 2))
    assert read_calibration(found.to_dict(), "here") == found
    wrong = (
        [],
        {},
        {"temperature": 1.0},
        {"temperature": 0, "scores": [0.1]},
        {"temperature": "1", "scores": [0.1]},
        {"temperature": 1.0, "scores": []},
        {"temperature": 1.0, "scores": [2.0]},
        {"temperature": math.inf, "scores": [0.1]},
        {"temperature": 1.0, "scores": 3},
    )
    for content in wrong:
        with pytest.raises(AdapterError, match="The calibration in here can't be used"):
            read_calibration(content, "here")
    assert len(wrong) == 9


def test_nothing_overflows():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = calibrate(np.array([[1e4, 0.0], [0.0, 1e4]]), np.array([0, 0]))
        assert np.isfinite(found.probabilities(np.array([[1e4, 0.0]]))).all()
