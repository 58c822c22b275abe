"""Which differences between methods are more than chance: paired tests on the same images, and over datasets.

- One accuracy, one run: McNemar's test, exact, with the mid-p correction, on the images that exactly one of the two
  methods gets right.
- A number made of several accuracies (H, an average over targets): a paired bootstrap over the images, part by part.
- Several seeds: their p-values aren't independent, since the test images are the same; twice their median is valid
  whatever the dependence. A seed in which the order is the other way round counts with p = 1.
- Several methods against the best: Holm's correction.
- An average over datasets: a bootstrap over the datasets, from `FEWEST_DATASETS` on.

Source: McNemar 1947; Fagerland, Lydersen & Laake 2013 (mid-p); Vovk & Wang 2020 (averaging p-values); Holm 1979.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaptkit.errors import DataError
from adaptkit.evaluation.results import SOURCE, Predictions
from adaptkit.sweeps.report.aggregate import (
    ACCURACY,
    MEAN_OF_H,
    TARGET_AVERAGE,
    ZERO_SHOT,
    Average,
    Cell,
    Group,
    H,
    Report,
)
from adaptkit.sweeps.report.predictions import PredictionReader
from adaptkit.sweeps.results import RunRecord
from adaptkit.types import ProgressCallback

LEVEL = 0.05
"""Differences with a corrected p-value above this are ties."""

FEWEST_DATASETS = 6
"""With fewer, even a difference of the same sign on all datasets has p > 0.03 by a sign test: nothing is claimed."""

DRAWS = 20_000
"""So that the smallest p-value, about 0.0001, stays below the level when 100 methods are compared."""

_SEED = 0

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """A method against the best one, for one measure.

    Args:
        difference: The best's value minus this method's, as fractions.
        p: Corrected p-value of "there is no difference"; None where it couldn't be tested.
        runs: Pairs of runs, or datasets, that were compared.
    """

    difference: float
    p: float | None
    runs: int

    @property
    def tie(self) -> bool:
        """Whether the two can't be told apart."""
        return self.p is not None and self.p > LEVEL


# --- single tests -----------------------------------------------------------------------------------------------------


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided mid-p value of McNemar's exact test.

    Args:
        only_first: Images that the first method alone gets right.
        only_second: Images that the second method alone gets right.

    Example:
        >>> round(mcnemar(10, 2), 4)
        0.0225
    """
    from scipy.stats import binom, binomtest  # type: ignore[import-untyped]

    n = only_first + only_second
    if n == 0:
        return 1.0
    exact = float(binomtest(only_first, n, 0.5).pvalue)
    return min(1.0, exact - float(binom.pmf(only_first, n, 0.5))) if only_first != only_second else 1.0


def paired_counts(first: Predictions, second: Predictions) -> Counts | None:
    """Images by (both right, only the first, only the second, none), int64 [4]; None where the images differ."""
    if not (np.array_equal(first.index, second.index) and np.array_equal(first.labels, second.labels)):
        return None
    a, b = first.predicted == first.labels, second.predicted == second.labels
    return np.array([(a & b).sum(), (a & ~b).sum(), (~a & b).sum(), (~a & ~b).sum()], dtype=np.int64)


def bootstrap_images(
    parts: Sequence[Counts], combine: Callable[[Sequence[Floats]], Floats], seed: int = _SEED
) -> float:
    """Two-sided p-value of a difference in a number made of several accuracies, by redrawing each part's images.

    Args:
        parts: From `paired_counts`, one per part.
        combine: The number from the parts' accuracies [draws].
    """
    numbers = np.random.default_rng(_SEED)
    first, second = [], []
    for counts in parts:
        total = int(counts.sum())
        drawn = numbers.multinomial(total, counts / total, size=DRAWS)
        first.append((drawn[:, 0] + drawn[:, 1]) / total)
        second.append((drawn[:, 0] + drawn[:, 2]) / total)
    return _two_sided(combine(first) - combine(second))


def bootstrap_datasets(differences: Sequence[float]) -> float | None:
    """Two-sided p-value of a mean difference over datasets, by redrawing the datasets; None with too few of them."""
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < FEWEST_DATASETS:
        return None
    drawn = np.random.default_rng(_SEED).integers(0, len(values), (DRAWS, len(values)))
    return _two_sided(values[drawn].mean(axis=1))


def _two_sided(differences: Floats) -> float:
    """Twice the smaller share of draws on one side of zero; draws of exactly zero count half on each side.

    One draw is added, so that no p-value is zero.
    """
    even = np.abs(differences) < 1e-12
    below = float((even / 2 + (~even & (differences < 0))).sum())
    smaller = min(below, len(differences) - below)
    return min(1.0, 2 * (smaller + 1) / (len(differences) + 1))


def combine_seeds(p_values: Sequence[float]) -> float:
    """One p-value out of those of several seeds on the same images: twice the (upper) median.

    Example:
        >>> combine_seeds([0.01]), combine_seeds([0.01, 0.02, 0.6])
        (0.01, 0.04)
    """
    if not p_values:
        raise DataError("There are no p-values to combine.")
    if len(p_values) == 1:
        return p_values[0]
    return min(1.0, 2 * sorted(p_values)[len(p_values) // 2])


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction for several comparisons, in the order given.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


# --- a report ---------------------------------------------------------------------------------------------------------


def compare_report(
    report: Report, reader: PredictionReader, progress: ProgressCallback | None = None
) -> dict[str, list[dict[tuple[str, str], Comparison]]]:
    """The comparisons of every group, by the section's anchor.

    Args:
        report: From `gather`.
        reader: Reads the predictions; they are dropped group by group.
        progress: Called as (what, done, total).
    """
    total, done = sum(len(section.groups) for section in report.sections), 0
    compared: dict[str, list[dict[tuple[str, str], Comparison]]] = {}
    for section in report.sections:
        for group in section.groups:
            compared.setdefault(section.anchor, []).append(compare_group(group, reader))
            reader.forget()
            done += 1
            if progress is not None:
                progress("comparing", done, total)
    return compared


# --- a group ----------------------------------------------------------------------------------------------------------


def compare_group(group: Group, reader: PredictionReader) -> dict[tuple[str, str], Comparison]:
    """Every cell of a group against the best one, by (label, measure); the best itself isn't in it."""
    found: dict[tuple[str, str], Comparison] = {}
    for measure in group.measures:
        if measure == MEAN_OF_H:  # the same images as H of means, whose marks it takes over
            continue
        values = {cell.label: value for cell in group.cells if (value := cell.value(measure)) is not None}
        if len(values) < 2:
            continue
        top = next(cell for cell in group.cells if values.get(cell.label) == max(values.values()))
        others = [cell for cell in group.cells if cell is not top and cell.label in values]
        raw = [_against(top, cell, measure, reader) for cell in others]
        found |= _corrected(measure, values, top.label, [cell.label for cell in others], raw)
    return found


