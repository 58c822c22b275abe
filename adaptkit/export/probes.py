"""Images to compare an exported model with its adapter on: the user's own, or drawn ones in awkward files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adaptkit.data.images import IMAGE_SUFFIXES, load_rgb
from adaptkit.data.synthetic import load_embedded
from adaptkit.errors import DataError, MissingPathError

_SIZES = ((224, 224), (640, 480), (333, 500), (900, 40), (30, 700), (7, 5), (1, 1), (256, 256))
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Probes:
    """Image files, with what is known about them.

    Args:
        files: Paths.
        what: What they are, for the report.
        labels: Class index of each, or -1 where it isn't known.
    """

    files: tuple[Path, ...]
    what: str
    labels: tuple[int, ...]


def drawn_probes(folder: Path) -> Probes:
    """Draw 32 pictures in sizes from 1×1 to 900×40 and write them as the kinds of files that readers stumble over."""
    pictures = load_embedded("shapes").images["test"]
    kinds = (_png, _jpeg, _grey, _palette, _clear, _turned, _sixteen, _cmyk)
    files = []
    for place in range(32):
        picture = Image.fromarray(pictures[place * 29 % len(pictures)])
        sized = picture.resize(_SIZES[place // 4], Image.Resampling.BICUBIC)
        files.append(kinds[place % len(kinds)](sized, folder / f"{place:02d}"))
    return Probes(tuple(files), "drawn pictures of many sizes and file kinds", (-1,) * len(files))


def _saved(image: Image.Image, path: Path, suffix: str, **options: Any) -> Path:
    path = path.with_suffix(suffix)
    image.save(path, **options)
    return path


def _png(image: Image.Image, path: Path) -> Path:
    return _saved(image, path, ".png")


def _jpeg(image: Image.Image, path: Path) -> Path:
    return _saved(image, path, ".jpg", quality=85)


def _grey(image: Image.Image, path: Path) -> Path:
    return _saved(image.convert("L"), path, ".png")


def _palette(image: Image.Image, path: Path) -> Path:
    """A palette with a colour that is see-through."""
    return _saved(image.convert("P", palette=Image.Palette.ADAPTIVE, colors=16), path, ".png", transparency=0)


def _clear(image: Image.Image, path: Path) -> Path:
    clear = image.convert("RGBA")
    clear.putalpha(image.convert("L"))
    return _saved(clear, path, ".png")


def _turned(image: Image.Image, path: Path) -> Path:
    """Lying on its side, with the tag that says so."""
    exif = Image.Exif()
    exif[_ORIENTATION] = 6
    return _saved(image.transpose(Image.Transpose.ROTATE_90), path, ".jpg", exif=exif, quality=95)


def _sixteen(image: Image.Image, path: Path) -> Path:
    return _saved(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), path, ".png")


def _cmyk(image: Image.Image, path: Path) -> Path:
    return _saved(image.convert("CMYK"), path, ".jpg", quality=95)


def own_probes(source: Path, *names: Sequence[Any]) -> Probes:
    """The images below a folder; those in a folder called like a class are labelled by it.

    Args:
        source: A folder of images, or of class folders.
        names: What folders of a class may be called, in label order: labels, class names.

    Raises:
        MissingPathError: No such folder.
        DataError: No images in it, or one that can't be read (the message names it).
    """
    if not source.is_dir():
        raise MissingPathError(f"There is no folder {source}: give a folder of images, or of class folders.")
    files = sorted(p for p in source.rglob("[!.]*") if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"The folder {source} holds no images: give a folder with some.")
    for path in files:
        load_rgb(path)
    place = {str(name): index for several in reversed(names) for index, name in enumerate(several)}  # the first wins
    labels = tuple(place.get(path.relative_to(source).parts[0], -1) for path in files)
    return Probes(tuple(files), f"the images in {source.name}", labels)
