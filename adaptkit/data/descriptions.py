"""Descriptions of classes from files: read in the shapes that public sets come in, matched to classes by name, written.

    file.json        {class: [sentences]}, {class: {question: [sentences]}}, {class: [{"prompt": …, "answer": …}]},
                     {class: {"caption": …, "rewrites": […]}}, or a list of {"class": …, "text": …}
    file.csv, .tsv   columns class and text
    file.txt         a line "class: sentence" for each sentence
    folder           one text file per class, called like the class, a sentence per line

Classes are matched by name, never by position: an exact name first, then one that differs in case, or in blanks,
underscores and slashes alone.

Source: sheets dclip, cupl, vdt_adapter and adaptclipzs, which say how their sets are stored.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaptkit.data.lists import first_few, many
from adaptkit.data.splits import Dataset
from adaptkit.errors import DataError, MissingPathError
from adaptkit.storage import read_json, write_json

Descriptions = dict[str, tuple[str, ...]]
"""Sentences by class name."""

MAX_BYTES = 64 * 2**20
MAX_CLASSES = 100_000
MAX_SENTENCES = 10_000
"""Of one class."""
MAX_CHARACTERS = 10_000
"""Of one sentence; text towers read about 300."""

CLASS_KEYS = ("class", "class_name", "name", "label")
TEXT_KEYS = ("descriptions", "sentences", "text", "sentence", "description", "descriptor", "answer")
"""What a record or a table calls a class and its sentences; the first that is there counts."""

_MAX_DEPTH = 8  # of lists and objects in a JSON; {class: {question: [{"answer": …}]}} has three

_SHAPES = (
    'a JSON object of sentences by class, a list of {"class": …, "text": …}, a CSV with the columns class and text, a'
    ' text file of lines "class: sentence", or a folder with a text file per class'
)


@dataclass(frozen=True)
class Matched:
    """Descriptions beside a list of classes.

    Args:
        descriptions: Sentences by class name, in the order of the classes, for those that are in the file.
        missing: Classes that aren't in the file.
        empty: Classes that are, without any sentence.
        others: What the file says of classes that aren't in the list.
    """

    descriptions: Descriptions
    missing: tuple[str, ...]
    empty: tuple[str, ...]
    others: Descriptions

    @property
    def sentences(self) -> int:
        """How many sentences there are in all."""
        return sum(map(len, self.descriptions.values()))


# --- reading -------------------------------------------------------------------------------------------------------


def read_descriptions(path: str | Path) -> Descriptions:
    """Everything a file or folder of descriptions holds, under the names that stand there; see the top of this file.

    Blank sentences are left out, and a class without any is kept with (). A sentence that is there twice stays twice:
    it counts twice in an average.

    Raises:
        MissingPathError: Nothing is there.
        StorageError: The file is too large or no readable JSON.
        DataError: It has another shape, or holds something that isn't a sentence; the message says where.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _bounded(_from_folder(path), path)
    if not path.is_file():
        raise MissingPathError(f"There are no descriptions at {path}: give {_SHAPES}.")
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _bounded(_from_json(read_json(path, MAX_BYTES), path), path)
    if suffix in (".csv", ".tsv"):
        return _bounded(_from_table(path), path)
    if suffix in (".txt", ".text", ""):
        return _bounded(_from_lines(path), path)
    raise DataError(f"{path} has the suffix {suffix!r}; descriptions are read from {_SHAPES}.")


