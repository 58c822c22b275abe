"""One method on random features, and one pass of the encoder: `python -m benchmarks.features.measure JOB` prints JSON.

A method gets a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.backbones.base import Backbone, BackboneSpec, Preprocessing, Tokens
from adaptkit.errors import ConfigError, UnsupportedError
from adaptkit.methods import methods
from adaptkit.methods.base import GradientMethod, Method, MethodConfig
from adaptkit.training.loop import fit_method
from adaptkit.types import FitTask, TensorInputs
from benchmarks.speed.measure import peak_above

_PREDICTED_AT_ONCE = 1024


@dataclass(frozen=True)
class Sizes:
    """How much there is; the defaults are ImageNet's at 16 shots with ViT-B/16's features.

    Args:
        classes: How many.
        shots: Training images per class.
        val_shots: Validation images per class, for the search.
        queries: Test images.
        dim: Width of the features.
        encoded: Images that the encoder is timed on.
    """

    classes: int = 1000
    shots: int = 16
    val_shots: int = 4
    queries: int = 10_000
    dim: int = 512
    encoded: int = 16

    @property
    def images(self) -> int:
        """Training images."""
        return self.classes * self.shots


class RandomTexts(Backbone):
    """A backbone without towers: every sentence has a random feature of its own."""

    def __init__(self, dim: int) -> None:
        super().__init__(BackboneSpec("random texts", "benchmark", "", dim, Preprocessing(224), 77), 100.0)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """A number per text instead of tokens, [texts, 1]."""
        ids = torch.tensor([[zlib.crc32(text.encode())] for text in texts])
        return Tokens(ids, torch.zeros(len(texts), dtype=torch.int64))

    def encode_text(self, tokens: Tokens) -> Tensor:
        """Features [texts, dim]; the same for the same text."""
        seeds = (torch.Generator().manual_seed(int(row)) for row in tokens.ids[:, 0])
        return torch.stack([torch.randn(self.spec.embed_dim, generator=seed) for seed in seeds])


def draw_features(sizes: Sizes, labels: Tensor, views: int, seed: int) -> TensorInputs:
    """Features around random class means that overlap, [views, n, dim]."""
    numbers = torch.Generator().manual_seed(seed)
    means = torch.randn(sizes.classes, sizes.dim, generator=torch.Generator().manual_seed(0))
    values = torch.randn(views, len(labels), sizes.dim, generator=numbers).mul_(3.0)
    return TensorInputs(values.add_(means[labels]), labels)


def draw_task(sizes: Sizes, views: int) -> FitTask:
    """Training images in one plain and `views` augmented views, and validation images."""
    names = tuple(f"class {index}" for index in range(sizes.classes))
    classes = torch.arange(sizes.classes)
    train = draw_features(sizes, classes.repeat_interleave(sizes.shots), 1 + views, 1)
    val = draw_features(sizes, classes.repeat_interleave(sizes.val_shots), 1, 2) if sizes.val_shots else None
    return FitTask(names, train, val, seed=1)


def why_left_out(name: str) -> str:
    """Why a method isn't measured here; "" for those that are."""
    kind = methods.get(name)
    if kind.reads != "image_features":
        return "reads images"
    if kind.reads_descriptions == "needed":
        return "needs descriptions of the classes"
    if methods.entry(name).family == "prompts":
        return "trains through the text tower: benchmarks.speed measures its steps"
    return ""


def measure_method(name: str, sizes: Sizes) -> dict[str, Any]:
    """Fit with the method's own settings, at most one epoch and no search where it trains something, and predict.

    Returns:
        `kind` ("training-free", "trained", or "own solver"), `fit_seconds`, `predict_seconds`, `peak_bytes` (above the
        features), `epoch_seconds` and `settings_tried` (None where there is none); or `left_out`, a sentence.
    """
    kind = methods.get(name)
    training = kind.default_training
    if training is not None:
        training = replace(training, epochs=min(training.epochs, 1))
    try:
        method = _built(kind, sizes)
    except UnsupportedError as error:
        return {"left_out": str(error)}
    task = draw_task(sizes, training.views if training else 0)
    queries = draw_features(sizes, torch.arange(sizes.queries) % sizes.classes, 1, 3).values[0]
    method.zero_shot()  # texts are there already: encoding them isn't what is measured
    found: dict[str, Any] = {}

    def run() -> None:
        started = time.perf_counter()
        report = fit_method(method, task, training)
        fitted = time.perf_counter()
        found["logits"] = _predict(method, queries)
        found["predict_seconds"] = time.perf_counter() - fitted
        found["fit_seconds"] = fitted - started
        found["report"] = report

    peak = peak_above(run)
    report, logits = found.pop("report"), found.pop("logits")
    if not bool(torch.isfinite(logits).all()):
        raise ConfigError(f"{name} gave logits that aren't finite.")
    trained = isinstance(method, GradientMethod)
    free = "training-free" if not method.num_trained() else "own solver"
    return {
        "kind": "trained" if trained else free,
        **found,
        "peak_bytes": peak,
        "epoch_seconds": _epoch_seconds(report, method.config, sizes, found["fit_seconds"]),
        "settings_tried": report.get("settings_tried"),
    }


def _built(kind: type[Method], sizes: Sizes) -> Method:
    """The method with its own settings; a search of one that trains would be many trainings of the same length."""
    texts, names = RandomTexts(sizes.dim), [f"class {index}" for index in range(sizes.classes)]
    method = kind(texts, names)
    if method.num_trained() and hasattr(method.config, "search"):
        return kind(texts, names, config=replace(method.config, search=False))
    return method


def _epoch_seconds(report: Mapping[str, Any], config: MethodConfig, sizes: Sizes, seconds: float) -> float | None:
    """Seconds of one pass over the training images; None for methods that make none."""
    if report.get("epochs") and "seconds" in report:
        return report["seconds"] / report["epochs"]
    if report.get("iterations") and hasattr(config, "batch_size"):  # cross-modal: half of a batch are images
        return seconds * sizes.images / (report["iterations"] * (config.batch_size // 2))
    return None


@torch.no_grad()
def _predict(method: Method, queries: Tensor) -> Tensor:
    size = _PREDICTED_AT_ONCE
    if method.transductive:
        size = getattr(method.config, "query_batch", 0) or len(queries)
    return torch.cat([method(part) for part in torch.split(queries, size)])


def measure_encoding(backbone: Backbone, sizes: Sizes, rounds: int = 3) -> dict[str, Any]:
    """Seconds that the image encoder takes for one view of all training images, extrapolated from a small batch."""
    side = backbone.spec.preprocessing.image_size
    pixels = torch.randn(sizes.encoded, 3, side, side, generator=torch.Generator().manual_seed(0))
    seconds = []
    with torch.no_grad():
        F.normalize(backbone.encode_image(pixels), dim=-1)  # warm
        for _ in range(rounds):
            started = time.perf_counter()
            backbone.encode_image(pixels)
            seconds.append(time.perf_counter() - started)
    per_image = statistics.median(seconds) / sizes.encoded
    return {
        "images": sizes.images,
        "seconds": per_image * sizes.images,
        "extrapolated": sizes.images > sizes.encoded,
        "measured_images": sizes.encoded,
        "samples": seconds,
    }


def job(name: str, sizes: Sizes) -> str:
    """What the process of a method is given."""
    return json.dumps({"name": name, "sizes": asdict(sizes)})


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(measure_method(asked["name"], Sizes(**asked["sizes"]))))
