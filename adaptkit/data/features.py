"""The feature store: every image view goes through a frozen image tower once, on this machine, ever.

One folder per (weights, preprocessing, pool of images, view, precision, kind of device). In it lie shards, each a
safetensors file with the features of some images and, row by row, the digests of what those images are. Any set of
shards is a valid store, so shards can be added by several processes, lost, or deleted while others read: what isn't
there is encoded again. Few-shot draws are subsets of their pool and find their rows there.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import operator
import os
import re
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from adaptkit.backbones.base import Backbone
from adaptkit.data.feature_files import StoredSource
from adaptkit.data.splits import Split, TorchSource
from adaptkit.data.transforms import augment_as, to_pixels
from adaptkit.errors import AdaptKitWarning, BackboneError, ConfigError, MissingPathError, StorageError
from adaptkit.storage import (
    cache_dir,
    digest_json,
    digest_tensors,
    file_lock,
    read_json,
    read_safetensors,
    read_safetensors_header,
    write_json,
    write_safetensors,
)
from adaptkit.types import Inputs, ProgressCallback, TensorInputs

Precision = Literal["fp32", "bf16"]

STORE_VERSION = 1
"""Part of every key: raise it when the same key would lead to other features."""

MAX_BYTES = 20 * 2**30
"""Room for stored features by default; at 512 numbers an image, about ten million image views."""

PIXEL_BYTES = 512 * 2**20
"""Training pixels held in memory; where there are more, they are made again in every step."""

SHARD_ROWS = 2**14
"""Most images in one shard: an interrupted extraction loses at most so many."""

_KEY_NAME = re.compile(r"^[0-9a-f]{64}$")
_OURS = re.compile(r"^(meta\.json|lock|[0-9a-f]{64}\.safetensors|\..*\.tmp)$")


# --- views --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ViewSettings:
    """How augmented views are drawn. View 0 is the plain test transform and depends on none of it.

    Args:
        crop_scale: Smallest area share of the random crop, in (0, 1].
        flip: Whether views are mirrored at random.
        seed: Seeds the draws; an image's view depends on it, the view's number and the image's id only.
        colour_jitter: Most that brightness, contrast and saturation change by, in [0, 1].

    Raises:
        ConfigError: A value that can't be used.
    """

    crop_scale: float = 0.08
    flip: bool = True
    seed: int = 0
    colour_jitter: float = 0.0

    def __post_init__(self) -> None:
        try:
            crop_scale, seed = float(self.crop_scale), operator.index(self.seed)
            colour_jitter = float(self.colour_jitter)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"Views can't be drawn with {self}: crop_scale, seed and colour_jitter must be numbers."
            ) from error
        if not 0 < crop_scale <= 1:
            raise ConfigError(f"crop_scale is {crop_scale!r}, but must be above 0 and at most 1.")
        if not 0 <= colour_jitter <= 1:
            raise ConfigError(f"colour_jitter is {colour_jitter!r}, but must be at least 0 and at most 1.")
        object.__setattr__(self, "crop_scale", crop_scale)
        object.__setattr__(self, "flip", bool(self.flip))
        object.__setattr__(self, "seed", seed)
        object.__setattr__(self, "colour_jitter", colour_jitter)

    def facts(self, view: int) -> dict[str, Any]:
        """What decides view `view`, as plain values."""
        if view == 0:
            return {"number": 0}
        facts = {"number": view, "crop_scale": self.crop_scale, "flip": self.flip, "seed": self.seed}
        # left out where it is off: views stored before there was such a setting stay good
        return {**facts, "colour_jitter": self.colour_jitter} if self.colour_jitter else facts


_PLAIN = ViewSettings()


@dataclass(frozen=True)
class _Views:
    """The images of a split, each in any view, as pixels."""

    split: Split
    backbone: Backbone
    settings: ViewSettings
    workers: int

    def pixels(self, index: int, view: int) -> Tensor:
        """Normalised pixels, float32 [3, size, size]."""
        image, preprocessing = self.split.image(index), self.backbone.spec.preprocessing
        if view == 0:
            return to_pixels(image, preprocessing)
        draw = digest_json(["view", self.settings.seed, view, self.split.ids[index]])
        numbers = torch.Generator().manual_seed(int(draw[:15], 16))  # the same on every machine
        return augment_as(image, preprocessing, numbers, self.settings)

    def stack(self, indices: Sequence[int], view: int) -> Tensor:
        """Pixels [k, 3, size, size]."""
        return torch.stack([self.pixels(index, view) for index in indices])

    def batches(
        self, indices: Sequence[int], view: int, batch_size: int
    ) -> Generator[tuple[Sequence[int], Tensor], None, None]:
        """(indices, pixels [k, 3, size, size]) in order; the next batches are made by threads meanwhile."""
        groups = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
        # a user's torch dataset may not bear two threads at once; its single thread still works ahead
        workers = 1 if isinstance(self.split.source, TorchSource) else self.workers
        return _made_ahead(lambda group: self.stack(group, view), groups, workers)

    def row_keys(self, view: int, content_keys: Sequence[str]) -> list[bytes]:
        """32 bytes per image that change when its pixels in this view do."""
        if view == 0:
            texts: Iterable[str] = content_keys
        else:  # the id seeds the draw
            texts = (f"{key}\x1f{name}" for key, name in zip(content_keys, self.split.ids, strict=True))
        return [hashlib.sha256(text.encode("utf-8", errors="surrogateescape")).digest() for text in texts]


def _made_ahead(
    make: Callable[[Sequence[int]], Tensor], groups: Sequence[Sequence[int]], workers: int
) -> Generator[tuple[Sequence[int], Tensor], None, None]:
    """Each group with what `make` made of it, in the groups' order; `workers` threads are at most one group ahead each.

    Decoding and resizing are Pillow's and leave Python's lock, so threads do.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="adaptkit-images") as pool:
        waiting: deque[tuple[Sequence[int], Future[Tensor]]] = deque()
        try:
            for group in groups:
                waiting.append((group, pool.submit(make, group)))
                if len(waiting) > workers:
                    first, made = waiting.popleft()
                    yield first, made.result()
            while waiting:
                first, made = waiting.popleft()
                yield first, made.result()
        finally:
            for _, made in waiting:
                made.cancel()


