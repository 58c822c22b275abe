"""Many adapters over one frozen backbone: images are encoded once for all adapters that only read features.

Adapters come and go while others answer. Three ways an image takes:

* Adapters that fold to a matrix or a head share one run of the frozen image encoder.
* LoRA adapters share one tower that holds all of them, by peft's multi-adapter layers: images of different adapters go
  through it in one batch, each through its own updates.
* Other adapters with a tower of their own (prompts in the image tower, DoRA, IA3, …) run it on their images alone.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any, cast

import torch
from torch import Tensor, nn

from adaptkit.backbones.base import Backbone
from adaptkit.backbones.tower import ImageTower
from adaptkit.errors import AdapterError, ConfigError, DataError, UnknownNameError
from adaptkit.export.fold import proven_fold
from adaptkit.methods.adapter import AdaptedModel, load_adapter, read_adapter_config, saved_labels
from adaptkit.methods.lora._towers import TowerMethod, inject, shared_copy

Source = AdaptedModel | str | Path
"""An adapter: a fitted model, or an adapter folder."""


@dataclass(frozen=True)
class _Entry:
    """An adapter that is ready to answer.

    Args:
        labels: Its classes, in the order of its logits.
        head: From features to logits.
        tower: Its own image tower, or None.
        lora: Its name within the shared tower, or "".
    """

    labels: tuple[Any, ...]
    head: nn.Module
    tower: nn.Module | None = None
    lora: str = ""


class AdapterSet:
    """Adapters by name over one backbone, safe to use and to change from several threads.

    Args:
        backbone: The frozen model; shared, never changed.
        adapters: What to begin with, by name.

    Example:
        >>> adapters = AdapterSet(load_backbone("mini"), {"birds": "adapters/birds"})  # doctest: +SKIP
        >>> adapters.ask(pixels, ["birds"])["birds"].shape  # doctest: +SKIP
        torch.Size([8, 200])
    """

    def __init__(self, backbone: Backbone, adapters: Mapping[str, Source] | None = None) -> None:
        self.backbone = backbone
        self._entries: dict[str, _Entry] = {}  # replaced as a whole, never changed: who reads it needs no lock
        self._change = RLock()
        self._lora = _LoraTower(backbone)
        for name, adapter in (adapters or {}).items():
            self.add(name, adapter)

    # --- which there are ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def labels(self, name: str) -> tuple[Any, ...]:
        """An adapter's classes, in the order of its logits.

        Raises:
            UnknownNameError: There is no such adapter.
        """
        return _entry(self._entries, name).labels

    def add(self, name: str, adapter: Source, *, replace: bool = False) -> None:
        """Take in an adapter for its current classes; requests go on meanwhile.

        Args:
            name: What to call it.
            adapter: A fitted model on this very backbone, or an adapter folder.
            replace: Whether one of that name may be there; it answers until the new one is ready.

        Raises:
            ConfigError: No name, or one that is taken.
            AdapterError: The folder is damaged, or the adapter belongs to another backbone.
            UnsupportedError: It can't be folded (see `adaptkit.export.fold`).
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"An adapter's name is a text of at least one letter, not {name!r}.")
        self._check_free(name, replace)
        model, labels = self._read(adapter)
        with self._change:
            self._check_free(name, replace)
            old = self._entries.get(name)
            self._entries = {**self._entries, name: self._prepared(model, labels)}
        self._forget(old)

    def remove(self, name: str) -> None:
        """Take an adapter out; requests that have begun are still answered.

        Raises:
            UnknownNameError: There is no such adapter.
        """
        with self._change:
            old = _entry(self._entries, name)
            self._entries = {key: entry for key, entry in self._entries.items() if key != name}
        self._forget(old)

    def _check_free(self, name: str, replace: bool) -> None:
        if name in self._entries and not replace:
            raise ConfigError(f"There is an adapter {name!r} already: choose another name, or ask to replace it.")

    def _read(self, adapter: Source) -> tuple[AdaptedModel, tuple[Any, ...]]:
        if isinstance(adapter, AdaptedModel):
            if adapter.backbone.spec.digest != self.backbone.spec.digest:
                raise AdapterError(
                    f"The adapter belongs to {adapter.backbone.spec.name!r}, and this set to"
                    f" {self.backbone.spec.name!r}: one set serves one backbone."
                )
            return adapter, tuple(adapter.class_names)
        model = load_adapter(adapter, self.backbone)
        return model, tuple(saved_labels(read_adapter_config(adapter), adapter))

    def _prepared(self, model: AdaptedModel, labels: tuple[Any, ...]) -> _Entry:
        method = model.method
        if isinstance(method, TowerMethod) and _is_plain_lora(method):
            with torch.inference_mode(False), torch.no_grad():
                head = method.cosine_head(method.folded_weights())
                return _Entry(labels, head, lora=self._lora.add(method))
        parts = proven_fold(method)
        return _Entry(labels, parts.head, parts.tower)

    def _forget(self, entry: _Entry | None) -> None:
        if entry is not None and entry.lora:
            self._lora.remove(entry.lora)

    # --- answers ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def ask(self, pixels: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Every named adapter about every image.

        Args:
            pixels: Preprocessed, [batch, 3, size, size].
            names: Which adapters; None for all.

        Returns:
            Logits [batch, classes of the adapter] by name.

        Raises:
            UnknownNameError: An adapter isn't there; nothing is computed then.
            DataError: Pixels of another shape.
        """
        asked = None if names is None else _listed(names)
        self._check(pixels)
        with self._reading(asked) as entries:
            chosen = {name: entries[name] for name in (entries if asked is None else asked)}
            features: Tensor | None = None
            answers = {}
            for name, entry in chosen.items():
                if entry.lora:
                    answers[name] = entry.head(self._lora(pixels, [entry.lora] * len(pixels)))
                elif entry.tower is not None:
                    answers[name] = entry.head(entry.tower(pixels))
                else:
                    features = self.backbone.encode_image(pixels) if features is None else features
                    answers[name] = entry.head(features)
        return answers

    @torch.inference_mode()
    def route(self, pixels: Tensor, names: Sequence[str], images: Sequence[int] | None = None) -> list[Tensor]:
        """Each image to an adapter of its own, or to several.

        Args:
            pixels: Preprocessed, [batch, 3, size, size].
            names: An adapter for each image.
            images: For each name the place of the image it is for; None for one name per image, in their order.

        Returns:
            For each name its logits [classes].

        Raises:
            UnknownNameError: An adapter isn't there; nothing is computed then.
            DataError: Pixels of another shape, images and names that differ in number, or a place without an image.
        """
        asked = _listed(names)
        self._check(pixels)
        places = list(range(len(pixels)) if images is None else images)
        if len(asked) != len(places):
            raise DataError(f"There are {len(places)} images, but {len(asked)} adapters: name one for each image.")
        if not all(0 <= place < len(pixels) for place in places):
            raise DataError(f"A place isn't among the {len(pixels)} images: they are counted from 0.")
        answers: list[Tensor] = [pixels] * len(asked)  # each is overwritten below
        with self._reading(asked) as entries:
            for rows, features, members in self._groups(pixels, [entries[name] for name in asked], places):
                for entry, places in members:
                    logits = entry.head(features[places])
                    for place, row in zip(places, logits, strict=True):
                        answers[rows[place]] = row
        return answers

    def _check(self, pixels: Tensor) -> None:
        side = self.backbone.spec.preprocessing.image_size
        if pixels.dim() != 4 or pixels.shape[1:] != (3, side, side) or not pixels.is_floating_point():
            raise DataError(
                f"The pixels have shape {list(pixels.shape)} and type {pixels.dtype}; preprocessed ones of shape"
                f" [batch, 3, {side}, {side}] are accepted (adaptkit.data.transforms.to_pixels makes them)."
            )

    def _groups(
        self, pixels: Tensor, entries: Sequence[_Entry], images: Sequence[int]
    ) -> Iterator[tuple[list[int], Tensor, list[tuple[_Entry, list[int]]]]]:
        """Rows that go through one tower together, their features, and which of them belong to which adapter.

        Args:
            pixels: [batch, 3, size, size].
            entries: The adapter of each row.
            images: The place of each row's image in the batch.
        """
        shared = [row for row, entry in enumerate(entries) if entry.tower is None and not entry.lora]
        lora = [row for row, entry in enumerate(entries) if entry.lora]
        if shared:
            seen = sorted({images[row] for row in shared})  # an image is encoded once for all of its adapters
            features = self.backbone.encode_image(pixels[seen])
            yield shared, features[[seen.index(images[row]) for row in shared]], _members(shared, entries)
        if lora:
            through = [images[row] for row in lora]
            yield lora, self._lora(pixels[through], [entries[row].lora for row in lora]), _members(lora, entries)
        own = [row for row, entry in enumerate(entries) if entry.tower is not None]
        for entry, places in _members(own, entries):
            rows = [own[place] for place in places]
            features = cast(nn.Module, entry.tower)(pixels[[images[row] for row in rows]])
            yield rows, features, [(entry, list(range(len(rows))))]

    @contextmanager
    def _reading(self, asked: Sequence[str] | None) -> Iterator[dict[str, _Entry]]:
        """The adapters as they are now, all of `asked` among them; while LoRA is in use, none of it is taken out."""
        entries = self._entries
        for name in asked or ():
            _entry(entries, name)
        uses_lora = any(entries[name].lora for name in (entries if asked is None else asked))
        with self._lora.lock if uses_lora else contextlib.nullcontext():
            if uses_lora:  # what was there before waiting may have gone
                entries = self._entries
                for name in asked or ():
                    _entry(entries, name)
            yield entries


def _listed(names: Sequence[str]) -> list[str]:
    if isinstance(names, str):
        raise ConfigError(f"Adapters are named in a list: write [{names!r}].")
    return list(names)


def _entry(entries: Mapping[str, _Entry], name: str) -> _Entry:
    if name not in entries:
        raise UnknownNameError.for_name("adapter", str(name), entries, f"The set holds {len(entries)}.")
    return entries[name]


def _members(rows: Sequence[int], entries: Sequence[_Entry]) -> list[tuple[_Entry, list[int]]]:
    """The adapters of some rows, each with its places among them."""
    found: dict[int, tuple[_Entry, list[int]]] = {}
    for place, row in enumerate(rows):
        found.setdefault(id(entries[row]), (entries[row], []))[1].append(place)
    return list(found.values())


# --- LoRA -------------------------------------------------------------------------------------------------------------


def _is_plain_lora(method: TowerMethod) -> bool:
    """Whether peft can mix it with others in a batch: LoRA on the image tower, without DoRA and trained biases."""
    config = method._peft_configs.get("image")
    if config is None or getattr(config.peft_type, "value", "") != "LORA":
        return False
    plain = config.bias == "none" and not config.use_dora and not config.modules_to_save
    return bool(plain and all(_is_own(name) for name, _ in method.named_parameters() if name.startswith("image.")))


def _is_own(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


class _LoraTower:
    """One image tower with the updates of any number of LoRA adapters in it.

    Attributes:
        lock: Held while it runs and while adapters are put in or taken out.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._tower: ImageTower | None = None
        self._numbers = itertools.count()
        self.lock = RLock()

    def add(self, method: TowerMethod) -> str:
        """Put an adapter's updates in; returns what it is called here."""
        name = f"a{next(self._numbers)}"
        with self.lock:
            if self._tower is None:
                self._tower = shared_copy(cast(ImageTower, self._backbone.image_tower))
            inject(self._tower, method._peft_configs["image"], word="image", seed=None, name=name)
            own = dict(self._tower.named_parameters())
            with torch.no_grad():
                for key, value in method.changed_towers["image"].named_parameters():
                    if _is_own(key):
                        own[key.replace(".default.", f".{name}.")].copy_(value)
            self._tower.requires_grad_(False).eval().to(self._backbone.device)
        return name

    def remove(self, name: str) -> None:
        """Take an adapter's updates out."""
        with self.lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that another one becomes the active one: each request names its own
            for layer in self._layers():
                layer.delete_adapter(name)

    def _layers(self) -> list[Any]:
        from peft.tuners.lora import LoraLayer

        return [] if self._tower is None else [m for m in self._tower.modules() if isinstance(m, LoraLayer)]

    def __call__(self, pixels: Tensor, names: Sequence[str]) -> Tensor:
        """Features [batch, dim] of pixels [batch, 3, size, size], each image through the adapter named for it."""
        with self.lock, contextlib.ExitStack() as hooks:
            for layer in self._layers():
                hooks.callback(layer.register_forward_pre_hook(partial(_named, names), with_kwargs=True).remove)
            features: Tensor = cast(ImageTower, self._tower)(pixels)
        return features


def _named(names: Sequence[str], layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Tell one of peft's layers which adapter each row of the batch goes through."""
    return args, {**kwargs, "adapter_names": list(names)}
