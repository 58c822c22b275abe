"""What the engine finds: answers for images, and an estimate of how often they are right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptkit.evaluation.statistics import wilson_interval
from adaptkit.studio.choosing import FOLDS, confusions


@dataclass(frozen=True)
class Answers:
    """What is answered for images.

    Args:
        by: Name of the method; "" where nothing can answer yet.
        note: Why another than the chosen method answers, or none; "" otherwise.
        classes: Ids, in the order of the columns.
        images: Ids, in the order of the rows.
        odds: Probabilities [images, classes]; None where nothing can answer.
    """

    by: str
    note: str
    classes: tuple[str, ...]
    images: tuple[str, ...]
    odds: NDArray[np.float64] | None


@dataclass(frozen=True)
class Estimate:
    """How often a method is right on images it wasn't fitted on, by cross-validation on the labelled ones.

    The interval is Wilson's for images drawn at random. Images that were labelled because they were hard make the
    figure too low; nearly equal images (bursts of one scene) make it too high.

    Args:
        method: Its name.
        images: Ids of the images that were tested, each by a classifier that hadn't seen it.
        labels: Class of each, as a position in `classes`.
        answers: What was answered.
        classes: Ids.
        untested: Classes with a single image, which can't be tested.
        seconds: What it took.
    """

    method: str
    images: tuple[str, ...]
    labels: tuple[int, ...]
    answers: tuple[int, ...]
    classes: tuple[str, ...]
    untested: tuple[str, ...]
    seconds: float

    @property
    def correct(self) -> int:
        """Images answered rightly."""
        return sum(label == answer for label, answer in zip(self.labels, self.answers, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the page: fractions, class and image ids."""
        total = len(self.images)
        low, high = wilson_interval(self.correct, total)
        by_class = [[label for label in self.labels if label == c] for c in range(len(self.classes))]
        right = [a for a, label in zip(self.answers, self.labels, strict=True) if a == label]
        return {
            "method": self.method,
            "accuracy": self.correct / total,
            "interval": [low, high],
            "correct": self.correct,
            "total": total,
            "folds": FOLDS,
            "untested": list(self.untested),
            "seconds": round(self.seconds, 3),
            "per_class": {key: [right.count(c), len(by_class[c])] for c, key in enumerate(self.classes)},
            "wrong": {
                self.images[i]: self.classes[a]
                for i, (a, label) in enumerate(zip(self.answers, self.labels, strict=True))
                if a != label
            },
            "confusions": [
                {
                    "true": self.classes[pair.true],
                    "taken_for": self.classes[pair.taken_for],
                    "images": [self.images[i] for i in pair.images],
                }
                for pair in confusions(self.labels, self.answers)
            ],
        }
