"""The key-value cache that Tip-Adapter and Tip-Adapter-F share: keys from the shots, and the search of its two weights.

Source: arXiv 2207.09519, Sec. 3; tip_adapter sheet; reference code gaopengcuhk/Tip-Adapter, utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.errors import AdapterError, ConfigError
from adaptkit.methods.base import Method, MethodConfig, progress_of, read_all
from adaptkit.methods.folding import CacheHead, Fold, MatrixHead
from adaptkit.types import FitTask, Inputs, NovelClasses, TrainingLoop

GRID_START = 0.1
"""Where the grids of alpha and beta begin."""

_FORWARD_BYTES = 256e6  # bounds the similarities of a batch and all shots
_SEARCH_BYTES = 4e6  # the search goes over the same values hundreds of times: let them stay in the processor's cache
_PRODUCTS = 8


@dataclass(frozen=True)
class CacheConfig(MethodConfig):
    """Settings of a Tip-Adapter cache.

    The paper's ranges and starting values differ per data set (they are named recipes); these are ImageNet's.
    """

    alpha: float = field(default=1.17, metadata={"help": "Weight of the cache beside zero-shot, before any search."})
    beta: float = field(default=1.0, metadata={"help": "Sharpness of the similarity, before any search."})
    search: bool = field(
        default=True, metadata={"help": "Choose alpha and beta on the validation shots, where there are any."}
    )
    max_alpha: float = field(default=3.0, metadata={"help": "End of the alpha grid (itself not tried)."})
    max_beta: float = field(default=7.0, metadata={"help": "End of the beta grid (itself not tried)."})
    alpha_steps: int = field(default=20, metadata={"help": "Points of the alpha grid."})
    beta_steps: int = field(default=200, metadata={"help": "Points of the beta grid."})
    scale: float = field(default=100.0, metadata={"help": "Factor of the zero-shot cosine; 100 as in the reference."})

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}, but must be {wanted}"
            for name, wanted, ok in (
                ("alpha", "0 or more", 0 <= self.alpha < math.inf),
                ("beta", "0 or more", 0 <= self.beta < math.inf),
                ("max_alpha", f"above {GRID_START}", GRID_START < self.max_alpha < math.inf),
                ("max_beta", f"above {GRID_START}", GRID_START < self.max_beta < math.inf),
                ("alpha_steps", "at least 1", self.alpha_steps >= 1),
                ("beta_steps", "at least 1", self.beta_steps >= 1),
                ("scale", "a positive number", 0 < self.scale < math.inf),
            )
            if not ok
        ]
        if problems:
            raise ConfigError(f"These settings can't be used: {'; '.join(problems)}.")


def grid(end: float, steps: int) -> Tensor:
    """Grid points, the end left out: start + i · (end - start) / steps, float64 [steps].

    Example:
        >>> grid(1.1, 4).tolist()
        [0.1, 0.35, 0.6, 0.85]
    """
    return GRID_START + torch.arange(steps, dtype=torch.float64) * (end - GRID_START) / steps


def view_mean_keys(inputs: Inputs) -> Tensor:
    """One unit key per image [n, dim]: its unnormalised features averaged over the augmented views, then normalised.

    The plain view counts only where there is no other, as the reference caches augmented passes alone.
    """
    views = range(1, inputs.num_views) if inputs.num_views > 1 else range(1)
    total = read_all(inputs, views[0])  # [n, dim]
    for view in views[1:]:
        total = total + read_all(inputs, view)
    return F.normalize(total / len(views), dim=-1)


def class_sums(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Sum the columns of `values` [rows, n] by the class of each column: [rows, classes]."""
    return values.new_zeros(len(values), classes).index_add_(1, labels, values)


