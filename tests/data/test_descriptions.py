"""Descriptions in every shape they come in, matched by name, and what is refused."""

from __future__ import annotations

import json
import random

import pytest

from adaptkit.data import descriptions as module
from adaptkit.data.descriptions import (
    descriptions_for,
    match_descriptions,
    read_descriptions,
    with_descriptions,
    write_descriptions,
)
from adaptkit.data.sources import load_dataset
from adaptkit.errors import AdaptKitError, DataError, MissingPathError, StorageError

WANTED = {"oak": ("lobed leaves", "acorns"), "tabby cat": ("stripes",)}

JSON_SHAPES = {
    "lists": {"oak": ["lobed leaves", "acorns"], "tabby cat": ["stripes"]},
    "texts": {"oak": ["lobed leaves", " acorns "], "tabby cat": "stripes"},
    "blank sentences": {"oak": ["lobed leaves", "", "acorns", "  "], "tabby cat": ["stripes"]},
    "by question": {"oak": {"leaves?": ["lobed leaves"], "fruit?": "acorns"}, "tabby cat": {"fur?": ["stripes"]}},
    "records": [{"class": "oak", "text": "lobed leaves"}, {"class": "tabby cat", "text": "stripes"},
                {"class": "oak", "text": "acorns"}],
    "records of lists": [{"class_name": "oak", "descriptions": ["lobed leaves", "acorns"]},
                         {"label": "tabby cat", "sentence": "stripes"}],
    "answers": {"oak": [{"prompt": "a?", "answer": "lobed leaves"}, {"prompt": "b?", "answer": "acorns"}],
                "tabby cat": [{"prompt": "a?", "answer": "- stripes", "descriptions": ["stripes"]}]},
    "what describe keeps": {"made_by": {"model": "m"}, "answers": {"oak": [{"prompt": "a?", "answer": "x",
                            "descriptions": ["lobed leaves", "acorns"]}], "tabby cat": ["stripes"]}},
}  # fmt: skip

TEXT_SHAPES = {
    "lines.txt": "oak: lobed leaves\n\ntabby cat : stripes\noak:acorns\n",
    "commas.csv": 'class,text\noak,lobed leaves\ntabby cat,stripes\noak,"acorns"\n',
    "semicolons.csv": "\ufeffText;Other;Class_Name\nlobed leaves;1;oak\n\nacorns;2;oak\nstripes;3;tabby cat\n",
    "tabs.tsv": "label\tdescription\noak\tlobed leaves\noak\tacorns\ntabby cat\tstripes\n",
}


@pytest.mark.parametrize("shape", JSON_SHAPES)
def test_json(tmp_path, shape):
    (tmp_path / "d.json").write_text(json.dumps(JSON_SHAPES[shape]))
    assert read_descriptions(tmp_path / "d.json") == WANTED


@pytest.mark.parametrize("name", TEXT_SHAPES)
def test_text_and_tables(tmp_path, name):
    (tmp_path / name).write_text(TEXT_SHAPES[name], encoding="utf-8")
    assert read_descriptions(tmp_path / name) == WANTED


def test_a_folder_of_text_files(tmp_path):
    (tmp_path / "oak.txt").write_text("lobed leaves\n\nacorns\n")
    (tmp_path / "tabby cat.txt").write_text("stripes")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "notes.md").write_text("no")
    assert read_descriptions(tmp_path) == WANTED


def test_what_is_written_is_read(tmp_path):
    write_descriptions(tmp_path / "deep/d.json", WANTED)
    assert read_descriptions(tmp_path / "deep/d.json") == WANTED
    with pytest.raises(DataError, match="descriptions of 'oak' must be a list"):
        write_descriptions(tmp_path / "e.json", {"oak": "lobed leaves"})
    with pytest.raises(DataError, match="with at least one"):
        write_descriptions(tmp_path / "e.json", {"oak": []})
    assert not (tmp_path / "e.json").exists()


def test_a_sentence_twice_stays_twice(tmp_path):
    (tmp_path / "d.json").write_text('{"oak": ["tall", "tall"]}')
    assert read_descriptions(tmp_path / "d.json") == {"oak": ("tall", "tall")}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("d.json", "[[1, 2], [3]]", "never matched by position"),
        ("d.json", '["a", "b"]', "never matched by position"),
        ("d.json", "3", "doesn't say which class"),
        ("d.json", '{"oak": [1]}', r"class 'oak', holds 1 where a sentence"),
        ("d.json", '{"oak": null}', "holds None"),
        ("d.json", '{"oak": [[[[[[[[[["x"]]]]]]]]]]}', "where a sentence or a list of sentences is expected"),
        ("d.json", '[{"class": "oak"}]', "entry 0, has no"),
        ("d.json", '[{"text": "x"}]', "every entry needs both"),
        ("d.json", "{}", "holds no descriptions"),
        ("d.json", '{"oak": [" "]}', "holds no descriptions"),
        ("d.txt", "oak: x\nacorns\n: y\n", r"2 lines that name no class \(the first is line 2\)"),
        ("d.txt", "", "holds no descriptions"),
        ("d.csv", "class,kind\noak,x\n", "has the columns class, kind; class and text are needed"),
        ("d.csv", "", "has the columns nothing"),
        ("d.csv", "class,text\noak\n", "row 2, has no class or no text"),
        ("d.csv", 'class,text\noak,"x\n', "isn't a readable CSV"),
        ("d.pkl", "x", r"has the suffix '\.pkl'"),
        ("d.txt", b"oak: \xff", r"isn't UTF-8 text \(byte 5\)"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=says) as caught:
        read_descriptions(path)
    assert str(caught.value).count("\n") == 0


