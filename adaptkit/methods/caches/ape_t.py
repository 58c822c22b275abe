"""APE-T: a cache whose texts and keys share a trained residual per class on chosen channels, and trained key values.

Source: arXiv 2304.01195, Sec. 3.3; ape sheet; reference code yangyangyang127/APE, main.py and utils.py.
Differs from the reference: fp32; the residual stands on the channels that training chose (it takes those of APE, whose
number differs on most datasets, and fails); the best epoch, alpha and beta are chosen on validation shots only (on
ImageNet it uses the test set); at other widths than 1024 the same share of channels is kept; channels are chosen on the
fitted classes once, since the residual belongs to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.errors import AdapterError
from adaptkit.methods import methods
from adaptkit.methods.base import GradientMethod, read_all
from adaptkit.methods.caches._cache import class_sums
from adaptkit.methods.caches._channels import ChannelCacheMethod, ChannelConfig, best_channels, channel_scores
from adaptkit.methods.folding import CacheHead
from adaptkit.types import FitTask, TrainingSettings


@dataclass(frozen=True)
class APETConfig(ChannelConfig):
    """Settings of APE-T; the paper's differ per dataset (a named recipe), these are ImageNet's."""

    similarity_weight: float = field(
        default=0.2, metadata={"help": "How much it counts that a channel doesn't liken classes to each other."}
    )
    variance_weight: float = field(
        default=0.8, metadata={"help": "How much it counts that a channel varies between classes."}
    )
    best_epoch: bool = field(
        default=True, metadata={"help": "Keep the epoch with the best validation accuracy; false: the last."}
    )


@methods.register("ape-t")
class APET(ChannelCacheMethod, GradientMethod):
    """Trains a residual per class, shared by its text and keys on chosen channels, and a weight per key.

    Attributes:
        residual: [classes, channels], from zeros.
        values: One per key, [shots], from ones.
        channels: The channels that the residual is added to, int64 [channels].
    """

    name = "ape-t"
    config_class = APETConfig
    config: APETConfig
    default_training = TrainingSettings(
        epochs=20,
        batch_size=256,
        optimiser="adamw",
        lr=1e-4,
        eps=1e-3,
        weight_decay=0.1,
        schedule="cosine-step",
        warmup_epochs=0,
        views=10,
        crop_scale=0.5,
    )
    channels: Tensor
    _best: dict[str, Any] | None = None
    _val: tuple[Tensor, Tensor] | None = None

    def build(self) -> None:
        super().build()
        count = self.num_channels()
        self.register_buffer("channels", torch.arange(count))
        self.residual = nn.Parameter(torch.zeros(len(self.fitted_names), count))
        self.values = nn.Parameter(torch.zeros(0))

    # --- logits -------------------------------------------------------------------------------------------------------

    def text_weights(self) -> Tensor:
        """Texts of the current classes with their residuals, [classes, dim]; not normalised again."""
        residual: Tensor = self.residual
        if self.class_names != self.fitted_names:
            residual = residual[self.fitted_indices()]
        return self.zero_shot().index_add(1, self.channels, residual)

    def cache_head(self) -> CacheHead:
        """Keys of a class move with its residual, so the two become one."""
        keys, labels, rows = self.keys_of_classes()
        moved = keys.index_add(1, self.channels, self.residual[self.key_labels[rows]])
        return self.cache_of(moved, labels, self.values[rows])

    def distances(self, f: Tensor) -> Tensor:
        moved = f[:, self.channels] @ self.residual.T  # [batch, classes]: keys of a class share their residual
        return f @ self.keys.T + moved[:, self.key_labels] - 1

    def cache_logits(self, f: Tensor) -> Tensor:
        sums = class_sums(
            torch.exp(self.beta * self.distances(f)) * self.values, self.key_labels, len(self.fitted_names)
        )
        return sums if self.class_names == self.fitted_names else sums[:, self.fitted_indices()]

    # --- training -----------------------------------------------------------------------------------------------------

    def build_cache(self, task: FitTask) -> None:
        """Keys from the shots, channels from the texts, and a residual and values that change nothing yet."""
        super().build_cache(task)
        scores = channel_scores(
            self.zero_shot(),
            self.keys[:0],
            self.key_labels[:0],
            similarity_weight=self.config.similarity_weight,
            variance_weight=self.config.variance_weight,
        )
        self.channels.copy_(best_channels(scores, self.num_channels()))
        with torch.no_grad():
            self.residual.zero_()
        self.values = nn.Parameter(torch.ones(len(self.keys), device=self.backbone.device))

    def prepare(self, task: FitTask) -> None:
        self.build_cache(task)
        self._best, self._val = None, None
        if self.config.best_epoch and task.val is not None and len(task.val.labels):
            self._val = (read_all(task.val), task.val.labels)

    @torch.no_grad()
    def after_epoch(self, epoch: int, epochs: int) -> None:
        """Remember the epoch if it is the best on validation so far."""
        if self._val is None:
            return
        features, labels = self._val
        device = self.backbone.device
        correct = sum(
            int((self(part.to(device)).argmax(dim=1) == label.to(device)).sum())
            for part, label in zip(torch.split(features, 1024), torch.split(labels, 1024), strict=True)
        )
        if self._best is None or correct > self._best["correct"]:
            state = (self.residual.detach().clone(), self.values.detach().clone())
            self._best = {"correct": correct, "epoch": epoch + 1, "state": state}
        self._best["tried"] = epoch + 1

    def training_state(self) -> dict[str, Tensor]:
        if self._best is None:
            return {}
        counts = torch.tensor([self._best[name] for name in ("correct", "epoch", "tried")])
        return {"counts": counts, "residual": self._best["state"][0], "values": self._best["state"][1]}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        if state:
            facts = dict(zip(("correct", "epoch", "tried"), state["counts"].tolist(), strict=True))
            kept = (state["residual"].to(self.backbone.device), state["values"].to(self.backbone.device))
            self._best = {**facts, "state": kept}

    @torch.no_grad()
    def finish(self, task: FitTask) -> dict[str, Any]:
        """Go back to the best epoch, then search alpha and beta."""
        facts: dict[str, Any] = {"keys": len(self.keys), "channels": self.num_channels()}
        if self._best is not None:
            self.residual.copy_(self._best["state"][0])
            self.values.copy_(self._best["state"][1])
            facts |= {"best_epoch": self._best["epoch"], "epochs_tried": self._best["tried"]}
        self._best, self._val = None, None
        found = self.search(task)
        found.pop("variant", None)
        return {**facts, "alpha": float(self.alpha), "beta": float(self.beta), **found}

    def key_values(self) -> Tensor:
        return self.values[:, None]

    # --- state --------------------------------------------------------------------------------------------------------

    def resize_for(self, state: Mapping[str, Tensor]) -> None:
        super().resize_for(state)
        channels, dim = state.get("channels"), self.backbone.spec.embed_dim
        if channels is not None and channels.numel():
            inside = 0 <= int(channels.min()) <= int(channels.max()) < dim
            if not inside or channels.is_floating_point():
                raise AdapterError(f"The adapter's channels aren't numbers below {dim}: it is damaged.")
        self.values = nn.Parameter(torch.zeros(len(self.keys), device=self.backbone.device))
