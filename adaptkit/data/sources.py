"""From a name or a path to a dataset, without code: embedded, folder, CSV, `split_zhou` JSON, CoOp's datasets by name.

    digits, shapes, …        embedded, see adaptkit.data.synthetic
    folder of class folders  with train/, val/ (or valid/, validation/) and test/ around them, or split here
    file.csv                 columns path and label (or class_name), and split where there is one
    file.json                shaped like CoOp's split_zhou_*.json
    eurosat, dtd, …          CoOp's split file and folder layout under a data root

An own split gives every class `round(0.5 n)` training and `round(0.2 n)` validation images (Python's round) and the
rest for testing, drawn by a generator of the class's own from sorted file names: the same on every machine, and a class
keeps its split when others are added. It is never comparable with published splits, and the dataset's notes say so. In
very small classes training comes first, then testing: one image trains; of two or more at least one tests.

Source: datasets sheet, sections 1-3 and 9.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from adaptkit.config import check_templates
from adaptkit.data.images import IMAGE_SUFFIXES
from adaptkit.data.kept import keeping
from adaptkit.data.lists import (
    SPLIT_NAMES,
    Item,
    Lists,
    first_few,
    in_several_splits,
    many,
    read_csv,
    read_split_json,
)
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
from adaptkit.storage import digest_file, read_json

DATA_ROOT_VARIABLE = "ADAPTKIT_DATA_ROOT"
TRAIN_SHARE, VAL_SHARE = 0.5, 0.2


@dataclass(frozen=True)
class CoopDataset:
    """Where one of CoOp's datasets lies under the data root.

    Args:
        folder: Its folder.
        json: The split file in it.
        images: The folder in it that the split file's paths are relative to; "" for `folder` itself.
        sha256: Digest of the published split file, where we know it.
    """

    folder: str
    json: str
    images: str = ""
    sha256: str = ""

    @property
    def tree(self) -> str:
        """What must lie under the data root, in words."""
        images = f"{self.folder}/{self.images}/" if self.images else f"{self.folder}/"
        return f"{self.folder}/{self.json} and the images it names in {images}"


COOP_DATASETS: Mapping[str, CoopDataset] = MappingProxyType(
    {
        "caltech101": CoopDataset(
            "caltech-101",
            "split_zhou_Caltech101.json",
            "101_ObjectCategories",
            "52ce83205ff8ff8a1a18119aad6376120ae35c36e783a984bc560cbf10e73fa5",
        ),
        "dtd": CoopDataset(
            "dtd",
            "split_zhou_DescribableTextures.json",
            "images",
            "f26ebeccd2b58e68d70f07a0dc39fe49bf7b69024bac34396b954dfd87969c38",
        ),
        "eurosat": CoopDataset(
            "eurosat",
            "split_zhou_EuroSAT.json",
            "2750",
            "541503a77d0b26b735d85ec7a3e672804fe0aa466c2e5f07da772cc6c0af8ad2",
        ),
        "food101": CoopDataset("food-101", "split_zhou_Food101.json", "images"),
        "oxford_flowers": CoopDataset(
            "oxford_flowers",
            "split_zhou_OxfordFlowers.json",
            "jpg",
            "2f50c42fc1a17ca13c271cb4269b1347bdb43d2be672e34f74a4e4cbfbcca794",
        ),
        "oxford_pets": CoopDataset(
            "oxford_pets",
            "split_zhou_OxfordPets.json",
            "images",
            "d7f3ffe65b3919f95132e51422894ae18686b83c331fd8c0adcdc3dc2de6301e",
        ),
        "stanford_cars": CoopDataset(
            "stanford_cars",
            "split_zhou_StanfordCars.json",
            "",
            "40acee7aa65c8e4727a32d90e884b7c3f8960b523422317e163f7af65432959d",
        ),
        "sun397": CoopDataset("sun397", "split_zhou_SUN397.json", "SUN397"),
        "ucf101": CoopDataset(
            "ucf101",
            "split_zhou_UCF101.json",
            "UCF-101-midframes",
            "d78cb834f7c5792ceaff2c5ee2d7c76a9e4086e48a3a6b01232989d29cbefdd8",
        ),
    }
)
"""Those of CoOp's datasets that have a split file. Source: datasets sheet, sections 2 and 3."""

