"""Metrics against hand-worked cases, scikit-learn and the field's published tables."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from adaptkit.errors import DataError
from adaptkit.evaluation.metrics import (
    BaseToNovel,
    adaptive_calibration_error,
    average_base_to_novel,
    calibration_error,
    compute_metrics,
    harmonic_mean,
    log_softmax,
    maximum_calibration_error,
    mean_per_class_accuracy,
)

# protocols sheet, section 2: method, B, N, published H of the two means
PUBLISHED = [
    ("CLIP", 69.34, 74.22, 71.70),
    ("CoOp", 82.69, 63.22, 71.66),
    ("CoCoOp", 80.47, 71.69, 75.83),
    ("KgCoOp", 80.73, 73.60, 77.00),
    ("MaPLe", 82.28, 75.14, 78.55),
    ("PromptSRC", 84.26, 76.10, 79.97),
    ("MMRL", 85.68, 77.16, 81.20),
]
# protocol-training sheet, section 10, and the coop sheet: base and novel accuracy on the 11 datasets
CLIP_BASE = [72.43, 96.84, 91.17, 63.37, 72.08, 90.10, 27.19, 69.36, 53.24, 56.48, 70.53]
CLIP_NOVEL = [68.14, 94.00, 97.26, 74.89, 77.80, 91.22, 36.29, 75.35, 59.90, 64.05, 77.50]
COOP_BASE = [76.47, 98.00, 93.67, 78.12, 97.60, 88.33, 40.44, 80.60, 79.44, 92.19, 84.69]
COOP_NOVEL = [67.88, 89.81, 95.29, 60.40, 59.67, 82.26, 22.30, 65.89, 41.18, 54.74, 56.05]


@pytest.fixture(scope="module")
def case() -> tuple[np.ndarray, np.ndarray]:
    """Logits of 400 images and 7 classes, of which class 6 never occurs."""
    numbers = np.random.default_rng(0)
    labels = numbers.integers(0, 6, 400)
    logits = numbers.normal(size=(400, 7)) * 2
    logits[np.arange(400), labels] += 1.5
    return logits, labels


def probabilities(logits: np.ndarray) -> np.ndarray:
    return np.exp(log_softmax(logits))


def test_counts_agree_with_scikit_learn(case):
    logits, labels = case
    ours, first = compute_metrics(logits, labels, 7), logits.argmax(axis=1)
    assert ours.accuracy == sk.accuracy_score(labels, first)
    assert (ours.correct, ours.total) == (int((first == labels).sum()), 400)
    assert ours.mean_per_class_accuracy == pytest.approx(
        sk.recall_score(labels, first, average="macro", labels=np.unique(labels)), abs=1e-14
    )
    wanted = sk.f1_score(labels, first, average="macro", labels=np.unique(labels), zero_division=0)
    assert ours.macro_f1 == pytest.approx(wanted, abs=1e-14)
    assert ours.top5_accuracy == pytest.approx(sk.top_k_accuracy_score(labels, logits, k=5, labels=range(7)))


def test_likelihood_and_brier_agree_with_scikit_learn(case):
    logits, labels = case
    ours, p = compute_metrics(logits, labels, 7), probabilities(logits)
    assert ours.nll == pytest.approx(sk.log_loss(labels, p, labels=range(7)), abs=1e-12)
    one_against_rest = sum(sk.brier_score_loss(labels == c, p[:, c], pos_label=True) for c in range(7))
    assert ours.brier == pytest.approx(one_against_rest, abs=1e-12)


def test_calibration_agrees_with_a_plain_loop(case):
    logits, labels = case
    ours, p = compute_metrics(logits, labels, 7), probabilities(logits)
    confidence, hits = p.max(axis=1), p.argmax(axis=1) == labels

    def plain(conf: np.ndarray, hit: np.ndarray) -> tuple[float, float]:
        total, worst = 0.0, 0.0
        for m in range(1, 16):
            inside = (conf > (m - 1) / 15) & (conf <= m / 15)
            if inside.any():
                gap = abs(hit[inside].mean() - conf[inside].mean())
                total, worst = total + inside.mean() * gap, max(worst, gap)
        return total, worst

    assert (ours.ece, ours.mce) == pytest.approx(plain(confidence, hits), abs=1e-12)
    assert ours.ece == calibration_error(confidence, hits)
    assert ours.mce == maximum_calibration_error(confidence, hits)
    classwise = np.mean([plain(p[:, c], labels == c)[0] for c in range(7)])
    assert ours.classwise_ece == pytest.approx(classwise, abs=1e-12)


def test_adaptive_bins_hold_equal_counts():
    confidence = np.linspace(0.2, 0.9, 40)
    hits = np.arange(40) % 3 == 0
    order = np.random.default_rng(1).permutation(40)
    parts = np.split(np.arange(40), 4)
    wanted = np.mean([abs(hits[part].mean() - confidence[part].mean()) for part in parts])
    assert adaptive_calibration_error(confidence, hits, bins=4) == pytest.approx(wanted, abs=1e-12)
    assert adaptive_calibration_error(confidence[order], hits[order], bins=4) == pytest.approx(wanted, abs=1e-12)


def test_adaptive_bins_keep_equal_confidences_together():
    hits = np.array([True, False] * 10)
    wanted = abs(0.5 - 0.7)
    assert adaptive_calibration_error(np.full(20, 0.7), hits, bins=15) == pytest.approx(wanted, abs=1e-12)
    assert adaptive_calibration_error(np.full(20, 0.7), np.sort(hits), bins=15) == pytest.approx(wanted, abs=1e-12)


def test_fewer_images_than_bins_is_fine():
    assert adaptive_calibration_error([0.6, 0.8], [True, False], bins=15) == pytest.approx((0.4 + 0.8) / 2)


@pytest.mark.parametrize("edge", range(1, 15))
def test_a_bin_owns_its_upper_edge(edge: int):
    """Confidence edge/15 shares a bin with what lies just below, so right and wrong cancel; just above it doesn't."""
    on, below, above = edge / 15, edge / 15 - 1e-3, edge / 15 + 1e-3
    together = abs(1 - (on + below)) / 2
    apart = ((1 - on) + above) / 2
    assert calibration_error([on, below], [True, False]) == pytest.approx(together, abs=1e-12)
    assert calibration_error([on, above], [True, False]) == pytest.approx(apart, abs=1e-12)