def _corrected(
    measure: str,
    values: dict[str, float],
    top: str,
    others: Sequence[str],
    raw: Sequence[tuple[float | None, int]],
) -> dict[tuple[str, str], Comparison]:
    """Comparisons out of raw p-values, those that were tested corrected together."""
    tested = [place for place, (p, _) in enumerate(raw) if p is not None]
    p_values: list[float | None] = [None] * len(raw)
    for place, p in zip(tested, holm([float(raw[place][0] or 0.0) for place in tested]), strict=True):
        p_values[place] = p
    return {
        (label, measure): Comparison(values[top] - values[label], p_values[place], raw[place][1])
        for place, label in enumerate(others)
    }


def _against(top: Cell, other: Cell, measure: str, reader: PredictionReader) -> tuple[float | None, int]:
    """p-value over all pairs of runs of the same seed, and how many there were; None without any."""
    p_values = []
    for first, second in _matched(top, other):
        p = _run_against(first, second, measure, reader)
        if p is not None:
            p_values.append(p)
    return (combine_seeds(p_values), len(p_values)) if p_values else (None, 0)


def _matched(first: Cell, second: Cell) -> list[tuple[RunRecord, RunRecord]]:
    """Pairs of runs of one seed; zero-shot answers the same whatever the seed, so any of its runs will do."""
    pairs = []
    by_seed = {record.result.key.seed: record for record in second.runs}
    for record in first.runs:
        seed = record.result.key.seed
        if seed in by_seed:
            pairs.append((record, by_seed[seed]))
        elif second.method == ZERO_SHOT:
            pairs.append((record, second.runs[0]))
    if not pairs and first.method == ZERO_SHOT:
        pairs = [(first.runs[0], record) for record in second.runs]
    return pairs


def _run_against(first: RunRecord, second: RunRecord, measure: str, reader: PredictionReader) -> float | None:
    ours, theirs = reader.read(first), reader.read(second)
    names = _parts_of(measure, list(ours))
    counts = [paired_counts(ours[name], theirs[name]) for name in names if name in ours and name in theirs]
    known = [item for item in counts if item is not None]
    if not names or len(known) != len(names):
        return None
    if len(known) == 1:
        _, only_first, only_second, _ = known[0].tolist()
        return mcnemar(only_first, only_second) if only_first >= only_second else 1.0
    combine = _h if measure == H else _mean
    before, after = ([np.array([(item[0] + item[side]) / item.sum()]) for item in known] for side in (1, 2))
    return bootstrap_images(known, combine) if combine(before)[0] >= combine(after)[0] else 1.0


def _parts_of(measure: str, parts: Sequence[str]) -> list[str]:
    """The parts that a measure is made of."""
    if measure == H:
        return ["base", "novel"]
    if measure == TARGET_AVERAGE:
        return [name for name in parts if name != SOURCE]
    return ["all"] if measure == ACCURACY and "all" in parts else [name for name in parts if name == measure]


def _h(parts: Sequence[Floats]) -> Floats:
    base, novel = parts
    total = base + novel
    return np.divide(2 * base * novel, total, out=np.zeros_like(total), where=total > 0)


def _mean(parts: Sequence[Floats]) -> Floats:
    return np.mean(np.stack(list(parts)), axis=0)


# --- averages over datasets -------------------------------------------------------------------------------------------


def compare_averages(rows: Sequence[Average], measure: str) -> dict[str, Comparison]:
    """Every complete average against the best one, by label, over the datasets."""
    values = {row.label: value for row in rows if (value := row.value(measure)) is not None}
    if len(values) < 2:
        return {}
    complete = [row for row in rows if row.label in values]
    top = max(complete, key=lambda row: values[row.label])
    others = [row for row in complete if row is not top]
    raw: list[tuple[float | None, int]] = []
    for row in others:
        pairs = [(a.value(measure), b.value(measure)) for a, b in zip(top.cells, row.cells, strict=True)]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        raw.append((bootstrap_datasets(differences), len(differences)))
    found = _corrected(measure, values, top.label, [row.label for row in others], raw)
    return {label: comparison for (label, _), comparison in found.items()}
