"""Features of JPEG files through the store, against the bare encoder on tensors that are ready."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from adaptkit.backbones.base import Backbone
from adaptkit.data.features import FeatureStore, Precision
from adaptkit.data.splits import FileSource, TrainSplit
from adaptkit.data.transforms import to_pixels
from adaptkit.methods.prompts._layout import open_image
from benchmarks.speed.measure import Difference, Load, Row, Scope, medians, time_in_turn
from benchmarks.speed.plain import plain_image

IMAGES, BATCH, ROUNDS = 64, 32, 3
WIDTH, HEIGHT = 400, 300
WORKERS = 2

Encode = Callable[[Tensor], Tensor]


def make_jpegs(folder: Path, count: int, seed: int = 0) -> TrainSplit:
    """Smooth random pictures with a little grain, as files of a photograph's size on disk (30 to 40 KB)."""
    numbers = np.random.default_rng(seed)
    names = []
    for index in range(count):
        coarse = Image.fromarray(numbers.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.float32)
        grain = numbers.normal(0, 8, (HEIGHT, WIDTH, 1))
        name = f"{index:04d}.jpg"
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(folder / name, quality=90)
        names.append(name)
    labels = np.zeros(count, dtype=np.int64)
    return TrainSplit(tuple(names), labels, ("thing",), FileSource(folder, names), np.arange(count))


def bare(encode: Encode, pixels: Tensor) -> Tensor:
    """Features [n, dim] of ready pixels [n, 3, size, size], batch by batch, nothing else."""
    with torch.inference_mode():
        return torch.cat([encode(batch) for batch in torch.split(pixels, BATCH)])


def open_clip_encoder(name: str) -> Encode | None:
    """open_clip's own `encode_image` with the weights of "ARCHITECTURE/random"; None for other backbones.

    `load_backbone` seeds open_clip by the name; so does this, and the comparison of outputs would show it if not.
    """
    import open_clip

    architecture, _, tag = name.partition("/")
    if tag != "random":
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        encode: Encode = open_clip.create_model(architecture, pretrained_text=False).eval().encode_image
    return encode


def bench_extraction(load: Load, scope: Scope) -> Iterator[Row]:
    """Store against encoder, bf16 against fp32, reading against computing."""
    backbone = load()
    count, rounds = (4, 1) if scope.quick else (IMAGES, ROUNDS)
    yield from measure_extraction(backbone, count, rounds, open_clip_encoder(backbone.spec.name))


def measure_extraction(backbone: Backbone, count: int, rounds: int, library: Encode | None) -> Iterator[Row]:
    """Features of `count` JPEG files, `rounds` times each way.

    Args:
        backbone: With an open image tower.
        count: Images.
        rounds: How often each side is timed.
        library: The source library's own encoder with the same weights, to compare with too.
    """
    tower = open_image(backbone, "The benchmark")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="adaptkit-bench-")))
        split, pixels = _files_and_pixels(folder, backbone, count)
        stores = iter(range(10**9))

        def through_store(precision: Precision, root: Path | None = None) -> Tensor:
            """Into a new store every time, so that nothing is there yet."""
            store = FeatureStore(folder / f"store-{next(stores)}" if root is None else root)
            return store.features(backbone, split, batch_size=BATCH, precision=precision, workers=WORKERS)

        def plain() -> Tensor:
            return bare(lambda batch: plain_image(tower, batch), pixels)

        filled = folder / "filled"
        ours, reference = through_store("fp32", filled), plain()  # warm-up as well
        half = through_store("bf16")
        sides: dict[str, Callable[[], object]] = {
            "plain": plain,
            "ours": lambda: through_store("fp32"),
            "bf16": lambda: through_store("bf16"),
            "stored": lambda: through_store("fp32", filled),
        }
        theirs = None
        if library is not None:
            theirs = bare(library, pixels)
            sides["library"] = lambda: bare(library, pixels)
        samples = time_in_turn(sides, rounds)
    yield from _rows(count, samples, ours, reference, half, theirs)


def _files_and_pixels(folder: Path, backbone: Backbone, count: int) -> tuple[TrainSplit, Tensor]:
    images = folder / "images"
    images.mkdir()
    split = make_jpegs(images, count)
    return split, torch.stack([to_pixels(split.image(i), backbone.spec.preprocessing) for i in range(count)])


def _rows(
    count: int, samples: dict[str, list[float]], ours: Tensor, plain: Tensor, half: Tensor, theirs: Tensor | None
) -> Iterator[Row]:
    seconds, name = medians(samples), "extraction"

    def chosen(*sides: str) -> dict[str, list[float]]:
        return {side: samples[side] for side in sides}

    yield Row(
        name,
        f"{count} JPEG files through the store; plain: encoder on ready tensors",
        "s",
        seconds["ours"],
        seconds["plain"],
        wanted_ratio=1.0,
        differences={"features": Difference.between(ours, plain)},
        samples=chosen("ours", "plain"),
        facts={"images_per_second": count / seconds["ours"]},
    )
    if theirs is not None:
        yield Row(
            name,
            "the same; plain: open_clip's own encode_image",
            "s",
            seconds["ours"],
            seconds["library"],
            wanted_ratio=1.0,
            differences={"features": Difference.between(ours, theirs)},
            samples=chosen("ours", "library"),
        )
    yield Row(
        name,
        "the same in bf16; plain: the store in fp32",
        "s",
        seconds["bf16"],
        seconds["ours"],
        differences={"features": Difference.between(half, ours)},
        exact=False,
        samples=chosen("bf16", "ours"),
        note="bf16's own rounding",
        facts={"smallest_cosine": float(F.cosine_similarity(half.double(), ours.double()).min())},
    )
    yield Row(
        name,
        "features read from the store; plain: encoded",
        "s",
        seconds["stored"],
        seconds["ours"],
        samples=chosen("stored", "ours"),
    )
