"""Metrics from logits and labels: accuracy from counts, per-class figures, calibration, and base-to-novel averages.

Everything is a fraction in [0, 1] (NLL and Brier excepted) and is computed in float64: a softmax in half precision of
logits near 100 would shift the calibration error visibly.

Source: protocols sheet, sections 0 (notation), 2 (base-to-novel) and 6 (calibration).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptkit.errors import DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DEFAULT_BINS = 15
"""Bins of the calibration errors; 10 and 20 are in use elsewhere, so reports name the number."""

TOP_K = 5

SMALLEST_PROBABILITY = 1e-12
"""A true class's probability counts as at least this in the NLL, so that one image can't make it infinite."""

_CHUNK_NUMBERS = 4_000_000  # logits turned to float64 at once: 32 MB, whatever the size of the test split


@dataclass(frozen=True)
class Metrics:
    """What one set of logits says about one labelled set of images.

    Args:
        num_classes: Candidates, K.
        total: Images.
        correct: Images whose largest logit is the right one (ties: the lowest index counts).
        top5_correct: Images whose label is among the five largest logits; None where there are fewer than five classes.
        per_class: (correct, total) of each class, in class order; total is 0 for classes without a test image.
        mean_per_class_accuracy: Mean of the classes' accuracies, over the classes that have test images.
        macro_f1: Mean F1 over the classes that have test images.
        ece: Expected calibration error, `bins` bins of equal width.
        adaptive_ece: The same with bins of equal counts.
        mce: Largest gap of the equal-width bins.
        classwise_ece: Mean over all classes of the one-against-rest calibration error.
        nll: Mean negative log-likelihood of the true class, in nats.
        brier: Mean squared distance between probabilities and the one-hot truth, summed over classes: in [0, 2].
        bins: Bins of the calibration errors.
    """

    num_classes: int
    total: int
    correct: int
    top5_correct: int | None
    per_class: tuple[tuple[int, int], ...]
    mean_per_class_accuracy: float
    macro_f1: float
    ece: float
    adaptive_ece: float
    mce: float
    classwise_ece: float
    nll: float
    brier: float
    bins: int = DEFAULT_BINS

    @property
    def accuracy(self) -> float:
        """Share of right first choices."""
        return self.correct / self.total

    @property
    def top5_accuracy(self) -> float | None:
        """Share of images whose label is among the five first choices; None with fewer than five classes."""
        return None if self.top5_correct is None else self.top5_correct / self.total

    def to_dict(self) -> dict[str, Any]:
        """The numbers that reports show, by name, ready for JSON (counts and `per_class` are kept elsewhere)."""
        names = ("mean_per_class_accuracy", "macro_f1", "ece", "adaptive_ece", "mce", "classwise_ece", "nll", "brier")
        return {
            "accuracy": self.accuracy,
            "top5_accuracy": self.top5_accuracy,
            **{name: getattr(self, name) for name in names},
            "calibration_bins": self.bins,
        }


def compute_metrics(logits: ArrayLike, labels: ArrayLike, num_classes: int, *, bins: int = DEFAULT_BINS) -> Metrics:
    """All metrics at once.

    Args:
        logits: [n, num_classes], any float type, before the softmax. The logarithm of probabilities does as well; a
            class that is ruled out has -inf.
        labels: Class index of each image, whole numbers [n].
        num_classes: Candidates; must be the logits' width.
        bins: Bins of the calibration errors.

    Raises:
        DataError: No images, shapes or labels that don't fit, or logits that aren't finite.

    Example:
        >>> metrics = compute_metrics([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]], [0, 1, 1], num_classes=2)
        >>> metrics.correct, metrics.total, round(metrics.accuracy, 3), metrics.per_class
        (2, 3, 0.667, ((1, 1), (1, 2)))
    """
    z, y = _check(logits, labels, num_classes)
    if bins < 1:
        raise DataError(f"bins is {bins}, but calibration errors need at least 1.")
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    classwise = _ClasswiseBins(num_classes, bins)
    confidence, hits, true_log_p, squares, ranks = _rows(z, y, confusion, classwise)
    per_class = _per_class(confusion)
    gaps, counts = _bin_gaps(confidence, hits, _equal_width_edges(bins))
    return Metrics(
        num_classes=num_classes,
        total=len(y),
        correct=int(hits.sum()),
        top5_correct=int((ranks < TOP_K).sum()) if num_classes >= TOP_K else None,
        per_class=per_class,
        mean_per_class_accuracy=mean_per_class_accuracy(per_class),
        macro_f1=macro_f1(confusion),
        ece=float((gaps * counts).sum() / len(y)),
        adaptive_ece=adaptive_calibration_error(confidence, hits, bins),
        mce=float(gaps.max()),
        classwise_ece=classwise.error(len(y)),
        nll=float(-np.maximum(true_log_p, np.log(SMALLEST_PROBABILITY)).mean()),
        brier=float(squares.mean()),
        bins=bins,
    )


def _check(logits: ArrayLike, labels: ArrayLike, num_classes: int) -> tuple[NDArray[Any], Ints]:
    z, y = np.asarray(logits), np.asarray(labels)
    if z.ndim != 2 or z.shape[1] != num_classes or num_classes < 1:
        raise DataError(f"Logits have shape {list(z.shape)}, but [images, {num_classes}] is needed.")
    if y.shape != (len(z),) or (len(y) and not np.issubdtype(y.dtype, np.integer)):
        raise DataError(
            f"Labels must be {len(z)} whole numbers, one per row of logits; given: {y.dtype}{list(y.shape)}."
        )
    if not len(z):
        raise DataError("There are no images to compute metrics on.")
    if int(y.min()) < 0 or int(y.max()) >= num_classes:
        raise DataError(
            f"Labels run from {int(y.min())} to {int(y.max())}, but with {num_classes} classes they must lie in"
            f" 0 … {num_classes - 1}."
        )
    highest = z.max(axis=1)  # NaN where the row holds one; -inf where every class is ruled out
    wrong = np.flatnonzero(~np.isfinite(highest))
    if len(wrong):
        raise DataError(f"The logits of {len(wrong)} images (the first is number {wrong[0]}) aren't finite.")
    return z, y.astype(np.int64)


def _row_slices(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _CHUNK_NUMBERS // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def log_softmax(logits: ArrayLike) -> Floats:
    """Logarithm of the probabilities, float64 [n, classes]."""
    z = np.asarray(logits, dtype=np.float64)
    z = z - z.max(axis=1, keepdims=True)
    log_p: Floats = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    return log_p


def _rows(
    z: NDArray[Any], y: Ints, confusion: Ints, classwise: _ClasswiseBins
) -> tuple[Floats, NDArray[np.bool_], Floats, Floats, Ints]:
    """Per image [n]: confidence, hit, log-probability and rank of the true class, squared distance to the truth.

    `confusion` [true, predicted] and `classwise` are filled on the way, since they need whole rows of probabilities.
    """
    parts = []
    for rows in _row_slices(*z.shape):
        log_p, labels = log_softmax(z[rows]), y[rows]
        image = np.arange(len(labels))
        p = np.exp(log_p)
        predicted = log_p.argmax(axis=1)  # the first of equals
        true_p = p[image, labels]
        np.add.at(confusion, (labels, predicted), 1)
        classwise.add(p, labels)
        squares = (p**2).sum(axis=1) - 2 * true_p + 1
        parts.append(
            (p[image, predicted], predicted == labels, log_p[image, labels], squares, _true_ranks(log_p, labels))
        )
    confidence, hits, true_log_p, squares, ranks = (np.concatenate(kind) for kind in zip(*parts, strict=True))
    return confidence, hits, true_log_p, squares, ranks


def _true_ranks(scores: Floats, labels: Ints) -> Ints:
    """How many classes come before the true one; of equal scores the lower index comes first, as in argmax."""
    own = scores[np.arange(len(labels)), labels][:, None]
    before = np.arange(scores.shape[1]) < labels[:, None]
    ranks: Ints = ((scores > own) | ((scores == own) & before)).sum(axis=1)
    return ranks


def _per_class(confusion: Ints) -> tuple[tuple[int, int], ...]:
    return tuple(zip(np.diag(confusion).tolist(), confusion.sum(axis=1).tolist(), strict=True))


def mean_per_class_accuracy(per_class: Sequence[tuple[int, int]]) -> float:
    """Mean of the classes' accuracies over the classes that occur, from (correct, total) of each class."""
    occurring = [correct / total for correct, total in per_class if total]
    if not occurring:
        raise DataError("No class has a test image, so there is no mean per-class accuracy.")
    return float(np.mean(occurring))


