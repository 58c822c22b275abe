"""TransCLIP: a Gaussian mixture over the batch, held to zero-shot predictions and to each image's neighbours.

Source: arXiv 2406.01837; transclip sheet; reference code MaxZanella/transduction-for-vlms, TransCLIP_solver.
Differs from the reference: classes are counted from the names, not from test labels; zero-shot predictions aren't
overwritten; each gamma starts afresh and is chosen on validation images taken as a batch of their own (the reference
gives each validation image its nearest test image's answer); the neighbours of shots are stacked in the images' order,
and none is dropped, since a shot isn't among the test images; neighbours are searched in chunks. `parity` brings back
the carried-over state and dropped neighbour ("aligned"), or these and the mixed-up rows ("published").
Classes without shots start from the images most sure of them, as all do without support. `start_from` puts another
method's probabilities in the place of zero-shot's (sheet, "Inputs"): that method is fitted first, on the same shots,
with its paper's settings and on plain views, and saved along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.errors import ConfigError
from adaptkit.methods import methods
from adaptkit.methods.base import Method, progress_of, read_all
from adaptkit.methods.transductive._transduction import Support, TransductiveConfig, TransductiveMethod, positive
from adaptkit.types import FitTask, TrainingLoop, TrainingSettings

TEMPERING = 50.0
"""Divides the likelihood; beside it, the sums over neighbours weigh 1/6."""

NEIGHBOUR_WEIGHT = 1 / 6
_SMALLEST_VARIANCE = 1e-10
_ABSENT = -100.0


@dataclass(frozen=True)
class TransCLIPConfig(TransductiveConfig):
    """Settings of TransCLIP; the paper's."""

    iterations: int = field(default=10, metadata={"help": "Rounds of assignments, centres and variance."})
    inner_iterations: int = field(default=5, metadata={"help": "Passes over the assignments in a round."})
    neighbours: int = field(default=3, metadata={"help": "Nearest images whose answers pull at an image's; 0: none."})
    confident: int = field(default=8, metadata={"help": "Most confident images that a class's centre starts from."})
    temperature: float = field(default=100.0, metadata={"help": "Factor of the cosines in zero-shot predictions."})
    text_weight: float = field(default=1.0, metadata={"help": "Weight of zero-shot predictions without support."})
    text_weight_support: float = field(default=0.5, metadata={"help": "Weight of zero-shot predictions with support."})
    gamma: float = field(default=0.02, metadata={"help": "Weight of the shots, before any search."})
    gammas: tuple[float, ...] = field(
        default=(0.002, 0.01, 0.02, 0.2), metadata={"help": "Weights of the shots that the search tries, in order."}
    )
    start_from: str = field(
        default="zero-shot",
        metadata={
            "help": "Whose predictions it starts from: a method that reads features and answers image by image.",
            "later": True,
        },
    )
    search: bool = field(default=True, metadata={"help": "Choose gamma on validation images, where there are any."})
    parity: Literal["none", "aligned", "published"] = field(
        default="none",
        metadata={"help": "Faults of the published few-shot code to bring back, for comparisons; none is right."},
    )

    def limits(self) -> tuple[tuple[str, str, bool], ...]:
        return (
            ("iterations", "0 or more", self.iterations >= 0),
            ("inner_iterations", "at least 1", self.inner_iterations >= 1),
            ("neighbours", "0 or more", self.neighbours >= 0),
            ("confident", "at least 1", self.confident >= 1),
            ("temperature", "a positive number", positive(self.temperature)),
            ("text_weight", "0 or more", self.text_weight == 0 or positive(self.text_weight)),
            ("text_weight_support", "0 or more", self.text_weight_support == 0 or positive(self.text_weight_support)),
            ("gamma", "a positive number", positive(self.gamma)),
            ("gammas", "positive numbers, at least one", bool(self.gammas) and all(map(positive, self.gammas))),
            ("parity", "none, aligned or published", self.parity in ("none", "aligned", "published")),
        )


