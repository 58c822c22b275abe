"""`python -m benchmarks.examples`: in-context examples that several questions share, in one pass and in one for each.

Both ways must give the same logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from adaptkit.backbones.load import load_backbone
from adaptkit.backbones.mllm import model
from adaptkit.methods.mllm.mllm_icl import MllmIcl, MllmIclConfig
from adaptkit.storage import write_json
from adaptkit.types import FitTask, TensorInputs
from benchmarks.rollouts.__main__ import seconds
from benchmarks.speed.measure import machine_facts

RESULT = Path(__file__).parent / "result.json"
NAMES = tuple(f"class {number}" for number in range(10))
TOLERANCE = 1e-5
NEVER = 2.0  # no prompt shares more than all of itself


def measure(method: MllmIcl, pixels: Tensor, repeats: int) -> dict[str, Any]:
    """Seconds of both ways, their ratio, and the largest difference of logits."""
    usual = model.SHARED_SHARE

    def asked(share: float) -> Tensor:
        model.SHARED_SHARE = share
        try:
            with torch.no_grad():
                return method(pixels)
        finally:
            model.SHARED_SHARE = usual

    ways = {"shared": lambda: asked(usual), "plain": lambda: asked(NEVER)}
    difference = float((ways["shared"]() - ways["plain"]()).abs().max())
    taken = seconds(ways, repeats, method.backbone.device)
    return {**taken, "ratio": taken["plain"] / taken["shared"], "difference": difference}


@click.command()
@click.option("--backbone", default="mini-mllm", show_default=True)
@click.option("--images", default=64, show_default=True)
@click.option("--examples", default="4,8,16", show_default=True, help="How many are shown per question.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULT, show_default=True)
def main(backbone: str, images: int, examples: str, repeats: int, out: Path) -> None:
    """Exits 1 where the two ways don't give the same logits."""
    loaded = load_backbone(backbone)
    side, numbers = loaded.spec.preprocessing.image_size, torch.Generator().manual_seed(0)
    labels = torch.arange(2 * len(NAMES)) % len(NAMES)
    shots = TensorInputs(torch.rand(1, len(labels), 3, side, side, generator=numbers), labels)
    pixels, found = torch.rand(images, 3, side, side, generator=numbers), {}
    for count in map(int, examples.split(",")):
        config = MllmIclConfig(selection="balanced", examples=count)
        method = MllmIcl(loaded, NAMES, config=config)
        method.fit(FitTask(NAMES, shots))
        own = found[str(count)] = measure(method, pixels, repeats)
        click.echo(
            f"{count} examples: {own['shared']:.3f} s shared, {own['plain']:.3f} s plain, ratio {own['ratio']:.2f},"
            f" logits apart {own['difference']:.1e}"
        )
    write_json(
        out, {"schema": 1, "backbone": backbone, "images": images, "machine": machine_facts(), "examples": found}
    )
    if max(own["difference"] for own in found.values()) > TOLERANCE:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