def macro_f1(confusion: Ints) -> float:
    """Mean F1 over the labels that occur, from counts [true, predicted]."""
    right, true, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    present = true > 0
    return float((2 * right[present] / (true + predicted)[present]).mean())


# --- calibration ------------------------------------------------------------------------------------------------------


def _equal_width_edges(bins: int) -> Floats:
    """Inner edges 1/bins … (bins - 1)/bins; a bin owns its upper edge, and the first one owns 0 too."""
    return np.arange(1, bins, dtype=np.float64) / bins


def _bin_gaps(confidence: Floats, hits: NDArray[np.bool_], edges: Floats) -> tuple[Floats, Ints]:
    """|mean hit - mean confidence| and image count of each bin, [bins]; the gap of an empty bin is 0."""
    bins = len(edges) + 1
    place = np.searchsorted(edges, confidence, side="left")  # number of edges below: right-closed bins
    counts = np.bincount(place, minlength=bins)
    difference = np.bincount(place, weights=hits - confidence, minlength=bins)
    return np.abs(difference) / np.maximum(counts, 1), counts.astype(np.int64)


def calibration_error(confidence: ArrayLike, hits: ArrayLike, bins: int = DEFAULT_BINS) -> float:
    """Expected calibration error (ECE) with bins of equal width, ((m - 1)/bins, m/bins].

    Args:
        confidence: Probability of the first choice, [n].
        hits: Whether it is right, [n].
        bins: How many bins.

    Example:
        >>> round(calibration_error([0.9, 0.9, 0.6, 0.6], [True, True, True, False], bins=10), 6)
        0.1
    """
    conf, hit = _pairs(confidence, hits)
    gaps, counts = _bin_gaps(conf, hit, _equal_width_edges(bins))
    return float((gaps * counts).sum() / len(conf))


