"""`FewShotClassifier` with a tiny random backbone: what goes in, what comes out, and scikit-learn's own checks."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import sklearn
import torch
from PIL import Image
from sklearn.base import clone, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils import estimator_checks
from sklearn.utils.validation import check_is_fitted

import adaptkit
from adaptkit import estimator
from adaptkit.errors import AdapterError, ConfigError, DataError, MissingPathError, StorageError
from adaptkit.estimator import FeatureMemo, FewShotClassifier
from tests.methods.tiny import DIM, SIZE, tiny_clip

CLIP = tiny_clip()
LABELS = np.array(["oak", "red_fox", "river"])


@pytest.fixture(autouse=True)
def tiny_backbone(monkeypatch):
    """Any backbone name means the tiny one; nothing is remembered from one test to the next."""
    monkeypatch.setattr(estimator, "load_backbone", lambda name, *, device="cpu": CLIP)
    estimator._remembered.cache_clear()
    estimator.memo.clear()
    yield
    estimator._remembered.cache_clear()
    estimator.memo.clear()


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """Sizes of the batches that the backbone encodes."""
    batches: list[int] = []
    encode = CLIP.encode_image

    def counting(pixels: torch.Tensor) -> torch.Tensor:
        batches.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(CLIP, "encode_image", counting)
    return batches


def draw(per_class: int = 4, seed: int = 0, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 16, 16, 3], each class a pattern under noise, and its labels."""
    patterns = np.random.default_rng(5).integers(0, 256, (classes, SIZE, SIZE, 3))
    numbers = np.random.default_rng(seed)
    index = np.tile(np.arange(classes), per_class)
    noisy = patterns[index] * 0.8 + numbers.integers(0, 50, (len(index), SIZE, SIZE, 3))
    return noisy.astype(np.uint8), LABELS[index]


def probe(**arguments) -> FewShotClassifier:
    return FewShotClassifier("linear-probe", "tiny", **arguments)


