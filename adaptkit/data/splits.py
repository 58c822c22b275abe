"""Typed splits of a dataset, and where their images come from.

Train, validation and test are different types: what takes a validation split refuses a test split, when it runs and
under mypy. So test images can't choose settings by accident.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from PIL import Image

from adaptkit.data.images import load_rgb, rgb_from_array
from adaptkit.errors import AdaptKitWarning as AdaptKitWarning
from adaptkit.errors import DataError
from adaptkit.storage import check_relative, digest_bytes, digest_json, safe_join
from adaptkit.types import DEFAULT_TEMPLATES

S = TypeVar("S", bound="Split")


class ImageSource(ABC):
    """Images by position. `pool` names where they come from; images of one pool are kept together in the store."""

    pool: str
    pictures: ClassVar[bool] = True
    """Whether there are pictures to open; False where only their features are stored."""

    @abstractmethod
    def open(self, position: int) -> Image.Image:
        """Image `position` as RGB.

        Raises:
            DataError: It can't be read; the message has its path.
        """

    @abstractmethod
    def content_key(self, position: int) -> str:
        """Text that changes when the image does: for files path, size and time; for arrays a digest of the pixels."""

    def content_digest(self, position: int) -> str | None:
        """Digest of pixels in memory; None for files, whose path stands for them in split digests."""
        return None

    def path(self, position: int) -> Path | None:
        """The image's file, or None where it has none."""
        return None


class FileSource(ImageSource):
    """Images in files under one folder.

    Args:
        root: The folder.
        names: Paths relative to it, with forward slashes.
        trusted: True where the names come from the file system itself, so that the user's own links are followed; names
            read from a JSON or CSV are checked on every use.

    Raises:
        StorageError: A name that isn't a plain relative path.
    """

    def __init__(self, root: str | Path, names: Sequence[str], *, trusted: bool = False) -> None:
        self.root = Path(root)
        self.names = tuple(names)
        self._trusted = trusted
        for name in self.names:
            if not trusted:
                check_relative(name)
        self._real_root = os.path.realpath(root)
        self.pool = f"files:{self._real_root}"

    def path(self, position: int) -> Path:
        name = self.names[position]
        return self.root / name if self._trusted else safe_join(self.root, name)

    def open(self, position: int) -> Image.Image:
        return load_rgb(self.path(position))

    def content_key(self, position: int) -> str:
        path = self.path(position)
        try:
            facts = path.stat()
        except OSError:
            load_rgb(path)  # raises with a clear sentence
            raise
        return f"{self._real_root}/{self.names[position]}|{facts.st_size}|{facts.st_mtime_ns}"


class ArraySource(ImageSource):
    """Images in memory: uint8 [n, h, w, 3]."""

    def __init__(self, arrays: np.ndarray) -> None:
        if arrays.ndim != 4 or arrays.shape[-1] != 3 or arrays.dtype != np.uint8:
            raise DataError(f"Image arrays are {arrays.dtype} {list(arrays.shape)}; uint8 [n, h, w, 3] is accepted.")
        self.arrays = arrays
        self._digests: dict[int, str] = {}

    @cached_property
    def pool(self) -> str:  # type: ignore[override]  # computed on first use
        return "arrays:" + digest_bytes(np.ascontiguousarray(self.arrays).data.cast("B"))

    def open(self, position: int) -> Image.Image:
        return rgb_from_array(self.arrays[position])

    def content_digest(self, position: int) -> str:
        if position not in self._digests:
            array = np.ascontiguousarray(self.arrays[position])
            self._digests[position] = digest_bytes(repr(array.shape).encode() + array.tobytes())
        return self._digests[position]

    def content_key(self, position: int) -> str:
        return self.content_digest(position)


