"""Folders of images, listed in the same order on every machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from adaptkit.data.images import IMAGE_SUFFIXES
from adaptkit.data.lists import many
from adaptkit.errors import DataError


def listing(path: Path) -> tuple[list[str], list[str]]:
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


def class_folders(path: Path, *, needs_images: bool) -> tuple[dict[str, list[str]], list[str]]:
    """Image file names by class folder, both sorted, and notes on what was left out.

    Raises:
        DataError: No class folders, or (where `needs_images`) one without images.
    """
    folders, files = listing(path)
    if not folders:
        loose = sum(map(is_image, files))
        held = f"it holds {many(loose, 'image')} in none" if loose else "it is empty" if not files else "only files"
        raise DataError(
            f"{path} has no class folders ({held}): put the images of each class into a folder of its name."
        )
    by_class, unread, nested = {}, 0, 0
    for folder in folders:
        inner, names = listing(path / folder)
        by_class[folder] = [name for name in names if is_image(name)]
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


def is_image(name: str) -> bool:
    """Whether a file's name has the suffix of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)
