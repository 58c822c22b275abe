"""Runs on stored features: which backbone they get, and what can't run on them."""

from __future__ import annotations

import torch

from adaptkit.backbones.base import Backbone
from adaptkit.backbones.load import load_backbone
from adaptkit.backbones.stored import StoredBackbone
from adaptkit.data.feature_files import StoredSource
from adaptkit.data.feature_reader import FeatureFile
from adaptkit.data.splits import Dataset
from adaptkit.errors import BackboneError, DataError, UnsupportedError
from adaptkit.evaluation.recipes import Resolved
from adaptkit.methods.base import Method

DEFAULT_BACKBONE = "mini"


def feature_file(dataset: Dataset) -> FeatureFile | None:
    """The file whose features stand in for the dataset's images, or None where it has images."""
    source = dataset.train.source
    return source.file if isinstance(source, StoredSource) else None


def backbone_for(dataset: Dataset, name: str | None = None, *, device: str | torch.device = "cpu") -> Backbone:
    """The backbone to run a dataset on: the one named, else a feature file's own, else `mini`.

    Args:
        dataset: With images, or with stored features.
        name: As for `load_backbone`. With stored features it is the model that made them, to read texts that the file
            has no features of (prompts that are learned, other templates, descriptions).
        device: Where it shall live.

    Raises:
        BackboneError: The model named isn't the one that made the features.
    """
    file = feature_file(dataset)
    if file is None:
        return load_backbone(name or DEFAULT_BACKBONE, device=device)
    if name is None:
        return file.stored_backbone(dataset.class_names).to(device)
    backbone = load_backbone(name, device=device)
    if backbone.spec.embed_dim != file.dim or (file.digest and file.digest != backbone.spec.digest):
        what = (
            f"features of {backbone.spec.embed_dim} numbers, those in the file have {file.dim}"
            if backbone.spec.embed_dim != file.dim
            else f"the digest {backbone.spec.digest[:12]}…, the file names {file.digest[:12]}…"
        )
        raise BackboneError(
            f"{file.path} holds features of {file.backbone!r}, and {name!r} is another model ({what}): leave --backbone"
            " out, or name that model."
        )
    return backbone


def check_stored(
    kind: type[Method],
    backbone: Backbone,
    dataset: Dataset,
    templates: tuple[str, ...],
    resolved: Resolved,
) -> None:
    """Refuse, before any work, what can't run on stored features; nothing happens for datasets with images.

    Args:
        kind: The method.
        backbone: From `backbone_for`.
        dataset: What it shall run on.
        templates: The run's.
        resolved: The run's settings.

    Raises:
        UnsupportedError: The method reads images, draws new views, or needs a text encoder that isn't there.
        DataError: Templates or descriptions that the file has no features of.
    """
    file = feature_file(dataset)
    if file is None:
        return
    if kind.reads == "images":
        raise UnsupportedError(
            f"{kind.name} trains on images, and {file.path} holds features only: choose a method that works on features"
            " ('adaptkit list methods' says which)."
        )
    if resolved.training.fresh_views and kind.default_training is not None:
        raise UnsupportedError(
            f"fresh_views draws new looks at images, and {file.path} holds features only: leave it off."
        )
    if not isinstance(backbone, StoredBackbone):
        return
    if kind.writes_texts:
        raise UnsupportedError(
            f"{kind.name} needs a text encoder, and {file.path} holds features of ready texts only: give the model that"
            f" made them ({file.backbone}) with --backbone, or choose another method."
        )
    if not backbone.has_text:
        return  # the method itself says whether it needs texts
    if dataset.source.get("templates") == "given" and templates != dataset.templates:
        raise DataError(
            f"{file.path} holds text features for {', '.join(map(repr, file.templates[:3]))}, and other templates were"
            " asked for: leave --template out, or give the model that made them with --backbone."
        )
    _check_descriptions(kind, backbone, dataset, file)
    if kind.reads_descriptions == "needed":
        _check_sentences(kind, backbone, dataset, templates, resolved, file)


def _check_descriptions(kind: type[Method], backbone: StoredBackbone, dataset: Dataset, file: FeatureFile) -> None:
    """Refuse descriptions that are needed and missing, or that the file has no features of."""
    if kind.reads_descriptions == "needed" and not dataset.descriptions:
        raise DataError(
            f"{kind.name} reads descriptions of the classes, and {file.path} holds none: add description_features and"
            " description_labels, or choose a method that reads names alone."
        )
    said = [text for texts in dataset.descriptions.values() for text in texts]
    unknown = [text for text in said if not backbone.knows(text)] if kind.reads_descriptions != "never" else []
    if unknown:
        raise DataError(
            f"{file.path} has no feature of the description {unknown[0]!r} ({len(unknown)} such): leave --descriptions"
            " out, or give the model that made the features with --backbone."
        )


def _check_sentences(
    kind: type[Method],
    backbone: StoredBackbone,
    dataset: Dataset,
    templates: tuple[str, ...],
    resolved: Resolved,
    file: FeatureFile,
) -> None:
    """Refuse methods that make other sentences of the descriptions; looking up what they ask for costs nothing."""
    try:
        method = kind(
            backbone,
            dataset.class_names,
            templates=templates,
            config=resolved.config,
            descriptions=dataset.descriptions,
        )
        with torch.no_grad():
            method(torch.ones(1, file.dim, device=backbone.device))
    except BackboneError as error:
        raise UnsupportedError(
            f"With these settings {kind.name} makes sentences of its own out of the descriptions, and {file.path} has"
            " features of the descriptions as they stand: set method.compat=false where there is such a setting, or"
            " give the model that made the features with --backbone."
        ) from error