def short_coop(**arguments) -> FewShotClassifier:
    training = {"epochs": 3, "views": 0, **arguments.pop("training", {})}
    return FewShotClassifier("coop", "tiny", training=training, settings={"num_context": 2}, **arguments)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a folder of PNG files per class."""
    root = tmp_path_factory.mktemp("photos")
    images, labels = draw()
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (root / label).mkdir(exist_ok=True)
        Image.fromarray(image).save(root / label / f"{i:02}.png")
    return root


# --- what goes in -----------------------------------------------------------------------------------------------------


def test_every_kind_of_image_gives_the_same_answer(files):
    images, labels = draw()
    paths = [str(files / label / f"{i:02}.png") for i, label in enumerate(labels)]
    given = {
        "uint8": images,
        "floats": images / 255,
        "list of arrays": list(images),
        "PIL": [Image.fromarray(image) for image in images],
        "tensor": torch.from_numpy(images).permute(0, 3, 1, 2),
        "float tensor": torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255,
        "paths": paths,
        "array of paths": np.array(paths),
        "mixed": [
            paths[0],
            Image.fromarray(images[1]),
            images[2],
            torch.from_numpy(images[3]).permute(2, 0, 1),
            *paths[4:],
        ],
    }
    fitted = probe().fit(images, labels)
    wanted = fitted.predict_proba(images)
    for kind, value in given.items():
        np.testing.assert_allclose(fitted.predict_proba(value), wanted, atol=1e-5, err_msg=kind)
        np.testing.assert_allclose(probe().fit(value, labels).predict_proba(images), wanted, atol=1e-3, err_msg=kind)
    assert len(given) == 9


def test_a_folder_of_class_folders_is_enough(files):
    images, labels = draw(seed=1)
    classifier = probe().fit(files)
    assert classifier.classes_.tolist() == sorted(LABELS)
    assert classifier.score(images, labels) == 1.0


def test_greyscale_arrays_are_repeated_over_the_channels():
    images, labels = draw()
    grey = images[..., 0]
    wanted = probe().fit(np.repeat(grey[..., None], 3, axis=-1), labels)
    np.testing.assert_allclose(probe().fit(grey, labels).predict_proba(grey), wanted.predict_proba(grey), atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "I;16"])
def test_pil_images_of_any_mode_are_read_like_files(mode, tmp_path):
    grey = np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE)
    image = Image.fromarray(grey * 257) if mode == "I;16" else Image.fromarray(grey.astype(np.uint8)).convert(mode)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path)
    images, labels = draw()
    fitted = probe().fit(images, labels)
    np.testing.assert_allclose(fitted.decision_function([image]), fitted.decision_function([path]), atol=1e-5)


def test_pil_images_are_turned_upright_like_files(tmp_path):
    image = Image.fromarray(draw()[0][0])
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    fitted = probe().fit(*draw())
    opened = Image.open(tmp_path / "turned.png")
    np.testing.assert_allclose(
        fitted.decision_function([opened]), fitted.decision_function([tmp_path / "turned.png"]), atol=1e-5
    )
    assert not np.allclose(fitted.decision_function([opened]), fitted.decision_function([image]), atol=1e-3)


def test_inputs_are_left_alone():
    images, labels = draw()
    before, names = images.copy(), labels.copy()
    settings = {"c": 1.0}
    probe(settings=settings).fit(images, labels).predict(images)
    assert (images == before).all()
    assert (labels == names).all()
    assert settings == {"c": 1.0}


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_text_labels_in_text_labels_out():
    images, labels = draw(seed=1)
    classifier = probe().fit(*draw())
    predicted = classifier.predict(images)
    assert predicted.dtype.kind == "U"
    assert (predicted == labels).all()
    assert classifier.predict_one(images[0]) == labels[0]
    assert type(classifier.predict_one(images[0])) is str


@pytest.mark.parametrize("kind", [int, bool, object])
def test_labels_of_other_kinds_come_back_as_they_were(kind):
    images, labels = draw(classes=2)
    given = np.array([{"oak": 0, "red_fox": 1}[label] for label in labels])
    given = labels.astype(object) if kind is object else given.astype(kind)
    predicted = probe().fit(images, given).predict(images)
    assert (predicted == given).all()
    assert predicted.dtype.kind == {int: "i", bool: "b", object: "U"}[kind]


@pytest.mark.parametrize("classes", [2, 3])
def test_scores_probabilities_and_predictions_agree(classes):
    images, labels = draw(classes=classes)
    classifier = probe().fit(images, labels)
    scores, p = classifier.decision_function(images), classifier.predict_proba(images)
    assert scores.shape == ((len(images),) if classes == 2 else (len(images), classes))
    assert p.shape == (len(images), classes)
    np.testing.assert_allclose(p.sum(axis=1), 1)
    chosen = (scores > 0).astype(int) if classes == 2 else scores.argmax(axis=1)
    assert (classifier.classes_[chosen] == classifier.predict(images)).all()
    assert (p.argmax(axis=1) == chosen).all()
    assert classifier.score(images, labels) == np.mean(classifier.predict(images) == labels)


def test_one_image_is_answered_as_in_a_batch():
    """To fp32 rounding: matrix products of other sizes round differently (scikit-learn's own check wants 1e-7)."""
    images, labels = draw()
    classifier = probe().fit(images, labels)
    estimator.memo.clear()
    together = classifier.decision_function(images)
    estimator.memo.clear()
    alone = np.concatenate([classifier.set_params(batch_size=1).decision_function(images[[i]]) for i in range(12)])
    np.testing.assert_allclose(alone, together, atol=1e-4)


def test_text_towers_read_display_names():
    images, labels = draw()
    named = FewShotClassifier("zero-shot", "tiny", class_names={"red_fox": "vulpes vulpes"}).fit(images, labels)
    plain = FewShotClassifier("zero-shot", "tiny").fit(images, labels)
    assert named.class_names_ == ("oak", "vulpes vulpes", "river")
    assert named.classes_.tolist() == ["oak", "red_fox", "river"]
    difference = named.decision_function(images) - plain.decision_function(images)
    assert np.abs(difference[:, 1]).max() > 1e-3
    assert np.abs(difference[:, [0, 2]]).max() < 1e-4


def test_templates_reach_the_text_tower():
    images, labels = draw()
    scores = [
        FewShotClassifier("zero-shot", "tiny", templates=given).fit(images, labels).decision_function(images)
        for given in (None, "a photo of a {}.", "a drawing of a {}.", ["a photo of a {}.", "a drawing of a {}."])
    ]
    np.testing.assert_allclose(scores[0], scores[1])
    assert np.abs(scores[0] - scores[2]).max() > 1e-3
    assert np.abs(scores[3] - scores[2]).max() > 1e-3


# --- fitting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["zero-shot", "linear-probe", "coop", "clip-adapter", "tip-adapter", "tip-adapter-f"]
)
def test_methods_on_features_fit_and_predict(method):
    training = {"views": 2, "epochs": 2} if method in ("coop", "clip-adapter", "tip-adapter-f") else {}
    training = {"views": 2} if method == "tip-adapter" else training
    classifier = FewShotClassifier(method, "tiny", training=training).fit(*draw())
    assert np.isfinite(classifier.predict_proba(draw(seed=1)[0])).all()


