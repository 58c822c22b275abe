"""Known datasets under a data root: which layout lies there, what is missing, and which split is read.

Published split files are read as they are. A split of our own is made on request only, under another name, and says so
wherever results are shown.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptkit.data.catalogue import CATALOGUE, Known, Layout
from adaptkit.data.lists import Lists, read_split_json
from adaptkit.data.own_split import keep_val, split_all
from adaptkit.data.readers import Official, Place, read_official, shown_names
from adaptkit.data.splits import TorchSource
from adaptkit.errors import DataError, MissingPathError
from adaptkit.storage import digest_file

DATA_ROOT_VARIABLE = "ADAPTKIT_DATA_ROOT"


@dataclass(frozen=True)
class Found:
    """Image files that were found, before names and templates are settled.

    Args:
        name: The dataset's.
        stored_names: Class names by label.
        lists: Images by split.
        root: What their paths are relative to.
        trusted: Whether the paths come from the file system itself.
        source: Facts: where it came from, how it was split.
        notes: What a reader of results must know.
        shown: Names to show by stored name, where the dataset itself says them.
    """

    name: str
    stored_names: tuple[str, ...]
    lists: Lists
    root: Path
    trusted: bool
    source: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    shown: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TorchPart:
    """One split of a dataset that torchvision reads: its source, the chosen positions, and their labels."""

    source: TorchSource
    positions: Sequence[int]
    labels: Sequence[int]


@dataclass(frozen=True)
class TorchFound:
    """A dataset that torchvision reads."""

    stored_names: tuple[str, ...]
    parts: dict[str, TorchPart]
    source: dict[str, Any]
    notes: list[str]
    shown: Mapping[str, str]


def data_root_for(name: str, given: str | Path | None) -> Path:
    """The data root: the one given, else $ADAPTKIT_DATA_ROOT.

    Raises:
        MissingPathError: There is none; the message says what it must hold for `name`.
    """
    root = given or os.environ.get(DATA_ROOT_VARIABLE) or None
    if root is None:
        raise MissingPathError(
            f"{name} needs a data root: give one (--data-root), or set {DATA_ROOT_VARIABLE}, to the folder that holds"
            f" {needed(CATALOGUE[name])}."
        )
    return Path(root).expanduser()


def needed(known: Known, layout: Layout | None = None, *, own_split: bool = False) -> str:
    """What must lie under the data root, in words."""
    layout = layout or known.layouts[0]
    folder = f"{layout.folder}/" if layout.folder else ""
    index = [known.json] if known.json and not own_split else list(known.needs)
    parts = list(layout.parts.values()) or [""]
    images = [f"{'/'.join(filter(None, (layout.image_path, part)))}/" for part in parts]
    listed = [folder + name for name in index]
    if known.reader != "torchvision":
        listed.append("the images in " + " and ".join(images))
    return ", ".join(listed[:-1]) + (" and " if len(listed) > 1 else "") + listed[-1]


def find_known(
    name: str, data_root: Path, image_root: Path | None = None, *, own_split: bool = False, seed: int = 0
) -> Found:
    """Find a known dataset's files under the data root.

    Args:
        name: Its name; one whose images are files.
        data_root: The folder that holds the datasets' folders.
        image_root: Folder that the split file's paths are relative to, where it isn't a known one.
        own_split: Make a split of our own (or read the one that `data prepare --own-split` wrote).
        seed: Of the own split.

    Raises:
        MissingPathError: A file or folder isn't there; the message says what is expected.
        DataError: What is there can't be used.
    """
    known = CATALOGUE[name]
    if not data_root.is_dir():
        raise MissingPathError(f"There is no data root {data_root}: {name} needs {needed(known)} in one.")
    if own_split:
        written = _first_file(known, data_root, known.own_json)
        if written is not None:
            return found_in_json(written, name, image_root, data_root)
        return _own_found(known, data_root, seed)
    if known.json:
        path = _first_file(known, data_root, known.json)
        if path is None:
            raise MissingPathError(
                f"There is no {data_root / known.layouts[0].folder / known.json}: under the data root {data_root},"
                f" {name} needs {needed(known)} ('adaptkit data prepare {name}' gets it; a split of our own is made"
                " with --own-split)."
            )
        return found_in_json(path, name, image_root, data_root)
    place = find_place(known, data_root)
    official = read_official(place)
    lists: Lists = {split: official.lists.get(split, []) for split in ("train", "val", "test")}
    return _found(place, official, lists, "official", list(known.caveats))


def find_place(known: Known, data_root: Path) -> Place:
    """The first layout that lies whole under the data root, for the dataset's own index files.

    Raises:
        MissingPathError: None does; the message says what is missing of the one that is nearest.
    """
    fewest: list[str] = []
    for layout in known.layouts:
        missing = _missing(known, layout, data_root)
        if not missing:
            return Place(known, layout, data_root)
        started = layout.folder and (data_root / layout.folder).is_dir()
        if started and (not fewest or len(missing) < len(fewest)):
            fewest = missing
    first = fewest[0] if fewest else os.fspath(data_root / (known.layouts[0].folder or known.needs[0]))
    raise MissingPathError(
        f"There is no {first}: under the data root {data_root}, {known.name} needs {needed(known, own_split=True)}"
        f" ('adaptkit data prepare {known.name}' gets it or says how)."
    )


def _missing(known: Known, layout: Layout, data_root: Path) -> list[str]:
    folder, images = data_root / layout.folder, data_root / layout.folder / layout.images
    wanted = [folder / name for name in known.needs] + [images / part for part in (*layout.parts.values(), "")]
    return [os.fspath(path) for path in wanted if not path.exists()]


def _first_file(known: Known, data_root: Path, file: str) -> Path | None:
    """A split file in one of the dataset's folders, in the data root, or in its folder `splits`."""
    folders = dict.fromkeys([*(layout.folder for layout in known.layouts), "", "splits"])
    return next((path for folder in folders if (path := data_root / folder / file).is_file()), None)


