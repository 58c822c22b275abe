"""What APE and APE-T share: texts pooled from templates and sentences, chosen channels, the search over a grid.

Source: arXiv 2304.01195, Sec. 3; ape sheet; reference code yangyangyang127/APE, utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.backbones.base import Backbone
from adaptkit.errors import ConfigError, DataError, UnsupportedError
from adaptkit.methods.base import progress_of, read_all, render_prompts
from adaptkit.methods.caches._cache import CacheConfig, CacheMethod, _similarities, grid
from adaptkit.methods.descriptions._sentences import sentence_features, unit_means
from adaptkit.methods.folding import ClassBlocks
from adaptkit.types import FitTask, TrainingLoop

REFERENCE_WIDTH = 1024
"""Width of the features (ResNet-50's) that the paper's numbers of channels are for."""

_SEARCH_BYTES = 4e6  # as in _cache: the same values are gone over hundreds of times
_LEAST_ROWS = 16  # images searched at a time at least: vectors of a processor are as long


@dataclass(frozen=True)
class ChannelConfig(CacheConfig):
    """Settings of a cache with chosen channels; the defaults are the paper's for ImageNet."""

    alpha: float = field(default=2.0, metadata={"help": "Weight of the cache beside zero-shot, before any search."})
    max_alpha: float = field(default=7.0, metadata={"help": "End of the alpha grid (itself not tried)."})
    channels: int = field(default=500, metadata={"help": "Channels kept (of 1024, see scale_channels)."})
    scale_channels: bool = field(
        default=True,
        metadata={"help": "Keep channels · width / 1024, so that other widths keep the same share; false: as given."},
    )
    similarity_weight: float = field(
        default=0.7, metadata={"help": "How much it counts that a channel doesn't liken classes to each other."}
    )
    variance_weight: float = field(
        default=0.3, metadata={"help": "How much it counts that a channel varies between classes."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [
            f"{name} is {getattr(self, name)}, but must be {wanted}"
            for name, wanted, ok in (
                ("channels", "at least 1", self.channels >= 1),
                ("similarity_weight", "a number", math.isfinite(self.similarity_weight)),
                ("variance_weight", "a number", math.isfinite(self.variance_weight)),
            )
            if not ok
        ]
        if problems:
            raise ConfigError(f"These settings can't be used: {'; '.join(problems)}.")


def count_channels(config: ChannelConfig, dim: int) -> int:
    """How many of `dim` channels are kept.

    Raises:
        ConfigError: There aren't as many.
    """
    count = config.channels
    if config.scale_channels:
        count = max(1, round(count * dim / REFERENCE_WIDTH))
    if count > dim:
        scaled = f" ({config.channels} of {REFERENCE_WIDTH}, scaled)" if config.scale_channels else ""
        raise ConfigError(
            f"{count} channels{scaled} were asked for, but the features have {dim}: set method.channels lower."
        )
    return count


def pooled_text_weights(
    backbone: Backbone, names: Sequence[str], templates: Sequence[str], descriptions: Mapping[str, Sequence[str]]
) -> Tensor:
    """Unit text weights [classes, dim]: templates and sentences of a class pooled, each prompt counting the same.

    Every prompt's feature is normalised, all of a class are averaged, and the mean is normalised.
    """
    own = [
        [text for template in templates for text in render_prompts([name], template)] + list(descriptions.get(name, ()))
        for name in names
    ]
    features = sentence_features(backbone, [text for texts in own for text in texts])
    return F.normalize(unit_means(torch.split(features, [len(texts) for texts in own])), dim=-1)


def channel_scores(
    text: Tensor, keys: Tensor, labels: Tensor, *, similarity_weight: float, variance_weight: float
) -> Tensor:
    """How well each channel tells classes apart, float64 [dim]: -w0 · similarity of classes + w1 · variance of texts.

    The similarity is the mean over ordered pairs of different classes, and over all pairs of their samples (the text
    and the keys of a class), of the channel's products. With m_k the mean of a class's samples it is
    ((Σ m)² - Σ m²) / (K (K - 1)): no pair is ever visited.

    Args:
        text: Unit text weights, [classes, dim].
        keys: Unit keys, [n, dim]; none for the text alone.
        labels: Class of each key, int64 [n].
        similarity_weight: w0.
        variance_weight: w1.
    """
    classes = len(text)
    sums = text.double().index_add(0, labels, keys.double())  # [classes, dim]
    counts = 1 + labels.bincount(minlength=classes)
    means = sums / counts[:, None]
    if classes < 2:  # nothing to tell apart, and any channels do
        return torch.zeros_like(means[0])
    similarity = (means.sum(dim=0).square() - means.square().sum(dim=0)) / (classes * (classes - 1))
    return variance_weight * text.double().var(dim=0) - similarity_weight * similarity


def best_channels(scores: Tensor, count: int) -> Tensor:
    """The `count` channels with the highest scores, in their own order, int64 [count]."""
    return scores.topk(count).indices.sort().values


class Rivals:
    """For which alphas clip + alpha · cache puts the right class above all others, for some images.

    Each rival bounds 1 / alpha: one that zero-shot puts ahead of the right class from above, one that it puts behind
    from below. So one pass over the cache's sums serves any number of alphas, and what zero-shot says is prepared once
    for all caches. A tie is not a hit.

    Args:
        clip: [classes, n].
        labels: int64 [n].
    """

    def __init__(self, clip: Tensor, labels: Tensor) -> None:
        self.labels, self.images = labels, torch.arange(len(labels), device=labels.device)
        gap = clip - clip[labels, self.images]  # [classes, n], how far zero-shot puts the right class behind
        rival = torch.ones_like(gap, dtype=torch.bool)
        rival[labels, self.images] = False
        ahead, behind = rival & (gap >= 0), rival & (gap < 0)
        self.above = torch.where(ahead, 0.0, torch.inf), torch.where(ahead, 1 / gap, 0.0)
        self.below = torch.where(behind, 0.0, -torch.inf), torch.where(behind, 1 / gap, 0.0)

    def bounds(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Between which values of 1 / alpha an image is right, lowest and highest, both [variants, n].

        Args:
            cache: [classes, variants, n]; overwritten.
        """
        own = cache[self.labels, :, self.images].T.contiguous()  # [variants, n]
        lead = torch.sub(own, cache, out=cache)
        shape = (len(cache), 1, -1)  # a tie in both is 0 · inf: NaN, and no alpha lies on the right side of it
        (offset, factor), (base, slope) = self.above, self.below
        highest = torch.addcmul(offset.view(shape), lead, factor.view(shape)).amin(dim=0)
        lowest = torch.addcmul(base.view(shape), lead, slope.view(shape)).amax(dim=0)
        return lowest, highest


class KeyBlocks(ClassBlocks):
    """Keys in a block per class, [classes, most shots]: short classes are filled up by keys that weigh nothing."""

    def weights(self, values: Tensor) -> Tensor:
        """Values of the keys [n, variants] as blocks [classes, variants, most shots], 0 where there is no key."""
        return torch.where(self.filled[..., None], values[self.index], 0.0).mT.contiguous()

    def distances(self, values: Tensor) -> Tensor:
        """Values [rows, n] as blocks [classes, most shots, rows]."""
        return values.T[self.index]


class ChannelCacheMethod(CacheMethod):
    """A cache beside zero-shot whose texts may be pooled with sentences, searched over alpha, beta and variants."""

    config_class = ChannelConfig
    config: ChannelConfig
    reads_descriptions = "optional"
    _pooled_memo: tuple[Any, Tensor] | None = None

    def num_channels(self) -> int:
        """How many channels are kept."""
        return count_channels(self.config, self.backbone.spec.embed_dim)

    def zero_shot(self) -> Tensor:
        """Unit text weights [classes, dim] of the current classes, sentences about them included."""
        if not self.descriptions:
            return super().zero_shot()
        key = self.texts_key
        if self._pooled_memo is None or self._pooled_memo[0] != key:
            exact = torch.autocast(self.backbone.device.type, enabled=False)
            with torch.inference_mode(False), torch.no_grad(), exact:
                weights = pooled_text_weights(self.backbone, self.class_names, self.templates, self.descriptions)
            self._pooled_memo = (key, weights)
        return self._pooled_memo[1]

    def build_cache(self, task: FitTask) -> None:
        if len(task.class_names) < 2:
            raise DataError(f"{self.name} chooses channels that tell classes apart: it needs at least two classes.")
        super().build_cache(task)

    # --- search -------------------------------------------------------------------------------------------------------

    def distances(self, f: Tensor) -> Tensor:
        """Similarity - 1 of unit features [n, dim] to the keys, [n, keys]."""
        raise NotImplementedError(f"{type(self).__name__} doesn't define distances.")

    def key_values(self) -> Tensor:
        """What each key weighs in each variant of the grid, [keys, variants]."""
        raise NotImplementedError(f"{type(self).__name__} doesn't define key_values.")

    @torch.no_grad()
    def search(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        """Choose alpha, beta and the variant by validation accuracy; without validation shots the settings stay.

        Of equal settings the first wins; beta in the outer loop, then alpha, then the variant.
        """
        if not self.config.search:
            return {"searched": False, "why_not_searched": "search is off"}
        if task.val is None or not len(task.val.labels):
            return {"searched": False, "why_not_searched": "there are no validation images"}
        alphas = grid(self.config.max_alpha, self.config.alpha_steps)
        betas = grid(self.config.max_beta, self.config.beta_steps)
        blocks = KeyBlocks(self.key_labels, len(self.fitted_names))
        weights = blocks.weights(self.key_values())  # [classes, variants, most shots]
        images, variants, device = len(task.val.labels), weights.shape[1], self.backbone.device
        inverse = (1 / alphas).to(device, torch.float32)[:, None, None]
        correct = torch.zeros(len(betas), len(alphas), variants, dtype=torch.int64, device=device)
        features = F.normalize(read_all(task.val), dim=-1)
        rows = max(_LEAST_ROWS, int(_SEARCH_BYTES / (4 * max(blocks.index.numel(), len(weights) * variants, 1))))
        for indices in torch.split(torch.arange(images), rows):
            progress_of(loop)(f"{self.name}: searching its settings", int(indices[0]), images)
            f, labels = features[indices].to(device), task.val.labels[indices].to(device)
            distance, rivals = blocks.distances(self.distances(f)), Rivals(self.clip_logits(f).T, labels)
            for index, similar in enumerate(_similarities(distance, betas.tolist())):
                lowest, highest = rivals.bounds(weights @ similar)
                correct[index] += ((lowest < inverse) & (inverse < highest)).sum(dim=-1)  # [alphas, variants]
        correct = correct.cpu()
        best = int(correct.argmax())  # the first of equals
        beta, alpha = betas[best // (len(alphas) * variants)], alphas[best // variants % len(alphas)]
        self.beta.fill_(float(beta))
        self.alpha.fill_(float(alpha))
        return {
            "alpha": float(alpha),
            "beta": float(beta),
            "variant": best % variants,
            "searched": True,
            "settings_tried": correct.numel(),
            "val_images": images,
            "val_accuracy": int(correct.max()) / images,
        }

    def reference_key(self, key: str) -> str | None:
        raise UnsupportedError(f"{self.name} has no reference checkpoints to read.")

    def load_reference_state(self, state: Mapping[str, Tensor]) -> None:
        raise UnsupportedError(f"{self.name} has no reference checkpoints to read.")
