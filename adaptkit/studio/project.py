"""A studio project: one folder that always holds the whole work, and can be opened again after any end.

    project.json   classes, images with their labels, settings, and the last changes, for undo
    images/        a copy of every image, called by the digest of its content; never changed, and deleted at the next
                   opening or closing after no undo can bring it back
    thumbnails/    small pictures for the page; made again where they are missing

Every change is one `Change` (what it was and what it is now, as patches), applied and written in one atomic file before
anyone is answered. So a kill at any moment leaves the state before the change or the one after it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import RLock

from adaptkit.errors import ConfigError, StorageError, UnknownNameError
from adaptkit.storage import atomic_path, try_lock
from adaptkit.studio.pictures import thumbnail_path
from adaptkit.studio.state import (
    SCHEMA_VERSION,
    Change,
    Patch,
    Picture,
    Settings,
    State,
    before,
    images_text,
    joined,
    patched,
    read_project,
)

PROJECT_FILE = "project.json"
MOST_CLASSES = 1000
MOST_CHANGES = 200
"""Changes that can be undone."""

LONGEST_NAME = 80


class Project:
    """A project's folder, opened: reads it, or makes a new one. One process at a time may hold it.

    Args:
        folder: The project's folder; made where there is none.
        settings: Of a new project.

    Raises:
        StorageError: The folder holds other things, is in use by another studio, can't be written or is damaged.

    Attributes:
        folder: The folder.
        state: The work as it stands; replaced as a whole by every change.
        version: Counts the changes, undone and redone ones too.
    """

    def __init__(self, folder: str | Path, settings: Settings | None = None) -> None:
        self.folder = Path(os.path.abspath(os.path.expanduser(folder)))
        self.lock = RLock()
        file = self.folder / PROJECT_FILE
        if self.folder.exists():
            _check_folder(self.folder, file)
        handle = try_lock(self.folder / ".lock")
        if handle is None:
            raise StorageError(f"{self.folder} is open in another studio: use that one, or end it first.")
        self._handle: int | None = handle
        self.state, self._done, self._undone, self.version = State(settings=settings or Settings()), [], [], 0
        self._gone: set[str] = set()
        try:
            for place in (self.folder, self.folder / "images", self.folder / "thumbnails"):
                for left in filter(_unfinished, place.glob(".*")):
                    left.unlink(missing_ok=True)
            if file.exists():
                self.state, self._done, self._undone, self.version, self._gone = read_project(file)
            else:
                self._write(self.state, [], [], 0)
        except BaseException:
            self._release()
            raise
        self._delete_gone()

    _done: list[Change]
    _undone: list[Change]

    def close(self) -> None:
        """Let another process have the folder; nothing can be changed here any more."""
        with self.lock:
            if self._handle is not None:
                self._delete_gone()
                self._release()

    def _release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    @property
    def undoable(self) -> str:
        """What `undo` would take back; "" for nothing."""
        return self._done[-1].what if self._done else ""

    @property
    def redoable(self) -> str:
        """What `redo` would do again; "" for nothing."""
        return self._undone[-1].what if self._undone else ""

    def image_path(self, image: str) -> Path:
        """The file of an image.

        Raises:
            UnknownNameError: No such image.
        """
        return self.folder / "images" / self._picture(image).file

    # --- classes ------------------------------------------------------------------------------------------------------

    def add_class(self, name: str) -> str:
        """Add a class; returns its id.

        Raises:
            ConfigError: The name is empty, too long or taken, or there are too many classes.
        """
        with self.lock:
            return self.add_classes([name])[0]

    def add_classes(self, names: Sequence[str], group: str = "") -> list[str]:
        """Add several classes as one change; returns their ids. Errors as for `add_class`."""
        with self.lock:
            classes, ids = dict(self.state.classes), []
            for name in names:
                if len(classes) >= MOST_CLASSES:
                    raise ConfigError(f"There are {MOST_CLASSES} classes already, and no more are accepted.")
                ids.append(f"c{1 + max((int(key[1:]) for key in (*self._class_ids(), *classes)), default=0)}")
                classes[ids[-1]] = check_name(name, classes.values())
            if ids:
                self._change(f"added {_list(classes[key] for key in ids)}", {"classes": classes}, group)
            return ids

    def rename_class(self, class_id: str, name: str) -> None:
        """Give a class another name; its images stay in it.

        Raises:
            UnknownNameError: No such class.
            ConfigError: The name is empty, too long or taken.
        """
        with self.lock:
            old = self._class(class_id)
            others = [text for key, text in self.state.classes.items() if key != class_id]
            classes = {**self.state.classes, class_id: check_name(name, others)}
            self._change(f"renamed {old!r} to {classes[class_id]!r}", {"classes": classes})

    def remove_class(self, class_id: str) -> None:
        """Remove a class; its images stay, without a label.

        Raises:
            UnknownNameError: No such class.
        """
        with self.lock:
            name = self._class(class_id)
            classes = {key: text for key, text in self.state.classes.items() if key != class_id}
            freed = {key: replace(self.state.images[key], label=None) for key in self.state.labelled(class_id)}
            self._change(f"removed {name!r}", {"classes": classes, "images": freed})

    # --- images -------------------------------------------------------------------------------------------------------

    def add_pictures(self, pictures: Mapping[str, Picture], group: str = "") -> list[str]:
        """Add images whose files lie below images/ already; returns the ids of those that weren't there yet.

        Args:
            pictures: By id; their `order` is given here.
            group: See `Change`.
        """
        with self.lock:
            last = max((picture.order for picture in self.state.images.values()), default=0)
            fresh = {key: picture for key, picture in pictures.items() if key not in self.state.images}
            for picture in fresh.values():
                if picture.label is not None:
                    self._class(picture.label)
            placed = {key: replace(p, order=last + n) for n, (key, p) in enumerate(fresh.items(), 1)}
            if placed:
                self._change(f"added {images_text(len(placed))}", {"images": placed}, group)
            return list(placed)

    def label(self, images: Sequence[str], class_id: str | None) -> None:
        """Say what images show; None takes their labels away.

        Raises:
            UnknownNameError: No such image or class.
        """
        with self.lock:
            name = None if class_id is None else self._class(class_id)
            found = {image: self._picture(image) for image in images}
            changed = {key: replace(p, label=class_id) for key, p in found.items() if p.label != class_id}
            if changed:
                what = images_text(len(changed))
                done = f"took the label from {what}" if name is None else f"labelled {what} {name!r}"
                self._change(done, {"images": changed})

    def remove_images(self, images: Sequence[str]) -> None:
        """Take images out of the project; their files stay in images/ as long as this can be undone.

        Raises:
            UnknownNameError: No such image.
        """
        with self.lock:
            gone = {image: None for image in images if self._picture(image)}
            if gone:
                self._change(f"removed {images_text(len(gone))}", {"images": gone})

    def set_method(self, method: str) -> None:
        """Choose the method that answers."""
        with self.lock:
            if method != self.state.settings.method:
                self._change(f"chose {method}", {"settings": replace(self.state.settings, method=method)})

    # --- undo ---------------------------------------------------------------------------------------------------------

    def undo(self) -> str:
        """Take the last change back; returns what it was.

        Raises:
            ConfigError: There is nothing to take back.
        """
        with self.lock:
            if not self._done:
                raise ConfigError("There is nothing to undo.")
            change = self._done[-1]
            self._keep(patched(self.state, change.before), self._done[:-1], [*self._undone, change])
            return change.what

    def redo(self) -> str:
        """Do again what was undone last; returns what it was.

        Raises:
            ConfigError: There is nothing to do again.
        """
        with self.lock:
            if not self._undone:
                raise ConfigError("There is nothing to redo.")
            change = self._undone[-1]
            self._keep(patched(self.state, change.after), [*self._done, change], self._undone[:-1])
            return change.what

    # --- inside -------------------------------------------------------------------------------------------------------

    def _class(self, class_id: str) -> str:
        if class_id not in self.state.classes:
            raise UnknownNameError(f"There is no class {class_id!r} (any more): load the page again.")
        return self.state.classes[class_id]

    def _picture(self, image: str) -> Picture:
        if image not in self.state.images:
            raise UnknownNameError(f"There is no image {image!r:.40} (any more): load the page again.")
        return self.state.images[image]

    def _class_ids(self) -> Iterable[str]:
        """Every class id in use, those that undo could bring back among them: an id is never given twice."""
        for change in (*self._done, *self._undone):
            for patch in (change.before, change.after):
                yield from patch.get("classes", ())

    def _change(self, what: str, after: Patch, group: str = "") -> None:
        change = Change(what, before(self.state, after), after, group)
        state, done = patched(self.state, after), list(self._done)
        if group and done and done[-1].group == group:
            change = joined(done.pop(), change)
        self._keep(state, [*done, change][-MOST_CHANGES:], [])

    def _keep(self, state: State, done: list[Change], undone: list[Change]) -> None:
        """Written first and believed afterwards: where the disk refuses, nothing has happened."""
        if self._handle is None:
            raise StorageError(f"{self.folder} was closed, so nothing can be changed in it: open it again.")
        kept, before = {id(change) for change in (*done, *undone)}, self._gone
        forgotten = [change for change in (*self._done, *self._undone) if id(change) not in kept]
        self._gone = before | {p.file for p in _pictures(forgotten) if p.file.split(".")[0] not in state.images}
        try:
            self._write(state, done, undone, self.version + 1)
        except BaseException:
            self._gone = before
            raise
        self.state, self._done, self._undone, self.version = state, done, undone, self.version + 1

    def _delete_gone(self) -> None:
        """Delete the files of removed images that no undo can bring back; those that came in again stay."""
        changes = (*self._done, *self._undone)
        for name in self._gone - {p.file for p in (*self.state.images.values(), *_pictures(changes))}:
            with contextlib.suppress(OSError):  # a file that can't be deleted only takes room
                (self.folder / "images" / name).unlink(missing_ok=True)
                thumbnail_path(self.folder, name.split(".")[0]).unlink(missing_ok=True)
        self._gone = set()

    def _write(self, state: State, done: Sequence[Change], undone: Sequence[Change], version: int) -> None:
        content = {
            "schema_version": SCHEMA_VERSION,
            "version": version,
            **vars(state),
            "done": done,
            "undone": undone,
            "gone": sorted(self._gone),
        }
        with atomic_path(self.folder / PROJECT_FILE) as temporary:
            # without an indent json writes ten times as fast, and this is written at every click
            temporary.write_text(json.dumps(content, separators=(",", ":"), default=vars), encoding="utf-8")


def _pictures(changes: Iterable[Change]) -> Iterable[Picture]:
    """The images that some changes know, as they were and as they became."""
    for change in changes:
        for patch in (change.before, change.after):
            yield from (picture for picture in patch.get("images", {}).values() if picture is not None)


def check_name(name: str, others: Iterable[str]) -> str:
    """A class name without blanks around it.

    Raises:
        ConfigError: It is empty, too long, has control characters, or another class can't be told from it.
    """
    text = " ".join(str(name).split())
    if not text:
        raise ConfigError("A class needs a name: write what the images show, such as 'red fox'.")
    if len(text) > LONGEST_NAME or not text.isprintable():
        raise ConfigError(f"A class name has at most {LONGEST_NAME} letters, all of them printable.")
    if plain_name(text) in {plain_name(other) for other in others}:
        raise ConfigError(f"There is a class {text!r} already: choose another name.")
    return text


def plain_name(name: str) -> str:
    """A class name as it is compared with others: without case, and with blanks for underscores."""
    return " ".join(name.replace("_", " ").split()).casefold()


def _list(names: Iterable[str]) -> str:
    texts = [repr(name) for name in names]
    return texts[0] if len(texts) == 1 else f"{len(texts)} classes ({', '.join(texts[:3])}{', …' * (len(texts) > 3)})"


def _unfinished(path: Path) -> bool:
    """Whether a file was being written when a studio was killed."""
    return path.name.startswith(".") and path.name.endswith(".tmp") and path.is_file()


def _check_folder(folder: Path, file: Path) -> None:
    if not folder.is_dir():
        raise StorageError(f"{folder} is a file, and a project is a folder: choose another name.")
    if not file.exists() and any(path.name != ".lock" and not _unfinished(path) for path in folder.iterdir()):
        raise StorageError(
            f"{folder} isn't empty and holds no studio project: name a new folder for the project, and give your images"
            " with --images or in the page."
        )
