"""How the learning rate moves, as plain functions of epoch and step.

Source: protocol-training sheet, section 4 (the cosine of the CoOp line, checked there against public training logs);
tip_adapter sheet for the per-step cosine.
"""

from __future__ import annotations

import math

from adaptkit.errors import ConfigError
from adaptkit.types import TrainingSettings

SCHEDULES = ("cosine-epoch", "cosine-epoch-squared", "cosine-step", "constant")


def learning_rate(settings: TrainingSettings, epoch: int, step: int = 0, steps_per_epoch: int = 1) -> float:
    """The learning rate of a step.

    The first `warmup_epochs` run at the constant `warmup_lr`. After them:

    * "cosine-epoch" counts epochs from the end of the warm-up against the whole number of epochs, as the references do:
      the first epoch after the warm-up has the full rate and the last one doesn't reach zero.
    * "cosine-epoch-squared" takes the square of that cosine factor: what KgCoOp's published numbers were trained with,
      where two schedules were stepped on one optimiser (kgcoop sheet).
    * "cosine-step" falls to zero over the remaining steps.
    * "constant" stays.

    Args:
        settings: Rate, epochs, warm-up and kind of schedule.
        epoch: From 0.
        step: Within the epoch, from 0.
        steps_per_epoch: How many steps an epoch has.

    Example:
        >>> [round(learning_rate(TrainingSettings(epochs=50), epoch), 9) for epoch in range(3)]
        [1e-05, 0.002, 0.001998027]
    """
    if epoch < settings.warmup_epochs:
        return settings.warmup_lr
    epoch -= settings.warmup_epochs
    if settings.schedule == "constant":
        return settings.lr
    if settings.schedule in ("cosine-epoch", "cosine-epoch-squared"):
        share = epoch / settings.epochs
    elif settings.schedule == "cosine-step":
        share = (epoch * steps_per_epoch + step) / ((settings.epochs - settings.warmup_epochs) * steps_per_epoch)
    else:
        raise ConfigError(f"Schedule {settings.schedule!r} is unknown: choose {', '.join(SCHEDULES)}.")
    factor = (1 + math.cos(math.pi * share)) / 2
    return settings.lr * (factor**2 if settings.schedule == "cosine-epoch-squared" else factor)
