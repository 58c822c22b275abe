"""Class names on their own, for tasks without images: from a text, a file of names or a dataset."""

from __future__ import annotations

import re
from pathlib import Path

from adaptkit.data.lists import read_lines
from adaptkit.data.sources import known_names, load_dataset
from adaptkit.data.splits import check_class_names
from adaptkit.errors import MissingPathError, UnknownNameError

_WORDNET_LINE = re.compile(r"n\d{8}\s+(\S.*)")


def find_class_names(text: str, *, data_root: str | Path | None = None) -> tuple[str, ...]:
    """The class names that a text means, in label order.

    Args:
        text: Names separated by commas (one name alone with a comma behind it), a text file with one name per line, or
            a dataset: a known name, a folder, a CSV or a split JSON. What exists as a file wins over commas.
        data_root: Folder that holds CoOp's datasets.

    Raises:
        MissingPathError: A file that isn't there.
        UnknownNameError: Neither a dataset nor a file.
        DataError: No names, an empty one, or one twice.

    Example:
        >>> find_class_names("tabby cat, dog")
        ('tabby cat', 'dog')
    """
    path = Path(text).expanduser()
    is_file = _exists(path) and path.is_file()
    if is_file and path.suffix.lower() not in (".json", ".csv", ".tsv"):
        names = read_names(path)
    elif "," in text and not _exists(path):
        names = tuple(name.strip() for name in text.split(","))
        names = names[:-1] if not names[-1] else names  # "cat," is one class
    else:
        names = _of_dataset(text, path, data_root)
    check_class_names(names, f"the list of classes {text!r}" if len(text) < 80 else "the list of classes")
    return names


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a list of names that is too long for a file's name
        return False


def _of_dataset(text: str, path: Path, data_root: str | Path | None) -> tuple[str, ...]:
    if not _exists(path) and path.suffix.lower() == ".txt":
        raise MissingPathError(f"There is no file {text}: give a text file with one class name per line.")
    try:
        return load_dataset(text, data_root=data_root).class_names
    except UnknownNameError as error:
        hint = "Give a dataset, a text file with one class name per line, or names separated by commas (a,b,c)."
        raise UnknownNameError.for_name("list of classes", text, known_names(), hint) from error


def read_names(path: str | Path) -> tuple[str, ...]:
    """One class name per line; where every line begins with a WordNet id ("n01440764 tench"), what stands behind it.

    Blank lines don't count.

    Raises:
        MissingPathError: No such file.
        DataError: The file is too large, isn't UTF-8 text, or holds no names.
    """
    lines = read_lines(path, "class name")
    numbered = [_WORDNET_LINE.fullmatch(line) for line in lines]
    return tuple(match[1] for match in numbered if match) if all(numbered) else lines