def maximum_calibration_error(confidence: ArrayLike, hits: ArrayLike, bins: int = DEFAULT_BINS) -> float:
    """Largest gap among the non-empty equal-width bins (MCE); arguments as in `calibration_error`."""
    conf, hit = _pairs(confidence, hits)
    return float(_bin_gaps(conf, hit, _equal_width_edges(bins))[0].max())


def adaptive_calibration_error(confidence: ArrayLike, hits: ArrayLike, bins: int = DEFAULT_BINS) -> float:
    """ECE with bins of equal counts; equal confidences share a bin, so that the order of images doesn't matter."""
    conf, hit = _pairs(confidence, hits)
    last = np.ceil(len(conf) * np.arange(1, bins) / bins).astype(np.int64) - 1  # last image of each bin but one
    gaps, counts = _bin_gaps(conf, hit, np.sort(conf)[last])
    return float((gaps * counts).sum() / len(conf))


def _pairs(confidence: ArrayLike, hits: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    conf, hit = np.asarray(confidence, dtype=np.float64), np.asarray(hits, dtype=np.bool_)
    if conf.ndim != 1 or conf.shape != hit.shape or not len(conf):
        raise DataError(f"Confidences {list(conf.shape)} and hits {list(hit.shape)} must be two lists of equal length.")
    if not bool(((conf >= 0) & (conf <= 1 + 1e-9)).all()):  # sums of probabilities may round to just above 1
        raise DataError("Confidences must be probabilities between 0 and 1.")
    return conf, hit


class _ClasswiseBins:
    """One-against-rest calibration of every class, gathered chunk by chunk: [classes, bins] of truth minus probability.

    Counts aren't needed: a bin's share of images times its mean gap is its summed gap over n.
    """

    def __init__(self, classes: int, bins: int) -> None:
        self._edges = _equal_width_edges(bins)
        self._gaps = np.zeros(classes * bins)
        self._classes, self._bins = classes, bins

    def add(self, p: Floats, labels: Ints) -> None:
        """Count probabilities [n, classes]."""
        place = np.searchsorted(self._edges, p, side="left") + self._bins * np.arange(self._classes)
        gap = -p
        gap[np.arange(len(labels)), labels] += 1
        self._gaps += np.bincount(place.ravel(), weights=gap.ravel(), minlength=len(self._gaps))

    def error(self, images: int) -> float:
        """Mean over classes."""
        return float(np.abs(self._gaps).sum() / (images * self._classes))


# --- base-to-novel ----------------------------------------------------------------------------------------------------


def harmonic_mean(base: float, novel: float) -> float:
    """H = 2 · base · novel / (base + novel); 0 where both are 0. Fractions or percentages alike.

    Raises:
        DataError: A value is negative or not finite.

    Example:
        >>> round(harmonic_mean(69.34, 74.22), 2)
        71.7
    """
    if not (0 <= base < np.inf and 0 <= novel < np.inf):
        raise DataError(f"H needs accuracies that are 0 or more; base is {base}, novel is {novel}.")
    return 0.0 if base + novel == 0 else 2 * base * novel / (base + novel)


@dataclass(frozen=True)
class BaseToNovel:
    """Base and novel accuracy averaged over seeds or datasets, with both averages of H that are in use.

    Args:
        base: Mean base accuracy.
        novel: Mean novel accuracy.
        h_of_means: H of those two means: what papers print, over seeds as well as over datasets.
        mean_of_h: Mean of the single H values: another number, mostly a little lower; never the published one.
        count: How many pairs were averaged.
    """

    base: float
    novel: float
    h_of_means: float
    mean_of_h: float
    count: int

    def labelled(self) -> dict[str, float]:
        """Both averages under names that can't be mistaken."""
        return {"H of means": self.h_of_means, "mean of H": self.mean_of_h}


def average_base_to_novel(pairs: Sequence[tuple[float, float]]) -> BaseToNovel:
    """Average (base, novel) accuracies over seeds, or the seed means over datasets.

    Source: protocols sheet, section 2, points 5 and 6.

    Example:
        >>> average_base_to_novel([(0.8, 0.6), (0.6, 0.8)]).labelled()
        {'H of means': 0.7, 'mean of H': 0.6857142857142857}
    """
    if not len(pairs):
        raise DataError("There are no base and novel accuracies to average.")
    base, novel = (float(np.mean(values)) for values in zip(*pairs, strict=True))
    singles = [harmonic_mean(*pair) for pair in pairs]
    return BaseToNovel(base, novel, harmonic_mean(base, novel), float(np.mean(singles)), len(pairs))
