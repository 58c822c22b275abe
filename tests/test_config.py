"""Settings: conversions by type, problems collected, overrides, and YAML files of every unkind sort."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from adaptkit.config import FieldInfo, describe, from_mapping, load_yaml, merge, parse_overrides, to_mapping
from adaptkit.errors import ConfigError, MissingPathError
from adaptkit.types import TrainingSettings


@dataclass(frozen=True)
class Inner:
    lr: float = field(default=0.1, metadata={"help": "Rate."})
    steps: int = field(default=3, metadata={"help": "Steps."})


@dataclass(frozen=True)
class Everything:
    flag: bool = False
    count: int = 1
    rate: float = 0.5
    text: str = "a"
    place: Path = Path("here")
    maybe: float | None = None
    kind: Literal["sgd", "adamw"] = "sgd"
    bits: Literal[4, 8, True] = 8
    size: int | Literal["auto"] = "auto"
    names: tuple[str, ...] = ()
    numbers: list[int] = field(default_factory=list)
    pair: tuple[int, float] = (1, 2.0)
    single: tuple[int] = (1,)
    row: Sequence[float] = ()
    table: dict[str, int] = field(default_factory=dict)
    frozen: Mapping[int, list[float]] = field(default_factory=dict)
    anything: Any = None
    inner: Inner = Inner()
    inners: tuple[Inner, ...] = ()
    either: Inner | None = None
    derived: int = field(default=0, init=False)


@dataclass(frozen=True)
class Required:
    name: str
    size: int
    extra: str = "x"


@dataclass(frozen=True)
class Checked:
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"share is {self.share}, but must lie between 0 and 1.")


@dataclass(frozen=True)
class Nested:
    checked: Checked = Checked()
    other: int = 0


@dataclass(frozen=True)
class Chain:
    next: Chain | None = None


# --- from_mapping -----------------------------------------------------------------------------------------------------

ACCEPTED = [
    ("flag", "Yes", True),
    ("flag", " off ", False),
    ("flag", True, True),
    ("count", "16", 16),
    ("count", 16.0, 16),
    ("count", " -3 ", -3),
    ("rate", "2e-3", 0.002),  # PyYAML reads 2e-3 as text
    ("rate", 1, 1.0),
    ("text", "", ""),
    ("place", "a/b", Path("a/b")),
    ("place", Path("c"), Path("c")),
    ("maybe", None, None),
    ("maybe", "1", 1.0),
    ("maybe", 2, 2.0),
    ("kind", "adamw", "adamw"),
    ("bits", 4, 4),
    ("bits", "4", 4),
    ("bits", "True", True),
    ("size", "auto", "auto"),
    ("size", "7", 7),
    ("size", 7, 7),
    ("names", "a photo of a {}, large.", ("a photo of a {}, large.",)),  # templates hold commas
    ("names", ["a", "b"], ("a", "b")),
    ("numbers", "1, 2,3", [1, 2, 3]),
    ("numbers", (1, "2"), [1, 2]),
    ("numbers", [], []),
    ("pair", "1,2", (1, 2.0)),
    ("pair", [1, 2], (1, 2.0)),
    ("single", [5], (5,)),
    ("row", [1, "2"], (1.0, 2.0)),
    ("table", {"a": "1"}, {"a": 1}),
    ("frozen", {"1": ["2", 3]}, {1: [2.0, 3.0]}),
    ("anything", {"x": [1, None]}, {"x": [1, None]}),
    ("inner", {"lr": "1"}, Inner(lr=1.0)),
    ("inner", Inner(steps=9), Inner(steps=9)),
    ("inners", [{"steps": "4"}, Inner()], (Inner(steps=4), Inner())),
    ("either", {"lr": 2}, Inner(lr=2.0)),
    ("either", None, None),
]


@pytest.mark.parametrize(("name", "value", "expected"), ACCEPTED)
def test_values_become_what_their_field_wants(name, value, expected):
    result = getattr(from_mapping(Everything, {name: value}), name)
    assert result == expected
    assert type(result) is type(expected)
    assert repr(result) == repr(expected)  # 1, 1.0 and True are equal, also inside lists


REFUSED = [
    ("flag", 1, "true or false"),
    ("flag", "maybe", "true or false"),
    ("flag", None, "true or false"),
    ("count", True, "a whole number"),
    ("count", 1.5, "a whole number"),
    ("count", "1.5", "a whole number"),
    ("count", "", "a whole number"),
    ("count", "9" * 5000, "a whole number"),  # Python refuses to convert it
    ("count", float("inf"), "a whole number"),
    ("count", [1], "a whole number"),
    ("rate", True, "a finite number"),
    ("rate", "nan", "a finite number"),
    ("rate", float("inf"), "a finite number"),
    ("rate", 10**400, "a finite number"),
    ("rate", "fast", "a finite number"),
    ("text", 5, "put it in quotes"),
    ("text", True, "put it in quotes"),
    ("place", 5, "a path is accepted"),
    ("maybe", "x", "a finite number"),
    ("kind", "adam", "did you mean 'adamw'"),
    ("kind", ["sgd"], "one of 'sgd', 'adamw'"),
    ("bits", 1, "one of 4, 8, True"),  # 1 == True
    ("bits", 4.0, "one of 4, 8, True"),
    ("size", "huge", "int or auto is accepted"),
    ("names", 5, "a list of text"),
    ("names", ["a", 5], "put it in quotes"),
    ("names", {"a": 1}, "a list of text"),
    ("numbers", "1,x", "a whole number"),
    ("numbers", "", "a whole number"),
    ("pair", [1], "exactly 2 values"),
    ("pair", [1, 2, 3], "exactly 2 values"),
    ("single", [1, 2], "exactly 1 value"),
    ("table", [1], "names and values"),
    ("table", {"a": "b"}, "a whole number"),
    ("frozen", {"x": []}, "a whole number"),
    ("inner", 5, "names and values are accepted"),
    ("inner", {"lrr": 1}, "did you mean 'lr'"),
    ("inners", [{"steps": "x"}], "steps is 'x'"),
    ("either", {"lr": "x"}, "lr is 'x'; a finite number"),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_values_that_do_not_fit_are_refused_by_name(name, value, message):
    with pytest.raises(ConfigError, match=name) as caught:
        from_mapping(Everything, {name: value}, "recipe x.yaml")
    assert str(caught.value).startswith("In recipe x.yaml: ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400  # long values are cut


def test_the_cases_above_visit_every_field():
    fields = {info.name.split(".")[0] for info in describe(Everything)}
    assert {case[0] for case in ACCEPTED} == fields
    assert len(fields) == 20
    assert {case[0] for case in REFUSED} == fields - {"row", "anything"}


def test_all_problems_come_in_one_message():
    with pytest.raises(ConfigError) as caught:
        from_mapping(Everything, {"flagg": 1, "count": "x", "inner": {"lr": "fast", "step": 1}, 5: 1, "zzz": 0})
    text = str(caught.value)
    assert text.startswith("6 problems. ")
    for part in (
        "'flagg': did you mean 'flag'",
        "count is 'x'",
        "inner.lr is 'fast'",
        "'inner.step': did you mean 'steps'",
    ):
        assert part in text
    assert "Unknown setting '5'" in text
    assert "Unknown setting 'zzz'; known: flag, count" in text


def test_missing_fields_are_named():
    with pytest.raises(ConfigError, match=r"2 problems\. name is missing; it has no default\. size is missing"):
        from_mapping(Required, {})
    assert from_mapping(Required, {"name": "a", "size": "2"}) == Required("a", 2)


def test_fields_that_are_computed_cannot_be_set():
    with pytest.raises(ConfigError, match="Unknown setting 'derived'"):
        from_mapping(Everything, {"derived": 5})
    assert "derived" not in to_mapping(Everything())


def test_a_class_that_checks_itself_is_heard_together_with_the_rest():
    with pytest.raises(ConfigError, match=r"2 problems\. share is 2\.0, but must lie between 0 and 1\. other is 'x'"):
        from_mapping(Nested, {"checked": {"share": 2}, "other": "x"})


@pytest.mark.parametrize("mapping", [None, 5, "a", [("count", 1)]])
def test_what_is_no_mapping_is_refused(mapping):
    with pytest.raises(ConfigError, match=r"Everything is .*; names and values are accepted"):
        from_mapping(Everything, mapping)


def test_deep_nesting_ends_in_a_sentence():
    deep: dict[str, Any] = {}
    for _ in range(500):
        deep = {"next": deep}
    with pytest.raises(ConfigError, match="deeply nested"):
        from_mapping(Chain, deep)
    assert from_mapping(Chain, {"next": {"next": None}}) == Chain(Chain(None))


def test_only_dataclasses_are_settings():
    with pytest.raises(ConfigError, match="int is not a settings class"):
        from_mapping(int, {})
    with pytest.raises(ConfigError, match="int is not a settings class"):
        describe(int)
    for wrong in (5, Everything):  # the class instead of an instance
        with pytest.raises(ConfigError, match="not an instance of a settings class"):
            to_mapping(wrong)
    with pytest.raises(ConfigError, match="set, which isn't plain data"):
        to_mapping(Everything(anything={1}))


def test_to_mapping_gives_plain_data_that_reads_back():
    value = Everything(place=Path("a/b"), names=("x",), inners=(Inner(), Inner(2.0)), frozen={1: [2.0]}, either=Inner())
    plain = to_mapping(value)
    assert plain["place"] == str(Path("a/b"))
    assert plain["names"] == ["x"]
    assert plain["inners"] == [{"lr": 0.1, "steps": 3}, {"lr": 2.0, "steps": 3}]
    assert plain["frozen"] == {"1": [2.0]}
    assert from_mapping(Everything, plain) == value


def test_describe_gives_every_setting_in_order():
    facts = describe(Everything)
    assert facts[0] == FieldInfo("flag", "bool", False, "")
    by_name = {info.name: info for info in facts}
    assert by_name["inner.lr"] == FieldInfo("inner.lr", "float", 0.1, "Rate.")
    types = {
        name: by_name[name].type for name in ("maybe", "kind", "names", "pair", "table", "anything", "place", "row")
    }
    assert types == {
        "maybe": "float or null",
        "kind": "sgd | adamw",
        "names": "list of text",
        "pair": "(int, float)",
        "table": "mapping of int",
        "anything": "anything",
        "place": "path",
        "row": "list of float",
    }
    assert by_name["place"].default == "here"
    assert describe(Required)[0].default == "(required)"


def test_training_settings_have_help_and_round_trip():
    looked_at = 0
    for info in describe(TrainingSettings):
        assert info.help.endswith("."), info.name
        looked_at += 1
    assert looked_at == 19
    assert from_mapping(TrainingSettings, to_mapping(TrainingSettings())) == TrainingSettings()


# --- overrides and merging --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([], {}),
        (["train.lr=2e-3", "num_context=4"], {"train": {"lr": "2e-3"}, "num_context": "4"}),
        (["a=1", "a=2"], {"a": "2"}),
        (["a.b=1", "a.c=2", "a.b=3"], {"a": {"b": "3", "c": "2"}}),
        ([" a . b = x "], {"a": {"b": "x"}}),
        (["a=null", "b=Null", "c="], {"a": None, "b": "Null", "c": ""}),
        (["a=x=y"], {"a": "x=y"}),
        (["a=[1, two, {b: 3}]"], {"a": [1, "two", {"b": 3}]}),
        (["a={b: 1}", "a={c: 2}"], {"a": {"c": 2}}),  # a later one wins, also where it is a mapping
        (["a={b: 1}", "a=2"], {"a": "2"}),
        (["t=a photo of a {}."], {"t": "a photo of a {}."}),
    ],
)
def test_overrides(items, expected):
    assert parse_overrides(items) == expected


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["a"], "write NAME=VALUE"),
        (["=1"], "write NAME=VALUE"),
        ([".a=1"], "write NAME=VALUE"),
        (["a..b=1"], "write NAME=VALUE"),
        ([""], "write NAME=VALUE"),
        (["a=1", "a.b=2"], "sets a part of 'a', which another override sets as a whole"),
        (["a={b: 1}", "a.c=2"], "sets a part of 'a', which another override sets as a whole"),
        (["a.b=1", "a=2"], "sets 'a' as a whole, of which another override sets a part"),
        (["a.b.c=1", "a.b={d: 2}"], "sets 'a.b' as a whole"),
        (["a=null", "a.b=2"], "sets a part of 'a'"),
        (["a=[1"], r"the override 'a=\[1', line 1 isn't valid YAML"),
        (["a={b: 1, b: 2}"], "the key 'b' is there twice"),
        (["a=[&x 1, *x]"], "aliases"),
        (["a=[!!bool x]"], "isn't valid YAML"),
    ],
)
def test_overrides_that_cannot_be_read(items, message):
    with pytest.raises(ConfigError, match=message):
        parse_overrides(items)


def test_merge_goes_group_by_group_and_changes_nothing():
    one = {"a": {"b": 1, "c": 2}, "d": {"e": 1}, "f": 1}
    two = {"a": {"c": 3}, "d": 4, "f": {"g": 5}}
    merged = merge(one, two)
    assert merged == {"a": {"b": 1, "c": 3}, "d": 4, "f": {"g": 5}}
    merged["a"]["b"] = 9
    merged["f"]["g"] = 9
    assert one == {"a": {"b": 1, "c": 2}, "d": {"e": 1}, "f": 1}
    assert two == {"a": {"c": 3}, "d": 4, "f": {"g": 5}}
    assert merge() == {}


# --- YAML files -------------------------------------------------------------------------------------------------------


def write(tmp_path, text) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("# only a comment\n", {}),
        ("a: 1\nb: {c: [x, 2e-3]}\n", {"a": 1, "b": {"c": ["x", "2e-3"]}}),
        ("\ufeffa: 1\n", {"a": 1}),  # a byte-order mark, as Windows editors write it
        ("a: größe\r\n", {"a": "größe"}),
    ],
)
def test_yaml(tmp_path, text, expected):
    assert load_yaml(write(tmp_path, text)) == expected
    assert load_yaml(str(tmp_path / "settings.yaml")) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2", "holds a list"),
        ("just text", "holds a str"),
        ("a: 1\nb: [", "line 2 isn't valid YAML"),
        ("a: 1\nb:\n  c: 1\n  c: 2", "line 4 isn't valid YAML: the key 'c' is there twice"),
        ("a: &x [1]\nb: *x", "line 2 isn't valid YAML: aliases"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("? [a]\n: 1", "unhashable key"),
        ("a: 2024-13-01", "month must be in 1..12"),
        ("a: !!bool x", "doesn't fit its tag"),
        ("a: !!timestamp x", "doesn't fit its tag"),
        ('a: !!float ""', "doesn't fit its tag"),
        ('a: !!int ""', "doesn't fit its tag"),
        ("a: !!int x", "isn't valid YAML"),
        ("a: " + "9" * 5000, "isn't valid YAML"),
        ("a: " + "[" * 3000, "isn't valid YAML"),
        ("a: \x01", "special characters"),
        (b"a: \xff", r"isn't UTF-8 text \(byte 3\)"),
        ("a: 1\n---\nb: 2", "expected a single document"),
    ],
)
def test_yaml_that_is_refused_in_one_sentence(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_yaml(write(tmp_path, text))
    assert "settings.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_that_is_not_there_or_no_file_or_too_large(tmp_path):
    for missing in (tmp_path / "no.yaml", tmp_path, "a\0b"):
        with pytest.raises(MissingPathError, match="There is no settings file"):
            load_yaml(missing)
    with pytest.raises(ConfigError, match="can't be read: File name too long"):
        load_yaml("x" * 300)
    large = tmp_path / "large.yaml"
    with open(large, "wb") as file:
        file.truncate(5 * 2**20)
    with pytest.raises(ConfigError, match="has 5,242,880 bytes; a settings file has at most 4,194,304"):
        load_yaml(large)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_yaml_that_may_not_be_read(tmp_path):
    path = write(tmp_path, "a: 1")
    path.chmod(0)
    with pytest.raises(ConfigError, match="can't be read: Permission denied"):
        load_yaml(path)