def _from_json(content: Any, path: Path) -> Descriptions:
    if isinstance(content, Mapping) and set(content) == {"made_by", "answers"}:  # what `adaptkit describe` keeps
        content = content["answers"]
    if isinstance(content, Mapping):
        return {str(name): tuple(_sentences(given, f"{path}, class {name!r}")) for name, given in content.items()}
    if not isinstance(content, list) or not all(isinstance(record, Mapping) for record in content):
        raise DataError(
            f"{path} doesn't say which class its sentences belong to, and they are never matched by position: write an"
            ' object {class: [sentences]}, or a list of {"class": …, "text": …}.'
        )
    found: dict[str, list[str]] = {}
    for number, record in enumerate(content):
        name, said = _first(record, CLASS_KEYS), _first(record, TEXT_KEYS)
        if not isinstance(name, str) or said is None:
            raise DataError(f'{path}, entry {number}, has no "class" and "text": every entry needs both.')
        found.setdefault(name, []).extend(_sentences(said, f"{path}, class {name!r}"))
    return {name: tuple(sentences) for name, sentences in found.items()}


def _first(record: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((record[key] for key in keys if record.get(key) is not None), None)


def _sentences(given: Any, where: str, depth: int = 0) -> Iterable[str]:
    """The sentences in a text, a list, {question: …} or {"prompt": …, "answer": …}, nested or not."""
    if isinstance(given, str):
        return [given.strip()] if given.strip() else []
    if isinstance(given, Mapping):
        record = _first(given, TEXT_KEYS) if set(given) & {"class", "class_name", "prompt", "answer", "text"} else None
        if "rewrites" in given:  # what the rewrites were made from (keywords) is no sentence
            if not isinstance(given.get("caption"), str) or not given["caption"].strip():
                raise DataError(f"{where}, has rewrites of no caption: write the text under 'caption'.")
            parts: Iterable[Any] = [given["caption"], given["rewrites"]]
        else:
            parts = [record] if record is not None else given.values()
    elif isinstance(given, list):
        parts = given
    else:
        parts = ()
    if depth > _MAX_DEPTH or not isinstance(given, (Mapping, list)):
        raise DataError(f"{where}, holds {given!r:.60} where a sentence or a list of sentences is expected.")
    return [sentence for part in parts for sentence in _sentences(part, where, depth + 1)]


def _from_folder(path: Path) -> Descriptions:
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".txt" and not file.name.startswith("."))
    if not files:
        raise DataError(f"{path} holds no text files: a folder of descriptions has one for each class, called like it.")
    found: Descriptions = {}
    budget = MAX_BYTES
    for file in files:
        text = _read_text(file, budget)
        budget -= len(text)  # characters, of which there are no more than bytes
        found[file.stem] = tuple(line.strip() for line in text.splitlines() if line.strip())
    return found


def _from_lines(path: Path) -> Descriptions:
    found: dict[str, list[str]] = {}
    wrong = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        name, colon, sentence = line.partition(":")
        if not line.strip():
            continue
        if not colon or not name.strip():
            wrong.append(number)
            continue
        found.setdefault(name.strip(), []).extend([sentence.strip()] if sentence.strip() else [])
    if wrong:
        raise DataError(
            f"{path} has {many(len(wrong), 'line')} that name no class (the first is line {wrong[0]}): write"
            ' "class: sentence" in each.'
        )
    return {name: tuple(sentences) for name, sentences in found.items()}


def _from_table(path: Path) -> Descriptions:
    text = _read_text(path)
    first = text.partition("\n")[0]
    try:
        rows = list(csv.reader(io.StringIO(text), delimiter=max(",;\t", key=first.count), strict=True))
    except csv.Error as error:
        raise DataError(f"{path} isn't a readable CSV: {error}.") from error
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    named = next((header.index(key) for key in CLASS_KEYS if key in header), None)
    said = next((header.index(key) for key in TEXT_KEYS if key in header), None)
    if named is None or said is None:
        raise DataError(f"{path} has the columns {', '.join(header) or 'nothing'}; class and text are needed.")
    found: dict[str, list[str]] = {}
    for number, row in enumerate(rows[1:], start=2):
        if not any(map(str.strip, row)):
            continue
        if len(row) <= max(named, said) or not row[named].strip():
            raise DataError(f"{path}, row {number}, has no class or no text: every row needs both cells.")
        sentence = row[said].strip()
        found.setdefault(row[named].strip(), []).extend([sentence] if sentence else [])
    return {name: tuple(sentences) for name, sentences in found.items()}


