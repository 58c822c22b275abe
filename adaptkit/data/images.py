"""One way to open an image: whatever its kind, 8-bit RGB the right way up, or one clear error.

Phones rotate by a tag, web graphics carry alpha and palettes, scanners and microscopes write CMYK and 16 bits. Left to
chance, each of them silently changes what a model sees.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from adaptkit.errors import DataError, MissingPathError

MAX_PIXELS = 100_000_000
"""Largest image decoded by default, in pixels: 300 MB as RGB. A file of a few kB can claim far more (a "bomb")."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jfif")

# Without this list Pillow would also try formats that run outside programs (EPS) or fetch further files, and icons,
# which it decodes while it opens them, before their size is known.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000")
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's decoders raise on damaged files; SyntaxError is theirs for broken PNG chunks.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
)


def load_rgb(source: str | Path | bytes | IO[bytes], *, max_pixels: int = MAX_PIXELS, name: str = "") -> Image.Image:
    """Open an image as 8-bit RGB, upright.

    Transparency is laid on white; 16-bit greyscale is scaled by 1/257 (not clipped at 255); CMYK and palettes are
    converted; the EXIF orientation is applied; of animations and many-page files the first picture is taken.

    Args:
        source: A path, the file's bytes, or an open binary file.
        max_pixels: Larger images are refused before they are decoded.
        name: What to call the image in messages; the path by default.

    Raises:
        MissingPathError: No such file.
        DataError: Not an image, a truncated or damaged one, or one with more than `max_pixels`. The message has the
            path.

    Example:
        >>> load_rgb("tests/images/three.png").mode  # doctest: +SKIP
        'RGB'
    """
    if isinstance(source, (str, Path)):
        name = name or os.fspath(source)
        if not os.path.isfile(source):
            raise MissingPathError(f"There is no image file {name}.")
    elif isinstance(source, bytes):
        source = BytesIO(source)
    name = name or str(getattr(source, "name", "the image"))
    try:
        with Image.open(source, formats=_FORMATS) as opened:
            return _upright_rgb(opened, max_pixels, name)
    except UnidentifiedImageError as error:
        raise DataError(f"{name} isn't an image of a known kind (JPEG, PNG, WebP, BMP, GIF, TIFF, PPM).") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} is too large: more than {max_pixels:,} pixels aren't decoded.") from error
    except MemoryError as error:
        raise DataError(f"{name} doesn't fit into memory.") from error
    except DataError:
        raise
    except PermissionError as error:
        raise DataError(f"{name} can't be read: permission is denied.") from error
    except _DECODER_ERRORS as error:
        raise DataError(f"{name} is damaged or cut off ({error}).") from error


def rgb_from_array(array: Any, name: str = "the image") -> Image.Image:
    """An RGB image of an array or tensor: uint8 [h, w], [h, w, 1], [h, w, 3] or [h, w, 4], or channels first; or
    floats in [0, 1] of the same shapes.

    Raises:
        DataError: Another shape, dtype or range (normalised values, for one).
    """
    values = np.asarray(array)
    if values.ndim == 3 and values.shape[-1] not in (1, 3, 4) and values.shape[0] in (1, 3, 4):
        values = values.transpose(1, 2, 0)  # [h, w, channels]
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]  # [h, w]
    if values.ndim not in (2, 3) or 0 in values.shape or (values.ndim == 3 and values.shape[-1] not in (3, 4)):
        raise DataError(f"{name} has shape {tuple(values.shape)}; [h, w], [h, w, 3] or [3, h, w] is accepted.")
    if values.dtype.kind == "f":
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise DataError(f"{name} holds floats outside [0, 1]: give images that aren't normalised yet.")
        values = np.round(values * 255).astype(np.uint8)
    if values.dtype != np.uint8:
        raise DataError(f"{name} has dtype {values.dtype}; uint8, or floats in [0, 1], are accepted.")
    return _flatten(Image.fromarray(np.ascontiguousarray(values)), name)


def _upright_rgb(opened: Image.Image, max_pixels: int, name: str) -> Image.Image:
    if opened.width * opened.height > max_pixels:
        raise DataError(
            f"{name} is too large: {opened.width} × {opened.height} pixels; at most {max_pixels:,} are decoded."
        )
    opened.load()
    turn = _TURNS.get(_orientation(opened))
    image = _flatten(opened, name)
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or its block is damaged: the pixels may still be good."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except _DECODER_ERRORS:
        return 1


def _flatten(image: Image.Image, name: str) -> Image.Image:
    """8-bit RGB without transparency; a new image, independent of the opened file."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _eight_bits(image, name)
    if image.has_transparency_data:  # an alpha channel, a transparent palette entry or a transparent colour
        clear = image.convert("RGBA")
        white = Image.new("RGBA", clear.size, "white")
        return Image.alpha_composite(white, clear).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise DataError(
            f"{name} holds {image.mode!r} values (floats, or more than 16 bits), which have no fixed range: save it"
            " with 8 or 16 bits per channel."
        )
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))  # 65535 / 257 = 255, rounded


def stack_rgb(images: Sequence[Image.Image]) -> np.ndarray:
    """Equally sized RGB images as uint8 [n, h, w, 3]."""
    return np.stack([np.asarray(image) for image in images])
