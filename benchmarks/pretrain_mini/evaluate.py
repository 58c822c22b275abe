"""What `mini` reaches on the embedded datasets: zero-shot, 16 shots, descriptions.

python -m benchmarks.pretrain_mini.evaluate --out benchmarks/pretrain_mini/reached.json
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F

from adaptkit.backbones.load import load_backbone
from adaptkit.data.features import FeatureStore
from adaptkit.data.sources import load_dataset
from adaptkit.data.synthetic import EMBEDDED
from adaptkit.evaluation.protocols import plan_run, run_method
from adaptkit.evaluation.statistics import summarise
from adaptkit.evaluation.tasks import make_task
from adaptkit.methods.base import zero_shot_weights
from adaptkit.storage import write_json

SEEDS = (1, 2, 3)
METHODS = ("linear-probe", "tip-adapter", "tip-adapter-f", "clip-adapter", "coop", "maple")


def text_accuracy(backbone: Any, store: FeatureStore, name: str, seed: int, *, described: bool = False) -> float:
    """Zero-shot accuracy by names, or by the mean of each class's descriptions."""
    data = load_dataset(name, seed=seed)
    if described:
        texts = [list(data.descriptions[name]) for name in data.class_names]
        rows = [F.normalize(backbone.text_features(sentences), dim=-1).mean(0) for sentences in texts]
        weights = F.normalize(torch.stack(rows), dim=-1)
    else:
        weights = zero_shot_weights(backbone, data.class_names, data.templates)
    features = F.normalize(store.features(backbone, data.test), dim=-1)
    return float(((features @ weights.T).argmax(1) == torch.from_numpy(data.test.labels)).float().mean())


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--datasets", default="digits,shapes,textures,species", show_default=True)
def main(out: Path, datasets: str) -> None:
    """Measure and write a JSON; shifts are tested zero-shot only."""
    torch.set_num_threads(2)
    backbone = load_backbone("mini")
    found: dict[str, Any] = {"backbone_digest": backbone.spec.digest, "zero_shot": {}, "16_shots": {}}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        store = FeatureStore(folder)
        for name in EMBEDDED:
            found["zero_shot"][name] = [text_accuracy(backbone, store, name, seed) for seed in SEEDS]
            click.echo(f"{name}: zero-shot {found['zero_shot'][name]}")
        found["species_descriptions"] = [text_accuracy(backbone, store, "species", s, described=True) for s in SEEDS]
        click.echo(f"species by descriptions: {found['species_descriptions']}")
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(folder)
        for name in datasets.split(","):
            for method in METHODS:
                scores = []
                for seed in SEEDS:
                    task = make_task(load_dataset(name), "few-shot", 16, seed)
                    scores.append(run_method(plan_run(method, backbone, task), backbone, store=store).result.score)
                found["16_shots"].setdefault(name, {})[method] = scores
                shown = summarise(scores)
                click.echo(f"{name} {method}: {100 * shown.mean:.1f} ± {100 * shown.half_width:.1f}")
    write_json(out, found)


if __name__ == "__main__":
    main()
