"""Lists in files: images in CSV tables and in JSON shaped like CoOp's `split_zhou_*.json`, and plain lines of text.

Paths in a list are another's: they are checked here to stay inside the image folder, and no image is opened. Everything
wrong with a file is collected, so that it is repaired in one go.

Source: datasets sheet, sections 2 and 3.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adaptkit.errors import AdaptKitError, DataError, MissingPathError, StorageError
from adaptkit.storage import check_relative, read_json

SPLIT_NAMES = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
"""What folders and CSV cells call a split, in lower case, and its name here."""

LISTED = 5
"""How many problems or names one message holds."""

_MAX_TABLE_BYTES = 256 * 2**20
_MAX_TEXT_BYTES = 16 * 2**20


class Item(NamedTuple):
    """One image of a list: path relative to the image folder, and label."""

    path: str
    label: int


Lists = dict[str, list[Item]]
"""Images by split ("train", "val", "test")."""


# --- plain text ----------------------------------------------------------------------------------------------------


def read_lines(path: str | Path, what: str) -> tuple[str, ...]:
    """The lines of a text file that aren't blank, without the blanks around them.

    Args:
        path: UTF-8 text.
        what: What a line holds, for messages ("class name").

    Raises:
        MissingPathError: No such file.
        DataError: The file is too large, isn't UTF-8 text, or holds nothing.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingPathError(f"There is no file {path}: give a text file with one {what} per line.")
    try:
        if path.stat().st_size > _MAX_TEXT_BYTES:
            raise DataError(f"{path} is too large for a list of {what}s: at most {_MAX_TEXT_BYTES:,} bytes are read.")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} isn't UTF-8 text (byte {error.start}): save it as UTF-8, one {what} per line."
        ) from error
    except AdaptKitError:
        raise
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}.") from error
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise DataError(f"{path} holds no {what}s: write one per line.")
    return lines


# --- CSV -----------------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """One line of a table: where it stands in the file, and its cells ("" where there is no such column)."""

    where: str
    path: str
    label: str
    class_name: str
    split: str


class Table(NamedTuple):
    """What a CSV holds.

    Args:
        stored_names: Class names by label.
        items: Every row's image, in the file's order.
        lists: The same by split; None where the file has no column `split`.
    """

    stored_names: tuple[str, ...]
    items: list[Item]
    lists: Lists | None


def read_csv(path: str | Path) -> Table:
    """Read and check a CSV of images.

    Args:
        path: A file with the columns `path` and `label` or `class_name` (or both: then `label` numbers the classes and
            `class_name` names them), and maybe `split`. Commas, semicolons and tabs may separate the cells.

    Raises:
        DataError: It can't be read as that, or rows can't be used; the rows' problems all in one message.
    """
    path = Path(path)
    rows, columns = _read_rows(path)
    problems = _Problems(path)
    for row in rows:
        problems.check_path(row.where, row.path)
        if not (row.class_name or row.label):
            problems.add(row.where, "has no class")
        if "split" in columns and row.split.lower() not in SPLIT_NAMES:
            problems.add(row.where, f"has the split {row.split!r}; train, val and test are accepted")
    problems.stop()
    stored, labels = _classes_of(rows, columns, problems)
    for row, label in zip(rows, labels, strict=True):
        problems.check_label_of(row.where, row.path, label)
    problems.stop()
    items = [Item(row.path, label) for row, label in zip(rows, labels, strict=True)]
    if "split" not in columns:
        return Table(stored, items, None)
    lists: Lists = {"train": [], "val": [], "test": []}
    for row, item in zip(rows, items, strict=True):
        lists[SPLIT_NAMES[row.split.lower()]].append(item)
    problems.check_train(lists, stored)
    problems.stop()
    return Table(stored, items, lists)


def _read_rows(path: Path) -> tuple[list[_Row], tuple[str, ...]]:
    """A CSV's rows and its column names, in lower case. Commas, semicolons and tabs may separate the cells.

    Raises:
        DataError: Too large, not UTF-8, no header with `path` and `label` or `class_name`, no rows, or a short row.
    """
    if path.stat().st_size > _MAX_TABLE_BYTES:
        raise DataError(f"{path} is too large: at most {_MAX_TABLE_BYTES:,} bytes are accepted.")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            lines = csv.reader(file, delimiter=max(",;\t", key=first.count), strict=True)
            table = [(lines.line_num, [cell.strip() for cell in line]) for line in lines if any(map(str.strip, line))]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} isn't UTF-8 text (byte {error.start}): save it as UTF-8.") from error
    except csv.Error as error:
        raise DataError(f"{path} isn't a readable CSV: {error}.") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}.") from error
    header = tuple(cell.lower() for cell in table[0][1]) if table else ()
    if "path" not in header or not {"label", "class_name"} & set(header) or len(set(header)) != len(header):
        shown = ", ".join(header) or "nothing"
        raise DataError(
            f"{path} has the header {shown}; 'path,label' or 'path,class_name' is needed, then maybe 'split'."
        )
    if len(table) < 2:
        raise DataError(f"{path} has a header and no rows: add one row per image.")
    rows = []
    for number, cells in table[1:]:
        if len(cells) != len(header):
            raise DataError(f"{path}, line {number} has {len(cells)} cells, and the header has {len(header)}.")
        named = dict(zip(header, cells, strict=True))
        rows.append(_Row(f"line {number}", *(named.get(column, "") for column in _Row._fields[1:])))
    return rows, header


