"""The prompt methods' training steps against the plain way: 77 tokens per class, images encoded again in every step.

A step is forward, losses and backward, as the training loop does it; the optimiser's update is the same for both and
left out. Logits, loss and the gradient of everything that is trained are compared in the same run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaptkit.backbones.base import Backbone
from adaptkit.errors import ConfigError
from adaptkit.methods import methods
from adaptkit.methods.base import GradientMethod, total_loss
from adaptkit.methods.prompts._layout import open_image, open_text
from benchmarks.speed.measure import Difference, Load, Row, Scope, medians, on_line, run_process, time_in_turn
from benchmarks.speed.plain_prompts import (
    Plain,
    PlainCoCoOp,
    PlainCoOp,
    PlainDeep,
    PlainKgCoOp,
    PlainMaPLe,
    PlainMMRL,
    PlainMMRLpp,
    PlainProGrad,
    PlainPromptSRC,
    Step,
)

ROUNDS = 3
CLASSES = (10, 50, 100, 1000)
MOST_PLAIN = {"cpu": 100, "cuda": 1000}
LARGER_BATCHES = (32, 128)
"""Measured beside a method's own batch where there is a GPU."""


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A method as its paper trains it, and its plain way.

    Args:
        plain: Its plain way.
        batch: Images per step.
        wanted: Class counts to how many times as fast as the plain way we want to be there.
        wanted_memory: The same for peak memory.
        settings: The method's settings for towers of that many layers; others are the method's defaults.
        note: What the rows must say.
    """

    plain: type[Plain]
    batch: int
    wanted: Mapping[int, float]
    wanted_memory: Mapping[int, float] = field(default_factory=dict)
    settings: Callable[[int], Mapping[str, Any]] = lambda layers: {}
    note: str = ""


SUBJECTS: dict[str, Subject] = {
    "coop": Subject(PlainCoOp, 32, {100: 30.0}, {1000: 8.0}),
    "kgcoop": Subject(PlainKgCoOp, 32, {100: 30.0}, note="paper: batch 128"),
    "prograd": Subject(PlainProGrad, 32, {100: 30.0}, note="plain: student and teacher each encode the images"),
    "cocoop": Subject(PlainCoCoOp, 4, {100: 20.0}, note="paper: batch 1; plain: image by image"),
    "maple": Subject(PlainMaPLe, 4, {50: 3.0, 100: 3.0}, settings=lambda layers: {"depth": min(9, layers)}),
    "ivlp": Subject(
        PlainDeep,
        4,
        {100: 3.0},
        settings=lambda layers: {"text_depth": min(12, layers), "image_depth": min(12, layers)},
    ),
    "promptsrc": Subject(
        PlainPromptSRC,
        4,
        {50: 3.0, 100: 3.0},
        settings=lambda layers: {"text_depth": min(9, layers), "image_depth": min(9, layers)},
    ),
    "mmrl": Subject(PlainMMRL, 4, {50: 3.0, 100: 3.0}, settings=lambda layers: {"first_layer": max(2, layers // 2)}),
    "mmrlpp": Subject(PlainMMRLpp, 4, {100: 3.0}, settings=lambda layers: {"first_layer": max(2, layers // 2)}),
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Args:
        classes: Class counts.
        most_plain: Above so many classes, or where it runs out of GPU memory, the plain way isn't run as a whole: it
            is extrapolated from smaller counts, and its numbers are computed in pieces.
        batches: Images per step.
        rounds: How often each side is timed.
    """

    classes: Sequence[int]
    most_plain: int
    batches: Sequence[int]
    rounds: int

    @classmethod
    def of(cls, subject: Subject, scope: Scope) -> Sizes:
        """What a run measures of a method.

        Raises:
            ConfigError: Only counts were asked for that need smaller ones to extrapolate from.
        """
        if scope.quick:
            sizes = cls(scope.classes or (2, 4, 6), max(scope.classes or (4,)), (2,), 1)
        else:
            larger = LARGER_BATCHES if scope.device == "cuda" else ()
            batches = sorted({subject.batch, *larger})
            sizes = cls(scope.classes or CLASSES, MOST_PLAIN[scope.device], batches, ROUNDS)
        if min(sizes.classes) > sizes.most_plain:
            raise ConfigError(
                f"The plain way is run with at most {sizes.most_plain} classes and extrapolated above, so at least one"
                " smaller class count must be measured as well."
            )
        return sizes


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
    """One method on random images, in our way and in the plain way, with the same trained tensors.

    Attributes:
        method: Ours, in training mode, a little off its start, where some gradients would be zero.
        plain: The plain way's step.
    """

    def __init__(self, name: str, backbone: Backbone, classes: int, batch: int, seed: int = 0) -> None:
        subject, kind = SUBJECTS[name], methods.get(name)
        layers = min(open_text(backbone, name)[1].layers, open_image(backbone, name).layers)
        config = kind.config_class(**subject.settings(layers))
        method = kind(backbone, class_names(classes), config=config, seed=seed)
        if not isinstance(method, GradientMethod):
            raise ConfigError(f"{name} isn't trained by gradient, so there are no steps to measure.")
        self.method: GradientMethod = method.train()
        numbers = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.trained:
                parameter += 0.01 * torch.randn(parameter.shape, generator=numbers).to(backbone.device)
        size = backbone.spec.preprocessing.image_size
        self.pixels = torch.randn(batch, 3, size, size, generator=numbers).to(backbone.device)
        self.labels = torch.randint(classes, (batch,), generator=numbers).to(backbone.device)
        with torch.no_grad():
            self.features = backbone.encode_image(self.pixels)  # in training, the feature store has them
        self.plain = subject.plain(self.method, self.pixels, self.labels)

    @property
    def trained(self) -> list[Tensor]:
        return [p for p in self.method.parameters() if p.requires_grad]

    @property
    def inputs(self) -> Tensor:
        """What our method reads: stored features or pixels."""
        return self.features if self.method.reads == "image_features" else self.pixels

    def our_step(self) -> Tensor:
        """Losses and backward, as in the training loop; the loss. The gradients are left at the trained tensors."""
        self.method.zero_grad(set_to_none=True)
        given = {"frozen": self.features} if self.method.wants_frozen else {}
        terms = self.method.losses(self.inputs, self.labels, **given)
        self.method.backward(terms, lambda loss: loss)
        return total_loss(terms).detach()

    def our_numbers(self) -> Step:
        """The same step with its gradients, and the logits."""
        with torch.no_grad():
            logits = self.plain.our_logits(self.method, self.inputs)
        loss = self.our_step()
        return Step(logits, loss, tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained))


