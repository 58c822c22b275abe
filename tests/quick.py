"""What lets a test run any method in short time: settings, and sentences for methods that read some."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from adaptkit.data.splits import Dataset
from adaptkit.methods import methods
from adaptkit.methods.base import GradientMethod, MethodConfig
from tests.backbones import tiny_mllm


def quick_overrides(name: str) -> list[str]:
    """As after --set: one epoch, one view, small searches, whichever the method reads."""
    kind = methods.get(name)
    overrides = [] if kind.default_training is None else ["training.views=1"]
    if issubclass(kind, GradientMethod):
        overrides.append("training.epochs=1")
    if "iterations" in kind.config_class.__dataclass_fields__:
        overrides.append("method.iterations=3")
    if "epochs" in kind.config_class.__dataclass_fields__:
        overrides.append("method.epochs=2")  # of a loop of its own
    if "skew" in kind.config_class.__dataclass_fields__:
        overrides.append("method.skew=iid")  # too few classes to be divided among clients
    if "examples" in kind.config_class.__dataclass_fields__:
        overrides.append("method.examples=2")  # as fit into a tiny model's context
    if "tags" in kind.config_class.__dataclass_fields__:  # a random model writes without end
        overrides += ["method.tags=false", "method.max_tokens=2", "method.rollouts=2"]
    if "class_list" in kind.config_class.__dataclass_fields__:
        overrides += ["method.samples=2", "method.class_list=never"]
    searched = [field for field in kind.config_class.__dataclass_fields__ if field.endswith("_steps")]
    return overrides + [f"method.{field}=3" for field in searched]


def short_answers(config: MethodConfig) -> MethodConfig:
    """Settings for a random model that writes without end: short answers, and a route that always gives one."""
    given = {field.name for field in dataclasses.fields(config)}
    if "tags" in given:
        config = dataclasses.replace(config, tags=False, max_tokens=3, route="likelihood")
    if "class_list" in given:
        config = dataclasses.replace(config, samples=3, class_list="never", route="letters")
    return config


def backbone_words(name: str) -> list[str]:
    """Words of the command line that choose a backbone for a method that the default one isn't for."""
    return ["--backbone", f"transformers:{tiny_mllm.save('llava')}"] if methods.get(name).needs_mllm else []


def sentences(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Two sentences for each class."""
    return {name: (f"{name}, which has a shape of its own.", f"a drawing that shows {name} alone") for name in names}


def described(dataset: Dataset) -> Dataset:
    """The dataset with sentences about its classes; methods that read none don't notice."""
    return dataclasses.replace(dataset, descriptions=sentences(dataset.class_names))


def description_words(name: str, names: Iterable[str], folder: Path) -> list[str]:
    """Words of the command line that hand a method sentences, where it needs them."""
    if methods.get(name).reads_descriptions != "needed":
        return []
    path = folder / "sentences.json"
    path.write_text(json.dumps(sentences(names)), encoding="utf-8")
    return ["--descriptions", str(path)]
