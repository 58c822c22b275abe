"""What held-out images say about an adapter's probabilities: a temperature, and sets that hold the true class.

A temperature divides the logits, so that probabilities mean what they say; the likeliest class stays. A prediction set
holds every class whose probability is high enough that, over held-out sets and new images like them, the true class is
in it as often as was asked for (split conformal prediction, whatever the model is worth).

Source: arXiv 1706.04599, Sec. 4.2 (temperature scaling); arXiv 2107.07511, Secs. 1 and 3.2 (split conformal prediction
with the score 1 - probability; the coverage given a held-out set is Beta distributed).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptkit.errors import AdapterError, ConfigError
from adaptkit.methods.adapter import LABEL_FACTS, AdapterConfig

FEWEST_FOR_TEMPERATURE = 30
"""With fewer held-out images a temperature is little more than chance, and a warning says so."""

_NEAR = 0.05
_CHANCE = 0.9
_TEMPERATURES = (0.01, 100.0)


@dataclass(frozen=True)
class Calibration:
    """What was learned from held-out images.

    Args:
        temperature: What logits are divided by.
        scores: 1 - the true class's probability for each held-out image, in rising order.
    """

    temperature: float
    scores: tuple[float, ...]

    def probabilities(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probabilities [n, classes] of logits [n, classes]."""
        return softmax(logits / self.temperature)

    def sets(self, probabilities: NDArray[np.float64], coverage: float) -> NDArray[np.bool_]:
        """Which classes are in each image's prediction set, bool [n, classes]; the likeliest one always is.

        Args:
            probabilities: As `probabilities` gives them.
            coverage: How often the true class shall be in the set, between 0 and 1.
        """
        inside = 1 - probabilities <= threshold(self.scores, coverage)
        inside[np.arange(len(inside)), probabilities.argmax(axis=1)] = True
        return inside

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"temperature": self.temperature, "scores": list(self.scores)}


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities of logits [n, classes]."""
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(odds / odds.sum(axis=1, keepdims=True))


def calibrate(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> Calibration:
    """Learn from held-out images.

    Args:
        logits: [n, classes], n at least 1.
        labels: Class index of each image, int64 [n].
    """
    temperature = fit_temperature(logits, labels)
    own = softmax(logits / temperature)[np.arange(len(labels)), labels]
    return Calibration(temperature, tuple(np.sort(1 - own).tolist()))


def fit_temperature(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """The temperature between 0.01 and 100 with the least mean cross-entropy.

    1 / (n + 2) of each label is shared out among all classes: where every held-out image is answered right, plain
    cross-entropy would ask for a temperature of 0.

    Source: J. Platt, "Probabilistic outputs for support vector machines" (1999), Sec. 2.2, for the share.
    """
    from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]

    rows, share = np.arange(len(labels)), 1 / (len(labels) + 2)
    target = (1 - share) * logits[rows, labels] + share * logits.mean(axis=1)

    def loss(log_temperature: float) -> float:
        temperature = math.exp(log_temperature)
        peak = logits.max(axis=1)
        total = np.log(np.exp((logits - peak[:, None]) / temperature).sum(axis=1))
        return float(((peak - target) / temperature + total).mean())

    bounds = tuple(math.log(end) for end in _TEMPERATURES)
    return math.exp(float(minimize_scalar(loss, bounds=bounds, method="bounded").x))


class CalibrationWarning(UserWarning):
    """Held-out images are too few for what was asked of them."""


def check_probability(name: str, value: Any) -> float:
    """A number between 0 and 1.

    Raises:
        ConfigError: It isn't one.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)) or not 0 < value < 1:
        raise ConfigError(f"{name} is {value!r}, but must be a number between 0 and 1, such as 0.9.")
    return float(value)


def _rank(images: int, coverage: float) -> int:
    return math.ceil((images + 1) * coverage - 1e-9)  # 10 · 0.9 is a little above 9 in floating point


def threshold(scores: tuple[float, ...], coverage: float) -> float:
    """The largest score that is still in a set; infinite where there are too few images to promise anything less.

    Example:
        >>> threshold((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), 0.9)
        0.9
        >>> threshold((0.1, 0.2, 0.3), 0.9)
        inf
    """
    rank = _rank(len(scores), check_probability("coverage", coverage))
    return math.inf if rank > len(scores) else scores[rank - 1]


def warning_about(images: int, coverage: float) -> str:
    """What to tell people about a promise made from so many held-out images; "" where it is a good one."""
    from scipy.stats import beta  # type: ignore[import-untyped]

    rank = _rank(images, check_probability("coverage", coverage))
    if rank > images:
        needed = math.ceil(coverage / (1 - coverage) - 1e-9)
        return (
            f"{images} held-out images can't promise a coverage of {coverage:g}, so every set holds all classes: hold"
            f" out at least {needed}."
        )
    low, high = beta.interval(_CHANCE, rank, images + 1 - rank)
    if coverage - low <= _NEAR:
        return ""
    return (
        f"With {images} held-out images the promise of {coverage:g} holds on average over such sets of images; for this"
        f" one the coverage lies between {low:.2f} and {high:.2f} with a chance of {_CHANCE:g}: hold out more."
    )


def saved_calibration(config: AdapterConfig, where: str | Path) -> Calibration | None:
    """An adapter's calibration; None where it has none.

    Raises:
        AdapterError: It is damaged.
    """
    own = config.facts.get(LABEL_FACTS)
    saved = own.get("calibration") if isinstance(own, Mapping) else None
    return None if saved is None else read_calibration(saved, str(where))


def read_calibration(content: Any, where: str) -> Calibration:
    """A saved calibration, checked.

    Raises:
        AdapterError: It is damaged.
    """
    try:
        if not isinstance(content, Mapping):
            raise TypeError("it is no mapping")
        temperature, scores = content["temperature"], content["scores"]
        numbers = [temperature, *scores]
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in numbers):
            raise ValueError("a value isn't a finite number")
        if temperature <= 0 or not scores or not all(0 <= score <= 1 for score in scores):
            raise ValueError("a value is out of range")
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"The calibration in {where} can't be used ({error}): calibrate and save again.") from error
    return Calibration(float(temperature), tuple(sorted(float(score) for score in scores)))
