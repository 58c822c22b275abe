"""Folds, the choice of images to label, and confused pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.studio.choosing import FOLDS, confusions, folds, label_next, uncertainty


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60))
def test_folds_leave_every_class_something_to_train_on(labels):
    array = np.array(labels)
    places = folds(array)
    for label in set(labels):
        own = places[array == label]
        if len(own) == 1:
            assert own.tolist() == [-1]
            continue
        counts = np.bincount(own, minlength=FOLDS)
        assert counts.sum() == len(own)
        assert counts.max() - counts.min() <= 1
        assert all((own != fold).any() for fold in range(FOLDS))
    assert (folds(array) == places).all()


def test_uncertainty_runs_from_sure_to_undecided():
    values = uncertainty(np.array([[1.0, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0.8, 0.1, 0.1]]))
    assert values[0] == pytest.approx(0, abs=1e-9)
    assert values[1] == pytest.approx(1)
    assert 0 < values[2] < 1
    assert uncertainty(np.ones((2, 1))).tolist() == [1, 1]


def unit(*rows):
    array = np.array(rows, dtype=np.float64)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def test_the_uncertain_and_different_images_come_first():
    features = unit([1, 0, 0], [1, 0.01, 0], [0, 1, 0], [0, 0, 1])
    odds = np.array([[0.5, 0.5], [0.5, 0.5], [0.6, 0.4], [0.999, 0.001]])
    chosen = label_next(odds, features, np.empty((0, 3)), 4)
    assert chosen[0] == 0
    assert chosen[1] == 2  # the near copy of the first waits, though it is more uncertain
    assert sorted(chosen) == [0, 1, 2, 3]
    known = unit([1, 0, 0])
    assert label_next(odds, features, known, 1) == [2]  # the first two look like what is labelled
    assert label_next(odds[:0], features[:0], known, 5) == []


def test_without_answers_diversity_alone_decides():
    features = unit([1, 0, 0], [1, 0.1, 0], [1, -0.1, 0], [0, 1, 0], [0, 0, 1])
    chosen = label_next(None, features, np.empty((0, 3)), 3)
    assert len(set(chosen)) == 3
    assert {3, 4} <= set(chosen)


def test_equal_images_are_each_chosen_once():
    assert sorted(label_next(np.full((4, 2), 0.5), unit(*[[1, 1]] * 4), np.empty((0, 2)), 9)) == [0, 1, 2, 3]


def test_confused_pairs_are_ranked():
    found = confusions([0, 0, 1, 1, 2], [1, 1, 0, 1, 2])
    assert [(pair.true, pair.taken_for, pair.images) for pair in found] == [(0, 1, (0, 1)), (1, 0, (2,))]
    assert confusions([1], [1]) == []