def _encode(backbone: Backbone, pixels: Tensor, precision: str) -> Tensor:
    """Unnormalised features [k, dim] on the CPU: float32, or bfloat16 where autocast left them so.

    Raises:
        BackboneError: They have another size than the backbone's spec says, or aren't finite.
    """
    device, spec = backbone.device, backbone.spec
    with torch.inference_mode(), _autocast(device, precision):
        features = backbone.encode_image(pixels.to(device, non_blocking=True))
        features = features if features.dtype == torch.bfloat16 and precision == "bf16" else features.float()
        features = features.cpu()
        finite = bool(torch.isfinite(features).all())
    if features.shape != (len(pixels), spec.embed_dim):
        raise BackboneError(
            f"Backbone {spec.name!r} gave image features {list(features.shape)} for {len(pixels)} images;"
            f" {[len(pixels), spec.embed_dim]} was expected."
        )
    if not finite:
        raise BackboneError(f"Backbone {spec.name!r} gave features that aren't finite: try precision fp32.")
    return features.clone()  # an ordinary tensor: those of inference mode can't take part in training


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return torch.autocast(device.type, enabled=False)  # a caller's autocast mustn't reach what is stored as fp32


def _check(view: int, batch_size: int, workers: int, precision: str, *, what: str = "view") -> None:
    for name, value, least in ((what, view, 0), ("batch_size", batch_size, 1), ("workers", workers, 1)):
        if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
            raise ConfigError(f"{name} is {value!r}, but must be a whole number of at least {least}.")
    if precision not in get_args(Precision):
        raise ConfigError(f"precision is {precision!r}, but features are made in fp32 or bf16.")


# --- files --------------------------------------------------------------------------------------------------------


class _Table:
    """Features on their way together: one row per distinct image."""

    def __init__(self, keys: Sequence[bytes], dim: int) -> None:
        self.slots: dict[bytes, int] = {}
        self.images: list[int] = []  # of each row, the first image that it belongs to
        for index, key in enumerate(keys):
            if key not in self.slots:
                self.slots[key] = len(self.images)
                self.images.append(index)
        self.keys = list(self.slots)
        self._order = torch.tensor([self.slots[key] for key in keys])
        self._values = torch.empty(len(self.images), dim)
        self._have = torch.zeros(len(self.images), dtype=torch.bool)

    def missing(self) -> list[int]:
        """Rows that aren't there yet."""
        found: list[int] = (~self._have).nonzero()[:, 0].tolist()
        return found

    def put(self, slots: list[int], features: Tensor) -> None:
        self._values[slots] = features.float()
        self._have[slots] = True

    def in_order(self) -> Tensor:
        """Features [n, dim] of all images, in the order of the keys."""
        return self._values if len(self._values) == len(self._order) else self._values[self._order]