# --- split files ---------------------------------------------------------------------------------------------------


def found_in_json(path: Path, name: str, image_root: Path | None, data_root: Path | None) -> Found:
    """A split file's images.

    Args:
        path: The file.
        name: The known dataset it belongs to, "" for none.
        image_root: What its paths are relative to, where that is given.
        data_root: The data root, where there is one.

    Raises:
        MissingPathError: No folder of the dataset's images is there.
        DataError: The file isn't a split file.
    """
    lists, stored = read_split_json(path)
    known = CATALOGUE.get(name)
    first = lists["train"][0].path
    root = image_root or _image_root(path, known, data_root, first)
    source: dict[str, Any] = {"kind": "json", "path": os.fspath(path)}
    if known is None:
        return Found(path.stem, stored, lists, root, False, source)
    own = path.name == known.own_json
    notes = [f"own split ({path.name}), not comparable with published figures"] if own else []
    if not own and known.json_sha256 and digest_file(path) != known.json_sha256:
        notes = [f"{path.name} isn't the published file: check the split before comparing with published figures"]
    source["split"] = "own" if own else "other" if notes else "published"
    shown = shown_names(known, stored, data_root or path.parent.parent)
    return Found(name, stored, lists, root, False, source, notes, shown)


def _image_root(path: Path, known: Known | None, data_root: Path | None, first: str) -> Path:
    """Where a JSON's images lie: in a layout's image folder beside the file or under the data root (the first that has
    the first image, else the first that is there), else in the file's own folder.

    Raises:
        MissingPathError: The file lies under the data root, and no layout's image folder does.
    """
    if known is None:
        return path.parent
    beside = [path.parent / layout.images for layout in known.layouts if layout.images]
    below = [data_root / layout.image_path for layout in known.layouts] if data_root is not None else []
    folders = [folder for folder in (*beside, *below) if folder.is_dir()]
    if not folders and data_root is not None and path.is_relative_to(data_root):
        raise MissingPathError(
            f"There is no {below[0]}: under the data root {data_root}, {known.name} needs {needed(known)}."
        )
    return next((folder for folder in folders if (folder / first).is_file()), (folders or [path.parent])[0])


# --- own splits ----------------------------------------------------------------------------------------------------


def _own_found(known: Known, data_root: Path, seed: int) -> Found:
    place = find_place(known, data_root)
    official = read_official(place)
    if "all" in official.lists:
        by_class: dict[str, list[str]] = {name: [] for name in official.stored_names}
        for item in official.lists["all"]:
            by_class[official.stored_names[item.label]].append(item.path)
        lists, notes = split_all(by_class, seed)
        return _found(place, official, lists, "own", notes)
    if official.lists.get("val") or not official.lists.get("train"):
        raise DataError(f"{known.name} has official splits throughout ({known.rule}): leave out --own-split.")
    train = official.lists["train"]
    kept, val = keep_val([item.label for item in train], official.stored_names, [item.path for item in train], seed)
    lists = {"train": [train[i] for i in kept], "val": [train[i] for i in val], "test": official.lists["test"]}
    return _found(place, official, lists, "own", [_own_val_note(seed)])