def test_limits(tmp_path, monkeypatch):
    path = tmp_path / "d.json"
    path.write_text('{"oak": ["lobed leaves", "acorns"], "yew": ["red"]}')
    for limit, value, says in (
        ("MAX_CLASSES", 1, "describes 2 classes; at most 1"),
        ("MAX_SENTENCES", 1, "2 sentences for 'oak'; at most 1"),
        ("MAX_CHARACTERS", 9, "12 characters for 'oak'; at most 9"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, limit, value)
            with pytest.raises(DataError, match=says):
                read_descriptions(path)
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    with pytest.raises(StorageError, match="at most 10 are accepted"):
        read_descriptions(path)
    (tmp_path / "d.txt").write_text("oak: lobed leaves")
    with pytest.raises(DataError, match="too large"):
        read_descriptions(tmp_path / "d.txt")
    (tmp_path / "folder").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / f"folder/{name}.txt").write_text("four")
    with pytest.raises(DataError, match="too large"):  # in all, not each
        read_descriptions(tmp_path / "folder")


def test_nothing_there(tmp_path):
    with pytest.raises(MissingPathError, match="There are no descriptions at"):
        read_descriptions(tmp_path / "d.json")
    with pytest.raises(DataError, match="holds no text files"):
        read_descriptions(tmp_path)


def test_any_bytes_give_an_error_of_ours(tmp_path):
    numbers, tried = random.Random(0), 0
    whole = json.dumps(JSON_SHAPES["answers"]).encode()
    for name in ("d.json", "d.csv", "d.txt"):
        for _ in range(60):
            broken = bytearray(whole)
            for _ in range(4):
                broken[numbers.randrange(len(broken))] = numbers.randrange(256)
            (tmp_path / name).write_bytes(broken[: numbers.randrange(len(broken))])
            try:
                found = read_descriptions(tmp_path / name)
            except AdaptKitError:
                tried += 1
                continue
            assert all(isinstance(one, str) and one for given in found.values() for one in given)
            tried += 1
    assert tried == 180


# --- matching ---------------------------------------------------------------------------------------------------------


def test_names_match_exactly_first_then_loosely():
    found = {"tabby_cat": ["vdt"], "Oak": ["capital"], "oak": ["exact"], "black white": ["slash"], "extra": ["x"]}
    matched = match_descriptions(found, ["oak", "Tabby  cat", "Black/white"])
    assert matched.descriptions == {"oak": ("exact",), "Tabby  cat": ("vdt",), "Black/white": ("slash",)}
    assert list(matched.others) == ["Oak", "extra"]
    assert (matched.missing, matched.empty, matched.sentences) == ((), (), 3)


def test_the_order_of_the_file_means_nothing():
    found = {"c": ["3"], "a": ["1"], "b": ["2"]}
    assert list(match_descriptions(found, ["a", "b", "c"]).descriptions.items()) == [
        ("a", ("1",)), ("b", ("2",)), ("c", ("3",)),
    ]  # fmt: skip


def test_stored_names_are_tried_after_display_names():
    found = {"n01": ["stored"], "red fox": ["shown"], "n02": ["stored too"]}
    assert match_descriptions(found, ["red fox", "owl"], ["n01", "n02"]).descriptions == {
        "red fox": ("shown",), "owl": ("stored too",),
    }  # fmt: skip


def test_names_that_fit_several_ways_are_refused():
    with pytest.raises(DataError, match=r"several entries that fit the class 'OAK' \(oak, Oak\)"):
        match_descriptions({"oak": ["a"], "Oak": ["b"]}, ["OAK"])
    with pytest.raises(DataError, match=r"one entry, 'missile', that fits the classes Missile, missile"):
        match_descriptions({"missile": ["a"]}, ["Missile", "missile"])


def test_missing_extra_and_empty_are_named_in_one_sentence():
    given = {"oak": ["x"], "yew": [], "birch": ["y"], "elm": ["z"]}
    with pytest.raises(DataError) as caught:
        descriptions_for(given, ["oak", "yew", "pine", "fir"])
    assert str(caught.value) == (
        "The descriptions don't fit the classes: 2 classes missing (pine, fir), 1 class without a sentence (yew), 2"
        " names that no class has (birch, elm). Entries are matched by name, so every class needs sentences under its"
        " own."
    )
    matched = descriptions_for(given, ["oak", "yew", "pine"], allow_missing=True)
    assert matched.descriptions == {"oak": ("x",), "yew": ()}
    with pytest.raises(DataError, match="don't fit"):  # not one class is described
        descriptions_for({"birch": ["y"]}, ["oak"], allow_missing=True)


def test_extra_classes_alone_are_no_error(tmp_path):
    write_descriptions(tmp_path / "d.json", {**{str(n): [f"the figure {n}"] for n in range(10)}, "ten": ["too many"]})
    dataset = load_dataset(
        "digits", display_names={name: str(n) for n, name in enumerate(load_dataset("digits").class_names)}
    )
    described = with_descriptions(dataset, tmp_path / "d.json")
    assert described.descriptions["7"] == ("the figure 7",)
    assert described.notes[-1] == "descriptions of 1 other class left out: ten"
    assert described.digest == dataset.digest
    assert dataset.descriptions == {}


def test_a_mapping_is_taken_as_it_is():
    assert descriptions_for({"oak": ("a", "b"), "yew": "c"}, ["oak", "yew"]).sentences == 3
    with pytest.raises(DataError, match="class 'oak', holds 3"):
        descriptions_for({"oak": 3}, ["oak"])
