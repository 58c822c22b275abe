"""A tracker that keeps what it is told, in the place of a real one; works where none is installed."""

from __future__ import annotations

import threading
import time

import pytest

from adaptkit.evaluation import tracking


class Recorder:
    """A tracker that keeps what it is told, and fails or sleeps where asked to."""

    def __init__(self, fails_at: str = "", error: BaseException | None = None, sleeps: float = 0.0):
        self.fails_at, self.error, self.sleeps = fails_at, error or RuntimeError("no network"), sleeps
        self.config: dict = {}
        self.logged: list[tuple[int, dict]] = []
        self.threads: set[int] = set()
        self.calls: list[str] = []

    def _called(self, what: str) -> None:
        self.calls.append(what)
        self.threads.add(threading.get_ident())
        time.sleep(self.sleeps)
        if what == self.fails_at:
            raise self.error

    def start(self):
        self._called("start")

    def store_init_configuration(self, values):
        self._called("config")
        self.config = values

    def log(self, values, step=None):
        self._called("log")
        self.logged.append((step, values))

    def finish(self):
        self._called("finish")


def put_recorder(monkeypatch: pytest.MonkeyPatch, recorder: Recorder, name: str = "tensorboard") -> Recorder:
    """Have the tracker of one name be a recorder."""
    monkeypatch.setattr(tracking, "_installed", lambda package: True)
    monkeypatch.setattr(tracking, "_prepare", lambda tracker: None)
    monkeypatch.setitem(tracking._MAKERS, name, lambda run, folder: recorder)
    return recorder
