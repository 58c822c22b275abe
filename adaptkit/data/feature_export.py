"""Writes a dataset's frozen features as one file, in the layout of `adaptkit.data.feature_files`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptkit.backbones.base import Backbone
from adaptkit.data.feature_reader import LAYOUT_VERSION
from adaptkit.data.features import FeatureStore, Precision, ViewSettings
from adaptkit.data.few_shot import sample_few_shot
from adaptkit.data.splits import Dataset, Split
from adaptkit.data.templates import render_all
from adaptkit.errors import ConfigError, DataError
from adaptkit.storage import write_safetensors
from adaptkit.types import ProgressCallback

_TEXTS_AT_ONCE = 1024


def export_features(
    dataset: Dataset,
    backbone: Backbone,
    path: str | Path,
    *,
    shots: Sequence[int] = (),
    seed: int = 1,
    sampler: str = "coop",
    views: int = 0,
    view_settings: ViewSettings | None = None,
    store: FeatureStore | None = None,
    batch_size: int = 64,
    precision: Precision = "fp32",
    progress: ProgressCallback | None = None,
) -> dict[str, int]:
    """Encode a dataset's images and texts, and write them as a file that `features:FILE` reads.

    Args:
        dataset: With images.
        backbone: The frozen model.
        path: Where to; an existing file is replaced.
        shots: Ready draws to write in the place of all training images, as "train1", "train4", …; () for all images.
        seed: Seeds the draws.
        sampler: Whose draws.
        views: Augmented looks at each training image besides the plain one.
        view_settings: How they are drawn; None for CoOp's crops, with `seed`.
        store: Where features are kept; None for the default store.
        batch_size: Images encoded at once.
        precision: Of the image encoder.
        progress: Called as (what, done, total).

    Returns:
        Images by split.

    Raises:
        DataError: The dataset has no images, or too few for a draw.
        ConfigError: A number of shots twice.
        StorageError: The file can't be written.
    """
    if not dataset.train.source.pictures:
        raise DataError(f"{dataset.name} consists of features already: there is nothing to encode.")
    if len(set(shots)) < len(shots):
        raise ConfigError(f"The numbers of shots {', '.join(map(str, shots))} name one twice: give each once.")
    splits: dict[str, Split] = {"train": dataset.train}
    if shots:
        drawn = {count: sample_few_shot(dataset.train, None, count, seed, sampler) for count in shots}
        splits = {f"train{count}": dataset.train.subset(few.train_indices) for count, few in drawn.items()}
    splits |= {name: split for name, split in dataset.splits.items() if name != "train"}
    store, looks = store or FeatureStore(), view_settings or ViewSettings(seed=seed)
    tensors: dict[str, Tensor] = {}
    for name, split in splits.items():
        inputs = store.inputs(
            backbone,
            split,
            views=views if name.startswith("train") else 0,
            settings=looks,
            batch_size=batch_size,
            precision=precision,
            progress=progress,
        )
        tensors[f"{name}_features"], tensors[f"{name}_labels"] = inputs.values[0], inputs.labels
        if inputs.num_views > 1:
            tensors[f"{name}_views"] = inputs.values[1:]
    texts, sentences = _texts(dataset, backbone, progress) if backbone.has_text else ({}, [])
    write_safetensors(path, tensors | texts, _metadata(dataset, backbone, sentences))
    return {name: len(split) for name, split in splits.items()}


def _texts(
    dataset: Dataset, backbone: Backbone, progress: ProgressCallback | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Text tensors by name, and the sentences behind the descriptions' rows."""
    prompts = [prompt for by_class in render_all(dataset.templates, dataset.class_names) for prompt in by_class]
    described = [
        (label, sentence)
        for label, name in enumerate(dataset.class_names)
        for sentence in dataset.descriptions.get(name, ())
    ]
    sentences = [sentence for _, sentence in described]
    features = _encode([*prompts, *sentences], backbone, progress)
    shape = (len(dataset.class_names), len(dataset.templates))
    tensors = {"text_features": features[: len(prompts)].unflatten(0, shape)}
    if sentences:
        tensors["description_features"] = features[len(prompts) :]
        tensors["description_labels"] = torch.tensor([label for label, _ in described])
    return tensors, sentences


def _encode(texts: Sequence[str], backbone: Backbone, progress: ProgressCallback | None) -> Tensor:
    """Unnormalised features [texts, dim] on the CPU, some at a time."""
    parts = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        parts.append(backbone.text_features(texts[start : start + _TEXTS_AT_ONCE]).float().cpu())
        if progress:
            progress("encoding texts", min(start + _TEXTS_AT_ONCE, len(texts)), len(texts))
    return torch.cat(parts)


def _metadata(dataset: Dataset, backbone: Backbone, sentences: Sequence[str]) -> dict[str, str]:
    spec = backbone.spec
    facts: dict[str, Any] = {
        "layout": LAYOUT_VERSION,
        "dataset": dataset.name,
        "class_names": list(dataset.class_names),
        "backbone": spec.name,
        "backbone_digest": spec.digest,
        "backbone_family": spec.family,
        "logit_scale": float(backbone.logit_scale),
        "logit_bias": float(backbone.logit_bias),
        "preprocessing": spec.preprocessing.to_dict(),
    }
    if backbone.has_text:
        facts["templates"] = list(dataset.templates)
    if sentences:
        facts["descriptions"] = list(sentences)
    if dataset.notes:
        facts["notes"] = list(dataset.notes)
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