def test_methods_on_pixels_fit_and_predict_also_where_pixels_exceed_memory(monkeypatch):
    images, labels = draw(2)
    arguments = {"training": {"epochs": 2, "views": 2}, "settings": {"depth": 2}}
    held = FewShotClassifier("maple", "tiny", **arguments).fit(images, labels).decision_function(images)
    monkeypatch.setattr(estimator, "PIXEL_BYTES", 0)
    lazy = FewShotClassifier("maple", "tiny", **arguments).fit(images, labels).decision_function(images)
    np.testing.assert_allclose(held, lazy, atol=1e-5)
    assert len(estimator.memo) == 0


def test_same_seed_same_classifier_other_seed_another():
    images, labels = draw()
    first, second, other = (short_coop(seed=seed).fit(images, labels).predict_proba(images) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - other).max() > 1e-6


def test_fitting_again_starts_anew():
    images, labels = draw()
    classifier = short_coop().fit(images, labels)
    first = classifier.predict_proba(images)
    classifier.fit(images[:8], np.array(["a", "b"] * 4))
    assert classifier.classes_.tolist() == ["a", "b"]
    np.testing.assert_array_equal(classifier.fit(images, labels).predict_proba(images), first)


def test_validation_images_are_held_out_for_the_search(encoded):
    images, labels = draw(per_class=5)
    classifier = FewShotClassifier("tip-adapter", "tiny", validation=2, training={"views": 0}).fit(images, labels)
    assert classifier.report_["searched"]
    assert classifier.report_["val_images"] == 6
    assert classifier.report_["keys"] == 9
    assert sum(encoded) == 15
    without = FewShotClassifier("tip-adapter", "tiny", training={"views": 0}).fit(images, labels)
    assert (without.report_["searched"], without.report_["keys"]) == (False, 15)


def test_settings_come_from_recipe_and_arguments():
    classifier = FewShotClassifier(
        "coop", "tiny", recipe="coop/few-shot-quick", training={"epochs": 1, "views": 0}, settings={"num_context": 3}
    ).fit(*draw())
    assert classifier.report_["epochs"] == 1
    assert classifier.origins_["training.epochs"] == "argument"
    assert classifier.origins_["training.flip"] == "recipe coop/few-shot-quick"
    assert classifier.model_.method.config.context_init == "a photo of a"


def test_recipes_that_depend_on_shots_see_the_smallest_class():
    images, labels = draw(per_class=3)
    classifier = FewShotClassifier("clip-adapter", "tiny", recipe="clip-adapter/few-shot", training={"views": 0})
    classifier.fit(images[:-1], labels[:-1])
    assert classifier.report_["epochs"] == 100  # two shots of the smallest class


def test_interrupted_training_keeps_what_was_learned(monkeypatch):
    fit = estimator.fit_method
    monkeypatch.setattr(estimator, "fit_method", lambda *given: {**fit(*given), "interrupted": True})
    classifier = short_coop()
    with pytest.raises(KeyboardInterrupt):
        classifier.fit(*draw())
    assert classifier.predict(draw()[0]).shape == (12,)


def test_augmented_views_are_drawn_from_the_seed(encoded):
    images, labels = draw()
    arguments = {"training": {"views": 3}}
    first = FewShotClassifier("tip-adapter", "tiny", **arguments).fit(images, labels)
    assert sum(encoded) == 12 * 4
    second = FewShotClassifier("tip-adapter", "tiny", **arguments).fit(images, labels)
    assert sum(encoded) == 12 * 4  # all remembered
    np.testing.assert_array_equal(first.predict_proba(images), second.predict_proba(images))
    other = FewShotClassifier("tip-adapter", "tiny", seed=1, **arguments).fit(images, labels)
    assert sum(encoded) == 12 * 4 + 12 * 3  # the plain view is shared
    assert np.abs(other.predict_proba(images) - first.predict_proba(images)).max() > 1e-7


