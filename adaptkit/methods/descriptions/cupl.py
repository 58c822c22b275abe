"""CuPL: the zero-shot classifier with a language model's sentences about each class in the place of templates.

Source: arXiv 2209.03320; cupl sheet; reference code
sarahpratt/CuPL. Without renormalising, it is zero-shot VDT: arXiv 2307.11661, vdt_adapter sheet.
Kept from the reference: templates and sentences of the combined variant lie in one pool, each with the same weight;
a sentence that is there twice counts twice.
Differs from the reference: classes are found by name, and two classes can't share one entry; sentences that are too
long lose their last words (their last tokens there).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from adaptkit.errors import ConfigError
from adaptkit.methods import methods
from adaptkit.methods.base import ClassWeightMethod, MethodConfig, render_prompts
from adaptkit.methods.descriptions._sentences import DescribedMethod, unit_means
from adaptkit.types import FitTask, TrainingLoop


@dataclass(frozen=True)
class CuPLConfig(MethodConfig):
    """Settings of CuPL."""

    prompts: Literal["standard", "sentences", "combined"] = field(
        default="sentences",
        metadata={"help": "standard (templates alone), sentences (CuPL), or combined (both in one pool)."},
    )
    renormalise: bool = field(
        default=True, metadata={"help": "Bring a class's averaged feature back to length 1; VDT's zero-shot doesn't."}
    )
    shorten: bool = field(
        default=True, metadata={"help": "Cut sentences that don't fit the text tower; otherwise they are refused."}
    )
    fallback: bool = field(
        default=False, metadata={"help": "Answer classes without sentences by their templates, don't refuse them."}
    )

    def __post_init__(self) -> None:
        if self.prompts not in ("standard", "sentences", "combined"):
            raise ConfigError(f"prompts is {self.prompts!r}, but must be standard, sentences or combined.")


@methods.register("cupl")
class CuPL(DescribedMethod, ClassWeightMethod):
    """Averages sentences about each class in the place of templates; nothing is learned."""

    name = "cupl"
    config_class = CuPLConfig
    config: CuPLConfig
    _rows: tuple[Any, Tensor] | None = None

    def _require_descriptions(self, names: Any) -> None:
        if self.config.prompts != "standard":
            super()._require_descriptions(names)

    def sentences(self, name: str) -> list[str]:
        """The prompts of a class, in the order in which they are pooled."""
        given = [] if self.config.prompts == "standard" else list(self.descriptions.get(name, ()))
        if given and self.config.prompts == "sentences":
            return given
        return given + [prompt for template in self.templates for prompt in render_prompts([name], template)]

    def class_weights(self) -> Tensor:
        key = self.texts_key
        if self._rows is None or self._rows[0] != key:
            by_class = [self.sentences(name) for name in self.class_names]
            means = unit_means(self.class_sentence_features(by_class, shorten=self.config.shorten))
            self._rows = (key, F.normalize(means, dim=-1) if self.config.renormalise else means)
        return self._rows[1]

    def fit(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        """Nothing is learned; the facts count the sentences."""
        return self.sentence_facts([self.sentences(name) for name in self.fitted_names])
