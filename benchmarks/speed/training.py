"""CoOp's and MaPLe's training steps against the plain way: 77 tokens per class, images encoded again in every step.

A step is forward, loss and backward; the optimiser's update is the same for both and left out. Outputs and the
gradient of everything that is trained are compared in the same run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.backbones.base import Backbone
from adaptkit.errors import ConfigError
from adaptkit.methods.base import Method
from adaptkit.methods.prompts._layout import open_image, open_text, placeholder
from adaptkit.methods.prompts.coop import CoOp
from adaptkit.methods.prompts.maple import MaPLe, MaPLeConfig
from benchmarks.speed.measure import Difference, Load, Row, medians, on_line, run_process, time_in_turn
from benchmarks.speed.plain import plain_image, plain_text

Step = tuple[Tensor, tuple[Tensor, ...]]
"""Logits [batch, classes], and the gradient of each trained tensor."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Args:
        classes: Class counts.
        most_plain: Above so many classes the plain way isn't run as a whole: it is extrapolated from smaller counts,
            and its numbers are computed in pieces of this size.
        batch: Images per step.
        rounds: How often each side is timed.
    """

    classes: Sequence[int]
    most_plain: int
    batch: int
    rounds: int


COOP = Sizes(classes=(10, 100, 1000), most_plain=100, batch=32, rounds=3)
COOP_QUICK = Sizes(classes=(2, 4, 6), most_plain=4, batch=2, rounds=1)
MAPLE = Sizes(classes=(50, 100), most_plain=100, batch=4, rounds=3)
MAPLE_QUICK = Sizes(classes=(3,), most_plain=3, batch=2, rounds=1)


def class_names(count: int) -> list[str]:
    """That many ImageNet class names, spread over the list (2.5 word pieces on average).

    Raises:
        ConfigError: More names than there are.
    """
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    names = list(dict.fromkeys(IMAGENET_CLASSNAMES))
    names += [f"other {name}" for name in names[: len(IMAGENET_CLASSNAMES) - len(names)]]  # two names occur twice
    if not 1 <= count <= len(names):
        raise ConfigError(f"{count} class names were asked for; there are 1 to {len(names)}.")
    return names[:: len(names) // count][:count]


# --- the two sides ----------------------------------------------------------------------------------------------------


class Case:
    """One method on random images, in our way and in the plain way, with the same trained tensors."""

    method: Method

    def __init__(self, backbone: Backbone, classes: int, batch: int, seed: int = 0) -> None:
        self.backbone, self.text = open_text(backbone, "The benchmark")
        self.image = open_image(backbone, "The benchmark")
        self.names = class_names(classes)
        numbers = torch.Generator().manual_seed(seed)
        size = backbone.spec.preprocessing.image_size
        self.pixels = torch.randn(batch, 3, size, size, generator=numbers)
        self.labels = torch.randint(classes, (batch,), generator=numbers)

    @property
    def trained(self) -> list[Tensor]:
        return [p for p in self.method.parameters() if p.requires_grad]

    def prompts(self, phrase: str) -> tuple[Tensor, Tensor]:
        """Full-length ids [classes, 77] and end tokens [classes] of "<phrase> <name>."."""
        tokens = self.backbone.tokenize([f"{phrase} {name}." for name in self.names])
        return tokens.ids, tokens.ends

    def ours(self) -> Tensor:
        """Logits [batch, classes]."""
        raise NotImplementedError

    def plain_image_features(self) -> Tensor:
        """[batch, dim]."""
        raise NotImplementedError

    def plain_text_features(self, rows: slice = slice(None)) -> Tensor:
        """[classes, dim], or of some of the classes."""
        raise NotImplementedError

    def plain(self) -> Tensor:
        """Logits [batch, classes]."""
        return self._logits(self.plain_image_features(), self.plain_text_features())

    def _logits(self, images: Tensor, texts: Tensor) -> Tensor:
        scale = self.backbone.logit_scale
        return scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T

    def step(self, forward: Callable[[], Tensor]) -> Step:
        """Forward, loss, backward."""
        logits = forward()
        gradients = torch.autograd.grad(F.cross_entropy(logits, self.labels), self.trained)
        return logits.detach(), gradients

    def our_step(self) -> Step:
        return self.step(self.ours)

    def plain_step(self) -> Step:
        return self.step(self.plain)

    def plain_step_in_pieces(self, size: int) -> Step:
        """The same numbers as `plain_step`, with the activations of `size` classes at a time in memory."""
        pieces = [slice(start, start + size) for start in range(0, len(self.names), size)]
        with torch.no_grad():
            texts = torch.cat([self.plain_text_features(rows) for rows in pieces])
        texts.requires_grad_()
        logits = self._logits(self.plain_image_features(), texts)
        loss = F.cross_entropy(logits, self.labels)
        of_texts, *found = torch.autograd.grad(loss, [texts, *self.trained], allow_unused=True)
        total = [torch.zeros_like(p) if g is None else g for p, g in zip(self.trained, found, strict=True)]
        for rows in pieces:
            part = torch.autograd.grad(self.plain_text_features(rows), self.trained, of_texts[rows], allow_unused=True)
            total = [t if g is None else t + g for t, g in zip(total, part, strict=True)]
        return logits.detach(), tuple(total)


class CoOpCase(Case):
    """CoOp with 16 contexts; ours reads stored image features."""

    method: CoOp

    def __init__(self, backbone: Backbone, classes: int, batch: int, seed: int = 0) -> None:
        super().__init__(backbone, classes, batch, seed)
        self.method = CoOp(backbone, self.names, seed=seed)
        with torch.no_grad():
            self.features = backbone.encode_image(self.pixels)
        self.ids, self.ends = self.prompts(placeholder(self.backbone, self.method.config.num_context))

    def ours(self) -> Tensor:
        logits: Tensor = self.method(self.features)
        return logits

    def plain_image_features(self) -> Tensor:
        with torch.no_grad():
            return plain_image(self.image, self.pixels)

    def plain_text_features(self, rows: slice = slice(None)) -> Tensor:
        return plain_text(self.text, self.ids[rows], self.ends[rows], self.method.context, start=1)


class MaPLeCase(Case):
    """MaPLe as published: "a photo of a", two vectors, nine layers (fewer where the towers have fewer)."""

    method: MaPLe

    def __init__(self, backbone: Backbone, classes: int, batch: int, seed: int = 0) -> None:
        super().__init__(backbone, classes, batch, seed)
        config = MaPLeConfig(depth=min(9, self.text.layers, self.image.layers))
        self.method = MaPLe(backbone, self.names, config=config, seed=seed)
        self.ids, self.ends = self.prompts(config.context_init)

    def ours(self) -> Tensor:
        logits: Tensor = self.method(self.pixels)
        return logits

    def plain_image_features(self) -> Tensor:
        first, *deeper = (
            F.linear(context, coupling.get_parameter("weight"), coupling.get_parameter("bias"))
            for context, coupling in zip(self.method.contexts, self.method.couplings, strict=True)
        )
        return plain_image(self.image, self.pixels, first, dict(enumerate(deeper, start=1)))

    def plain_text_features(self, rows: slice = slice(None)) -> Tensor:
        first, *deeper = self.method.contexts
        deep = dict(enumerate(deeper, start=1))
        return plain_text(self.text, self.ids[rows], self.ends[rows], first, start=1, deep=deep)


EAGER_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc gives memory back at once; else a step would hide in what loading the model left over."""

