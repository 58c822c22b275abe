"""Few-shot draws: the published image lists, and what each other sampler promises."""

from __future__ import annotations

import csv
import os
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from adaptkit.data.catalogue import CATALOGUE
from adaptkit.data.few_shot import SAMPLERS, group_by_label, sample_few_shot
from adaptkit.data.sources import load_dataset
from adaptkit.errors import ConfigError, DataError, UnknownNameError
from tests.data.pictures import make_test, make_train, make_val

FIXTURES = Path(__file__).with_name("fewshot-fixtures.csv")
SPLITS = os.environ.get("ADAPTKIT_SPLITS_DIR", "")
LABELS = [2, 2, 0, 2, 0, 1, 2, 0, 1, 1, 0, 1] * 3
"""Twelve images of each of three classes, which first appear in the order 2, 0, 1."""


@pytest.fixture
def train():
    return make_train(LABELS)


@pytest.fixture
def val():
    return make_val(LABELS[::-1])


def by_class(split, indices):
    found = defaultdict(list)
    for index in np.asarray(indices).tolist():
        found[int(split.labels[index])].append(index)
    return dict(found)


@pytest.mark.parametrize(
    ("seed", "wanted"), [(1, [137, 582, 867, 821]), (2, [978, 883, 970, 869]), (3, [243, 606, 557, 133])]
)
def test_generator_gives_the_golden_values(seed, wanted):
    assert random.Random(seed).sample(range(1000), 4) == wanted
    split = make_train([0] * 1000)
    assert sample_few_shot(split, None, 4, seed).train_indices.tolist() == wanted