@dataclass(frozen=True)
class _Shelf:
    """One folder of shards.

    Args:
        folder: Where they lie.
        facts: What is in it, for its meta.json.
        dim: Size of a feature.
        verified: Shards whose checksum this process has compared already; shared by the shelves of a store.
    """

    folder: Path
    facts: Mapping[str, Any]
    dim: int
    verified: set[tuple[Any, ...]]

    @property
    def lock(self) -> Path:
        return self.folder / "lock"

    @property
    def meta(self) -> Path:
        return self.folder / "meta.json"

    def shards(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*.safetensors") if not path.name.startswith("."))

    def read(self, table: _Table) -> None:
        """Fill in every row that is stored; damaged shards are dropped with a warning."""
        if not table.missing():
            return
        for path in self.shards():
            try:
                keys, features = self._shard(path)
            except OSError as error:  # StorageError and MissingPathError are ones too
                self._set_aside(path, error)
                continue
            places = [(row, table.slots[key]) for row, key in enumerate(keys) if key in table.slots]
            if places:
                rows, slots = (list(column) for column in zip(*places, strict=True))
                table.put(slots, features[rows])

    def _set_aside(self, path: Path, error: OSError) -> None:
        """Go on without a shard; it is deleted where its content is at fault, not where the system is."""
        if not path.exists():  # cleared by someone else since the folder was listed
            return
        damaged = isinstance(error, StorageError) and not isinstance(error.__cause__, OSError)
        if damaged:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        state, reason = "are damaged" if damaged else "can't be read", str(error).rstrip(".")
        _warn(f"Stored features {state}, so those images are encoded again ({reason}).")

    def _shard(self, path: Path) -> tuple[list[bytes], Tensor]:
        """Row keys, and features [k, dim] mapped into memory."""
        places, metadata = read_safetensors_header(path)
        if set(places) != {"features", "keys"}:
            raise StorageError(f"{path} doesn't hold features")
        features_at, keys_at = places["features"], places["keys"]
        good = features_at.dtype in ("F32", "BF16") and keys_at.dtype == "U8"
        if not good or features_at.shape[1:] != (self.dim,) or keys_at.shape != (features_at.shape[0], 32):
            raise StorageError(f"{path} holds features {list(features_at.shape)}; [n, {self.dim}] was expected")
        tensors = read_safetensors(path, mapped=True)
        stat = path.stat()
        state = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if state not in self.verified:
            if digest_tensors(tensors) != metadata.get("sha256"):
                raise StorageError(f"{path} doesn't match its checksum")
            self.verified.add(state)
        raw = tensors["keys"].numpy().tobytes()
        return [raw[start : start + 32] for start in range(0, len(raw), 32)], tensors["features"]

    def write(self, keys: Sequence[bytes], features: Tensor) -> None:
        """Add a shard of features [k, dim]; its name is its content's digest, so no two writers want the same.

        Raises:
            StorageError: The folder can't be written.
        """
        rows = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 32)
        tensors = {"features": features, "keys": rows}
        checksum = digest_tensors(tensors)
        if not self.meta.exists():
            write_json(self.meta, self.facts)
        metadata = {"sha256": checksum, "store": str(STORE_VERSION)}
        write_safetensors(self.folder / f"{checksum}.safetensors", tensors, metadata)

    def touch(self) -> None:
        """Remember that the features were used now."""
        with contextlib.suppress(OSError):  # a read-only store serves all the same
            os.utime(self.meta)


