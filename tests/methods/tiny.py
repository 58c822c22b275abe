"""A tiny random CLIP with CLIP's own tokenizer, and a task on its features or pixels: no download, milliseconds."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from adaptkit.backbones.base import Backbone, BackboneSpec, Preprocessing, Tokens
from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.backbones.tokenizing import ClipTokenizer
from adaptkit.backbones.tower import BlockShape, ImageShape, ImageTower, TextShape, TextTower
from adaptkit.training.loop import fit_method
from adaptkit.types import FitTask, TensorInputs

NAMES = ("tabby cat", "golden_retriever", "river", "7-series sedan")
NOVEL = ("snow leopard", "acorn", "dial telephone")
DESCRIPTIONS = {
    name: (f"{name.replace('_', ' ')}, which has {thing}.", "a long tail", "used for nothing")[: 2 + place % 2]
    for place, (name, thing) in enumerate(
        zip((*NAMES, *NOVEL), ("stripes", "fur", "banks", "doors", "spots", "a cap", "a cord"), strict=True)
    )
}
"""Two or three sentences for each class, the novel ones too."""

DIM, SIZE, CONTEXT = 16, 16, 77


def _fill(module: torch.nn.Module, seed: int) -> None:
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            scale = 0.02 if "embedding" in name else 0.1 if value.dim() < 2 else value[0].numel() ** -0.5
            value.copy_(
                torch.randn(value.shape, generator=numbers) * scale + (".ln_" in f".{name}" and value.dim() < 2)
            )


def image_tower(width: int = 24, layers: int = 3) -> ImageTower:
    tower = ImageTower(ImageShape(BlockShape(width, 2, layers, 2 * width, "quick_gelu"), SIZE, 8, DIM))
    _fill(tower, 1)
    return tower


def text_tower(width: int = 16, layers: int = 3) -> TextTower:
    tower = TextTower(TextShape(BlockShape(width, 2, layers, 2 * width, "quick_gelu"), 49408, CONTEXT, DIM))
    _fill(tower, 2)
    return tower


def tiny_clip(**sizes: int) -> DualEncoder:
    """Open towers of width 24 and 16, 3 layers each, features of 16."""
    spec = BackboneSpec("tiny", "open_clip", "0" * 64, DIM, Preprocessing(SIZE), CONTEXT)
    return DualEncoder(spec, image_tower(**sizes), text_tower(**sizes), ClipTokenizer(), logit_scale=20.0)


def image_only() -> DualEncoder:
    return DualEncoder(BackboneSpec("tiny-vision", "timm", "1" * 64, DIM, Preprocessing(SIZE)), image_tower())


def closed_text() -> DualEncoder:
    """A backbone whose text encoder works but can't be opened."""
    opened = tiny_clip()

    class Closed(torch.nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return torch.randn(len(ids), DIM, generator=torch.Generator().manual_seed(int(ids.sum()) % 1000))

    spec = BackboneSpec("closed", "x", "2" * 64, DIM, Preprocessing(SIZE), CONTEXT, opaque_text="it is a test's")
    return DualEncoder(spec, opened.image, Closed(), ClipTokenizer(), logit_scale=20.0)


class Letters:
    """SigLIP-like: no start token, one token per word or full stop, padded with 1, pooled at the last position."""

    facts: ClassVar[dict] = {}

    def word_pieces(self, text):
        return [2 + sum(map(ord, word)) % 90 for word in text.replace(".", " .").split()]

    def __call__(self, texts):
        ids = torch.ones(len(texts), 12, dtype=torch.int64)
        for row, text in enumerate(texts):
            pieces = self.word_pieces(text)
            ids[row, : len(pieces)] = torch.tensor(pieces)
        return Tokens(ids, torch.full((len(texts),), 11))


def drawn_images(labels: Tensor, views: int, seed: int, side: int = SIZE) -> Tensor:
    """Pixels [views, n, 3, size, size] in which a class shows as a pattern under noise."""
    numbers = torch.Generator().manual_seed(seed)
    patterns = torch.randn(int(labels.max()) + 1, 3, side, side, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(views, len(labels), 3, side, side, generator=numbers)
    return patterns[labels] + 0.5 * noise


def make_task(
    backbone: Backbone, reads: str, *, shots: int = 4, views: int = 1, val: bool = True, seed: int = 0
) -> FitTask:
    labels, side = torch.arange(len(NAMES)).repeat_interleave(shots), backbone.spec.preprocessing.image_size

    def inputs(count: int, draw: int) -> TensorInputs:
        pixels = drawn_images(labels, count, draw, side)
        if reads == "images":
            return TensorInputs(pixels, labels)
        with torch.no_grad():
            features = backbone.encode_image(pixels.flatten(0, 1)).unflatten(0, (count, len(labels)))
        return TensorInputs(features, labels)

    return FitTask(NAMES, inputs(views, 10), inputs(1, 11) if val else None, seed)


def query(backbone: Backbone, reads: str, count: int = 9) -> Tensor:
    pixels = drawn_images(torch.arange(count) % len(NAMES), 1, 12, backbone.spec.preprocessing.image_size)[0]
    with torch.no_grad():
        return pixels if reads == "images" else backbone.encode_image(pixels)


def trained(method, epochs=3, lr=1e-2, **task):
    """Train a method on images, one shot of each class unless `task` says otherwise; the report."""
    settings = replace(method.default_training, epochs=epochs, lr=lr)
    return fit_method(method, make_task(method.backbone, "images", **{"shots": 1, **task}), settings)


def ask(method, pixels):
    """Logits [images, classes]."""
    with torch.no_grad():
        return method(pixels)
