"""The learning rates against the sheet's numbers, which were checked against public training logs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adaptkit.errors import ConfigError
from adaptkit.training.loop import GradientLoop
from adaptkit.training.schedule import learning_rate
from adaptkit.types import TrainingSettings

COOP = TrainingSettings(epochs=50, lr=2e-3)


def rates(settings, count=None):
    return [learning_rate(settings, epoch) for epoch in range(count or settings.epochs)]


def test_first_epochs_of_a_public_log():
    assert rates(COOP, 5) == pytest.approx([1.0e-5, 2.0e-3, 1.998027e-3, 1.992115e-3, 1.982287e-3], abs=5e-10)


@pytest.mark.parametrize(("epochs", "factor"), [(5, 0.3455), (10, 0.0955), (20, 0.0245), (50, 0.0039), (2, 1.0)])
def test_last_epoch_is_never_zero(epochs, factor):
    assert rates(replace(COOP, epochs=epochs))[-1] / 2e-3 == pytest.approx(factor, abs=5e-5)


def test_maple_base_to_novel():
    wanted = [1e-5, 3.5e-3, 3.166e-3, 2.291e-3, 1.209e-3]
    assert rates(TrainingSettings(epochs=5, lr=3.5e-3)) == pytest.approx(wanted, abs=5e-7)


def test_no_warmup_and_one_epoch_is_constant():
    settings = TrainingSettings(epochs=1, lr=1e-3, warmup_epochs=0)
    assert [learning_rate(settings, 0, step, 7) for step in range(7)] == [1e-3] * 7


def test_cosine_per_step_reaches_zero_after_the_last():
    settings = TrainingSettings(epochs=3, lr=1e-3, schedule="cosine-step", warmup_epochs=0)
    assert rates(settings) == pytest.approx([1e-3, 7.5e-4, 2.5e-4])
    assert learning_rate(settings, 1, 2, 4) == pytest.approx(1e-3 * 0.5)


def test_constant_after_warmup():
    settings = TrainingSettings(epochs=4, lr=1e-3, schedule="constant", warmup_epochs=2)
    assert rates(settings) == [1e-5, 1e-5, 1e-3, 1e-3]


def test_squared_cosine():
    """The authors' posted log: the rate after epochs 49 and 50 of 100 (kgcoop sheet)."""
    settings = replace(COOP, epochs=100, lr=2e-3, schedule="cosine-epoch-squared")
    assert learning_rate(settings, 0) == 1e-5
    assert learning_rate(settings, 1) == 2e-3
    assert learning_rate(settings, 50) == pytest.approx(5.319e-4, rel=1e-3)
    assert learning_rate(settings, 51) == pytest.approx(5.0e-4, rel=1e-3)


def test_unknown_schedule_is_refused():
    with pytest.raises(ConfigError, match=r"schedule is 'linear', but must be one of cosine-epoch"):
        GradientLoop(replace(COOP, schedule="linear"))
    with pytest.raises(ConfigError, match="choose cosine-epoch"):
        learning_rate(replace(COOP, schedule="linear"), 3)


def test_a_cosine_that_ends_above_zero_and_within_an_epoch():
    """As torch's CosineAnnealingLR over 10 steps, where epochs have four and the last is cut."""
    settings = TrainingSettings(epochs=3, lr=2e-4, min_lr=1e-6, schedule="cosine-step", warmup_epochs=0)
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 10, eta_min=1e-6)
    for index in range(10):
        ours = learning_rate(settings, index // 4, index % 4, 4, total_steps=10)
        assert ours == pytest.approx(optimiser.param_groups[0]["lr"])
        optimiser.step()
        theirs.step()


def test_restarts_are_torchs():
    settings = replace(COOP, epochs=75, schedule="cosine-restarts", warmup_epochs=0)
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimiser, 10, 2)
    wanted = []
    for _ in range(75):
        wanted.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert rates(settings) == pytest.approx(wanted, rel=1e-9)
    assert [epoch for epoch in range(75) if wanted[epoch] == settings.lr] == [0, 10, 30, 70]