def _classes_of(rows: Sequence[_Row], columns: Sequence[str], problems: _Problems) -> tuple[tuple[str, ...], list[int]]:
    """Stored class names and each row's label.

    With both columns, `label` numbers the classes and `class_name` names them; with one, its distinct values are the
    classes, sorted (as numbers where all are).
    """
    if "label" in columns and "class_name" in columns:
        for row in rows:
            problems.check_label(row.where, int(row.label) if row.label.isdecimal() else row.label, row.class_name)
        stored = problems.class_names()
        problems.stop()
        return stored, [int(row.label) for row in rows]
    values = [row.class_name or row.label for row in rows]
    stored = tuple(sorted(set(values)))
    if all(value.isdecimal() for value in stored):
        stored = tuple(sorted(stored, key=int))
    index = {name: label for label, name in enumerate(stored)}
    return stored, [index[value] for value in values]


# --- split_zhou JSON -----------------------------------------------------------------------------------------------


def read_split_json(path: str | Path) -> tuple[Lists, tuple[str, ...]]:
    """Read and check a JSON shaped like CoOp's split files.

    Args:
        path: A file with one object of exactly `train`, `val` and `test`, each a list of [path, label, class name];
            `val` and `test` may be empty. Labels run from 0 without gaps, and each has one name and training images.

    Returns:
        The lists, in the file's order, and the stored class names by label.

    Raises:
        DataError: Anything else, all of it in one message.
        MissingPathError: No such file.
        StorageError: Not JSON, or too large.
    """
    path = Path(path)
    content = read_json(path, _MAX_TABLE_BYTES)
    problems = _Problems(path)
    if not isinstance(content, dict) or set(content) != {"train", "val", "test"}:
        held = ", ".join(map(repr, list(content)[:LISTED])) if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"{path} holds {held or 'nothing'}; an object of exactly 'train', 'val' and 'test' is accepted."
        )
    lists: Lists = {"train": [], "val": [], "test": []}
    for split in lists:
        if not isinstance(content[split], list):
            problems.add(split, f"is a {type(content[split]).__name__}, not a list")
            continue
        for number, entry in enumerate(content[split]):
            item = problems.check_entry(f"{split}[{number}]", entry)
            if item is not None:
                lists[split].append(item)
    stored = problems.class_names()
    problems.check_train(lists, stored)
    problems.stop()
    return lists, stored


# --- what is wrong -------------------------------------------------------------------------------------------------


class _Problems:
    """Everything wrong with a list of images, collected, so that a file is repaired in one go."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sentences: list[str] = []
        self.names: dict[int, str] = {}
        self.labels: dict[str, int] = {}

    def add(self, where: str, what: str) -> None:
        self.sentences.append(f"{where} {what}")

    def stop(self) -> None:
        """Raise what was collected.

        Raises:
            DataError: Anything was.
        """
        count = len(self.sentences)
        if count:
            listed = "; ".join(self.sentences[:LISTED]) + ("; …" if count > LISTED else "")
            raise DataError(f"{self.path} has {many(count, 'problem')}: {listed}.")

    def check_path(self, where: str, path: str) -> bool:
        try:
            check_relative(path)
        except StorageError as error:
            self.add(where, f"isn't accepted ({str(error).rstrip('.')})")
            return False
        return True

    def check_label(self, where: str, label: Any, name: Any) -> bool:
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < 2**31:
            self.add(where, f"has the label {label!r}, not a whole number from 0")
        elif not isinstance(name, str) or not name.strip():
            self.add(where, f"has the class name {name!r}, not a text")
        elif self.names.setdefault(label, name) != name:
            self.add(where, f"calls label {label} {name!r}, and an earlier one {self.names[label]!r}")
        else:
            return True
        return False

    def check_label_of(self, where: str, path: str, label: int) -> None:
        if self.labels.setdefault(path, label) != label:
            self.add(where, f"gives {path!r} a second label")

    def check_entry(self, where: str, entry: Any) -> Item | None:
        if not isinstance(entry, list) or len(entry) != 3:
            self.add(where, "isn't [path, label, class name]")
            return None
        path, label, name = entry
        if not isinstance(path, str):
            self.add(where, f"has the path {path!r}, not a text")
            return None
        if not self.check_path(where, path) or not self.check_label(where, label, name):
            return None
        self.check_label_of(where, path, label)
        return Item(path, label)

    def class_names(self) -> tuple[str, ...]:
        """The names by label; labels must run from 0 without gaps."""
        labels = sorted(self.names)
        if labels and labels != list(range(len(labels))):
            missing = next(number for number, label in enumerate(labels) if number != label)
            self.add("labels", f"run from {labels[0]} to {labels[-1]} without {missing}; 0, 1, 2, … is accepted")
            return ()
        return tuple(self.names[label] for label in labels)

    def check_train(self, lists: Lists, stored: Sequence[str]) -> None:
        trained = {item.label for item in lists["train"]}
        without = [name for label, name in enumerate(stored) if label not in trained]
        if not trained:
            self.add("train", "has no images")
        elif without:
            self.add("train", f"has no images of {many(len(without), 'class')} ({first_few(without)})")


def in_several_splits(ids: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    """Names that are in more than one split, with the splits."""
    places: dict[str, list[str]] = {}
    for split, names in ids.items():
        for name in dict.fromkeys(names):
            places.setdefault(name, []).append(split)
    return {name: tuple(splits) for name, splits in places.items() if len(splits) > 1}


def many(count: int, noun: str) -> str:
    """A number and its noun."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}{'es' if noun.endswith('s') else 's'}"


def first_few(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(names[:LISTED]) + (", …" if len(names) > LISTED else "")
