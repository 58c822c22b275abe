"""The language models' speed benchmarks: the plain paths give the same numbers; no time is asserted."""

from __future__ import annotations

import pytest
import torch

from benchmarks.speed.measure import Difference
from benchmarks.speed.mllm import Model, Scoring, Steps

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def model():
    return Model("tiny", batch=3)


@pytest.mark.parametrize("at_once", [1, 3, 10])
def test_a_full_forward_per_class_gives_the_same_scores(model, at_once):
    case = Scoring(model, 7)
    assert case.plain(at_once).shape == (1, 7)
    assert Difference.between(case.ours(), case.plain(at_once)).relative < 1e-5


def test_plain_peft_takes_the_same_step(model):
    case = Steps(model, rank=2)
    assert all(difference.relative < 1e-4 for difference in case.differences().values())
    before = [parameter.detach().clone() for parameter in case.method.trainables()]
    for side in ("ours", "plain"):
        case.step(side)
    moved = [float((p.detach() - b).abs().max()) for p, b in zip(case.method.trainables(), before, strict=True)]
    assert len(moved) == 2 * 7 * 4
    assert all(size > 0 for size in moved)
    after = Difference.of_many([p.detach() for p in case.method.trainables()], case._plain_trained())
    assert after.absolute < 2e-5  # AdamW divides by tiny gradients
    assert not torch.equal(case.loss("ours"), torch.zeros(()))
