"""The drawn datasets: their classes, their counts, and that a seed decides every pixel."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from adaptkit.data import drawing
from adaptkit.data.synthetic import (
    DESCRIPTION_TEMPLATE,
    EMBEDDED,
    IMAGES_PER_CLASS,
    SHAPE_CLASSES,
    SHIFTS,
    SPLITS,
    SUMMARIES,
    TEXTURE_CLASSES,
    UNSEEN_TEXTURES,
    contact_sheet,
    describe_creature,
    is_embedded,
    load_embedded,
    shape_attributes,
    species_attributes,
)
from adaptkit.errors import UnknownNameError

DRAWN = tuple(name for name in EMBEDDED if name != "digits")


@pytest.mark.parametrize("name", DRAWN)
def test_counts_and_names(name):
    data = load_embedded(name)
    assert data.name == name
    assert len(data.class_names) == len(set(data.class_names)) == 24
    for split in SPLITS:
        images, labels = data.images[split], data.labels[split]
        assert images.shape == (24 * IMAGES_PER_CLASS[split], 32, 32, 3)
        assert images.dtype == np.uint8
        assert np.bincount(labels, minlength=24).tolist() == [IMAGES_PER_CLASS[split]] * 24
        assert not images.flags.writeable
        assert not labels.flags.writeable
        assert images.std(axis=(1, 2, 3)).min() > 1  # no blank picture


@pytest.mark.parametrize("name", DRAWN)
def test_deterministic(name):
    first = load_embedded(name)
    load_embedded.cache_clear()
    again = load_embedded(name)
    assert again is not first
    other = load_embedded(name, 1)
    for split in SPLITS:
        assert np.array_equal(again.images[split], first.images[split])
        assert not np.array_equal(other.images[split], first.images[split])
        assert np.array_equal(other.labels[split], first.labels[split])
    assert other.class_names == first.class_names


def test_splits_share_no_picture():
    checked = 0
    for name in DRAWN:
        data = load_embedded(name)
        pictures = [image.tobytes() for split in SPLITS for image in data.images[split]]
        assert len(set(pictures)) == len(pictures) == 2160
        checked += 1
    assert checked == 7


def test_names_of_embedded_datasets():
    assert EMBEDDED[0] == "digits"
    assert set(EMBEDDED) == {"digits", "shapes", "textures", "species", *SHIFTS}
    assert list(SUMMARIES) == list(EMBEDDED)
    assert is_embedded("shapes")
    assert not is_embedded("eurosat")
    with pytest.raises(UnknownNameError, match="Did you mean 'shapes'"):
        load_embedded("shape")


def test_shape_classes_share_attributes():
    attributes = [shape_attributes(name) for name in SHAPE_CLASSES]
    assert len(set(attributes)) == 24
    for place in range(3):
        assert len({triple[place] for triple in attributes}) < 24  # no attribute is enough alone
    assert {triple[0] for triple in attributes} == set(range(6))


def test_shifts_keep_the_classes_of_shapes():
    assert len(SHIFTS) == 4
    for name in SHIFTS:
        assert load_embedded(name).class_names == SHAPE_CLASSES
        assert not np.array_equal(load_embedded(name).images["test"], load_embedded("shapes").images["test"])


def test_textures():
    assert load_embedded("textures").class_names == TEXTURE_CLASSES
    assert (
        len(set(TEXTURE_CLASSES[:12]) & set(UNSEEN_TEXTURES))
        == len(set(TEXTURE_CLASSES[12:]) & set(UNSEEN_TEXTURES))
        == 4
    )


def test_species_are_told_apart_by_their_descriptions():
    data = load_embedded("species")
    assert list(data.descriptions) == list(data.class_names) == list(species_attributes())
    assert len({frozenset(phrases) for phrases in data.descriptions.values()}) == 24
    assert {len(phrases) for phrases in data.descriptions.values()} == {7}
    words = {word for phrases in data.descriptions.values() for phrase in phrases for word in phrase.split()}
    assert not words & set(data.class_names)
    assert DESCRIPTION_TEMPLATE.count("{") == 2
    assert load_embedded("shapes").descriptions == {}


def test_creature_attributes_are_in_range():
    checked = 0
    for kind in species_attributes().values():
        assert set(kind) == set(drawing.CREATURE)
        for key, value in kind.items():
            assert 0 <= value < len(drawing.CREATURE[key])
            checked += 1
        assert describe_creature(kind)[0].startswith("a ")
    assert checked == 24 * 7


def test_pictures_show_the_classes_colours():
    """Mean colours of the classes are ordered as their names say: red ones are redder than blue ones."""
    data = load_embedded("shapes")
    colour = np.array([shape_attributes(name)[0] for name in SHAPE_CLASSES])[data.labels["train"]]
    middle = data.images["train"][:, 10:22, 10:22].reshape(len(colour), -1, 3).mean(axis=1)
    red, green, blue = (middle[colour == index].mean(axis=0) for index in range(3))
    assert red.argmax() == 0
    assert green.argmax() == 1
    assert blue.argmax() == 2


def test_contact_sheet(tmp_path):
    contact_sheet("shapes", tmp_path / "sheet.png", columns=3, enlarge=1)
    assert Image.open(tmp_path / "sheet.png").size == (3 * 32, 24 * 32)
