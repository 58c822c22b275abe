"""A folder of small pictures, a cache of its own, and a caller that keeps what commands print apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from adaptkit.commands.main import main

CLASSES = {"beech": (40, 170, 60), "oak": (200, 60, 40), "pine": (30, 60, 200), "yew": (230, 220, 60)}
PER_CLASS = 8


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ADAPTKIT_DATA_ROOT", raising=False)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Four classes of eight 32x32 PNGs."""
    numbers = np.random.default_rng(0)
    for label, colour in CLASSES.items():
        folder = tmp_path / "photos" / label
        folder.mkdir(parents=True)
        for index in range(PER_CLASS):
            noisy = np.clip(np.array(colour) + numbers.integers(-40, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"{index}.png")
    return tmp_path / "photos"


@pytest.fixture
def call() -> Callable[..., Result]:
    """Run `adaptkit …`; every word is made a text."""
    return lambda *words: CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def refused(call) -> Callable[..., str]:
    """Run a command that must end with exit code 2, one message and no traceback; returns the message."""

    def check(*words: object, code: int = 2) -> str:
        outcome = call(*words)
        assert outcome.exit_code == code, outcome.output
        assert outcome.exception is None or isinstance(outcome.exception, SystemExit), outcome.exception
        assert "Traceback" not in outcome.output
        return str(outcome.output)

    return check
