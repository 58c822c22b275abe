"""From an image file to a model's input, and from its logits to labels, with nothing but NumPy and Pillow.

The functions below are what an exported folder's README shows: its text is this file's, so that what is measured
while exporting is what people copy. They do what `adaptkit.data.images`, `adaptkit.data.transforms` and
`adaptkit.evaluation.calibration` do; tests compare them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageOps


def read_rgb(path: Any) -> Image.Image:
    """An image as 8-bit RGB, upright; transparency is laid on white."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I"):  # 16 bits of grey
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def to_input(image: Image.Image, settings: dict[str, Any]) -> Any:
    """The input [3, size, size] of an RGB image, by the settings in preprocessing.json."""
    side = settings["image_size"]
    how = Image.Resampling[settings["interpolation"].upper()]
    if settings["resize"] == "squash":
        image = image.resize((side, side), how)
    else:  # the shorter side first, then the central square
        short = settings["resize_size"] or side
        long = int(short * max(image.size) / min(image.size))
        image = image.resize((short, long) if image.width <= image.height else (long, short), how)
        left, top = round((image.width - side) / 2), round((image.height - side) / 2)
        image = image.crop((left, top, left + side, top + side))
    mean, std = (np.array(settings[name], dtype=np.float32) for name in ("mean", "std"))
    values = np.asarray(image, dtype=np.float32) / 255
    return ((values - mean) / std).transpose(2, 0, 1)


def probabilities(logits: Any, temperature: float) -> Any:
    """Probabilities [images, classes] of logits [images, classes]."""
    odds = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64) / temperature)
    return odds / odds.sum(axis=1, keepdims=True)


def in_set(odds: Any, scores: Any, coverage: float) -> Any:
    """Which classes are in each image's set, the true one as often as `coverage` says; bool [images, classes].

    `scores` are 1 - the true class's probability of held-out images, in rising order.
    """
    rank = int(np.ceil((len(scores) + 1) * coverage - 1e-9))
    inside = 1 - odds <= (scores[rank - 1] if rank <= len(scores) else 1)  # too few of them: every class
    inside[np.arange(len(odds)), odds.argmax(axis=1)] = True
    return inside