def fixture_rows():
    with open(FIXTURES, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_fixture_file_is_whole():
    assert len(fixture_rows()) == 300


@pytest.mark.skipif(not SPLITS, reason="ADAPTKIT_SPLITS_DIR isn't set: no published split files")
def test_published_image_lists():
    loaded = {}
    for name, known in CATALOGUE.items():
        if known.json and (Path(SPLITS) / known.json).is_file():
            loaded[name] = load_dataset(Path(SPLITS) / known.json)
    compared = 0
    for row in fixture_rows():
        if row["dataset"] not in loaded:
            continue
        dataset = loaded[row["dataset"]]
        few = sample_few_shot(dataset.train, dataset.val, int(row["shots"]), int(row["seed"]), allow_fewer=True)
        split, indices, digest = {
            "train": (dataset.train, few.train_indices, few.train_digest),
            "val": (dataset.val, few.val_indices, few.val_digest),
        }[row["split"]]
        got = (len(indices), digest, split.ids[indices[0]], int(indices[0]))
        wanted = (int(row["n"]), row["sha256_of_newline_joined_relative_paths"], row["first_path"])
        assert got == (*wanted, int(row["first_index_in_split_list"])), row
        compared += 1
    assert compared == 30 * len(loaded)
    assert len(loaded) >= 7, f"only {sorted(loaded)} are in {SPLITS}"


def test_groups_keep_first_appearance():
    groups = group_by_label([2, 0, 2, 1])
    assert list(groups.items()) == [(2, [0, 2]), (0, [1]), (1, [3])]
    assert group_by_label([]) == {}


def test_coop_by_hand(train, val):
    generator = random.Random(7)
    wanted = [
        index for label in (2, 0, 1) for index in generator.sample(np.flatnonzero(train.labels == label).tolist(), 5)
    ]
    wanted_val = [
        index
        for label in dict.fromkeys(val.labels.tolist())
        for index in generator.sample(np.flatnonzero(val.labels == label).tolist(), 4)
    ]
    few = sample_few_shot(train, val, 5, 7)
    assert few.train_indices.tolist() == wanted
    assert few.val_indices.tolist() == wanted_val
    assert few.train_digest == few.digest == train.subset(wanted).paths_digest
    assert few.val_digest == val.subset(wanted_val).paths_digest
    assert (few.shots, few.seed, few.sampler, few.short_classes, few.notes) == (5, 7, "coop", (), ())


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("shots", [1, 3, 12])
def test_every_sampler_draws_the_shots(train, val, sampler, shots):
    few = sample_few_shot(train, val, shots, 3, sampler)
    drawn, drawn_val = by_class(train, few.train_indices), by_class(val, few.val_indices)
    expected_val = {"tip": 12, "lp++": shots}.get(sampler, min(shots, 4))
    for label in range(3):
        assert len(set(drawn[label])) == shots
        assert len(set(drawn_val[label])) == expected_val
    again = sample_few_shot(train, val, shots, 3, sampler)
    assert again.train_indices.tolist() == few.train_indices.tolist()
    assert again.val_indices.tolist() == few.val_indices.tolist()
    assert len(sample_few_shot(train, None, shots, 3, sampler).val_indices) == 0


def draws(train, val, sampler, seed, shots=2):
    few = sample_few_shot(train, val, shots, seed, sampler)
    return few.train_indices.tolist(), few.val_indices.tolist()


def test_seeds(train, val):
    fixed = {"tip", "tpt"}
    checked = 0
    for sampler in SAMPLERS:
        same = draws(train, val, sampler, 1) == draws(train, val, sampler, 2)
        assert same == (sampler in fixed), sampler
        checked += 1
    assert checked == 7
    assert draws(train, val, "coop", 0) != draws(train, val, "coop", 1)
    assert len(sample_few_shot(train, val, 2, 1, "tip").notes) == 1
    assert draws(train, val, "coop-linear-probe", -1) == draws(train, val, "coop-linear-probe", 2**32 - 1)


def test_relations_between_samplers(train, val):
    coop = draws(train, val, "coop", 1)
    assert draws(train, val, "cross-modal", 1) == coop
    assert draws(train, val, "lp++", 1) == coop  # two shots: val draws two as well
    assert draws(train, val, "lp++", 1, shots=6)[0] == draws(train, val, "coop", 1, shots=6)[0]
    assert draws(train, val, "lp++", 1, shots=6)[1] != draws(train, val, "coop", 1, shots=6)[1]
    assert draws(train, val, "tip", 9)[0] == coop[0]  # Random(1), no class too small
    assert draws(train, val, "tip", 9)[1] == list(range(36))
    assert draws(train, None, "clip-lora", 1)[0] == coop[0]
    assert draws(train, val, "clip-lora", 1)[0] != coop[0]  # val is drawn first
    swapped = draws(make_train(LABELS[::-1]), make_val(LABELS), "coop", 1)
    assert draws(train, val, "clip-lora", 1) == (swapped[1], swapped[0])


def test_tpt_draws_the_same_places_in_every_class(train, val):
    groups = group_by_label(train.labels)
    drawn = by_class(train, draws(train, val, "tpt", 5, shots=3)[0])
    places = {tuple(groups[label].index(index) for index in drawn[label]) for label in range(3)}
    assert places == {tuple(random.Random(0).sample(range(12), 3))}


def test_coop_linear_probe_goes_through_sorted_classes(train, val):
    few = sample_few_shot(train, val, 2, 1, "coop-linear-probe")
    assert train.labels[few.train_indices].tolist() == [0, 0, 1, 1, 2, 2]
    first = np.random.RandomState(1).choice(np.flatnonzero(train.labels == 0), size=2, replace=False)
    assert few.train_indices[:2].tolist() == first.tolist()


def test_small_classes():
    train = make_train([0, 0, 0, 1, 1, 1, 1, 1])
    with pytest.raises(
        DataError, match=r"1 class has fewer training images than 4 shots \(class 0 3\): ask for 3 shots"
    ):
        sample_few_shot(train, None, 4, 1)
    checked = 0
    for sampler in SAMPLERS:
        few = sample_few_shot(train, None, 4, 1, sampler, allow_fewer=True)
        drawn = by_class(train, few.train_indices)
        if sampler == "tip":
            assert len(drawn[0]) == 4
            assert set(drawn[0]) <= {0, 1, 2}
        else:
            assert drawn[0] == [0, 1, 2]  # in list order
        assert len(set(drawn[1])) == 4
        assert few.short_classes == (("class 0", 3),)
        assert "fewer than 4 training images" in few.notes[0]
        checked += 1
    assert checked == 7


def test_small_classes_take_no_random_numbers():
    few = sample_few_shot(make_train([0, 0] + [1] * 9), None, 4, 1, allow_fewer=True)
    assert few.train_indices.tolist()[2:] == [2 + index for index in random.Random(1).sample(range(9), 4)]


def test_classes_without_images_are_short():
    with pytest.raises(DataError, match="class 1 0"):
        sample_few_shot(make_train([0, 2], 3), None, 1, 1)
    assert sample_few_shot(make_train([0, 2], 3), None, 1, 1, allow_fewer=True).short_classes == (("class 1", 0),)


@pytest.mark.parametrize("shots", [0, -1, 1.0, True, "4"])
def test_refused_shots(train, shots):
    with pytest.raises(ConfigError, match="at least 1"):
        sample_few_shot(train, None, shots, 1)


def test_refused_splits_and_samplers(train, val):
    with pytest.raises(DataError, match="takes a train split, and was given the test split"):
        sample_few_shot(make_test(LABELS), None, 1, 1)
    with pytest.raises(DataError, match="takes a val split, and was given the test split"):
        sample_few_shot(train, make_test(LABELS), 1, 1)
    with pytest.raises(UnknownNameError, match="Did you mean 'coop'"):
        sample_few_shot(train, val, 1, 1, "cooop")
