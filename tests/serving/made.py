"""Small adapters on mini, pictures of their classes, and requests."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from adaptkit import FewShotClassifier

COLOURS = {"beech": (40, 170, 60), "oak": (200, 60, 40), "pine": (30, 60, 200)}


def picture(label: str, seed: int = 0, side: int = 40) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-40, 40, (side, side, 3))
    return Image.fromarray(np.clip(np.array(COLOURS[label]) + noise, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    out = BytesIO()
    image.save(out, kind)
    return out.getvalue()


def text(image: bytes) -> str:
    return base64.b64encode(image).decode()


def files(*images: bytes) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("images", (f"{place}.png", image, "image/png")) for place, image in enumerate(images)]


def save_adapters(folder: Path) -> dict[str, Path]:
    """ "probe" over names, "cache" over numbers, and "sure", which was calibrated."""
    labels = [label for label in COLOURS for _ in range(4)]
    images = [picture(label, seed) for seed, label in enumerate(labels)]
    probe = FewShotClassifier("linear-probe").fit(images, labels)
    probe.save(folder / "probe")
    numbers = [list(COLOURS).index(label) for label in labels]
    cache = FewShotClassifier("tip-adapter", training={"views": 0}, class_names=dict(enumerate(COLOURS)))
    cache.fit(images, numbers).save(folder / "cache")
    held = [label for label in COLOURS for _ in range(12)]
    probe.calibrate([picture(label, 100 + seed) for seed, label in enumerate(held)], held).save(folder / "sure")
    return {name: folder / name for name in ("cache", "probe", "sure")}
