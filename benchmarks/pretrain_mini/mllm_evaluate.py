"""What `mini-mllm` reaches on the embedded datasets: asked as it is, and with a linear probe on its features.

python -m benchmarks.pretrain_mini.mllm_evaluate --out benchmarks/pretrain_mini/mllm_reached.json
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from adaptkit.backbones.load import load_backbone
from adaptkit.data.features import FeatureStore
from adaptkit.data.sources import load_dataset
from adaptkit.data.synthetic import EMBEDDED
from adaptkit.evaluation.protocols import plan_run, run_method
from adaptkit.evaluation.tasks import make_task
from adaptkit.storage import write_json

ROUTES = {
    "likelihood": ["route=likelihood"],
    "likelihood, less that of blank images": ["normalisation=pmi-null"],
    "lettered choice of 4": ["route=letters"],
}
SEEDS = (1, 2, 3)
SHOTS = 16


@click.command()
@click.option("--backbone", default="mini-mllm", show_default=True)
@click.option("--datasets", default=",".join(EMBEDDED), show_default=True)
@click.option("--every", default=4, show_default=True, help="Test on every so many-th image; 1 is all.")
@click.option("--threads", default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(backbone: str, datasets: str, every: int, threads: int, out: Path) -> None:
    """Measure and write a JSON after each dataset."""
    torch.set_num_threads(threads)
    model = load_backbone(backbone)
    found: dict[str, Any] = {"backbone_digest": model.spec.digest, "zero_shot": {}, "linear_probe_16_shots": {}}
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(folder)
        for name in datasets.split(","):
            data = load_dataset(name)
            data = replace(data, test=data.test.subset(range(0, len(data.test), every)))
            task = make_task(data, "few-shot", 1, 1)
            for route, settings in ROUTES.items():
                plan = plan_run("mllm-zero-shot", model, task, overrides=settings)
                result = run_method(plan, model, store=store).result
                part = result.parts[0]
                facts = {"accuracy": result.score, "images": part.total, "chance": 1 / part.num_classes}
                found["zero_shot"].setdefault(name, {})[route] = facts | part.metrics.get("answers", {})
                click.echo(f"{name} {route}: {100 * result.score:.1f} % of {part.total}")
            scores = []
            for seed in SEEDS:
                task = make_task(data, "few-shot", SHOTS, seed)
                scores.append(run_method(plan_run("linear-probe", model, task), model, store=store).result.score)
            found["linear_probe_16_shots"][name] = scores
            click.echo(f"{name} linear probe: {100 * sum(scores) / len(scores):.1f} %")
            write_json(out, found)


if __name__ == "__main__":
    main()