class TorchSource(ImageSource):
    """Images of a torch dataset whose items are (image, label): PIL images, uint8 arrays, or floats in [0, 1]."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset = dataset
        self.pool = f"torch:{name}"
        self._digests: dict[int, str] = {}

    def open(self, position: int) -> Image.Image:
        image = self.dataset[position][0]
        name = f"image {position} of {self.pool}"
        if isinstance(image, Image.Image):
            return rgb_from_array(np.asarray(image.convert("RGB")), name)
        return rgb_from_array(image, name)

    def content_digest(self, position: int) -> str:
        if position not in self._digests:
            array = np.asarray(self.open(position))
            self._digests[position] = digest_bytes(repr(array.shape).encode() + array.tobytes())
        return self._digests[position]

    def content_key(self, position: int) -> str:
        return self.content_digest(position)


@dataclass(frozen=True, eq=False)
class Split:
    """Images with labels; use its sub-classes.

    Args:
        ids: One name per image: the relative path for files, a stable name for arrays. Seeds augmentation.
        labels: Class index per image, int64 [n].
        class_names: Display names; label i is `class_names[i]`.
        source: Where the images come from.
        positions: Each image's position in `source`, int64 [n].
    """

    kind: ClassVar[str] = "split"
    ids: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    source: ImageSource
    positions: np.ndarray

    def __post_init__(self) -> None:
        labels = np.asarray(self.labels, dtype=np.int64)
        if not len(self.ids) == len(labels) == len(self.positions):
            raise DataError(f"A {self.kind} split has {len(self.ids)} names, {len(labels)} labels.")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.class_names):
            raise DataError(
                f"Labels of the {self.kind} split run from {labels.min()} to {labels.max()}; there are"
                f" {len(self.class_names)} classes, so 0 to {len(self.class_names) - 1} is accepted."
            )
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "positions", np.asarray(self.positions, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> Image.Image:
        """Image `index` of this split, as RGB."""
        return self.source.open(int(self.positions[index]))

    def images(self, indices: Iterable[int]) -> list[Image.Image]:
        """Several images, as RGB."""
        return [self.image(int(index)) for index in indices]

    def path(self, index: int) -> Path | None:
        """The image's file, None where it lies in memory."""
        return self.source.path(int(self.positions[index]))

    def content_keys(self) -> list[str]:
        """One text per image that changes when the image does."""
        return [self.source.content_key(int(position)) for position in self.positions]

    def counts(self) -> list[int]:
        """Images per class."""
        return np.bincount(self.labels, minlength=len(self.class_names)).tolist()

    def subset(self: S, indices: Iterable[int]) -> S:
        """The images `indices`, in that order."""
        chosen = np.asarray(list(indices), dtype=np.int64)
        return replace(
            self,
            ids=tuple(self.ids[index] for index in chosen),
            labels=self.labels[chosen],
            positions=self.positions[chosen],
        )

    @cached_property
    def paths_digest(self) -> str:
        """sha256 of the newline-joined ids, in order: names a few-shot image list.

        Source: datasets sheet, fewshot-fixtures.csv.
        """
        return digest_bytes("\n".join(self.ids).encode("utf-8", errors="surrogateescape"))

    @cached_property
    def digest(self) -> str:
        """sha256 over ids, labels and, for images in memory, their content. The same on every machine."""
        running = hashlib.sha256()
        for name, label, position in zip(self.ids, self.labels.tolist(), self.positions.tolist(), strict=True):
            content = self.source.content_digest(position) or ""
            running.update(f"{name}\x1f{label}\x1f{content}\n".encode("utf-8", errors="surrogateescape"))
        return running.hexdigest()


class TrainSplit(Split):
    """Images to train on."""

    kind = "train"


class ValSplit(Split):
    """Images to choose settings on."""

    kind = "val"


class TestSplit(Split):
    """Images to report on, and for nothing else."""

    kind = "test"
    __test__ = False  # pytest would collect the name


def require_split(split: Split, kind: type[S], needed_by: str) -> S:
    """`split` itself, if it is of the right kind.

    Raises:
        DataError: It is another kind of split.
    """
    if not isinstance(split, kind):
        what = getattr(split, "kind", type(split).__name__)
        raise DataError(f"{needed_by} takes a {kind.kind} split, and was given the {what} split.")
    return split


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset: classes, prompts and typed splits.

    Args:
        name: Registry name, or the name of its folder or file.
        class_names: Display names in label order.
        train: Images to draw shots from.
        val: Images to choose settings on, None where there are none. Never the test images.
        test: Images to report on; empty where there are none.
        templates: Prompt templates with one `{}` each.
        descriptions: Sentences per class name, where there are some.
        source: Facts: where it came from, how it was split.
        notes: What a reader of results must know ("made its own split: not comparable with CoOp").
        stored_names: Class names as stored (folder names), in label order.
    """

    name: str
    class_names: tuple[str, ...]
    train: TrainSplit
    val: ValSplit | None
    test: TestSplit
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    descriptions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    stored_names: tuple[str, ...] = ()

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that have images, by name."""
        found: dict[str, Split] = {"train": self.train}
        if self.val is not None:
            found["val"] = self.val
        if len(self.test):
            found["test"] = self.test
        return found

    @cached_property
    def digest(self) -> str:
        """sha256 over class names and every split: two runs with one digest used the same images and labels."""
        parts = {name: split.digest for name, split in self.splits.items()}
        return digest_json({"classes": list(self.class_names), "splits": parts})

    def summary(self) -> dict[str, Any]:
        """Plain facts for results: name, source, notes, sizes, digest."""
        sizes = {name: len(split) for name, split in self.splits.items()}
        return {
            "name": self.name,
            "classes": len(self.class_names),
            "images": sizes,
            "source": dict(self.source),
            "notes": list(self.notes),
            "split_digest": self.digest,
        }


def check_class_names(names: Sequence[str], where: str) -> None:
    """Refuse class names that can't be told apart.

    Raises:
        DataError: No classes, an empty name, or a name that is there twice (after '_' became ' ').
    """
    if not names:
        raise DataError(f"{where} has no classes.")
    if any(not name.strip() for name in names):
        raise DataError(f"{where} has a class with an empty name: give every class a name.")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(
            f"{where} has {len(twice)} class name{'s' if len(twice) > 1 else ''} twice ({', '.join(twice[:5])}): rename"
            " one, or give display names that tell them apart."
        )
