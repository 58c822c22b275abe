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

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adaptkit.config import check_templates
from adaptkit.data.feature_reader import LENGTHS, TRAIN_NAME, FeatureFile, StoredSplit, read_feature_file, with_lengths
from adaptkit.data.splits import Dataset, ImageSource, TestSplit, TrainSplit, ValSplit
from adaptkit.data.templates import templates_for
from adaptkit.errors import DataError
from adaptkit.storage import digest_bytes

SCHEME = "features:"


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


def _candidates(file: FeatureFile, use: str, uses: dict[str, str]) -> list[str]:
    """Splits that can serve a use."""
    if use in uses:
        return [uses[use]]
    return [name for name in file.splits if name == use or (use == "train" and TRAIN_NAME.match(name))]


def _draw_from(names: Sequence[str], shots: int | None) -> str:
    """The train split for a number of shots: the ready draw of it, else the pool, else the next larger ready draw."""
    sizes = {name: int(name.removeprefix("train") or 0) for name in names if TRAIN_NAME.match(name)}
    if not sizes:
        return names[0]
    if f"train{shots}" in sizes:
        return f"train{shots}"
    if "train" in sizes:
        return "train"
    larger = [size for size in sizes.values() if shots is not None and size > shots]
    return f"train{min(larger) if larger else max(sizes.values())}"
