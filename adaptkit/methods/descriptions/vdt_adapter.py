"""VDT-Adapter (CLIP-A-self): self-attention over the sentences that describe a class, trained on a few shots.

Source: arXiv 2307.11661; vdt_adapter sheet; reference code mayug/VDT-Adapter, trainers/clip_adapter_gpt.py.
Kept from the reference: the factor 2 before the layer norm; zero-shot with sentences (adapter "none") doesn't
renormalise the mean, unless `renormalise` says so.
Differs from the reference: classes may have different numbers of sentences (attention and mean leave the padding out);
the width follows the backbone (512 or 1024 there); novel classes are evaluated by the same module, where the reference
starts training again and relies on finding its own checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.errors import ConfigError
from adaptkit.methods import methods
from adaptkit.methods.base import ClassWeightMethod, GradientMethod, MethodConfig, draw_linear, progress_of, read_all
from adaptkit.methods.descriptions._sentences import DescribedMethod, unit_means
from adaptkit.types import FitTask, Inputs, TrainingLoop, TrainingSettings

SEARCHED_RATIOS = (0.1, 0.2, 0.3, 0.5, 0.7)
"""vdt_adapter sheet, "Hyper-parameter search"."""

ATTENTION_DROPOUT, OUTPUT_DROPOUT = 0.1, 0.5

_THEIR_LAYERS = {
    "query": "adapter.attn.w_qs",
    "key": "adapter.attn.w_ks",
    "value": "adapter.attn.w_vs",
    "output": "adapter.attn.fc",
    "norm": "adapter.attn.layer_norm",
}


@dataclass(frozen=True)
class VDTAdapterConfig(MethodConfig):
    """Settings of VDT-Adapter."""

    adapter: Literal["self-attention", "linear", "linear-residual", "none"] = field(
        default="self-attention",
        metadata={"help": "self-attention (CLIP-A-self), linear, linear-residual, or none (zero-shot with sentences)."},
    )
    ratio: float = field(default=0.2, metadata={"help": "Share of the adapted feature in the mix, 0 to 1."})
    reduction: int = field(default=4, metadata={"help": "The inner width is the feature's width divided by this."})
    search_ratio: bool = field(
        default=False,
        metadata={"help": "Train once for each ratio of 0.1, 0.2, 0.3, 0.5, 0.7; keep the best on validation shots."},
    )
    renormalise: bool = field(
        default=False, metadata={"help": 'With adapter "none": bring the averaged feature back to length 1.'}
    )

    def __post_init__(self) -> None:
        kinds = ("self-attention", "linear", "linear-residual", "none")
        if self.adapter not in kinds:
            raise ConfigError(f"adapter is {self.adapter!r}, but must be one of {', '.join(kinds)}.")
        if not 0 <= self.ratio <= 1:
            raise ConfigError(f"ratio is {self.ratio}, but must lie between 0 and 1.")
        if self.reduction < 1:
            raise ConfigError(f"reduction is {self.reduction}, but must be at least 1.")
        if self.search_ratio and self.adapter not in ("self-attention", "linear-residual"):
            raise ConfigError(f"search_ratio asks for a ratio, and the adapter {self.adapter!r} has none.")


@methods.register("vdt-adapter")
class VDTAdapter(DescribedMethod, ClassWeightMethod, GradientMethod):
    """Self-attention over the sentences of each class, trained on the text side alone.

    Attributes:
        ratio: Float buffer [].
    """

    name = "vdt-adapter"
    config_class = VDTAdapterConfig
    config: VDTAdapterConfig
    # vdt_adapter sheet, "Loss and optimisation": the ViT-B/16 config
    default_training = TrainingSettings(epochs=10, batch_size=1, views=10)
    ratio: Tensor
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    _sentences: tuple[Any, Tensor, Tensor] | None = None

    def build(self) -> None:
        dim = self.backbone.spec.embed_dim
        hidden = dim // self.config.reduction
        if hidden < 1:
            raise ConfigError(
                f"reduction {self.config.reduction} leaves nothing of {dim} features: choose at most {dim}."
            )
        self.hidden = hidden
        self.register_buffer("ratio", torch.tensor(float(self.config.ratio)))
        if self.config.adapter == "self-attention":
            self._build_attention(dim, hidden)
        elif self.config.adapter != "none":
            self.down = draw_linear(dim, hidden, self.generator, bias=False)
            self.up = draw_linear(hidden, dim, self.generator, bias=False)

    def _build_attention(self, dim: int, hidden: int) -> None:
        for name, gain in (("query", 1.0), ("key", 1.0), ("value", 0.67)):
            layer = draw_linear(dim, hidden, self.generator, bias=False)
            nn.init.xavier_normal_(layer.weight, gain, self.generator)
            setattr(self, name, layer)
        self.output = draw_linear(hidden, dim, self.generator)  # its bias keeps torch's default draw
        nn.init.xavier_normal_(self.output.weight, 0.67, self.generator)
        self.norm = nn.LayerNorm(dim)

    # --- text features ------------------------------------------------------------------------------------------------

    def sentences(self) -> tuple[Tensor, Tensor]:
        """Unnormalised features [classes, most sentences, dim], and which are no padding, bool [classes, most]."""
        key = self.texts_key
        if self._sentences is None or self._sentences[0] != key:
            rows = self.class_sentence_features([self.descriptions[name] for name in self.class_names])
            counts = torch.tensor([len(one) for one in rows], device=rows[0].device)
            features = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            there = torch.arange(features.shape[1], device=counts.device) < counts[:, None]
            self._sentences = (key, features, there)
        return self._sentences[1], self._sentences[2]

    def class_features(self) -> Tensor:
        """What the adapter makes of each class's sentences, before normalisation, [classes, dim]."""
        features, there = self.sentences()
        if self.config.adapter == "none":
            means = unit_means([rows[seen] for rows, seen in zip(features, there, strict=True)])
            return F.normalize(means, dim=-1) if self.config.renormalise else means
        if self.config.adapter == "self-attention":
            return _mean(self._attended(features, there), there)
        mean = _mean(features, there)
        adapted = F.relu(self.up(F.relu(self.down(mean))))
        return adapted if self.config.adapter == "linear" else self.ratio * adapted + (1 - self.ratio) * mean

    def _attended(self, features: Tensor, there: Tensor) -> Tensor:
        """[classes, most, dim]; what stands in place of padding means nothing."""
        scores = self.query(features) @ self.key(features).mT / self.hidden**0.5  # [classes, most, most]
        attention = scores.masked_fill(~there[:, None], -torch.inf).softmax(dim=-1)
        attention = F.dropout(attention, ATTENTION_DROPOUT, self.training)
        adapted = F.dropout(self.output(attention @ self.value(features)), OUTPUT_DROPOUT, self.training)
        mixed: Tensor = self.norm(2 * (self.ratio * adapted + (1 - self.ratio) * features))
        return mixed

    def class_weights(self) -> Tensor:
        """[classes, dim]; unit rows, except zero-shot with sentences, whose means keep their length."""
        features = self.class_features()
        return features if self.config.adapter == "none" else F.normalize(features, dim=-1)

    # --- fitting ------------------------------------------------------------------------------------------------------

    def fit(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        """Train; where the ratio is searched, once for each, from the same start."""
        facts = self.sentence_facts([self.descriptions[name] for name in self.fitted_names])
        if self.config.adapter == "none":
            return {**facts, "settings_tried": 0}
        val = task.val if task.val is not None and len(task.val.labels) else None
        if not self.config.search_ratio or val is None:
            why = {"why_not_searched": "there are no validation images"} if self.config.search_ratio else {}
            report = super().fit(task, loop)
            return {**report, **facts, "ratio": float(self.ratio), "searched": False, "settings_tried": 0, **why}
        return {**self._search(task, val, loop), **facts}

    def _search(self, task: FitTask, val: Inputs, loop: TrainingLoop | None) -> dict[str, Any]:
        """Train with each ratio, keep the one that validates best; of equals the smallest."""
        start = {key: value.clone() for key, value in self.adapter_state().items()}
        inputs, labels = read_all(val).to(self.ratio.device), val.labels.to(self.ratio.device)
        found: list[tuple[float, dict[str, Tensor], dict[str, Any]]] = []
        for ratio in SEARCHED_RATIOS:
            progress_of(loop)(f"{self.name}: searching the ratio", len(found), len(SEARCHED_RATIOS))
            self.load_state_dict({**start, "ratio": torch.tensor(ratio)})
            report = super().fit(task, loop)
            with torch.no_grad():
                accuracy = float((self(inputs).argmax(dim=-1) == labels).float().mean())
            found.append((accuracy, {key: value.clone() for key, value in self.adapter_state().items()}, report))
            if report.get("interrupted"):
                break
        accuracy, state, report = max(found, key=lambda one: one[0])
        self.load_state_dict(state)
        return {
            **report,
            "ratio": float(self.ratio),
            "searched": True,
            "settings_tried": len(found),
            "interrupted": len(found) < len(SEARCHED_RATIOS) or bool(found[-1][2].get("interrupted")),
            "val_accuracy": accuracy,
            "val_images": len(labels),
        }

    # --- the reference's checkpoints ----------------------------------------------------------------------------------

    def reference_key(self, key: str) -> str | None:
        if key == "ratio":
            return None
        layer, _, tensor = key.partition(".")
        if layer in ("down", "up"):
            return f"adapter.fc.{0 if layer == 'down' else 2}.{tensor}"
        return f"{_THEIR_LAYERS[layer]}.{tensor}"

    @classmethod
    def reference_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The ratio can't be seen in a checkpoint."""
        for name, adapter in (("adapter.attn.w_qs.weight", "self-attention"), ("adapter.fc.0.weight", "linear")):
            weight = state.get(name, state.get(name.partition(".")[2]))
            if weight is not None and weight.dim() == 2 and weight.shape[0]:
                return {"adapter": adapter, "reduction": max(1, weight.shape[1] // weight.shape[0])}
        return {}


def _mean(features: Tensor, there: Tensor) -> Tensor:
    """The mean over the sentences that are there: [classes, most, dim] to [classes, dim]."""
    shares = there.to(features.dtype) / there.sum(dim=1, keepdim=True)
    return (features * shares[:, :, None]).sum(dim=1)
