"""`python -m benchmarks.studio`: a label is given, and all images are answered anew through the interface."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from starlette.testclient import TestClient

from adaptkit.backbones.load import load_backbone
from adaptkit.data.features import FeatureStore
from adaptkit.data.synthetic import load_embedded
from adaptkit.storage import write_json
from adaptkit.studio.app import make_app
from adaptkit.studio.engine import OFFERED
from adaptkit.studio.project import Project
from adaptkit.studio.workshop import Workshop
from benchmarks.speed.measure import machine_facts

RESULT = Path(__file__).parent / "result.json"
LIMIT = 1.0
"""Seconds from a click to fresh predictions."""


def fill(workshop: Workshop, classes: int, shots: int) -> None:
    """Drawn pictures, all of them labelled; features are stored when it returns."""
    data = load_embedded("shapes")
    workshop.add_classes(data.class_names[:classes])
    for place, key in enumerate(workshop.project.state.classes):
        rows = np.flatnonzero(data.labels["train"] == place)[:shots]
        files = [(f"{row}.png", BytesIO(_png(data.images["train"][row])).read) for row in rows]
        workshop.take_in(files, key)
    while workshop.engine.missing() or workshop.engine.progress:
        time.sleep(0.05)


def _png(pixels: Any) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def clicks(page: TestClient, method: str, repeats: int) -> list[float]:
    """Seconds from giving an image another class to the answers for all images; each time an image of its own, since
    what was answered before is remembered."""
    page.post("/api/method", json={"method": method}).raise_for_status()
    page.get("/api/answers").raise_for_status()
    state = page.get("/api/state").json()
    other = state["classes"][-1]["id"]
    seconds = []
    apart = len(state["images"]) // len(state["classes"])  # one of each class, so that none is left without images
    for image in state["images"][::apart][:repeats]:
        started = time.perf_counter()
        changed = page.post("/api/label", json={"images": [image["id"]], "label": other})
        answers = page.get("/api/answers")
        seconds.append(time.perf_counter() - started)
        changed.raise_for_status()
        if answers.json()["by"] != method or len(answers.json()["images"]) != len(state["images"]):
            raise click.ClickException(f"{method} didn't answer all images: {answers.text[:200]}")
    for _ in range(repeats):
        page.post("/api/undo").raise_for_status()
    return seconds


@click.command()
@click.option("--backbone", default="mini", show_default=True)
@click.option("--classes", default=20, show_default=True)
@click.option("--shots", default=16, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--methods", default=",".join(OFFERED), show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULT, show_default=True)
def main(backbone: str, classes: int, shots: int, repeats: int, methods: str, out: Path) -> None:
    """Exits 1 where a method takes longer than a second (half of its clicks do)."""
    loaded, found = load_backbone(backbone), {}
    with tempfile.TemporaryDirectory() as place:
        project = Project(Path(place) / "project")
        workshop = Workshop(project, loaded, FeatureStore(Path(place) / "store"))
        fill(workshop, classes, shots)
        with TestClient(make_app(workshop, "token", 8765), base_url="http://127.0.0.1:8765") as page:
            page.headers["x-studio-token"] = "token"
            for method in methods.split(","):
                seconds = clicks(page, method, repeats)
                found[method] = {"median": statistics.median(seconds), "seconds": seconds}
                click.echo(f"{method:16} {found[method]['median']:.2f} s")
        project.close()
    sizes = {"backbone": backbone, "classes": classes, "shots": shots, "limit": LIMIT}
    write_json(out, {"schema": 1, **sizes, "machine": machine_facts(), "methods": found})
    if max(facts["median"] for facts in found.values()) > LIMIT:
        raise SystemExit(1)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    main()
