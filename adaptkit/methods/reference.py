"""Checkpoints of the methods' official releases, read safely.

They come as torch files: a dictionary with `state_dict` (CoOp, MaPLe and the rest of that line, which also store the
optimiser), a state dictionary itself, a bare tensor (Tip-Adapter), or tensors in nested dictionaries with metadata
beside them (CLIP-LoRA). Others come as safetensors.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptkit.errors import AdapterError, MissingPathError, StorageError
from adaptkit.storage import read_safetensors

_MAX_BYTES = 8 * 2**30
_MAX_NESTING = 8
_SHOTS_SUFFIX = re.compile(r"_\d+shots?$")


class ReferenceState(dict[str, Tensor]):
    """Tensors by name, with what the file says beside them.

    Attributes:
        metadata: Plain values by name; empty where the file holds none.
    """

    metadata: Mapping[str, Any] = {}


def read_reference_checkpoint(*paths: str | Path) -> dict[str, Tensor]:
    """The tensors of one checkpoint, by their names in the reference implementation.

    No code of the file is run: torch files are read with `weights_only`.

    Args:
        paths: The checkpoint's file, or several where its parts lie in separate files. A bare tensor is named by its
            file, without "_16shots": keys_16shots.pt holds "keys".

    Raises:
        MissingPathError: No such file.
        AdapterError: The file is damaged, holds anything but plain tensors and values, or two files hold the same name.
    """
    state = ReferenceState()
    for path in map(Path, paths):
        found = _read(path)
        twice = sorted(set(found) & set(state))
        if twice:
            raise AdapterError(f"{path} holds {twice[0]!r}, which another of the files holds too: give each part once.")
        state.update(found)
        if isinstance(found, ReferenceState):
            state.metadata = {**state.metadata, **found.metadata}
    return state


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise MissingPathError(f"There is no checkpoint {path}: give the path of the file that the release wrote.")
    if path.suffix == ".safetensors":
        try:
            return dict(read_safetensors(path, max_bytes=_MAX_BYTES))
        except StorageError as error:
            raise AdapterError(f"{error}") from error
    content = _load(path)
    if isinstance(content, Tensor):
        return {_SHOTS_SUFFIX.sub("", path.stem): content.detach()}
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if isinstance(content, Mapping) and isinstance(content.get("weights"), Mapping):
        nested = ReferenceState(_flat(content["weights"], path))
        nested.metadata = content["metadata"] if isinstance(content.get("metadata"), Mapping) else {}
        return nested
    if not isinstance(content, Mapping):
        raise AdapterError(f"{path} holds a {type(content).__name__}, not a state dictionary or a tensor.")
    tensors = {str(key): value.detach() for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise AdapterError(f"{path} holds no tensors by name: it isn't a checkpoint of a method.")
    return tensors


def _flat(content: Mapping[Any, Any], path: Path, start: str = "", depth: int = 0) -> dict[str, Tensor]:
    """Nested dictionaries of tensors as one, names joined by dots."""
    if depth > _MAX_NESTING:
        raise AdapterError(
            f"{path} nests its tensors deeper than {_MAX_NESTING} levels: it isn't a checkpoint of ours."
        )
    found: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            found |= _flat(value, path, f"{start}{key}.", depth + 1)
        elif isinstance(value, Tensor):
            found[f"{start}{key}"] = value.detach()
    return found


_NOT_NEEDED = {
    "torch.optim.sgd": ("SGD",),
    "torch.optim.adam": ("Adam",),
    "torch.optim.adamw": ("AdamW",),
    "torch.optim.lr_scheduler": ("CosineAnnealingLR", "LambdaLR", "MultiStepLR", "StepLR"),
    "dassl.optim.lr_scheduler": ("ConstantWarmupScheduler", "LinearWarmupScheduler"),
    "dassl.optim.radam": ("RAdam",),
    "builtins": ("dict",),  # as the factory of a defaultdict
    "collections": ("defaultdict",),
    "numpy": ("dtype",),
    "numpy.core.multiarray": ("scalar",),
    "numpy._core.multiarray": ("scalar",),
}


class _StandIn:
    """Takes the place of an object that a checkpoint holds beside its tensors; it takes anything and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _StandInMapping:
    """The same for a defaultdict: makes a plain dictionary, the only kind that the safe reader fills."""

    def __new__(cls, *args: Any) -> Any:
        return {}


def _stand_ins() -> list[Any]:
    """Classes under the names of what training code puts into checkpoints (Dassl's warm-up schedule is saved whole).

    The safe reader looks names up among these and finds ours, so that no code of those packages runs, nor needs to be
    installed.
    """
    return [
        type(name, (_StandInMapping if name == "defaultdict" else _StandIn,), {"__module__": module})
        for module, names in _NOT_NEEDED.items()
        for name in names
    ]


def _load(path: Path) -> Any:
    try:
        allow = getattr(torch.serialization, "safe_globals", None)  # since torch 2.5
        with nullcontext() if allow is None else allow(_stand_ins()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL\s+([\w.]+)", str(error))
        what = f"holds an object of type {refused[1]}, which could run code" if refused else "is damaged"
        raise AdapterError(
            f"{path} {what}, so it was not opened: where you trust the file, save its state_dict alone, as safetensors."
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        raise AdapterError(f"{path} isn't a torch file that can be read, or is damaged: {error}.") from error
