"""A project and its engine together: what the page can ask for, as plain values."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from adaptkit.backbones.base import Backbone
from adaptkit.data.features import FeatureStore
from adaptkit.data.images import load_rgb
from adaptkit.errors import AdaptKitError, BackboneError, ConfigError, DataError, StorageError
from adaptkit.export.package import PARITY_FILE, Format, export_adapter
from adaptkit.methods import methods
from adaptkit.methods.adapter import CONFIG_FILE, LABEL_FACTS, AdaptedModel, save_adapter
from adaptkit.studio.engine import SEED, Engine
from adaptkit.studio.pictures import MAX_BYTES, Found, find_images, read_file, take_in, thumbnail_path, write_thumbnail
from adaptkit.studio.project import LONGEST_NAME, Project, check_name, plain_name
from adaptkit.studio.state import Picture
from adaptkit.types import DEFAULT_TEMPLATES

ADAPTER = "adapter"
"""Where in the project's folder the classifier is saved."""

Source = tuple[str, Callable[[int], bytes]]
"""A file's name, and how so many of its bytes are read."""

SHOWN = 3
"""Classes that are told for each image."""

_PART = 16  # files of a folder that are copied before the project is written again


class Workshop:
    """All that the page can do with one project.

    Args:
        project: The project.
        backbone: The frozen model.
        store: Where features are kept.
    """

    def __init__(self, project: Project, backbone: Backbone, store: FeatureStore | None = None) -> None:
        self.project, self.backbone = project, backbone
        self.engine = Engine(project, backbone, store)
        self._copying: tuple[str, int, int] | None = None
        self._importing = Lock()
        self._problems: list[str] = []
        self.engine.encode_soon()

    # --- reading ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The project as the page shows it."""
        with self.project.lock:
            state, version = self.project.state, self.project.version
            undo, redo = self.project.undoable, self.project.redoable
        return {
            "version": version,
            "folder": str(self.project.folder).encode("utf-8", "replace").decode(),
            "classes": [{"id": key, "name": name} for key, name in state.classes.items()],
            "images": [{"id": key, "name": p.name, "label": p.label} for key, p in state.images.items()],
            "method": state.settings.method,
            "methods": [{"name": name, "what": methods.entry(name).summary} for name in self.engine.offered()],
            "backbone": self.backbone.spec.name,
            "reads_names": self.backbone.has_text,
            "undo": undo,
            "redo": redo,
            **self.progress(),
        }

    def progress(self) -> dict[str, Any]:
        """What is going on in the background, and what went wrong there."""
        now = self._copying or self.engine.progress
        failed = {key: why for key, why in dict(self.engine.failed).items() if key in self.project.state.images}
        return {
            "progress": None if now is None else {"what": now[0], "done": now[1], "total": now[2]},
            "images_in": len(self.project.state.images),
            "failed": failed,
            "problems": list(self._problems),
        }

    def answers(self) -> dict[str, Any]:
        """For each image its likeliest classes, and which images to label next."""
        self.engine.encode_soon()
        version = self.project.version
        answers = self.engine.answers()
        shown: dict[str, list[Any]] = {}
        if answers.odds is not None:
            order = (-answers.odds).argsort(axis=1, kind="stable")[:, :SHOWN]
            for row, key in enumerate(answers.images):
                shown[key] = [[answers.classes[i], round(float(answers.odds[row, i]), 4)] for i in order[row]]
        return {
            "version": version,
            "by": answers.by,
            "note": answers.note,
            "images": shown,
            "waiting": len(self.engine.missing()),
            "next": self.engine.next_to_label(answers),
        }

    def estimate(self, method: str | None = None) -> dict[str, Any]:
        """The cross-validated estimate of a method; of the chosen one where none is named."""
        version = self.project.version
        return {
            "version": version,
            **self.engine.estimate(method or self.project.state.settings.method).to_dict(),
        }

    def code(self) -> str:
        """The Python lines that make the same classifier."""
        state = self.project.state
        method, held = state.settings.method, {state.images[key].label for key in state.labelled()}
        early = (
            "" if len(held) > 1 and held >= set(state.classes) else "# Before this, label an image of every class.\n"
        )
        views = "" if methods.get(method).default_training is None else ', training={"views": 0}'
        return early + _CODE.format(
            folder=repr(str(self.project.folder)), method=method, backbone=self.backbone.spec.name, views=views
        )

    # --- changing -----------------------------------------------------------------------------------------------------

    def add_classes(self, names: Sequence[str]) -> None:
        """Add classes, after a look at whether the text tower can read their names."""
        for name in names:
            self._check_readable(name)
        self.project.add_classes(names)

    def rename_class(self, class_id: str, name: str) -> None:
        """Rename a class, after the same look."""
        self._check_readable(name)
        self.project.rename_class(class_id, name)

    def _check_readable(self, name: str) -> None:
        if self.backbone.has_text and len(name) <= LONGEST_NAME:
            try:
                self.backbone.tokenize([DEFAULT_TEMPLATES[0].format(name)])
            except BackboneError as error:
                raise ConfigError(f"The model can't read the name {name!r}: {error}") from error

    def set_method(self, method: str) -> None:
        """Choose the method that answers."""
        self.engine.check_method(method)
        self.project.set_method(method)

    def take_in(
        self, files: Sequence[Source], label: str | None = None, group: str = ""
    ) -> tuple[list[str], list[dict[str, str]]]:
        """Add images; returns the ids of the new ones, and names and reasons of the refused ones.

        Raises:
            UnknownNameError: No such class.
        """
        self.project.label([], label)  # refuses a class that isn't there before anything is copied
        taken: dict[str, Picture] = {}
        refused = []
        for name, read in files:
            try:
                key, picture = take_in(self.project.folder, read(MAX_BYTES + 1), name, label)
                taken[key] = picture
            except DataError as error:
                refused.append({"name": name[:200], "why": str(error)})
        added = self.project.add_pictures(taken, group)
        for key in taken:
            self.engine.failed.pop(key, None)  # its file is there again
        self.engine.encode_soon()
        return added, refused

    def take_folder(self, path: str, labels: bool) -> int:
        """Start to copy the images below a folder; returns how many there are.

        Args:
            path: The folder.
            labels: Whether folders in it are classes.

        Raises:
            DataError: The folder isn't there, or has no or too many images.
            ConfigError: Another folder is being copied.
        """
        found = find_images(path, leave_out=self.project.folder)
        if not self._importing.acquire(blocking=False):
            raise ConfigError("Another folder is being copied: wait until it is done.")
        self._problems = []
        self._copying = ("copying images", 0, len(found))
        Thread(target=self._copy, args=(found, labels), name="adaptkit-studio-copy", daemon=True).start()
        return len(found)

    def _copy(self, found: Sequence[Found], labels: bool) -> None:
        group = f"import-{secrets.token_hex(8)}"
        try:
            classes = self._classes_for(found, group) if labels else {}
            for start in range(0, len(found), _PART):
                self._copy_part(found[start : start + _PART], classes, group)
                self._copying = ("copying images", min(start + _PART, len(found)), len(found))
        except AdaptKitError as error:
            self._problems.append(str(error))
        finally:
            self._copying = None
            self._importing.release()
            self.engine.encode_soon()

    def _copy_part(self, found: Sequence[Found], classes: dict[str, str], group: str) -> None:
        taken = {}
        for item in found:
            try:
                content = read_file(item.path)
                key, picture = take_in(self.project.folder, content, item.path.name, classes.get(item.folder))
                taken[key] = picture
            except DataError as error:
                self._problems.append(str(error))
        self.project.add_pictures(taken, group)

    def _classes_for(self, found: Sequence[Found], group: str) -> dict[str, str]:
        """Class ids by folder name; classes that aren't there yet are made."""
        known = {plain_name(name): key for key, name in self.project.state.classes.items()}
        fresh: dict[str, str] = {}
        folders = sorted({item.folder for item in found if item.folder})
        for folder in folders:
            plain, name = plain_name(folder), folder.replace("_", " ")
            if plain in known or plain in fresh:
                continue
            try:
                fresh[plain] = check_name(name, ())
                self._check_readable(fresh[plain])
            except ConfigError as error:
                fresh.pop(plain, None)
                self._problems.append(f"The images of the folder {folder!r:.120} come in without a class: {error}")
        if fresh:
            known.update(zip(fresh, self.project.add_classes(list(fresh.values()), group), strict=True))
        return {folder: known[plain_name(folder)] for folder in folders if plain_name(folder) in known}

    def make_thumbnail(self, image: str) -> None:
        """Make the small picture of an image again."""
        path = self.project.image_path(image)
        write_thumbnail(load_rgb(path, name=path.name), thumbnail_path(self.project.folder, image))

    # --- using --------------------------------------------------------------------------------------------------------

    def try_images(self, files: Sequence[Source]) -> dict[str, Any]:
        """Answer images that aren't in the project; nothing of them is kept."""
        answers = []
        for name, read in files[:64]:
            try:
                content = read(MAX_BYTES + 1)
                if len(content) > MAX_BYTES:
                    raise DataError(f"{name} is larger than {MAX_BYTES // 2**20} MB.")
                method, odds = self.engine.try_image(content, name)
                answers.append({"name": name, "by": method, "classes": [[key, round(p, 4)] for key, p in odds[:5]]})
            except DataError as error:
                answers.append({"name": name, "error": str(error)})
        if all("error" in answer for answer in answers):
            raise DataError(str(answers[0]["error"]))
        return {"answers": answers}

    def model(self) -> AdaptedModel:
        """The chosen method, fitted on all labelled images.

        Raises:
            DataError: A class has no labelled image, or there are fewer than two classes.
        """
        state = self.project.state
        method, note = self.engine.answering(state)
        if method != state.settings.method:
            raise DataError(note.replace("Guessed from the class names, until", "Not yet: wait until"))
        return AdaptedModel(self.engine.fitted(state, method))

    def save(self) -> Path:
        """Write the classifier as an adapter folder in the project's folder; replaces the last one."""
        model = self.model()
        folder = self.project.folder / ADAPTER
        _check_own(folder, CONFIG_FILE)
        facts = {LABEL_FACTS: {"labels": list(model.class_names)}, "seed": SEED}
        return save_adapter(folder, model, facts, overwrite=True)

    def export(self, format: str) -> tuple[Path, dict[str, Any]]:
        """Write the classifier for use without adaptkit, into the project's folder; returns the folder and its report.

        Raises:
            ConfigError: An unknown format.
            UnsupportedError: A missing package, or a method that has no such form.
        """
        if format not in ("onnx", "torch"):
            raise ConfigError(f"The studio exports onnx and torch, not {format!r}.")
        model = self.model()
        folder = self.project.folder / f"exported-{format}"
        _check_own(folder, PARITY_FILE)
        wanted: Format = "onnx" if format == "onnx" else "torch"
        return folder, export_adapter(model, folder, wanted, overwrite=True)


def _check_own(folder: Path, mark: str) -> None:
    """Refuse to replace what the studio didn't write.

    Args:
        folder: What would be replaced.
        mark: A file that the studio's own folder has.

    Raises:
        StorageError: It is a link, a file, or holds other things.
    """
    own = not os.path.lexists(folder) or (folder.is_dir() and ((folder / mark).is_file() or not any(folder.iterdir())))
    if folder.is_symlink() or not own:
        raise StorageError(f"{folder} isn't what the studio wrote, so it isn't replaced: move it away, then try again.")


_CODE = """import json
from pathlib import Path

from adaptkit import FewShotClassifier

project = Path({folder})
work = json.loads((project / "project.json").read_text())
labelled = [image for image in work["images"].values() if image["label"]]
paths = [project / "images" / image["file"] for image in labelled]
names = [work["classes"][image["label"]] for image in labelled]

classifier = FewShotClassifier("{method}", backbone="{backbone}"{views})
classifier.fit(paths, names)
classifier.save("my_adapter")
print(classifier.predict_one(paths[0]))
"""