@dataclass(frozen=True)
class StoredFeatures:
    """One folder of the store: the features of a pool's images in one view by one backbone.

    Args:
        key: Digest of all that decides the features; the folder's name.
        folder: Where they lie.
        backbone: Name of the backbone.
        digest: Its digest.
        pool: Where the images come from.
        view: What decides the view ({"number": 0} for the plain one).
        precision: "fp32" or "bf16".
        images: How many images are stored.
        bytes: Size on disk.
        last_used: Seconds since 1970.
    """

    key: str
    folder: Path
    backbone: str
    digest: str
    pool: str
    view: Mapping[str, Any]
    precision: str
    images: int
    bytes: int
    last_used: float


def _stored(folder: Path) -> StoredFeatures:
    """What lies in a folder; what can't be read counts as unknown, so that it can be listed and cleared."""
    facts: Any = {}
    with contextlib.suppress(StorageError, MissingPathError):
        facts = read_json(folder / "meta.json", max_bytes=2**20)
    facts = facts if isinstance(facts, dict) else {}
    view = facts.get("view")
    images = size = 0
    last_used = 0.0
    for path in _files(folder):
        with contextlib.suppress(OSError):
            stat = path.stat()
            size, last_used = size + stat.st_size, max(last_used, stat.st_mtime)
        if path.suffix == ".safetensors":
            with contextlib.suppress(StorageError, MissingPathError):
                places, _ = read_safetensors_header(path)
                images += places["keys"].shape[0] if "keys" in places and places["keys"].shape else 0
    texts = {name: str(facts.get(name, "")) for name in ("backbone", "digest", "pool", "precision")}
    return StoredFeatures(
        folder.name,
        folder,
        view=view if isinstance(view, dict) else {},
        images=images,
        bytes=size,
        last_used=last_used,
        **texts,
    )


def _files(folder: Path) -> list[Path]:
    """Files of ours in a folder."""
    with contextlib.suppress(OSError):
        return [path for path in sorted(folder.iterdir()) if _OURS.match(path.name)]
    return []


def _remove(folder: Path) -> int:
    """Delete a folder's files of ours, and the folder where nothing else is in it; returns the bytes freed."""
    freed = 0
    for path in _files(folder):
        with contextlib.suppress(OSError):
            size = path.stat().st_size
            path.unlink()
            freed += size
    with contextlib.suppress(OSError):
        folder.rmdir()
    return freed


def _warn(message: str) -> None:
    warnings.warn(message, AdaptKitWarning, stacklevel=2)


# --- the store ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """One request for features: which images, in which view, and how they are made."""

    views: _Views
    view: int
    batch_size: int
    precision: str
    progress: ProgressCallback | None

    def facts(self) -> dict[str, Any]:
        """All that decides the features of an image, besides the image."""
        backbone = self.views.backbone
        return {
            "store": STORE_VERSION,
            "digest": backbone.spec.digest,
            "preprocessing": backbone.spec.preprocessing.to_dict(),
            "pool": self.views.split.source.pool,
            "view": self.views.settings.facts(self.view),
            "precision": self.precision,
            # GPUs round otherwise (TF32, other kernels): a result mustn't depend on what another device left here
            "device": backbone.device.type,
            "dtype": str(backbone.logit_scale.dtype),
        }


