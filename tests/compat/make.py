"""`python -m tests.compat.make` adds what the collection lacks for today's schema; what is there stays as it is.

The collection keeps adapters as released versions wrote them, so its folders are only ever added to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adaptkit import FewShotClassifier, load_backbone
from adaptkit.data.images import stack_rgb
from adaptkit.data.transforms import to_pixels
from adaptkit.methods import methods
from adaptkit.methods.adapter import SCHEMA_VERSION
from adaptkit.methods.base import GradientMethod
from adaptkit.storage import write_safetensors
from tests.quick import sentences

HERE = Path(__file__).parent
LOGITS = "logits.safetensors"
NAMES = ("cross", "ring", "stripes")
METHODS = (
    "zero-shot",
    "linear-probe",
    "clip-adapter",
    "taskres",
    "cross-modal",
    "tip-adapter",
    "tip-adapter-f",
    "ape",
    "gda",
    "coop",
    "cocoop",
    "maple",
    "mmrl",
    "vpt",
    "clip-lora",
    "cupl",
    "vdt-adapter",
    "waffleclip",
    "em-dirichlet",
    "transclip",
)

SETTINGS: dict[str, dict[str, Any]] = {"maple": {"depth": 3}, "vpt": {"depth": 3}, "mmrl": {"width": 32}}


def picture(label: int, seed: int) -> Image.Image:
    """A drawn shape in noise; NumPy's generators draw the same for ever."""
    values = np.random.default_rng(seed).integers(0, 90, (32, 32, 3))
    row, column = np.mgrid[:32, :32]
    shapes = (
        (abs(row - 16) < 4) | (abs(column - 16) < 4),
        abs(np.hypot(row - 16, column - 16) - 10) < 3,
        row % 8 < 3,
    )
    values[shapes[label]] += 150
    return Image.fromarray(values.astype(np.uint8))


def questions() -> Any:
    """Pixels of six images, float32 [6, 3, 32, 32]."""
    import torch

    preprocessing = load_backbone("mini").spec.preprocessing
    pictures = [picture(label, 500 + label + 3 * half) for half in (0, 1) for label in range(3)]
    assert stack_rgb(pictures).shape == (6, 32, 32, 3)
    return torch.stack([to_pixels(one, preprocessing) for one in pictures])


def make(name: str, folder: Path) -> None:
    """Fit, save, and keep the logits beside."""
    import torch

    kind = methods.get(name)
    training: dict[str, Any] = {} if kind.default_training is None else {"views": 0}
    if issubclass(kind, GradientMethod):
        training["epochs"] = 3
    classifier = FewShotClassifier(
        name,
        training=training or None,
        settings=SETTINGS.get(name),
        descriptions=None if kind.reads_descriptions == "never" else sentences(NAMES),
    )
    labels = [label for label in range(3) for _ in range(4)]
    images = [picture(label, place) for place, label in enumerate(labels)]
    classifier.fit(images, [NAMES[label] for label in labels]).save(folder)
    with torch.no_grad():
        write_safetensors(folder / LOGITS, {"logits": classifier.to_module()(questions()).contiguous()})


if __name__ == "__main__":
    for method in METHODS:
        place = HERE / f"schema-{SCHEMA_VERSION}" / method
        if not place.exists():
            make(method, place)
            print(method, sum(path.stat().st_size for path in place.rglob("*") if path.is_file()))
