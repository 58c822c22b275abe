from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from adaptkit.errors import DataError
from adaptkit.evaluation.results import Predictions
from adaptkit.sweeps.report.aggregate import ACCURACY, TARGET_AVERAGE, H, averages_of, gather
from adaptkit.sweeps.report.predictions import PredictionReader
from adaptkit.sweeps.report.significance import (
    bootstrap_datasets,
    bootstrap_images,
    combine_seeds,
    compare_averages,
    compare_group,
    compare_report,
    holm,
    mcnemar,
    paired_counts,
)
from tests.sweeps.report.build import record, seeds

B2N = {"protocol": "base-to-novel", "shots": 16}


def made(hits: list[int], labels: list[int] | None = None) -> Predictions:
    true = np.array(labels or [0] * len(hits))
    return Predictions(
        "all", np.arange(len(hits)), true, np.where(np.array(hits) == 1, true, true + 1), np.ones(len(hits))
    )


# --- single tests -----------------------------------------------------------------------------------------------------


def test_mcnemar_is_the_mid_p_of_a_fair_coin():
    checked = 0
    for b in range(12):
        for c in range(12):
            n = b + c
            weights = [math.comb(n, k) / 2**n for k in range(n + 1)]
            tail = sum(weights[: min(b, c)]) + weights[min(b, c)] / 2
            assert mcnemar(b, c) == pytest.approx(min(1.0, 2 * tail)), (b, c)
            checked += 1
    assert checked == 144


def test_pairs_are_counted_only_on_the_same_images():
    first, second = made([1, 1, 0, 0, 1]), made([1, 0, 1, 0, 0])
    assert paired_counts(first, second).tolist() == [1, 2, 1, 1]
    assert paired_counts(first, made([1, 1, 0, 0, 1], [0, 0, 0, 0, 1])) is None
    assert paired_counts(first, replace(second, index=second.index + 1)) is None
    assert paired_counts(first, made([1, 1])) is None


def test_a_bootstrap_over_images_agrees_with_mcnemar_on_one_accuracy():
    for counts in ([50, 20, 8, 22], [50, 11, 9, 30]):
        p = bootstrap_images([np.array(counts)], lambda parts: parts[0])
        assert p == pytest.approx(mcnemar(counts[1], counts[2]), abs=0.02)
    clear = [np.array([100, 40, 2, 10])] * 2
    assert bootstrap_images(clear, lambda parts: np.mean(np.stack(parts), axis=0)) < 0.001


def test_a_bootstrap_over_datasets_wants_enough_of_them():
    assert bootstrap_datasets([0.1] * 5) is None
    assert bootstrap_datasets([0.1, 0.2, 0.05, 0.1, 0.15, 0.1]) < 0.001
    assert bootstrap_datasets([0.1, -0.1, 0.05, -0.04, 0.02, -0.03]) > 0.5


def test_p_values_of_seeds_and_of_methods():
    assert combine_seeds([0.3]) == 0.3
    assert combine_seeds([0.01, 0.04]) == 0.08
    assert combine_seeds([0.6, 0.7, 0.001]) == 1.0
    with pytest.raises(DataError):
        combine_seeds([])
    assert holm([]) == []
    assert holm([0.04, 0.01, 0.03, 0.5]) == pytest.approx([0.09, 0.04, 0.09, 0.5])


# --- groups -----------------------------------------------------------------------------------------------------------


def compared(runs):
    report = gather(runs)
    reader = PredictionReader()
    found = compare_report(report, reader)
    return report.sections[0], found[report.sections[0].anchor], reader


def test_clear_differences_are_no_ties_and_close_ones_are(tmp_path):
    runs = seeds(tmp_path, "coop", [0.95] * 3, images=200)
    runs += seeds(tmp_path, "maple", [0.94] * 3, images=200)
    runs += seeds(tmp_path, "zero-shot", [0.5] * 3, images=200)
    _, (found,), _ = compared(runs)
    assert set(found) == {("maple", ACCURACY), ("zero-shot", ACCURACY)}
    assert found["maple", ACCURACY].tie
    close, clear = found["maple", ACCURACY], found["zero-shot", ACCURACY]
    assert not clear.tie
    assert clear.p < 0.001
    assert clear.difference == pytest.approx(0.45)
    assert (close.runs, clear.runs) == (3, 3)


