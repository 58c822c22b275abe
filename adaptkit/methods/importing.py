"""From a checkpoint of a method's official release to an adapted model: settings by shapes, numbers by names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptkit.backbones.base import Backbone
from adaptkit.config import from_mapping, merge
from adaptkit.errors import AdapterError, AdaptKitError, ConfigError, MissingPathError
from adaptkit.methods import methods
from adaptkit.methods.adapter import AdaptedModel
from adaptkit.methods.base import Method
from adaptkit.types import DEFAULT_TEMPLATES

_EPOCH_FILE = re.compile(r"model\.pth\.tar-(\d+)")
_BEST_FILE = "model-best.pth.tar"
_NAMES_SHOWN = 4


@dataclass(frozen=True)
class Imported:
    """What came out of a reference checkpoint.

    Args:
        model: The adapted model.
        inferred: Settings that the checkpoint showed.
        taken: Entries of the checkpoint that were taken over.
        ignored: Entries that weren't: fixed parts of prompts, CLIP itself.
        kept: Entries of ours that the release doesn't store; they stay as the settings have them.
        notes: What a user should know.
    """

    model: AdaptedModel
    inferred: dict[str, Any]
    taken: tuple[str, ...]
    ignored: tuple[str, ...]
    kept: tuple[str, ...]
    notes: tuple[str, ...]


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file that a path means: itself, or of a training folder the file of the highest epoch.

    A training folder holds one folder per part that was trained (`prompt_learner/model.pth.tar-50` beside a file
    `checkpoint`); that one, or the one above it, may be given. `model-best.pth.tar` is taken where there is no other.

    Raises:
        MissingPathError: No such file, or a folder without such a file.
        AdapterError: Several parts lie in the folder.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise MissingPathError(
                f"There is no checkpoint {path}: give the file that the release wrote, or its folder."
            )
        return path
    folders = [folder for folder in (path, *sorted(p for p in path.iterdir() if p.is_dir())) if _epoch_files(folder)]
    if not folders:
        raise MissingPathError(
            f"The folder {path} holds no model.pth.tar-EPOCH, nor does a folder in it: give the folder that training"
            " wrote to, or the checkpoint's file."
        )
    if len(folders) > 1:
        raise AdapterError(
            f"The folder {path} holds checkpoints in several places ({folders[0]} and {folders[1]}): give one of them."
        )
    return max(_epoch_files(folders[0]).items())[1]


def _epoch_files(folder: Path) -> dict[int, Path]:
    """Epoch to file; the best one, whose epoch isn't known, counts as before the first."""
    found = {int(match[1]): p for p in folder.iterdir() if p.is_file() and (match := _EPOCH_FILE.fullmatch(p.name))}
    best = folder / _BEST_FILE
    return found | ({-1: best} if best.is_file() else {})


def import_reference(
    method: str,
    state: Mapping[str, Tensor],
    backbone: Backbone,
    class_names: Sequence[str],
    *,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    settings: Mapping[str, Any] | None = None,
    descriptions: Mapping[str, Sequence[str]] | None = None,
) -> Imported:
    """Build a method with what a reference checkpoint holds.

    Args:
        method: Registered name.
        state: As `adaptkit.methods.reference.read_reference_checkpoint` gives it.
        backbone: The one it was trained on; the checkpoint doesn't name it, only shapes are compared.
        class_names: In label order; the checkpoint doesn't hold them.
        templates: Zero-shot templates.
        settings: Settings by field name; they win over those that the checkpoint shows.
        descriptions: Sentences by class name, for methods that read them; the checkpoint doesn't hold them.

    Raises:
        UnknownNameError: No such method.
        ConfigError: Settings that can't be used.
        AdapterError: The checkpoint holds nothing of this method, or doesn't fit the classes, settings or backbone, or
            belongs to another method.
    """
    kind = methods.get(method)
    try:
        inferred = kind.reference_settings(state)
    except AdapterError as error:  # it finds none of its entries
        raise AdapterError(_nothing_found(method, state, backbone)) from error
    config = from_mapping(kind.config_class, merge(inferred, settings or {}), where=f"the settings of {method}")
    try:
        built = kind(backbone, class_names, templates=templates, config=config, descriptions=descriptions)
    except ConfigError as error:
        if inferred or settings or not _fitting(state, backbone):
            raise
        # nothing was seen, and the defaults are too deep for the backbone: that isn't what is wrong here
        raise AdapterError(_nothing_found(method, state, backbone)) from error
    state = built.reference_state(state)
    places = _places(built, state)
    taken = {name for name in places.values() if name is not None}
    if not taken:
        raise AdapterError(_nothing_found(method, state, backbone))
    _check_no_better(method, taken, _fitting(state, backbone, shapes=True))
    _check_shapes(built, state, places)
    try:
        built.load_reference_state(state)
    except AdapterError as error:
        others = [name for name in _fitting(state, backbone) if name != method]
        if None not in (places[key] for key in places if built.reference_key(key) is not None) or not others:
            raise
        raise AdapterError(f"{error} Its names fit {_either(others)}.") from error
    kept = tuple(key for key, name in places.items() if name is None)
    ignored = tuple(name for name in state if name not in taken)
    return Imported(
        AdaptedModel(built), inferred, tuple(sorted(taken)), ignored, kept, _notes(state, len(class_names), kept)
    )