def _own_val_note(seed: int) -> str:
    return (
        "own split, not comparable with published ones: 20 % of the official training images of each class validate,"
        f" seed {seed}; testing is official"
    )


def _found(place: Place, official: Official, lists: Lists, split: str, notes: list[str]) -> Found:
    source = {"kind": "known", "path": os.fspath(place.folder), "split": split}
    return Found(
        place.known.name,
        official.stored_names,
        lists,
        place.images,
        official.trusted,
        source,
        [*notes, *official.notes],
        shown_names(place.known, official.stored_names, place.data_root),
    )


# --- datasets that torchvision reads -------------------------------------------------------------------------------


class PublishedSource(TorchSource):
    """Images of a published archive, which torchvision verified: their position names them, no pixel is hashed."""

    def __init__(self, dataset: Any, name: str, files: Sequence[Path]) -> None:
        super().__init__(dataset, name)
        facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
        self._facts = ",".join(":".join(map(str, fact)) for fact in facts)

    def content_digest(self, position: int) -> str | None:  # type: ignore[override]
        return None

    def content_key(self, position: int) -> str:
        return f"{self.pool}/{position}|{self._facts}"


def find_torch(name: str, data_root: Path, *, own_split: bool = False, seed: int = 0) -> TorchFound:
    """Open a known dataset that torchvision reads, without downloading anything.

    Raises:
        MissingPathError: Its files aren't there.
        DataError: torchvision refuses them: damaged, or another version.
    """
    known = CATALOGUE[name]
    place = find_place(known, data_root)
    datasets = _open_torch(place)
    needs = [place.folder / need for need in known.needs]
    files = [file for need in needs for file in ([need] if need.is_file() else need.rglob("*")) if file.is_file()]
    parts = {}
    for split, dataset in datasets.items():
        labels = _labels(dataset)
        parts[split] = TorchPart(PublishedSource(dataset, f"{name}/{split}", files), range(len(labels)), labels)
    stored = tuple(known.names) or tuple(str(each) for each in datasets["train"].classes)
    source: dict[str, Any] = {"kind": "known", "path": os.fspath(place.folder), "split": "official"}
    notes = list(known.caveats)
    if own_split:
        if "val" in parts:
            raise DataError(f"{name} has official splits throughout ({known.rule}): leave out --own-split.")
        train, order = parts["train"], [f"{index:07d}" for index in parts["train"].positions]
        kept, val = keep_val(train.labels, stored, order, seed)
        for split, chosen in (("train", kept), ("val", val)):
            parts[split] = TorchPart(train.source, chosen, [train.labels[index] for index in chosen])
        source["split"], notes = "own", [_own_val_note(seed)]
    return TorchFound(stored, parts, source, notes, known.names)


def _open_torch(place: Place) -> dict[str, Any]:
    import torchvision

    if place.known.torch is None:
        raise DataError(f"{place.known.name} isn't read by torchvision.")
    kind, splits = place.known.torch
    try:
        return {
            split: getattr(torchvision.datasets, kind)(place.folder, download=False, **arguments)
            for split, arguments in splits.items()
        }
    except (RuntimeError, OSError, ValueError, EOFError, KeyError) as error:
        raise DataError(
            f"torchvision can't read {place.known.name} in {place.folder}: {str(error).rstrip('.')}. If its files are"
            f" damaged, remove them and get them again ('adaptkit data prepare {place.known.name}')."
        ) from error


def _labels(dataset: Any) -> list[int]:
    """Labels of a torchvision dataset; PCAM's are in a file of their own, the others' in an attribute."""
    for attribute in ("targets", "labels"):
        if hasattr(dataset, attribute):
            return [int(label) for label in getattr(dataset, attribute)]
    import h5py

    file = dataset._FILES[dataset._split]["targets"][0]
    with h5py.File(dataset._base_folder / file) as opened:
        return [int(label) for label in opened["y"][:].reshape(-1)]
