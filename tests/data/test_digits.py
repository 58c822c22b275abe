"""The real digits: the source's pictures, enlarged, in a split that never changes."""

from __future__ import annotations

import random

import numpy as np
from sklearn.datasets import load_digits

from adaptkit.data.digits import DIGIT_NAMES, cubic_weights, enlarge, load_digit_splits, split_rows
from adaptkit.data.sources import load_dataset


def test_every_digit_is_in_one_split():
    images, labels = load_digit_splits()
    assert {split: len(rows) for split, rows in labels.items()} == {"train": 898, "val": 359, "test": 540}
    source = load_digits()
    rows = split_rows(source.target)
    assert sorted(row for part in rows.values() for row in part.tolist()) == list(range(1797))
    for split, part in rows.items():
        assert np.array_equal(labels[split], source.target[part])
        assert np.array_equal(images[split], enlarge(source.images[part]))
        assert images[split].shape == (len(part), 32, 32, 3)
        assert images[split].dtype == np.uint8


def test_split_by_hand():
    labels = np.array([0, 1] * 10)
    generator = random.Random(0)
    own = list(range(0, 20, 2))
    generator.shuffle(own)
    rows = split_rows(labels)
    assert [row for row in rows["train"].tolist() if row % 2 == 0] == sorted(own[:5])
    assert [row for row in rows["val"].tolist() if row % 2 == 0] == sorted(own[5:7])
    assert [row for row in rows["test"].tolist() if row % 2 == 0] == sorted(own[7:])
    assert {split: len(part) for split, part in rows.items()} == {"train": 10, "val": 4, "test": 6}


def test_cubic_weights():
    weights = cubic_weights(8, 32)
    assert weights.shape == (32, 8)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)
    assert np.array_equal(cubic_weights(5, 5), np.eye(5))
    ramp = weights @ np.arange(8.0)
    np.testing.assert_allclose(ramp[8:24], (np.arange(8, 24) + 0.5) / 4 - 0.5)  # straight lines stay straight


def test_enlarged_pictures():
    small = np.zeros((2, 8, 8))
    small[1] = 16
    assert np.unique(enlarge(small)[0]).tolist() == [0]
    assert np.unique(enlarge(small)[1]).tolist() == [255]
    one = np.zeros((1, 8, 8))
    one[0, 2, 5] = 16
    big = enlarge(one)[0]
    assert np.array_equal(big[..., 0], big[..., 2])
    row, column = np.unravel_index(big[..., 0].argmax(), (32, 32))
    assert 8 <= row < 12
    assert 20 <= column < 24


def test_as_a_dataset():
    dataset = load_dataset("digits")
    assert dataset.class_names == DIGIT_NAMES
    assert dataset.train.counts() == [89, 91, 88, 92, 90, 91, 90, 90, 87, 90]
    assert dataset.templates == ("a photo of the digit {}.",)
