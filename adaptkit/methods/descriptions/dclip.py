"""DCLIP: an image is compared with sentences that name a class and one visible feature of it each.

Source: arXiv 2210.07183; dclip sheet; reference code sachit-menon/classify_by_description_release, load.py, main.py.
Kept from the reference: the mean of similarities, which is the product with the unnormalised mean of unit features:
classes whose sentences differ more have shorter vectors and smaller scores.
Differs from the reference: descriptors are found by class name (by position in the file there); linking words look at
whole words unless `compat` is set; a descriptor that begins with the class name is a whole sentence and stands as it is
(not under `compat`); a class without descriptors is refused, or with `fallback` answered by its templates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.errors import ConfigError, UnsupportedError
from adaptkit.methods import methods
from adaptkit.methods.base import ClassWeightMethod, MethodConfig, render_prompts
from adaptkit.methods.descriptions._sentences import DescribedMethod, is_whole, linked, plain_name, unit_means
from adaptkit.methods.folding import Fold, SentenceHead, sentence_owners
from adaptkit.types import FitTask, TrainingLoop

_FORWARD_BYTES = 256e6
"""Bounds the similarities of a batch and all sentences, where their maximum is taken."""


@dataclass(frozen=True)
class DCLIPConfig(MethodConfig):
    """Settings of DCLIP."""

    aggregation: Literal["mean", "max", "sum"] = field(
        default="mean", metadata={"help": "How a class's similarities become its score: mean, max or sum."}
    )
    class_name: Literal["prepend", "append", "none"] = field(
        default="prepend", metadata={"help": "Where the class name stands: before the descriptor, behind it, nowhere."}
    )
    link: bool = field(default=True, metadata={"help": 'Put "which is", "which" or "which has" before descriptors.'})
    before: str = field(default="", metadata={"help": "Text before a class name that is prepended."})
    between: str = field(default=", ", metadata={"help": "Text between class name and descriptor."})
    after: str = field(
        default="", metadata={"help": 'Text at the end, with a class name prepended ("." for ImageNet in the paper).'}
    )
    compat: bool = field(
        default=False, metadata={"help": "Link by first letters as the reference does (amber eyes: which is amber …)."}
    )
    fallback: bool = field(
        default=False, metadata={"help": "Answer classes without descriptors by their templates, don't refuse them."}
    )

    def __post_init__(self) -> None:
        for name, kinds in (("aggregation", ("mean", "max", "sum")), ("class_name", ("prepend", "append", "none"))):
            if getattr(self, name) not in kinds:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(kinds)}.")


@methods.register("dclip")
class DCLIP(DescribedMethod, ClassWeightMethod):
    """Describes each class by visible features, a sentence each, and averages the similarities; nothing is learned."""

    name = "dclip"
    config_class = DCLIPConfig
    config: DCLIPConfig
    _bank: tuple[Any, list[Tensor]] | None = None

    def sentences(self, name: str) -> list[str]:
        """The sentences of a class."""
        descriptors = self.descriptions.get(name)
        if descriptors:
            return [self.sentence(name, descriptor) for descriptor in descriptors]
        if descriptors is not None:  # described by an empty list
            return [self.sentence(name, "")] if self.config.compat else [plain_name(name)]
        return [prompt for template in self.templates for prompt in render_prompts([name], template)]

    def sentence(self, name: str, descriptor: str) -> str:
        """One sentence: class name and linked descriptor, as the settings say.

        Example: "tabby cat, which has whiskers".
        """
        config, word = self.config, plain_name(name)
        if not config.compat and is_whole(descriptor, name):
            return descriptor
        clause = linked(descriptor, compat=config.compat) if config.link else descriptor
        if config.class_name == "none":
            return clause
        if config.class_name == "append":
            return f"{clause}{config.between}{word}"
        return f"{config.before}{word}{config.between}{clause}{config.after}"

    def class_weights(self) -> Tensor:
        """The mean (or sum) of unit sentence features, [classes, dim]; not unit rows.

        Raises:
            UnsupportedError: With aggregation "max", which no single vector per class stands for.
        """
        if self.config.aggregation == "max":
            raise UnsupportedError('dclip with aggregation "max" has no single vector per class: choose "mean".')
        bank = self._unit_bank()
        means = unit_means(bank)
        if self.config.aggregation == "mean":
            return means
        return means * torch.tensor([[len(rows)] for rows in bank], device=means.device)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.config.aggregation != "max":
            return super().forward(inputs)
        bank = self._unit_bank()
        rows, counts = torch.cat(bank), [len(one) for one in bank]
        step = max(1, int(_FORWARD_BYTES / (4 * len(rows))))
        parts = []
        for part in torch.split(inputs, step):
            similar = self.cosine_logits(part, rows)  # [part, sentences]
            parts.append(torch.stack([one.amax(dim=1) for one in torch.split(similar, counts, dim=1)], dim=1))
        return torch.cat(parts)  # [batch, classes]

    def fold(self) -> Fold:
        if self.config.aggregation != "max":
            return super().fold()
        bank, (scale, bias) = self._unit_bank(), self.scale_and_bias()
        owners = sentence_owners([len(rows) for rows in bank], self.backbone.device)
        return Fold(SentenceHead(torch.cat(bank), owners, len(bank), scale=scale, bias=bias, how="max"))

    def _unit_bank(self) -> list[Tensor]:
        """Per class its unit sentence features [sentences, dim]; remembered for one class list."""
        key = self.texts_key
        if self._bank is None or self._bank[0] != key:
            features = self.class_sentence_features([self.sentences(name) for name in self.class_names])
            self._bank = (key, [F.normalize(rows, dim=-1) for rows in features])
        return self._bank[1]

    def fit(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        """Nothing is learned; the facts count the sentences."""
        return self.sentence_facts([self.sentences(name) for name in self.fitted_names])
