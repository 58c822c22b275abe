"""Look at every image of a dataset: what is missing, damaged, doubled or too few, and what can be left out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from adaptkit.data.catalogue import CATALOGUE
from adaptkit.data.lists import LISTED, first_few, in_several_splits, many
from adaptkit.data.splits import Dataset, S, Split, TestSplit
from adaptkit.errors import AdaptKitError, DataError, MissingPathError, StorageError
from adaptkit.storage import digest_file
from adaptkit.types import ProgressCallback


@dataclass(frozen=True)
class DatasetReport:
    """What `check_dataset` found.

    Args:
        name: The dataset's.
        counts: Images by split and class name.
        missing: Files that aren't there.
        corrupt: (file, sentence) of images that can't be read.
        duplicates: (name, splits) of images that are in more than one split.
        identical: (names) of files in different splits that are the same byte for byte; found where images are opened.
        fewest: (class name, training images) of the classes that have fewest, at most five.
        images_opened: Whether every image was decoded, or only looked for.
        problems: All of it in sentences; empty means that the dataset can be used.
    """

    name: str
    counts: dict[str, dict[str, int]]
    missing: list[str]
    corrupt: list[tuple[str, str]]
    duplicates: list[tuple[str, tuple[str, ...]]]
    identical: list[tuple[str, ...]]
    fewest: list[tuple[str, int]]
    images_opened: bool
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def check_dataset(dataset: Dataset, *, images: bool = True, progress: ProgressCallback | None = None) -> DatasetReport:
    """Look at every image of a dataset.

    Args:
        dataset: Any.
        images: Decode every image; False only looks whether the files are there.
        progress: Called as (what, images done, images in all).

    Returns:
        Counts and everything that is wrong; nothing is raised for a bad image.
    """
    missing: list[str] = []
    corrupt: list[tuple[str, str]] = []
    contents: dict[str, dict[str, str]] = {}  # digest of a file to its places by split
    total, done = sum(map(len, dataset.splits.values())), 0
    for kind, split in dataset.splits.items():
        for index in range(len(split)):
            reason = _unreadable(split, index, images)
            if isinstance(reason, MissingPathError):
                missing.append(_place(split, index))
            elif reason is not None:
                corrupt.append((_place(split, index), str(reason)))
            elif images and (path := split.path(index)) is not None:
                contents.setdefault(digest_file(path), {}).setdefault(kind, split.ids[index])
            done += 1
            if progress:
                progress(f"checking {dataset.name}", done, total)
    counts = {
        kind: dict(zip(dataset.class_names, split.counts(), strict=True)) for kind, split in dataset.splits.items()
    }
    duplicates = list(in_several_splits({kind: split.ids for kind, split in dataset.splits.items()}).items())
    fewest = sorted(counts["train"].items(), key=lambda pair: pair[1])[:LISTED]
    identical = [tuple(places.values()) for places in contents.values() if len(set(places.values())) > 1]
    problems = _report_problems(dataset, missing, corrupt, duplicates, counts)
    return DatasetReport(dataset.name, counts, missing, corrupt, duplicates, identical, fewest, images, problems)


def differences_from_table(dataset: Dataset) -> list[str]:
    """What of a known dataset's classes and sizes isn't as the catalogue has it, in sentences; [] for any other.

    In an own split only the number of all images counts.
    """
    known = CATALOGUE.get(dataset.name)
    if known is None or "few_shot_list" in dataset.source:
        return []
    differences = []
    if len(dataset.class_names) != known.classes:
        differences.append(f"{dataset.name} has {known.classes:,} classes, and {len(dataset.class_names):,} are here")
    wanted = dict(zip(("train", "val", "test"), known.sizes, strict=True))
    found = {kind: len(dataset.splits.get(kind, ())) for kind in wanted}
    if dataset.source.get("split") == "own":
        wanted, found = {"image": sum(wanted.values())}, {"image": sum(found.values())}
    for kind, count in wanted.items():
        if found[kind] != count:
            differences.append(f"{dataset.name} has {count:,} {kind} images, and {found[kind]:,} are here")
    return differences


def _report_problems(
    dataset: Dataset,
    missing: Sequence[str],
    corrupt: Sequence[tuple[str, str]],
    duplicates: Sequence[tuple[str, tuple[str, ...]]],
    counts: Mapping[str, Mapping[str, int]],
) -> list[str]:
    problems = []
    if missing:
        problems.append(f"{many(len(missing), 'image file')} missing; the first: {missing[0]}")
    if corrupt:
        problems.append(f"{many(len(corrupt), 'image')} can't be read; the first: {corrupt[0][1]}")
    if duplicates:
        name, splits = duplicates[0]
        problems.append(
            f"{many(len(duplicates), 'image')} in more than one split; the first: {name} ({' and '.join(splits)})"
        )
    for kind in ("train", "test") if len(dataset.train) else ("test",):
        without = [name for name, count in counts.get(kind, {}).items() if not count]
        if without:
            problems.append(f"{many(len(without), 'class')} without {kind} images: {first_few(without)}")
    if not len(dataset.train) and (dataset.name not in CATALOGUE or CATALOGUE[dataset.name].sizes[0]):
        problems.append(f"{dataset.name} has no training images")
    if "test" not in counts:
        problems.append(f"{dataset.name} has no test images")
    return problems


def drop_unreadable(split: S, *, progress: ProgressCallback | None = None) -> tuple[S, list[tuple[str, str]]]:
    """A split without the images that can't be read, and what was left out and why. Only ever on request.

    Args:
        split: Training or validation images. Test images stay: leaving some out would change the score.
        progress: Called as (what, images done, images in all).

    Returns:
        The readable part, and (path, reason) of each image left out.

    Raises:
        DataError: A test split.
    """
    if isinstance(split, TestSplit):
        raise DataError("Unreadable test images aren't skipped, because that would change the score: repair the files.")
    kept: list[int] = []
    dropped: list[tuple[str, str]] = []
    for index in range(len(split)):
        reason = _unreadable(split, index, True)
        if reason is None:
            kept.append(index)
        else:
            dropped.append((_place(split, index), str(reason)))
        if progress:
            progress(f"reading {split.kind} images", index + 1, len(split))
    return split.subset(kept), dropped


def _unreadable(split: Split, index: int, decode: bool) -> Exception | None:
    """Why an image can't be read, or None."""
    if not split.source.pictures:
        return None  # features, checked when their file was read
    try:
        if decode:
            split.image(index)
        else:
            path = split.path(index)
            if path is not None and not path.is_file():
                return MissingPathError(f"There is no image file {path}.")
    except (AdaptKitError, OSError) as error:  # the second from torch datasets that open files themselves
        return error
    return None


def _place(split: Split, index: int) -> str:
    """The image's path, its name where it has none or the path leads out of its folder."""
    try:
        path = split.path(index)
    except StorageError:
        path = None
    return split.ids[index] if path is None else os.fspath(path)