def test_h_and_target_averages_are_tested_too(tmp_path):
    good, bad = {"base": 0.95, "novel": 0.9}, {"base": 0.95, "novel": 0.4}
    runs = [
        *seeds(tmp_path, "coop", [good] * 2, images=200, **B2N),
        *seeds(tmp_path, "maple", [bad] * 2, images=200, **B2N),
    ]
    _, (found,), _ = compared(runs)
    assert not found["maple", H].tie
    assert found["maple", "novel"].p < 0.001
    cross = {"protocol": "cross-dataset", "settings": {"targets": {"a": "1", "b": "2"}}, "images": 200}
    runs = [record(tmp_path / "c", "coop", {"source": 0.5, "a": 0.9, "b": 0.9}, **cross)]
    runs += [record(tmp_path / "c", "maple", {"source": 0.9, "a": 0.5, "b": 0.5}, **cross)]
    _, (found,), _ = compared(runs)
    assert found["maple", TARGET_AVERAGE].p < 0.001
    assert found["coop", "source"].p < 0.001


def test_an_equal_method_is_a_tie_and_a_missing_prediction_is_said(tmp_path):
    runs = [record(tmp_path, "zero-shot", 0.5), record(tmp_path, "coop", 0.7, predictions=False)]
    _, (found,), reader = compared(runs)
    assert found["zero-shot", ACCURACY].p is None
    assert not found["zero-shot", ACCURACY].tie
    assert len(reader.problems) == 1


def test_zero_shot_of_one_seed_stands_for_all(tmp_path):
    runs = [*seeds(tmp_path, "coop", [0.9] * 3, images=100), record(tmp_path, "zero-shot", 0.4, seed=7, images=100)]
    _, (found,), _ = compared(runs)
    assert found["zero-shot", ACCURACY].runs == 3
    assert found["zero-shot", ACCURACY].p < 0.001
    runs = [record(tmp_path / "x", "coop", 0.9, seed=1), record(tmp_path / "x", "maple", 0.4, seed=2)]
    assert compared(runs)[1][0]["maple", ACCURACY].p is None


def test_a_seed_the_other_way_round_counts_against(tmp_path):
    runs = [
        *seeds(tmp_path, "coop", [0.9, 0.9, 0.2], images=200),
        *seeds(tmp_path, "maple", [0.3, 0.3, 0.8], images=200),
    ]
    _, (found,), _ = compared(runs)
    assert found["maple", ACCURACY].p < 0.001  # the median of three
    runs = [
        *seeds(tmp_path / "y", "coop", [0.9, 0.4], images=200),
        *seeds(tmp_path / "y", "maple", [0.3, 0.8], images=200),
    ]
    assert compared(runs)[1][0]["maple", ACCURACY].tie


def test_predictions_that_dont_fit_are_refused(tmp_path):
    first = record(tmp_path, "coop", 0.9)
    second = record(tmp_path, "maple", 0.5)
    (second.folder / "predictions.safetensors").write_bytes((first.folder / "predictions.safetensors").read_bytes())
    reader = PredictionReader()
    group = gather([first, second]).sections[0].groups[0]
    assert compare_group(group, reader)["maple", ACCURACY].p is None
    assert "doesn't fit" in reader.problems[second.folder]
    (second.folder / "predictions.safetensors").write_bytes(b"torn")
    fresh = PredictionReader()
    assert fresh.read(second) == {}
    assert second.folder in fresh.problems


# --- over datasets ----------------------------------------------------------------------------------------------------


def test_averages_are_compared_over_datasets(tmp_path):
    runs = []
    for number in range(7):
        name = f"set{number}"
        runs.append(record(tmp_path, "coop", 0.80 + 0.01 * number, dataset=name, images=100))
        runs.append(
            record(tmp_path, "maple", 0.80 + 0.01 * number + (0.02 if number % 2 else -0.02), dataset=name, images=100)
        )
        runs.append(record(tmp_path, "vpt", 0.6, dataset=name, images=100))
    rows = averages_of(gather(runs).sections[0], 4)
    found = compare_averages(rows, ACCURACY)
    assert found["maple"].tie
    assert not found["vpt"].tie
    few = averages_of(gather(runs[:6]).sections[0], 4)
    assert all(item.p is None for item in compare_averages(few, ACCURACY).values())
