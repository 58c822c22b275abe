"""Cross-modal adaptation: texts are training examples of their class, in every batch as many as images.

A linear head on unit features of both modalities, optionally behind a trained part of the image tower or an adapter,
which the variants bring. Shared by `cross-modal` and `cross-modal-partial`.

Source: arXiv 2301.06267, Sec. 3; cross_modal sheet; reference code linzhiqiu/cross_modal_adaptation, train.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.errors import ConfigError, TrainingError
from adaptkit.methods.adapters._residual import rows_of
from adaptkit.methods.adapters._texts import (
    check_few_shots,
    count_correct,
    mean_text_features,
    not_searched,
    text_examples,
)
from adaptkit.methods.base import Method, MethodConfig, progress_of, read_all
from adaptkit.methods.folding import Bottleneck, Fold, MatrixHead
from adaptkit.types import FitTask, Inputs, NovelClasses, TrainingLoop, TrainingSettings

WARMUP_STEPS = 50
WARMUP_LR = 1e-5


class Cell(NamedTuple):
    """One choice of the search."""

    lr: float
    weight_decay: float
    batch_size: int


@dataclass(frozen=True)
class HeadConfig(MethodConfig):
    """Settings that all cross-modal variants share."""

    wise: float = field(
        default=0.0,
        metadata={"help": "WiSE-FT: share of zero-shot's rows in the trained head (0.5 in the paper; 0 leaves it)."},
    )
    text_examples: bool = field(
        default=True, metadata={"help": "Train on texts beside images; without, the uni-modal baseline."}
    )
    search: bool = field(
        default=True,
        metadata={"help": "Choose lr, weight decay and batch size over the paper's grid on the validation shots."},
    )
    lr: float = field(default=1e-3, metadata={"help": "Learning rate without a search."})
    weight_decay: float = field(default=1e-2, metadata={"help": "Weight decay without a search."})
    batch_size: int = field(default=8, metadata={"help": "Examples a step without a search, half of them texts."})
    iterations: int = field(default=12_800, metadata={"help": "Steps of AdamW."})
    eval_every: int = field(
        default=100, metadata={"help": "Validation accuracy is taken after every so many steps; the best are kept."}
    )
    scale: float = field(default=100.0, metadata={"help": "Factor of the cosine; a constant."})

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}, but must be {wanted}"
            for name, wanted, ok in (
                ("wise", "between 0 (the trained head) and 1 (zero-shot)", 0 <= self.wise <= 1),
                ("lr", "a positive number", 0 < self.lr < math.inf),
                ("weight_decay", "0 or more", 0 <= self.weight_decay < math.inf),
                ("batch_size", "an even number of at least 2", self.batch_size >= 2 and self.batch_size % 2 == 0),
                ("iterations", "0 or more", self.iterations >= 0),
                ("eval_every", "at least 1", self.eval_every >= 1),
                ("scale", "a positive number", 0 < self.scale < math.inf),
            )
            if not ok
        ]
        if problems:
            raise ConfigError(f"These settings can't be used: {'; '.join(problems)}.")


@dataclass(frozen=True)
class Examples:
    """Labelled rows that a head trains on or is tested on; `select` gives what `image_features` takes."""

    select: Callable[[Tensor], Tensor]
    labels: Tensor


class Cycle:
    """Shuffled batches of row indices without end; a last short one of a pass is left out."""

    def __init__(self, rows: int, size: int, numbers: torch.Generator) -> None:
        self.rows, self.size, self.numbers = rows, min(size, rows), numbers
        self._batches: list[Tensor] = []

    def take(self) -> Tensor:
        if not self._batches:
            order = torch.randperm(self.rows, generator=self.numbers)
            whole = self.rows - self.rows % self.size
            self._batches = list(torch.split(order[:whole], self.size))[::-1]
        return self._batches.pop()


def rate_at(step: int, lr: float, iterations: int) -> float:
    """Learning rate of a step: 50 steps of linear warm-up from 1e-5, then a cosine over `iterations`.

    Example:
        >>> [rate_at(step, 1e-3, 12_800) for step in (0, 25, 50)]
        [1e-05, 0.0005, 0.001]
    """
    if step < WARMUP_STEPS:
        return lr * step / WARMUP_STEPS if step else WARMUP_LR
    return lr * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / iterations)) / 2


@dataclass
class _Trained:
    """What training one cell gave."""

    cell: Cell
    right: int = -1
    steps: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    interrupted: bool = False


class CrossModalMethod(Method):
    """scale · head · unit feature, for images and texts alike.

    Attributes:
        head: [classes, dim], unit rows at first; unseen classes have the row it starts from.
        searched: The grid: learning rates, weight decays, batch sizes.
    """

    config_class = HeadConfig
    config: HeadConfig
    novel_classes: NovelClasses = "synthesised"
    # read for its views only: the whole image, mirrored or not; the reference's second view is always mirrored
    default_training = TrainingSettings(epochs=0, views=1, crop_scale=1.0)
    searched: tuple[Sequence[float], Sequence[float], Sequence[int]]
    head: nn.Parameter
    _steps: int
    _zero_shot_rows_memo: tuple[Any, Tensor] | None = None

    def build(self) -> None:
        self.head = nn.Parameter(self.zero_shot_rows(self.fitted_names).clone())
        self._steps = self.config.iterations

    def zero_shot_rows(self, names: Sequence[str]) -> Tensor:
        """Rows that a head starts from: the mean of unnormalised text features, normalised, [classes, dim]."""
        key = (tuple(names), self.texts_key)
        if self._zero_shot_rows_memo is None or self._zero_shot_rows_memo[0] != key:
            rows = F.normalize(mean_text_features(self.backbone, names, self.templates), dim=-1)
            self._zero_shot_rows_memo = (key, rows)
        return self._zero_shot_rows_memo[1]

    # --- what a variant fills in --------------------------------------------------------------------------------------

    def examples(self, inputs: Inputs, views: int) -> Examples:
        """Rows of all images in the first `views` views."""
        values = torch.cat([read_all(inputs, view) for view in range(views)]).to(self.backbone.device)
        return Examples(lambda rows: values[rows.to(values.device)], inputs.labels.repeat(views))

    def image_features(self, selected: Tensor) -> Tensor:
        """Image features [batch, dim] of what `Examples.select` gives."""
        return selected

    def mixed(self, unit: Tensor) -> Tensor:
        """What the head sees of unit features [batch, dim] of either modality."""
        return unit

    # --- logits -------------------------------------------------------------------------------------------------------

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head_logits(inputs, self.current_head())

    def current_head(self) -> Tensor:
        """Rows of the current classes, [classes, dim]."""
        if self.class_names == self.fitted_names:
            return self.head
        fitted = set(self.fitted_names)
        rows = rows_of(self.head, self.fitted_names, self.class_names)
        if fitted.issuperset(self.class_names):
            return rows
        seen = torch.tensor([[name in fitted] for name in self.class_names], device=rows.device)
        return torch.where(seen, rows, self.zero_shot_rows(self.class_names))

    def head_logits(self, features: Tensor, head: Tensor) -> Tensor:
        """scale · head · mixed unit feature: [batch, dim] to [batch, classes], fp32, also under autocast."""
        with torch.autocast(features.device.type, enabled=False):
            return self.config.scale * F.linear(self.mixed(F.normalize(features.float(), dim=-1)), head)

    def fold_mixing(self) -> Bottleneck | None:
        """What `mixed` does, from unnormalised features on; None where the head sees plain unit features."""
        return None

    def fold_tower(self) -> nn.Module | None:
        """The adapted image tower; None where it is the frozen backbone's."""
        return None

    def fold(self) -> Fold:
        mixing = self.fold_mixing()
        head = MatrixHead(self.current_head(), scale=self.config.scale, normalise=mixing is None)
        return Fold(head if mixing is None else nn.Sequential(mixing, head), self.fold_tower())

    def batch_logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Logits of selected image examples, then of text features [texts, dim], among the fitted classes."""
        return self.head_logits(torch.cat([self.image_features(images), texts]), self.head)

    # --- fitting ------------------------------------------------------------------------------------------------------

    def fit(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        """Train each cell of the grid, keep the steps and the cell with the best accuracy on `task.val`.

        Without validation images the settings' own cell is trained to its end.
        """
        self.set_classes(self.fitted_names)
        check_few_shots(self.name, task.train.labels, task.class_names)
        images = self.examples(task.train, task.train.num_views)
        val = None if task.val is None or not len(task.val.labels) else self.examples(task.val, 1)
        why = not_searched(self.config.search, task.val)
        cells = [Cell(self.config.lr, self.config.weight_decay, self.config.batch_size)] if why else self.cells()
        with torch.no_grad():
            self.head.copy_(self.zero_shot_rows(self.fitted_names))
        start = {key: value.clone() for key, value in self.adapter_state().items()}
        self._steps = self._asked_steps(loop, len(images.labels))
        best: _Trained | None = None
        for number, cell in enumerate(cells):
            self.load_state_dict(start)
            progress = _cell_progress(loop, self.name, number, len(cells), self._steps)
            trained = self.train_cell(cell, images, val, task.seed, progress)
            if best is None or trained.right > best.right:  # the first of equals
                best = trained
            if trained.interrupted:
                best.interrupted = True
                break
        return self._finish(best or _Trained(cells[0]), len(cells), val, why)

    def _asked_steps(self, loop: TrainingLoop | None, images: int) -> int:
        """The settings' iterations, unless the loop is asked for a number of epochs: passes over the images then."""
        epochs = 0 if loop is None else loop.settings.epochs
        return epochs * max(1, images // (self.config.batch_size // 2)) if epochs else self.config.iterations

    def cells(self) -> list[Cell]:
        """The grid; batches whose text half isn't smaller than the number of texts are left out where others fit."""
        every = [Cell(*cell) for cell in itertools.product(*self.searched)]
        texts = len(self.fitted_names) * len(self.templates)
        fitting = [cell for cell in every if not self.config.text_examples or cell.batch_size // 2 < texts]
        smallest = min(cell.batch_size for cell in every)
        return fitting or [cell for cell in every if cell.batch_size == smallest]

    def _finish(self, best: _Trained, tried: int, val: Examples | None, why: dict[str, Any]) -> dict[str, Any]:
        self.load_state_dict(best.state)
        self.blend_with_zero_shot(self.config.wise)
        facts: dict[str, Any] = {**best.cell._asdict(), "steps": best.steps, "losses": best.losses, **why}
        if val is not None:  # also where only the step is chosen
            images = len(val.labels)
            facts |= {"searched": True, "settings_tried": tried, "val_images": images}
            facts["val_accuracy"] = best.right / images
            facts.pop("why_not_searched", None)
        return {**facts, "iterations": self._steps, "interrupted": best.interrupted}

    @torch.no_grad()
    def blend_with_zero_shot(self, share: float) -> None:
        """WiSE-FT: mix the zero-shot rows into the head, which isn't normalised again; what is before it stays."""
        self.head.lerp_(self.zero_shot_rows(self.fitted_names), share)

    def train_cell(
        self,
        cell: Cell,
        images: Examples,
        val: Examples | None,
        seed: int,
        progress: Callable[[int, float], None] = lambda step, loss: None,
    ) -> _Trained:
        """Train with one cell's settings, and remember the steps with the best validation accuracy, or the last.

        Raises:
            TrainingError: The loss isn't finite.
        """
        trained = _Trained(cell)
        optimiser = torch.optim.AdamW(self.parameters(), lr=cell.lr, weight_decay=cell.weight_decay)
        draw = self._batches(cell, images, seed)
        total = self._steps

        def keep(step: int) -> None:
            right = 0 if val is None else self.count_right(val)
            if val is None or right > trained.right:
                state = {key: value.clone() for key, value in self.adapter_state().items()}
                trained.right, trained.steps, trained.state = right, step, state

        step = 0
        try:
            for step in range(1, total + 1):
                loss = self.step(optimiser, draw(), rate_at(step - 1, cell.lr, total))
                if step % self.config.eval_every == 0 or step == total:
                    trained.losses.append(_finite(float(loss.detach()), self.name, cell))
                    progress(step, trained.losses[-1])
                    if val is not None:
                        keep(step)
        except KeyboardInterrupt:
            trained.interrupted = True
        finally:
            for parameter in self.parameters():
                parameter.grad = None
        if val is None or not trained.state:
            keep(step)
        return trained

    def _batches(self, cell: Cell, images: Examples, seed: int) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        """A function that gives image rows, text features and the labels of both, as many of the one as of the other.

        Batches are the same for every cell of their size.
        """
        texts = text_examples(self.backbone, self.fitted_names, self.templates)  # [templates, classes, dim]
        text_labels = torch.arange(texts.shape[1]).repeat(len(texts))
        texts = texts.flatten(0, 1)
        # Source: the sheet's "Optimisation" leaves open what to do where both halves can't be filled: both are cut
        half = min(cell.batch_size // 2, len(images.labels), len(texts))
        numbers = torch.Generator().manual_seed(seed % 2**63)
        image_rows = Cycle(len(images.labels), half if self.config.text_examples else cell.batch_size, numbers)
        text_rows = Cycle(len(texts), half, numbers)
        image_labels, device = images.labels.cpu(), self.head.device

        def draw() -> tuple[Tensor, Tensor, Tensor]:
            rows = image_rows.take()
            if not self.config.text_examples:
                return rows, texts[:0], image_labels[rows].to(device)
            chosen = text_rows.take()
            return rows, texts[chosen.to(device)], torch.cat([image_labels[rows], text_labels[chosen]]).to(device)

        def with_images() -> tuple[Tensor, Tensor, Tensor]:
            rows, text, labels = draw()
            return images.select(rows), text, labels

        return with_images

    def step(self, optimiser: torch.optim.Optimizer, batch: tuple[Tensor, Tensor, Tensor], lr: float) -> Tensor:
        """One step on image examples, text features and their labels; the loss before it."""
        for group in optimiser.param_groups:
            group["lr"] = lr
        images, texts, labels = batch
        optimiser.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = F.cross_entropy(self.batch_logits(images, texts), labels)
            torch.autograd.backward(loss)
        optimiser.step()
        return loss

    def count_right(self, examples: Examples) -> int:
        """How many image examples are answered right."""

        def logits_of(rows: Tensor) -> Tensor:
            return self.head_logits(self.image_features(examples.select(rows)), self.head)

        return count_correct(logits_of, len(examples.labels), examples.labels)

    def reference_key(self, key: str) -> str | None:
        return {"head": "head.weight"}.get(key)

    def load_reference_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over a released file's head (and adapter)."""
        super().load_reference_state(state)
        self.classes_changed()


def _finite(loss: float, name: str, cell: Cell) -> float:
    if not math.isfinite(loss):
        raise TrainingError(
            f"{name}'s loss became {loss} at learning rate {cell.lr:.2g}: try a lower lr, and look for inputs that"
            " aren't finite."
        )
    return loss


def _cell_progress(
    loop: TrainingLoop | None, name: str, number: int, cells: int, steps: int
) -> Callable[[int, float], None]:
    """How far all cells are, each shown with its loss."""
    show = progress_of(loop)

    def progress(step: int, loss: float) -> None:
        show(f"{name} {number + 1}/{cells}: loss {loss:.4f}", number * steps + step, cells * steps)

    return progress