_BY_FILE = {known.json: name for name, known in COOP_DATASETS.items()}
_WITHOUT_JSON = ("imagenet", "fgvc_aircraft")  # in CoOp's suite, with index files of their own

_Parts = tuple[tuple[str, ...], np.ndarray, tuple[str, ...], ImageSource, np.ndarray]
"""What a split is made of: ids, labels, class names, source, positions."""


@dataclass(frozen=True)
class _Found:
    """Image files that were found, before names and templates are settled."""

    name: str
    stored_names: tuple[str, ...]
    lists: Lists
    root: Path
    trusted: bool
    source: dict[str, Any]
    notes: list[str] = field(default_factory=list)


# --- loading -------------------------------------------------------------------------------------------------------


def known_names() -> tuple[str, ...]:
    """Every dataset name that `load_dataset` knows, sorted; folders and files are accepted beside them."""
    return tuple(sorted((*EMBEDDED, *COOP_DATASETS)))


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
) -> Dataset:
    """Load a dataset by name or path; see the top of this file for what is accepted.

    Image files are listed here and opened later: `check_dataset` opens them all.

    Args:
        name: A known name, a folder, a CSV or a JSON. A name wins over a folder that is called the same; write
            "./digits" for the folder.
        data_root: Folder that holds CoOp's datasets; $ADAPTKIT_DATA_ROOT by default.
        templates: Prompt templates to use instead of the dataset's.
        display_names: Stored class name to the name a text tower reads, or a JSON file with such an object. Names that
            aren't in it are shown as stored, with spaces for underscores.
        image_root: Folder that the paths in a CSV or JSON are relative to.
        seed: Of an own split, and of the drawn datasets' pictures. `digits` and given splits don't depend on it.
        shots: For own splits: where the 50/20/30 rule leaves a class fewer training images than this, this many are
            kept for training if the class has more; at least one is left for testing. Given splits don't change.

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
    if isinstance(name, str) and is_embedded(name):
        return _embedded(name, seed, templates, display_names)
    if isinstance(name, str) and name in COOP_DATASETS:
        found = _find_coop(name, root, image_root)
    else:
        path = _existing_path(text)
        if path.is_dir():
            found = _find_folder(path, seed, shots)
        elif path.suffix.lower() == ".json":
            found = _find_json(path, image_root, root)
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
    if text.lower() in _WITHOUT_JSON:
        hint = (
            f"{text} has no split file and can't be read by name yet: give a folder of class folders, a CSV or a JSON."
        )
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


def _positions(split: str, labels: Any, class_names: tuple[str, ...], source: ImageSource) -> _Parts:
    """What a split of images without file names is made of: all images of `source`, in order."""
    ids = tuple(f"{split}/{index:05d}" for index in range(len(labels)))
    return ids, np.asarray(labels, dtype=np.int64), class_names, source, np.arange(len(labels))


def _dataset_of_files(
    found: _Found,
    templates: str | Iterable[str] | None,
    display_names: Mapping[str, str] | str | Path | None,
) -> Dataset:
    shown = _display_names(found.stored_names, display_names, found.name)
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


def _list_notes(found: _Found) -> list[str]:
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


def _display_names(stored: Sequence[str], given: Mapping[str, str] | str | Path | None, where: str) -> tuple[str, ...]:
    """The names to show, in label order.

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
    shown = tuple(display_name(mapping.get(name, name)) for name in stored)
    check_class_names(shown, where)
    return shown


# --- own splits ----------------------------------------------------------------------------------------------------


def split_sizes(count: int, shots: int | None = None) -> tuple[int, int, int]:
    """How many of a class's images train, validate and test in an own split.

    Args:
        count: The class's images, at least 1.
        shots: Training images to keep where the class has more than that; None for the plain rule.

    Example:
        >>> split_sizes(10), split_sizes(3), split_sizes(6, shots=4)
        ((5, 2, 3), (2, 0, 1), (4, 0, 2))
    """
    train, val = max(1, round(TRAIN_SHARE * count)), round(VAL_SHARE * count)
    if shots is not None and train < shots < count:
        train = shots
        val = min(val, int((count - train) * VAL_SHARE / (1 - TRAIN_SHARE)))  # the rest in the rule's own proportion
    if count > 1:
        val = min(val, count - train - 1)  # at least one image tests
    return train, val, count - train - val


