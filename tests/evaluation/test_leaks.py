"""The leak scanner of base-to-novel: novel names in training texts, however they are written."""

from __future__ import annotations

import pytest

from adaptkit.data.sources import load_dataset
from adaptkit.errors import DataError
from adaptkit.evaluation.leaks import check_leaks, leaked_names
from adaptkit.evaluation.protocols import plan_run, run_method
from adaptkit.evaluation.tasks import make_task
from tests.backbones import tiny_mllm

NOVEL = ("snow_leopard", "7-series sedan", "frog", "St. Bernard", "mother's day rose", "Löwe")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("USER: is it a Snow Leopard?", "snow_leopard"),
        ("a SNOW-LEOPARD", "snow_leopard"),
        ("snow_leopard", "snow_leopard"),
        ("the snowleopard", "snow_leopard"),
        ("a snow\nleopard.", "snow_leopard"),
        ("a 7 Series Sedan", "7-series sedan"),
        ("a 7_series-sedan", "7-series sedan"),
        ("(Frog)", "frog"),
        ("st bernard", "St. Bernard"),
        ("mothers day rose", "mother's day rose"),
        ("Mother’s Day Rose", "mother's day rose"),
        ("LÖWE", "Löwe"),
    ],
)
def test_planted_names_are_found(text, name):
    assert leaked_names([text], NOVEL, ["cat"]) == {name: text}
    with pytest.raises(DataError, match="Training texts name novel classes"):
        check_leaks([text], NOVEL, ["cat"])


@pytest.mark.parametrize("text", ["a frogman", "snow on a leopard", "", "7 series of sedans", "a bernard"])
def test_others_are_not(text):
    assert leaked_names([text], NOVEL, ["cat"]) == {}
    check_leaks([text], NOVEL, ["cat"])


def test_names_within_base_names():
    base = ("tree frog", "Frog-fish")
    assert leaked_names(["a tree-frog", "a frog fish"], NOVEL, base) == {}
    assert list(leaked_names(["a tree frog is a frog"], NOVEL, base)) == ["frog"]
    assert leaked_names(["a (big) cat"], ["cat"], ["Cat"]) == {}  # spelt alike: it can't be told apart
    assert leaked_names(["a c++ (x)"], ["c++ (x)"], []) == {"c++ (x)": "a c++ (x)"}


def test_a_run_is_refused_before_it_trains():
    backbone = tiny_mllm.load("llava")
    task = make_task(load_dataset("digits"), "base-to-novel", 1, 0)
    novel = task.parts[1].asked[0]
    plan = plan_run("mllm-lora", backbone, task, overrides=[f"method.prompt=Is it {novel.upper()} or another digit?"])
    with pytest.raises(DataError, match=repr(novel)):
        run_method(plan, backbone)
