"""The pair maker: no image on both sides, exact numbers, the same for one seed; and what is measured on pairs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from adaptkit.methods.mllm import _pairs
from adaptkit.methods.mllm._pairs import PairTally, Sources, balanced, make_pairs, pair_facts, shares_of, split_images

LABELS = [place % 5 for place in range(40)]
PARENTS = ["dog", "dog", "cat", "cat", "fish"]


def numbers(seed=0):
    return torch.Generator().manual_seed(seed)


def unordered(pairs):
    return [tuple(sorted(pair)) for pair in pairs.places.tolist()]


def sources(**shares):
    features = torch.nn.functional.one_hot(torch.tensor(LABELS), 5).float() + 0.3 * torch.randn(
        40, 5, generator=numbers(7)
    )
    confusions = torch.randn(40, 5, generator=numbers(8))
    return Sources(shares, features, confusions, PARENTS)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.5, 3.56])
def test_ratio_and_shares_are_exact(ratio):
    pairs = make_pairs(LABELS, range(40), 40, ratio, numbers(), sources(near=0.5, confused=0.25, related=0.1))
    negatives = round(40 * ratio)
    counts = pairs.counts()
    assert counts.pop("same") == 40
    assert sum(counts.values()) == negatives
    assert counts == shares_of(negatives, {"near": 0.5, "confused": 0.25, "related": 0.1, "random": 0.15})
    for (first, second), same, kind in zip(pairs.places.tolist(), pairs.same.tolist(), pairs.kinds, strict=True):
        assert same == (LABELS[first] == LABELS[second]) == (kind == "same")
        if kind == "related":
            assert PARENTS[LABELS[first]] == PARENTS[LABELS[second]]
    assert len(set(unordered(pairs))) == len(pairs)


def test_shares_are_whole_numbers():
    assert shares_of(10, {"a": 0.25, "b": 0.25, "c": 0.5}) == {"a": 3, "b": 2, "c": 5}
    assert shares_of(3, {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}) == {"a": 1, "b": 1, "c": 1}
    assert shares_of(7, {"a": 0.7, "b": 0.3}) == {"a": 5, "b": 2}
    assert shares_of(0, {"a": 1.0}) == {"a": 0}


def test_classes_get_alike_many_pairs():
    pairs = make_pairs(LABELS, range(40), 20, 1.0, numbers())
    same = Counter(
        LABELS[first] for (first, _), kind in zip(pairs.places.tolist(), pairs.kinds, strict=True) if kind == "same"
    )
    assert same == dict.fromkeys(range(5), 4)


def test_one_seed_one_set_and_a_random_order():
    make = lambda seed: make_pairs(LABELS, range(40), 40, 2.0, numbers(seed), sources(near=0.5, confused=0.5))  # noqa: E731
    first, again, other = make(3), make(3), make(4)
    assert torch.equal(first.places, again.places)
    assert first.kinds == again.kinds
    assert not torch.equal(first.places, other.places)
    swapped = (first.places[:, 0] > first.places[:, 1]).float().mean()
    assert 0.35 < swapped < 0.65


def test_no_image_is_on_both_sides():
    for share in (0.25, 0.5):
        kept, held = split_images(LABELS, share, numbers())
        assert not set(kept) & set(held)
        assert sorted([*kept, *held]) == list(range(40))
        assert len(held) == round(share * 8) * 5
        train, test = (make_pairs(LABELS, side, 20, 1.0, numbers()) for side in (kept, held))
        assert set(train.places.flatten().tolist()) <= set(kept)
        assert set(test.places.flatten().tolist()) <= set(held)
        assert len(train) == 40
        assert len(test)
    assert split_images([0, 0, 0, 1, 1, 1], 0.5, numbers()) == ([0, 1, 2, 3, 4, 5], [])  # two must stay on each side
    assert split_images(LABELS, 0.0, numbers())[1] == []


def test_near_negatives_are_the_nearest():
    found = sources(near=1.0)
    pairs = make_pairs(LABELS, range(40), 10, 1.0, numbers(), found)
    unit = torch.nn.functional.normalize(found.features, dim=1)
    other = torch.tensor(LABELS)[:, None] != torch.tensor(LABELS)
    nearest = (unit @ unit.T).masked_fill(~other, -2).argmax(dim=1).tolist()
    negatives = [pair for pair, kind in zip(unordered(pairs), pairs.kinds, strict=True) if kind == "near"]
    assert len(negatives) == 10
    assert set(negatives) <= {tuple(sorted(pair)) for pair in enumerate(nearest)}


def test_confused_negatives_are_of_the_class_confused_with():
    scores = torch.zeros(40, 5)
    for place, label in enumerate(LABELS):
        scores[place, label] = 9.0  # its own class doesn't count
        scores[place, (label + 1) % 5] = 5.0
    pairs = make_pairs(LABELS, range(40), 40, 1.0, numbers(), Sources({"confused": 1.0}, confusions=scores))
    gaps = [
        (LABELS[a] - LABELS[b]) % 5
        for (a, b), kind in zip(pairs.places.tolist(), pairs.kinds, strict=True)
        if kind == "confused"
    ]
    assert len(gaps) == 40
    assert set(gaps) <= {1, 4}


def test_what_a_source_lacks_is_drawn_and_counted_as_such():
    parents = ["a", "b", "c", "d", "e"]  # no class has a sibling
    pairs = make_pairs(LABELS, range(40), 10, 1.0, numbers(), Sources({"related": 1.0}, parents=parents))
    assert pairs.counts() == {"same": 10, "random": 10}


def test_few_images():
    pairs = make_pairs([0, 0, 1], range(3), 9, 4.0, numbers())
    assert len(pairs) == 0  # 1 same-class pair would need 4 others, and there are 2
    assert make_pairs([0, 0, 1], range(3), 9, 2.0, numbers()).counts() == {"same": 1, "random": 2}
    assert len(make_pairs([0, 0, 0], range(3), 9, 1.0, numbers())) == 0
    assert len(make_pairs([], [], 9, 1.0, numbers())) == 0
    alone = make_pairs([0, 1, 2], range(3), 9, 1.0, numbers(), alone=True)
    assert alone.counts() == {"same": 3, "random": 3}
    assert sorted(unordered(alone)[:3]) == [(0, 0), (1, 1), (2, 2)]


def test_many_images_are_drawn_from_without_a_list(monkeypatch):
    monkeypatch.setattr(_pairs, "_LISTED", 10)
    pairs = make_pairs(LABELS, range(40), 40, 2.0, numbers())
    assert pairs.counts() == {"same": 40, "random": 80}
    assert len(set(unordered(pairs))) == 120


def test_couples_hold_a_yes_and_a_no():
    same = torch.tensor([1.0] * 4 + [0.0] * 10)
    couples = balanced(same, numbers())
    assert couples.shape == (10, 2)
    assert same[couples[:, 0]].tolist() == [1.0] * 10
    assert same[couples[:, 1]].tolist() == [0.0] * 10
    assert couples[:, 1].unique().numel() == 10
    assert sorted(torch.bincount(couples[:, 0]).tolist()) == [2, 2, 3, 3]
    assert torch.equal(couples, balanced(same, numbers()))


# --- measures ---------------------------------------------------------------------------------------------------------


def test_accuracy_yes_rate_and_swap_consistency():
    margins = torch.tensor([[1.0, 2.0], [-1.0, 3.0], [-2.0, -1.0], [0.5, -0.5]])
    facts = pair_facts(margins, torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert facts == {"accuracy": 6 / 8, "yes_rate": 4 / 8, "swap_consistency": 2 / 4, "majority_rate": 0.5}
    always_no = pair_facts(torch.full((100, 2), -1.0), torch.tensor([1.0] * 22 + [0.0] * 78))
    assert always_no["accuracy"] == always_no["majority_rate"] == pytest.approx(0.78)
    assert always_no["yes_rate"] == 0


def test_answers_are_tallied():
    tally = PairTally()
    assert tally.facts() == {}
    tally.add(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
    tally.add(torch.tensor([[-1.0]]))
    assert tally.facts() == {"pair_answers": 5, "yes_rate": 3 / 5, "swap_consistency": 1 / 2}
