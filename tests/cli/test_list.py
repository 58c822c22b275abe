"""`adaptkit list`: each kind as JSON, and each entry by name."""

from __future__ import annotations

import json

import pytest

from adaptkit.data.sources import known_names
from adaptkit.evaluation.recipes import list_recipes
from adaptkit.methods import methods


@pytest.fixture
def listed(call):
    def parse(*words: str):
        outcome = call("list", *words, "--json")
        assert outcome.exit_code == 0, outcome.output
        return json.loads(outcome.stdout)

    return parse


def test_every_kind_lists_its_registry(listed):
    assert {item["name"] for item in listed("methods")} == set(methods)
    assert {item["name"] for item in listed("datasets")} == set(known_names())
    assert {item["name"] for item in listed("recipes")} == set(list_recipes())
    backbones = {item["name"] for item in listed("backbones")}
    assert {"mini", "ViT-B-16/openai", "local-dir:FOLDER"} <= backbones


def test_every_method_and_recipe_shows_its_settings(listed):
    shown = 0
    for name in methods:
        facts = listed("methods", name)
        assert facts["name"] == name
        assert all(setting["help"] for setting in facts["settings"])
        shown += 1
    for name in list_recipes():
        facts = listed("recipes", name)
        assert facts["method"] == name.split("/")[0]
        assert facts["source"]
        shown += 1
    assert shown == len(methods) + len(list_recipes()) > 100


def test_a_dataset_shows_its_prompts_and_a_missing_one_what_it_needs(call, listed):
    facts = listed("datasets", "digits")
    assert len(facts["class_names"]) == 10
    assert all("{}" not in prompt for prompt in facts["prompts"])
    assert "embedded" in call("list", "datasets", "digits").output
    assert "split_zhou_EuroSAT.json" in call("list", "datasets", "eurosat").output


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (("methods", "tip-adaptor"), "'tip-adapter'"),
        (("datasets", "digit"), "'digits'"),
        (("recipes", "coop/few-shot-cs"), "'coop/few-shot-csc'"),
        (("backbones", "ViT-B-61/openai"), "ViT-B-16"),
        (("metods",), "'methods'"),
    ],
)
def test_near_matches(refused, words, near):
    assert near in refused("list", *words)


def test_marked_recipes_say_what_they_were_tuned_on(listed):
    marked = {item["name"]: item["tuned on"] for item in listed("recipes") if item["tuned on"].startswith("marked")}
    assert len(marked) >= 8
    assert set(marked.values()) == {"marked: per-dataset-config"}
    assert {"tip-adapter/few-shot-per-dataset", "mmrl/base-to-novel-per-dataset"} <= set(marked)
