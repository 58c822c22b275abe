"""An adapted model, and how it is written to disk and read back, safely also from strangers.

An adapter folder holds `adapter_model.safetensors` (only what was learned), `adapter_config.json` (everything needed to
rebuild the method next to its backbone) and `README.md` (a card made from facts). Reading one runs no code of its
author: tensors come from safetensors, whose sizes are checked against the file before anything is allocated, and the
method's name is looked up in the registry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit import __version__
from adaptkit.backbones.base import Backbone
from adaptkit.backbones.load import load_backbone
from adaptkit.backbones.stored import UNIDENTIFIED
from adaptkit.config import from_mapping, to_mapping
from adaptkit.errors import AdapterError, AdaptKitError, StorageError
from adaptkit.methods import methods
from adaptkit.methods.base import Method
from adaptkit.storage import new_folder, read_json, read_safetensors, write_json, write_safetensors

SCHEMA_VERSION = 1
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
LABEL_FACTS = "classifier"
"""Where the facts keep the labels of a `FewShotClassifier`."""

_MAX_CONFIG_BYTES = 32 * 2**20
_MAX_WEIGHT_BYTES = 8 * 2**30


@dataclass(frozen=True)
class AdapterConfig:
    """What `adapter_config.json` holds.

    Args:
        schema_version: Version of this layout.
        adaptkit_version: Version that wrote it.
        method: Registered name of the method.
        config: The method's settings.
        class_names: The classes it was fitted on, in label order.
        templates: Zero-shot templates.
        backbone: `name`, `digest` and `embed_dim` of the backbone it belongs to.
        preprocessing: The backbone's test transform, for readers that don't use adaptkit.
        facts: Metrics and other facts of the fit.
        descriptions: Sentences by class name, for methods that read them.
    """

    schema_version: int
    adaptkit_version: str
    method: str
    config: dict[str, Any]
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    backbone: dict[str, Any]
    preprocessing: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    descriptions: dict[str, tuple[str, ...]] = field(default_factory=dict)


class AdaptedModel(nn.Module):
    """A frozen backbone with a fitted method: a plain module from preprocessed pixels to logits.

    Args:
        method: The fitted method; its backbone comes along.
    """

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.backbone = method.backbone
        self.method = method
        self.eval()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes it chooses among, in the order of its logits."""
        return self.method.class_names

    def set_classes(self, names: Sequence[str]) -> AdaptedModel:
        """Choose among `names` from now on, as far as the method can (see `Method.set_classes`); returns itself."""
        self.method.set_classes(names)
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [batch, classes] of preprocessed pixels [batch, 3, size, size]."""
        return self.method(pixels if self.method.reads == "images" else self.backbone.encode_image(pixels))


def save_adapter(
    folder: str | Path, model: AdaptedModel, facts: Mapping[str, Any] | None = None, *, overwrite: bool = False
) -> Path:
    """Write an adapter folder; it appears whole or not at all.

    Args:
        folder: Where to; must not exist or be empty, unless `overwrite`.
        model: What to save.
        facts: Metrics, split digest, shots and so on, for the config and the card.
        overwrite: Replace an existing folder.

    Raises:
        StorageError: The folder can't be written, or isn't empty.
    """
    method, spec = model.method, model.backbone.spec
    config = AdapterConfig(
        SCHEMA_VERSION,
        __version__,
        method.name,
        to_mapping(method.config),
        method.fitted_names,
        method.templates,
        {"name": spec.name, "digest": spec.digest, "embed_dim": spec.embed_dim},
        spec.preprocessing.to_dict(),
        dict(facts or {}),
        dict(method.descriptions),
    )
    state = {key: value.detach().cpu().contiguous() for key, value in method.adapter_state().items()}
    with new_folder(folder, overwrite=overwrite) as building:
        write_safetensors(building / WEIGHTS_FILE, state)
        write_json(building / CONFIG_FILE, asdict(config))
        (building / "README.md").write_text(_card(config, method), encoding="utf-8")
        method.write_extras(building)
    return Path(folder)


def read_adapter_config(folder: str | Path) -> AdapterConfig:
    """Read and check `adapter_config.json`.

    Raises:
        AdapterError: There is none, it is damaged, or a newer adaptkit wrote it.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(f"{folder} is not an adapter folder: it has no {CONFIG_FILE}.")
    try:
        content = read_json(path, max_bytes=_MAX_CONFIG_BYTES)
    except StorageError as error:
        raise AdapterError(f"{path} is damaged ({error}): save the adapter again.") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path} doesn't hold a JSON object: save the adapter again.")
    version = content.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise AdapterError(
            f"{path} has schema version {version!r}; this adaptkit reads up to {SCHEMA_VERSION}: update adaptkit."
        )
    try:
        config = from_mapping(AdapterConfig, content, where=CONFIG_FILE)
    except AdaptKitError as error:
        raise AdapterError(f"{path} can't be used: {error}") from error
    for key in ("name", "digest"):
        if not isinstance(config.backbone.get(key), str):
            raise AdapterError(f"{path} doesn't name its backbone's {key}: save the adapter again.")
    return config