def test_fresh_views_are_drawn_every_epoch(encoded):
    short_coop(training={"fresh_views": True, "epochs": 3, "batch_size": 12}).fit(*draw())
    assert sum(encoded) == 12 * 3


# --- the memo ---------------------------------------------------------------------------------------------------------


def test_a_grid_search_encodes_every_image_once(encoded):
    images, labels = draw()
    search = GridSearchCV(probe(), {"settings": [{"c": 0.1}, {"c": 1.0}, {"c": 10.0}]}, cv=3).fit(images, labels)
    assert sum(encoded) == 12
    assert search.best_estimator_.score(images, labels) == 1.0


def test_equal_images_are_encoded_once(encoded):
    images, labels = draw()
    probe().fit(np.concatenate([images, images]), np.concatenate([labels, labels]))
    assert sum(encoded) == 12


def test_features_of_another_backbone_are_not_taken(encoded):
    images, labels = draw()
    probe().fit(images, labels)
    other = tiny_clip()
    other.spec = other.spec.__class__(**{**other.spec.__dict__, "digest": "f" * 64})
    FewShotClassifier("linear-probe", other).fit(images, labels)
    assert {key[0] for key in estimator.memo._features} == {CLIP.spec.digest, "f" * 64}
    assert len(estimator.memo) == 24


def test_a_changed_file_is_encoded_again(tmp_path, encoded):
    images, labels = draw()
    paths = []
    for i, image in enumerate(images):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(image).save(paths[-1])
    classifier = probe().fit(paths, labels)
    before = classifier.decision_function(paths)
    Image.fromarray(images[1]).save(paths[0])
    after = classifier.decision_function(paths)
    np.testing.assert_allclose(after[0], before[1], atol=1e-5)
    assert sum(encoded) == 13 or sum(encoded) == 12  # the new content may equal another file's, byte for byte


def test_features_that_went_wrong_are_not_remembered():
    images, labels = draw()
    fitted = probe().fit(images, labels)
    estimator.memo.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CLIP, "encode_image", lambda pixels: torch.full((len(pixels), DIM), torch.nan))
        with pytest.raises(DataError, match="aren't finite"):
            fitted.predict(images[:2])
    assert len(estimator.memo) == 0
    assert len(fitted.predict(images[:2])) == 2


def test_the_memo_forgets_the_least_recently_used():
    memo = FeatureMemo(max_bytes=3 * 4 * DIM)
    for name in "abc":
        memo.put((name,), torch.ones(DIM))
    assert memo.get(("a",)) is not None
    memo.put(("d",), torch.ones(DIM))
    assert memo.get(("b",)) is None
    assert memo.get(("a",)) is not None
    assert (len(memo), memo.bytes) == (3, 3 * 4 * DIM)
    memo.put(("a",), torch.ones(DIM))  # again: counted once
    assert memo.bytes == 3 * 4 * DIM
    memo.clear()
    assert (len(memo), memo.bytes) == (0, 0)


def test_the_memo_keeps_no_whole_batches():
    memo = FeatureMemo()
    batch = torch.zeros(64, DIM)
    memo.put(("a",), batch[3])
    kept = memo.get(("a",))
    assert kept is not None
    assert kept.untyped_storage().nbytes() == 4 * DIM


# --- saving, modules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [["oak", "red_fox", "river"], [7, 3, 5]])
def test_saved_and_loaded_it_answers_the_same(labels, tmp_path):
    images, drawn = draw()
    y = np.array(labels)[np.searchsorted(LABELS, drawn)]
    names = {labels[1]: "vulpes vulpes"}
    classifier = short_coop(class_names=names, templates="a drawing of a {}.").fit(images, y)
    folder = classifier.save(tmp_path / "adapter")
    for loaded in (adaptkit.load(folder), adaptkit.load(folder, CLIP)):
        np.testing.assert_allclose(loaded.predict_proba(images), classifier.predict_proba(images), atol=1e-6)
        assert loaded.predict(images).tolist() == classifier.predict(images).tolist()
        assert loaded.classes_.tolist() == sorted(labels)
        assert loaded.class_names_ == classifier.class_names_
        assert loaded.get_params()["settings"]["num_context"] == 2
    again = adaptkit.load(folder).set_params(training={"epochs": 3, "views": 0}).fit(images, y)
    np.testing.assert_allclose(again.predict_proba(images), classifier.predict_proba(images), atol=1e-6)