def test_confidence_zero_goes_to_the_first_bin():
    assert calibration_error([0.0, 0.05], [True, False]) == pytest.approx((1 - 0.05) / 2)


def test_ties_count_for_the_lowest_index():
    result = compute_metrics(np.zeros((6, 6)), np.arange(6), 6)
    assert result.per_class == ((1, 1), *[(0, 1)] * 5)
    assert result.top5_correct == 5


def test_top5_is_undefined_below_five_classes():
    few = compute_metrics(np.eye(4), np.arange(4), 4)
    assert few.top5_correct is None
    assert few.top5_accuracy is None
    assert compute_metrics(np.eye(5), np.arange(5), 5).top5_accuracy == 1.0


def test_classes_without_images_count_for_nothing():
    # class 1 has no image but is predicted once: it must not enter the mean, and must not divide by zero
    result = compute_metrics([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 1.0]], [0, 0, 2], 3)
    assert result.per_class == ((1, 2), (0, 0), (1, 1))
    assert result.mean_per_class_accuracy == 0.75
    assert result.macro_f1 == pytest.approx((2 / 3 + 1) / 2)


def test_a_ruled_out_class_and_a_hopeless_image():
    result = compute_metrics([[0.0, -np.inf], [0.0, -np.inf]], [0, 1], 2)
    assert result.nll == pytest.approx(-np.log(1e-12) / 2)  # clamped, not infinite
    assert result.brier == pytest.approx(1.0)


def test_logarithms_of_probabilities_are_logits(case):
    logits, labels = case
    first, second = (compute_metrics(z, labels, 7) for z in (logits, np.log(probabilities(logits))))
    for name, value in first.to_dict().items():
        assert second.to_dict()[name] == pytest.approx(value, abs=1e-12), name


