"""`FewShotClassifier`: fit on a few labelled images, predict labels, as a scikit-learn estimator.

It stands at the end of the arrows: everything it does is done by the rooms below it, and an adapter that it saves is
the same folder that `adaptkit run` writes.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d
from torch import Tensor

from adaptkit.backbones.base import Backbone
from adaptkit.backbones.load import load_backbone
from adaptkit.config import to_mapping
from adaptkit.data.descriptions import descriptions_for
from adaptkit.data.images import IMAGE_SUFFIXES, load_rgb, rgb_from_array
from adaptkit.data.transforms import augment_as, to_pixels
from adaptkit.errors import (
    AdaptKitWarning,
    ConfigError,
    DataError,
    MissingPathError,
    UnsupportedError,
)
from adaptkit.evaluation.calibration import (
    FEWEST_FOR_TEMPERATURE,
    Calibration,
    CalibrationWarning,
    calibrate,
    check_probability,
    saved_calibration,
    softmax,
    warning_about,
)
from adaptkit.evaluation.recipes import Resolved, load_recipe, resolve
from adaptkit.export.hub import fetch, is_on_hub
from adaptkit.methods import methods
from adaptkit.methods.adapter import (
    LABEL_FACTS,
    AdaptedModel,
    load_adapter,
    read_adapter_config,
    save_adapter,
    saved_labels,
)
from adaptkit.methods.base import GradientMethod
from adaptkit.storage import digest_bytes, digest_file, digest_json
from adaptkit.training.loop import fit_method
from adaptkit.training.seeding import generator
from adaptkit.types import DEFAULT_TEMPLATES, FitTask, Inputs, TensorInputs, TrainingSettings

MEMO_BYTES = 128 * 2**20
"""Features remembered across fits; 512 numbers an image, so about 60,000 image views of a ViT-B/16."""

PIXEL_BYTES = 512 * 2**20
"""Training pixels held in memory; where there are more, they are made again in every step."""


class FewShotClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """Adapts a frozen vision-language model to your classes from a few labelled images.

    Images go in as a list of paths or PIL images (mixed, if you like), as an array of uint8 or of floats in [0, 1] with
    shape [n, h, w, 3] or [n, h, w], or as a tensor [n, 3, h, w]. As everywhere in scikit-learn, a list goes in and an
    array with one answer per image comes out; `predict_one` takes a single image.

    `fit` splits nothing off and tunes nothing, unless `validation` says how many images per class it may hold out for
    methods that choose settings (linear-probe, tip-adapter, tip-adapter-f).

    Args:
        method: Registered name; 'adaptkit list methods' shows them.
        backbone: Name as for `adaptkit.load_backbone`, or a loaded backbone (shared, never copied or changed).
        templates: Sentences with one "{}" for the class name; None for "a photo of a {}.".
        class_names: What a text tower reads for a label, where that isn't the label itself: {"cls_07": "red fox"}.
        descriptions: Sentences about the classes, by class name or label, or a file or folder of them (see
            `adaptkit.data.descriptions`), for methods that read them ("dclip", "cupl", "vdt-adapter", …).
        training: Settings of the gradient loop and the views, such as {"epochs": 20}.
        settings: Settings of the method, such as {"num_context": 4}.
        recipe: Name or path of a recipe to start from; `training` and `settings` win over it.
        validation: Images per class that are held out of training for the method to choose settings on.
        seed: Seeds every draw. The same data, settings and seed give the same classifier.
        device: Where a backbone given by name lives ("cpu", "cuda").
        batch_size: Images encoded at once; it changes speed and memory only.

    Attributes:
        classes_: The labels, sorted.
        class_names_: What the text tower read for each of them.
        model_: The fitted `AdaptedModel`.
        report_: What the method reported of its fit (losses, chosen settings).
        origins_: Where each setting came from.
        calibration_: What `calibrate` learned, or None.

    Example:
        >>> import numpy as np
        >>> from adaptkit import FewShotClassifier
        >>> images = np.zeros((8, 32, 32, 3), dtype=np.uint8)
        >>> images[::2, :, :, 0] = 255  # four red ones, four black ones
        >>> classifier = FewShotClassifier("tip-adapter", training={"views": 0})
        >>> classifier.fit(images, ["red", "black"] * 4).predict(images[:3])
        array(['red', 'black', 'red'], dtype='<U5')
        >>> classifier.predict_one(images[0])
        'red'
    """

    calibration_: Calibration | None

    def __init__(
        self,
        method: str = "tip-adapter",
        backbone: str | Backbone = "mini",
        *,
        templates: str | Sequence[str] | None = None,
        class_names: Mapping[Any, str] | None = None,
        descriptions: Mapping[str, Sequence[str]] | str | Path | None = None,
        training: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        recipe: str | Path | None = None,
        validation: int = 0,
        seed: int = 0,
        device: str = "cpu",
        batch_size: int = 64,
    ) -> None:
        self.method = method
        self.backbone = backbone
        self.templates = templates
        self.class_names = class_names
        self.descriptions = descriptions
        self.training = training
        self.settings = settings
        self.recipe = recipe
        self.validation = validation
        self.seed = seed
        self.device = device
        self.batch_size = batch_size

    def __sklearn_clone__(self) -> FewShotClassifier:
        """A clone shares a loaded backbone: it is frozen, and may be large."""
        own: dict[str, Any] = self.get_params(deep=False)
        copies: dict[str, Any] = {k: v if isinstance(v, Backbone) else copy.deepcopy(v) for k, v in own.items()}
        return type(self)(**copies)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = True  # a list of paths or pictures
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        tags.input_tags.string = True
        return tags

    # --- fitting ------------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any = None) -> FewShotClassifier:  # noqa: N803  # scikit-learn's name
        """Fit on labelled images; returns itself.

        Args:
            X: Images (see the class), or the path of a folder with one folder of images per class.
            y: One label per image, texts or whole numbers; None where X is a folder.

        Raises:
            DataError: No or too few images, images and labels that don't match, one class only, something that isn't an
                image (the message names it).
            ConfigError: A setting that can't be used.
            KeyboardInterrupt: Passed on after Ctrl-C; what was learned until then is kept, the classifier can predict.
        """
        self._check_parameters()
        pictures, labels = _labelled(X, y)
        self.classes_, targets = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            only = self.classes_.tolist()[0]
            raise DataError(f"All images are of one class, {only!r}: at least two are needed to tell apart.")
        train, val = _hold_out(targets, self.classes_, self.validation, self.seed)
        method_class, resolved = methods.get(self.method), self._resolve(targets[train])
        backbone = self._backbone()
        self.class_names_ = self._display_names()
        method = method_class(
            backbone,
            self.class_names_,
            templates=self._templates(),
            config=resolved.config,
            seed=self.seed,
            descriptions=self._descriptions(),
        )
        look = _Look(backbone, method.reads, resolved.training, self.seed, self.batch_size)
        shots, frozen = pictures.take(train), None
        if isinstance(method, GradientMethod) and method.wants_frozen and not resolved.training.fresh_views:
            frozen = replace(look, reads="image_features").inputs(shots, targets[train])
        task = FitTask(
            self.class_names_,
            look.inputs(shots, targets[train]),
            look.inputs(pictures.take(val), targets[val], plain=True) if len(val) else None,
            self.seed,
            frozen,
        )
        self.report_ = fit_method(method, task, resolved.training)
        self.origins_ = resolved.origins
        self.calibration_ = None
        self.model_ = AdaptedModel(method)
        if self.report_.get("interrupted"):
            raise KeyboardInterrupt
        return self

    def _check_parameters(self) -> None:
        for name, least in (("validation", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} is {value!r}, but must be a whole number of at least {least}.")
        if not isinstance(self.seed, (int, np.integer)) or isinstance(self.seed, bool):
            raise ConfigError(f"seed is {self.seed!r}, but must be a whole number.")

    def _resolve(self, targets: NDArray[np.int64]) -> Resolved:
        given = {f"method.{key}": value for key, value in (self.settings or {}).items()}
        given.update({f"training.{key}": value for key, value in (self.training or {}).items()})
        recipe = None if self.recipe is None else load_recipe(self.recipe)
        shots = int(np.bincount(targets).min())
        return resolve(methods.get(self.method), recipe, given, shots=shots, origin="argument")

    def _backbone(self) -> Backbone:
        return self.backbone if isinstance(self.backbone, Backbone) else _loaded(self.backbone, str(self.device))

    def _templates(self) -> tuple[str, ...]:
        if self.templates is None:
            return DEFAULT_TEMPLATES
        return (self.templates,) if isinstance(self.templates, str) else tuple(self.templates)

    def _display_names(self) -> tuple[str, ...]:
        names = dict(self.class_names or {})
        labels = self.classes_.tolist()
        unknown = [label for label in names if label not in labels]
        if unknown:
            raise ConfigError(f"class_names names {unknown[0]!r}, which is no label of the images: check its spelling.")
        return tuple(str(names.get(label, label)) for label in labels)

    def _descriptions(self) -> dict[str, tuple[str, ...]] | None:
        """Sentences by display name, and under their own names those of classes that aren't among the labels."""
        if self.descriptions is None:
            return None
        if not isinstance(self.descriptions, (Mapping, str, Path)):
            raise ConfigError(
                f"descriptions is a {type(self.descriptions).__name__}: give sentences by class name, or a path."
            )
        labels = [str(label) for label in self.classes_.tolist()]
        matched = descriptions_for(self.descriptions, self.class_names_, labels)
        return {**matched.others, **matched.descriptions}

    # --- predicting ---------------------------------------------------------------------------------------------------

    def _logits(self, X: Any) -> NDArray[np.float64]:  # noqa: N803
        check_is_fitted(self, "model_")
        method = self.model_.method
        look = _Look(method.backbone, method.reads, TrainingSettings(views=0), int(self.seed), self.batch_size)
        pictures = _pictures(X)
        parts, size = [], method.images_at_once(len(pictures), self.batch_size)
        for start in range(0, len(pictures), size):
            batch = range(start, min(start + size, len(pictures)))
            inputs = look.view(pictures, batch, 0).to(method.backbone.device)
            with torch.no_grad():
                parts.append(method(inputs).double().cpu())
        logits = torch.cat(parts)
        unanswered = logits.isnan().all(dim=1)
        if bool(unanswered.any()):
            warnings.warn(
                f"{method.name} got no answer that names a class for {int(unanswered.sum())} of {len(logits)} images:"
                " all classes are equally likely there.",
                AdaptKitWarning,
                stacklevel=3,
            )
        return torch.where(unanswered[:, None], 0.0, logits).numpy()

    def decision_function(self, X: Any) -> NDArray[np.float64]:  # noqa: N803
        """Logits [n, classes]; for two classes, as scikit-learn wants it, those of the second minus the first, [n]."""
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def predict_proba(self, X: Any) -> NDArray[np.float64]:  # noqa: N803
        """Probabilities [n, classes], in the order of `classes_`; with `calibrate`'s temperature, where it was used."""
        logits = self._logits(X)
        return softmax(logits) if self.calibration_ is None else self.calibration_.probabilities(logits)

    def predict(self, X: Any, *, abstain_below: float | None = None) -> NDArray[Any]:  # noqa: N803
        """The likeliest label of each image, [n].

        Args:
            X: Images (see the class).
            abstain_below: Answer None where the likeliest label's probability is lower; the array then holds objects.
                Probabilities mean more after `calibrate`.

        Raises:
            ConfigError: `abstain_below` isn't between 0 and 1.
        """
        if abstain_below is None:
            likeliest = self._logits(X).argmax(axis=1)
            return cast("NDArray[Any]", self.classes_[likeliest])
        check_probability("abstain_below", abstain_below)
        odds = self.predict_proba(X)
        answers = self.classes_[odds.argmax(axis=1)].astype(object)
        answers[odds.max(axis=1) < abstain_below] = None
        return cast("NDArray[Any]", answers)

    def predict_sets(self, X: Any, *, coverage: float = 0.9) -> list[list[Any]]:  # noqa: N803
        """For each image the labels among which the true one is, as often as `coverage` says, the likeliest first.

        That holds on average, for images of the same kind as those of `calibrate`.

        Args:
            X: Images (see the class).
            coverage: Between 0 and 1.

        Raises:
            ConfigError: `coverage` isn't between 0 and 1, or `calibrate` wasn't called.
        """
        check_probability("coverage", coverage)
        check_is_fitted(self, "model_")
        if self.calibration_ is None:
            raise ConfigError("Prediction sets need held-out images: call calibrate(images, labels) first.")
        _warn(warning_about(len(self.calibration_.scores), coverage))
        odds = self.predict_proba(X)
        inside = self.calibration_.sets(odds, coverage)
        ranked = odds.argsort(axis=1)[:, ::-1]
        return [self.classes_[order[kept[order]]].tolist() for order, kept in zip(ranked, inside, strict=True)]

    def calibrate(self, X: Any, y: Any) -> FewShotClassifier:  # noqa: N803
        """Learn from held-out images what the probabilities are worth; returns itself.

        Afterwards `predict_proba` gives calibrated probabilities, and `predict_sets` works. The images must be others
        than those of `fit`: of those the classifier knows the answers. A new fit forgets the calibration.

        Args:
            X: Images (see the class), or the path of a folder with one folder of images per class.
            y: One label per image; None where X is a folder.

        Raises:
            DataError: No images, or a label that the classifier doesn't know.
            UnsupportedError: A transductive method, whose answers depend on what it is asked about at once.
        """
        check_is_fitted(self, "model_")
        if self.model_.method.transductive:
            raise UnsupportedError(
                f"{self.method} can't be calibrated: what it answers for an image depends on the images it is asked"
                " about with it. Choose an inductive method."
            )
        pictures, labels = _labelled(X, y)
        place = {label: index for index, label in enumerate(self.classes_.tolist())}
        unknown = [label for label in labels.tolist() if label not in place]
        if unknown:
            raise DataError(f"The label {unknown[0]!r} isn't among those of the fit: {_some(place)}.")
        logits = self._logits(pictures.items)
        self.calibration_ = calibrate(logits, np.array([place[label] for label in labels.tolist()]))
        if len(labels) < FEWEST_FOR_TEMPERATURE:
            _warn(
                f"{len(labels)} held-out images say little about probabilities: the temperature is uncertain. Hold out"
                f" at least {FEWEST_FOR_TEMPERATURE}."
            )
        return self

    def predict_one(self, image: Any) -> Any:
        """The likeliest label of a single image: a path, a PIL image, an array [h, w, 3] or a tensor [3, h, w]."""
        return self.predict([image])[0].item()

    # --- outside this session -----------------------------------------------------------------------------------------

    def to_module(self) -> AdaptedModel:
        """The adapted model: a plain `nn.Module` from preprocessed pixels [batch, 3, size, size] to logits."""
        check_is_fitted(self, "model_")
        return self.model_

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write an adapter folder, which `adaptkit.load` and `adaptkit predict` read; it holds no backbone.

        Raises:
            StorageError: The folder can't be written, or isn't empty.
        """
        check_is_fitted(self, "model_")
        own: dict[str, Any] = {"labels": self.classes_.tolist()}
        if self.calibration_ is not None:
            own["calibration"] = self.calibration_.to_dict()
        facts = {LABEL_FACTS: own, "seed": int(self.seed)}
        return save_adapter(folder, self.model_, facts, overwrite=overwrite)


def load(
    folder: str | Path, backbone: Backbone | None = None, *, device: str = "cpu", batch_size: int = 64
) -> FewShotClassifier:
    """Read an adapter folder back as a fitted classifier.

    Args:
        folder: Written by `FewShotClassifier.save`, `adaptkit run` or `save_adapter`; or "hf-hub:user/name@revision"
            (see `adaptkit.export.hub`).
        backbone: The backbone, where it is loaded already; None loads the one that the adapter names.
        device: Where to put a backbone loaded here.
        batch_size: Images encoded at once.

    Raises:
        AdapterError: The folder is damaged, or the backbone isn't the one it was trained on.
    """
    folder = fetch(folder) if is_on_hub(folder) else folder
    config = read_adapter_config(folder)
    labels = saved_labels(config, folder)
    model = load_adapter(folder, _loaded(config.backbone["name"], device) if backbone is None else backbone)
    names = {label: name for label, name in zip(labels, config.class_names, strict=True) if label != name}
    seed = config.facts.get("seed", 0)
    classifier = FewShotClassifier(
        config.method,
        config.backbone["name"] if backbone is None else backbone,
        templates=config.templates,
        class_names=names or None,
        descriptions=config.descriptions or None,
        settings=to_mapping(model.method.config) or None,
        seed=seed if isinstance(seed, int) else 0,
        device=device,
        batch_size=batch_size,
    )
    classifier.classes_ = np.array(labels)
    classifier.class_names_ = config.class_names
    classifier.report_, classifier.origins_ = {}, {}
    classifier.model_ = model
    classifier.calibration_ = saved_calibration(config, folder)
    return classifier


@lru_cache(maxsize=2)
def _remembered(name: str, device: str) -> Backbone:
    return load_backbone(name, device=device)


def _loaded(name: str, device: str) -> Backbone:
    """A backbone by name; folders are read every time, since their content can change under the same name."""
    in_folder = isinstance(name, str) and ":" in name and not name.startswith("hf-hub:")
    return load_backbone(name, device=device) if in_folder else _remembered(name, device)


def _warn(message: str) -> None:
    if message:
        warnings.warn(message, CalibrationWarning, stacklevel=3)


def _some(names: Iterable[Any]) -> str:
    listed = [repr(name) for name in names]
    return ", ".join(listed[:8]) + (", …" if len(listed) > 8 else "")


# --- images and labels as people give them ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pictures:
    """Images that are opened when needed.

    Args:
        items: Paths, PIL images or arrays.
        names: What to call them in messages.
    """

    items: Sequence[Any]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.items)

    def take(self, positions: Iterable[int]) -> _Pictures:
        chosen = list(positions)
        return _Pictures([self.items[i] for i in chosen], [self.names[i] for i in chosen])

    def open(self, position: int) -> Image.Image:
        """The image as RGB, upright."""
        item, name = self.items[position], self.names[position]
        if isinstance(item, (str, Path)):
            return load_rgb(item)
        if isinstance(item, Image.Image):
            return _rgb_from_pil(item, name)
        return rgb_from_array(item, name)

    def digest(self, position: int) -> str:
        """Digest of a file's bytes or of the pixels."""
        item = self.items[position]
        if isinstance(item, (str, Path)):
            try:
                return "file:" + digest_file(item)
            except MissingPathError:
                load_rgb(item)  # the same error, in an image's words
                raise
        array = np.asarray(self.open(position) if isinstance(item, Image.Image) else item)
        return digest_bytes(repr((array.shape, array.dtype.str)).encode() + np.ascontiguousarray(array).tobytes())


