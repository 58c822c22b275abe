"""What holds for any settings: they survive YAML, JSON and the command line."""

# ruff: noqa: PT017 - most of what is drawn is accepted, some is refused, and both are looked at

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.config import describe, from_mapping, load_yaml, merge, parse_overrides, to_mapping
from adaptkit.errors import ConfigError
from adaptkit.types import TrainingSettings

QUICK = settings(deadline=None, max_examples=150)


@dataclass(frozen=True)
class Part:
    rate: float = 0.1
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Whole:
    flag: bool = False
    count: int = 1
    rate: float = 0.5
    text: str = "a"
    place: Path = Path("here")
    maybe: float | None = None
    word: str | None = None
    kind: Literal["sgd", "adamw"] = "sgd"
    size: int | Literal["auto"] = "auto"
    names: tuple[str, ...] = ()
    numbers: list[int] = field(default_factory=list)
    pair: tuple[int, float] = (1, 2.0)
    table: dict[str, int] = field(default_factory=dict)
    part: Part = Part()
    parts: tuple[Part, ...] = ()
    either: Part | None = None


texts = st.text(max_size=12)
finite = st.floats(allow_nan=False, allow_infinity=False)
whole_numbers = st.integers(-(10**20), 10**20)
parts = st.builds(Part, rate=finite, names=st.lists(texts, max_size=3).map(tuple))
wholes = st.builds(
    Whole,
    flag=st.booleans(),
    count=whole_numbers,
    rate=finite,
    text=texts,
    place=st.lists(st.text("abc.-", min_size=1), min_size=1, max_size=3).map(lambda names: Path(*names)),
    maybe=st.none() | finite,
    word=st.none() | texts,
    kind=st.sampled_from(["sgd", "adamw"]),
    size=st.just("auto") | whole_numbers,
    names=st.lists(texts, max_size=4).map(tuple),
    numbers=st.lists(whole_numbers, max_size=4),
    pair=st.tuples(whole_numbers, finite),
    table=st.dictionaries(texts, whole_numbers, max_size=3),
    part=parts,
    parts=st.lists(parts, max_size=2).map(tuple),
    either=st.none() | parts,
)


def test_the_strategy_fills_every_field():
    assert len(fields(Whole)) == 16
    drawn = set(to_mapping(Whole()))
    assert drawn == {info.name.split(".")[0] for info in describe(Whole)}


@QUICK
@given(wholes)
def test_settings_round_trip(value):
    plain = to_mapping(value)
    assert repr(from_mapping(Whole, plain)) == repr(value)  # repr, since 1 == 1.0 == True
    assert repr(from_mapping(Whole, json.loads(json.dumps(plain)))) == repr(value)
    assert to_mapping(from_mapping(Whole, plain)) == plain


@settings(deadline=None, max_examples=40)
@given(wholes)
def test_settings_round_trip_through_a_yaml_file(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("yaml") / "settings.yaml"
    path.write_text(yaml.safe_dump(to_mapping(value), sort_keys=False), encoding="utf-8")
    assert repr(from_mapping(Whole, load_yaml(path))) == repr(value)


@QUICK
@given(
    st.builds(
        TrainingSettings,
        epochs=st.integers(0, 1000),
        lr=st.floats(0, 1),
        eps=st.floats(0, 1e-3),
        flip=st.booleans(),
        schedule=st.sampled_from(["cosine-epoch", "cosine-step", "constant"]),
    )
)
def test_real_settings_round_trip_as_text(value):
    """The command line gives every value as text."""
    as_text = parse_overrides(f"{name}={item}" for name, item in to_mapping(value).items())
    assert len(as_text) == len(fields(TrainingSettings))
    assert all(isinstance(item, str) for item in as_text.values())
    assert from_mapping(TrainingSettings, as_text) == value


plain_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=5), below, max_size=3),
    max_leaves=8,
)
field_names = st.sampled_from([item.name for item in fields(Whole)])


@QUICK
@given(st.dictionaries(field_names | texts, plain_data, max_size=4))
def test_whatever_comes_it_is_settings_or_a_config_error(mapping):
    try:
        value = from_mapping(Whole, mapping, "the test")
    except ConfigError as error:
        assert str(error).startswith("In the test: ")
        return
    assert mapping.keys() <= {item.name for item in fields(Whole)}
    assert type(value.flag) is bool
    assert type(value.count) is int
    assert type(value.rate) is float
    assert math.isfinite(value.rate)
    assert isinstance(value.place, Path)
    assert type(value.names) is tuple
    assert type(value.numbers) is list
    assert repr(from_mapping(Whole, to_mapping(value))) == repr(value)


names = st.text("abcdefg_-", min_size=1, max_size=4)
groups: st.SearchStrategy[Any] = st.recursive(
    st.text("abc123.,=: {}", max_size=8)
    .map(str.strip)
    .filter(lambda text: text != "null" and text[:1] not in ("[", "{"))
    | st.none(),
    lambda below: st.dictionaries(names, below, min_size=1, max_size=3),
    max_leaves=8,
)


def flat(mapping: dict[str, Any], before: str = "") -> list[str]:
    items: list[str] = []
    for key, value in mapping.items():
        if isinstance(value, dict):
            items += flat(value, f"{before}{key}.")
        else:
            items.append(f"{before}{key}={'null' if value is None else value}")
    return items


@QUICK
@given(st.dictionaries(names, groups, max_size=4), st.randoms())
def test_overrides_rebuild_what_was_flattened_in_any_order(mapping, random):
    items = flat(mapping)
    assert parse_overrides(items) == mapping
    random.shuffle(items)
    assert parse_overrides(items) == mapping
    assert parse_overrides([*items, *items]) == mapping  # saying it twice changes nothing


@QUICK
@given(st.lists(st.text("ab.={}[]:, \n!&*\"'", max_size=12), max_size=4))
def test_any_overrides_give_a_mapping_or_a_config_error(items):
    try:
        result = parse_overrides(items)
    except ConfigError:
        return
    assert isinstance(result, dict)
    assert len(result) <= len(items)


@QUICK
@given(*[st.dictionaries(names, groups, max_size=3)] * 3)
def test_merging_is_associative_and_the_last_wins(a, b, c):
    assert merge(merge(a, b), c) == merge(a, merge(b, c)) == merge(a, b, c)
    assert merge(a, a) == a == merge(a, {}) == merge({}, a)
    for key, value in c.items():
        if not isinstance(value, dict):
            assert merge(a, b, c)[key] == value