def test_chunks_change_nothing(case, monkeypatch):
    logits, labels = case
    whole = compute_metrics(logits, labels, 7)
    monkeypatch.setattr("adaptkit.evaluation.metrics._CHUNK_NUMBERS", 7 * 33)
    parts = compute_metrics(logits, labels, 7)
    assert parts.per_class == whole.per_class
    for name, value in whole.to_dict().items():
        assert parts.to_dict()[name] == pytest.approx(value, abs=1e-13), name


def test_half_precision_logits_are_computed_in_full():
    logits = np.array([[100.0, 99.0], [60000.0, 0.0]], dtype=np.float16)
    assert compute_metrics(logits, [0, 0], 2).nll == pytest.approx(np.log1p(np.exp(-1)) / 2, abs=1e-12)


@pytest.mark.parametrize(
    ("logits", "labels", "classes", "says"),
    [
        (np.zeros((2, 3)), [0, 1], 4, r"\[2, 3\].*\[images, 4\]"),
        (np.zeros(3), [0, 1, 2], 3, "shape"),
        (np.zeros((2, 3)), [0], 3, "one per row"),
        (np.zeros((2, 3)), [0.0, 1.0], 3, "whole numbers"),
        (np.zeros((0, 3)), [], 3, "no images"),
        (np.zeros((2, 3)), [0, 3], 3, r"0 … 2"),
        (np.zeros((2, 3)), [-1, 0], 3, r"0 … 2"),
        ([[0.0, 1.0], [np.nan, 0.0]], [0, 1], 2, "number 1"),
        ([[np.inf, 1.0]], [0], 2, "finite"),
        ([[-np.inf, -np.inf]], [0], 2, "finite"),
    ],
)
def test_what_cannot_be_measured_is_refused(logits, labels, classes, says):
    with pytest.raises(DataError, match=says):
        compute_metrics(logits, labels, classes)


@pytest.mark.parametrize(
    ("confidence", "hits", "says"),
    [([], [], "equal length"), ([0.5], [True, False], "equal length"), ([1.2], [True], "between 0 and 1")],
)
def test_calibration_refuses_what_is_no_probability(confidence, hits, says):
    with pytest.raises(DataError, match=says):
        calibration_error(confidence, hits)


def test_mean_per_class_accuracy_needs_an_image():
    with pytest.raises(DataError, match="test image"):
        mean_per_class_accuracy([(0, 0)])


@pytest.mark.parametrize(("method", "base", "novel", "published"), PUBLISHED)
def test_h_of_means_is_the_published_one(method, base, novel, published):
    assert harmonic_mean(base, novel) == pytest.approx(published, abs=0.005 + 1e-9), method


@pytest.mark.parametrize(
    ("base", "novel", "h_of_means", "mean_of_h"),
    [(CLIP_BASE, CLIP_NOVEL, 71.70, 71.59), (COOP_BASE, COOP_NOVEL, 71.66, 70.83)],
)
def test_both_averages_over_the_11_datasets(base, novel, h_of_means, mean_of_h):
    average = average_base_to_novel(list(zip(base, novel, strict=True)))
    assert average.count == 11
    assert average.labelled() == pytest.approx({"H of means": h_of_means, "mean of H": mean_of_h}, abs=0.011)
    assert abs(average.h_of_means - average.mean_of_h) > 0.05  # which of the two is meant does matter


def test_h_of_one_run_is_its_own():
    assert average_base_to_novel([(0.5, 0.25)]) == BaseToNovel(0.5, 0.25, 1 / 3, 1 / 3, 1)


def test_h_of_nothing():
    assert harmonic_mean(0, 0) == 0.0
    for bad in ((-0.1, 0.5), (0.5, float("nan")), (float("inf"), 0.5)):
        with pytest.raises(DataError, match="0 or more"):
            harmonic_mean(*bad)
    with pytest.raises(DataError, match="no base and novel"):
        average_base_to_novel([])
