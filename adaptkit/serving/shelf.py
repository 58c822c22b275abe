"""The adapters a server answers with: found at its start, all over one backbone, each with its card."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptkit.backbones.base import Backbone
from adaptkit.backbones.load import load_backbone
from adaptkit.errors import AdapterError, AdaptKitError, ConfigError, UnknownNameError
from adaptkit.evaluation.calibration import Calibration, saved_calibration, softmax
from adaptkit.export.adapter_set import AdapterSet
from adaptkit.methods.adapter import AdapterConfig, read_adapter_config, saved_labels

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAX_CARD_BYTES = 64 * 1024


@dataclass(frozen=True)
class Listed:
    """An adapter as its folder describes it.

    Args:
        config: What `adapter_config.json` holds.
        labels: Its classes, in the order of its logits.
        calibration: What held-out images say about its probabilities, or None.
        card: Its README.
    """

    config: AdapterConfig
    labels: tuple[Any, ...]
    calibration: Calibration | None
    card: str

    def probabilities(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probabilities [n, classes] of logits [n, classes], as `adaptkit predict` gives them."""
        return softmax(logits) if self.calibration is None else self.calibration.probabilities(logits)


class Shelf:
    """Adapters by name over one backbone.

    Args:
        folders: Adapter folders by the name that requests choose them by.
        backbone: Where it is loaded already; None loads the one that the adapters name.
        device: Where to put a backbone loaded here.

    Raises:
        ConfigError: No adapter, names that can't be used, adapters of several backbones, or folders that can't be
            served; one message names them all.
    """

    def __init__(
        self, folders: Mapping[str, Path], backbone: Backbone | None = None, *, device: str | torch.device = "cpu"
    ) -> None:
        if not folders:
            raise ConfigError("There is no adapter to serve: name at least one adapter folder.")
        problems = [
            f"{name!r} can't name an adapter: use letters, digits, dots, hyphens and underscores (NAME=FOLDER)."
            for name in folders
            if not _NAME.fullmatch(name)
        ]
        self.listed: dict[str, Listed] = {}
        for name, folder in folders.items():
            try:
                self.listed[name] = _read(folder)
            except AdaptKitError as error:
                problems.append(str(error))
        _raise(problems or self._strangers())
        if backbone is None:
            backbone = load_backbone(next(iter(self.listed.values())).config.backbone["name"], device=device)
        self.adapters = AdapterSet(backbone)
        for name, folder in folders.items():
            try:
                self.adapters.add(name, folder)
                self._prove(name)
            except AdaptKitError as error:
                problems.append(f"{name}: {error}")
        _raise(problems)

    def _strangers(self) -> list[str]:
        """Why the adapters can't share a backbone."""
        (first, one), *others = self.listed.items()
        return [
            f"{name} belongs to {other.config.backbone['name']!r}, and {first} to {one.config.backbone['name']!r}: a"
            " server has one backbone, so serve them apart."
            for name, other in others
            if other.config.backbone["digest"] != one.config.backbone["digest"]
        ]

    def _prove(self, name: str) -> None:
        """Ask an adapter about one grey image, which also makes it ready.

        Raises:
            AdapterError: It doesn't answer with numbers.
        """
        side = self.backbone.spec.preprocessing.image_size
        (logits,) = self.answer(torch.zeros(1, 3, side, side), [(name,)])[0].values()
        if not np.isfinite(logits).all():
            raise AdapterError("its answers aren't numbers, so it is damaged: save the adapter again.")

    @property
    def backbone(self) -> Backbone:
        """The frozen model."""
        return self.adapters.backbone

    def choose(self, names: Sequence[str]) -> tuple[str, ...]:
        """The adapters that a request means; without a name, the only one there is.

        Raises:
            UnknownNameError: One isn't there.
            ConfigError: None is named, and there are several.
        """
        if not names:
            if len(self.listed) > 1:
                some = ", ".join(sorted(self.listed)[:5])
                raise ConfigError(f"There are {len(self.listed)} adapters ({some}, …): choose with ?adapter=NAME.")
            return tuple(self.listed)
        for name in names:
            self[name]
        return tuple(dict.fromkeys(names))

    def __getitem__(self, name: str) -> Listed:
        """An adapter's description.

        Raises:
            UnknownNameError: There is no such adapter.
        """
        if name not in self.listed:
            raise UnknownNameError.for_name("adapter", name[:100], self.listed, "/adapters lists them.")
        return self.listed[name]

    def answer(self, pixels: Tensor, asked: Sequence[tuple[str, ...]]) -> list[dict[str, NDArray[np.float64]]]:
        """Each image to its adapters, images encoded once for all of them.

        Args:
            pixels: Preprocessed, [batch, 3, size, size].
            asked: For each image, names of adapters.

        Returns:
            For each image logits [classes] by adapter.
        """
        images = [place for place, names in enumerate(asked) for _ in names]
        flat = [name for names in asked for name in names]
        rows = self.adapters.route(pixels.to(self.backbone.device), flat, images)
        answers: list[dict[str, NDArray[np.float64]]] = [{} for _ in asked]
        for place, name, logits in zip(images, flat, rows, strict=True):
            answers[place][name] = logits.double().cpu().numpy()
        return answers


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError("\n".join(problems))


def _read(folder: Path) -> Listed:
    config = read_adapter_config(folder)
    calibration = saved_calibration(config, folder)
    card = folder / "README.md"
    text = ""
    if card.is_file():
        with card.open("rb") as file:
            text = file.read(_MAX_CARD_BYTES).decode("utf-8", errors="replace")
    return Listed(config, tuple(saved_labels(config, folder)), calibration, text)