def _read_text(path: Path, max_bytes: int | None = None) -> str:
    try:
        if path.stat().st_size > (MAX_BYTES if max_bytes is None else max_bytes):
            raise DataError(f"{path} is too large: at most {MAX_BYTES:,} bytes of descriptions are read.")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} isn't UTF-8 text (byte {error.start}): save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}.") from error


def _bounded(found: Descriptions, path: Path) -> Descriptions:
    """What was found, if it is there and of a sane size."""
    if not any(found.values()):
        raise DataError(f"{path} holds no descriptions: give {_SHAPES}.")
    if len(found) > MAX_CLASSES:
        raise DataError(f"{path} describes {len(found):,} classes; at most {MAX_CLASSES:,} are accepted.")
    for name, sentences in found.items():
        if len(sentences) > MAX_SENTENCES:
            raise DataError(
                f"{path} has {len(sentences):,} sentences for {name!r}; at most {MAX_SENTENCES:,} are accepted."
            )
        longest = max(map(len, sentences), default=0)
        if longest > MAX_CHARACTERS:
            raise DataError(
                f"{path} has a sentence of {longest:,} characters for {name!r}; at most {MAX_CHARACTERS:,} are"
                " accepted."
            )
    return found


# --- matching ------------------------------------------------------------------------------------------------------


def match_descriptions(
    found: Mapping[str, Sequence[str]],
    class_names: Sequence[str],
    stored_names: Sequence[str] | None = None,
    where: str = "The descriptions",
) -> Matched:
    """Find each class among the names of descriptions: exact, then without case, blanks, underscores and slashes.

    Args:
        found: Sentences by name, as `read_descriptions` gives them.
        class_names: The classes, in label order.
        stored_names: What the classes are called on disk, tried after the names above.
        where: What the message calls the descriptions.

    Raises:
        DataError: A class fits several entries equally well, or two classes fit one; the message names them.
    """
    loose: dict[str, list[str]] = {}
    for name in found:
        loose.setdefault(_loose(name), []).append(name)
    entries: dict[str, str] = {}
    for name, stored in zip(class_names, stored_names or class_names, strict=True):
        entry = _entry_of(name, stored, found, loose, where)
        if entry is not None:
            entries[name] = entry
    users: dict[str, list[str]] = {}
    for name, entry in entries.items():
        users.setdefault(entry, []).append(name)
    shared = next((names for names in users.values() if len(names) > 1), None)
    if shared:
        raise DataError(
            f"{where} have one entry, {entries[shared[0]]!r}, that fits the classes {first_few(shared)}: give each its"
            " own, under its exact name."
        )
    described = {name: tuple(found[entry]) for name, entry in entries.items()}
    return Matched(
        described,
        tuple(name for name in class_names if name not in entries),
        tuple(name for name, sentences in described.items() if not sentences),
        {name: tuple(sentences) for name, sentences in found.items() if name not in users},
    )


def _loose(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("/", " ").casefold().split())


def _entry_of(
    name: str, stored: str, found: Mapping[str, Any], loose: Mapping[str, Sequence[str]], where: str
) -> str | None:
    for exact in (name, stored):
        if exact in found:
            return exact
    for near in (name, stored):
        fitting = loose.get(_loose(near), ())
        if len(fitting) > 1:
            raise DataError(
                f"{where} have several entries that fit the class {name!r} ({first_few(fitting)}): keep one of them."
            )
        if fitting:
            return fitting[0]
    return None


