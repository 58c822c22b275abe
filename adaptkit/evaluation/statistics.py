"""Mean, spread and interval of one number over seeds; which standard deviation is meant is always in the name.

Source: protocols sheet, section 1 (the CoOp line prints the population standard deviation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from adaptkit.errors import DataError

DEFAULT_LEVEL = 0.95


@dataclass(frozen=True)
class Summary:
    """One number measured several times.

    Args:
        values: The single values, in the order given.
        mean: Their mean.
        sample_std: Standard deviation with n - 1 in the denominator; None for a single value.
        population_std: Standard deviation with n in the denominator, as the CoOp line prints it.
        interval: Student-t interval of the mean (low, high) at `level`; None for a single value. It holds if the values
            are roughly normal, and covers the randomness of the seeds alone, not that of the test images.
        level: Confidence level of the interval.
    """

    values: tuple[float, ...]
    mean: float
    sample_std: float | None
    population_std: float
    interval: tuple[float, float] | None
    level: float = DEFAULT_LEVEL

    @property
    def n(self) -> int:
        """How many values."""
        return len(self.values)

    @property
    def half_width(self) -> float | None:
        """Half the interval's length: what stands behind "±"; None for a single value."""
        return None if self.interval is None else (self.interval[1] - self.interval[0]) / 2


def summarise(values: Sequence[float], level: float = DEFAULT_LEVEL) -> Summary:
    """Mean, both standard deviations and the Student-t interval.

    Args:
        values: One per seed, at least one.
        level: Confidence level, above 0 and below 1.

    Raises:
        DataError: No values, or one that isn't finite; a level outside (0, 1).

    Example:
        >>> summary = summarise([91.81, 92.01, 92.17])
        >>> round(summary.mean, 3), round(summary.sample_std, 3), round(summary.half_width, 3)
        (91.997, 0.18, 0.448)
    """
    numbers = np.asarray(list(values), dtype=np.float64)
    if not len(numbers):
        raise DataError("There are no values to summarise: at least one is needed.")
    if not bool(np.isfinite(numbers).all()):
        raise DataError(f"A value isn't finite ({', '.join(str(v) for v in numbers)}): leave the failed run out.")
    if not 0 < level < 1:
        raise DataError(f"The confidence level is {level}, but must lie between 0 and 1, such as 0.95.")
    mean, n = float(numbers.mean()), len(numbers)
    sample_std = float(numbers.std(ddof=1)) if n > 1 else None
    interval = None
    if sample_std is not None:
        half = t_quantile((1 + level) / 2, n - 1) * sample_std / math.sqrt(n)
        interval = (mean - half, mean + half)
    return Summary(tuple(numbers.tolist()), mean, sample_std, float(numbers.std()), interval, level)


def t_quantile(probability: float, degrees: int) -> float:
    """The value below which Student's t with `degrees` degrees of freedom lies with this probability.

    Example:
        >>> round(t_quantile(0.975, 2), 4)
        4.3027
    """
    from scipy.special import stdtrit  # type: ignore[import-untyped]  # scikit-learn brings scipy along

    return float(stdtrit(degrees, probability))


def wilson_interval(correct: int, total: int, level: float = DEFAULT_LEVEL) -> tuple[float, float]:
    """Wilson's interval of an accuracy measured on independent images, as fractions; it never leaves [0, 1].

    Args:
        correct: Images answered rightly.
        total: Images asked about, at least one.
        level: Confidence level, above 0 and below 1.

    Raises:
        DataError: No images, more right answers than images, or a level outside (0, 1).

    Source: E. B. Wilson, Journal of the American Statistical Association 22 (1927), 209-212.

    Example:
        >>> low, high = wilson_interval(9, 10)
        >>> round(low, 4), round(high, 4)
        (0.5958, 0.9821)
    """
    if total < 1 or not 0 <= correct <= total:
        raise DataError(f"{correct} right answers of {total} give no accuracy: at least one image is needed.")
    if not 0 < level < 1:
        raise DataError(f"The confidence level is {level}, but must lie between 0 and 1, such as 0.95.")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)
