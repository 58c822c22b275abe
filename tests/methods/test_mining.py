"""Options mined from answers that were written down here, branch by branch."""

from __future__ import annotations

import pytest
import torch

from adaptkit.methods.mllm._mining import Mined, guess_of, mine, ranked

NAMES = ("Red Fox", "grey_wolf", "Pallas's cat", "lynx", "brown-bear", "stoat", "otter", "mink")


def numbers(seed=0):
    return torch.Generator().manual_seed(seed)


def mined(texts, truth, most=5, seed=0):
    return mine(texts, NAMES, truth, numbers(seed), most)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<think>a fox?</think><answer>Red fox</answer>", "red fox"),
        ("<answer>lynx</answer> no, <answer>otter</answer>", "otter"),
        ("<answer>Species name: Red Fox!</answer>", "red fox"),
        ("Name:  Pallas's Cat.", "pallas cat"),
        ("BROWN-BEAR", "brown-bear"),
        ("  grey_wolf\n", "grey wolf"),
        ("", ""),
        ("?!", ""),
        ("fox " * 24, " ".join(["fox"] * 24)),  # 95 characters
        ("fox " * 26, ""),
    ],
)
def test_what_an_answer_names(text, wanted):
    assert guess_of(text) == wanted


def test_the_most_frequent_known_names_become_options():
    """Seven strings: the five most frequent are kept, of which one is no class; the rest is too rare."""
    texts = (
        ["lynx"] * 4 + ["a dog"] * 3 + ["Red fox"] * 3 + ["the red fox"] + ["otter", "otter"] + ["stoat"] * 2 + ["mink"]
    )
    found = mined(texts, truth=0)
    assert found.how == "mined"
    assert sorted(found.options) == [0, 3, 5, 6]
    assert found.options[found.place] == 0


def test_an_image_that_is_named_right_alone_is_dropped():
    assert mined(["red fox"] * 20, truth=0) is None
    assert mined(["red fox"] * 15 + ["a dog"] * 5, truth=0) is None  # no class beside it either


@pytest.mark.parametrize("texts", [["lynx"] * 20, ["a dog", "a cat"] * 10])
def test_too_few_options_are_filled(texts):
    found = mined(texts, truth=0)
    assert found.how == "filled"
    assert len(found.options) == (4 if texts[0] == "lynx" else 3) == len(set(found.options))
    assert (3 in found.options) or texts[0] != "lynx"
    assert found.options[found.place] == found.truth == 0


def test_the_truth_is_added_or_takes_the_last_place():
    added = mined(["lynx"] * 3 + ["otter"] * 2, truth=0)
    assert (added.how, sorted(added.options)) == ("truth added", [0, 3, 6])
    texts = ["lynx"] * 6 + ["otter"] * 5 + ["mink"] * 4 + ["stoat"] * 3 + ["brown-bear"] * 2
    full = mined(texts, truth=0)
    assert (full.how, sorted(full.options)) == ("truth added", [0, 3, 5, 6, 7])  # the rarest has gone
    assert sorted(mined(texts, truth=0, most=3).options) == [0, 3, 6]


def test_answers_that_cannot_be_read_give_random_options():
    for texts in (["?"] * 20, ["word " * 40] * 20, []):
        found = mined(texts, truth=2)
        assert found.how == "unparsed"
        assert len(set(found.options)) == 3
        assert found.options[found.place] == 2


def test_of_two_classes_there_are_no_others_to_add():
    assert sorted(mine(["?"], NAMES[:2], 0, numbers(), 5).options) == [0, 1]
    assert sorted(mine(["grey wolf"], NAMES[:2], 0, numbers(), 5).options) == [0, 1]
    assert mine(["?"], NAMES[:1], 0, numbers(), 5) == Mined((0,), 0, "unparsed")


def test_orders_and_fills_follow_the_seed():
    texts = ["lynx"] * 6 + ["otter"] * 5 + ["mink"] * 4 + ["stoat"] * 3 + ["red fox"] * 2
    assert mined(texts, 0, seed=1) == mined(texts, 0, seed=1)
    orders = {mined(texts, 0, seed=seed).options for seed in range(20)}
    assert len(orders) > 10
    assert len({mined(texts, 0, seed=seed).place for seed in range(40)}) == 5  # no letter is spared
    assert len({frozenset(mined(["?"], 0, seed=seed).options) for seed in range(20)}) > 5


def test_rankings_hold_the_truth():
    assert sorted(ranked([4, 3, 2, 1, 0], 3, numbers(), 3).options) == [2, 3, 4]
    assert sorted(ranked([4, 3, 2, 1, 0], 0, numbers(), 3).options) == [0, 3, 4]
    assert ranked([1, 0], 0, numbers(), 5).how == "ranked"
