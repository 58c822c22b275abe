"""Getting a known dataset: what is there stays, what is missing is fetched from the first origin that works."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adaptkit.data.catalogue import CATALOGUE, File, HubFile, Known, Origin, mirrored
from adaptkit.data.download import fetch, unpack_into
from adaptkit.data.known import find_known, find_torch
from adaptkit.data.sources import load_dataset
from adaptkit.data.splits import Dataset
from adaptkit.errors import AdaptKitError, ConfigError, StorageError, UnknownNameError
from adaptkit.storage import file_lock, write_json
from adaptkit.types import ProgressCallback

_DOWNLOADS = ".adaptkit-downloads"


@dataclass
class Preparation:
    """How far a dataset was got.

    Args:
        name: Its name.
        ready: Whether it can be loaded.
        fetched: Where it was fetched from, "" where it lay there already or nothing worked.
        tried: (origin, reason) of what didn't work.
        missing: What is still missing, in a sentence.
        tree: The folder tree that is needed, drawn.
        steps: What to do by hand.
        licence: Of the images.
        citation: Whose they are.
    """

    name: str
    ready: bool = False
    fetched: str = ""
    tried: list[tuple[str, str]] = field(default_factory=list)
    missing: str = ""
    tree: str = ""
    steps: str = ""
    licence: str = ""
    citation: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def known_dataset(name: str) -> Known:
    """The table's entry.

    Raises:
        UnknownNameError: There is none.
    """
    if name not in CATALOGUE:
        hint = "Embedded datasets, folders and CSVs need no preparation."
        raise UnknownNameError.for_name("dataset", name, CATALOGUE, hint)
    return CATALOGUE[name]


def prepare(
    name: str, data_root: str | Path, *, own_split: bool = False, progress: ProgressCallback | None = None
) -> Preparation:
    """Make a known dataset ready under a data root.

    Args:
        name: Its name in the table.
        data_root: Folder of datasets; made where it doesn't exist.
        own_split: Whether a split of ours is wanted, so that a published split file isn't needed.
        progress: Called as (what, done, in all).

    Returns:
        What was done, and what to do where it can't be made ready.

    Raises:
        UnknownNameError: No such dataset.
        StorageError: The data root can't be written.
    """
    known, root = known_dataset(name), Path(data_root).expanduser()
    state = Preparation(name, tree=known.tree(), steps=known.steps, licence=known.licence, citation=known.citation)
    state.missing = _missing(known, root, own_split)
    attempts = [*known.origins]
    if known.json and not own_split:
        attempts.insert(0, Origin("the mirror of the split files", ()))
    for origin in attempts if state.missing else ():
        try:
            with file_lock(root / _DOWNLOADS / f"{name}.lock"):  # a second call waits, and finds what the first got
                _get(origin, known, root, bool(known.json) and not own_split, progress)
        except AdaptKitError as error:
            state.tried.append((origin.where, str(error)))
            continue
        state.missing = _missing(known, root, own_split)
        if not state.missing:
            state.fetched = origin.where
            break
        if origin.items:
            state.tried.append((origin.where, state.missing))
    state.ready = not state.missing
    if state.ready:
        shutil.rmtree(root / _DOWNLOADS / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        (root / _DOWNLOADS / f"{name}.lock").unlink()
    for folder in (root / _DOWNLOADS / name, root / _DOWNLOADS):
        with contextlib.suppress(OSError):
            folder.rmdir()  # unless something in it can be gone on with
    return state


def write_own_split(name: str, data_root: str | Path, seed: int = 0) -> tuple[Path, Dataset]:
    """Write a known dataset's own split beside its images.

    Returns:
        The file, shaped like CoOp's split files, and the dataset as it is read from it.

    Raises:
        ConfigError: The dataset's images aren't files, so that no list can name them.
        MissingPathError: The dataset isn't under the data root.
        DataError: It has official splits throughout.
    """
    known, root = known_dataset(name), Path(data_root).expanduser()
    if known.torch is not None:
        raise ConfigError(f"The images of {name} aren't files, so no split file is written: run with --own-split.")
    found = find_known(name, root, own_split=True, seed=seed)
    path = Path(found.source["path"])
    if path.name != known.own_json:  # not read from the file itself
        path = path / known.own_json
        listed = {
            split: [[item.path, item.label, found.stored_names[item.label]] for item in found.lists[split]]
            for split in ("train", "val", "test")
        }
        write_json(path, listed)
    return path, load_dataset(name, data_root=root, own_split=True)


def _missing(known: Known, root: Path, own_split: bool) -> str:
    """Why the dataset can't be loaded, "" where it can; images are looked for, not opened."""
    try:
        if known.torch is not None:
            find_torch(known.name, root, own_split=own_split)
            return ""
        found = find_known(known.name, root, own_split=own_split)
    except AdaptKitError as error:
        return str(error).partition(": under the data root")[0].rstrip(".") + "."  # the tree is shown beside it
    items = [item for items in found.lists.values() for item in items]
    looked_for = [found.root / item.path for item in items[:: max(1, len(items) // 1000)]]
    without = next((path for path in looked_for if not path.exists()), None)
    return f"There is no {without}." if without is not None else ""


def _get(origin: Origin, known: Known, root: Path, split_file: bool, progress: ProgressCallback | None) -> None:
    """Fetch everything from one origin, and the published split file where that is wanted and still missing."""
    downloads = root / _DOWNLOADS / known.name
    try:
        downloads.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{root} can't be written: {error.strerror or error}.") from error
    for item in origin.items:
        if isinstance(item, File):
            _get_file(item, root, downloads, progress)
        elif isinstance(item, HubFile):
            _get_hub_file(item, root, downloads, progress)
        else:
            _get_by_torchvision(known, root / item.to)
    folders = [layout.folder for layout in known.layouts]
    if split_file and not any((root / folder / known.json).is_file() for folder in folders):
        used = next((layout.folder for layout in known.layouts if (root / layout.image_path).is_dir()), folders[0])
        _get_file(mirrored(known.json, used, known.json_sha256), root, downloads, progress)


def _get_file(item: File, root: Path, downloads: Path, progress: ProgressCallback | None) -> None:
    target = downloads / item.name if item.unpack else root / item.to / item.name
    fetch(item.url, target, md5=item.md5, sha256=item.sha256, progress=progress)
    if item.unpack:
        unpack_into(target, root / item.to, inner=item.inner, progress=progress)
        target.unlink()


def _get_hub_file(item: HubFile, root: Path, downloads: Path, progress: ProgressCallback | None) -> None:
    import huggingface_hub

    where = f"{item.repo}/{item.file}"
    if progress:
        progress(f"downloading {where}", 0, 1)
    try:
        path = Path(
            huggingface_hub.hf_hub_download(item.repo, item.file, repo_type=item.kind, local_dir=os.fspath(downloads))
        )
    except Exception as error:  # the hub's client raises many kinds, its HTTP library's among them
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise StorageError(f"{where} can't be fetched from the Hugging Face Hub: {reason}") from error
    if item.unpack:
        unpack_into(path, root / item.to, progress=progress)
        path.unlink()
    else:
        (root / item.to).mkdir(parents=True, exist_ok=True)
        os.replace(path, root / item.to / path.name)


def _get_by_torchvision(known: Known, folder: Path) -> None:
    import torchvision

    if known.torch is None:
        raise ConfigError(f"{known.name} isn't read by torchvision.")
    kind, splits = known.torch
    folder.mkdir(parents=True, exist_ok=True)
    for arguments in splits.values():
        try:
            getattr(torchvision.datasets, kind)(folder, download=True, **arguments)
        except Exception as error:  # torchvision's own, urllib's, gdown's
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise StorageError(f"torchvision can't fetch {known.title}: {reason}") from error
