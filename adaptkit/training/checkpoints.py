"""Checkpoints of a running training: what it takes to go on after a crash as if nothing had happened.

A checkpoint is a folder with a safetensors file (trained parameters, buffers, the optimiser's state, random states) and
a JSON file (place in the data, settings' digest, figures so far); no pickle. It appears whole or not at all, the one
before it stays until it is there, and a damaged one is passed over for that one.
"""

from __future__ import annotations

import random
import re
import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adaptkit.config import from_mapping
from adaptkit.errors import AdaptKitError, AdaptKitWarning, StorageError
from adaptkit.storage import digest_file, new_folder, read_json, read_safetensors, write_json, write_safetensors

SCHEMA = 1
KEPT = 2
"""The newest, and the one before it in case that the newest is damaged."""

_FOLDER = re.compile(r"(\d{3})-(\d{9})")
_TENSORS, _FACTS = "state.safetensors", "state.json"


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says in JSON.

    Args:
        schema: Of the files.
        identity: Of the run: everything that changes its numbers.
        processes: How many processes trained together.
        method: What was trained.
        loop: Which of the method's trainings, from 0; most have one.
        epoch: Under way, from 0.
        step: Steps of this epoch that are done.
        steps: Steps done in all.
        skipped_steps: Whose gradients overflowed.
        images: Seen in this epoch.
        seconds: Spent so far.
        history: Loss, accuracy (None where unknown) and learning rate of each epoch that is done.
        last_terms: Loss terms of the last epoch that is done.
        scaler: State of the loss scale.
        random: What of the random states isn't a tensor, by name.
        digest: sha256 of the file of tensors.
    """

    schema: int
    identity: str
    processes: int
    method: str
    loop: int
    epoch: int
    step: int
    steps: int
    skipped_steps: int
    images: int
    seconds: float
    history: tuple[tuple[float, float | None, float], ...]
    last_terms: dict[str, float]
    scaler: dict[str, Any]
    random: dict[str, Any] = field(default_factory=dict)
    digest: str = ""


class Saved(NamedTuple):
    """A checkpoint that was read: its facts, and its tensors by name."""

    facts: Facts
    tensors: dict[str, Tensor]


class Checkpoints:
    """Where one run keeps the checkpoints of its training.

    Args:
        folder: For them alone; made when the first is written.
        identity: Digest of everything that changes the run's numbers.
        every: Seconds between two; 0 writes one after every step.
        replace: Whether those of another run are dropped; else they are refused.
        processes: How many processes train together.

    Raises:
        StorageError: The folder holds the training of another run.
    """

    def __init__(
        self, folder: Path, identity: str, every: float = 300.0, *, replace: bool = False, processes: int = 1
    ) -> None:
        self.folder, self.identity, self.every, self.processes = folder, identity, every, processes
        self._loops, self._written, self._broken, self._foreign = 0, time.monotonic(), False, False
        self._notes: list[str] = []
        self._found = self._newest(replace)

    # --- reading ------------------------------------------------------------------------------------------------------

    def _newest(self, replace: bool) -> Saved | None:
        """The newest that can be read; damaged ones are said and passed over."""
        for path in self._paths():
            try:
                saved = _read(path)
            except (AdaptKitError, OSError) as error:
                self._notes.append(
                    f"the checkpoint {path} can't be used, so training went on from an earlier one or began anew:"
                    f" {error}"
                )
                continue
            if (saved.facts.identity, saved.facts.processes) == (self.identity, self.processes):
                return saved
            if not replace:
                other = saved.facts.identity != self.identity
                count = f"{saved.facts.processes} processes instead of {self.processes}"
                what = "other settings or data" if other else count
                raise StorageError(
                    f"{self.folder} holds a half-finished training with {what}: start it as before to finish it, choose"
                    " another --out, or say --overwrite to drop it."
                )
            self._foreign = True
            return None
        return None

    def _paths(self) -> list[Path]:
        """Checkpoints, the newest first."""
        if not self.folder.is_dir():
            return []
        return sorted((path for path in self.folder.iterdir() if _FOLDER.fullmatch(path.name)), reverse=True)

    def begin(self) -> tuple[int, Saved | None]:
        """Called when a training begins: its number among the method's, and where to go on, if anywhere.

        A method may train several things one after the other. Those that were done before are done again, with the same
        outcome, up to the one that was under way.
        """
        if self._foreign:
            self._foreign = False
            self.clear()
        loop, self._loops = self._loops, self._loops + 1
        self._written = time.monotonic()
        for note in self._notes:
            warnings.warn(note, AdaptKitWarning, stacklevel=2)
        self._notes = []
        if self._found is None or self._found.facts.loop != loop:
            return loop, None
        saved, self._found = self._found, None
        return loop, saved

    # --- writing ------------------------------------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Whether it is time for the next."""
        waiting = self._found is not None or self._broken  # a training before the one to go on with; or a full disk
        return not waiting and time.monotonic() - self._written >= self.every

    def write(self, facts: Facts, tensors: Mapping[str, Tensor]) -> None:
        """Write one, then drop all but the newest two; where that fails, training goes on without any more."""
        try:
            with new_folder(self.folder / f"{facts.loop:03d}-{facts.steps:09d}", overwrite=True) as building:
                write_safetensors(building / _TENSORS, tensors)
                content = {**asdict(facts), "digest": digest_file(building / _TENSORS)}
                write_json(building / _FACTS, content)
        except StorageError as error:
            self._broken = True
            warnings.warn(f"no more checkpoints are written: {error}", AdaptKitWarning, stacklevel=2)
            return
        for path in self._paths()[KEPT:]:
            shutil.rmtree(path, ignore_errors=True)
        self._written = time.monotonic()

    def clear(self) -> None:
        """Drop them all: the run's result is there."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(path: Path) -> Saved:
    content = read_json(path / _FACTS)
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise StorageError(f"{path / _FACTS} isn't a checkpoint of this release.")
    facts = from_mapping(Facts, content, where=str(path / _FACTS))
    if digest_file(path / _TENSORS) != facts.digest:
        raise StorageError(f"{path / _TENSORS} is damaged: its content isn't what was written.")
    return Saved(facts, read_safetensors(path / _TENSORS))


# --- random states ----------------------------------------------------------------------------------------------------


def random_states(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of torch's, NumPy's and Python's own random numbers in this process: tensors, and plain values."""
    tensors = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    kind: Any = np.random.get_state()  # what other libraries may draw from
    version, numbers, gauss = random.getstate()
    tensors["numpy"] = torch.from_numpy(kind[1].astype(np.int64))
    tensors["python"] = torch.tensor(numbers, dtype=torch.int64)
    plain = {"numpy": [kind[0], int(kind[2]), int(kind[3]), float(kind[4])], "python": [version, gauss]}
    return tensors, plain


def set_random_states(device: torch.device, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Go on with the random numbers of `random_states`."""
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
    name, place, has_gauss, gauss = plain["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), place, has_gauss, gauss))
    version, drawn = plain["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), drawn))


# --- an optimiser's state ---------------------------------------------------------------------------------------------


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of sgd, adam or adamw by "place of the parameter.name"; all of it is tensors."""
    state = optimiser.state_dict()["state"]
    return {
        f"{place}.{name}": value
        for place, own in state.items()
        for name, value in own.items()
        if isinstance(value, Tensor)
    }


def load_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take over a state of `optimiser_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        place, _, name = key.partition(".")
        state.setdefault(int(place), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
