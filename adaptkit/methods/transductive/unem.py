"""UNEM: EM-Dirichlet unrolled, its weights and temperatures per iteration learned on validation tasks.

Source: arXiv 2412.16739; unem sheet; reference code ZhouLong0/UNEM-Transductive, u_em_dirichlet_embt.py.
Differs from the reference: the loss is -log of the right class's assignment (`loss="double-softmax"` is the published
one, which takes softmax of probabilities again); the concentrations' gradient is that of their fixed point, whose
memory doesn't grow with the steps (`differentiation="unrolled"` goes through the last steps themselves); a training
task's support are the training shots, as at test time, and its queries validation images (`support_from="validation"`
draws both from the validation images, never an image twice); Newton steps as in em-dirichlet. Without validation images
it is EM-Dirichlet with 10 iterations. For other numbers of classes the learned class weights scale with them.
`likelihood="gaussian"` is the paper's version for vision-only features (see `_gaussian`), which needs the shots.
Validation labels train its parameters: more labels than an inductive method sees, as the facts of the fit say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.errors import AdapterError, TrainingError
from adaptkit.methods import methods
from adaptkit.methods.base import progress_of, read_all
from adaptkit.methods.transductive._dirichlet import (
    EPS,
    MM_STEPS,
    DirichletMixture,
    Layer,
    implicit_maximum,
    log_likelihood,
    log_probabilities,
    match_clusters,
    maximise,
    mm_step,
    solve,
)
from adaptkit.methods.transductive._gaussian import gaussian_mixture
from adaptkit.methods.transductive._transduction import Support, TransductiveConfig, TransductiveMethod, positive
from adaptkit.types import FitTask, TrainingLoop

START_TEMPERATURE = 30.0
_NOTHING = -40.0
"""softplus of it is 4e-18: no class weight, or a temperature of exactly 1."""

_TRAIN_BYTES = 512e6  # bounds what a training step keeps for its backward pass


@dataclass(frozen=True)
class UNEMConfig(TransductiveConfig):
    """Settings of UNEM; the paper's, but for the clean loss and its smaller learning rate."""

    effective_classes: int = field(
        default=5, metadata={"help": "How many classes a batch is assumed to hold, in training too; 0: all of them."}
    )
    layers: int = field(default=10, metadata={"help": "EM iterations, each with weights of its own."})
    shared: bool = field(default=False, metadata={"help": "One weight and one temperature for all iterations."})
    learn_features: bool = field(default=True, metadata={"help": "Learn the factor of the cosines as well."})
    likelihood: Literal["dirichlet", "gaussian"] = field(
        default="dirichlet",
        metadata={"help": "Of zero-shot probabilities (dirichlet), or of features (gaussian).", "later": True},
    )
    matching: Literal["hungarian", "basic", "none"] = field(
        default="hungarian",
        metadata={"help": "Zero-shot: clusters get classes one to one, each its best one, or keep their number."},
    )
    learn: bool = field(default=True, metadata={"help": "Train on validation tasks, where there are images for them."})
    loss: Literal["nll", "double-softmax"] = field(
        default="nll", metadata={"help": "-log assignment, or softmax of the assignments again, as published."}
    )
    solver: Literal["newton", "mm"] = field(
        default="newton", metadata={"help": "Concentrations by Newton steps, or by the paper's slower MM updates."}
    )
    differentiation: Literal["implicit", "unrolled"] = field(
        default="implicit", metadata={"help": "Gradient of the fixed point, or through the last steps towards it."}
    )
    unrolled_steps: int = field(
        default=50, metadata={"help": "Last steps that unrolled differentiation goes through; 0: all of them."}
    )
    epochs: int = field(default=80, metadata={"help": "Passes over the training tasks."})
    lr: float = field(default=0.05, metadata={"help": "Adam's learning rate; halved after half of the epochs."})
    tasks: int = field(default=90, metadata={"help": "Training tasks, drawn once."})
    tasks_per_step: int = field(default=15, metadata={"help": "Tasks in an optimiser step."})
    task_images: int = field(default=75, metadata={"help": "Query images of a training task, at most."})
    support_from: Literal["train", "validation"] = field(
        default="train", metadata={"help": "Where a training task's support comes from."}
    )
    task_shots: int = field(default=4, metadata={"help": "Shots per class, with support from the validation images."})

    def limits(self) -> tuple[tuple[str, str, bool], ...]:
        counts = ("layers", "epochs", "tasks", "tasks_per_step", "task_images", "task_shots")
        choices = {
            "likelihood": ("dirichlet", "gaussian"),
            "matching": ("hungarian", "basic", "none"),
            "loss": ("nll", "double-softmax"),
            "differentiation": ("implicit", "unrolled"),
            "solver": ("newton", "mm"),
            "support_from": ("train", "validation"),
        }
        return (
            *((name, "at least 1", getattr(self, name) >= 1) for name in counts),
            *((name, f"one of {', '.join(known)}", getattr(self, name) in known) for name, known in choices.items()),
            ("lr", "a positive number", positive(self.lr)),
            ("use_support", "true with likelihood gaussian", self.use_support or self.likelihood != "gaussian"),
            ("unrolled_steps", "0 (all) or more", self.unrolled_steps >= 0),
        )