def _own_split(by_class: Mapping[str, Sequence[str]], seed: int, shots: int | None) -> tuple[Lists, list[str]]:
    """Split paths by class name; labels follow the mapping's order.

    Returns:
        The lists, in path order within each class, and notes for the reader of results.
    """
    lists: Lists = {"train": [], "val": [], "test": []}
    raised = 0
    for label, (name, paths) in enumerate(by_class.items()):
        ordered = sorted(paths)
        shuffled = list(range(len(ordered)))
        random.Random(f"{seed}/{name}").shuffle(shuffled)
        train, val, test = split_sizes(len(ordered), shots)
        raised += train > split_sizes(len(ordered))[0]
        for split, start, size in (("train", 0, train), ("val", train, val), ("test", train + val, test)):
            chosen = sorted(shuffled[start : start + size])
            lists[split] += [Item(ordered[position], label) for position in chosen]
    notes = [f"own split, not comparable with published ones: 50/20/30 per class, seed {seed}"]
    if raised:
        notes.append(
            f"{many(raised, 'class')} too small for {shots} shots under the 50/20/30 rule: {shots} images kept for"
            " training, so the test images depend on the number of shots"
        )
    return lists, notes


# --- folders -------------------------------------------------------------------------------------------------------


def _find_folder(path: Path, seed: int, shots: int | None) -> _Found:
    name = Path(os.path.realpath(path)).name
    splits = _split_folders(path)
    source: dict[str, Any] = {"kind": "folder", "path": os.fspath(path)}
    if splits:
        lists, stored, notes = _read_split_folders(path, splits)
        return _Found(name, stored, lists, path, True, source, notes)
    by_class, notes = _read_classes(path, needs_images=True)
    paths = {stored: [f"{stored}/{file}" for file in files] for stored, files in by_class.items()}
    lists, split_notes = _own_split(paths, seed, shots)
    return _Found(name, tuple(by_class), lists, path, True, source | {"split_seed": seed}, split_notes + notes)


def _split_folders(path: Path) -> dict[str, str]:
    """The sub-folders that are splits, {} where the folder holds classes: `train` beside `bus` is a class.

    Raises:
        DataError: Two folders for one split.
    """
    found: dict[str, str] = {}
    for folder in _listing(path)[0]:
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
        by_class, more = _read_classes(path / folder, needs_images=split == "train")
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
    others = [name for name in _listing(path)[0] if name not in splits.values()]
    if others:
        notes.append(f"folders beside the splits aren't read: {first_few(others)}")
    return lists, stored, notes


def _read_classes(path: Path, *, needs_images: bool) -> tuple[dict[str, list[str]], list[str]]:
    """Image file names by class folder, both sorted, and notes on what was left out.

    Raises:
        DataError: No class folders, or (where `needs_images`) one without images.
    """
    folders, files = _listing(path)
    if not folders:
        loose = sum(map(_is_image, files))
        held = f"it holds {many(loose, 'image')} in none" if loose else "it is empty" if not files else "only files"
        raise DataError(
            f"{path} has no class folders ({held}): put the images of each class into a folder of its name."
        )
    by_class, unread, nested = {}, 0, 0
    for folder in folders:
        inner, names = _listing(path / folder)
        by_class[folder] = [name for name in names if _is_image(name)]
        unread += len(names) - len(by_class[folder])
        nested += bool(inner)
        if needs_images and not by_class[folder]:
            raise DataError(_no_images(path, folder, inner, names))
    notes = [f"{path.name}: {many(unread, 'file')} without the suffix of an image left out"] if unread else []
    if nested:
        notes.append(f"{path.name}: sub-folders inside {many(nested, 'class')} left out")
    return by_class, notes


