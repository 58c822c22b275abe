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
from adaptkit.errors import ConfigError, DataError, TrainingError, UnsupportedError
from adaptkit.methods.base import GradientMethod, Method, ParameterGroup, require_finite, total_loss
from adaptkit.training.checkpoints import (
    SCHEMA,
    Checkpoints,
    Facts,
    Saved,
    load_optimiser,
    optimiser_tensors,
    random_states,
    set_random_states,
)
from adaptkit.training.processes import current, sum_step
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
    checkpoints: Checkpoints | None = None,
) -> dict[str, Any]:
    """Fit any method on a task, in place; returns the facts of the fit. Inputs that aren't finite are refused here.

    Args:
        method: Made for the task's classes.
        task: The few shots.
        settings: Of the gradient loop; None for the method's own defaults. Methods without gradients ignore them.
        progress: Called as training goes on.
        on_epoch: Called after every epoch of the gradient loop.
        checkpoints: Where the gradient loop keeps checkpoints, and goes on from; None for none.
    """
    if method.fitted_names != tuple(task.class_names):
        raise DataError(f"{method.name} was made for other classes than the task's: make it with the task's names.")
    for inputs, what in ((task.train, "Training image"), (task.val, "Validation image")):
        if isinstance(inputs, TensorInputs):  # others are looked at as they are made
            for values in inputs.values:
                require_finite(values, what)
    method.set_classes(method.fitted_names)
    settings = settings or method.default_training or TrainingSettings()
    return method.fit(task, GradientLoop(settings, progress, on_epoch, checkpoints))