# --- the graph --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Graph:
    """Directed edges to the nearest images of the batch.

    Args:
        index: Neighbours of each row, int64 [rows, neighbours].
        weight: Cosine to each, fp32 [rows, neighbours].
    """

    index: Tensor
    weight: Tensor

    def outgoing(self, z: Tensor) -> Tensor:
        """W z: the weighted sum over each row's neighbours, [rows, classes] of z [images, classes]."""
        out = z.new_zeros(len(self.index), z.shape[1])
        for column in range(self.index.shape[1]):  # never rows × neighbours × classes at once
            out += self.weight[:, column, None] * z[self.index[:, column]]
        return out

    def incoming(self, z: Tensor, images: int) -> Tensor:
        """Wᵀ z: the weighted sum over the rows whose neighbour an image is, [images, classes] of z [rows, classes]."""
        out = z.new_zeros(images, z.shape[1])
        for column in range(self.index.shape[1]):
            out.index_add_(0, self.index[:, column], self.weight[:, column, None] * z)
        return out


def nearest(rows: Sequence[Tensor], images: Tensor, count: int, *, themselves: bool, drop: int = 0) -> Graph:
    """The `count` nearest images of each row, in chunks.

    Args:
        rows: Unit features [n, dim], in parts.
        images: Unit features [images, dim].
        count: Neighbours wanted; fewer where there are fewer images.
        themselves: The rows are the images themselves, in order: an image is no neighbour of its own.
        drop: How many of the very nearest to leave out.
    """
    count = max(0, min(count, len(images) - int(themselves) - drop))
    found, start = [], 0
    for part in rows:
        similar = part @ images.T  # [part, images]
        if themselves:
            own = torch.arange(len(part), device=part.device)
            similar[own, own + start] = -torch.inf
        found.append(similar.topk(count + drop, dim=1))
        start += len(part)
    return Graph(
        torch.cat([top.indices[:, drop:] for top in found]), torch.cat([top.values[:, drop:] for top in found])
    )


# --- the solver -------------------------------------------------------------------------------------------------------


@dataclass
class Mixture:
    """State of the solver.

    Args:
        z: Assignments, fp32 [images, classes].
        log_z: Their logarithms.
        mu: Unit centres, float64 [classes, dim].
        variance: Shared by the classes, float64 [dim].
    """

    z: Tensor
    log_z: Tensor
    mu: Tensor
    variance: Tensor


