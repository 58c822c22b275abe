"""Reads and checks a file of features, whose layout `adaptkit.data.feature_files` describes."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptkit.backbones.base import BackboneSpec, Preprocessing
from adaptkit.backbones.stored import UNIDENTIFIED, StoredBackbone
from adaptkit.config import check_templates, from_mapping
from adaptkit.data.lists import LISTED, first_few, many
from adaptkit.data.splits import check_class_names
from adaptkit.data.templates import display_name, render
from adaptkit.errors import AdaptKitError, DataError, MissingPathError
from adaptkit.storage import digest_json, digest_tensors, read_safetensors, read_safetensors_header

LAYOUT_VERSION = 1
CLIP_SCALE = 100.0
"""Logit scale of OpenAI's CLIP models. Source: protocols sheet, section 0."""

UNNAMED = "{}"
"""The template of a file's text features where it doesn't say what was read."""

LENGTHS = {"image_length": "image", "text_length": "text"}
TRAIN_NAME = re.compile(r"^train([1-9]\d{0,5})?$")

_MAX_BYTES = 64 * 2**30
_FLOATS = ("F16", "BF16", "F32", "F64")
_INTEGERS = ("U8", "I8", "I16", "I32", "I64")
_METADATA = (
    "class_names", "backbone", "backbone_digest", "backbone_family", "logit_scale", "logit_bias", "image_length",
    "text_length", "templates", "descriptions", "preprocessing", "dataset", "notes", "layout",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class StoredSplit:
    """Features of some images.

    Args:
        features: Unnormalised, [images, dim], in the file's precision.
        labels: int64 [images].
        views: Augmented looks at them [views, images, dim], or None.
    """

    features: Tensor
    labels: Tensor
    views: Tensor | None = None


@dataclass(frozen=True, eq=False)
class FeatureFile:
    """What a file of features holds, checked.

    Args:
        path: The file.
        name: What the data is called.
        class_names: As stored, in label order.
        backbone: The model that made the features, in the file's words.
        digest: The model's digest in adaptkit, or "".
        family: As adaptkit calls the model's kind, or "features".
        logit_scale: exp of its logit scale.
        logit_bias: Added to logits.
        preprocessing: Its test transform, as far as it is known.
        splits: By name: "train", "train4", …, "val", "test".
        texts: [classes, templates, dim], or None.
        templates: Those of `texts`; (`UNNAMED`,) or numbered ones where the file doesn't say.
        sentences: [rows, dim], or None.
        sentence_labels: Class of each sentence, int64 [rows].
        sentence_texts: The sentences, or () where the file doesn't say.
        lengths: "image" and "text": what the features, which have unit length in the file, are multiplied by.
        notes: What a reader of results must know.
    """

    path: Path
    name: str
    class_names: tuple[str, ...]
    backbone: str
    digest: str
    family: str
    logit_scale: float
    logit_bias: float
    preprocessing: Preprocessing
    splits: dict[str, StoredSplit]
    texts: Tensor | None
    templates: tuple[str, ...]
    sentences: Tensor | None
    sentence_labels: Tensor
    sentence_texts: tuple[str, ...]
    lengths: Mapping[str, float]
    notes: tuple[str, ...] = ()

    @property
    def dim(self) -> int:
        """Size of a feature."""
        return next(int(split.features.shape[1]) for split in self.splits.values())

    @property
    def names_templates(self) -> bool:
        """Whether the file says what its text features read."""
        return bool(self.templates) and not self.templates[0].startswith(UNNAMED)

    def descriptions(self, shown: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Sentences by class name; stand-ins, which begin with the name, where the file doesn't hold them.

        Args:
            shown: Class names as a text tower reads them.
        """
        found: dict[str, list[str]] = {}
        for row, label in enumerate(self.sentence_labels.tolist()):
            name = shown[label]
            own = found.setdefault(name, [])
            own.append(self.sentence_texts[row] if self.sentence_texts else f"{name}, description {len(own) + 1}")
        return {name: tuple(sentences) for name, sentences in found.items()}

    def stored_backbone(self, shown: Sequence[str]) -> StoredBackbone:
        """The model as far as the file knows it: its name, its logit scale and the texts' features.

        Args:
            shown: Class names as prompts have them, in label order.
        """
        rows: list[Tensor] = []
        place: dict[str, int] = {}
        if self.texts is not None:
            rows.append(self.texts.float().flatten(0, 1) * self.lengths["text"])  # class by class, template by template
            prompts = [render(template, name) for name in shown for template in self.templates]
            place.update((prompt, row) for row, prompt in enumerate(prompts))
        if self.sentences is not None:
            start, said = sum(map(len, rows)), self.descriptions(shown)
            rows.append(self.sentences.float() * self.lengths["text"])
            taken = {name: iter(sentences) for name, sentences in said.items()}
            for row, label in enumerate(self.sentence_labels.tolist()):
                place.setdefault(next(taken[shown[label]]), start + row)
        features = torch.cat(rows) if rows else torch.empty(0, self.dim)
        of_texts = digest_json({"texts": place, "features": digest_tensors({"features": features})})
        spec = BackboneSpec(
            self.backbone,
            self.family,
            self.digest or UNIDENTIFIED + digest_json([self.backbone, self.dim, self.logit_scale, self.logit_bias]),
            self.dim,
            self.preprocessing,
            1 if rows else 0,
            opaque_image="only features are stored",
            opaque_text="only features are stored",
        )
        return StoredBackbone(
            spec,
            self.logit_scale,
            self.logit_bias,
            place,
            features,
            self.templates,
            of_texts,
            texts_length=self.lengths["text"] if self.texts is not None and _are_unit(self.texts) else None,
        )


def _are_unit(features: Tensor) -> bool:
    """Whether all rows have unit length, up to what rounding to their precision does to it."""
    lengths = features.float().norm(dim=-1)
    return bool(((lengths - 1).abs() <= 2 * torch.finfo(features.dtype).eps).all())


def with_lengths(file: FeatureFile, lengths: Mapping[str, float]) -> FeatureFile:
    """The file with other lengths for its features.

    Args:
        file: Whose features have unit length.
        lengths: By "image" and "text".

    Raises:
        DataError: Its features have lengths of their own.
    """
    for what in lengths:
        stored = [file.texts] if what == "text" else [split.features for split in file.splits.values()]
        if not all(_are_unit(features) for features in stored if features is not None):
            raise DataError(
                f"{file.path} has {what} features with lengths of their own: {what}_length is for features that were"
                " scaled to 1; leave it out."
            )
    said = [f"{what} features are taken to be {length:g} long" for what, length in lengths.items()]
    return replace(file, lengths={**file.lengths, **lengths}, notes=(*file.notes, *said))


# --- reading ----------------------------------------------------------------------------------------------------------


def read_feature_file(path: str | Path) -> FeatureFile:
    """Read and check a file of features; see the top of this file for its layout.

    Raises:
        MissingPathError: No such file.
        StorageError: It is no safetensors file, or is damaged.
        DataError: Anything in it can't be used, all of it in one message.
    """
    path = Path(path)
    if not path.exists():
        raise MissingPathError(f"There is no file of features {path}.")
    if not path.is_file():
        raise DataError(f"{path} is a folder, and a .safetensors file of features is expected.")
    return _Reader(path).read()


@dataclass
class _Reader:
    """Reads one file, collecting what is wrong with it."""

    path: Path
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def read(self) -> FeatureFile:
        self.places, self.metadata = read_safetensors_header(self.path, _MAX_BYTES)
        self.class_names = self._class_names()
        self.dim = self._dim()
        self._check_shapes()
        self._stop()  # before anything is read: the rest relies on shapes
        self.tensors = read_safetensors(self.path, max_bytes=_MAX_BYTES, mapped=True)
        splits = {name: self._split(name) for name in self._split_names()}
        self._check_texts()
        backbone, digest = self._text("backbone"), self.metadata.get("backbone_digest", "")
        if not backbone:
            self.problems.append("its metadata doesn't name the backbone")
        scale, bias = self._number("logit_scale", CLIP_SCALE, least=0), self._number("logit_bias", 0.0)
        preprocessing = self._preprocessing()
        templates, sentences = self._templates(), self._list("descriptions", self._rows("description_features"))
        self.notes[:0] = self._list("notes")
        lengths = {LENGTHS[key]: self._number(key, 1.0, least=0) for key in LENGTHS if key in self.metadata}
        self._stop()
        found = FeatureFile(
            self.path,
            self._text("dataset") or self.path.stem,
            self.class_names,
            backbone,
            digest,
            self._text("backbone_family") or "features",
            scale,
            bias,
            preprocessing,
            splits,
            self._class_texts(),
            templates,
            self.tensors.get("description_features"),
            self.tensors.get("description_labels", torch.empty(0)).long(),
            sentences,
            {"image": 1.0, "text": 1.0},
            tuple(self.notes),
        )
        return with_lengths(found, lengths)

    def _stop(self) -> None:
        """Raise what was collected.

        Raises:
            DataError: Anything was.
        """
        if self.problems:
            listed = "; ".join(self.problems[:LISTED]) + ("; …" if len(self.problems) > LISTED else "")
            raise DataError(f"{self.path} can't be used as features: {listed}.")

    # --- shapes, from the header alone --------------------------------------------------------------------------------

    def _split_names(self) -> list[str]:
        """Splits that have features, in the order train, train1, train2, …, val, test."""
        names = [key.removesuffix("_features") for key in self.places if key.endswith("_features")]
        trains = sorted((name for name in names if TRAIN_NAME.match(name)), key=lambda name: int(name[5:] or 0))
        return [*trains, *(name for name in ("val", "test") if name in names)]

    def _rows(self, key: str) -> int:
        place = self.places.get(key)
        return place.shape[0] if place is not None and place.shape else 0

    def _dim(self) -> int:
        """Size of the features, of the first split that has one; -1 where there is none."""
        sizes = [self.places[f"{name}_features"].shape for name in self._split_names()]
        good = [shape[1] for shape in sizes if len(shape) == 2 and shape[1] > 0]
        return good[0] if good else -1

    def _check_shapes(self) -> None:
        names = self._split_names()
        if not names:
            held = first_few(list(self.places)) or "nothing"
            self.problems.append(f"it has no train_features, val_features or test_features (it holds {held})")
        for name in names:
            rows = self._rows(f"{name}_features")
            self._expect(f"{name}_features", ("images", self.dim), _FLOATS)
            self._expect(f"{name}_labels", (rows,), _INTEGERS)
            if TRAIN_NAME.match(name) and f"{name}_views" in self.places:
                self._expect(f"{name}_views", ("views", rows, self.dim), _FLOATS)
        classes = len(self.class_names)
        if "text_features" in self.places:
            middle = ("templates",) if len(self.places["text_features"].shape) == 3 else ()
            self._expect("text_features", (classes, *middle, self.dim), _FLOATS)
        if "description_features" in self.places or "description_labels" in self.places:
            self._expect("description_features", ("rows", self.dim), _FLOATS)
            self._expect("description_labels", (self._rows("description_features"),), _INTEGERS)
        self._note_others(names)

    def _expect(self, key: str, shape: tuple[int | str, ...], kinds: Sequence[str]) -> None:
        """A tensor of a shape, where words stand for any number above 0, and of one of the kinds of numbers."""
        place = self.places.get(key)
        wanted = "[" + ", ".join(map(str, shape)) + "]"
        if place is None:
            near = difflib.get_close_matches(key, self.places, n=1)
            self.problems.append(f"{key} {wanted} is missing" + (f" (there is {near[0]!r})" if near else ""))
        elif len(place.shape) != len(shape) or any(
            length < 1 if isinstance(want, str) else length != want
            for length, want in zip(place.shape, shape, strict=True)
        ):
            self.problems.append(f"{key} has the shape {list(place.shape)}, and {wanted} is expected")
        elif place.dtype not in kinds:
            self.problems.append(f"{key} is {place.dtype}; one of {', '.join(kinds)} is expected")

    def _note_others(self, names: Sequence[str]) -> None:
        """Say what isn't read, so that a misspelt name is seen."""
        known = {f"{name}_{what}" for name in names for what in ("features", "labels")}
        known |= {f"{name}_views" for name in names if TRAIN_NAME.match(name)}
        known |= {"text_features", "description_features", "description_labels"}
        others = [key for key in self.places if key not in known]
        if others:
            self.notes.append(f"{self.path.name} also holds what isn't read: {first_few(others)}")
        texts = [key for key in self.metadata if key not in _METADATA]
        near = [key for key in texts if difflib.get_close_matches(key, _METADATA, n=1)]
        if near:
            self.notes.append(f"{self.path.name} has metadata that isn't read: {first_few(near)}")

    # --- values -------------------------------------------------------------------------------------------------------

    def _split(self, name: str) -> StoredSplit:
        features, labels = self.tensors[f"{name}_features"], self.tensors[f"{name}_labels"].long()
        self._check_values(f"{name}_features", features)
        self._check_labels(f"{name}_labels", labels)
        views = self.tensors.get(f"{name}_views") if TRAIN_NAME.match(name) else None
        if views is not None:
            self._check_values(f"{name}_views", views)
        return StoredSplit(features, labels, views)

    def _check_values(self, key: str, features: Tensor) -> None:
        """Features must be finite and have a direction."""
        for start in range(0, len(features), 4096):
            part = features[start : start + 4096]
            finite = torch.isfinite(part).flatten(1).all(dim=1)
            if not bool(finite.all()):
                row = start + int((~finite).nonzero()[0])
                return self.problems.append(f"row {row} of {key} holds values that aren't finite")
            empty = (part == 0).all(dim=-1).flatten(1).any(dim=1) if part.dim() > 2 else (part == 0).all(dim=-1)
            if bool(empty.any()):
                return self.problems.append(f"row {start + int(empty.nonzero()[0])} of {key} is all zeros")
        return None

    def _check_labels(self, key: str, labels: Tensor) -> None:
        low, high, classes = int(labels.min()), int(labels.max()), len(self.class_names)
        if low < 0 or high >= classes:
            self.problems.append(
                f"{key} run from {low} to {high}, and there are {many(classes, 'class name')}: 0 to {classes - 1} is"
                " accepted"
            )

    def _check_texts(self) -> None:
        for key in ("text_features", "description_features"):
            if key in self.tensors:
                self._check_values(key, self.tensors[key])
        if "description_labels" in self.tensors:
            labels = self.tensors["description_labels"].long()
            self._check_labels("description_labels", labels)
            without = sorted(set(range(len(self.class_names))) - set(labels.tolist()))
            if without and "text_features" not in self.tensors:
                self.problems.append(
                    f"{many(len(without), 'class')} have neither text nor description features, the first being"
                    f" {self.class_names[without[0]]!r}"
                )

    def _class_texts(self) -> Tensor | None:
        """[classes, templates, dim]: the file's, else the mean of each class's unit description features."""
        texts = self.tensors.get("text_features")
        if texts is not None:
            return texts if texts.dim() == 3 else texts[:, None]
        if "description_features" not in self.tensors:
            self.notes.append(f"{self.path.name} holds no text features")
            return None
        self.notes.append("a class's text feature is the mean of its descriptions' unit features")
        rows = torch.nn.functional.normalize(self.tensors["description_features"].float(), dim=-1)
        sums = torch.zeros(len(self.class_names), self.dim)
        sums.index_add_(0, self.tensors["description_labels"].long(), rows)
        return torch.nn.functional.normalize(sums, dim=-1)[:, None]

    # --- metadata -----------------------------------------------------------------------------------------------------

    def _text(self, key: str) -> str:
        return self.metadata.get(key, "").strip()

    def _number(self, key: str, usual: float, least: float = -math.inf) -> float:
        """A number of the metadata, above `least`."""
        if key not in self.metadata:
            if key == "logit_scale":
                self.notes.append(f"{self.path.name} states no logit scale: CLIP's {CLIP_SCALE:g} is taken")
            return usual
        try:
            value = float(self.metadata[key])
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value <= least:
            self.problems.append(
                f"its metadata has the {key} {self.metadata[key]!r:.40}, not a number that can be used"
            )
        return value

    def _json(self, key: str, usual: Any) -> Any:
        try:
            return json.loads(self.metadata[key]) if key in self.metadata else usual
        except (ValueError, RecursionError):
            self.problems.append(f"its metadata has {key} that aren't JSON")
            return usual

    def _list(self, key: str, count: int | None = None) -> tuple[str, ...]:
        """A JSON list of (`count`) texts, or () where there is none."""
        found = self._json(key, None)
        if found is None:
            return ()
        if not isinstance(found, list) or not all(isinstance(text, str) and text.strip() for text in found):
            self.problems.append(f"its metadata has {key} that aren't a list of texts")
            return ()
        if count is not None and len(found) != count:
            self.problems.append(f"its metadata has {len(found)} {key}, and {count} are expected")
            return ()
        return tuple(found)

    def _class_names(self) -> tuple[str, ...]:
        found = self._json("class_names", None)
        good = isinstance(found, list) and all(isinstance(name, str) for name in found)
        if not good:
            self.problems.append("its metadata has no class_names, a JSON list of texts in label order")
            return ()
        try:
            check_class_names([display_name(name) for name in found], str(self.path))
        except DataError as error:
            self.problems.append(str(error).rstrip("."))
        return tuple(found)

    def _templates(self) -> tuple[str, ...]:
        """The templates of the text features; numbered stand-ins where the file doesn't say."""
        place = self.places.get("text_features")
        count = 1 if place is None or len(place.shape) == 2 else place.shape[1]
        stated = self._list("templates", count) if place is not None else ()
        if not stated:
            if place is None and "description_features" not in self.places:
                return ()
            self.notes.append("the prompts behind the class's text features aren't known")
            return (UNNAMED,) if count == 1 else tuple(f"{UNNAMED} (text {number + 1})" for number in range(count))
        try:
            if len(set(stated)) < len(stated):
                self.problems.append("its metadata has a template twice")
            return check_templates(stated)
        except AdaptKitError as error:
            self.problems.append(f"its metadata has templates that can't be used ({str(error).rstrip('.')})")
            return ()

    def _preprocessing(self) -> Preprocessing:
        """The test transform of the model; size 0 where the file doesn't say."""
        found = self._json("preprocessing", {"image_size": 0})
        try:
            return from_mapping(Preprocessing, found, where="preprocessing")
        except (AdaptKitError, TypeError, AttributeError) as error:
            self.problems.append(f"its metadata has preprocessing that can't be used ({str(error).rstrip('.')})")
            return Preprocessing(0)