class GradientLoop:
    """Trains a method's own parameters; usable as `types.TrainingLoop`.

    Args:
        settings: Epochs, batches, optimiser, schedule, precision.
        progress: Called as (what, steps done, steps in all), a few times a second.
        on_epoch: Called after every epoch, with its numbers.
        checkpoints: Where checkpoints are kept, and gone on from; None for none.
    """

    def __init__(
        self,
        settings: TrainingSettings | None = None,
        progress: ProgressCallback | None = None,
        on_epoch: EpochCallback | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.settings = settings or TrainingSettings()
        self.progress, self.on_epoch, self.checkpoints = progress, on_epoch, checkpoints
        check_settings(self.settings)

    def with_settings(self, settings: TrainingSettings) -> GradientLoop:
        """The same loop under other settings."""
        return GradientLoop(settings, self.progress, self.on_epoch, self.checkpoints)

    def __call__(self, method: GradientMethod, task: FitTask) -> dict[str, Any]:
        """Train `method` on `task` in place.

        Ctrl-C ends training early; the method keeps what it has learned so far and the report says so.

        Returns:
            `epochs` and `steps` done, `interrupted`, `seconds`, `trained_parameters`, `batch_size`, `views`,
            `precision`, `skipped_steps` (whose gradients overflowed in fp16); per epoch `losses`, `accuracies`
            (fractions; None where the loss shows no logits) and `learning_rates`; `loss_terms` of the last epoch;
            `resumed_at`, the step after which a checkpoint was gone on from, where one was.

        Raises:
            DataError: No training images, or labels outside the classes.
            TrainingError: The loss isn't finite, there is nothing to train, or the backbone was changed.
            UnsupportedError: Several processes train together, and the method can't share batches.
        """
        _check_task(task)
        run = _Run(method, task, self.settings, self.progress, self.on_epoch, self.checkpoints)
        watch = _FrozenWatch(method.backbone)
        started = time.perf_counter()
        interrupted = False
        method.train()
        try:
            own = [f"process {run.processes.rank}"] * (not run.processes.main)  # each draws its own dropout
            with seeded(task.seed, method.name, "training", *own, device=run.device):
                run.train()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            method.eval()
            for parameter in run.parameters:
                parameter.grad = None
        watch.check(method.name)
        return {
            **run.report(),
            "interrupted": interrupted,
            "seconds": run.seconds_before + time.perf_counter() - started,
        }


def check_shared(method: GradientMethod | type[GradientMethod]) -> None:
    """Refuse to train a method in several processes that can't share its batches.

    Raises:
        UnsupportedError: There are several, and it can't.
    """
    if current().count > 1 and not method.shares_batches:
        raise UnsupportedError(
            f"{method.name} can't share a batch among {current().count} processes: start it in one. The mllm- methods"
            " that train can."
        )


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

    def add(self, terms: dict[str, Tensor], correct: Tensor | None, images: int) -> None:
        self.images += images
        for name, term in terms.items():
            self.terms[name] = self.terms.get(name, 0.0) + term.detach() * images
        if correct is not None:
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
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.checkpoints, self.processes = checkpoints, current()
        check_shared(method)
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
        self.seconds_before, self._began = 0.0, time.perf_counter()
        self.resumed_at: int | None = None
        self._loop, self._said_due = 0, False

    def train(self) -> None:
        """All epochs; what is done stays counted if it is interrupted."""
        hook = self.method.register_forward_hook(self._keep_logits)
        epoch, done, tally = 0, 0, _Tally()
        try:
            if self.checkpoints is not None:
                self._loop, saved = self.checkpoints.begin()
                self._check_together(0 if saved is None else saved.facts.steps)
                if saved is not None:
                    epoch, done, tally = self._restore(saved)
            while epoch < self.settings.epochs and not self.method.enough:
                self._epoch(epoch, done, tally)
                epoch, done, tally = epoch + 1, 0, _Tally()
        finally:
            hook.remove()

    def _keep_logits(self, _module: Any, _inputs: Any, output: Any) -> None:
        """The accuracy shown is that of the logits the loss was computed from: no second forward pass."""
        if self._logits is None and isinstance(output, Tensor) and output.dim() == 2:
            self._logits = output

    def _epoch(self, epoch: int, done: int, tally: _Tally) -> None:
        """Train an epoch, of which `done` steps were done before a restart and are in the tally."""
        self._drawn_from = (self.batch_numbers.get_state(), self.view_numbers.get_state())
        views = epoch_views(self.inputs, epoch, self.settings.fresh_views, self.view_numbers)
        batches = epoch_batches(
            len(views), self.settings.batch_size, self.batch_numbers, keep_last=self.settings.keep_last
        )[: self.total_steps - self.steps + done]
        rate = 0.0
        for step, indices in enumerate(batches):
            if step < done:
                continue
            rate = learning_rate(self.settings, epoch, step, self.steps_per_epoch, self.total_steps)
            terms, correct = self._step(indices, views, rate, epoch)
            tally.add(terms, correct, len(indices))
            self.steps += 1
            self._show(tally, epoch, rate, done=step == len(batches) - 1)
            if self.checkpoints is not None and step < len(batches) - 1 and self._due():
                self._save(self.checkpoints, epoch, step + 1, tally)
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
        if self.checkpoints is not None and epoch < self.settings.epochs - 1 and self._due():
            self._drawn_from = (self.batch_numbers.get_state(), self.view_numbers.get_state())
            self._save(self.checkpoints, epoch + 1, 0, _Tally())

    def _step(self, indices: Tensor, views: Tensor, rate: float, epoch: int) -> tuple[dict[str, Tensor], Tensor | None]:
        """One step on a batch; its loss terms, and how many of its images were answered right, where that is known."""
        for group, share in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = share * rate
        self.optimiser.zero_grad(set_to_none=True)
        self._logits = None
        if self.processes.count == 1:
            terms, labels = self._losses(indices, views)
            self._check_loss(total_loss(terms), rate, epoch)  # before the step: the method keeps its last good values
            self.method.backward(terms, self.scaler.scale)
            correct = self._correct(labels)
        else:
            terms, correct = self._shared_step(indices, views)
            self._check_loss(total_loss(terms), rate, epoch)
        self.method.before_step(self.scaler.scale)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.skipped_steps += int(self.scaler.get_scale() < scale)
        return terms, correct

    def _losses(self, indices: Tensor, views: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Loss terms of some images, and their labels."""
        inputs = select_views(self.inputs, indices, views[indices]).to(self.device)
        labels = self.labels[indices.to(self.device)]
        given = {}
        if self.frozen is not None:
            given["frozen"] = select_views(self.frozen, indices, views[indices]).to(self.device)
        with _autocast(self.device, self.settings.precision):
            return self.method.losses(inputs, labels, **given), labels

    def _shared_step(self, indices: Tensor, views: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """Gradients, loss terms and right answers of a batch of which this process computes its share."""
        own = self.processes.share(indices)
        # a process without a share computes along: others may wait for it in the middle of a layer
        terms, labels = self._losses(own if len(own) else indices[:1], views)
        self.method.backward(terms, self.scaler.scale)
        weight = self.method.share_weight(labels) if len(own) else 0.0
        due = self.checkpoints is not None and self.checkpoints.due
        found = sum_step(self.processes, self.parameters, terms, self._correct(labels), weight, due)
        self._said_due = found.due
        return found.terms, found.correct

    def _due(self) -> bool:
        """Whether a checkpoint is due; of several processes the first decides."""
        if self.processes.count > 1:
            return self._said_due
        return self.checkpoints is not None and self.checkpoints.due

    def _correct(self, labels: Tensor) -> Tensor | None:
        logits = self._logits
        if logits is None or logits.shape[0] != len(labels):
            return None
        return (logits.detach().argmax(dim=-1) == labels).sum()

    def _check_loss(self, loss: Tensor, rate: float, epoch: int) -> None:
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"{self.method.name}'s loss became {float(loss.detach())} in epoch {epoch + 1}, step {self.steps + 1},"
                f" at learning rate {rate:.2g}: try a lower lr or precision fp32, and look for inputs that aren't"
                " finite."
            )

    def _show(self, tally: _Tally, epoch: int, rate: float, *, done: bool) -> None:
        now = time.perf_counter()
        if self.progress is None or (now - self._last_shown < _PROGRESS_SECONDS and not done):
            return
        self._last_shown = now
        accuracy = tally.accuracy()
        shown = "" if accuracy is None else f", accuracy {100 * accuracy:.1f} %"
        what = f"{self.method.name} epoch {epoch + 1}/{self.settings.epochs}: loss {sum(tally.means().values()):.4f}"
        self.progress(f"{what}{shown}, lr {rate:.2g}", self.steps, self.total_steps)

    # --- going on after a crash ---------------------------------------------------------------------------------------

    def _save(self, checkpoints: Checkpoints, epoch: int, done: int, tally: _Tally) -> None:
        """Write a checkpoint in which `done` steps of an epoch are done."""
        states = [random_states(self.device)]
        if self.processes.count > 1:
            states = self.processes.gathered(states[0])
        if not self.processes.main:
            return
        tensors = {
            f"random.{rank}.{name}": value for rank, (own, _) in enumerate(states) for name, value in own.items()
        }
        tensors |= {f"parameter.{place}": value for place, value in enumerate(self.parameters)}
        tensors |= {f"buffer.{name}": value for name, value in self.method.named_buffers()}
        tensors |= {f"method.{name}": value for name, value in self.method.training_state().items()}
        tensors |= {f"optimiser.{name}": value for name, value in optimiser_tensors(self.optimiser).items()}
        tensors |= {f"term.{name}": value for name, value in tally.terms.items()}
        tensors |= {} if tally.correct is None else {"correct": tally.correct}
        tensors["batches"], tensors["views"] = self._drawn_from
        tensors["generator"] = self.method.generator.get_state()
        facts = Facts(
            SCHEMA, checkpoints.identity, checkpoints.processes, self.method.name, self._loop, epoch, done, self.steps,
            self.skipped_steps, tally.images, self.seconds_before + time.perf_counter() - self._began,
            tuple(self.history), self.last_terms, self.scaler.state_dict(),
            {str(rank): plain for rank, (_, plain) in enumerate(states)},
        )  # fmt: skip
        checkpoints.write(facts, tensors)

    def _check_together(self, steps: int) -> None:
        """Refuse to go on from different places.

        Raises:
            TrainingError: The processes found different checkpoints.
        """
        if self.processes.count > 1 and len(set(self.processes.gathered(steps))) > 1:
            raise TrainingError(
                "The processes found different checkpoints: their folder must be one that all of them see, on every"
                " machine."
            )

    def _restore(self, saved: Saved) -> tuple[int, int, _Tally]:
        """Take over a checkpoint; the epoch to go on with, its steps that are done, and their tally."""
        facts, tensors = saved
        own: dict[str, Tensor] = {f"parameter.{place}": value for place, value in enumerate(self.parameters)}
        own |= {f"buffer.{name}": value for name, value in self.method.named_buffers()}
        wrong = [name for name, value in own.items() if name not in tensors or tensors[name].shape != value.shape]
        if wrong or facts.method != self.method.name:
            raise TrainingError(
                f"The checkpoint of {facts.method} doesn't fit {self.method.name} as this release builds it"
                f" ({', '.join(wrong[:1]) or 'another method'}): say --overwrite to train anew."
            )
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(tensors[name])

        def below(start: str) -> dict[str, Tensor]:
            return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}

        self.method.load_training_state(below("method."))
        load_optimiser(self.optimiser, below("optimiser."))
        self.scaler.load_state_dict(facts.scaler)
        self.batch_numbers.set_state(tensors["batches"])
        self.view_numbers.set_state(tensors["views"])
        self.method.generator.set_state(tensors["generator"])
        rank = self.processes.rank
        set_random_states(self.device, below(f"random.{rank}."), facts.random[str(rank)])
        self.steps, self.skipped_steps = facts.steps, facts.skipped_steps
        self.history, self.last_terms = list(facts.history), dict(facts.last_terms)
        self.seconds_before, self.resumed_at = facts.seconds, facts.steps
        terms = {name: value.to(self.device) for name, value in below("term.").items()}
        correct = tensors["correct"].to(self.device) if "correct" in tensors else None
        return facts.epoch, facts.step, _Tally(facts.images, terms, correct)

    def report(self) -> dict[str, Any]:
        """What was done, in plain values."""
        return {
            **({} if self.resumed_at is None else {"resumed_at": self.resumed_at}),
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
