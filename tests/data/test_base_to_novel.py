"""Base and novel classes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from adaptkit.data.base_to_novel import split_base_novel
from adaptkit.data.catalogue import CATALOGUE
from adaptkit.data.few_shot import sample_few_shot
from adaptkit.data.sources import load_dataset
from adaptkit.data.splits import TestSplit, TrainSplit
from adaptkit.errors import DataError
from tests.data.pictures import make_test, make_train

SPLITS = os.environ.get("ADAPTKIT_SPLITS_DIR", "")

# (first base, last base, first novel, last novel) and images of (base, novel) test classes.
# Source: datasets sheet, section 1.
PUBLISHED = {
    "caltech101": (("face", "helicopter", "ibis", "yin_yang"), (1549, 916)),
    "oxford_pets": (("abyssinian", "keeshond", "leonberger", "yorkshire_terrier"), (1881, 1788)),
    "stanford_cars": (
        (
            "2000 AM General Hummer SUV",
            "1998 Eagle Talon Hatchback",
            "2012 FIAT 500 Abarth",
            "2012 smart fortwo Convertible",
        ),
        (4002, 4039),
    ),
    "oxford_flowers": (("pink primrose", "petunia", "wild pansy", "blackberry lily"), (1053, 1410)),
    "dtd": (("banded", "marbled", "matted", "zigzagged"), (864, 828)),
    "eurosat": (("Annual Crop Land", "Industrial Buildings", "Pasture Land", "Sea or Lake"), (4200, 3900)),
    "ucf101": (("Apply_Eye_Makeup", "Long_Jump", "Lunges", "Yo_Yo"), (1934, 1849)),
}


def test_halves_round_up():
    checked = 0
    for n in range(2, 30):
        base, novel = split_base_novel(np.random.default_rng(n).permutation(n), n)
        assert base.classes == tuple(range((n + 1) // 2))
        assert base.classes + novel.classes == tuple(range(n))
        checked += 1
    assert checked == 28


def test_only_present_classes_count():
    base, novel = split_base_novel([4, 0, 0, 1, 2], 5)
    assert (base.classes, novel.classes) == ((0, 1), (2, 4))
    assert (len(base), base.name, novel.name) == (2, "base", "novel")
    assert novel.names("abcde") == ("c", "e")


def test_indices_and_labels():
    _, novel = split_base_novel([0, 1, 2, 4], 5)
    labels = [4, 0, 2, 4, 3, 1]
    assert novel.indices(labels).tolist() == [0, 2, 3]
    assert novel.relabel([4, 2, 4]).tolist() == [1, 0, 1]
    with pytest.raises(DataError, match="Label 0 isn't one of the novel classes"):
        novel.relabel([0])


@pytest.mark.parametrize("make", [make_train, make_test])
def test_restrict(make):
    split = make([0, 3, 1, 2, 3])
    base, novel = split_base_novel(split.labels, 4)
    part = novel.restrict(split)
    assert type(part) is type(split)
    assert type(part) in (TrainSplit, TestSplit)
    assert part.class_names == ("class 2", "class 3")
    assert part.labels.tolist() == [1, 0, 1]
    assert part.ids == tuple(split.ids[index] for index in (1, 3, 4))
    assert part.positions.tolist() == [1, 3, 4]
    assert len(base.restrict(split)) + len(part) == len(split)


@pytest.mark.parametrize(
    ("labels", "part"), [([0, 0], "there are 1"), ([], "there are 0"), ([0, 5], "0 to 2 is accepted")]
)
def test_refused(labels, part):
    with pytest.raises(DataError, match=part):
        split_base_novel(labels, 3)


def test_base_and_novel_share_the_all_class_draw():
    train = make_train([0, 1, 2, 3] * 8)
    few = sample_few_shot(train, None, 4, 1)
    drawn = train.subset(few.train_indices)
    base, novel = split_base_novel(drawn.labels, 4)
    parts = {*base.restrict(drawn).ids, *novel.restrict(drawn).ids}
    assert parts == set(drawn.ids)


@pytest.mark.skipif(not SPLITS, reason="ADAPTKIT_SPLITS_DIR isn't set: no published split files")
def test_published_halves():
    checked = 0
    for name, (names, sizes) in PUBLISHED.items():
        dataset = load_dataset(Path(SPLITS) / CATALOGUE[name].json)
        base, novel = split_base_novel(dataset.train.labels, len(dataset.class_names))
        halves = base.names(dataset.stored_names), novel.names(dataset.stored_names)
        assert (halves[0][0], halves[0][-1], halves[1][0], halves[1][-1]) == names
        assert (len(base.restrict(dataset.test)), len(novel.restrict(dataset.test))) == sizes
        assert dataset.notes == ()
        checked += 1
    assert checked == 7