def _places(method: Method, state: Mapping[str, Tensor]) -> dict[str, str | None]:
    """Entry of ours to its entry in the checkpoint; None where the release has none or this checkpoint lacks it.

    As `Method.load_reference_state` looks them up: with or without the first part of the name.
    """
    places: dict[str, str | None] = {}
    for key in method.adapter_state():
        theirs = method.reference_key(key)
        options = () if theirs is None else (theirs, theirs.partition(".")[2])
        places[key] = next((name for name in options if name in state), None)
    return places


def _check_shapes(method: Method, state: Mapping[str, Tensor], places: Mapping[str, str | None]) -> None:
    """Say in the user's words why a shape doesn't fit: the number of classes, or the backbone and settings.

    Raises:
        AdapterError: One doesn't.
    """
    wrong = _wrong_shape(method, state, places)
    if wrong is None:
        return
    name, ours = wrong
    theirs, classes = tuple(state[name].shape), len(method.fitted_names)
    if method.novel_classes == "refused" and ours[:1] == (classes,) and theirs[1:] == ours[1:]:
        raise AdapterError(
            f"The checkpoint's {name!r} has a part of its own for each of {theirs[0]} classes, but {classes} class"
            f" names were given: give the {theirs[0]} it was trained on, in the order of their labels."
        )
    raise AdapterError(
        f"The checkpoint's {name!r} has shape {theirs}, but {method.name} with these settings on"
        f" {method.backbone.spec.name!r} has {ours} there: give the backbone and settings it was trained with."
    )


def _wrong_shape(
    method: Method, state: Mapping[str, Tensor], places: Mapping[str, str | None]
) -> tuple[str, tuple[int, ...]] | None:
    """The first entry of the checkpoint with another shape than ours, and ours; None where all fit.

    Methods that read their files themselves (Tip-Adapter's are transposed) aren't judged.
    """
    if type(method).load_reference_state is not Method.load_reference_state:
        return None
    for key, ours in method.adapter_state().items():
        name = places[key]
        if name is not None and state[name].shape != ours.shape:
            return name, tuple(ours.shape)
    return None


# --- which method a checkpoint belongs to -----------------------------------------------------------------------------


def _fitting(state: Mapping[str, Tensor], backbone: Backbone, *, shapes: bool = False) -> dict[str, set[str]]:
    """Methods all of whose entries are in the checkpoint, with these entries.

    Args:
        state: The checkpoint.
        backbone: For the depths and widths of the methods' entries.
        shapes: Whether the entries' shapes must fit too, not only the names. Entries with a part for every class then
            never do, since the classes of the checkpoint aren't known.
    """
    found: dict[str, set[str]] = {}
    for name in methods:
        try:
            kind = methods.get(name)
            config = from_mapping(kind.config_class, kind.reference_settings(state))
            method = kind(backbone, ["thing"], config=config)
            places = _places(method, method.reference_state(state))
            wanted = {key: places[key] for key in places if method.reference_key(key) is not None}
        except (AdaptKitError, ImportError):  # no such files, not for this backbone, or a plugin that isn't all there
            continue
        taken = {place for place in wanted.values() if place is not None}
        if not wanted or None in wanted.values():
            continue
        if not shapes or not _wrong_shape(method, method.reference_state(state), places):
            found[name] = taken
    return found


def _nothing_found(method: str, state: Mapping[str, Tensor], backbone: Backbone) -> str:
    names = list(state)
    shown = ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")
    fitting = _fitting(state, backbone)
    # a file of MaPLe's also holds all of CoOp's entries: the methods that explain most of it
    most = [name for name, taken in fitting.items() if len(taken) == max(map(len, fitting.values()))]
    hint = f"its names fit {_either(most)}" if most else "no other method of adaptkit has such names either"
    return f"The checkpoint has entries ({len(names)}: {shown}), but none of {method}: {hint}."


def _either(names: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _check_no_better(method: str, taken: set[str], fitting: Mapping[str, set[str]]) -> None:
    """Refuse a checkpoint of which another method would take all that this one takes, and more.

    MaPLe's files hold a `ctx` as CoOp's do: read as CoOp's, most of what was learned would silently be lost.

    Raises:
        AdapterError: There is such a method.
    """
    better = [name for name, theirs in fitting.items() if taken < theirs]
    most = [name for name in better if len(fitting[name]) == max(len(fitting[other]) for other in better)]
    if most:
        raise AdapterError(
            f"The checkpoint was made by another method: {method} would take {len(taken)} of its entries, and"
            f" {_either(most)} these and {len(fitting[most[0]]) - len(taken)} more. Say --method {most[0]}."
        )


def _notes(state: Mapping[str, Tensor], classes: int, kept: Sequence[str]) -> tuple[str, ...]:
    notes = []
    prefix = next((value for name, value in state.items() if name.rpartition(".")[2] == "token_prefix"), None)
    if prefix is not None and prefix.dim() == 3 and len(prefix) != classes:
        notes.append(f"the checkpoint was trained on {len(prefix)} classes, and {classes} class names were given")
    if kept:
        notes.append(f"not in the checkpoint, so as the settings have them: {', '.join(kept)}")
    return tuple(notes)
