"""The gradient loop: few-shot batches, a method's loss, one optimiser, a schedule, and a report of what happened.

Source: protocol-training sheet, sections 4 (optimiser, schedule) and 5 (batches).
Differs from the references: weights stay in fp32 (bf16 and fp16 are autocast on request), a non-finite loss stops every
method, and all randomness comes from the task's seed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from adaptkit.backbones.base import Backbone
from adaptkit.errors import ConfigError, DataError, TrainingError
from adaptkit.methods.base import GradientMethod, Method, ParameterGroup, require_finite, total_loss
from adaptkit.training.schedule import SCHEDULES, learning_rate
from adaptkit.training.seeding import generator, seeded
from adaptkit.types import EpochCallback, FitTask, Inputs, ProgressCallback, TensorInputs, TrainingSettings

_PROGRESS_SECONDS = 0.2  # a terminal needs no more than five updates a second
_FIRST_LOSS_SCALE = 2.0**10  # torch starts at 2¹⁶ and skips steps until it fits; few shots have no steps to spare


def fit_method(
    method: Method,
    task: FitTask,
    settings: TrainingSettings | None = None,
    progress: ProgressCallback | None = None,
    on_epoch: EpochCallback | None = None,
) -> dict[str, Any]:
    """Fit any method on a task, in place; returns the facts of the fit. Inputs that aren't finite are refused here.

    Args:
        method: Made for the task's classes.
        task: The few shots.
        settings: Of the gradient loop; None for the method's own defaults. Methods without gradients ignore them.
        progress: Called as training goes on.
        on_epoch: Called after every epoch of the gradient loop.
    """
    if method.fitted_names != tuple(task.class_names):
        raise DataError(f"{method.name} was made for other classes than the task's: make it with the task's names.")
    for inputs, what in ((task.train, "Training image"), (task.val, "Validation image")):
        if isinstance(inputs, TensorInputs):  # others are looked at as they are made
            for values in inputs.values:
                require_finite(values, what)
    method.set_classes(method.fitted_names)
    return method.fit(task, GradientLoop(settings or method.default_training or TrainingSettings(), progress, on_epoch))


class GradientLoop:
    """Trains a method's own parameters; usable as `types.TrainingLoop`.

    Args:
        settings: Epochs, batches, optimiser, schedule, precision.
        progress: Called as (what, steps done, steps in all), a few times a second.
        on_epoch: Called after every epoch, with its numbers.
    """

    def __init__(
        self,
        settings: TrainingSettings | None = None,
        progress: ProgressCallback | None = None,
        on_epoch: EpochCallback | None = None,
    ) -> None:
        self.settings = settings or TrainingSettings()
        self.progress, self.on_epoch = progress, on_epoch
        check_settings(self.settings)

    def with_settings(self, settings: TrainingSettings) -> GradientLoop:
        """The same loop under other settings."""
        return GradientLoop(settings, self.progress, self.on_epoch)

    def __call__(self, method: GradientMethod, task: FitTask) -> dict[str, Any]:
        """Train `method` on `task` in place.

        Ctrl-C ends training early; the method keeps what it has learned so far and the report says so.

        Returns:
            `epochs` and `steps` done, `interrupted`, `seconds`, `trained_parameters`, `batch_size`, `views`,
            `precision`, `skipped_steps` (whose gradients overflowed in fp16); per epoch `losses`, `accuracies`
            (fractions; None where the loss shows no logits) and `learning_rates`; `loss_terms` of the last epoch.

        Raises:
            DataError: No training images, or labels outside the classes.
            TrainingError: The loss isn't finite, there is nothing to train, or the backbone was changed.
        """
        _check_task(task)
        run = _Run(method, task, self.settings, self.progress, self.on_epoch)
        watch = _FrozenWatch(method.backbone)
        started = time.perf_counter()
        interrupted = False
        method.train()
        try:
            with seeded(task.seed, method.name, "training", device=run.device):
                run.train()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            method.eval()
            for parameter in run.parameters:
                parameter.grad = None
        watch.check(method.name)
        return {**run.report(), "interrupted": interrupted, "seconds": time.perf_counter() - started}


def check_settings(settings: TrainingSettings) -> None:
    """Refuse settings that can't be trained with, all problems in one message.

    Raises:
        ConfigError: One or more values are out of range or unknown.
    """
    problems = [
        f"{name} is {value!r}, but must be {wanted}"
        for name, value, wanted, ok in (
            ("epochs", settings.epochs, "at least 0", settings.epochs >= 0),
            ("steps_per_shot", settings.steps_per_shot, "at least 0", settings.steps_per_shot >= 0),
            ("batch_size", settings.batch_size, "at least 1", settings.batch_size >= 1),
            ("lr", settings.lr, "a positive number", 0 < settings.lr < math.inf),
            ("min_lr", settings.min_lr, "at least 0 and at most lr", 0 <= settings.min_lr <= settings.lr),
            ("warmup_epochs", settings.warmup_epochs, "at least 0", settings.warmup_epochs >= 0),
            ("warmup_lr", settings.warmup_lr, "0 or more", 0 <= settings.warmup_lr < math.inf),
            ("weight_decay", settings.weight_decay, "0 or more", 0 <= settings.weight_decay < math.inf),
            ("momentum", settings.momentum, "at least 0 and below 1", 0 <= settings.momentum < 1),
            ("eps", settings.eps, "a positive number", 0 < settings.eps < math.inf),
            ("colour_jitter", settings.colour_jitter, "at least 0 and at most 1", 0 <= settings.colour_jitter <= 1),
            ("optimiser", settings.optimiser, "sgd, adam or adamw", settings.optimiser in ("sgd", "adam", "adamw")),
            ("precision", settings.precision, "fp32, bf16 or fp16", settings.precision in ("fp32", "bf16", "fp16")),
            ("schedule", settings.schedule, f"one of {', '.join(SCHEDULES)}", settings.schedule in SCHEDULES),
        )
        if not ok
    ]
    if problems:
        raise ConfigError(f"These training settings can't be used: {'; '.join(problems)}.")


def _check_task(task: FitTask) -> None:
    labels = task.train.labels
    if not len(labels):
        raise DataError("There are no training images: give at least one image per class.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(task.class_names):
        raise DataError(
            f"Training labels run from {low} to {high}, but {len(task.class_names)} class names were given:"
            " labels must count from 0 in the order of the names."
        )


def epoch_batches(count: int, batch_size: int, numbers: torch.Generator, *, keep_last: bool = False) -> list[Tensor]:
    """Shuffled batches of indices, each int64 [batch].

    A last short one is left out, unless it is the only one or `keep_last` is set.
    """
    order = torch.randperm(count, generator=numbers)
    whole = count - count % batch_size if count >= batch_size and not keep_last else count
    return list(torch.split(order[:whole], batch_size))


def epoch_views(inputs: Inputs, epoch: int, fresh: bool, numbers: torch.Generator) -> Tensor:
    """Which view of each image an epoch shows, int64 [n].

    Fresh views are numbered by the epoch, so each is new; of stored ones an augmented one is drawn; without any it is
    the plain view 0.
    """
    count = len(inputs.labels)
    if fresh:
        return torch.full((count,), epoch + 1)
    if inputs.num_views <= 1:
        return torch.zeros(count, dtype=torch.long)
    return torch.randint(1, inputs.num_views, (count,), generator=numbers)


def select_views(inputs: Inputs, indices: Tensor, views: Tensor) -> Tensor:
    """Inputs `indices` [k], each in its own view `views` [k]; stacked in the order of `indices`."""
    kinds = sorted(set(views.tolist()))
    if len(kinds) == 1:
        return inputs.select(indices, kinds[0])
    places = [(views == view).nonzero()[:, 0] for view in kinds]
    parts = [inputs.select(indices[place], view) for place, view in zip(places, kinds, strict=True)]
    joined = torch.cat(parts)
    return joined[torch.cat(places).argsort().to(joined.device)]


class _FrozenWatch:
    """Proof that training left the backbone alone, from torch's own write counters: costs nothing."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._before = self._counters()

    def _counters(self) -> list[tuple[str, int, int]]:
        tensors = [*self._backbone.named_parameters(), *self._backbone.named_buffers()]
        return [(name, id(tensor), tensor._version) for name, tensor in tensors]

    def check(self, method: str) -> None:
        learning = [n for n, p in self._backbone.named_parameters() if p.requires_grad or p.grad is not None]
        changed = [old[0] for old, new in zip(self._before, self._counters(), strict=False) if old != new]
        if learning or changed:
            raise TrainingError(
                f"Training {method} touched the frozen backbone ({(learning or changed)[0]}): its features can't be"
                " trusted any more; load the backbone again. This is an error in the method, not in your data."
            )