def check_matched(matched: Matched, where: str, *, allow_missing: bool = False) -> Matched:
    """Refuse descriptions that leave classes without a sentence; returns them.

    Args:
        matched: From `match_descriptions`.
        where: What the message calls the descriptions.
        allow_missing: Accept classes without any, as long as one class is described.

    Raises:
        DataError: One sentence that names the classes that are missing, those that are empty, and what else is there.
    """
    if not (matched.missing or matched.empty) or (allow_missing and matched.sentences):
        return matched
    parts = []
    if matched.missing:
        parts.append(f"{many(len(matched.missing), 'class')} missing ({first_few(matched.missing)})")
    if matched.empty:
        parts.append(f"{many(len(matched.empty), 'class')} without a sentence ({first_few(matched.empty)})")
    if matched.others:
        parts.append(f"{many(len(matched.others), 'name')} that no class has ({first_few(tuple(matched.others))})")
    raise DataError(
        f"{where} don't fit the classes: {', '.join(parts)}. Entries are matched by name, so every class needs"
        " sentences under its own."
    )


def descriptions_for(
    source: str | Path | Mapping[str, Sequence[str]],
    class_names: Sequence[str],
    stored_names: Sequence[str] | None = None,
    *,
    allow_missing: bool = False,
) -> Matched:
    """Read descriptions, or take those given, and match them to classes.

    Args:
        source: A file or folder (see `read_descriptions`), or sentences by class name.
        class_names: The classes, in label order.
        stored_names: What they are called on disk, where that is something else.
        allow_missing: Accept classes without sentences, as long as one class has some.

    Raises:
        DataError: They don't fit the classes, or aren't sentences.
        MissingPathError: No such file.

    Example:
        >>> descriptions_for({"red_fox": ["a pointed snout"]}, ["Red fox"]).descriptions
        {'Red fox': ('a pointed snout',)}
    """
    if isinstance(source, Mapping):
        where = "The descriptions"
        found = {str(k): tuple(_sentences(_plain(v), f"{where}, class {k!r}")) for k, v in source.items()}
    else:
        where, found = f"The descriptions in {os.fspath(source)}", read_descriptions(source)
    matched = match_descriptions(found, class_names, stored_names, where)
    return check_matched(matched, where, allow_missing=allow_missing)


def _plain(given: Any) -> Any:
    """Other sequences (tuples, arrays of texts) as a list."""
    return given if isinstance(given, (str, Mapping, list)) or not isinstance(given, Iterable) else list(given)


def with_descriptions(dataset: Dataset, source: str | Path, *, allow_missing: bool = False) -> Dataset:
    """The dataset with descriptions from a file or folder in the place of its own; notes say what was left out.

    Raises:
        DataError: They don't fit the dataset's classes.
        MissingPathError: No such file.
    """
    matched = descriptions_for(source, dataset.class_names, dataset.stored_names, allow_missing=allow_missing)
    return replace(dataset, descriptions=matched.descriptions, notes=(*dataset.notes, *_notes(matched)))


def _notes(matched: Matched) -> list[str]:
    notes = []
    without = (*matched.missing, *matched.empty)
    if without:
        notes.append(f"{many(len(without), 'class')} without descriptions: {first_few(without)}")
    if matched.others:
        notes.append(
            f"descriptions of {many(len(matched.others), 'other class')} left out: {first_few(tuple(matched.others))}"
        )
    return notes


# --- writing -------------------------------------------------------------------------------------------------------


def write_descriptions(path: str | Path, descriptions: Mapping[str, Sequence[str]]) -> None:
    """Write sentences by class name as JSON, which `read_descriptions` takes.

    Raises:
        DataError: A class has no sentence, or something that isn't one.
        StorageError: The file can't be written.
    """
    for name, sentences in descriptions.items():
        wrong = isinstance(sentences, str) or not all(isinstance(one, str) and one.strip() for one in sentences)
        if wrong or not len(sentences):
            raise DataError(f"The descriptions of {name!r} must be a list of sentences, with at least one.")
    write_json(path, {name: list(sentences) for name, sentences in descriptions.items()})
