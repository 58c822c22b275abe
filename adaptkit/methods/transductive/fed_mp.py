"""Fed-MP: clients train a channel attention on their own images, a server averages them, prototypes grow at test time.

Source: arXiv 2404.01232, Sec. 3; fed_mp sheet; reference code huiminzeng/Fed-MP (adapter after FedCLIP).
Clients are simulated, one after the other: the few shots are divided among them, by classes as in the paper, evenly, or
with label skew. Training uses the plain view of the frozen features.
Differs from the reference: a client's best local epoch on its own held-out images counts (there the best one is
forgotten, and the last is returned: `selection`); residuals start at zero, not at noise that dwarfs the texts
(`residual_init`); a client's weight compares all its class prompts with the wanted classes and isn't negative (there
its last batch of texts, summed: `weighting`, `clip_weights`); the wanted classes are those fitted on, since names of
test classes aren't known then (give them as `target_names`); the sum of a class's prototypes is made unit again
(`renormalise`); fp32; held-out images are judged by the exact class (there also by part of its name) with the
unperturbed prompts that serve later; all fitted classes are divided among the clients, since unseen ones are another
test part; test images go in their order unless `shuffle` is set.
Kept: image prototypes count when all classes have one (`wait_for_all`), which may never happen; but images are nearer
to images than to texts, so classes with one would win over those without (not waiting cost 7 to 29 points in a trial on
the embedded datasets). Images of one class in one batch count as each other's negatives, the residuals are thrown away,
decay is part of the gradient.

**Order.** The prototypes of one call to `forward` come from its own images alone: nothing stays behind, and the same
images in the same order get the same answers. Within a call the order matters: an image is answered by the confident
ones that came before its batch of `memory_batch`. Evaluation hands over a whole test part at once.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.errors import AdapterError, AdaptKitWarning, ConfigError, DataError, TrainingError
from adaptkit.methods import methods
from adaptkit.methods.base import (
    Method,
    MethodConfig,
    draw_linear,
    progress_of,
    read_all,
    render_prompts,
    zero_shot_weights,
)
from adaptkit.types import FitTask, TrainingLoop

RESIDUAL_RANGE = 5.0
"""The reference draws residuals uniformly from ± this."""

_FIT_STREAM = 0x5DEECE66D  # keeps the fit's draws apart from those of the first values, which have the same seed

Skew = Literal["classes", "iid", "dirichlet"]


@dataclass(frozen=True)
class FedMPConfig(MethodConfig):
    """Settings of Fed-MP."""

    num_clients: int = field(default=2, metadata={"help": "Simulated clients."})
    skew: Skew = field(
        default="classes",
        metadata={"help": "How the shots are divided: classes (disjoint, the paper's), iid, or dirichlet."},
    )
    concentration: float = field(
        default=0.5, metadata={"help": "Of dirichlet: small, and most of a class goes to one client."}
    )
    rounds: int = field(default=2, metadata={"help": "Rounds of local training and averaging."})
    local_epochs: int = field(default=2, metadata={"help": "A client's passes over its images in one round."})
    client_batch: int = field(default=18, metadata={"help": "A client's images per step."})
    client_lr: float = field(default=5e-5, metadata={"help": "The clients' learning rate (Adam)."})
    client_decay: float = field(default=0.2, metadata={"help": "Weight decay, part of the gradient."})
    holdout: float = field(
        default=0.2, metadata={"help": "Share of a client's images that choose its best local epoch."}
    )
    selection: Literal["best", "last"] = field(
        default="best", metadata={"help": "Which local epoch a client returns; last is what the reference does."}
    )
    alpha: float = field(default=0.3, metadata={"help": "Weight of the residuals on the training texts."})
    residual_init: Literal["zero", "uniform"] = field(
        default="zero", metadata={"help": "Residuals at the start of a round; uniform: ±5, as in the reference."}
    )
    weighting: Literal["similarity", "similarity-last-batch", "images", "uniform"] = field(
        default="similarity",
        metadata={
            "help": "Clients' weights: class prompts like the wanted ones (similarity-last-batch: the reference's sum"
            " over the last batch), number of images, or equal."
        },
    )
    clip_weights: bool = field(default=True, metadata={"help": "Clients with a negative similarity count nothing."})
    target_names: tuple[str, ...] = field(
        default=(), metadata={"help": "Classes that clients are weighed for; empty: those fitted on."}
    )
    memory_batch: int = field(default=18, metadata={"help": "Test images answered between two prototype updates."})
    entropy_share: float = field(
        default=0.1, metadata={"help": "Answers with less than this share of the largest entropy update; 0: none."}
    )
    wait_for_all: bool = field(
        default=True,
        metadata={
            "help": "Use image prototypes only when every class has one; else classes that have one are favoured."
        },
    )
    renormalise: bool = field(default=True, metadata={"help": "Make text plus image prototype unit again."})
    shuffle: bool = field(default=False, metadata={"help": "Go through a call's images in a drawn order."})
    shuffle_seed: int = field(default=0, metadata={"help": "Of that order."})

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}, but must be {wanted}"
            for name, wanted, ok in (
                ("num_clients", "at least 1", self.num_clients >= 1),
                ("concentration", "a positive number", 0 < self.concentration < math.inf),
                ("rounds", "at least 0", self.rounds >= 0),
                ("local_epochs", "at least 1", self.local_epochs >= 1),
                ("client_batch", "at least 2", self.client_batch >= 2),
                ("client_lr", "a positive number", 0 < self.client_lr < math.inf),
                ("client_decay", "0 or more", 0 <= self.client_decay < math.inf),
                ("holdout", "at least 0 and below 1", 0 <= self.holdout < 1),
                ("alpha", "0 or more", 0 <= self.alpha < math.inf),
                ("memory_batch", "at least 1", self.memory_batch >= 1),
                ("entropy_share", "between 0 and 1", 0 <= self.entropy_share <= 1),
                ("shuffle_seed", "at least 0 and below 2**63", 0 <= self.shuffle_seed < 2**63),
            )
            if not ok
        ]
        if problems:
            raise ConfigError(f"These settings can't be used: {'; '.join(problems)}.")


class ChannelAttention(nn.Module):
    """f ↦ softmax(up(tanh(down(f)))) · f, channel by channel; zero weights only scale f.

    Args:
        dim: Channels.
        numbers: For the first values.
    """

    def __init__(self, dim: int, numbers: torch.Generator) -> None:
        super().__init__()
        self.down = draw_linear(dim, dim, numbers)
        self.up = draw_linear(dim, dim, numbers)

    def forward(self, features: Tensor) -> Tensor:
        """Unit adapted features [n, dim] of unnormalised ones [n, dim]."""
        attention = self.up(torch.tanh(self.down(features))).softmax(dim=-1)  # [n, dim]
        return F.normalize(attention * features, dim=-1)


def merge(adapters: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of adapters; identical ones give themselves, bit for bit.

    Args:
        adapters: States with the same names and shapes.
        weights: One each; they needn't add up to 1, but not to 0.

    Raises:
        AdapterError: The states don't fit together, or the weights can't be used.

    Example:
        >>> merge([{"w": torch.tensor([1.0])}, {"w": torch.tensor([4.0])}], [2, 1])
        {'w': tensor([2.])}
    """
    if not adapters or len(adapters) != len(weights):
        raise AdapterError(f"{len(adapters)} adapters and {len(weights)} weights were given: give one weight each.")
    total = math.fsum(weights)
    if not math.isfinite(total) or abs(total) <= 1e-6 * math.fsum(map(abs, weights)):
        raise AdapterError(f"The weights {list(weights)} add up to {total}: they must have a sum other than 0.")
    first = adapters[0]
    for other in adapters[1:]:
        if {k: v.shape for k, v in other.items()} != {k: v.shape for k, v in first.items()}:
            raise AdapterError("The adapters hold other names or shapes: only adapters of one kind can be averaged.")
    return {
        key: value
        + sum(((w / total) * (a[key] - value) for a, w in zip(adapters, weights, strict=True)), torch.zeros_like(value))
        for key, value in first.items()
    }


