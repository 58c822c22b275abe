"""`FewShotClassifier.calibrate`, prediction sets, abstaining, and scikit-learn's pipelines around it."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer

from adaptkit import FewShotClassifier, load
from adaptkit.commands.main import main
from adaptkit.errors import AdapterError, ConfigError, DataError, UnsupportedError
from adaptkit.evaluation.calibration import CalibrationWarning

COLOURS = {"blue": (40, 60, 200), "green": (40, 170, 60), "red": (200, 60, 40)}


def draw(per_class, seed, spread=90):
    numbers = np.random.default_rng(seed)
    labels = np.repeat(list(COLOURS), per_class)
    colours = np.array([COLOURS[label] for label in labels])[:, None, None]
    noise = numbers.normal(0, spread, (len(labels), 1, 1, 3)) + numbers.normal(0, 20, (len(labels), 36, 36, 3))
    return np.clip(colours + noise, 0, 255).astype(np.uint8), labels


def probe(**settings):
    return FewShotClassifier("linear-probe", settings={"search": False, **settings})


@pytest.fixture(scope="module")
def calibrated():
    return probe().fit(*draw(4, 0)).calibrate(*draw(40, 1))


def test_probabilities_and_sets(calibrated):
    images, labels = draw(50, 2)
    fresh = probe().fit(*draw(4, 0))
    assert fresh.calibration_ is None
    assert (fresh.predict(images) == calibrated.predict(images)).all()
    truth = np.array([list(calibrated.classes_).index(label) for label in labels])

    def loss(one):
        return -np.log(one.predict_proba(images)[np.arange(150), truth]).mean()

    assert loss(calibrated) < loss(fresh)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        sets = calibrated.predict_sets(images, coverage=0.9)
        wide = calibrated.predict_sets(images, coverage=0.99)
    assert 0.82 <= np.mean([label in one for label, one in zip(labels, sets, strict=True)]) <= 1
    assert [one[0] for one in sets] == calibrated.predict(images).tolist()
    assert all(set(small) <= set(large) for small, large in zip(sets, wide, strict=True))
    assert sum(map(len, wide)) > sum(map(len, sets))


def test_abstaining(calibrated):
    images, _ = draw(20, 3)
    answers, odds = calibrated.predict(images, abstain_below=0.9), calibrated.predict_proba(images).max(axis=1)
    assert [answer is None for answer in answers] == (odds < 0.9).tolist()
    assert 0 < sum(answer is None for answer in answers) < len(answers)
    with pytest.raises(ConfigError, match="abstain_below is 2"):
        calibrated.predict(images, abstain_below=2)


def test_too_few_images_are_said_so():
    made = probe().fit(*draw(4, 0))
    with pytest.warns(CalibrationWarning, match="9 held-out images say little"):
        made.calibrate(*draw(3, 1))
    with pytest.warns(CalibrationWarning, match="hold out at least 19"):
        sets = made.predict_sets(draw(1, 2)[0], coverage=0.95)
    assert [len(one) for one in sets] == [3, 3, 3]


def test_it_is_saved_and_a_new_fit_forgets_it(calibrated, tmp_path):
    folder = calibrated.save(tmp_path / "saved")
    images, _ = draw(5, 4)
    np.testing.assert_allclose(load(folder).predict_proba(images), calibrated.predict_proba(images))
    again = load(folder)
    again.fit(*draw(4, 0))
    assert again.calibration_ is None
    config = json.loads((folder / "adapter_config.json").read_text())
    config["facts"]["classifier"]["calibration"]["temperature"] = -1
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="The calibration in"):
        load(folder)


def test_what_is_refused(calibrated):
    images, labels = draw(2, 5)
    made = probe().fit(images, labels)
    with pytest.raises(ConfigError, match="call calibrate"):
        made.predict_sets(images)
    with pytest.raises(ConfigError, match=r"coverage is 1\.5"):
        calibrated.predict_sets(images, coverage=1.5)
    with pytest.raises(DataError, match="'yellow' isn't among those of the fit: 'blue'"):
        made.calibrate(images, ["yellow"] * len(images))
    with pytest.raises(DataError, match="labels"):
        made.calibrate(images, labels[:-1])
    assert made.calibration_ is None
    transductive = FewShotClassifier("em-dirichlet").fit(images, labels)
    with pytest.raises(UnsupportedError, match="em-dirichlet can't be calibrated"):
        transductive.calibrate(images, labels)


def test_in_a_pipeline():
    """Images cut by a step before it, settings searched through the pipeline, and cross-validation of the whole."""
    images, labels = draw(6, 6, spread=10)
    pipeline = Pipeline([("cut", FunctionTransformer(lambda X: X[:, 2:-2, 2:-2])), ("classify", probe())])
    assert cross_val_score(pipeline, images, labels, cv=2).tolist() == [1.0, 1.0]
    grid = {"classify__settings": [{"search": False, "c": c} for c in (0.1, 1.0)], "classify__method": ["linear-probe"]}
    search = GridSearchCV(pipeline, grid, cv=2).fit(images, labels)
    assert len(search.cv_results_["params"]) == 2
    assert search.score(images, labels) == 1
    answers = search.best_estimator_.predict(images, abstain_below=0.5)
    assert len(answers) == len(images)


def test_the_command(calibrated, tmp_path):
    calibrated.save(tmp_path / "saved")
    Image.fromarray(draw(1, 7)[0][0]).save(tmp_path / "1.png")

    def call(*words):
        return CliRunner().invoke(main, ["predict", *(str(word) for word in words)])

    outcome = call(tmp_path / "saved", tmp_path / "1.png", "--coverage", 0.99, "--abstain-below", 0.999, "--json")
    assert outcome.exit_code == 0, outcome.output
    answer = json.loads(outcome.stdout)["predictions"][0]
    assert answer["abstains"] in (True, False)
    assert 1 <= len(answer["classes"]) <= 3
    outcome = call(tmp_path / "saved", tmp_path / "1.png", "--abstain-below", 0.999999)
    assert outcome.exit_code == 0, outcome.output
    assert "not sure" in outcome.output
    probe().fit(*draw(4, 0)).save(tmp_path / "plain")
    for words, message in (
        ((tmp_path / "plain", tmp_path / "1.png", "--coverage", 0.9), "needs a classifier that was calibrated"),
        ((tmp_path / "saved", tmp_path / "1.png", "--coverage", 9), "--coverage is 9.0"),
        ((tmp_path / "saved", tmp_path / "1.png", "--abstain-below", 0), "--abstain-below is 0.0"),
    ):
        outcome = call(*words)
        assert outcome.exit_code == 2
        assert message in outcome.output
