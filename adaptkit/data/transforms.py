"""From an image to a backbone's pixels: the plain test transform, and augmented views for training.

Resizing is Pillow's, as torchvision does it for PIL images, so the pixels are those that the reference implementations
see; a test compares them with torchvision's. Pillow is called directly because importing torchvision takes seconds.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from adaptkit.backbones.base import Preprocessing
from adaptkit.errors import ConfigError

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_ASPECTS = (3 / 4, 4 / 3)
_COLOURS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
_TRIES = 10  # torchvision's: after so many crops that don't fit, the largest central one is taken


def to_pixels(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """The plain test transform.

    Args:
        image: RGB, of any size.
        preprocessing: Of the backbone.

    Returns:
        Normalised pixels, float32 [3, size, size].
    """
    side = preprocessing.image_size
    resampling = _RESAMPLING[preprocessing.interpolation]
    if preprocessing.resize == "squash":
        return _normalised(_resized(image, (side, side), resampling), preprocessing)
    shorter = preprocessing.resize_size or side
    short, long = sorted(image.size)
    longer = int(shorter * long / short)
    size = (shorter, longer) if image.width <= image.height else (longer, shorter)
    return _normalised(_centre(_resized(image, size, resampling), side), preprocessing)


class HowDrawn(Protocol):
    """Settings that say how views are drawn; see `augment`."""

    @property
    def crop_scale(self) -> float: ...
    @property
    def flip(self) -> bool: ...
    @property
    def colour_jitter(self) -> float: ...


def augment_as(image: Image.Image, preprocessing: Preprocessing, numbers: torch.Generator, how: HowDrawn) -> Tensor:
    """`augment` with the settings of `how`."""
    drawn = {"crop_scale": how.crop_scale, "colour_jitter": how.colour_jitter}
    return augment(image, preprocessing, numbers, flip=how.flip, **drawn)


def augment(
    image: Image.Image,
    preprocessing: Preprocessing,
    numbers: torch.Generator,
    *,
    crop_scale: float = 0.08,
    flip: bool = True,
    colour_jitter: float = 0.0,
) -> Tensor:
    """An augmented view: a random crop, resized to the input's size, mirrored in half of the cases, and recoloured.

    Args:
        image: RGB, of any size.
        preprocessing: Of the backbone.
        numbers: Where the draws come from.
        crop_scale: Smallest area share of the crop, in (0, 1].
        flip: Whether to mirror at random.
        colour_jitter: Most that brightness, contrast and saturation change by, as a factor's distance from 1, in
            [0, 1]; 0 draws nothing, so that other draws stay as they are without it.

    Returns:
        Normalised pixels, float32 [3, size, size].

    Raises:
        ConfigError: A `crop_scale` outside (0, 1], or a `colour_jitter` outside [0, 1].

    Source: protocol-training sheet, section 5 (area 0.08–1 for the CoOp line, 0.5–1 for Tip-Adapter and MMRL; aspect
    ratio 3/4–4/3 drawn on a log scale; bicubic); adaptclipzs sheet (colours, after crop and mirror).
    """
    if not 0 < crop_scale <= 1:
        raise ConfigError(f"crop_scale is {crop_scale!r}, but must be above 0 and at most 1.")
    if not 0 <= colour_jitter <= 1:
        raise ConfigError(f"colour_jitter is {colour_jitter!r}, but must be at least 0 and at most 1.")
    left, top, width, height = _crop(image.size, crop_scale, numbers)
    side = preprocessing.image_size
    cut = image.crop((left, top, left + width, top + height))
    view = _resized(cut, (side, side), _RESAMPLING[preprocessing.interpolation])
    if flip and _uniform(numbers, 0.0, 1.0) < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if colour_jitter:
        view = _recoloured(view, colour_jitter, numbers)
    return _normalised(view, preprocessing)


def _recoloured(image: Image.Image, most: float, numbers: torch.Generator) -> Image.Image:
    """Brightness, contrast and saturation by factors in 1 ± most, in a random order, as torchvision's ColorJitter."""
    for place in torch.randperm(len(_COLOURS), generator=numbers).tolist():
        image = _COLOURS[place](image).enhance(_uniform(numbers, 1 - most, 1 + most))
    return image


def _crop(size: tuple[int, int], smallest: float, numbers: torch.Generator) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a random crop inside an image of (width, height)."""
    full_width, full_height = size
    for _ in range(_TRIES):
        area = full_width * full_height * _uniform(numbers, smallest, 1.0)
        aspect = math.exp(_uniform(numbers, math.log(_ASPECTS[0]), math.log(_ASPECTS[1])))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= full_width and 0 < height <= full_height:
            return _below(numbers, full_width - width + 1), _below(numbers, full_height - height + 1), width, height
    aspect = min(max(full_width / full_height, _ASPECTS[0]), _ASPECTS[1])
    width = min(full_width, round(full_height * aspect))
    height = min(full_height, round(full_width / aspect))
    return (full_width - width) // 2, (full_height - height) // 2, width, height


def _uniform(numbers: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=numbers, dtype=torch.float64))


def _below(numbers: torch.Generator, limit: int) -> int:
    return int(torch.randint(limit, (), generator=numbers))


def _resized(image: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    return image if image.size == size else image.resize(size, resampling)


def _centre(image: Image.Image, side: int) -> Image.Image:
    """The central square, with black around where the image is smaller."""
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image if image.size == (side, side) else image.crop((left, top, left + side, top + side))


def _normalised(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)  # [3, size, size]
    mean, std = (torch.tensor(three)[:, None, None] for three in (preprocessing.mean, preprocessing.std))
    return (values - mean) / std