def _rgb_from_pil(image: Image.Image, name: str) -> Image.Image:
    """A PIL image of any mode as RGB, transparency laid on white, as `load_rgb` does with files."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        return rgb_from_array(((np.asarray(upright).astype(np.uint32) + 128) // 257).astype(np.uint8), name)
    if upright.mode in ("I", "F"):
        raise DataError(f"{name} holds {upright.mode!r} values, which have no fixed range: convert it to 8 bits first.")
    return rgb_from_array(np.asarray(upright.convert("RGBA" if upright.has_transparency_data else "RGB")), name)


def _pictures(X: Any) -> _Pictures:  # noqa: N803
    """Images as `FewShotClassifier` accepts them."""
    if isinstance(X, (str, bytes, Path, Image.Image)):
        raise DataError("A list of images is needed: write [image] for a single one, or use predict_one.")
    if isinstance(X, Tensor):
        if X.dim() != 4:
            raise DataError(f"The tensor of images has shape {list(X.shape)}; [n, 3, h, w] is accepted.")
        X = X.detach().cpu().numpy()  # noqa: N806
    if isinstance(X, np.ndarray) and X.dtype != object and X.dtype.kind not in "US":
        _check_image_array(X)
    elif not hasattr(X, "__len__") or not hasattr(X, "__getitem__"):
        raise DataError(f"Images are given as a list, an array or a tensor, not as {type(X).__name__}.")
    items = [_item(item, position) for position, item in enumerate(X)]
    if not items:
        raise DataError("There are no images: at least one is needed.")
    names = [str(item) if isinstance(item, (str, Path)) else f"Image {i}" for i, item in enumerate(items)]
    return _Pictures(items, names)


def _check_image_array(array: NDArray[Any]) -> None:
    single = array.ndim == 3 and array.shape[-1] in (3, 4)
    if array.ndim not in (3, 4) or single:
        hint = " Write [image] for a single image." if single or array.ndim == 2 else ""
        raise DataError(
            f"The array of images has shape {list(array.shape)}; [n, h, w, 3] or [n, h, w] is accepted.{hint}"
        )


def _item(item: Any, position: int) -> Any:
    if isinstance(item, Tensor):
        item = item.detach().cpu().numpy()
    if not isinstance(item, (str, Path, Image.Image, np.ndarray)):
        raise DataError(
            f"Image {position} is {item!r:.60}, a {type(item).__name__}: give paths, PIL images, arrays or tensors."
        )
    return str(item) if isinstance(item, np.str_) else item


def _labelled(X: Any, y: Any) -> tuple[_Pictures, NDArray[Any]]:  # noqa: N803
    if y is None:
        if not isinstance(X, (str, Path)):
            raise DataError("Labels are missing: requires y to be passed, but the target y is None.")
        X, y = _class_folders(Path(X))  # noqa: N806
    elif isinstance(X, (str, Path)):
        raise DataError(f"Labels were given together with the folder {X}, whose folders are the labels: leave y out.")
    pictures, labels = _pictures(X), _labels(y)
    if len(pictures) != len(labels):
        raise DataError(f"There are {len(pictures)} images, but {len(labels)} labels: one label per image is needed.")
    return pictures, labels


def _labels(y: Any) -> NDArray[Any]:
    given = list(y) if isinstance(y, (list, tuple)) else []  # numpy would turn [1, "b"] into texts
    values = column_or_1d(y, warn=True)
    mixed = len({isinstance(value, str) for value in given}) > 1
    if mixed or (values.dtype == object and len({type(value) for value in values.tolist()}) > 1):
        raise DataError("The labels mix types (or hold None): give texts only, or whole numbers only.")
    check_classification_targets(values)
    if values.dtype == object:
        values = np.array(values.tolist())
    if values.dtype.kind not in "UiubfS":
        raise DataError(f"The labels are {values.dtype}: give texts or whole numbers.")
    return cast("NDArray[Any]", values)


def _class_folders(root: Path) -> tuple[list[Path], list[str]]:
    """Images and labels of a folder of class folders, in sorted order; hidden files are left out."""
    if not root.is_dir():
        raise MissingPathError(f"There is no folder {root}: give a folder with one folder of images per class.")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise DataError(
            f"{root} has no folders in it: put the images of each class into a folder named like the class."
        )
    paths, labels = [], []
    for folder in folders:
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        found = [path for path in found if not path.name.startswith(".")]
        if not found:
            raise DataError(f"The class folder {folder} holds no images: add some, or remove the folder.")
        paths += found
        labels += [folder.name] * len(found)
    return paths, labels


def _hold_out(
    targets: NDArray[np.int64], classes: NDArray[Any], count: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions for training and for validation, both in rising order; `count` of each class are held out."""
    sizes = np.bincount(targets, minlength=len(classes))
    if sizes.min() <= count:
        label = classes.tolist()[int(sizes.argmin())]
        raise DataError(
            f"Class {label!r} has {sizes.min()} images and {count} are to be held out for validation, which leaves none"
            " to train on: give more images, or a smaller validation."
        )
    numbers = random.Random(int(seed))
    held = [i for c in range(len(classes)) for i in numbers.sample(np.flatnonzero(targets == c).tolist(), count)]
    val = np.array(sorted(held), dtype=np.int64)
    return np.setdiff1d(np.arange(len(targets)), val), val