class FeatureStore:
    """Frozen image features on disk, shared by methods, seeds, shot counts and processes.

    Two processes that ask for the same features at once don't both make them: the second waits and reads. A folder
    that can't be written costs one warning and the saving of time, nothing else.

    Args:
        root: The store's folder; None for "features" in the cache folder ($ADAPTKIT_CACHE, or the user's).
        max_bytes: When more is stored, the least recently used features go; those just asked for stay.

    Attributes:
        root: The store's folder.
        max_bytes: Room for features.
        encoded: Image views that this object has put through an image tower.

    Example:
        >>> store = FeatureStore()  # doctest: +SKIP
        >>> store.features(backbone, dataset.test).shape  # doctest: +SKIP
        torch.Size([8041, 512])
    """

    def __init__(self, root: str | Path | None = None, max_bytes: int = MAX_BYTES) -> None:
        if isinstance(max_bytes, bool) or max_bytes < 0:
            raise ConfigError(f"max_bytes is {max_bytes!r}, but must be a number of bytes, 0 or more.")
        self.root = cache_dir() / "features" if root is None else Path(root).expanduser()
        self.max_bytes = max_bytes
        self.encoded = 0
        self._verified: set[tuple[Any, ...]] = set()
        self._counting = threading.Lock()
        self._warned = False
        self._since_trim = math.inf  # bytes made since the store's size was looked at, which reads every shelf

    def features(
        self,
        backbone: Backbone,
        split: Split,
        *,
        view: int = 0,
        settings: ViewSettings = _PLAIN,
        batch_size: int = 64,
        progress: ProgressCallback | None = None,
        precision: Precision = "fp32",
        workers: int = 2,
    ) -> Tensor:
        """Unnormalised features of a split's images in one view, float32 [n, dim] on the CPU, in the split's order.

        Args:
            backbone: The frozen model.
            split: The images.
            view: 0 for the plain test transform, else an augmented view.
            settings: Of augmented views.
            batch_size: Images encoded at once.
            progress: Called after each batch as (what, images done, images to encode).
            precision: "fp32", or "bf16" for autocast; they are stored apart.
            workers: Threads that decode and resize ahead of the encoder.

        Raises:
            DataError: An image can't be read; the message has its path. What was encoded before it is kept.
            BackboneError: The backbone gives features that aren't finite.
            ConfigError: A setting out of range.
        """
        _check(view, batch_size, workers, precision)
        if isinstance(split.source, StoredSource):
            return _from_file(backbone, split, split.source, int(view))[-1]
        job = _Job(_Views(split, backbone, settings, workers), int(view), batch_size, precision, progress)
        return self._gather(job, split.content_keys())

    def inputs(
        self,
        backbone: Backbone,
        split: Split,
        *,
        views: int = 0,
        settings: ViewSettings = _PLAIN,
        batch_size: int = 64,
        progress: ProgressCallback | None = None,
        precision: Precision = "fp32",
        workers: int = 2,
    ) -> TensorInputs:
        """A split's features as a method's inputs: the plain view and `views` augmented ones, [1 + views, n, dim].

        Args and errors as for `features`.
        """
        _check(views, batch_size, workers, precision, what="views")
        if isinstance(split.source, StoredSource):
            return TensorInputs(_from_file(backbone, split, split.source, int(views)), _labels(split))
        looks, keys = _Views(split, backbone, settings, workers), split.content_keys()
        jobs = [_Job(looks, view, batch_size, precision, progress) for view in range(1 + views)]
        return TensorInputs(torch.stack([self._gather(job, keys) for job in jobs]), _labels(split))

    def entries(self) -> list[StoredFeatures]:
        """What is stored, the most recently used first."""
        found = [_stored(folder) for folder in self._folders()]
        return sorted(found, key=lambda entry: (-entry.last_used, entry.key))

    def clear(self, backbone: str | None = None) -> int:
        """Delete stored features; returns the bytes freed.

        Args:
            backbone: Name or digest of a backbone, whose features go; None for everything.
        """
        entries = self.entries()
        return sum(_remove(e.folder) for e in entries if backbone is None or backbone in (e.backbone, e.digest))

    def trim(self) -> int:
        """Delete the least recently used features until at most `max_bytes` are stored; returns the bytes freed."""
        return self._trim(keep="")

    def _trim_now_and_then(self, keep: str, made: int) -> None:
        """Trim after the first features made, and then whenever a hundredth of the room was filled."""
        self._since_trim += made
        if self._since_trim >= self.max_bytes / 100:
            self._since_trim = 0
            self._trim(keep)

    def _trim(self, keep: str) -> int:
        entries = self.entries()
        excess = sum(entry.bytes for entry in entries) - self.max_bytes
        freed = 0
        for entry in reversed(entries):
            if freed >= excess:
                break
            freed += _remove(entry.folder) if entry.key != keep else 0
        return freed

    def _folders(self) -> list[Path]:
        with contextlib.suppress(OSError):
            return [path for path in sorted(self.root.iterdir()) if _KEY_NAME.match(path.name) and path.is_dir()]
        return []

    def _shelf(self, job: _Job) -> _Shelf:
        facts = job.facts()
        key, spec = digest_json(facts), job.views.backbone.spec
        pool = facts["pool"].encode("utf-8", errors="backslashreplace").decode("utf-8")  # any path, as readable JSON
        shown = {"backbone": spec.name, **facts, "pool": pool, "created": time.time()}
        return _Shelf(self.root / key, shown, spec.embed_dim, self._verified)

    def _gather(self, job: _Job, content_keys: Sequence[str]) -> Tensor:
        """Features [n, dim]: those on disk, and the missing ones encoded and stored."""
        table = _Table(job.views.row_keys(job.view, content_keys), job.views.backbone.spec.embed_dim)
        if not content_keys:
            return table.in_order()
        shelf = self._shelf(job)
        shelf.read(table)
        missing = len(table.missing())
        if missing:
            with self._locked(shelf) as writable:
                shelf.read(table)  # whoever held the lock may have made them
                self._make(job, table, shelf if writable else None)
            if writable:
                self._trim_now_and_then(keep=shelf.folder.name, made=4 * missing * job.views.backbone.spec.embed_dim)
        shelf.touch()
        return table.in_order()

    @contextmanager
    def _locked(self, shelf: _Shelf) -> Iterator[bool]:
        """Hold a shelf against other writers while its features are made; gives False where it can't be written."""
        with ExitStack() as stack:
            try:
                stack.enter_context(file_lock(shelf.lock))
                writable = True
            except OSError as error:
                self._warn_unwritable(error)
                writable = False
            yield writable

    def _make(self, job: _Job, table: _Table, shelf: _Shelf | None) -> None:
        """Encode what is missing; stored in shards on the way, and also when an error or Ctrl-C ends it."""
        missing, spec = table.missing(), job.views.backbone.spec
        slot_of = {table.images[slot]: slot for slot in missing}
        slots: list[int] = []
        parts: list[Tensor] = []
        done = 0
        batches = job.views.batches(list(slot_of), job.view, job.batch_size)
        with contextlib.closing(batches):
            try:
                for images, pixels in batches:
                    features = _encode(job.views.backbone, pixels, job.precision)
                    made = [slot_of[image] for image in images]
                    table.put(made, features)
                    slots.extend(made)
                    parts.append(features)
                    done += len(made)
                    with self._counting:
                        self.encoded += len(made)
                    if len(slots) >= SHARD_ROWS:
                        self._put(shelf, table, slots, parts)
                        slots, parts = [], []
                    if job.progress:
                        view = f", view {job.view}" if job.view else ""
                        what = f"encoding {job.views.split.kind} images with {spec.name}{view}"
                        job.progress(what, done, len(missing))
            finally:
                self._put(shelf, table, slots, parts)

    def _put(self, shelf: _Shelf | None, table: _Table, slots: Sequence[int], parts: Sequence[Tensor]) -> None:
        if shelf is None or not slots:
            return
        try:
            shelf.write([table.keys[slot] for slot in slots], torch.cat(list(parts)))
        except OSError as error:  # StorageError is one too
            self._warn_unwritable(error)

    def _warn_unwritable(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            reason = str(error).rstrip(".")
            _warn(f"Features can't be stored, and are computed again each time ({reason}). ADAPTKIT_CACHE moves them.")


# --- inputs that aren't stored features ---------------------------------------------------------------------------


def _labels(split: Split) -> Tensor:
    return torch.tensor(split.labels, dtype=torch.int64)


def _from_file(backbone: Backbone, split: Split, source: StoredSource, views: int) -> Tensor:
    """Features [1 + views, n, dim] that lie in a file already, which the store has no need to keep again.

    Where the file has fewer views, those serve, and a warning says so.

    Raises:
        BackboneError: They have another size than the backbone's.
    """
    if source.file.dim != backbone.spec.embed_dim:
        raise BackboneError(
            f"{source.file.path} holds features of {source.file.dim} numbers, and those of {backbone.spec.name!r} have"
            f" {backbone.spec.embed_dim}: it was made by another model."
        )
    if views > source.num_views:
        held = f"only {source.num_views} are" if source.num_views else "none is"
        _warn(f"{views} augmented views per image are asked for, and {held} stored: it trains on what there is")
    return source.select(split.positions, views)


@dataclass(frozen=True)
class LazyInputs:
    """`Inputs` that are made when they are asked for; any view number may be asked for, each is its own draw.

    Args:
        labels: int64 [n].
        num_views: The plain view and the augmented ones that are meant to be cycled through.
        make: From indices and a view to features [k, dim] or pixels [k, 3, size, size].
    """

    labels: Tensor
    num_views: int
    make: Callable[[list[int], int], Tensor]

    def select(self, indices: Tensor, view: int = 0) -> Tensor:
        """Inputs `indices` in one view."""
        positions = torch.arange(len(self.labels))[indices.cpu()]  # also of masks and negative indices, as tensors do
        return self.make(positions.tolist(), int(view))


def pixels_inputs(
    backbone: Backbone,
    split: Split,
    *,
    views: int = 0,
    settings: ViewSettings = _PLAIN,
    fresh: bool = False,
    max_bytes: int = PIXEL_BYTES,
    batch_size: int = 64,
    progress: ProgressCallback | None = None,
    workers: int = 2,
) -> Inputs:
    """A split's pixels as a method's inputs, for methods that read "images".

    Args:
        backbone: Whose preprocessing the pixels go through.
        split: The images.
        views: Augmented views besides the plain one.
        settings: Of augmented views.
        fresh: Make the pixels in every step, so that view number e + 1 is new in each epoch e.
        max_bytes: Most bytes of pixels held in memory; where there would be more, they are made in every step.
        batch_size: Images made by one thread at a time, where they are held in memory.
        progress: Called as (what, image views done, image views in all), where they are held in memory.
        workers: Threads that decode and resize.

    Raises:
        DataError: An image can't be read; the message has its path.
        ConfigError: A setting out of range.
    """
    _check(views, batch_size, workers, "fp32", what="views")
    looks = _Views(split, backbone, settings, workers)
    size, count = backbone.spec.preprocessing.image_size, len(split)
    if fresh or (1 + views) * count * 3 * size**2 * 4 > max_bytes:
        return LazyInputs(_labels(split), 1 + views, _PixelMaker(looks))
    pixels = torch.empty(1 + views, count, 3, size, size)
    for view in range(1 + views):
        for indices, made in looks.batches(range(count), view, batch_size):
            pixels[view, list(indices)] = made
            if progress:
                progress(f"reading {split.kind} images", view * count + indices[-1] + 1, (1 + views) * count)
    return TensorInputs(pixels, _labels(split))


def feature_inputs_fresh(
    backbone: Backbone,
    split: Split,
    *,
    views: int = 0,
    settings: ViewSettings = _PLAIN,
    batch_size: int = 64,
    precision: Precision = "fp32",
    workers: int = 2,
) -> Inputs:
    """A split's features as a method's inputs, encoded anew whenever they are asked for (`views: fresh`).

    View number e + 1 is new in each epoch e, as in the reference implementations; nothing is stored, since no view
    is asked for twice.

    Args:
        backbone: The frozen model.
        split: The images.
        views: Augmented views that `num_views` counts besides the plain one.
        settings: Of augmented views.
        batch_size: Images encoded at once.
        precision: "fp32", or "bf16" for autocast.
        workers: Threads that decode and resize.

    Raises:
        ConfigError: A setting out of range. `select` raises `DataError` for an image that can't be read.
    """
    _check(views, batch_size, workers, precision, what="views")
    looks = _Views(split, backbone, settings, workers)
    return LazyInputs(_labels(split), 1 + views, _FeatureMaker(looks, batch_size, precision))


@dataclass(frozen=True)
class _PixelMaker:
    """Pixels [k, 3, size, size] of images in a view; the threads share them out in small groups."""

    views: _Views

    def __call__(self, indices: list[int], view: int) -> Tensor:
        size = self.views.backbone.spec.preprocessing.image_size
        group = max(1, len(indices) // (4 * self.views.workers))
        made = [pixels for _, pixels in self.views.batches(indices, view, group)]
        return torch.cat(made) if made else torch.empty(0, 3, size, size)


@dataclass(frozen=True)
class _FeatureMaker:
    """Features [k, dim] of images in a view, through the image tower each time."""

    views: _Views
    batch_size: int
    precision: str

    def __call__(self, indices: list[int], view: int) -> Tensor:
        backbone = self.views.backbone
        if len(indices) <= self.batch_size:  # a training step: nothing to encode until its pixels are there
            parts: Iterable[Tensor] = [_PixelMaker(self.views)(indices, view)]
        else:
            parts = (pixels for _, pixels in self.views.batches(indices, view, self.batch_size))
        made = [_encode(backbone, part, self.precision).float() for part in parts if len(part)]
        return torch.cat(made) if made else torch.empty(0, backbone.spec.embed_dim)
