"""What answers in the studio: stored features, methods fitted on them, and an estimate of how often they are right.

Features are made once, by a thread of its own, and kept in the feature store. Fits read them alone, so an answer comes
within a fraction of a second. A class list in which every class has an image is answered by the chosen method, any
other by the class names alone (zero-shot).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from threading import RLock, Thread
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from adaptkit.backbones.base import Backbone
from adaptkit.data.features import FeatureStore
from adaptkit.data.images import load_rgb
from adaptkit.data.splits import FileSource, TestSplit
from adaptkit.data.transforms import to_pixels
from adaptkit.errors import AdaptKitError, DataError, UnsupportedError
from adaptkit.evaluation.calibration import softmax
from adaptkit.evaluation.recipes import Resolved, resolve
from adaptkit.methods import methods
from adaptkit.methods.base import Method
from adaptkit.studio.choosing import FOLDS, folds, label_next
from adaptkit.studio.found import Answers, Estimate
from adaptkit.studio.project import Project
from adaptkit.studio.state import State
from adaptkit.training.loop import fit_method
from adaptkit.types import FitTask, TensorInputs

OFFERED = (
    "zero-shot",
    "linear-probe",
    "tip-adapter",
    "gda",
    "taskres",
    "tip-adapter-f",
    "ape",
    "lp-plus-plus",
    "zs-lp",
    "clap",
)
"""Methods to choose from: they read stored features alone and are fitted in about a second or less."""

NEXT = 12
"""How many images are proposed for labelling."""

SEED = 0
_BATCH = 32  # images encoded at once
_PART = 512  # most images asked of the store at once: each time, it looks through its files
_REMEMBERED = 24


class OvertakenError(AdaptKitError):
    """The project changed while something was computed that belongs to how it was."""


class Engine:
    """Answers for one project with one backbone.

    Args:
        project: The project.
        backbone: The frozen model.
        store: Where features are kept; None for adaptkit's own store.

    Attributes:
        progress: (what, done, total) while images are encoded, else None.
        failed: Images that can't be read (any more), with the reason.
    """

    def __init__(self, project: Project, backbone: Backbone, store: FeatureStore | None = None) -> None:
        self.project, self.backbone, self.store = project, backbone, store or FeatureStore()
        self.progress: tuple[str, int, int] | None = None
        self.failed: dict[str, str] = {}
        self._features: dict[str, Tensor] = {}  # unnormalised [dim], by image id
        self._computing = RLock()  # held for one fit at a time, never for a whole cross-validation
        self._starting = RLock()
        self._thread: Thread | None = None
        self._memo: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def offered(self) -> list[str]:
        """Names of the methods that this backbone can run."""
        return [name for name in OFFERED if self.backbone.has_text or not methods.get(name).needs_text]

    def check_method(self, name: str) -> None:
        """Refuse a method that the studio doesn't offer.

        Raises:
            UnknownNameError: No such method.
            UnsupportedError: It isn't among those offered.
        """
        methods.entry(name)
        if name not in self.offered():
            raise UnsupportedError(
                f"The studio doesn't offer {name!r}, which isn't fast enough or needs more than stored features: choose"
                f" {', '.join(self.offered())}, or use adaptkit's command line."
            )

    # --- features -----------------------------------------------------------------------------------------------------

    def encode_soon(self) -> None:
        """Make the missing features in a thread of its own; returns at once."""
        with self._starting:
            if self._thread is None or not self._thread.is_alive():
                self._thread = Thread(target=self.encode, name="adaptkit-studio-encoder", daemon=True)
                self._thread.start()

    def encode(self) -> None:
        """Make the missing features, those of images that come in meanwhile too."""
        done = 0
        try:
            while missing := self.missing():
                self.progress = ("looking at images", done, done + len(missing))
                part = missing[: min(_PART, max(_BATCH, done))]  # the first ones soon
                self._encode_part(part)
                done += len(part)
        finally:
            self.progress = None

    def missing(self) -> list[str]:
        """Images without features, failed ones left out."""
        return [key for key in self.project.state.images if key not in self._features and key not in self.failed]

    def _encode_part(self, keys: Sequence[str]) -> None:
        state = self.project.state
        there = []
        for key in keys:
            picture = state.images.get(key)
            if picture is None:  # taken out meanwhile; undo may bring it back
                continue
            if not (self.project.folder / "images" / picture.file).is_file():
                self.failed[key] = "The file is gone from the project's folder images/."
            else:
                there.append(key)
        try:
            self._put(state, there)
        except DataError:
            for key in there:
                try:
                    self._put(state, [key])
                except DataError as error:
                    self.failed[key] = str(error)
        except Exception as error:  # whatever a model raises: the page must say it, and not wait for ever
            self.failed.update(dict.fromkeys(there, str(error)))

    def _put(self, state: State, keys: Sequence[str]) -> None:
        names = [state.images[key].file for key in keys]
        source = FileSource(self.project.folder / "images", names)
        count = len(names)
        split = TestSplit(tuple(names), np.zeros(count, dtype=np.int64), ("",), source, np.arange(count))
        features = self.store.features(self.backbone, split, batch_size=_BATCH)
        self._features.update(zip(keys, features, strict=True))

    def known(self, keys: Sequence[str]) -> list[str]:
        """Those of some images that have features."""
        return [key for key in keys if key in self._features]

    def _rows(self, keys: Sequence[str]) -> Tensor:
        dim = self.backbone.spec.embed_dim
        return torch.stack([self._features[key] for key in keys]) if keys else torch.empty(0, dim)

    def _unit(self, keys: Sequence[str]) -> NDArray[np.float32]:
        rows: NDArray[np.float32] = F.normalize(self._rows(keys), dim=-1).numpy()
        return rows

    # --- answers ------------------------------------------------------------------------------------------------------

    def answers(self) -> Answers:
        """What is answered for every image that has features."""
        state = self.project.state
        images = tuple(self.known(list(state.images)))
        classes = _ordered(state)
        method, note = self.answering(state)
        if not method or not images:
            return Answers(method, note, classes, images, None)
        return Answers(method, note, classes, images, self.odds(state, method, self._rows(images)))

    def answering(self, state: State) -> tuple[str, str]:
        """Name of the method that answers now ("" for none), and why it isn't the chosen one."""
        chosen = state.settings.method
        if len(state.classes) < 2:
            return "", "Name at least two classes."
        if chosen == "zero-shot" and self.backbone.has_text:
            return chosen, ""
        held = {state.images[key].label for key in self.known(state.labelled())}
        without = [name for key, name in state.classes.items() if key not in held]
        if not without:
            return chosen, ""
        shown = ", ".join(without[:3]) + (f" and {len(without) - 3} more" if len(without) > 3 else "")
        if self.backbone.has_text:
            return "zero-shot", f"Guessed from the class names, until every class has an image. Missing: {shown}."
        return "", f"{self.backbone.spec.name} reads no names: label an image of every class. Missing: {shown}."

    def odds(self, state: State, method: str, features: Tensor) -> NDArray[np.float64]:
        """Probabilities [n, classes] of features [n, dim] by a method fitted on all labelled images."""
        return _odds(self.fitted(state, method), features.to(self.backbone.device))

    def fitted(self, state: State, method: str) -> Method:
        """A method fitted on all labelled images; remembered until labels, names or the method change.

        Raises:
            DataError: A class has no labelled image, and the method learns from images.
        """
        keys = self.known(state.labelled())
        classes = _ordered(state)
        marks = tuple((key, state.images[key].label) for key in keys) if method != "zero-shot" else ()
        memo = ("fit", method, tuple(state.classes.items()), marks)
        with self._computing:
            if memo not in self._memo:
                labels = _labels(state, keys, classes)
                if method != "zero-shot" and len(set(labels.tolist())) < len(classes):
                    raise DataError("Every class needs a labelled image first.")
                names = [state.classes[key] for key in classes]
                self._remember(memo, self._fit(method, names, self._rows(keys), labels))
            self._memo.move_to_end(memo)
            fitted: Method = self._memo[memo]
            return fitted

    def _remember(self, key: tuple[Any, ...], value: Any) -> None:
        self._memo[key] = value
        while len(self._memo) > _REMEMBERED:
            self._memo.popitem(last=False)

    def _fit(self, name: str, names: Sequence[str], features: Tensor, labels: NDArray[np.int64]) -> Method:
        shots = int(np.bincount(labels, minlength=len(names)).min())
        resolved = settings_of(name, max(1, shots))
        method = methods.get(name)(self.backbone, names, config=resolved.config, seed=SEED)
        task = FitTask(tuple(names), TensorInputs(features[None], torch.from_numpy(labels)), None, SEED)
        fit_method(method, task, resolved.training)
        return method

    def try_image(self, content: bytes, name: str) -> tuple[str, list[tuple[str, float]]]:
        """Answer an image that isn't in the project: the method's name, and (class id, probability), likeliest first.

        Raises:
            DataError: It isn't an image, or nothing can answer yet; the message says what is missing.
        """
        state = self.project.state
        method, note = self.answering(state)
        if not method:
            raise DataError(note)
        pixels = to_pixels(load_rgb(content, name=name), self.backbone.spec.preprocessing)[None]
        with self._computing, torch.no_grad():
            features = self.backbone.encode_image(pixels.to(self.backbone.device)).float().cpu()
        odds = self.odds(state, method, features)[0]
        classes = _ordered(state)
        return method, [(classes[i], float(odds[i])) for i in odds.argsort()[::-1]]

    # --- what to do next ----------------------------------------------------------------------------------------------

    def next_to_label(self, answers: Answers, count: int = NEXT) -> list[str]:
        """Ids of the images that are most worth a label, the best first."""
        state = self.project.state
        rows = [
            (i, key) for i, key in enumerate(answers.images) if key in state.images and state.images[key].label is None
        ]
        odds = None if answers.odds is None else answers.odds[[i for i, _ in rows]]
        waiting = [key for _, key in rows]
        chosen = label_next(odds, self._unit(waiting), self._unit(self.known(state.labelled())), count)
        return [waiting[i] for i in chosen]

    def estimate(self, method: str) -> Estimate:
        """Cross-validation of a method on the labelled images: each is answered by a fit that hasn't seen it.

        Raises:
            DataError: Too few labels; the message says what is missing.
            OvertakenError: The labels changed meanwhile.
        """
        state = self.project.state
        self._check_estimable(state, method)
        keys, classes = self.known(state.labelled()), _ordered(state)
        memo = ("estimate", method, tuple(state.classes.items()), tuple((k, state.images[k].label) for k in keys))
        with self._computing:
            if memo in self._memo:
                remembered: Estimate = self._memo[memo]
                return remembered
        labels = _labels(state, keys, classes)
        started = time.perf_counter()
        places, given = folds(labels, SEED), np.full(len(labels), -1, dtype=np.int64)
        names, features = [state.classes[key] for key in classes], self._rows(keys)
        for fold in range(FOLDS) if method != "zero-shot" else (-2,):
            if self.project.state is not state:
                raise OvertakenError("The labels have changed meanwhile.")
            train, test = places != fold, places == fold if fold >= 0 else places >= 0
            if test.any():
                with self._computing:
                    fitted = self._fit(method, names, features[train], labels[train])
                    given[test] = _odds(fitted, features[test].to(self.backbone.device)).argmax(axis=1)
        tested = np.flatnonzero(places >= 0)
        single = tuple(classes[label] for label in labels[places < 0].tolist())
        estimate = Estimate(
            method,
            tuple(keys[i] for i in tested),
            tuple(labels[tested].tolist()),
            tuple(given[tested].tolist()),
            classes,
            single,
            time.perf_counter() - started,
        )
        with self._computing:
            self._remember(memo, estimate)
        return estimate

    def _check_estimable(self, state: State, method: str) -> None:
        self.check_method(method)
        if len(state.classes) < 2:
            raise DataError("Name at least two classes.")
        counts = dict.fromkeys(state.classes, 0)
        for key in self.known(state.labelled()):
            counts[str(state.images[key].label)] += 1
        empty = [state.classes[key] for key, count in counts.items() if not count]
        if empty:
            raise DataError(f"An estimate needs an image of every class. Missing: {', '.join(empty[:5])}.")
        if max(counts.values()) < 2:
            raise DataError("An estimate needs a second image of at least one class.")


def settings_of(method: str, shots: int) -> Resolved:
    """A method's own settings, on the plain view of each image: what the studio fits with."""
    kind = methods.get(method)
    plain = {} if kind.default_training is None else {"training.views": 0}
    return resolve(kind, None, plain, shots=shots, origin="the studio")


def _ordered(state: State) -> tuple[str, ...]:
    """Class ids in the order of their names, which is that of `FewShotClassifier`."""
    return tuple(sorted(state.classes, key=lambda key: state.classes[key]))


def _labels(state: State, keys: Sequence[str], classes: Sequence[str]) -> NDArray[np.int64]:
    place = {key: index for index, key in enumerate(classes)}
    return np.array([place[str(state.images[key].label)] for key in keys], dtype=np.int64)


def _odds(method: Method, features: Tensor) -> NDArray[np.float64]:
    """Probabilities [n, classes]."""
    with torch.no_grad():
        return softmax(method(features).double().cpu().numpy())
