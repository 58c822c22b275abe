"""Templates and display names."""

from __future__ import annotations

import pytest

from adaptkit.data.catalogue import CATALOGUE
from adaptkit.data.sources import load_dataset
from adaptkit.data.synthetic import EMBEDDED
from adaptkit.data.templates import (
    IMAGENET_ENSEMBLE,
    check_templates,
    display_name,
    preview,
    render,
    render_all,
    templates_for,
)
from adaptkit.errors import ConfigError

# Source: datasets sheet, section 6.
PUBLISHED = {
    "caltech101": "a photo of a {}.",
    "stanford_cars": "a photo of a {}.",
    "sun397": "a photo of a {}.",
    "imagenet": "a photo of a {}.",
    "oxford_pets": "a photo of a {}, a type of pet.",
    "oxford_flowers": "a photo of a {}, a type of flower.",
    "food101": "a photo of {}, a type of food.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "dtd": "{} texture.",
    "eurosat": "a centered satellite photo of {}.",
    "ucf101": "a photo of a person doing {}.",
}


def test_published_templates():
    assert {name: templates_for(name) for name in PUBLISHED} == {name: (text,) for name, text in PUBLISHED.items()}
    assert {name for name, known in CATALOGUE.items() if known.group == "CoOp suite"} == set(PUBLISHED)
    further = [name for name in CATALOGUE if name not in PUBLISHED]
    assert len(further) == 18
    assert all(len(check_templates(templates_for(name))) == 1 for name in further)
    assert templates_for("my photos") == ("a photo of a {}.",)


def test_imagenet_ensemble():
    assert len(set(IMAGENET_ENSEMBLE)) == 7
    assert check_templates(IMAGENET_ENSEMBLE) == IMAGENET_ENSEMBLE
    assert IMAGENET_ENSEMBLE[0] == "itap of a {}."


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        ("yorkshire_terrier", "yorkshire terrier"),
        ("Yo_Yo", "Yo Yo"),
        ("  a__b \t c ", "a b c"),
        ("707-320", "707-320"),
        ("bird of paradise", "bird of paradise"),
        ("_", ""),
        ("Häher", "Häher"),
    ],
)
def test_display_name(stored, shown):
    assert display_name(stored) == shown
    assert display_name(display_name(stored)) == shown


def test_check_templates():
    assert check_templates("{}.") == ("{}.",)
    assert check_templates(iter(["{}.", "a {}"])) == ("{}.", "a {}")


@pytest.mark.parametrize("templates", [[], "", "a photo.", "{} and {}", "{name}", "a {} {0}", "a {}}", ["{}.", "none"]])
def test_refused_templates(templates):
    with pytest.raises(ConfigError, match=r"template"):
        check_templates(templates)


def test_render():
    assert render("a photo of a {}.", "big_cat") == "a photo of a big cat."
    assert render_all(["{}.", "a {}"], ["x_y", "z"]) == [["x y.", "a x y"], ["z.", "a z"]]
    assert render("a {}.", "{}") == "a {}."  # a class may be called anything


def test_preview():
    dataset = load_dataset("digits", templates=["{}.", "the {}."])
    assert preview(dataset, 3) == ["zero.", "the zero.", "one."]
    assert len(preview(dataset, 100)) == 20


def test_embedded_templates_are_good():
    checked = [check_templates(load_dataset(name).templates) for name in EMBEDDED]
    assert len(checked) == 8