def test_saving_never_overwrites_unasked(tmp_path):
    classifier = probe().fit(*draw())
    classifier.save(tmp_path / "adapter")
    with pytest.raises(StorageError, match="isn't empty"):
        classifier.save(tmp_path / "adapter")
    classifier.save(tmp_path / "adapter", overwrite=True)


def test_adapters_without_labels_answer_with_class_names(tmp_path):
    images, labels = draw()
    classifier = probe().fit(images, labels)
    adaptkit.save_adapter(tmp_path / "adapter", classifier.to_module())
    assert (adaptkit.load(tmp_path / "adapter").predict(images) == classifier.predict(images)).all()


@pytest.mark.parametrize(
    "labels", [["oak"], ["oak", "oak", "river"], ["oak", 1, "river"], "oak", None, [[1], [2], [3]]]
)
def test_damaged_labels_are_refused(labels, tmp_path):
    folder = probe().fit(*draw()).save(tmp_path / "adapter")
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    content["facts"]["classifier"] = {"labels": labels}
    path.write_text(json.dumps(content))
    with pytest.raises(AdapterError, match="save the classifier again"):
        adaptkit.load(folder)


def test_the_adapted_model_is_a_plain_module():
    images, labels = draw()
    classifier = probe().fit(images, labels)
    module = classifier.to_module()
    assert isinstance(module, torch.nn.Module)
    pixels = torch.stack([estimator.to_pixels(Image.fromarray(i), CLIP.spec.preprocessing) for i in images])
    with torch.no_grad():
        logits = module(pixels)
    np.testing.assert_allclose(logits.numpy(), classifier.decision_function(images), atol=1e-4)


# --- scikit-learn -----------------------------------------------------------------------------------------------------


def test_descriptions_come_as_sentences_or_as_a_file(tmp_path):
    images, labels = draw()
    sentences = {
        "oak": ["lobed leaves"],
        "Red fox": ["a red coat", "a bushy tail"],
        "river": ["water"],
        "owl": ["eyes"],
    }
    given = FewShotClassifier("cupl", "tiny", descriptions=sentences).fit(images, labels)
    assert given.model_.method.descriptions["red_fox"] == ("a red coat", "a bushy tail")
    (tmp_path / "d.json").write_text(json.dumps(sentences))
    read = FewShotClassifier("cupl", "tiny", descriptions=tmp_path / "d.json").fit(images, labels)
    np.testing.assert_array_equal(read.predict_proba(images), given.predict_proba(images))
    assert read.model_.set_classes(["owl", "oak"]).class_names == ("owl", "oak")  # others in the file can be asked for
    assert clone(given).get_params()["descriptions"] == sentences
    given.save(tmp_path / "adapter")
    loaded = adaptkit.load(tmp_path / "adapter", CLIP)
    np.testing.assert_array_equal(loaded.predict_proba(images), given.predict_proba(images))
    shown = FewShotClassifier(
        "cupl", "tiny", class_names={"red_fox": "vulpes"}, descriptions={**sentences, "vulpes": "x"}
    )
    assert shown.fit(images, labels).model_.method.descriptions["vulpes"] == ("x",)


@pytest.mark.parametrize(
    ("descriptions", "says"),
    [
        (None, "cupl reads descriptions of the classes"),
        ({"oak": ["x"], "river": []}, r"1 class missing \(red_fox\), 1 class without a sentence \(river\)"),
        (["x"], "descriptions is a list: give sentences by class name, or a path"),
        ("nowhere.json", "There are no descriptions at nowhere.json"),
    ],
)
def test_descriptions_that_do_not_fit(descriptions, says):
    with pytest.raises((ConfigError, DataError), match=says):
        FewShotClassifier("cupl", "tiny", descriptions=descriptions).fit(*draw())


