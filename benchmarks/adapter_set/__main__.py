"""`python -m benchmarks.adapter_set`: 100 feature-level adapters against one, on the same batch, in turns."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F

from adaptkit.backbones.base import Backbone
from adaptkit.backbones.load import load_backbone
from adaptkit.export.adapter_set import AdapterSet
from adaptkit.methods import methods
from adaptkit.methods.adapter import AdaptedModel
from adaptkit.storage import write_json
from benchmarks.speed.measure import machine_facts

RESULT = Path(__file__).parent / "result.json"
KINDS = ("taskres", "linear-probe", "clip-adapter", "tip-adapter")
SHOTS = 16
LIMIT = 1.1


def make_adapter(backbone: Backbone, kind: str, names: tuple[str, ...], seed: int) -> AdaptedModel:
    """An adapter with random learned numbers: what it answers doesn't matter here, what it costs does."""
    method: Any = methods.get(kind)(backbone, names, seed=seed)
    numbers = torch.Generator().manual_seed(seed)
    dim = backbone.spec.embed_dim
    if kind == "tip-adapter":
        keys = F.normalize(torch.randn(SHOTS * len(names), dim, generator=numbers), dim=-1)
        method.set_keys(keys, torch.arange(len(names)).repeat_interleave(SHOTS))
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.copy_(0.01 * torch.randn(parameter.shape, generator=numbers))
    return AdaptedModel(method)


def fill(backbone: Backbone, count: int, classes: int) -> AdapterSet:
    """A set of `count` adapters of all kinds in turn, with `classes` classes each."""
    names = tuple(f"class {index}" for index in range(classes))
    adapters = AdapterSet(backbone)
    for index in range(count):
        adapters.add(f"adapter {index}", make_adapter(backbone, KINDS[index % len(KINDS)], names, index))
    return adapters


def measure(adapters: AdapterSet, pixels: torch.Tensor, repeats: int) -> dict[str, Any]:
    """Seconds of one adapter and of all, in turns, and the ratio of each pair."""
    one = list(adapters)[:1]
    adapters.ask(pixels)  # warm up
    single, every = [], []
    for _ in range(repeats):
        for names, kept in ((one, single), (None, every)):
            started = time.perf_counter()
            adapters.ask(pixels, names)
            kept.append(time.perf_counter() - started)
    ratios = [b / a for a, b in zip(single, every, strict=True)]
    return {
        "seconds_one": statistics.median(single),
        "seconds_all": statistics.median(every),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


@click.command()
@click.option("--backbone", default="ViT-B-16/random", show_default=True)
@click.option("--adapters", "count", default=100, show_default=True)
@click.option("--classes", default=100, show_default=True)
@click.option("--batch", default=8, show_default=True, help="Images asked about at once.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULT, show_default=True)
def main(backbone: str, count: int, classes: int, batch: int, repeats: int, out: Path) -> None:
    """Exits 1 where all adapters together cost more than 1.1 times one."""
    loaded = load_backbone(backbone)
    side = loaded.spec.preprocessing.image_size
    adapters = fill(loaded, count, classes)
    pixels = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    found = measure(adapters, pixels, repeats)
    sizes = {"backbone": backbone, "adapters": count, "kinds": KINDS, "classes": classes, "batch": batch}
    write_json(out, {"schema": 1, **sizes, "machine": machine_facts(), **found})
    click.echo(
        f"{count} adapters on {batch} images: {found['seconds_all']:.3f} s, one: {found['seconds_one']:.3f} s,"
        f" ratio {found['ratio']:.3f} (at most {LIMIT} wanted)"
    )
    if found["ratio"] > LIMIT:
        raise SystemExit(1)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # that weights are random is meant
    logging.disable(logging.WARNING)
    main()