@dataclass(frozen=True)
class Tasks:
    """Training tasks of one size, as cosines with the class texts; as unit features where likelihood is gaussian.

    Args:
        query: [tasks, images, classes], or [tasks, images, dim].
        labels: int64 [tasks, images].
        support: [tasks, shots, classes], or [tasks, shots, dim]; None for zero-shot.
        support_labels: int64 [tasks, shots].
    """

    query: Tensor
    labels: Tensor
    support: Tensor | None = None
    support_labels: Tensor | None = None

    def part(self, chosen: Tensor) -> Tasks:
        """Some of the tasks."""
        support, labels = self.support, self.support_labels
        return Tasks(
            self.query[chosen],
            self.labels[chosen],
            None if support is None else support[chosen],
            None if labels is None else labels[chosen],
        )


def inverse_softplus(value: float) -> float:
    """x with softplus(x) = value.

    Example:
        >>> round(float(F.softplus(torch.tensor(inverse_softplus(2.0)))), 5)
        2.0
    """
    return _NOTHING if value <= 0 else value + math.log(-math.expm1(-value))


@methods.register("unem")
class UNEM(TransductiveMethod):
    """About 21 numbers are trained; the shots are kept.

    Attributes:
        feature_temperature: Factor of the cosines in the probabilities, []; where likelihood is gaussian, that of the
            features is its softplus.
        class_weights: Of the class proportions, through softplus, [layers] or [1].
        temperatures: Of the assignments, 1 + softplus, [layers] or [1].
    """

    name = "unem"
    config_class = UNEMConfig
    config: UNEMConfig

    def build(self) -> None:
        super().build()
        count = 1 if self.config.shared else self.config.layers
        learn = self.config.learn_features
        self.feature_temperature = nn.Parameter(torch.tensor(START_TEMPERATURE), requires_grad=learn)
        self.class_weights = nn.Parameter(torch.zeros(count))
        self.temperatures = nn.Parameter(torch.zeros(count))
        self._set(inverse_softplus(float(len(self.fitted_names) // self._assumed())), _NOTHING)

    def _assumed(self) -> int:
        return self.config.effective_classes or len(self.fitted_names)

    @torch.no_grad()
    def _set(self, class_weight: float, temperature: float) -> None:
        """Values before softplus, of all layers."""
        gaussian = self.config.likelihood == "gaussian"
        self.feature_temperature.fill_(inverse_softplus(START_TEMPERATURE**0.5) if gaussian else START_TEMPERATURE)
        self.class_weights.fill_(class_weight)
        self.temperatures.fill_(temperature)

    # --- answering ----------------------------------------------------------------------------------------------------

    def layers_for(self, classes: int) -> list[Layer]:
        """Weights per iteration, for a number of classes that may differ from the fitted one."""
        scale = classes / len(self.fitted_names)
        weights = F.softplus(self.class_weights.detach().double()) * scale
        temperatures = 1 + F.softplus(self.temperatures.detach().double())
        pairs = list(zip(weights.tolist(), temperatures.tolist(), strict=True))
        return [Layer(*pair) for pair in (pairs * self.config.layers if self.config.shared else pairs)]

    def assign(self, f: Tensor, text: Tensor, support: Support | None) -> Tensor:
        classes = len(text)
        if self.config.likelihood == "gaussian":
            return self._assign_gaussian(f, text, support)
        labelled = None if support is None else (support.features, support.one_hot(classes))
        temperature = float(self.feature_temperature.detach())
        mixture = DirichletMixture(self.chunks(f, classes), text, temperature, labelled, solver=self.config.solver)
        fitted = mixture.run(self.layers_for(classes))
        return fitted.log_u if support is not None else match_clusters(fitted, self.config.matching)

    def _assign_gaussian(self, f: Tensor, text: Tensor, support: Support | None) -> Tensor:
        parts = self.chunks(f, len(text) + f.shape[1])
        start = [self.cosine_logits(part, text).log_softmax(dim=-1) for part in parts]
        counts, sums = f.new_zeros(len(text)).double(), f.new_zeros(len(text), f.shape[1]).double()
        if support is not None:
            one_hot = support.one_hot(len(text))
            counts, sums = one_hot.sum(dim=0), one_hot.T @ support.features.double()
        layers = [(layer.balance, layer.temperature) for layer in self.layers_for(len(text))]
        return torch.cat(gaussian_mixture(parts, start, layers, self._feature_factor(), (counts, sums)))

    def _feature_factor(self) -> Tensor:
        return F.softplus(self.feature_temperature.double())

    # --- training -----------------------------------------------------------------------------------------------------

    def choose(self, task: FitTask, loop: TrainingLoop | None) -> dict[str, Any]:
        self._set(inverse_softplus(float(len(self.fitted_names) // self._assumed())), _NOTHING)
        if not self.config.learn:
            return {"searched": False, "why_not_searched": "learn is off"}
        tasks = self.draw_tasks(task)
        if tasks is None:
            why = "there aren't enough validation images for tasks of two classes"
            return {"searched": False, "why_not_searched": why}
        self._set(len(self.fitted_names) / self._assumed(), 1.0)
        losses = self.train_on(tasks, task.seed, loop)
        return {
            "searched": True,
            "settings_tried": 1,
            "val_images": 0 if task.val is None else len(task.val.labels),
            "val_labels_train_parameters": True,
            "tasks": len(tasks.labels),
            "task_images": tasks.labels.shape[1],
            "losses": losses,
            "feature_temperature": float(self.feature_temperature),
            "class_weights": F.softplus(self.class_weights.detach()).tolist(),
            "temperatures": (1 + F.softplus(self.temperatures.detach())).tolist(),
        }

    def draw_tasks(self, task: FitTask) -> Tasks | None:
        """Training tasks from the validation images; None if fewer than two classes have any."""
        if task.val is None or not len(task.val.labels):
            return None
        numbers = torch.Generator().manual_seed(task.seed % 2**63)
        device = self.backbone.device
        shown = self._shown(F.normalize(read_all(task.val), dim=-1).to(device))
        from_val = self.config.use_support and self.config.support_from == "validation"
        pools = [(task.val.labels == index).nonzero()[:, 0] for index in range(len(self.fitted_names))]
        # a class with one image has it as a query, and no shot
        shots = [min(self.config.task_shots, max(0, len(pool) - 1)) if from_val else 0 for pool in pools]
        sizes = torch.tensor([len(pool) - taken for pool, taken in zip(pools, shots, strict=True)])
        filled = (sizes > 0).nonzero()[:, 0]
        if len(filled) < 2:
            return None
        effective = min(self._assumed(), len(filled))
        images = min(self.config.task_images, int(sizes[filled].sort().values[:effective].sum()))
        drawn = [self._draw(pools, shots, filled, effective, images, numbers) for _ in range(self.config.tasks)]
        queries = torch.stack([query for query, _ in drawn])
        support, labels = self._task_support(shown, task.val.labels, torch.stack([chosen for _, chosen in drawn]))
        return Tasks(shown[queries.to(device)], task.val.labels[queries].to(device), support, labels)

    def _shown(self, f: Tensor) -> Tensor:
        """What the likelihood sees of unit features [images, dim]: they, or their cosines with the texts; float64."""
        return f.double() if self.config.likelihood == "gaussian" else f.double() @ self.zero_shot().double().T

    def _draw(
        self,
        pools: list[Tensor],
        shots: list[int],
        filled: Tensor,
        effective: int,
        images: int,
        numbers: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Query and support images of one task, indices of validation images."""
        chosen = set(filled[torch.randperm(len(filled), generator=numbers)[:effective]].tolist())
        query, support = [], []
        for index, (pool, taken) in enumerate(zip(pools, shots, strict=True)):
            order = pool[torch.randperm(len(pool), generator=numbers)]
            support.append(order[:taken])
            if index in chosen:
                query.append(order[taken:])
        together = torch.cat(query)
        return together[torch.randperm(len(together), generator=numbers)[:images]], torch.cat(support)

    def _task_support(self, shown: Tensor, labels: Tensor, drawn: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What is seen of the tasks' support, and its labels: drawn validation images, or the kept training shots."""
        if drawn.shape[1]:
            return shown[drawn.to(shown.device)], labels[drawn].to(shown.device)
        if not len(self.support):
            return None, None
        shots = self._shown(self.support)
        return shots.expand(len(drawn), -1, -1), self.support_labels.expand(len(drawn), -1)

    def unrolled(self, tasks: Tasks) -> Tensor:
        """Log-assignments [tasks, images, classes] of training tasks, differentiable with respect to the parameters."""
        if self.config.likelihood == "gaussian":
            return self._unrolled_gaussian(tasks)
        log_z = log_probabilities(tasks.query, self.feature_temperature)
        count, _, classes = log_z.shape
        support_mass, support_sums = log_z.new_zeros(count, classes), log_z.new_zeros(count, classes, classes)
        if tasks.support is not None and tasks.support_labels is not None:
            one_hot = F.one_hot(tasks.support_labels, classes).double()
            support_mass = one_hot.sum(dim=1)
            support_sums = one_hot.transpose(1, 2) @ log_probabilities(tasks.support, self.feature_temperature)
        log_u, alpha = log_z, torch.ones_like(support_sums)
        for weight, temperature in self._layers():
            u = log_u.exp()
            mass = u.sum(dim=1)  # [tasks, classes]
            total = mass + support_mass
            alive = (total > EPS)[..., None]
            y = (u.transpose(1, 2) @ log_z + support_sums) / total.clamp_min(EPS)[..., None]
            # an empty class keeps its concentrations; a target of its own keeps the update finite meanwhile
            alpha = torch.where(alive, self._maximum(alpha, torch.where(alive, y, -10.0)), alpha)
            v = torch.log(mass / log_z.shape[1] + EPS) + 1
            logits = log_likelihood(alpha, log_z) + weight * v[:, None]
            log_u = torch.log_softmax(logits / temperature, dim=-1)
        return log_u

    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        """Class weight and temperature of each iteration, differentiable."""
        weights = F.softplus(self.class_weights.double()).expand(self.config.layers)
        temperatures = 1 + F.softplus(self.temperatures.double()).expand(self.config.layers)
        return list(zip(weights, temperatures, strict=True))

    def _unrolled_gaussian(self, tasks: Tasks) -> Tensor:
        text = self.zero_shot()
        count, _, dim = tasks.query.shape
        counts, sums = tasks.query.new_zeros(count, len(text)), tasks.query.new_zeros(count, len(text), dim)
        if tasks.support is not None and tasks.support_labels is not None:
            one_hot = F.one_hot(tasks.support_labels, len(text)).double()
            counts, sums = one_hot.sum(dim=1), one_hot.transpose(1, 2) @ tasks.support
        start = self.cosine_logits(tasks.query, text).double().log_softmax(dim=-1)
        return gaussian_mixture([tasks.query], [start], self._layers(), self._feature_factor(), (counts, sums))[0]

    def _maximum(self, alpha: Tensor, y: Tensor) -> Tensor:
        if self.config.differentiation == "implicit":
            return implicit_maximum(alpha, y, self.config.solver)
        steps = self.config.unrolled_steps
        if not steps:
            return maximise(alpha, y)
        with torch.no_grad():
            alpha = solve(alpha, y, self.config.solver)
        for _ in range(steps):
            alpha = mm_step(alpha, y)
        return alpha

    def task_loss(self, tasks: Tasks) -> Tensor:
        """Mean loss of the tasks' queries, []."""
        log_u, labels = self.unrolled(tasks).flatten(0, 1), tasks.labels.flatten()
        if self.config.loss == "double-softmax":
            return F.cross_entropy(log_u.exp(), labels)
        return F.nll_loss(log_u, labels)

    def train_on(self, tasks: Tasks, seed: int, loop: TrainingLoop | None = None) -> list[float]:
        """Adam on the parameters; the mean loss of each epoch.

        Raises:
            TrainingError: The loss isn't finite.
        """
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimiser = torch.optim.Adam(trained, lr=self.config.lr)
        schedule = torch.optim.lr_scheduler.StepLR(optimiser, max(1, self.config.epochs // 2), gamma=0.5)
        losses = []
        for epoch in range(self.config.epochs):
            progress_of(loop)(f"{self.name}: training on validation tasks", epoch, self.config.epochs)
            total = 0.0
            for step in torch.split(torch.arange(len(tasks.labels)), self.config.tasks_per_step):
                optimiser.zero_grad()
                total += sum(self._backward(tasks.part(part), len(part) / len(step)) for part in self._parts(step))
                if not all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in trained):
                    raise TrainingError(f"{self.name}'s loss isn't finite in epoch {epoch}: lower lr.")
                optimiser.step()
            schedule.step()
            losses.append(total / math.ceil(len(tasks.labels) / self.config.tasks_per_step))
        optimiser.zero_grad()
        return losses

    def _backward(self, tasks: Tasks, share: float) -> float:
        with torch.enable_grad():
            loss = self.task_loss(tasks) * share
        torch.autograd.backward(loss)
        return float(loss.detach())

    def _parts(self, step: Tensor) -> Iterator[Tensor]:
        """The tasks of a step in parts whose backward pass fits the memory bound."""
        classes = len(self.fitted_names)
        copies = 8 if self.config.differentiation == "implicit" else 16 * (self.config.unrolled_steps or MM_STEPS)
        width = classes if self.config.likelihood == "dirichlet" else self.backbone.spec.embed_dim
        per_task = 8 * copies * self.config.layers * classes * (width + self.config.task_images)
        yield from torch.split(step, max(1, int(_TRAIN_BYTES / per_task)))

    # --- state --------------------------------------------------------------------------------------------------------

    def reference_key(self, key: str) -> str | None:
        return {"feature_temperature": "emb_t", "class_weights": "gamma", "temperatures": "t"}.get(key)

    def load_reference_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over released parameters: `emb_t`, and per layer `gamma.0` … and `t.0` … (or one `gamma`, one `t`)."""
        own = self.adapter_state()
        for key in ("feature_temperature", "class_weights", "temperatures"):
            theirs = str(self.reference_key(key))
            names = [theirs] if theirs in state else [f"{theirs}.{index}" for index in range(len(own[key].reshape(-1)))]
            missing = [name for name in names if name not in state]
            if missing:
                raise AdapterError(f"The checkpoint has no {missing[0]!r}: it was made with other settings.")
            values = torch.cat([state[name].reshape(-1).float() for name in names])
            if values.numel() != own[key].numel():
                raise AdapterError(
                    f"The checkpoint's {theirs!r} holds {values.numel()} values, not {own[key].numel()}."
                )
            own[key] = values.reshape(own[key].shape).to(own[key].device)
        self.load_adapter_state(own)
