"""How the learning rate moves, as plain functions of epoch and step.

Source: protocol-training sheet, section 4 (the cosine of the CoOp line, checked there against public training logs);
tip_adapter sheet for the per-step cosine.
"""

from __future__ import annotations

import math

from adaptkit.errors import ConfigError
from adaptkit.types import TrainingSettings

SCHEDULES = ("cosine-epoch", "cosine-epoch-squared", "cosine-step", "cosine-restarts", "constant")

FIRST_CYCLE = 10
"""Epochs of the first cycle of "cosine-restarts"; each cycle is twice as long as the one before."""


def learning_rate(
    settings: TrainingSettings, epoch: int, step: int = 0, steps_per_epoch: int = 1, total_steps: int | None = None
) -> float:
    """The learning rate of a step.

    The first `warmup_epochs` run at the constant `warmup_lr`. After them:

    * "cosine-epoch" counts epochs from the end of the warm-up against the whole number of epochs, as the references do:
      the first epoch after the warm-up has the full rate and the last one doesn't reach zero.
    * "cosine-epoch-squared" takes the square of that cosine factor: what KgCoOp's published numbers were trained with,
      where two schedules were stepped on one optimiser (kgcoop sheet).
    * "cosine-step" falls over the remaining steps.
    * "cosine-restarts" falls to zero per epoch over 10 epochs and starts anew for 20, 40 and so on, whatever the
      number of epochs: AdaptCLIPZS' schedule (adaptclipzs sheet).
    * "constant" stays.

    A cosine falls from `lr` towards `min_lr`.

    Args:
        settings: Rate, epochs, warm-up and kind of schedule.
        epoch: From 0.
        step: Within the epoch, from 0.
        steps_per_epoch: How many steps an epoch has.
        total_steps: How many there are in all, where the last epoch isn't whole; None for whole epochs.

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
        in_all = settings.epochs * steps_per_epoch if total_steps is None else total_steps
        share = (epoch * steps_per_epoch + step) / (in_all - settings.warmup_epochs * steps_per_epoch)
    elif settings.schedule == "cosine-restarts":
        share = _share_of_cycle(epoch)
    else:
        raise ConfigError(f"Schedule {settings.schedule!r} is unknown: choose {', '.join(SCHEDULES)}.")
    factor = (1 + math.cos(math.pi * share)) / 2
    factor = factor**2 if settings.schedule == "cosine-epoch-squared" else factor
    return settings.min_lr + (settings.lr - settings.min_lr) * factor


def _share_of_cycle(epoch: int) -> float:
    """How much of its cycle is over when an epoch begins."""
    cycle = FIRST_CYCLE
    while epoch >= cycle:
        epoch, cycle = epoch - cycle, 2 * cycle
    return epoch / cycle
