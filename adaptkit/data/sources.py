"""From a name or a path to a dataset, without code: embedded, folder, CSV, `split_zhou` JSON, known datasets by name.

    digits, shapes, …        embedded, see adaptkit.data.synthetic
    folder of class folders  with train/, val/ (or valid/, validation/) and test/ around them, or split here
    file.csv                 columns path and label (or class_name), and split where there is one
    file.json                shaped like CoOp's split_zhou_*.json, or a few-shot list of ours
    features:FILE            stored features in the place of images, see adaptkit.data.feature_files
    eurosat, cub200, …       under a data root, in any layout that adaptkit.data.catalogue lists

Folders and CSVs without splits get one of ours, see adaptkit.data.own_split; known datasets only on request. It is
never comparable with published splits, and the dataset's notes say so.

Source: datasets sheet, sections 1-3 and 9.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from adaptkit.config import check_templates
from adaptkit.data.catalogue import BY_FILE, CATALOGUE
from adaptkit.data.folders import class_folders, listing
from adaptkit.data.kept import keeping
from adaptkit.data.known import (
    DATA_ROOT_VARIABLE,
    Found,
    data_root_for,
    find_known,
    find_torch,
    found_in_json,
)
from adaptkit.data.lists import (
    SPLIT_NAMES,
    Item,
    Lists,
    first_few,
    in_several_splits,
    many,
    read_csv,
)
from adaptkit.data.own_split import split_all
from adaptkit.data.own_split import split_sizes as split_sizes
from adaptkit.data.shot_lists import is_shot_list, load_shot_list
from adaptkit.data.splits import (
    ArraySource,
    Dataset,
    FileSource,
    ImageSource,
    TestSplit,
    TorchSource,
    TrainSplit,
    ValSplit,
    check_class_names,
)
from adaptkit.data.synthetic import DESCRIPTION_TEMPLATE, EMBEDDED, VERSION, is_embedded, load_embedded
from adaptkit.data.templates import display_name, templates_for
from adaptkit.errors import DataError, MissingPathError, UnknownNameError
from adaptkit.storage import read_json

_Parts = tuple[tuple[str, ...], np.ndarray, tuple[str, ...], ImageSource, np.ndarray]
"""What a split is made of: ids, labels, class names, source, positions."""


# --- loading -------------------------------------------------------------------------------------------------------


def known_names() -> tuple[str, ...]:
    """Every dataset name that `load_dataset` knows, sorted; folders and files are accepted beside them."""
    return tuple(sorted((*EMBEDDED, *CATALOGUE)))


@keeping(known_names)
def load_dataset(
    name: str | Path,
    *,
    data_root: str | Path | None = None,
    templates: str | Iterable[str] | None = None,
    display_names: Mapping[str, str] | str | Path | None = None,
    image_root: str | Path | None = None,
    seed: int = 0,
    shots: int | None = None,
    own_split: bool = False,
) -> Dataset:
    """Load a dataset by name or path; see the top of this file for what is accepted.

    Image files are listed here and opened later: `check_dataset` opens them all.

    Args:
        name: A known name, a folder, a CSV or a JSON. A name wins over a folder that is called the same; write
            "./digits" for the folder.
        data_root: Folder that holds known datasets; $ADAPTKIT_DATA_ROOT by default.
        templates: Prompt templates to use instead of the dataset's.
        display_names: Stored class name to the name a text tower reads, or a JSON file with such an object. Names that
            aren't in it are shown as stored, with spaces for underscores.
        image_root: Folder that the paths in a CSV or JSON are relative to.
        seed: Of an own split, and of the drawn datasets' pictures. `digits` and given splits don't depend on it.
        shots: For own splits: where the 50/20/30 rule leaves a class fewer training images than this, this many are
            kept for training if the class has more; at least one is left for testing. Given splits don't change.
        own_split: Give a known dataset a split of ours instead of the published one, or validation images where it has
            none. Others have no published split: nothing changes for them.

    Raises:
        UnknownNameError: Neither a known name nor a path.
        MissingPathError: A path, split file or image folder isn't there; the message says what is expected.
        DataError: What is there can't be used.
        ConfigError: A template without exactly one `{}`.
        StorageError: A file can't be read, or names a path outside its folder.

    Example:
        >>> load_dataset("digits").splits["test"].counts()[:3]
        [53, 55, 54]
    """
    text = os.fspath(name)
    root = data_root or os.environ.get(DATA_ROOT_VARIABLE) or None
    root = Path(root).expanduser() if root is not None else None
    if text.startswith("features:"):
        from adaptkit.data.feature_files import open_features  # loads torch

        opened = open_features(text, shots)
        return opened.dataset(_display_names(opened.file.class_names, display_names, opened.file.name), templates)
    if isinstance(name, str) and is_embedded(name):
        return _embedded(name, seed, templates, display_names)
    if isinstance(name, str) and name in CATALOGUE:
        root = data_root_for(name, root)
        if CATALOGUE[name].torch is not None:
            return _torch_known(name, root, own_split, seed, templates, display_names)
        found = find_known(name, root, _image_root(image_root), own_split=own_split, seed=seed)
    else:
        path = _existing_path(text)
        if path.is_dir():
            found = _find_folder(path, seed, shots)
        elif path.suffix.lower() == ".json" and is_shot_list(path):
            load = partial(
                load_dataset,
                data_root=root,
                templates=templates,
                display_names=display_names,
                image_root=image_root,
                seed=seed,
            )
            return load_shot_list(path, load)
        elif path.suffix.lower() == ".json":
            found = found_in_json(path, BY_FILE.get(path.name, ""), _image_root(image_root), root)
        elif path.suffix.lower() in (".csv", ".tsv"):
            found = _find_csv(path, image_root, seed, shots)
        else:
            raise DataError(f"{path} is neither a folder, nor a .csv, nor a .json; give one of these as the dataset.")
    return _dataset_of_files(found, templates, display_names)


def _existing_path(text: str) -> Path:
    path = Path(text).expanduser()
    if text and path.exists():
        return path
    if "/" in text or os.sep in text or path.suffix.lower() in (".json", ".csv", ".tsv"):
        raise MissingPathError(f"There is no dataset at {text}: give a folder of class folders, a CSV or a JSON.")
    hint = "A folder of class folders, a CSV or a split_zhou JSON is accepted too, and there is none of that name here."
    raise UnknownNameError.for_name("dataset", text, known_names(), hint)


def _embedded(
    name: str, seed: int, templates: str | Iterable[str] | None, display_names: Mapping[str, str] | str | Path | None
) -> Dataset:
    drawn = load_embedded(name, seed)
    shown = _display_names(drawn.class_names, display_names, name)
    sources = {split: ArraySource(images) for split, images in drawn.images.items()}

    def facts(split: str) -> _Parts:
        return _positions(split, drawn.labels[split], shown, sources[split])

    sentences = {
        new: tuple(DESCRIPTION_TEMPLATE.format(name=new, description=phrase) for phrase in drawn.descriptions[old])
        for old, new in zip(drawn.class_names, shown, strict=True)
        if old in drawn.descriptions
    }
    source: dict[str, Any] = {"kind": "embedded", "version": VERSION} | ({} if name == "digits" else {"seed": seed})
    return Dataset(
        name,
        shown,
        TrainSplit(*facts("train")),
        ValSplit(*facts("val")),
        TestSplit(*facts("test")),
        check_templates(drawn.templates if templates is None else templates),
        sentences,
        source,
        ("embedded dataset, never to be compared with published figures",),
        drawn.class_names,
    )


def _torch_known(
    name: str,
    data_root: Path,
    own_split: bool,
    seed: int,
    templates: str | Iterable[str] | None,
    display_names: Mapping[str, str] | str | Path | None,
) -> Dataset:
    found = find_torch(name, data_root, own_split=own_split, seed=seed)
    shown = _display_names(found.stored_names, display_names, name, found.shown)

    def facts(split: str) -> _Parts:
        part = found.parts[split]
        ids = tuple(f"{part.source.pool.rpartition('/')[2]}/{position:06d}" for position in part.positions)
        return ids, np.array(part.labels, dtype=np.int64), shown, part.source, np.array(part.positions)

    return Dataset(
        name,
        shown,
        TrainSplit(*facts("train")),
        ValSplit(*facts("val")) if "val" in found.parts else None,
        TestSplit(*facts("test")),
        check_templates(templates_for(name) if templates is None else templates),
        {},
        found.source,
        tuple(found.notes),
        found.stored_names,
    )


def _positions(split: str, labels: Any, class_names: tuple[str, ...], source: ImageSource) -> _Parts:
    """What a split of images without file names is made of: all images of `source`, in order."""
    ids = tuple(f"{split}/{index:05d}" for index in range(len(labels)))
    return ids, np.asarray(labels, dtype=np.int64), class_names, source, np.arange(len(labels))


def _dataset_of_files(
    found: Found,
    templates: str | Iterable[str] | None,
    display_names: Mapping[str, str] | str | Path | None,
) -> Dataset:
    shown = _display_names(found.stored_names, display_names, found.name, found.shown)
    everything = [item for split in ("train", "val", "test") for item in found.lists[split]]
    files = FileSource(found.root, [item.path for item in everything], trusted=found.trusted)
    start = 0

    def facts(split: str) -> _Parts:
        nonlocal start
        items = found.lists[split]
        positions = np.arange(start, start + len(items))
        start += len(items)
        labels = np.array([item.label for item in items], dtype=np.int64)
        return tuple(item.path for item in items), labels, shown, files, positions

    train, val, test = TrainSplit(*facts("train")), ValSplit(*facts("val")), TestSplit(*facts("test"))
    return Dataset(
        found.name,
        shown,
        train,
        val if len(val) else None,
        test,
        check_templates(templates_for(found.name) if templates is None else templates),
        {},
        {**found.source, "image_root": os.fspath(found.root)},
        tuple(found.notes + _list_notes(found)),
        found.stored_names,
    )


def _list_notes(found: Found) -> list[str]:
    notes = [] if found.lists["test"] else ["there are no test images"]
    without = len(found.stored_names) - len({item.label for item in found.lists["test"]})
    if found.lists["test"] and without:
        notes.append(f"{without} of {many(len(found.stored_names), 'class')} without test images")
    shared = in_several_splits({split: [item.path for item in items] for split, items in found.lists.items()})
    if shared:
        notes.append(
            f"{many(len(shared), 'image')} in more than one split, so results are too good: {first_few(list(shared))}"
        )
    return notes


def _display_names(
    stored: Sequence[str],
    given: Mapping[str, str] | str | Path | None,
    where: str,
    known: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """The names to show, in label order: those given, else those the dataset itself says, else the stored ones.

    Raises:
        DataError: `given` isn't an object of names, names unknown classes, or two classes would be called the same.
    """
    if given is None:
        mapping: Mapping[str, str] = {}
    elif isinstance(given, (str, Path)):
        mapping = read_json(given)
    else:
        mapping = given
    if not isinstance(mapping, Mapping) or not all(isinstance(part, str) for pair in mapping.items() for part in pair):
        raise DataError(f"Display names of {where} must be an object of stored name to display name, both texts.")
    unknown = sorted(set(mapping) - set(stored))
    if unknown:
        raise DataError(
            f"Display names are given for {many(len(unknown), 'class')} that {where} hasn't ({first_few(unknown)}); its"
            f" classes are stored as {first_few(stored)}."
        )
    own = {name: display_name(name) for name in stored} | dict(known or {})
    shown = tuple(display_name(mapping[name]) if name in mapping else own[name] for name in stored)
    check_class_names(shown, where)
    return shown


# --- folders -------------------------------------------------------------------------------------------------------


def _find_folder(path: Path, seed: int, shots: int | None) -> Found:
    name = Path(os.path.realpath(path)).name
    splits = _split_folders(path)
    source: dict[str, Any] = {"kind": "folder", "path": os.fspath(path)}
    if splits:
        lists, stored, notes = _read_split_folders(path, splits)
        return Found(name, stored, lists, path, True, source, notes)
    by_class, notes = class_folders(path, needs_images=True)
    paths = {stored: [f"{stored}/{file}" for file in files] for stored, files in by_class.items()}
    lists, split_notes = split_all(paths, seed, shots)
    return Found(name, tuple(by_class), lists, path, True, source | {"split_seed": seed}, split_notes + notes)


def _split_folders(path: Path) -> dict[str, str]:
    """The sub-folders that are splits, {} where the folder holds classes: `train` beside `bus` is a class.

    Raises:
        DataError: Two folders for one split.
    """
    found: dict[str, str] = {}
    for folder in listing(path)[0]:
        split = SPLIT_NAMES.get(folder.lower())
        if split and split in found:
            raise DataError(f"{path} has two folders of {split} images, {found[split]}/ and {folder}/: keep one.")
        if split:
            found[split] = folder
    return found if "train" in found and len(found) > 1 else {}


def _read_split_folders(path: Path, splits: Mapping[str, str]) -> tuple[Lists, tuple[str, ...], list[str]]:
    lists: Lists = {"train": [], "val": [], "test": []}
    stored: tuple[str, ...] = ()
    notes = []
    for split in ("train", "val", "test"):
        if split not in splits:
            continue
        folder = splits[split]
        by_class, more = class_folders(path / folder, needs_images=split == "train")
        notes += more
        if split == "train":
            stored = tuple(by_class)
        extra = [name for name in by_class if name not in stored]
        if extra:
            raise DataError(
                f"{path / folder} has {many(len(extra), 'class')} that {splits['train']}/ hasn't ({first_few(extra)}):"
                " every class needs training images."
            )
        for name, files in by_class.items():
            lists[split] += [Item(f"{folder}/{name}/{file}", stored.index(name)) for file in files]
    others = [name for name in listing(path)[0] if name not in splits.values()]
    if others:
        notes.append(f"folders beside the splits aren't read: {first_few(others)}")
    return lists, stored, notes


# --- CSV -----------------------------------------------------------------------------------------------------------


def _find_csv(path: Path, image_root: str | Path | None, seed: int, shots: int | None) -> Found:
    table = read_csv(path)
    stored, lists, notes = table.stored_names, table.lists, []
    if all(name.isdecimal() for name in stored):
        notes.append("class names are numbers, which say nothing to a text tower: give display names")
    source: dict[str, Any] = {"kind": "csv", "path": os.fspath(path)}
    if lists is None:
        by_class: dict[str, list[str]] = {name: [] for name in stored}
        for item in table.items:
            by_class[stored[item.label]].append(item.path)
        lists, split_notes = split_all(
            {name: list(dict.fromkeys(paths)) for name, paths in by_class.items()}, seed, shots
        )
        notes, source = split_notes + notes, source | {"split_seed": seed}
    return Found(path.stem, stored, lists, _image_root(image_root) or path.parent, False, source, notes)


def _image_root(given: str | Path | None) -> Path | None:
    if given is None:
        return None
    root = Path(given).expanduser()
    if not root.is_dir():
        raise MissingPathError(
            f"There is no image folder {root}: give the folder that the listed paths are relative to."
        )
    return root


# --- torch datasets ------------------------------------------------------------------------------------------------


def from_torch_dataset(
    train: Any,
    test: Any = None,
    val: Any = None,
    *,
    name: str = "torch-dataset",
    classes: Sequence[str] | None = None,
    templates: str | Iterable[str] | None = None,
    display_names: Mapping[str, str] | str | Path | None = None,
) -> Dataset:
    """A dataset of torch datasets whose items are (image, label).

    Images are PIL images, uint8 arrays or floats in [0, 1]. Give datasets without random transforms: an image that
    changes each time it is read can't be stored or compared.

    Args:
        train: Training images, with `.classes`.
        test: Test images; None for none.
        val: Validation images; None for none. Never the test images.
        name: What to call it. A registry name gives that dataset's templates.
        classes: Class names by label, for datasets without `.classes` (such as a `Subset`).
        templates: Prompt templates to use instead of the name's.
        display_names: As for `load_dataset`.

    Raises:
        DataError: No class names, other classes in `val` or `test`, or labels that aren't their indices.
    """
    stored = _torch_classes(train, classes, "train")
    for kind, given in (("val", val), ("test", test)):
        if given is not None and getattr(given, "classes", None) is not None:
            other = _torch_classes(given, classes, kind)
            if other != stored:
                raise DataError(
                    f"The {kind} dataset of {name} has other classes than the train dataset; give the same."
                )
    shown = _display_names(stored, display_names, name)
    sources = {
        split: TorchSource(given, f"{name}/{split}")
        for split, given in (("train", train), ("val", val), ("test", test))
        if given is not None
    }

    def facts(split: str) -> _Parts:
        if split not in sources:
            return _positions(split, [], shown, sources["train"])
        return _positions(split, _torch_labels(sources[split].dataset, split), shown, sources[split])

    return Dataset(
        name,
        shown,
        TrainSplit(*facts("train")),
        ValSplit(*facts("val")) if val is not None else None,
        TestSplit(*facts("test")),
        check_templates(templates_for(name) if templates is None else templates),
        {},
        {"kind": "torch", "class": type(train).__name__},
        () if test is not None else ("there are no test images",),
        stored,
    )


def _torch_classes(dataset: Any, given: Sequence[str] | None, kind: str) -> tuple[str, ...]:
    names = given if given is not None else getattr(dataset, "classes", None)
    if names is None or isinstance(names, str):
        raise DataError(f"The {kind} dataset has no class names in `.classes`: give them as `classes`.")
    return tuple(str(name) for name in names)


def _torch_labels(dataset: Any, kind: str) -> list[int]:
    """Labels from `.targets` where they are there, else by reading every item."""
    labels = getattr(dataset, "targets", None)
    if labels is None or len(labels) != len(dataset):
        labels = [dataset[index][1] for index in range(len(dataset))]
    try:
        return [int(label) for label in labels]
    except (TypeError, ValueError) as error:
        raise DataError(f"The {kind} dataset has labels that aren't whole numbers ({error}).") from error