# --- features and pixels ----------------------------------------------------------------------------------------------


class FeatureMemo:
    """Features of single image views, the least recently used forgotten first.

    Args:
        max_bytes: Room for features (their keys not counted).
    """

    def __init__(self, max_bytes: int = MEMO_BYTES) -> None:
        self.max_bytes = max_bytes
        self._features: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()
        self._bytes = 0
        self._lock = RLock()

    @property
    def bytes(self) -> int:
        """Bytes in use."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._features)

    def get(self, key: tuple[str, ...]) -> Tensor | None:
        """The feature [dim] under a key, or None."""
        with self._lock:
            found = self._features.get(key)
            if found is not None:
                self._features.move_to_end(key)
            return found

    def put(self, key: tuple[str, ...], feature: Tensor) -> None:
        """Remember a feature [dim], and forget old ones where there is no room."""
        with self._lock:
            if key not in self._features:
                self._features[key] = feature.clone()  # a row of a batch would keep the whole batch alive
                self._bytes += _size(feature)
            while self._bytes > self.max_bytes:
                self._bytes -= _size(self._features.popitem(last=False)[1])

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._features.clear()
            self._bytes = 0


def _size(feature: Tensor) -> int:
    return feature.numel() * feature.element_size()


memo = FeatureMemo()
"""Shared by all classifiers of a process, so that cross-validation and grid searches encode an image once."""


@dataclass(frozen=True)
class _Look:
    """How a method looks at images: as features or as pixels, in which views.

    Args:
        backbone: The frozen model.
        reads: "image_features" or "images".
        settings: Of the views.
        seed: Seeds the augmented views.
        batch_size: Images encoded at once.
    """

    backbone: Backbone
    reads: str
    settings: TrainingSettings
    seed: int
    batch_size: int

    def inputs(self, pictures: _Pictures, targets: NDArray[np.int64], *, plain: bool = False) -> Inputs:
        """Training inputs with their views (only the plain one, for validation)."""
        lazy = _LazyInputs(self, pictures, torch.from_numpy(targets), 1 if plain else 1 + self.settings.views)
        if self.settings.fresh_views and not plain:
            return lazy
        if self.reads == "images" and lazy.num_views * len(pictures) * self._pixel_bytes() > PIXEL_BYTES:
            return lazy
        everything = torch.arange(len(pictures))
        return TensorInputs(torch.stack([lazy.select(everything, v) for v in range(lazy.num_views)]), lazy.labels)

    def _pixel_bytes(self) -> int:
        return 3 * 4 * self.backbone.spec.preprocessing.image_size**2

    def view(self, pictures: _Pictures, positions: Sequence[int], view: int) -> Tensor:
        """Features [k, dim] or pixels [k, 3, size, size] of some images, on the CPU."""
        if self.reads == "images":
            return self._pixels(pictures, positions, view)
        return self._features(pictures, positions, view)

    def _pixels(self, pictures: _Pictures, positions: Sequence[int], view: int) -> Tensor:
        return torch.stack([self._picture(pictures, position, view) for position in positions])

    def _picture(self, pictures: _Pictures, position: int, view: int) -> Tensor:
        image, preprocessing = pictures.open(position), self.backbone.spec.preprocessing
        if view == 0:
            return to_pixels(image, preprocessing)
        numbers = generator(self.seed, "view", str(view), pictures.digest(position))
        return augment_as(image, preprocessing, numbers, self.settings)

    def _key(self, digest: str, view: int) -> tuple[str, ...]:
        how = self.settings
        drawn = "" if view == 0 else digest_json([view, self.seed, how.crop_scale, how.flip, how.colour_jitter])
        return (self.backbone.spec.digest, self.backbone.device.type, digest, drawn)

    @torch.no_grad()
    def _features(self, pictures: _Pictures, positions: Sequence[int], view: int) -> Tensor:
        keys = [self._key(pictures.digest(position), view) for position in positions]
        found = {key: memo.get(key) for key in keys}
        missing = {key: position for key, position in zip(keys, positions, strict=True) if found[key] is None}
        for start in range(0, len(missing), self.batch_size):
            batch = list(missing)[start : start + self.batch_size]
            pixels = self._pixels(pictures, [missing[key] for key in batch], view)
            features = self.backbone.encode_image(pixels.to(self.backbone.device)).float().cpu()
            for key, feature in zip(batch, features, strict=True):
                found[key] = feature
                if bool(torch.isfinite(feature).all()):  # what went wrong once may go well the next time
                    memo.put(key, feature)
        return torch.stack([cast(Tensor, found[key]) for key in keys])


@dataclass(frozen=True)
class _LazyInputs:
    """Inputs that are made when asked for: views drawn anew every epoch, or pixels that don't fit into memory."""

    look: _Look
    pictures: _Pictures
    labels: Tensor
    num_views: int

    def select(self, indices: Tensor, view: int = 0) -> Tensor:
        """Features or pixels of images `indices` in one view."""
        return self.look.view(self.pictures, indices.tolist(), view)
