"""What holds for the metrics of any logits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.evaluation.metrics import average_base_to_novel, compute_metrics, harmonic_mean

SAME = {"rel": 1e-9, "abs": 1e-11}


@st.composite
def scored_images(draw):
    """Logits [n, k] of every scale (also ties), and labels [n]."""
    n, k = draw(st.integers(1, 40)), draw(st.integers(1, 9))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = numbers.normal(size=(n, k)) * draw(st.sampled_from([0.0, 0.1, 3.0, 100.0]))
    return np.round(logits, draw(st.sampled_from([0, 1, 12]))), numbers.integers(0, k, n)


@settings(max_examples=80, deadline=None)
@given(scored_images())
def test_ranges_and_counts(case):
    logits, labels = case
    k = logits.shape[1]
    result = compute_metrics(logits, labels, k)
    for name in ("accuracy", "mean_per_class_accuracy", "macro_f1", "ece", "adaptive_ece", "mce", "classwise_ece"):
        assert -1e-12 <= getattr(result, name) <= 1 + 1e-12, name
    assert 0 <= result.brier <= 2 + 1e-12
    assert result.nll >= 0
    assert result.ece <= result.mce + 1e-12
    assert tuple(map(sum, zip(*result.per_class, strict=True))) == (result.correct, result.total)
    if k >= 5:
        assert result.correct <= result.top5_correct <= result.total
    if k == 5:
        assert result.top5_accuracy == 1.0


@settings(max_examples=60, deadline=None)
@given(scored_images(), st.randoms(use_true_random=False), st.floats(-50, 50))
def test_order_of_images_and_shifts_of_logits_change_nothing(case, random, shift):
    logits, labels = case
    order = list(range(len(labels)))
    random.shuffle(order)
    before = compute_metrics(logits, labels, logits.shape[1])
    after = compute_metrics(logits[order] + round(shift), labels[order], logits.shape[1])
    assert after.per_class == before.per_class
    for name, value in before.to_dict().items():
        if (
            value is not None and not name.endswith("ece") and name != "mce"
        ):  # rounding can move an image across an edge
            assert after.to_dict()[name] == pytest.approx(value, **SAME), name


@settings(max_examples=60, deadline=None)
@given(scored_images(), st.randoms(use_true_random=False))
def test_renaming_classes_changes_nothing(case, random):
    logits, labels = case
    k = logits.shape[1]
    order = list(range(k))
    random.shuffle(order)
    logits = logits + 1e-4 * np.arange(k)  # no ties: those are decided by the class order on purpose
    before = compute_metrics(logits, labels, k)
    after = compute_metrics(logits[:, order], np.argsort(order)[labels], k)
    assert [after.per_class[order.index(c)] for c in range(k)] == list(before.per_class)
    for name in ("mean_per_class_accuracy", "macro_f1", "nll", "brier", "classwise_ece"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), rel=1e-7, abs=1e-9), name


@settings(max_examples=60, deadline=None)
@given(scored_images())
def test_certain_and_right_is_perfect(case):
    logits, labels = case
    sure = np.full(logits.shape, -1e4)
    sure[np.arange(len(labels)), labels] = 0
    result = compute_metrics(sure, labels, logits.shape[1])
    assert result.accuracy == result.macro_f1 == result.mean_per_class_accuracy == 1.0
    assert (result.ece, result.mce, result.nll, result.brier) == pytest.approx((0, 0, 0, 0), abs=1e-12)


shares = st.floats(0, 1)


@given(st.lists(st.tuples(shares, shares), min_size=1, max_size=12))
def test_harmonic_means_lie_where_they_must(pairs):
    average = average_base_to_novel(pairs)
    assert average.mean_of_h <= average.h_of_means + 1e-12  # H is concave: the mean of H never exceeds H of the means
    for base, novel in pairs:
        h = harmonic_mean(base, novel)
        assert min(base, novel) - 1e-12 <= h <= (base + novel) / 2 + 1e-12
        assert h == harmonic_mean(novel, base)
