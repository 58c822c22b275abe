"""APE: Tip-Adapter's cache on the channels that tell classes apart, keys weighed by how zero-shot judges them.

Source: arXiv 2304.01195, Sec. 3.1-3.2; ape sheet; reference code yangyangyang127/APE, main.py and utils.py.
Differs from the reference: fp32; searches on validation shots only (its ImageNet script searches on the test set); the
similarity of classes is in closed form instead of four loops, and never cached in a file that APE-T would read too;
channels are chosen again when the classes change; at other widths than ResNet-50's 1024 the same share of channels is
kept. Kept: the softmax that the weights of keys come from has no temperature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.errors import ConfigError
from adaptkit.methods import methods
from adaptkit.methods.caches._cache import class_sums
from adaptkit.methods.caches._channels import ChannelCacheMethod, ChannelConfig, best_channels, channel_scores
from adaptkit.methods.folding import CacheHead
from adaptkit.types import FitTask, TrainingLoop, TrainingSettings

_TINY = 1e-6  # the reference's, inside its logarithm
_ROWS = 4096  # keys that are compared with all texts at a time


@dataclass(frozen=True)
class APEConfig(ChannelConfig):
    """Settings of APE; the paper's differ per dataset (a named recipe), these are ImageNet's."""

    gamma: float = field(default=0.1, metadata={"help": "How much hard keys weigh more, before any search."})
    max_gamma: float = field(default=0.5, metadata={"help": "End of the gamma grid (itself not tried)."})
    gamma_steps: int = field(default=5, metadata={"help": "Points of the gamma grid, the first of which is 0."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma < math.inf or not 0 <= self.max_gamma < math.inf or self.gamma_steps < 1:
            raise ConfigError(
                f"gamma is {self.gamma}, max_gamma {self.max_gamma} and gamma_steps {self.gamma_steps}, but gamma and"
                " max_gamma must be 0 or more and gamma_steps at least 1."
            )

    def gammas(self) -> list[float]:
        """The gamma grid, from 0, its end left out."""
        return [step * self.max_gamma / self.gamma_steps for step in range(self.gamma_steps)]


@dataclass(frozen=True)
class Refined:
    """The cache as one list of classes sees it.

    Args:
        channels: Kept, int64 [kept].
        keys: Of these classes, on the kept channels, unit rows [n, kept].
        labels: Class of each key among these classes, int64 [n].
        divergence: How wrong zero-shot is about each key, in bits, [n].
    """

    channels: Tensor
    keys: Tensor
    labels: Tensor
    divergence: Tensor


def divergences(keys: Tensor, text: Tensor, labels: Tensor) -> Tensor:
    """Kullback-Leibler divergence in bits of a key's label and zero-shot's answer without temperature, [n].

    Args:
        keys: Unit rows [n, kept].
        text: Unit rows [classes, kept].
        labels: int64 [n].
    """
    own = [
        (part @ text.T).softmax(dim=1).gather(1, label[:, None])[:, 0]
        for part, label in zip(torch.split(keys, _ROWS), torch.split(labels, _ROWS), strict=True)
    ]
    return torch.log2((1 + _TINY) / (torch.cat(own) + _TINY))


@methods.register("ape")
class APE(ChannelCacheMethod):
    """A training-free cache on chosen channels, keys weighed by how zero-shot judges them; descriptions are optional.

    Attributes:
        gamma: Float buffer [].
    """

    name = "ape"
    config_class = APEConfig
    config: APEConfig
    scores_by_class_list = True
    default_training = TrainingSettings(epochs=0, views=10, crop_scale=0.5)  # read for its views only
    gamma: Tensor
    _refined_memo: tuple[Any, Refined] | None = None

    def build(self) -> None:
        super().build()
        self.num_channels()  # refuses more than there are
        self.register_buffer("gamma", torch.tensor(float(self.config.gamma)))

    def build_cache(self, task: FitTask) -> None:
        super().build_cache(task)
        self.gamma.fill_(self.config.gamma)

    def fit(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        self.set_classes(self.fitted_names)
        self.build_cache(task)
        return {"keys": len(self.keys), "channels": self.num_channels(), **self.search(task, loop)}

    # --- logits -------------------------------------------------------------------------------------------------------

    def scores(self, keys: Tensor, labels: Tensor) -> Tensor:
        """Score of each channel, float64 [dim], for the current classes and their keys."""
        weights = {
            "similarity_weight": self.config.similarity_weight,
            "variance_weight": self.config.variance_weight,
        }
        return channel_scores(self.zero_shot(), keys, labels, **weights)

    def refined(self) -> Refined:
        """The cache for the current classes, remembered: channels, keys and weights depend on the list of classes."""
        key = (self.class_names, id(self.keys), self.keys._version, self.keys.device)
        if self._refined_memo is None or self._refined_memo[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._refined_memo = (key, self._refine())
        return self._refined_memo[1]

    def _refine(self) -> Refined:
        keys, labels = self.keys, self.key_labels
        if self.class_names != self.fitted_names:
            place = labels.new_full((len(self.fitted_names),), -1)
            place[self.fitted_indices()] = torch.arange(len(self.class_names), device=labels.device)
            labels = place[labels]
            keys, labels = keys[labels >= 0], labels[labels >= 0]
        channels = best_channels(self.scores(keys, labels), self.num_channels())
        kept = F.normalize(keys[:, channels], dim=-1)
        text = F.normalize(self.zero_shot()[:, channels], dim=-1)
        return Refined(channels, kept, labels, divergences(kept, text, labels))

    def distances(self, f: Tensor) -> Tensor:
        refined = self.refined()
        return F.normalize(f[:, refined.channels], dim=-1) @ refined.keys.T - 1

    def cache_logits(self, f: Tensor) -> Tensor:
        refined = self.refined()
        similar = torch.exp(self.beta * self.distances(f)) * torch.exp(self.gamma * refined.divergence)  # [batch, n]
        return class_sums(similar, refined.labels, len(self.class_names))

    def cache_head(self) -> CacheHead:
        refined = self.refined()
        values = torch.exp(self.gamma * refined.divergence)
        return self.cache_of(refined.keys, refined.labels, values, channels=refined.channels)

    # --- search -------------------------------------------------------------------------------------------------------

    def key_values(self) -> Tensor:
        divergence = self.refined().divergence
        return torch.exp(divergence[:, None] * divergence.new_tensor(self.config.gammas()))

    def search(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        facts = super().search(task, loop)
        if "variant" in facts:
            self.gamma.fill_(self.config.gammas()[facts.pop("variant")])
        return {"alpha": float(self.alpha), "beta": float(self.beta), "gamma": float(self.gamma), **facts}
