"""Your own features as a dataset: `features:FILE.safetensors`, with no images and no backbone.

The file is a safetensors file (fp16, bf16, fp32 or fp64; labels are whole numbers) with

    train_features       [images, dim]             images to draw shots from
    train4_features      [images, dim]             or ready draws, here of 4 shots per class (any number)
    val_features         [images, dim]             images to choose settings on; may be missing
    test_features        [images, dim]             images to report on
    X_labels             [images]                  class of each image of X (train, train4, …, val, test), from 0
    X_views              [views, images, dim]      augmented looks at the images of a train set; may be missing
    text_features        [classes, dim] or         one row per class, or one per class and template;
                         [classes, templates, dim] may be missing
    description_features [rows, dim]               features of sentences about classes; may be missing
    description_labels   [rows]                    class of each sentence

and texts in its metadata:

    class_names          JSON list of names, in label order; needed
    backbone             the model that made the features; needed
    backbone_digest      its digest in adaptkit, so that it can be recognised
    backbone_family      as adaptkit calls it ("mini" picks the recipes made for the embedded model)
    logit_scale          exp of its logit scale; CLIP's 100 where it is missing
    logit_bias           added to logits; 0 where it is missing
    image_length         for features scaled to unit length: how long the model's own are on average. The settings of
    text_length          some methods depend on it (linear-probe's C; learning rates of taskres, zs-lp and clap)
    templates            JSON list, one per template of text_features
    descriptions         JSON list, the sentence of each row of description_features
    preprocessing        JSON object of its test transform
    dataset              what the data is called; the file's name where it is missing
    notes                JSON list of what a reader of results must know

Features needn't have unit length; the model's own are best. A ready draw is taken where exactly its number of shots is
asked for; otherwise shots are drawn from `train`, or from the smallest ready draw that is large enough.

No image has two uses. Where a split is missing, the validation images can take its place, and then they validate
nothing: `features:FILE@test=val` tests on them, `features:FILE@train=val` draws shots from them. Lengths that the file
doesn't state can be given in the same place: `features:FILE@test=val,image_length=10,text_length=8`.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adaptkit.backbones.base import BackboneSpec, Preprocessing
from adaptkit.backbones.stored import UNIDENTIFIED, StoredBackbone
from adaptkit.config import check_templates, from_mapping
from adaptkit.data.lists import LISTED, first_few, many
from adaptkit.data.splits import Dataset, ImageSource, TestSplit, TrainSplit, ValSplit, check_class_names
from adaptkit.data.templates import display_name, render, templates_for
from adaptkit.errors import AdaptKitError, DataError, MissingPathError
from adaptkit.storage import digest_bytes, digest_json, digest_tensors, read_safetensors, read_safetensors_header

SCHEME = "features:"
LAYOUT_VERSION = 1
CLIP_SCALE = 100.0
"""Logit scale of OpenAI's CLIP models. Source: protocols sheet, section 0."""

UNNAMED = "{}"
"""The template of a file's text features where it doesn't say what was read."""

_MAX_BYTES = 64 * 2**30
_FLOATS = ("F16", "BF16", "F32", "F64")
_INTEGERS = ("U8", "I8", "I16", "I32", "I64")
_TRAIN = re.compile(r"^train([1-9]\d{0,5})?$")
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


class StoredSource(ImageSource):
    """One split of a file of features: rows in the place of pictures.

    Args:
        file: The file.
        split: "train", "train4", …, "val" or "test".
    """

    pictures: ClassVar[bool] = False

    def __init__(self, file: FeatureFile, split: str) -> None:
        self.file, self.split = file, split
        self.pool = f"{SCHEME}{file.path}:{split}"

    @cached_property
    def stored(self) -> StoredSplit:
        """The rows."""
        return self.file.splits[self.split]

    @property
    def num_views(self) -> int:
        """Augmented looks at each image."""
        return 0 if self.stored.views is None else len(self.stored.views)

    def select(self, positions: np.ndarray, views: int) -> Tensor:
        """Unnormalised fp32 features [1 + views, k, dim] of images, at most as many views as there are."""
        rows, length = torch.from_numpy(positions), self.file.lengths["image"]
        parts = [self.stored.features[rows][None].float() * length]
        if views and self.stored.views is not None:
            parts.append(self.stored.views[:views, rows].float() * length)
        return torch.cat(parts)

    def open(self, position: int) -> Image.Image:
        raise DataError(f"{self.file.path} holds features of images, not the images: they can't be opened.")

    def content_digest(self, position: int) -> str:
        rows = self.select(np.array([position]), self.num_views)
        return digest_bytes(np.ascontiguousarray(rows.numpy()).data.cast("B"))

    def content_key(self, position: int) -> str:
        return self.content_digest(position)


