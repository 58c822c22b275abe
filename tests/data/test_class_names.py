"""Class names from a text, a file or a dataset, and what is refused."""

from __future__ import annotations

import pytest

from adaptkit.data.class_names import find_class_names, read_names
from adaptkit.data.sources import load_dataset
from adaptkit.errors import DataError, MissingPathError, UnknownNameError


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a,b,c", ("a", "b", "c")),
        (" tabby cat , 7-series sedan ", ("tabby cat", "7-series sedan")),
        ("cat,", ("cat",)),
    ],
)
def test_lists(text, names):
    assert find_class_names(text) == names


def test_a_list_longer_than_a_file_name():
    names = tuple(f"a rather long class name {index}" for index in range(1000))
    assert find_class_names(",".join(names)) == names


def test_files(tmp_path):
    path = tmp_path / "classnames.txt"
    path.write_text("tench\n\n  great white shark \n", encoding="utf-8-sig")
    assert find_class_names(str(path)) == ("tench", "great white shark")
    path.write_text("n01440764 tench\nn01484850 great white shark\r\n")
    assert find_class_names(str(path)) == ("tench", "great white shark")
    path.write_text("n01440764 tench\ngreat white shark\n")  # not every line has an id: they are names
    assert find_class_names(str(path)) == ("n01440764 tench", "great white shark")
    path.write_text("n01440764\nn01484850\n")  # ids alone are names
    assert read_names(path) == ("n01440764", "n01484850")
    comma = tmp_path / "a,b"
    comma.write_text("one\ntwo\n")
    assert find_class_names(str(comma)) == ("one", "two")


def test_datasets(tmp_path):
    assert find_class_names("digits") == load_dataset("digits").class_names
    csv = tmp_path / "list.csv"
    (tmp_path / "x.png").write_bytes(b"")
    csv.write_text("path,label\nx.png,oak\n")
    assert find_class_names(str(csv)) == ("oak",)


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("digtis", UnknownNameError, "Did you mean 'digits'"),
        ("nowhere", UnknownNameError, "separated by commas"),
        ("absent.txt", MissingPathError, "one class name per line"),
        ("absent.json", MissingPathError, "absent.json"),
        ("a,,b", DataError, "empty name"),
        (",", DataError, "empty name"),
        ("a,b,a", DataError, "twice"),
    ],
)
def test_what_is_refused(text, kind, says):
    with pytest.raises(kind, match=says):
        find_class_names(text)


def test_files_that_are_refused(tmp_path):
    path = tmp_path / "names.txt"
    for content, says in ((b"", "holds no class names"), (b"\xff\xfe", "isn't UTF-8"), (b"a\na\n", "twice")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=says):
            find_class_names(str(path))