class Solver:
    """Block updates on one batch.

    Args:
        f: Unit features [images, dim].
        log_text: Log predictions of zero-shot or of another method, fp32 [images, classes].
        support: None for zero-shot.
        config: The method's settings.
        chunk: Splits rows into parts of which so many float64 numbers a row fit the memory bound.
    """

    def __init__(
        self, f: Tensor, log_text: Tensor, support: Support | None, config: TransCLIPConfig, chunk: Any
    ) -> None:
        self.f, self.log_text, self.support, self.config, self._chunk = f, log_text, support, config, chunk
        self.images, self.classes = log_text.shape
        self.text_weight = config.text_weight if support is None else config.text_weight_support
        parity = config.parity != "none"
        self.graph = nearest(chunk(f, self.images), f, config.neighbours, themselves=True)
        self.from_support: Graph | None = None
        if support is not None:
            parts = chunk(support.features, self.images)
            self.from_support = nearest(parts, f, config.neighbours, themselves=False, drop=int(parity))
            # what the shots add never changes: their pull on images, their sums and counts
            self.pull = log_text.new_zeros(self.images, self.classes)
            labels = support.labels[:, None].expand_as(self.from_support.index)
            self.pull.index_put_((self.from_support.index, labels), self.from_support.weight, accumulate=True)
            features = support.features.double()
            self.shot_sums = features.new_zeros(self.classes, f.shape[1]).index_add_(0, support.labels, features)
            self.shot_counts = support.labels.bincount(minlength=self.classes).double()
            self.shot_squares = features.square().sum(dim=0)
        self.squares = sum(part.double().square().sum(dim=0) for part in chunk(f, f.shape[1])) / self.images

    def start(self) -> Mixture:
        """Zero-shot predictions, centres of shots or of the most confident images, and an even variance."""
        z = self.log_text.exp()
        top = z.topk(min(self.config.confident, self.images), dim=0)  # [confident, classes]
        means = torch.stack([weight @ self.f[rows] for weight, rows in zip(top.values.T, top.indices.T, strict=True)])
        mu = F.normalize(means.double(), dim=-1)
        if self.support is not None:
            mu = torch.where(self.shot_counts[:, None] > 0, F.normalize(self.shot_sums, dim=-1), mu)
        dim = self.f.shape[1]
        return Mixture(z, self.log_text, mu, torch.full((dim,), 1 / dim, dtype=torch.float64, device=self.f.device))

    def likelihood(self, state: Mixture) -> Tensor:
        """-1/2 sum_j (f - mu)² / variance, fp32 [images, classes]; the square is expanded, in float64."""
        inverse = 1 / state.variance
        scaled = state.mu * inverse
        own = 0.5 * (state.mu * scaled).sum(dim=1)  # [classes]
        parts = [
            (part.double() @ scaled.T - own - 0.5 * (part.double().square() @ inverse)[:, None]).float()
            for part in self._chunk(self.f, self.classes + self.f.shape[1])
        ]
        return torch.cat(parts)

    def neighbour_sums(self, z: Tensor) -> Tensor:
        """(W + Wᵀ) z, and the shots whose neighbours they are, [images, classes]."""
        if self.support is None or self.from_support is None:
            return self.graph.outgoing(z) + self.graph.incoming(z, self.images)
        if self.config.parity == "published":
            labels = self.support.one_hot(self.classes).float()
            # rows of the graph: shots first; rows of the assignments: images first; nobody put them in one order
            index = torch.cat([self.from_support.index, self.graph.index])
            weight = torch.cat([self.from_support.weight, self.graph.weight])
            mixed = Graph(index, weight)
            return mixed.incoming(torch.cat([z, labels]), self.images) + mixed.outgoing(z)[: self.images]
        sums = self.graph.outgoing(z) + self.graph.incoming(z, self.images)
        return sums + self.pull

    def assign(self, state: Mixture) -> None:
        """Update the assignments, all images in parallel."""
        base = self.text_weight * self.log_text + self.likelihood(state) / TEMPERING
        for _ in range(self.config.inner_iterations):
            state.log_z = torch.log_softmax(base + NEIGHBOUR_WEIGHT * self.neighbour_sums(state.z), dim=1)
            state.z = state.log_z.exp()

    def recentre(self, state: Mixture, gamma: float) -> None:
        """Update the centres; a class of no weight keeps its own."""
        sums, _ = self._weighted(state, gamma)
        norms = sums.norm(dim=1, keepdim=True)
        state.mu = torch.where(norms > 1e-30, sums / norms.clamp_min(1e-30), state.mu)

    def respread(self, state: Mixture, gamma: float) -> None:
        """Update the variance: the weighted mean of squared deviations from the centres."""
        sums, mass = self._weighted(state, gamma)
        squares = self.squares
        if self.support is not None:
            squares = squares + TEMPERING * gamma / len(self.support.features) * self.shot_squares
        deviation = squares - 2 * (sums * state.mu).sum(dim=0) + mass @ state.mu.square()
        state.variance = (deviation / mass.sum()).clamp_min(_SMALLEST_VARIANCE)

    def _weighted(self, state: Mixture, gamma: float) -> tuple[Tensor, Tensor]:
        """Weighted sums of features [classes, dim] and weights [classes] of images and shots."""
        sums = torch.zeros_like(state.mu)
        mass = sums.new_zeros(self.classes)
        parts = self._chunk(self.f, self.classes + self.f.shape[1])
        for part, z in zip(parts, torch.split(state.z, len(parts[0])), strict=True):
            sums, mass = sums + z.double().T @ part.double(), mass + z.double().sum(dim=0)
        sums, mass = sums / self.images, mass / self.images
        if self.support is not None:
            weight = TEMPERING * gamma / len(self.support.features)
            sums, mass = sums + weight * self.shot_sums, mass + weight * self.shot_counts
        return sums, mass

    def run(self, gamma: float, state: Mixture | None = None) -> Mixture:
        """All rounds and a last update of the assignments, from `state` (in place) or from the start."""
        state = self.start() if state is None else state
        for _ in range(self.config.iterations):
            self.assign(state)
            self.recentre(state, gamma)
            self.respread(state, gamma)
        self.assign(state)
        return state

    def along(self, gammas: Sequence[float]) -> Iterator[Mixture]:
        """One state per gamma; under `parity` each goes on from the one before, as published."""
        state: Mixture | None = None
        for gamma in gammas:
            state = self.run(gamma, state if self.config.parity != "none" else None)
            yield state