class CacheMethod(Method):
    """Zero-shot logits plus what similar shots say: scale · f·t + alpha · exp(-beta (1 - f·key)) · one-hot label.

    Attributes:
        keys: One per shot, [shots, dim]; empty before the fit, when it predicts zero-shot.
        key_labels: Class of each key, int64 [shots].
        alpha: Float buffer [].
        beta: Float buffer [].
    """

    config_class = CacheConfig
    config: CacheConfig
    novel_classes: NovelClasses = "zero-shot"
    keys: Tensor
    key_labels: Tensor
    alpha: Tensor
    beta: Tensor

    def build(self) -> None:
        self.set_keys(torch.zeros(0, self.backbone.spec.embed_dim), torch.zeros(0, dtype=torch.int64))
        self.register_buffer("alpha", torch.tensor(float(self.config.alpha)))
        self.register_buffer("beta", torch.tensor(float(self.config.beta)))

    def set_keys(self, keys: Tensor, labels: Tensor) -> None:
        """Put a cache in place."""
        if "keys" in self._parameters:
            del self.keys
        self._keep_keys(keys.to(self.backbone.device))
        self.register_buffer("key_labels", labels.to(self.backbone.device))

    def _keep_keys(self, keys: Tensor) -> None:
        self.register_buffer("keys", keys)

    def build_cache(self, task: FitTask) -> None:
        """Make keys from the shots."""
        self.set_keys(view_mean_keys(task.train), task.train.labels)
        self.alpha.fill_(self.config.alpha)
        self.beta.fill_(self.config.beta)

    # --- logits -------------------------------------------------------------------------------------------------------

    def forward(self, inputs: Tensor) -> Tensor:
        if self.uses_fallback:
            return self.cosine_logits(inputs, self.zero_shot())
        with torch.autocast(inputs.device.type, enabled=False):  # exp(beta · similarity) overflows in half precision
            f = F.normalize(inputs.float(), dim=-1)
            rows = len(f) if torch.is_grad_enabled() else self._chunk_rows()
            return torch.cat([self._logits(part) for part in torch.split(f, max(1, rows))])  # [batch, classes]

    def _chunk_rows(self) -> int:
        return max(1, int(_FORWARD_BYTES / (4 * max(1, len(self.keys)))))

    def clip_logits(self, f: Tensor) -> Tensor:
        """Zero-shot logits [batch, classes] of unit features [batch, dim]."""
        return self.config.scale * f @ self.text_weights().T

    def cache_logits(self, f: Tensor) -> Tensor:
        """What the cache says, not yet weighed by alpha: [batch, classes] of unit features [batch, dim]."""
        similar = torch.exp(-self.beta * (1 - f @ self.keys.T))  # [batch, shots]
        sums = class_sums(similar, self.key_labels, len(self.fitted_names))
        return sums if self.class_names == self.fitted_names else sums[:, self.fitted_indices()]

    def _logits(self, f: Tensor) -> Tensor:
        return self.clip_logits(f) + self.alpha * self.cache_logits(f)

    def fold(self) -> Fold:
        if self.uses_fallback:
            return Fold(self.cosine_head(self.zero_shot()))
        if not len(self.keys):  # not fitted
            return Fold(MatrixHead(self.zero_shot(), scale=self.config.scale))
        return Fold(self.cache_head())

    def cache_head(self) -> CacheHead:
        """The whole of `forward` for the current classes, as one module."""
        keys, labels, rows = self.keys_of_classes()
        return self.cache_of(keys, labels, keys.new_ones(len(rows)))

    def keys_of_classes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [n, dim] of the current classes, their class among these int64 [n], and their rows int64 [n]."""
        place = self.key_labels.new_full((len(self.fitted_names),), -1)
        place[self.fitted_indices()] = torch.arange(len(self.class_names), device=place.device)
        labels = place[self.key_labels]
        rows = (labels >= 0).nonzero()[:, 0]
        return self.keys[rows], labels[rows], rows

    def cache_of(self, keys: Tensor, labels: Tensor, values: Tensor, **more: Any) -> CacheHead:
        """A head with this method's alpha and beta, and the text that `clip_logits` compares with."""
        text = MatrixHead(self.text_weights(), scale=self.config.scale, normalise=False)
        settings = {"alpha": float(self.alpha), "beta": float(self.beta), **more}
        return CacheHead(text, keys, labels, len(self.class_names), values, **settings)

    def text_weights(self) -> Tensor:
        """What zero-shot compares unit features with, [classes, dim]."""
        return self.zero_shot()

    # --- search -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def search(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        """Choose alpha and beta by validation accuracy; without validation shots the starting values stay.

        Never sees test data (the reference's ImageNet script searches on the test set). Of equal settings the first
        wins, beta in the outer loop. `loop` is only told how far it is.
        """
        facts = {"alpha": float(self.alpha), "beta": float(self.beta), "searched": False}
        if not self.config.search:
            return {**facts, "why_not_searched": "search is off"}
        if task.val is None or not len(task.val.labels):
            return {**facts, "why_not_searched": "there are no validation images"}
        alphas, betas = (
            grid(self.config.max_alpha, self.config.alpha_steps),
            grid(self.config.max_beta, self.config.beta_steps),
        )
        images = len(task.val.labels)
        correct = torch.zeros(len(betas), len(alphas), dtype=torch.int64)
        features = F.normalize(read_all(task.val), dim=-1)
        for indices in torch.split(torch.arange(images), self._search_rows(len(alphas))):
            progress_of(loop)(f"{self.name}: searching alpha and beta", int(indices[0]), images)
            labels = task.val.labels[indices].to(self.backbone.device)
            correct += self._count_correct(features[indices].to(self.backbone.device), labels, alphas, betas)
        best = int(correct.argmax())  # the first of equals
        beta, alpha = betas[best // len(alphas)], alphas[best % len(alphas)]
        self.alpha.fill_(float(alpha))
        self.beta.fill_(float(beta))
        return {
            "alpha": float(alpha),
            "beta": float(beta),
            "searched": True,
            "settings_tried": correct.numel(),
            "val_images": images,
            "val_accuracy": int(correct.max()) / images,
        }

    def _search_rows(self, alphas: int) -> int:
        per_image = 4 * max(len(self.keys), alphas * len(self.fitted_names), 1)
        return max(1, int(_SEARCH_BYTES / per_image))

    def _count_correct(self, f: Tensor, labels: Tensor, alphas: Tensor, betas: Tensor) -> Tensor:
        """How many images [betas, alphas] are right under each setting, for unit features [n, dim].

        All alphas go at once. An image is right if its class's logit exceeds all others, which is several times faster
        to find out than argmax.
        """
        order, sum_up = _class_summer(self.key_labels, len(self.fitted_names))
        distance = f @ self.keys[order].T - 1  # [n, shots], ≤ 0 for unit keys
        own = labels[:, None]  # [n, 1]
        clip = self.clip_logits(f)  # [n, classes]
        clip_own, clip_others = clip.gather(1, own)[:, 0], clip.scatter(1, own, -torch.inf)
        weights = alphas.to(f)[:, None]  # [alphas, 1]
        counts = []
        for similar in _similarities(distance, betas.tolist()):
            cache = sum_up(similar)  # [n, classes]
            # the same fused operation on both sides, so that ties stay ties
            right = torch.addcmul(clip_own, weights, cache.gather(1, own)[:, 0])  # [alphas, n]
            rival = torch.addcmul(clip_others, weights[:, None], cache).amax(dim=-1)  # [alphas, n]
            counts.append((right > rival).sum(dim=-1))
        return torch.stack(counts).cpu()  # [betas, alphas]

    # --- state --------------------------------------------------------------------------------------------------------

    def resize_for(self, state: Mapping[str, Tensor]) -> None:
        keys, labels = state.get("keys"), state.get("key_labels")
        if keys is None or labels is None:
            return  # the caller says what is missing
        dim, classes = self.backbone.spec.embed_dim, len(self.fitted_names)
        if keys.dim() != 2 or keys.shape[1] != dim or labels.shape != keys.shape[:1] or labels.is_floating_point():
            raise AdapterError(
                f"The adapter's cache has keys of shape {tuple(keys.shape)} and labels of shape {tuple(labels.shape)};"
                f" expected are [shots, {dim}] and whole numbers [shots]: it was made for another backbone."
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise AdapterError(f"The adapter's cache has labels outside its {classes} classes: it is damaged.")
        self.set_keys(torch.zeros(keys.shape), torch.zeros(labels.shape, dtype=torch.int64))

    def reference_key(self, key: str) -> str | None:
        return {"keys": self.reference_names[0], "key_labels": "values"}.get(key)

    def load_reference_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over a released cache: `keys` [dim, shots] (Tip-Adapter-F: `best_F`) and `values` [shots, classes].

        They lie in separate files there, keys_16shots.pt, best_F_16shots.pt and values_16shots.pt, which
        `read_reference_checkpoint` reads together. Alpha and beta aren't saved there: they stay as they are.
        """
        missing = [name for name in self.reference_names if name not in state]
        if missing:
            raise AdapterError(
                f"The checkpoint has no {missing[0]!r}: give the files {', '.join(self.reference_names)} together"
                " (keys_…shots.pt, values_…shots.pt, best_F_…shots.pt)."
            )
        keys = state["best_F"] if self.reference_names[0] == "best_F" else state["keys"].T
        values = state["values"]
        if values.dim() != 2 or values.shape != (len(keys), len(self.fitted_names)):
            raise AdapterError(
                f"The checkpoint's values have shape {tuple(values.shape)}, ({len(keys)}, {len(self.fitted_names)}) was"
                " expected: it was made for other classes or shots."
            )
        labels = values.float().argmax(dim=1)
        kept = {"alpha": self.alpha, "beta": self.beta}
        self.load_adapter_state({"keys": keys.float().contiguous(), "key_labels": labels, **kept})

    reference_names: tuple[str, ...] = ("keys", "values")


def _class_summer(labels: Tensor, classes: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """An order of the keys, and a function from columns in that order [n, shots] to sums per class [n, classes].

    With equal shots the order is the first key of every class, the second of every class, …: sums over far columns run
    at full width, sums over neighbours don't.
    """
    order = labels.argsort(stable=True)
    if len(labels) and bool((labels.bincount(minlength=classes) * classes == len(labels)).all()):
        order = order.view(classes, -1).T.flatten()
        return order, lambda values: torch.unflatten(values, 1, (-1, classes)).sum(dim=1)
    return order, lambda values: class_sums(values, labels[order], classes)


def _similarities(distance: Tensor, betas: Sequence[float]) -> Iterator[Tensor]:
    """exp(beta · distance) for each point of an even grid, in one tensor that is overwritten.

    From one point to the next it is a product; every few points the exponential itself, so that rounding doesn't add up
    to more than the exponential's own.
    """
    similar, factor = torch.empty_like(distance), torch.empty_like(distance)
    if len(betas) > 1:
        torch.exp((betas[1] - betas[0]) * distance, out=factor)
    for index, beta in enumerate(betas):
        if index % _PRODUCTS == 0:
            torch.exp(beta * distance, out=similar)
        else:
            similar.mul_(factor)
        yield similar


def trainable_keys(keys: Tensor) -> nn.Parameter:
    """Keys that a loop may train; a copy, so that a cache built once can serve several methods."""
    return nn.Parameter(keys.clone())