def test_it_is_a_classifier_that_can_be_cloned_and_changed():
    classifier = FewShotClassifier("coop", CLIP, settings={"num_context": 2})
    assert is_classifier(classifier)
    copy = clone(classifier)
    assert copy.backbone is CLIP  # frozen, and may be large
    assert copy.settings == classifier.settings
    assert copy.settings is not classifier.settings
    assert copy.set_params(method="maple", seed=3).get_params()["method"] == "maple"
    assert classifier.method == "coop"
    with pytest.raises(ValueError, match="Invalid parameter"):
        copy.set_params(shots=3)


def test_a_clone_is_not_fitted():
    fitted = probe().fit(*draw())
    check_is_fitted(fitted)
    with pytest.raises(NotFittedError):
        check_is_fitted(clone(fitted))


@pytest.mark.parametrize("call", ["predict", "predict_proba", "decision_function", "predict_one", "save", "to_module"])
def test_nothing_is_answered_before_fit(call, tmp_path):
    argument = {"save": [tmp_path / "x"], "to_module": []}.get(call, [draw()[0]])
    with pytest.raises(NotFittedError, match="fit"):
        getattr(probe(), call)(*argument)


def test_cross_validation_works():
    assert cross_val_score(probe(), *draw(), cv=2).tolist() == [1.0, 1.0]
    binary = draw(classes=2)
    assert cross_val_score(probe(), *binary, cv=2, scoring="roc_auc").tolist() == [1.0, 1.0]


def test_a_fitted_one_can_go_to_another_process():
    images, labels = draw()
    fitted = short_coop().fit(images, labels)
    copy = pickle.loads(pickle.dumps(fitted))  # our own bytes; files never hold a pickle
    np.testing.assert_array_equal(copy.predict_proba(images), fitted.predict_proba(images))


class RowClassifier(FewShotClassifier):
    """Draws each row of numbers as a striped picture, since scikit-learn's checks hand over rows."""

    @staticmethod
    def _drawn(rows: np.ndarray) -> np.ndarray:
        shade = 1 / (1 + np.exp(-np.clip(rows, -30, 30) / 2))
        stripes = np.repeat(shade[:, None, :], rows.shape[1], axis=1)
        return np.repeat(stripes[..., None], 3, axis=-1)

    def fit(self, X, y=None):
        from sklearn.utils.validation import validate_data

        return super().fit(self._drawn(validate_data(self, X, dtype=np.float64)), y)

    def _logits(self, X):
        from sklearn.utils.validation import validate_data

        check_is_fitted(self)
        return super()._logits(self._drawn(validate_data(self, X, dtype=np.float64, reset=False)))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = tags.input_tags.three_d_array = tags.input_tags.string = False
        tags.input_tags.two_d_array = True
        return tags


RECENT = tuple(int(part) for part in sklearn.__version__.split(".")[:2]) >= (1, 6)
NOT_RUN = {
    "check_array_api_input": "other array libraries aren't accepted, torch's tensors aside",
    "check_classifier_data_not_an_array": "needs pandas, which isn't among the dependencies",
    "check_methods_subset_invariance": "wants 1e-7, fp32 gives 1e-4: test_one_image_is_answered_as_in_a_batch",
}
# These need no data, so they run on the classifier itself. The others see rows of numbers: `RowClassifier`.
WITHOUT_DATA = (
    "check_do_not_raise_errors_in_init_or_set_params",
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_estimator_tags_renamed",
    "check_estimators_unfitted",
    "check_get_params_invariance",
    "check_mixin_order",
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_set_params",
    "check_valid_tag_types",
)


@pytest.mark.skipif(not RECENT, reason="scikit-learn names these checks since 1.6")
@pytest.mark.parametrize("check", WITHOUT_DATA)
def test_scikit_learn_checks_without_data(check):
    classifier = probe()
    given = type(classifier) if check == "check_parameters_default_constructible" else classifier
    getattr(estimator_checks, check)("FewShotClassifier", classifier if given is not classifier else given)