def _no_images(path: Path, folder: str, inner: Sequence[str], files: Sequence[str]) -> str:
    given = sorted(name.name for name in path.glob("*.json"))
    if given:
        return f"{path / folder} has no images; {path} holds {given[0]}: give that file as the dataset."
    if inner:
        return (
            f"The class folder {path / folder} holds folders instead of images: images lie right inside class folders,"
            " and splits are called train, val and test (a train folder needs a test or val folder beside it)."
        )
    what = f"{many(len(files), 'file')} but no images" if files else "no images"
    return f"The class folder {path / folder} has {what}: add some ({', '.join(IMAGE_SUFFIXES)}), or remove it."


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _listing(path: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder, sorted; hidden ones are left out.

    Raises:
        DataError: It is no folder, or can't be read.
    """
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if not entry.name.startswith((".", "__MACOSX")):
                    (folders if entry.is_dir() else files).append(entry.name)
    except NotADirectoryError as error:
        raise DataError(f"{path} is a file, and a folder is expected there.") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}.") from error
    return sorted(folders), sorted(files)


# --- CSV -----------------------------------------------------------------------------------------------------------


def _find_csv(path: Path, image_root: str | Path | None, seed: int, shots: int | None) -> _Found:
    table = read_csv(path)
    stored, lists, notes = table.stored_names, table.lists, []
    if all(name.isdecimal() for name in stored):
        notes.append("class names are numbers, which say nothing to a text tower: give display names")
    source: dict[str, Any] = {"kind": "csv", "path": os.fspath(path)}
    if lists is None:
        by_class: dict[str, list[str]] = {name: [] for name in stored}
        for item in table.items:
            by_class[stored[item.label]].append(item.path)
        lists, split_notes = _own_split(
            {name: list(dict.fromkeys(paths)) for name, paths in by_class.items()}, seed, shots
        )
        notes, source = split_notes + notes, source | {"split_seed": seed}
    return _Found(path.stem, stored, lists, _image_root(image_root) or path.parent, False, source, notes)


# --- split_zhou JSON -----------------------------------------------------------------------------------------------


def _find_coop(name: str, data_root: Path | None, image_root: str | Path | None) -> _Found:
    known = COOP_DATASETS[name]
    if data_root is None:
        raise MissingPathError(
            f"{name} needs a data root: give one, or set {DATA_ROOT_VARIABLE}, to the folder that holds {known.tree}."
        )
    path = data_root / known.folder / known.json
    root = _image_root(image_root) or data_root / known.folder / known.images
    if not path.is_file() or not root.is_dir():
        missing = path if not path.is_file() else root
        raise MissingPathError(f"There is no {missing}: under the data root {data_root}, {name} needs {known.tree}.")
    return _find_json(path, root, data_root)


def _find_json(path: Path, image_root: str | Path | None, data_root: Path | None) -> _Found:
    lists, stored = read_split_json(path)
    name = _BY_FILE.get(path.name, "")
    notes = []
    if name and COOP_DATASETS[name].sha256 and digest_file(path) != COOP_DATASETS[name].sha256:
        notes.append(f"{path.name} isn't the published file: check the split before comparing with published figures")
    root = _image_root(image_root) or _layout_root(path, name, data_root)
    source: dict[str, Any] = {"kind": "json", "path": os.fspath(path)}
    return _Found(name or path.stem, stored, lists, root, False, source, notes)


def _image_root(given: str | Path | None) -> Path | None:
    if given is None:
        return None
    root = Path(given).expanduser()
    if not root.is_dir():
        raise MissingPathError(
            f"There is no image folder {root}: give the folder that the listed paths are relative to."
        )
    return root


def _layout_root(path: Path, name: str, data_root: Path | None) -> Path:
    """Where a JSON's images lie: CoOp's image folder beside a file of a known name, then the one under the data root,
    else the JSON's own folder."""
    known = COOP_DATASETS.get(name)
    if known is None:
        return path.parent
    candidates = [path.parent / known.images] if known.images else []
    if data_root is not None:
        candidates.append(data_root / known.folder / known.images)
    return next((folder for folder in candidates if folder.is_dir()), path.parent)


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