CASES: dict[str, type[Case]] = {"coop": CoOpCase, "maple": MaPLeCase}


# --- measuring --------------------------------------------------------------------------------------------------------


def compare(ours: Step, plain: Step) -> dict[str, Difference]:
    """Outputs and gradients of one step, apart."""
    return {
        "logits": Difference.between(ours[0], plain[0]),
        "gradient": Difference.of_many(ours[1], plain[1]),
    }


def time_steps(name: str, backbone: Backbone, sizes: Sizes, wanted: dict[int, float]) -> Iterator[Row]:
    """Seconds per step by number of classes, with the differences.

    Args:
        name: "coop" or "maple".
        backbone: The model.
        sizes: How much.
        wanted: Class counts to the ratio that we want there.
    """
    measured: dict[int, float] = {}
    for count in sizes.classes:
        case = CASES[name](backbone, count, sizes.batch)
        whole = count <= sizes.most_plain
        # the steps that are compared are the warm-up as well
        reference = case.plain_step() if whole else case.plain_step_in_pieces(sizes.most_plain)
        differences = compare(case.our_step(), reference)
        sides: dict[str, Callable[[], object]] = {"ours": case.our_step}
        if whole:
            sides["plain"] = case.plain_step
        samples = time_in_turn(sides, sizes.rounds)
        seconds = medians(samples)
        if whole:
            measured[count] = seconds["plain"]
        yield Row(
            name,
            f"step, {count} classes, batch {sizes.batch}",
            "s",
            seconds["ours"],
            seconds["plain"] if whole else on_line(measured, count),
            wanted_ratio=wanted.get(count),
            extrapolated=not whole,
            differences=differences,
            samples=samples,
            note="" if whole else _extrapolation(measured),
        )


def _extrapolation(measured: dict[int, Any]) -> str:
    points = " and ".join(str(count) for count in sorted(measured)[-2:])
    return f"plain extrapolated from {points} classes"


def peak_memory(name: str, backbone: str, sizes: Sizes, wanted: dict[int, float]) -> Iterator[Row]:
    """Peak memory of a step by number of classes, each in a process of its own."""
    measured: dict[int, float] = {}
    for count in sizes.classes:
        ours, whole = peak_in_child(name, backbone, "ours", count, sizes.batch), count <= sizes.most_plain
        if whole:
            measured[count] = peak_in_child(name, backbone, "plain", count, sizes.batch)
        yield Row(
            name,
            f"memory of a step, {count} classes, batch {sizes.batch}",
            "bytes",
            ours,
            measured[count] if whole else on_line(measured, count),
            wanted_ratio=wanted.get(count),
            extrapolated=not whole,
            note="" if whole else _extrapolation(measured),
        )


def peak_in_child(name: str, backbone: str, side: str, classes: int, batch: int) -> int:
    """Bytes a step needs at its highest moment, above the loaded model; measured in a fresh process."""
    order = json.dumps({"name": name, "backbone": backbone, "side": side, "classes": classes, "batch": batch})
    printed = run_process([sys.executable, "-W", "ignore", "-m", "benchmarks.speed.memory", order], extra=EAGER_MALLOC)
    return int(json.loads(printed.strip().splitlines()[-1])["bytes"])


def bench_coop(load: Load, quick: bool) -> Iterator[Row]:
    """CoOp's step and its memory."""
    sizes, backbone = COOP_QUICK if quick else COOP, load()
    yield from time_steps("coop", backbone, sizes, {100: 30.0})
    yield from peak_memory("coop", backbone.spec.name, sizes, {1000: 8.0})


def bench_maple(load: Load, quick: bool) -> Iterator[Row]:
    """MaPLe's step."""
    yield from time_steps("maple", load(), MAPLE_QUICK if quick else MAPLE, {50: 3.0, 100: 3.0})
