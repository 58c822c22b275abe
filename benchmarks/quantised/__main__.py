"""`python -m benchmarks.quantised [BACKBONE]`: MB that a backbone's weights take in fp32, int8 and nf4.

Beside them stands the least cosine between a feature of random pixels and that of the fp32 tower. ViT-B-16/random has
random weights: its sizes are those of any ViT-B/16, its cosines aren't those of trained weights.
"""

from __future__ import annotations

import click
import torch
import torch.nn.functional as F

from adaptkit.backbones.base import Backbone
from adaptkit.backbones.load import load_backbone
from adaptkit.backbones.quantised import KINDS, weight_bytes
from adaptkit.commands import _console as console

IMAGES = 4


def megabytes(model: Backbone) -> list[float]:
    """MB of the image tower, of the text tower, and of the blocks of both, which alone are quantised."""
    towers = [tower for tower in (model.image_tower, model.text_tower) if tower is not None]
    whole = [weight_bytes(tower) for tower in towers]
    blocks = sum(weight_bytes(block) for tower in towers for block in tower.blocks)
    return [size / 1e6 for size in (*whole, blocks)]


@torch.inference_mode()
def drawn_features(model: Backbone) -> torch.Tensor:
    """Unit features [images, dim] of the same random pixels for every model."""
    side = model.spec.preprocessing.image_size
    pixels = torch.randn(IMAGES, 3, side, side, generator=torch.Generator().manual_seed(0))
    return F.normalize(model.encode_image(pixels).float(), dim=-1)


@click.command()
@click.argument("backbone", default="ViT-B-16/random")
def main(backbone: str) -> None:
    """Print one row per kind of weights."""
    full = load_backbone(backbone)
    models = {"fp32": full, **{kind: load_backbone(f"{backbone}@{kind}") for kind in KINDS}}
    reference, rows = drawn_features(full), []
    for kind, model in models.items():
        cosine = float((drawn_features(model) * reference).sum(dim=-1).min())
        rows.append([kind, *(f"{size:.1f}" for size in megabytes(model)), f"{cosine:.4f}"])
    columns = ["weights", "image tower", "text tower", "blocks of both", "least cosine"]
    console.print_table(f"{backbone}, MB", columns, rows, left=["weights"])


if __name__ == "__main__":
    main()
