"""What a studio project is made of: its state, changes to it as patches, and both from JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptkit.errors import StorageError
from adaptkit.storage import read_json

SCHEMA_VERSION = 1
_FILE = re.compile(r"[0-9a-f]{32}\.[a-z0-9]{1,5}")
_CLASS_ID = re.compile(r"c[0-9]{1,9}")


@dataclass(frozen=True)
class Picture:
    """One image of a project.

    Args:
        file: Its name below images/.
        name: What it was called where it came from.
        order: When it came in; images are kept in this order.
        label: Id of its class, or None.
    """

    file: str
    name: str
    order: int
    label: str | None = None


@dataclass(frozen=True)
class Settings:
    """What the classifier is made with.

    Args:
        method: Name of the method.
        backbone: Name of the backbone.
    """

    method: str = "tip-adapter"
    backbone: str = "mini"


@dataclass(frozen=True)
class State:
    """All that a person has made.

    Args:
        classes: Names by class id, in the order in which they are shown.
        images: Images by id (the digest of their content), in the order in which they came.
        settings: Of the classifier.
    """

    classes: Mapping[str, str] = field(default_factory=dict)
    images: Mapping[str, Picture] = field(default_factory=dict)
    settings: Settings = field(default_factory=Settings)

    def labelled(self, class_id: str | None = None) -> list[str]:
        """Ids of the images with a label (with this one)."""
        return [
            key
            for key, picture in self.images.items()
            if picture.label is not None and class_id in (None, picture.label)
        ]


Patch = dict[str, Any]
"""Parts of a state: "classes" and "settings" whole, "images" by id, None for one that isn't there."""


@dataclass(frozen=True)
class Change:
    """One step that can be undone.

    Args:
        what: What was done, for a person.
        before: The parts that it changed, as they were.
        after: The same as they became.
        group: Changes that follow each other under one name count as one, such as the parts of an import.
    """

    what: str
    before: Patch
    after: Patch
    group: str = ""


def images_text(count: int) -> str:
    """ "1 image", "2 images"."""
    return f"{count} image{'s' if count != 1 else ''}"


# --- patches ----------------------------------------------------------------------------------------------------------


def before(state: State, after: Patch) -> Patch:
    """The parts of a state that a patch would change."""
    before: Patch = {key: getattr(state, key) for key in ("classes", "settings") if key in after}
    if "images" in after:
        before["images"] = {key: state.images.get(key) for key in after["images"]}
    return before


def patched(state: State, patch: Patch) -> State:
    """A state with a patch laid over it."""
    images = state.images
    if "images" in patch:
        merged = {**images, **patch["images"]}
        kept = {key: picture for key, picture in merged.items() if picture is not None}
        images = dict(sorted(kept.items(), key=lambda item: item[1].order))
    return State(patch.get("classes", state.classes), images, patch.get("settings", state.settings))


def joined(first: Change, second: Change) -> Change:
    """Two changes, one after the other, as one."""
    undone, done = _over(second.before, first.before), _over(first.after, second.after)
    count = len(done.get("images", ()))
    return Change(f"added {images_text(count)}" if count else second.what, undone, done, first.group)


def _over(lower: Patch, upper: Patch) -> Patch:
    """Two patches as one; where both say something, the upper one counts."""
    merged = {**lower, **upper}
    if "images" in merged:
        merged["images"] = {**lower.get("images", {}), **upper.get("images", {})}
    return merged


# --- reading ----------------------------------------------------------------------------------------------------------


def read_project(file: Path) -> tuple[State, list[Change], list[Change], int, set[str]]:
    """A project's state, its changes done and undone, its version, and files below images/ that it doesn't need.

    Raises:
        StorageError: The file is damaged, or a newer adaptkit wrote it.
    """
    content = read_json(file)
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        why = "was written by a newer adaptkit: update adaptkit" if newer else "isn't a studio project"
        raise StorageError(f"{file} {why}.")
    try:
        state = patched(State(), _patch(content))
        wrong = [p.label for p in state.images.values() if p.label is not None and p.label not in state.classes]
        if wrong:
            raise ValueError(f"an image has the label {wrong[0]!r}, which is no class")
        done, undone = ([_change(item) for item in content[key]] for key in ("done", "undone"))
        gone = {_matched(_FILE, name) for name in content.get("gone", ())}
        return state, done, undone, int(content["version"]), gone
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(f"{file} is damaged ({error}): put a copy of it back.") from error


def _change(item: Mapping[str, Any]) -> Change:
    return Change(str(item["what"]), _patch(item["before"]), _patch(item["after"]), str(item["group"]))


def _patch(content: Mapping[str, Any]) -> Patch:
    """A patch from JSON; what isn't as it should be raises."""
    patch: Patch = {}
    if "classes" in content:
        patch["classes"] = {_matched(_CLASS_ID, key): str(name) for key, name in content["classes"].items()}
    if "images" in content:
        patch["images"] = {key: None if p is None else _read_picture(key, p) for key, p in content["images"].items()}
    if "settings" in content:
        patch["settings"] = Settings(**{key: str(value) for key, value in content["settings"].items()})
    return patch


def _read_picture(key: str, content: Mapping[str, Any]) -> Picture:
    file = _matched(_FILE, content["file"])
    if file.split(".")[0] != key:
        raise ValueError(f"the image {key!r} has the file {file!r}")
    label = content["label"]
    return Picture(file, str(content["name"]), int(content["order"]), None if label is None else str(label))


def _matched(pattern: re.Pattern[str], text: Any) -> str:
    if not isinstance(text, str) or not pattern.fullmatch(text):
        raise ValueError(f"{text!r:.60} isn't accepted there")
    return text