@methods.register("transclip")
class TransCLIP(TransductiveMethod):
    """Nothing is trained; the shots are kept.

    Attributes:
        gamma: Weight of the shots, float buffer [].
        base: The method it starts from; None for zero-shot.
    """

    name = "transclip"
    config_class = TransCLIPConfig
    config: TransCLIPConfig
    gamma: Tensor

    def build(self) -> None:
        super().build()
        self.register_buffer("gamma", torch.tensor(float(self.config.gamma)))
        self.base: Method | None = None
        if self.config.start_from != "zero-shot":
            kind = _startable(self.config.start_from)
            seed = int(torch.randint(2**62, (1,), generator=self.generator))
            self.base = kind(self.backbone, self.fitted_names, templates=self.templates, seed=seed)

    def classes_changed(self) -> None:
        super().classes_changed()
        if self.base is not None:
            self.base.set_classes(self.class_names)

    def base_start(self, inputs: Tensor) -> Tensor | None:
        """Log-probabilities [batch, classes] of the method it starts from, of features as they came; None without."""
        if self.base is None:
            return None
        parts = [self.base(part) for part in self.chunks(inputs, len(self.class_names))]
        return torch.cat(parts).float().log_softmax(dim=-1)

    def _start(self, f: Tensor, text: Tensor) -> Tensor:
        """Log zero-shot predictions, fp32 [batch, classes]."""
        parts = [self.config.temperature * (part @ text.T) for part in self.chunks(f, len(text))]
        return torch.cat(parts).log_softmax(dim=-1)

    def solver(self, f: Tensor, text: Tensor, support: Support | None, log_start: Tensor | None = None) -> Solver:
        """The solver of a batch; arguments as `assign`."""
        return Solver(f, self._start(f, text) if log_start is None else log_start, support, self.config, self.chunks)

    def answer(self, inputs: Tensor, f: Tensor, text: Tensor, support: Support | None) -> Tensor:
        return self.assign(f, text, support, self.base_start(inputs))

    def assign(self, f: Tensor, text: Tensor, support: Support | None, log_start: Tensor | None = None) -> Tensor:
        """As for every method here; `log_start` [batch, classes] takes the place of zero-shot predictions."""
        log_start, wanted = self._start(f, text) if log_start is None else log_start, self.config.effective_classes
        if not 0 < wanted < len(text):
            return self._assign_among(f, text, support, log_start)
        share = torch.stack([part.exp().sum(dim=0) for part in self.chunks(log_start, len(text))])
        present = share.sum(dim=0).topk(wanted).indices.sort().values
        among = log_start[:, present].log_softmax(dim=-1)
        scores = log_start + _ABSENT  # of classes that seem absent: below all others
        scores[:, present] = self._assign_among(f, text[present], _restricted(support, present), among)
        return scores

    def _assign_among(self, f: Tensor, text: Tensor, support: Support | None, log_start: Tensor) -> Tensor:
        solver, gamma = self.solver(f, text, support, log_start), float(self.gamma)
        if support is None or self.config.parity == "none":
            return solver.run(gamma if support is not None else 0.0).log_z
        gammas = self.config.gammas
        chosen = min(range(len(gammas)), key=lambda index: abs(gammas[index] - gamma))
        *_, last = solver.along(gammas[: chosen + 1])  # one goes on from the one before
        return last.log_z

    @torch.no_grad()
    def choose(self, task: FitTask, loop: TrainingLoop | None) -> dict[str, Any]:
        """Choose gamma: validation images, taken as a batch, are assigned under each; the first of the best wins."""
        started = self._fit_base(task, loop)
        chosen = self._choose_gamma(task, loop)
        return {**chosen, **started, "searched": chosen["searched"] or bool(started.get("base", {}).get("searched"))}

    def _fit_base(self, task: FitTask, loop: TrainingLoop | None) -> dict[str, Any]:
        """Fit the method it starts from on the same shots; its facts as "base"."""
        if self.base is None:
            return {}
        own = None if loop is None else loop.with_settings(self.base.default_training or TrainingSettings())
        with torch.enable_grad():
            report = self.base.fit(task, own)
        self.base.set_classes(self.class_names).eval()
        return {"base": report, "interrupted": bool(report.get("interrupted"))}

    def _choose_gamma(self, task: FitTask, loop: TrainingLoop | None) -> dict[str, Any]:
        self.gamma.fill_(self.config.gamma)
        facts = {"gamma": self.config.gamma, "searched": False}
        support = self.current_support()
        if support is None:
            return {"searched": False}  # there is nothing to weigh
        if not self.config.search:
            return {**facts, "why_not_searched": "search is off"}
        if task.val is None or not len(task.val.labels):
            return {**facts, "why_not_searched": "there are no validation images"}
        inputs = read_all(task.val).to(self.backbone.device)
        features, text = F.normalize(inputs, dim=-1), self.zero_shot().float()
        solver = self.solver(features, text, support, self.base_start(inputs))
        labels = task.val.labels.to(self.backbone.device)
        correct, gammas = [], self.config.gammas
        for number, state in enumerate(solver.along(gammas)):
            progress_of(loop)(f"{self.name}: searching gamma", number + 1, len(gammas))
            correct.append(int((state.log_z.argmax(dim=1) == labels).sum()))
        best = correct.index(max(correct))
        self.gamma.fill_(gammas[best])
        return {
            "gamma": gammas[best],
            "searched": True,
            "settings_tried": len(gammas),
            "val_images": len(labels),
            "val_accuracy": correct[best] / len(labels),
        }

    # --- state --------------------------------------------------------------------------------------------------------

    def resize_for(self, state: Mapping[str, Tensor]) -> None:
        super().resize_for(state)
        if self.base is not None:
            start = "base."
            self.base.resize_for({key.removeprefix(start): v for key, v in state.items() if key.startswith(start)})


def _startable(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        UnknownNameError: There is none.
        ConfigError: Its predictions can't be what TransCLIP starts from.
    """
    kind = methods.get(name)
    reason = (
        "trains on pixels"
        if kind.reads != "image_features"
        else "answers all images together itself"
        if kind.transductive
        else "needs descriptions"
        if kind.reads_descriptions == "needed"
        else ""
    )
    if reason:
        raise ConfigError(
            f"start_from is {name!r}, which {reason}: choose a method that reads image features and answers image by"
            " image, such as zero-shot, coop, taskres or tip-adapter-f."
        )
    return kind


def _restricted(support: Support | None, present: Tensor) -> Support | None:
    """The shots of some classes, numbered among these; None if there are none."""
    if support is None:
        return None
    hits = support.labels[:, None] == present  # [shots, present]
    inside = hits.any(dim=1)
    if not bool(inside.any()):
        return None
    return Support(support.features[inside], hits[inside].float().argmax(dim=1))
