"""From free answers to classes, on awkward ones."""

from __future__ import annotations

import pytest

from adaptkit.methods.mllm._matching import Match, Matcher, normalise
from adaptkit.methods.tags import answer_of

NAMES = ("707-320", "A320", "tabby cat", "cat", "red-winged blackbird", "Model S", "Bishop of Llandaff", "St. Bernard")
ALIASES = {"tabby cat": ("Felis catus",), "St. Bernard": ("saint bernard", "Alpine Mastiff"), "unknown": ("cat",)}

CASES = [
    ("tabby cat", 2, "exact"),
    ("  Tabby   CAT. ", 2, "exact"),
    ("a tabby cat", 2, "exact"),
    ("The cat", 3, "exact"),
    ("tabby_cat", 2, "exact"),
    ("“Tabby cat”!", 2, "exact"),
    ("red-winged blackbird's", 4, "exact"),
    ("st bernard", 7, "exact"),
    ("model s", 5, "exact"),
    ("felis catus", 2, "alias"),
    ("Saint Bernard", 7, "alias"),
    ("alpine mastiff,", 7, "alias"),
    ("It is a tabby cat on a mat", 2, "containment"),  # "cat" is part of the longer name
    ("I see an alpine mastiff here", 7, "containment"),
    ("this is an A320 aircraft", 1, "containment"),
    ("Llandaff", 6, "containment"),
    ("blackbird", 4, "containment"),  # the only name that it is a word of
    ("707", None, "none"),  # not 707-320
    ("320", None, "none"),
    ("cats", None, "none"),
    ("concatenate", None, "none"),
    ("cat or A320", None, "none"),
    ("", None, "none"),
    ("   ", None, "none"),
    ("...", None, "none"),
    ("I cannot tell.", None, "none"),
    ("<answer>cat</answer>", 3, "exact"),
    ("<think>an A320?</think><answer>cat</answer>", 3, "exact"),
    ("<answer>A320</answer> no, <answer>cat</answer>", 3, "exact"),
    ("<answer>cat", 3, "exact"),
    ("<answer></answer> cat", None, "none"),
    ("model sedan", None, "none"),
    ("s", 5, "containment"),
    ("bishop", 6, "containment"),
]


@pytest.mark.parametrize(("text", "index", "step"), CASES)
def test_awkward_answers(text, index, step):
    assert Matcher(NAMES, ALIASES).match(text) == Match(index, step)


def test_enough_awkward_answers():
    assert len(CASES) >= 30


def test_lenient_matching_takes_parts():
    lenient = Matcher(NAMES, lenient=True)
    assert lenient.match("707") == Match(0, "containment")
    assert lenient.match("") == Match(None, "none")
    assert Matcher(NAMES).match("707") == Match(None, "none")


def test_names_that_are_the_same_when_normalised_match_nothing():
    assert Matcher(["Cat", "cat."]).match("cat") == Match(None, "none")


def test_pieces():
    assert normalise("The Cat’s Cradle (old)") == "cat cradle old"
    assert normalise("well-known - thing-") == "well-known thing"
    assert answer_of("x <ANSWER> a </ANSWER>") == " a "
    assert answer_of("plain") == "plain"