def split_clients(
    labels: Tensor, num_clients: int, skew: Skew, concentration: float, numbers: torch.Generator
) -> list[Tensor]:
    """Divide images among clients; together they hold each image once.

    Args:
        labels: int64 [n], on the CPU.
        num_clients: How many.
        skew: "classes": each class goes to one client, as evenly as possible; "iid": images are dealt out at random;
            "dirichlet": each class is divided in drawn proportions.
        concentration: Of the Dirichlet distribution.
        numbers: Of the draws.

    Returns:
        Indices of each client's images, int64 [n_i], in rising order; some may be empty.
    """
    if skew == "iid":
        parts = torch.tensor_split(torch.randperm(len(labels), generator=numbers), num_clients)
        return [part.sort().values for part in parts]
    present = labels.unique()
    if skew == "classes":
        drawn = present[torch.randperm(len(present), generator=numbers)]
        return [torch.isin(labels, part).nonzero()[:, 0] for part in torch.tensor_split(drawn, num_clients)]
    proportions = np.random.default_rng(int(torch.randint(2**62, (1,), generator=numbers)))
    owners = torch.zeros_like(labels)
    for label in present.tolist():
        own = (labels == label).nonzero()[:, 0]
        own = own[torch.randperm(len(own), generator=numbers)]
        cuts = np.cumsum(proportions.dirichlet(np.full(num_clients, concentration)))[:-1] * len(own)
        for client, part in enumerate(torch.tensor_split(own, [round(cut) for cut in cuts])):
            owners[part] = client
    return [(owners == client).nonzero()[:, 0] for client in range(num_clients)]