EAGER_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc gives memory back at once; else a step would hide in what loading the model left over."""


# --- measuring --------------------------------------------------------------------------------------------------------


def compare(ours: Step, plain: Step) -> dict[str, Difference]:
    """Logits, loss and gradients of one step, apart."""
    return {
        "logits": Difference.between(ours.logits, plain.logits),
        "loss": Difference.between(ours.loss, plain.loss),
        "gradient": Difference.of_many(ours.gradients, plain.gradients),
    }


def if_it_fits(run: Callable[[], Step]) -> Step | None:
    """The step, or None where the GPU's memory doesn't hold it."""
    try:
        return run()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def time_steps(name: str, backbone: Backbone, sizes: Sizes, batch: int) -> Iterator[Row]:
    """Seconds per step by number of classes, with the differences.

    Args:
        name: Of the method.
        backbone: The model.
        sizes: How much.
        batch: Images per step.
    """
    measured: dict[int, float] = {}
    for count in sizes.classes:
        case = Case(name, backbone, count, batch)
        # the steps that are compared are the warm-up as well
        reference = if_it_fits(case.plain.step) if count <= sizes.most_plain else None
        whole = reference is not None
        differences = compare(case.our_numbers(), reference or case.plain.step(min(100, sizes.most_plain)))
        sides: dict[str, Callable[[], object]] = {"ours": case.our_step}
        if whole:
            sides["plain"] = case.plain.step
        samples = time_in_turn(sides, sizes.rounds, backbone.device)
        seconds = medians(samples)
        if whole:
            measured[count] = seconds["plain"]
        yield Row(
            name,
            f"step, {count} classes, batch {batch}",
            "s",
            seconds["ours"],
            seconds["plain"] if whole else on_line(measured, count),
            wanted_ratio=SUBJECTS[name].wanted.get(count),
            extrapolated=not whole,
            differences=differences,
            samples=samples,
            note=_note(name, whole, measured),
        )


def _note(name: str, whole: bool, measured: Mapping[int, Any]) -> str:
    points = " and ".join(str(count) for count in sorted(measured)[-2:])
    extrapolation = "" if whole else f"plain extrapolated from {points} classes"
    return ", ".join(filter(None, [SUBJECTS[name].note, extrapolation]))


def peak_memory(name: str, backbone: Backbone, sizes: Sizes, batch: int) -> Iterator[Row]:
    """Peak memory of a step by number of classes, each in a process of its own; arguments as of `time_steps`."""
    measured: dict[int, float] = {}
    for count in sizes.classes:
        child = partial(peak_in_child, name, backbone.spec.name, backbone.device.type, classes=count, batch=batch)
        ours, plain = child(side="ours"), child(side="plain") if count <= sizes.most_plain else None
        if ours is None:
            raise ConfigError(f"The GPU's memory doesn't hold {name}'s step with {count} classes and batch {batch}.")
        if plain is not None:
            measured[count] = plain
        yield Row(
            name,
            f"memory of a step, {count} classes, batch {batch}",
            "bytes",
            ours,
            on_line(measured, count) if plain is None else plain,
            wanted_ratio=SUBJECTS[name].wanted_memory.get(count),
            extrapolated=plain is None,
            note=_note(name, plain is not None, measured),
        )


def peak_in_child(name: str, backbone: str, device: str, *, side: str, classes: int, batch: int) -> int | None:
    """Bytes a step needs at its highest moment, above the loaded model; measured in a fresh process.

    None where the GPU's memory doesn't hold it.
    """
    order = {"name": name, "backbone": backbone, "device": device, "side": side, "classes": classes, "batch": batch}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.speed.memory", json.dumps(order)]
    printed = run_process(command, extra=EAGER_MALLOC)
    peak = json.loads(printed.strip().splitlines()[-1])["bytes"]
    return None if peak is None else int(peak)


def bench_prompts(name: str, load: Load, scope: Scope) -> Iterator[Row]:
    """A prompt method's step and its memory."""
    sizes, backbone = Sizes.of(SUBJECTS[name], scope), load()
    for batch in sizes.batches:
        yield from time_steps(name, backbone, sizes, batch)
        yield from peak_memory(name, backbone, sizes, batch)