@dataclass
class _Tally:
    """Sums over one epoch; they stay on the device until the epoch ends."""

    images: int = 0
    terms: dict[str, Tensor] = field(default_factory=dict)
    correct: Tensor | None = None

    def add(self, terms: dict[str, Tensor], logits: Tensor | None, labels: Tensor) -> None:
        self.images += len(labels)
        for name, term in terms.items():
            self.terms[name] = self.terms.get(name, 0.0) + term.detach() * len(labels)
        if logits is not None and logits.shape[0] == len(labels):
            correct = (logits.detach().argmax(dim=-1) == labels).sum()
            self.correct = correct if self.correct is None else self.correct + correct

    def means(self) -> dict[str, float]:
        return {name: float(total) / self.images for name, total in self.terms.items()}

    def accuracy(self) -> float | None:
        return None if self.correct is None else int(self.correct) / self.images


class _Run:
    """One training: what its steps share."""

    def __init__(
        self,
        method: GradientMethod,
        task: FitTask,
        settings: TrainingSettings,
        progress: ProgressCallback | None,
        on_epoch: EpochCallback | None,
    ) -> None:
        self.method, self.inputs, self.progress, self.on_epoch = method, task.train, progress, on_epoch
        self.frozen = task.frozen if method.wants_frozen else None
        self.device = method.backbone.device
        self.labels = task.train.labels.to(self.device)
        groups = method.parameter_groups()
        self.parameters = [parameter for group in groups for parameter in group.parameters]
        if not self.parameters:
            raise TrainingError(f"{method.name} has nothing to train with these settings.")
        self.rates = [1.0 if group.lr is None else group.lr / settings.lr for group in groups]
        self.optimiser = _optimiser(groups, settings)
        self.scaler = torch.amp.GradScaler(self.device.type, _FIRST_LOSS_SCALE, enabled=settings.precision == "fp16")
        self.batch_numbers = generator(task.seed, method.name, "batches")
        self.view_numbers = generator(task.seed, method.name, "views")
        count, size = len(task.train.labels), settings.batch_size
        self.steps_per_epoch = max(1, -(-count // size) if settings.keep_last else count // size)
        self.total_steps = settings.epochs * self.steps_per_epoch
        if settings.steps_per_shot and not settings.epochs:
            shots = int(torch.bincount(task.train.labels.cpu()).max())
            self.total_steps = settings.steps_per_shot * shots
            settings = replace(settings, epochs=-(-self.total_steps // self.steps_per_epoch))
        self.settings = settings
        self.steps = self.skipped_steps = 0
        self.history: list[tuple[float, float | None, float]] = []
        self.last_terms: dict[str, float] = {}
        self._last_shown = -math.inf
        self._logits: Tensor | None = None

    def train(self) -> None:
        """All epochs; what is done stays counted if it is interrupted."""
        hook = self.method.register_forward_hook(self._keep_logits)
        try:
            for epoch in range(self.settings.epochs):
                self._epoch(epoch)
                if self.method.enough:
                    break
        finally:
            hook.remove()

    def _keep_logits(self, _module: Any, _inputs: Any, output: Any) -> None:
        """The accuracy shown is that of the logits the loss was computed from: no second forward pass."""
        if self._logits is None and isinstance(output, Tensor) and output.dim() == 2:
            self._logits = output

    def _epoch(self, epoch: int) -> None:
        views = epoch_views(self.inputs, epoch, self.settings.fresh_views, self.view_numbers)
        batches = epoch_batches(
            len(views), self.settings.batch_size, self.batch_numbers, keep_last=self.settings.keep_last
        )[: self.total_steps - self.steps]
        tally, rate = _Tally(), 0.0
        for step, indices in enumerate(batches):
            rate = learning_rate(self.settings, epoch, step, self.steps_per_epoch, self.total_steps)
            inputs = select_views(self.inputs, indices, views[indices]).to(self.device)
            labels = self.labels[indices.to(self.device)]
            given = {}
            if self.frozen is not None:
                given["frozen"] = select_views(self.frozen, indices, views[indices]).to(self.device)
            self._logits = None
            terms = self._step(inputs, labels, rate, epoch, given)
            tally.add(terms, self._logits, labels)
            self.steps += 1
            self._show(tally, epoch, rate, done=step == len(batches) - 1)
        self.last_terms = tally.means()
        loss, accuracy = sum(self.last_terms.values()), tally.accuracy()
        self.history.append((loss, accuracy, rate))
        if self.on_epoch is not None:
            numbers = {"loss": loss, "learning_rate": rate}
            if accuracy is not None:
                numbers["accuracy"] = accuracy
            if len(self.last_terms) > 1:
                numbers |= {f"loss/{name}": share for name, share in self.last_terms.items()}
            self.on_epoch(self.method.name, numbers)
        self.method.after_epoch(epoch, self.settings.epochs)

    def _step(
        self, inputs: Tensor, labels: Tensor, rate: float, epoch: int, given: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        for group, share in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = share * rate
        self.optimiser.zero_grad(set_to_none=True)
        with _autocast(self.device, self.settings.precision):
            terms = self.method.losses(inputs, labels, **given)
            loss = total_loss(terms)
        if not bool(torch.isfinite(loss)):  # before the step: the method keeps its last good values
            raise TrainingError(
                f"{self.method.name}'s loss became {float(loss.detach())} in epoch {epoch + 1}, step {self.steps + 1},"
                f" at learning rate {rate:.2g}: try a lower lr or precision fp32, and look for inputs that aren't"
                " finite."
            )
        self.method.backward(terms, self.scaler.scale)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.skipped_steps += int(self.scaler.get_scale() < scale)
        return terms

    def _show(self, tally: _Tally, epoch: int, rate: float, *, done: bool) -> None:
        now = time.perf_counter()
        if self.progress is None or (now - self._last_shown < _PROGRESS_SECONDS and not done):
            return
        self._last_shown = now
        accuracy = tally.accuracy()
        shown = "" if accuracy is None else f", accuracy {100 * accuracy:.1f} %"
        what = f"{self.method.name} epoch {epoch + 1}/{self.settings.epochs}: loss {sum(tally.means().values()):.4f}"
        self.progress(f"{what}{shown}, lr {rate:.2g}", self.steps, self.total_steps)

    def report(self) -> dict[str, Any]:
        """What was done, in plain values."""
        return {
            "epochs": len(self.history),
            "steps": self.steps,
            "trained_parameters": sum(p.numel() for p in self.parameters),
            "batch_size": min(self.settings.batch_size, len(self.labels)),
            "views": "fresh" if self.settings.fresh_views else self.inputs.num_views - 1,
            "precision": self.settings.precision,
            "skipped_steps": self.skipped_steps,
            "losses": [loss for loss, _, _ in self.history],
            "accuracies": [accuracy for _, accuracy, _ in self.history],
            "learning_rates": [rate for _, _, rate in self.history],
            "loss_terms": self.last_terms,
        }


def _optimiser(groups: Sequence[ParameterGroup], settings: TrainingSettings) -> torch.optim.Optimizer:
    """The optimiser over a method's groups; what a group leaves open comes from the settings."""
    given: list[dict[str, Any]] = []
    for group in groups:
        options: dict[str, Any] = {"params": list(group.parameters)}
        if group.weight_decay is not None:
            options["weight_decay"] = group.weight_decay
        if group.betas is not None and settings.optimiser != "sgd":
            options["betas"] = group.betas
        given.append(options)
    if settings.optimiser == "sgd":
        return torch.optim.SGD(given, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
    # adam's decay is part of the gradient, adamw's is taken off the weights beside it
    kind = torch.optim.Adam if settings.optimiser == "adam" else torch.optim.AdamW
    return kind(given, lr=settings.lr, eps=settings.eps, weight_decay=settings.weight_decay)


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)