def saved_labels(config: AdapterConfig, folder: str | Path) -> list[Any]:
    """A classifier's own labels in the order of the class names, which they are where an adapter has none besides.

    Raises:
        AdapterError: They don't fit the classes.
    """
    content = config.facts.get(LABEL_FACTS)
    if content is None:
        return list(config.class_names)
    labels = content.get("labels") if isinstance(content, Mapping) else None
    kinds = {type(label) for label in labels} if isinstance(labels, list) else set()
    if not isinstance(labels, list) or len(labels) != len(config.class_names) or kinds not in ({str}, {int}, {bool}):
        raise AdapterError(
            f"The labels in {folder} don't fit its {len(config.class_names)} classes: save the classifier again."
        )
    if len(set(labels)) < len(labels):
        raise AdapterError(f"The labels in {folder} hold one twice: save the classifier again.")
    return labels


def load_adapter(
    folder: str | Path, backbone: Backbone | None = None, *, device: str | torch.device = "cpu"
) -> AdaptedModel:
    """Read an adapter folder back.

    Args:
        folder: Written by `save_adapter`.
        backbone: The backbone, where it is loaded already; None loads the one the adapter names.
        device: Where to put a backbone loaded here.

    Raises:
        AdapterError: The folder is damaged, or the backbone isn't the one the adapter was trained on.
        UnknownNameError: The adapter's method isn't in this adaptkit.
    """
    config = read_adapter_config(folder)
    method_class = methods.get(config.method)
    settings = from_mapping(method_class.config_class, config.config, where=f"{CONFIG_FILE}, config")
    stored = config.backbone["digest"].startswith(UNIDENTIFIED)
    if stored and (backbone is None or backbone.spec.digest != config.backbone["digest"]):
        raise AdapterError(
            f"{folder} was made from a file of features, which names {config.backbone['name']!r} and doesn't identify"
            " its weights, so it can't answer images: run the method on that file again with --backbone naming the"
            " model that made the features."
        )
    if backbone is None:
        backbone = load_backbone(config.backbone["name"], device=device)
    if backbone.spec.digest != config.backbone["digest"]:
        raise AdapterError(
            f"{folder} was trained on {config.backbone['name']!r} with digest {config.backbone['digest'][:12]}…, but"
            f" {backbone.spec.name!r} has digest {backbone.spec.digest[:12]}…: load the backbone it was trained on."
        )
    try:
        state = read_safetensors(Path(folder) / WEIGHTS_FILE, max_bytes=_MAX_WEIGHT_BYTES)
    except (StorageError, FileNotFoundError) as error:
        raise AdapterError(f"{Path(folder) / WEIGHTS_FILE} can't be read ({error}): save the adapter again.") from error
    method = method_class(
        backbone,
        config.class_names,
        templates=config.templates,
        config=settings,
        descriptions=config.descriptions,
    )
    method.load_adapter_state({key: value.to(backbone.device) for key, value in state.items()})
    return AdaptedModel(method)


def _card(config: AdapterConfig, method: Method) -> str:
    """The adapter's card: facts only, nothing guessed."""
    names = ", ".join(config.class_names[:20]) + (", …" if len(config.class_names) > 20 else "")
    lines = [
        f"# {config.method} on {config.backbone['name']}",
        "",
        f"An adapter made with adaptkit {config.adaptkit_version}: {method.num_trained():,} trained numbers,"
        f" {len(config.class_names)} classes.",
        "",
        f"- classes: {names}",
        f"- templates: {'; '.join(config.templates)}",
        f"- backbone: {config.backbone['name']}, digest {config.backbone['digest']}",
        f"- classes it wasn't fitted on: {_NOVEL[method.novel_classes]}",
        *(f"- {key}: {value}" for key, value in config.facts.items() if not isinstance(value, (dict, list))),
        "",
        "```python",
        "import adaptkit",
        "",
        'classifier = adaptkit.load("PATH/TO/THIS/FOLDER")',
        'classifier.predict(["image.png"])',
        "```",
        "",
    ]
    return "\n".join(lines)


_NOVEL = {
    "open": "served by what was learned",
    "synthesised": "served by parameters made from their names and the fitted classes",
    "zero-shot": "answered zero-shot, and flagged",
    "refused": "refused",
}
