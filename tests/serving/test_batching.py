"""Images of many requests are answered together, in order, and none is lost."""

from __future__ import annotations

import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from threading import Event

import pytest
import torch

from adaptkit.serving.batching import Batcher, BusyError


class Model:
    """Gives each image its first number and its names; can be held up, and remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.go = Event()
        self.go.set()
        self.started = Event()

    def __call__(self, pixels, names):
        self.started.set()
        assert self.go.wait(10)
        self.batches.append(len(pixels))
        if (pixels < -1).any():
            return []
        if (pixels < 0).any():
            raise RuntimeError("a bad batch")
        return [(float(one[0]), asked) for one, asked in zip(pixels, names, strict=True)]


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def batcher(model):
    made = Batcher(model, batch=4, wait=5, waiting=20)
    yield made
    model.go.set()
    made.close()


def ask(batcher, *values):
    with batcher.room(len(values)) as submit:
        waiting = [submit(torch.tensor([float(value)]), (f"a{value}",)) for value in values]
        return [future.result(10) for future in waiting]


def held(batcher, model, pool):
    """The model at work on one image, until it is let go."""
    model.go.clear()
    first = pool.submit(ask, batcher, 0)
    assert model.started.wait(10)
    return first


def test_a_lone_image_is_answered_at_once(batcher, model):
    started = time.monotonic()
    assert ask(batcher, 7) == [(7.0, ("a7",))]
    assert time.monotonic() - started < 2.5  # it doesn't wait for others, of which none are coming
    assert batcher.inside == 0


def test_what_waits_is_answered_together(batcher, model):
    with ThreadPoolExecutor(8) as pool:
        first = held(batcher, model, pool)
        later = [pool.submit(ask, batcher, value) for value in range(1, 7)]
        while batcher.inside < 7:
            time.sleep(0.001)
        model.go.set()
        assert first.result(10) == [(0.0, ("a0",))]
        answers = [future.result(10) for future in later]
    assert answers == [[(float(value), (f"a{value}",))] for value in range(1, 7)]
    assert model.batches == [1, 4, 2]


def test_a_batch_waits_for_images_on_their_way(batcher, model):
    with batcher.room(2) as submit:
        one = submit(torch.tensor([1.0]), ("a",))
        time.sleep(0.03)
        two = submit(torch.tensor([2.0]), ("a",))
        assert (one.result(10)[0], two.result(10)[0]) == (1.0, 2.0)
    assert model.batches == [2]


def test_full_is_full(batcher, model):
    with ThreadPoolExecutor(1) as pool:
        first = held(batcher, model, pool)
        with batcher.room(19):
            with pytest.raises(BusyError, match="ask again"), batcher.room(1):
                pass
            assert batcher.inside == 20
        with batcher.room(19):
            pass
        model.go.set()
        first.result(10)
    assert batcher.inside == 0


def test_room_is_given_back_after_an_error(batcher):
    with pytest.raises(ValueError, match="unreadable"), batcher.room(20):
        raise ValueError("unreadable")
    assert ask(batcher, *range(20)) == [(float(value), (f"a{value}",)) for value in range(20)]


def test_who_does_not_wait_costs_nothing(batcher, model):
    with ThreadPoolExecutor(1) as pool:
        first = held(batcher, model, pool)
        with batcher.room(2) as submit:
            gone, stays = (submit(torch.tensor([float(value)]), ("a",)) for value in (1, 2))
            assert gone.cancel()
            model.go.set()
            first.result(10)
            assert stays.result(10)[0] == 2.0
    with pytest.raises(CancelledError):
        gone.result()
    assert model.batches == [1, 1]


def test_a_failing_batch_fails_alone(batcher):
    with pytest.raises(RuntimeError, match="a bad batch"):
        ask(batcher, -1)
    with pytest.raises(ValueError, match="1 images got 0 answers"):
        ask(batcher, -2)
    assert ask(batcher, 3) == [(3.0, ("a3",))]


def test_closing_answers_what_was_submitted(batcher, model):
    with ThreadPoolExecutor(9) as pool:
        first = held(batcher, model, pool)
        later = [pool.submit(ask, batcher, value) for value in range(1, 8)]
        while batcher.inside < 8:
            time.sleep(0.001)
        time.sleep(0.05)
        closing = pool.submit(batcher.close)
        time.sleep(0.05)
        model.go.set()
        closing.result(10)
        assert first.result(0)
        assert sum(len(future.result(1)) for future in later) == 7
    with pytest.raises(BusyError), batcher.room(1):
        pass
    batcher.close()
