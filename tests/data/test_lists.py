"""The readers of CSV and JSON lists by themselves; test_sources.py reads them as datasets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptkit.data.lists import Item, in_several_splits, read_csv, read_split_json
from adaptkit.errors import DataError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_with_a_split_column(tmp_path):
    table = read_csv(write(tmp_path / "l.csv", "path,label,split\nb.png,dog,Train\na.png,cat,train\nc.png,dog,valid\n"))
    assert table.stored_names == ("cat", "dog")
    assert table.items == [Item("b.png", 1), Item("a.png", 0), Item("c.png", 1)]
    assert table.lists == {"train": table.items[:2], "val": table.items[2:], "test": []}


def test_csv_without_a_split_column(tmp_path):
    table = read_csv(str(write(tmp_path / "l.csv", "label,path\n10,b.png\n9,a.png\n10,b.png\n")))
    assert table.stored_names == ("9", "10")
    assert table.items == [Item("b.png", 1), Item("a.png", 0), Item("b.png", 1)]
    assert table.lists is None


def test_json(tmp_path):
    content = {"train": [["b", 1, "dog"], ["a", 0, "cat"]], "val": [], "test": [["c", 1, "dog"]]}
    lists, stored = read_split_json(write(tmp_path / "own.json", json.dumps(content)))
    assert lists == {"train": [Item("b", 1), Item("a", 0)], "val": [], "test": [Item("c", 1)]}
    assert stored == ("cat", "dog")


def test_every_problem_is_counted_and_the_first_are_listed(tmp_path):
    content = {"train": [["/x", 0, "a"]] * 7 + [["x", 0, "a"]], "val": [3], "test": [["y", "1", "b"]]}
    with pytest.raises(DataError) as caught:
        read_split_json(write(tmp_path / "own.json", json.dumps(content)))
    assert "has 9 problems: train[0]" in str(caught.value)
    assert "train[4]" in str(caught.value)
    assert "train[5]" not in str(caught.value)


def test_in_several_splits():
    assert in_several_splits({"train": ["a", "b", "a"], "val": ["c"], "test": ["b", "c"]}) == {
        "b": ("train", "test"),
        "c": ("val", "test"),
    }
