"""WaffleCLIP: what is drawn, how long it is, and who shares it."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from adaptkit.errors import AdapterError, ConfigError, DataError
from adaptkit.methods.adapters.zero_shot import ZeroShot
from adaptkit.methods.descriptions._sentences import linked
from adaptkit.methods.descriptions.dclip import DCLIP, DCLIPConfig
from adaptkit.methods.descriptions.waffleclip import Shape, WaffleCLIP, WaffleCLIPConfig, clip_words, shape_of
from tests.methods.tiny import DESCRIPTIONS, NAMES, NOVEL, query, tiny_clip

BACKBONE = tiny_clip()
FEATURES = query(BACKBONE, "image_features")


def waffle(seed=0, descriptions=DESCRIPTIONS, names=NAMES, **settings):
    return WaffleCLIP(BACKBONE, names, config=WaffleCLIPConfig(**settings), seed=seed, descriptions=descriptions)


def tails(method):
    """What follows each class name, by class."""
    return {
        name: [one.split(name.replace("_", " "), 1)[1] for one in given] for name, given in method.sentences().items()
    }


def test_scores_are_the_sheets():
    method = waffle(count=3)
    units = [F.normalize(BACKBONE.text_features(given), dim=-1) for given in method.sentences().values()]
    similar = [(F.normalize(FEATURES, dim=-1) @ rows.T).mean(dim=1) for rows in units]
    torch.testing.assert_close(method(FEATURES), 20 * torch.stack(similar, 1), rtol=1e-5, atol=1e-5)
    merged = F.normalize(torch.stack([rows.mean(dim=0) for rows in units]), dim=-1)
    torch.testing.assert_close(waffle(count=3, aggregation="merged").class_weights(), merged, rtol=1e-5, atol=1e-6)


def test_classes_share_what_is_drawn():
    drawn = tails(waffle())
    assert len(set(map(tuple, drawn.values()))) == 1
    assert len(drawn["river"]) == 30
    assert tails(waffle().set_classes(NOVEL))["acorn"] == drawn["river"]
    own = tails(waffle(shared=False))
    assert len(set(map(tuple, own.values()))) == len(NAMES)
    assert tails(waffle(shared=False, names=NAMES[::-1])).keys() == own.keys()


@pytest.mark.parametrize(
    ("mode", "count", "total"),
    [("waffle", 15, 30), ("words", 5, 5), ("characters", 5, 5), ("names", 9, 1), ("waffle-and-descriptions", 15, 30)],
)
def test_how_many(mode, count, total):
    assert {len(given) for given in waffle(mode=mode, count=count).sentences().values()} == {total}


def test_none_is_the_name_alone():
    wanted = ZeroShot(BACKBONE, NAMES, templates=("A photo of a {}.",))(FEATURES)
    torch.testing.assert_close(waffle(count=0)(FEATURES), wanted)
    torch.testing.assert_close(waffle(mode="names")(FEATURES), wanted)
    assert waffle(mode="names", concept="thing").sentences()["river"] == ["A photo of a thing: a river."]


def test_descriptions_alone_are_dclip():
    settings = {"before": "A photo of a ", "after": "."}
    wanted = DCLIP(BACKBONE, NAMES, config=DCLIPConfig(**settings), descriptions=DESCRIPTIONS)(FEATURES)
    torch.testing.assert_close(waffle(mode="descriptions")(FEATURES), wanted)


def test_lengths_come_from_the_names():
    # two words of 5 and 3, one of 8: 1.5 words, rounded to even 2; letters (4 + 8) / 2; blanks 0.5, rounded to 0
    assert shape_of(["tabby cat", "airliner"]) == Shape(2, 6, 1, 8)
    assert shape_of(["golden_retriever"]) == Shape(2, 8, 1, 17)  # underscores are no blanks for groups
    assert shape_of(["ab cd", "ef gh"]) == Shape(2, 2, 2, 2)  # 2 characters, and a group of 2 more as it divides
    method, shape = waffle(mode="characters", count=4), shape_of(NAMES)
    for tail in tails(method)["river"]:
        found = re.fullmatch(r", which (?:has|is) ((?:\S+?)(?:, \S+?)*)\.", tail)
        assert [len(group) for group in found[1].split(", ")] == [shape.characters] * shape.groups
    for tail in tails(waffle(mode="words", count=4, words=("lantern", "velvet")))["river"]:
        assert set(tail[len(", which has ") : -1].split(" ")) <= {"lantern"[: shape.letters], "velvet"[: shape.letters]}


def test_letters_come_from_the_descriptions():
    given = dict.fromkeys(NAMES, ("x, y. z",))
    letters = set("".join(waffle(mode="characters", descriptions=given).draws(np.random.RandomState(0), 20)))
    assert letters == set("xyz, ") - ({" ", ","} if shape_of(NAMES).groups == 1 else set())
    without = waffle(mode="characters", descriptions={})
    assert set("".join(without.draws(np.random.RandomState(0), 20))) <= set("".join(NAMES)) | {",", " "}


def test_seeds_and_repetitions():
    assert waffle(1).sentences() == waffle(1).sentences() != waffle(2).sentences()
    assert waffle(1, repetition=3).sentences() == waffle(2, repetition=3).sentences()
    scores = torch.stack([waffle(repetition=index)(FEATURES) for index in range(7)])
    assert float(scores.std(dim=0).max()) > 0.01
    still = torch.stack([waffle(repetition=index, mode="descriptions")(FEATURES) for index in range(7)])
    assert float(still.std(dim=0).max()) < 1e-5


def test_the_saved_adapter_draws_the_same():
    first, other = waffle(1), waffle(2)
    other.load_adapter_state(first.adapter_state())
    assert other.sentences() == first.sentences()
    assert torch.equal(other(FEATURES), first(FEATURES))
    for wrong in (-1, 2**40):
        with pytest.raises(AdapterError, match="which seeds nothing"):
            other.load_adapter_state({"repetition": torch.tensor(wrong)})


def test_the_mix_keeps_the_class_own_descriptions():
    mixed = waffle(mode="waffle-and-descriptions", count=15).sentences()
    whole = [
        one
        for one in mixed["river"]
        if one in {"river, which has banks.", "A photo of a river, which is used for nothing."}
    ]
    assert whole
    shared = set(tails(waffle(mode="waffle-and-descriptions"))["tabby cat"])
    assert shared & set(tails(waffle(mode="waffle-and-descriptions"))["river"])


def test_the_mix_is_drawn_as_the_reference_draws_it():
    """Its steps in their order, with NumPy's global generator: for every class, one kept, descriptions, what stays."""
    names, words = ["tabby cat", "airliner", "grand piano"], ["river", "stone", "lantern"]
    given = {name: [f"a {name[0]} tail", "striped", "used, often."] for name in names}
    method = WaffleCLIP(
        BACKBONE,
        names,
        config=WaffleCLIPConfig("waffle-and-descriptions", 7, repetition=4, compat=True, words=tuple(words)),
        descriptions=given,
    )
    shape, count = shape_of(names), 4  # two thirds of 7
    letters = sorted(set("".join(text for texts in given.values() for text in texts)) - set(" ,."))

    def sentence(name, text):
        return f"A photo of a {name}, {linked(text, compat=True)}."

    before = np.random.get_state()
    np.random.seed(4)
    banks = {name: [] for name in names}
    for name in names:
        for _ in range(count):
            drawn = [
                np.random.choice([w[: shape.letters] for w in words], 1, replace=False)[0] for _ in range(shape.words)
            ]
            banks[name].append(" ".join(drawn))
            groups = [
                "".join(np.random.choice(letters, 1, replace=False)[0] for _ in range(shape.characters))
                for _ in range(shape.groups)
            ]
            banks[name].append(", ".join(groups))
    kept = banks[np.random.choice(names)]
    wanted = {name: [sentence(name, text) for text in kept] for name in names}
    for name in names:
        wanted[name] += [sentence(name, np.random.choice(given[name], 1)[0]) for _ in range(2 * count)]
    wanted = {name: list(np.random.choice(pool, 3 * count, replace=False)) for name, pool in wanted.items()}
    np.random.set_state(before)
    assert method.sentences() == wanted


def test_what_is_needed():
    with pytest.raises(DataError, match="mode 'descriptions' reads descriptions"):
        waffle(descriptions={}, mode="descriptions")
    with pytest.raises(DataError, match="waffle-and-descriptions"):
        waffle(descriptions={}, mode="waffle-and-descriptions")
    assert torch.isfinite(waffle(descriptions={})(FEATURES)).all()


def test_clips_words():
    words = clip_words()
    assert len(words) > 10_000
    assert {"river", "stone"} <= set(words)
    assert all(word.isalpha() and word.islower() for word in words)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mode": "x"}, "mode is 'x'"),
        ({"count": -1}, "count is -1"),
        ({"repetition": -2}, "repetition is -2"),
        ({"aggregation": "max"}, "must be mean or merged"),
        ({"words": ("a", " ")}, "holds an empty one"),
    ],
)
def test_bad_settings(settings, says):
    with pytest.raises(ConfigError, match=says):
        WaffleCLIPConfig(**settings)
