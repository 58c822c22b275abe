"""Spread and intervals against Python's statistics module and tabulated quantiles."""

from __future__ import annotations

import math
import statistics

import pytest

from adaptkit.errors import DataError
from adaptkit.evaluation.statistics import summarise, t_quantile, wilson_interval

# two-sided 95 % quantiles of Student's t, as printed in any table
T_TABLE = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 30: 2.042}


@pytest.mark.parametrize(("degrees", "value"), T_TABLE.items())
def test_quantiles_agree_with_the_table(degrees, value):
    assert t_quantile(0.975, degrees) == pytest.approx(value, abs=5e-4)


def test_both_deviations_are_what_their_names_say():
    values = [91.81, 92.01, 92.17]  # CoOp's documented three seeds on Caltech101
    summary = summarise(values)
    assert summary.mean == pytest.approx(statistics.fmean(values))
    assert summary.sample_std == pytest.approx(statistics.stdev(values))
    assert summary.population_std == pytest.approx(statistics.pstdev(values))
    half = 4.302653 * statistics.stdev(values) / 3**0.5
    assert summary.half_width == pytest.approx(half, rel=1e-6)
    assert summary.interval == pytest.approx((summary.mean - half, summary.mean + half), rel=1e-9)
    assert (summary.n, summary.values) == (3, tuple(values))


def test_a_single_value_has_no_interval():
    summary = summarise([0.5])
    assert (summary.mean, summary.sample_std, summary.interval, summary.half_width) == (0.5, None, None, None)
    assert summary.population_std == 0.0


def test_a_higher_level_is_wider():
    assert summarise([1, 2, 3], level=0.99).half_width > summarise([1, 2, 3]).half_width


def test_equal_values_have_no_width():
    assert summarise([0.7, 0.7, 0.7]).half_width == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(
    ("values", "level", "says"),
    [([], 0.95, "no values"), ([1.0, float("nan")], 0.95, "finite"), ([1.0, 2.0], 1.0, "confidence level")],
)
def test_what_cannot_be_summarised_is_refused(values, level, says):
    with pytest.raises(DataError, match=says):
        summarise(values, level)


def test_wilson_against_its_definition():
    """The interval holds the shares p for which the observed share lies within z standard errors of p."""
    looked = 0
    for correct, total in ((0, 3), (1, 4), (9, 10), (50, 50), (160, 320)):
        for end in wilson_interval(correct, total):
            if 0 < end < 1:
                z = abs(correct / total - end) / math.sqrt(end * (1 - end) / total)
                assert z == pytest.approx(1.959964, abs=1e-5)
                looked += 1
    assert looked == 8
    with pytest.raises(DataError, match="at least one image"):
        wilson_interval(0, 0)
    with pytest.raises(DataError, match="level"):
        wilson_interval(1, 2, 1.0)