def symmetric_info_nce(images: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
    """Mean of both directions' cross-entropies, where image i belongs to text i; unit rows [n, dim]."""
    logits = scale * images @ texts.T  # [n, n]
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


class PrototypeMemory:
    """Prototypes that grow with confident answers: for any head that compares unit features with unit class texts.

    Args:
        texts: Text prototypes [classes, dim], unit rows.
        scale: Factor of the cosines.
        bias: Added to them.
        entropy_share: Answers with an entropy below this share of ln(classes) enter the memory; 0: none does.
        wait_for_all: Use image prototypes only when every class has one.
        renormalise: Make the sum of both prototypes unit.
    """

    def __init__(
        self,
        texts: Tensor,
        scale: Tensor | float,
        bias: Tensor | float = 0.0,
        *,
        entropy_share: float = 0.1,
        wait_for_all: bool = True,
        renormalise: bool = True,
    ) -> None:
        self.texts, self.scale, self.bias = texts.float(), scale, bias
        self.limit = entropy_share * math.log(len(texts))
        self.wait_for_all, self.renormalise = wait_for_all, renormalise
        self.sums = torch.zeros_like(self.texts)
        self.counts = self.texts.new_zeros(len(texts))

    def prototypes(self) -> Tensor:
        """What the next images are compared with, [classes, dim]."""
        seen = self.counts > 0
        if self.wait_for_all:
            seen = seen.all().expand_as(seen)
        means = self.sums / self.counts.clamp(min=1)[:, None]
        both = self.texts + means * seen[:, None]
        return torch.where(seen[:, None], F.normalize(both, dim=-1), self.texts) if self.renormalise else both

    def answer(self, features: Tensor) -> Tensor:
        """Logits [n, classes] of unit features [n, dim], from the memory as it was before them; then they update it."""
        logits = self.scale * (features @ self.prototypes().T) + self.bias
        with torch.no_grad():
            shares = logits.log_softmax(dim=-1)
            sure = -(shares.exp() * shares).sum(dim=-1) < self.limit  # [n]
            classes = logits.argmax(dim=-1)[sure]
            self.sums.index_add_(0, classes, features[sure].detach())
            self.counts.index_add_(0, classes, torch.ones_like(classes, dtype=self.counts.dtype))
        return logits


@dataclass(frozen=True)
class _Client:
    """A client's images: unnormalised features, labels among its own classes, and where those stand among all."""

    features: Tensor  # [n, dim]
    labels: Tensor  # int64 [n]
    held_features: Tensor  # [m, dim]
    held_labels: Tensor  # int64 [m]
    classes: Tensor  # int64 [own classes]

    @property
    def images(self) -> int:
        return len(self.labels) + len(self.held_labels)

    def batches(self, size: int, numbers: torch.Generator) -> list[Tensor]:
        """Shuffled indices; a last image alone, which has nothing to be told apart from, is left out."""
        order = torch.randperm(len(self.labels), generator=numbers).to(self.labels.device)
        return [part for part in torch.split(order, size) if len(part) > 1]

    def steps(self, size: int) -> int:
        whole, rest = divmod(len(self.labels), size)
        return whole + (rest > 1)


@dataclass(frozen=True)
class _Update:
    """What a client sends: its adapter, its class texts, and those of its last batch (unit rows)."""

    adapter: dict[str, Tensor]
    texts: Tensor
    last_texts: Tensor
    loss: float
    epoch: int
    held_accuracy: float | None


@methods.register("fed-mp")
class FedMP(Method):
    """Trains `attention` (shared by the clients' average); answers with prototypes that grow as test images come."""

    name = "fed-mp"
    config_class = FedMPConfig
    config: FedMPConfig
    transductive: ClassVar[bool] = True

    def build(self) -> None:
        self.attention = ChannelAttention(self.backbone.spec.embed_dim, self.generator)

    # --- answers ------------------------------------------------------------------------------------------------------

    def memory(self) -> PrototypeMemory:
        """An empty memory over the current classes."""
        config = self.config
        return PrototypeMemory(
            self.zero_shot(),
            self.backbone.logit_scale,
            self.backbone.logit_bias,
            entropy_share=config.entropy_share,
            wait_for_all=config.wait_for_all,
            renormalise=config.renormalise,
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [n, classes] of unnormalised features [n, dim], which share a memory that begins empty."""
        with torch.autocast(inputs.device.type, enabled=False):
            features, memory = self.attention(inputs.float()), self.memory()
            order = torch.arange(len(features))
            if self.config.shuffle:
                numbers = torch.Generator().manual_seed(self.config.shuffle_seed)
                order = torch.randperm(len(features), generator=numbers)
            order = order.to(features.device)
            parts = [memory.answer(features[part]) for part in torch.split(order, self.config.memory_batch)]
            return torch.cat(parts)[order.argsort()]

    # --- federated training -------------------------------------------------------------------------------------------

    def fit(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        """Simulate the clients and the server; `loop` is only told how far it is. Validation shots aren't used.

        Ctrl-C keeps the average of the last whole round.

        Raises:
            DataError: No images, labels outside the classes, or no client with two classes to tell apart.
            TrainingError: A loss isn't finite.
            AdapterError: The clients' unclipped weights add up to zero.
        """
        self.set_classes(self.fitted_names)
        numbers = torch.Generator().manual_seed((task.seed + _FIT_STREAM) % 2**63)
        clients, dropped = self._clients(task, numbers)
        texts = self._raw_texts()  # [classes, dim]
        residuals = torch.zeros_like(texts)
        if self.config.residual_init == "uniform":
            drawn = torch.empty(texts.shape).uniform_(-RESIDUAL_RANGE, RESIDUAL_RANGE, generator=numbers)
            residuals = drawn.to(texts)
        wanted = zero_shot_weights(self.backbone, self.config.target_names or self.class_names, self.templates)
        show = _Shown(progress_of(loop), self.config, clients)
        rounds: list[dict[str, Any]] = []
        began, interrupted = time.perf_counter(), False
        try:
            with torch.enable_grad():
                for number in range(self.config.rounds):
                    show.round = number
                    updates = [self._train(client, texts, residuals, numbers, show) for client in clients]
                    weights = self._weights(clients, updates, wanted)
                    self.attention.load_state_dict(merge([update.adapter for update in updates], weights))
                    rounds.append(_round_facts(updates, weights))
        except KeyboardInterrupt:
            interrupted = True
        return {
            "rounds": rounds,
            "epochs": len(rounds) * self.config.local_epochs,
            "clients": len(clients),
            "clients_left_out": dropped,
            "client_images": [client.images for client in clients],
            "client_held_out": [len(client.held_labels) for client in clients],
            "client_classes": [[self.fitted_names[at] for at in client.classes.tolist()] for client in clients],
            "local_parameters": [len(client.classes) * texts.shape[1] for client in clients],
            "trained_parameters": self.num_trained(),
            "interrupted": interrupted,
            "seconds": time.perf_counter() - began,
        }

    @torch.no_grad()
    def _raw_texts(self) -> Tensor:
        """Unnormalised text features of the fitted classes [classes, dim], the mean over templates; fp32."""
        prompts = [prompt for template in self.templates for prompt in render_prompts(self.class_names, template)]
        features = self.backbone.text_features(prompts).float()
        return features.unflatten(0, (len(self.templates), len(self.class_names))).mean(dim=0)

    def _clients(self, task: FitTask, numbers: torch.Generator) -> tuple[list[_Client], int]:
        """The clients that can learn something, and how many can't."""
        config, labels = self.config, task.train.labels.cpu()
        count = len(self.fitted_names)
        if not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= count:
            raise DataError(
                f"{self.name} needs training images with labels from 0 to {count - 1}, in the order of the names."
            )
        features = read_all(task.train).to(self.backbone.device)
        parts = split_clients(labels, config.num_clients, config.skew, config.concentration, numbers)
        made = [_make_client(features, labels, part, config.holdout, numbers) for part in parts]
        clients = [client for client in made if client is not None]
        dropped = len(made) - len(clients)
        if not clients:
            raise DataError(
                f"None of the {config.num_clients} clients of {self.name} has images of two classes to tell apart: give"
                " more classes or images, or set fewer clients (num_clients) or skew=iid."
            )
        if dropped:
            warnings.warn(
                f"{dropped} of the {config.num_clients} clients of {self.name} have images of fewer than two classes"
                " and take no part: set fewer clients, or skew=iid.",
                AdaptKitWarning,
                stacklevel=3,
            )
        return clients, dropped

    def _train(
        self, client: _Client, texts: Tensor, residuals: Tensor, numbers: torch.Generator, show: _Shown
    ) -> _Update:
        """Train a copy of the adapter, and residuals of the client's classes, on its images."""
        config = self.config
        adapter = deepcopy(self.attention)
        own_texts, residual = texts[client.classes], nn.Parameter(residuals[client.classes].clone())
        optimiser = torch.optim.Adam(
            [*adapter.parameters(), residual],
            lr=config.client_lr,
            betas=(0.9, 0.98),
            eps=1e-6,
            weight_decay=config.client_decay,
        )
        updates = []
        for epoch in range(config.local_epochs):
            for batch in client.batches(config.client_batch, numbers):
                perturbed = F.normalize(own_texts + config.alpha * residual, dim=-1)[client.labels[batch]]  # [b, dim]
                loss = symmetric_info_nce(adapter(client.features[batch]), perturbed, self.backbone.logit_scale)
                if not bool(torch.isfinite(loss)):
                    raise TrainingError(
                        f"{self.name}'s loss became {float(loss.detach())} at learning rate {config.client_lr:.2g}: try"
                        " a lower client_lr, and look for inputs that aren't finite."
                    )
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                show.step(float(loss.detach()))
            update = _Update(
                {key: value.detach().clone() for key, value in adapter.state_dict().items()},
                F.normalize(own_texts + config.alpha * residual.detach(), dim=-1),
                perturbed.detach(),
                float(loss.detach()),
                epoch + 1,
                self._held_accuracy(adapter, client, own_texts),
            )
            updates.append(update)
        if config.selection == "last" or not len(client.held_labels):
            return updates[-1]
        return max(updates, key=lambda update: update.held_accuracy or 0.0)  # the first of equals

    @torch.no_grad()
    def _held_accuracy(self, adapter: ChannelAttention, client: _Client, texts: Tensor) -> float | None:
        """Accuracy on the client's held-out images among its classes, as it will be used: without residuals."""
        if not len(client.held_labels):
            return None
        answers = (adapter(client.held_features) @ F.normalize(texts, dim=-1).T).argmax(dim=-1)
        return float((answers == client.held_labels).float().mean())

    def _weights(self, clients: Sequence[_Client], updates: Sequence[_Update], wanted: Tensor) -> list[float]:
        """The server's weight of each client; equal ones where all were clipped to nothing."""
        kind = self.config.weighting
        if kind == "uniform":
            return [1.0] * len(clients)
        if kind == "images":
            return [float(client.images) for client in clients]
        if kind == "similarity":
            weights = [float((wanted @ update.texts.T).mean()) for update in updates]
        else:
            weights = [float((wanted @ update.last_texts.T).sum(dim=1).mean()) for update in updates]
        if self.config.clip_weights:
            weights = [max(0.0, weight) for weight in weights]
            return weights if any(weights) else [1.0] * len(weights)
        return weights


def _make_client(
    features: Tensor, labels: Tensor, part: Tensor, holdout: float, numbers: torch.Generator
) -> _Client | None:
    """A client of the images `part`, some of them held out; None where fewer than two classes are left to train on."""
    order = part[torch.randperm(len(part), generator=numbers)]
    held, kept = order[: int(holdout * len(order))], order[int(holdout * len(order)) :]
    classes = labels[part].unique()
    if len(labels[kept].unique()) < 2:
        return None
    device = features.device
    own, held_own = (torch.searchsorted(classes, labels[at]).to(device) for at in (kept, held))
    return _Client(features[kept.to(device)], own, features[held.to(device)], held_own, classes.to(device))


def _round_facts(updates: Sequence[_Update], weights: Sequence[float]) -> dict[str, Any]:
    """One round in plain values; lists go by client."""
    total = math.fsum(weights)
    return {
        "weights": [weight / total for weight in weights],
        "losses": [update.loss for update in updates],
        "epochs": [update.epoch for update in updates],
        "held_out_accuracies": [update.held_accuracy for update in updates],
    }


class _Shown:
    """Tells a progress callback how far the clients are, a few times a second."""

    def __init__(
        self, progress: Callable[[str, int, int], None], config: FedMPConfig, clients: Sequence[_Client]
    ) -> None:
        self.progress, self.rounds, self.round, self.done = progress, config.rounds, 0, 0
        self.total = config.rounds * config.local_epochs * sum(client.steps(config.client_batch) for client in clients)
        self._last = -math.inf

    def step(self, loss: float) -> None:
        self.done += 1
        now = time.perf_counter()
        if now - self._last > 0.2 or self.done == self.total:
            self._last = now
            self.progress(f"fed-mp round {self.round + 1}/{self.rounds}: loss {loss:.4f}", self.done, self.total)