@pytest.mark.skipif(not RECENT, reason="scikit-learn names these checks since 1.6")
def test_scikit_learn_checks_on_rows_drawn_as_pictures():
    results = estimator_checks.check_estimator(
        RowClassifier("linear-probe", "tiny", settings={"c": 10.0}),
        expected_failed_checks=NOT_RUN,
        on_skip=None,
        on_fail=None,
    )
    failed = {entry["check_name"]: entry["exception"] for entry in results if entry["status"] == "failed"}
    assert failed == {}
    passed = [entry for entry in results if entry["status"] == "passed"]
    assert len(passed) >= 50  # of 55 in scikit-learn 1.9
    assert {entry["check_name"] for entry in results if entry["status"] != "passed"} <= set(NOT_RUN)


# --- what is refused --------------------------------------------------------------------------------------------------


def folder_with(tmp_path, *names: str):
    for name in names:
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("X", "y", "says"),
    [
        (draw()[0], draw()[1][:5], "12 images, but 5 labels"),
        (draw()[0], ["oak"] * 12, "one class, 'oak'"),
        ([], [], "no images"),
        (draw()[0], None, "requires y to be passed"),
        (draw()[0][0], ["oak"] * 16, r"Write \[image\]"),
        (torch.zeros(3, 16, 16), ["oak"] * 3, r"\[n, 3, h, w\]"),
        (np.zeros((4, 5)), ["a", "b"] * 2, r"\[n, h, w, 3\]"),
        ("photo.png", ["oak"], "leave y out"),
        (Image.new("RGB", (8, 8)), ["oak"], r"\[image\]"),
        ([3, 4], ["a", "b"], "Image 0 is 3"),
        (object(), ["a", "b"], "not as object"),
        (draw()[0].astype(np.int64), draw()[1], "Image 0 has dtype int64"),
        (draw()[0].astype(np.float32), draw()[1], "Image 0 holds floats outside"),
        (draw()[0], [None, "b", "c"] * 4, "mix types"),
        (draw()[0], [1, "b", 2.5] * 4, "mix types"),
        (draw()[0], [0.5, 1.5, 2.5] * 4, "Unknown label type"),
        (draw()[0], np.zeros((12, 2)), "1d array"),
    ],
)
def test_bad_data_is_refused(X, y, says):
    with pytest.raises(ValueError, match=says):
        probe().fit(X, y)


def test_a_file_that_is_no_image_is_named(tmp_path, files):
    good = str(next(files.rglob("*.png")))
    (tmp_path / "notes.png").write_text("no picture")
    for bad, error in (("notes.png", DataError), ("absent.png", MissingPathError)):
        with pytest.raises(error, match=bad):
            probe().fit([good, str(tmp_path / bad)], ["a", "b"])


def test_folders_without_images_are_named(tmp_path):
    with pytest.raises(MissingPathError, match="nowhere"):
        probe().fit(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no folders in it"):
        probe().fit(tmp_path)
    with pytest.raises(DataError, match=r"cat holds no images"):
        probe().fit(folder_with(tmp_path, "cat", ".hidden"))


def test_too_few_images_for_validation():
    images, labels = draw(per_class=2)
    with pytest.raises(DataError, match="'oak' has 2 images and 2 are to be held out"):
        probe(validation=2).fit(images, labels)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"method": "tip-adaptor"}, "Did you mean 'tip-adapter'"),
        ({"settings": {"cc": 1}}, "unknown setting 'method.cc'"),
        ({"training": {"epochs": 3}}, "no effect on linear-probe"),
        ({"recipe": "coop/few-shot"}, "for coop, not for linear-probe"),
        ({"class_names": {"oka": "oak"}}, "'oka', which is no label"),
        ({"class_names": {"oak": "river"}}, "'river' occurs 2 times"),
        ({"templates": "a photo."}, "write exactly one"),
        ({"validation": -1}, "validation is -1"),
        ({"validation": 1.5}, "validation is 1.5"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": "one"}, "seed is 'one'"),
    ],
)
def test_bad_parameters_are_refused_in_fit_not_before(arguments, says):
    classifier = probe().set_params(**arguments)
    with pytest.raises((ConfigError, DataError, LookupError), match=says):
        classifier.fit(*draw())


def test_transductive_methods_see_all_images_at_once():
    """However small the batches in which images are encoded: `run` asks for a test set as a whole too."""
    images, labels = draw()
    answers = []
    for size in (5, 64):
        classifier = FewShotClassifier("transclip", batch_size=size).fit(images, labels)
        answers.append(classifier.predict_proba(draw(seed=1)[0]))
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-4, atol=1e-6)
