"""How images come into a project: checked, copied under the name of their content, with a small picture beside them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from adaptkit.data.images import IMAGE_SUFFIXES, load_rgb
from adaptkit.errors import DataError, MissingPathError
from adaptkit.storage import atomic_path
from adaptkit.studio.state import Picture

MAX_BYTES = 64 * 2**20
"""Of one image file."""

MOST_FOUND = 20_000
"""Images taken from one folder."""

THUMBNAIL = 256
"""Longer side of a small picture, in pixels."""


# by what a file is, not by what it was called: browsers go by the name
_SUFFIXES = {
    "JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "DIB": ".bmp", "GIF": ".gif",
    "TIFF": ".tif", "PPM": ".ppm", "JPEG2000": ".jp2",
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """An image file that was found.

    Args:
        path: Where it lies.
        folder: Name of the class folder it lies in; "" for none.
    """

    path: Path
    folder: str = ""


def image_id(content: bytes) -> str:
    """What an image is called in a project: the first half of its content's sha256."""
    return hashlib.sha256(content).hexdigest()[:32]


def take_in(project: Path, content: bytes, name: str, label: str | None = None) -> tuple[str, Picture]:
    """Copy an image into a project's folder; returns its id and what is known of it. The project isn't told yet.

    Args:
        project: The project's folder.
        content: The file's bytes.
        name: What it is called where it comes from.
        label: Id of its class.

    Raises:
        DataError: It isn't an image, is damaged or too large; the message has its name.
        StorageError: It can't be written.
    """
    name = Path(name.replace("\\", "/")).name[:200] or "image"
    if len(content) > MAX_BYTES:
        raise DataError(f"{name} has {len(content) / 2**20:.0f} MB; at most {MAX_BYTES / 2**20:.0f} MB are accepted.")
    key, picture = image_id(content), load_rgb(content, name=name)
    with Image.open(BytesIO(content)) as opened:  # only its head is read
        file = f"{key}{_SUFFIXES.get(opened.format or '', '.img')}"
    write_thumbnail(picture, thumbnail_path(project, key))
    target = project / "images" / file
    if not target.exists():
        with atomic_path(target) as temporary:
            temporary.write_bytes(content)
    return key, Picture(file, name, 0, label)


def thumbnail_path(project: Path, key: str) -> Path:
    """Where the small picture of an image lies."""
    return project / "thumbnails" / f"{key}.jpg"


def write_thumbnail(picture: Image.Image, path: Path) -> None:
    """Write a small picture, if there is none."""
    if path.exists():
        return
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    with atomic_path(path) as temporary:
        small.save(temporary, "JPEG", quality=85)


def read_file(path: Path) -> bytes:
    """An image file's bytes.

    Raises:
        DataError: It is too large, can't be read, or is a pipe or device, which may have no end.
    """
    try:
        if not path.is_file():
            raise DataError(f"{path.name} is no file (any more).")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}.") from error
    if len(content) > MAX_BYTES:
        raise DataError(f"{path.name} is larger than {MAX_BYTES / 2**20:.0f} MB.")
    return content


def find_images(folder: str, leave_out: Path | None = None) -> list[Found]:
    """The images below a folder, sorted; those below a folder in it are of the class of that folder's name.

    Hidden files and folders are left out, and links to folders aren't followed.

    Args:
        folder: As a person writes it.
        leave_out: A folder that is no source: the project's own.

    Raises:
        MissingPathError: No such folder.
        DataError: It holds no images, or too many; no path was given; or it is the project's own.
    """
    text = folder.strip()
    if not text or "\0" in text:
        raise DataError("Name a folder with images, such as ~/Pictures/birds.")
    root = Path(os.path.abspath(os.path.expanduser(text)))
    if not root.is_dir():
        raise MissingPathError(f"There is no folder {root}: check its spelling.")
    own = None if leave_out is None else Path(os.path.realpath(leave_out))
    if own is not None and Path(os.path.realpath(root)).is_relative_to(own):
        raise DataError(f"{root} belongs to this project, whose images are here already: name another folder.")
    found = list(_below(root, own))
    if not found:
        raise DataError(f"{root} holds no images ({', '.join(IMAGE_SUFFIXES[:5])}, …): name another folder.")
    if len(found) > MOST_FOUND:
        raise DataError(f"{root} holds more than {MOST_FOUND:,} images: name a smaller folder.")
    return found


def _below(root: Path, own: Path | None) -> Iterable[Found]:
    count = 0
    for place, folders, files in os.walk(root):
        if own is not None and Path(os.path.realpath(place)) == own:
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        inner = Path(place).relative_to(root).parts
        for name in sorted(files):
            path = Path(place) / name
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".") and path.is_file():
                count += 1
                yield Found(path, inner[0] if inner else "")
        if count > MOST_FOUND:
            return