# --- as a dataset -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenedFeatures:
    """A file of features, and which of its splits is used for what.

    Args:
        file: What it holds.
        train: Name of the split that shots are drawn from.
        val: Of the one to choose settings on, or "".
        test: Of the one to report on.
    """

    file: FeatureFile
    train: str
    val: str
    test: str

    def dataset(self, shown: tuple[str, ...], templates: str | Iterable[str] | None = None) -> Dataset:
        """A dataset whose images are stored features.

        Args:
            shown: Class names as a text tower reads them, in label order.
            templates: Prompt templates to use instead of the file's.
        """
        file = self.file
        usual = file.templates if file.names_templates else templates_for(file.name)
        given = {} if templates is None else {"templates": "given"}
        source = {"kind": "features", "path": str(file.path), "backbone": file.backbone, **self._uses(), **given}
        return Dataset(
            file.name,
            shown,
            TrainSplit(*self._facts(self.train, shown)),
            ValSplit(*self._facts(self.val, shown)) if self.val else None,
            TestSplit(*self._facts(self.test, shown)),
            check_templates(usual if templates is None else templates),
            file.descriptions(shown),
            source,
            (*file.notes, *self._notes()),
            file.class_names,
        )

    def _uses(self) -> dict[str, str]:
        return {"train": self.train, "val": self.val, "test": self.test}

    def _facts(self, split: str, shown: tuple[str, ...]) -> tuple[Any, ...]:
        labels = self.file.splits[split].labels.numpy()
        ids = tuple(f"{split}/{index:05d}" for index in range(len(labels)))
        return ids, labels, shown, StoredSource(self.file, split), np.arange(len(labels))

    def _notes(self) -> list[str]:
        notes = [f"features that {self.file.backbone} made elsewhere, from {self.file.path.name}: no image was read"]
        if self.train.removeprefix("train").isdecimal():
            notes.append(f"the shots come from the file's ready draw {self.train!r}")
        if self.test == "val":
            notes.append("tested on the file's val images, so there are no validation images to choose settings on")
        if self.train == "val":
            notes.append("shots are drawn from the file's val images, so there are none to choose settings on")
        return notes


def open_features(text: str, shots: int | None = None) -> OpenedFeatures:
    """Read and check a file of features, and settle which of its splits is used for what.

    Args:
        text: "features:FILE", maybe with "@test=val" or "@train=val"; see the top of this file.
        shots: Images per class that will be drawn, which decides between ready draws; None for the largest.

    Raises:
        MissingPathError: No such file.
        StorageError: It is no safetensors file, or is damaged.
        DataError: It hasn't the layout described above, all that is wrong in one message; or a split is missing.
    """
    path, uses, lengths = _parse(text)
    file = with_lengths(read_feature_file(path), lengths)
    missing = [use for use in ("train", "test") if not _candidates(file, use, uses)]
    if missing:
        use, held = missing[0], ", ".join(file.splits)
        can = "val" in file.splits and use not in uses and not uses
        hint = (
            f"write {SCHEME}{path}@{use}=val to {_PURPOSE[use]} its val images, which then choose no settings"
            if can
            else f"add {use}_features and {use}_labels"
        )
        raise DataError(f"{path} has no {use} features (it has {held}): {hint}.")
    if "val" in uses.values() and "val" not in file.splits:
        raise DataError(f"{path} has no val features (it has {', '.join(file.splits)}), so none can be used instead.")
    train = _draw_from(_candidates(file, "train", uses), shots)
    val = "val" if "val" in file.splits and "val" not in uses.values() else ""
    return OpenedFeatures(file, train, val, uses.get("test", "test"))


_PURPOSE = {"test": "test on", "train": "draw shots from"}
LENGTHS = {"image_length": "image", "text_length": "text"}


def _parse(text: str) -> tuple[Path, dict[str, str], dict[str, float]]:
    """The file, the uses written behind it ({"test": "val"}, {"train": "val"} or nothing), and the lengths."""
    rest = text.removeprefix(SCHEME)
    path, at, choices = rest.rpartition("@")
    if not at or "=" not in choices or "/" in choices:
        path, choices = rest, ""
    uses: dict[str, str] = {}
    lengths: dict[str, float] = {}
    for choice in filter(None, choices.split(",")):
        key, _, value = choice.partition("=")
        if key in _PURPOSE and value == "val" and not uses:
            uses[key] = value
        elif key in LENGTHS and _positive(value) and LENGTHS[key] not in lengths:
            lengths[LENGTHS[key]] = float(value)
        else:
            raise DataError(
                f"{choice!r} in {text!r} can't be used; one of test=val (test on the val images) and train=val (draw"
                f" shots from them) is accepted, and {' and '.join(LENGTHS)} with a number above 0."
            )
    if not path:
        raise DataError(f"{text!r} names no file: write {SCHEME}FILE.safetensors.")
    return Path(path).expanduser(), uses, lengths


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


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


def _candidates(file: FeatureFile, use: str, uses: dict[str, str]) -> list[str]:
    """Splits that can serve a use."""
    if use in uses:
        return [uses[use]]
    return [name for name in file.splits if name == use or (use == "train" and _TRAIN.match(name))]


def _draw_from(names: Sequence[str], shots: int | None) -> str:
    """The train split for a number of shots: the ready draw of it, else the pool, else the next larger ready draw."""
    sizes = {name: int(name.removeprefix("train") or 0) for name in names if _TRAIN.match(name)}
    if not sizes:
        return names[0]
    if f"train{shots}" in sizes:
        return f"train{shots}"
    if "train" in sizes:
        return "train"
    larger = [size for size in sizes.values() if shots is not None and size > shots]
    return f"train{min(larger) if larger else max(sizes.values())}"


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
        trains = sorted((name for name in names if _TRAIN.match(name)), key=lambda name: int(name[5:] or 0))
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
            if _TRAIN.match(name) and f"{name}_views" in self.places:
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
        known |= {f"{name}_views" for name in names if _TRAIN.match(name)}
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
        views = self.tensors.get(f"{name}_views") if _TRAIN.match(name) else None
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
