"""Two tiny datasets, and methods that misbehave, which reach the workers' processes as another package's would."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

import adaptkit
from adaptkit.methods import methods
from adaptkit.registry import Entry

MISBEHAVING = '''
"""Methods that misbehave, for tests of sweeps."""
import os, signal, time
from pathlib import Path
from adaptkit.methods import methods
from adaptkit.methods.adapters.zero_shot import ZeroShot

GATE = Path(os.environ["SWEEP_GATE"])


@methods.register("dying")
class Dying(ZeroShot):
    """Its process is ended from outside, every time."""
    name = "dying"

    def fit(self, task, loop=None):
        os.kill(os.getpid(), signal.SIGKILL)


@methods.register("dying-once")
class DyingOnce(ZeroShot):
    """Its process is ended from outside, the first time."""
    name = "dying-once"

    def fit(self, task, loop=None):
        if not GATE.exists():
            GATE.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {}


@methods.register("waiting")
class Waiting(ZeroShot):
    """Takes until a file is there."""
    name = "waiting"

    def fit(self, task, loop=None):
        while not GATE.exists():
            time.sleep(0.02)
        return {}


@methods.register("broken")
class Broken(ZeroShot):
    """Fails until a file is there."""
    name = "broken"

    def fit(self, task, loop=None):
        if not GATE.exists():
            raise ValueError("the reason of it all")
        return {}


@methods.register("large")
class Large(ZeroShot):
    """Learns more than a small disk holds."""
    name = "large"

    def adapter_state(self):
        import torch
        return {"weights": torch.zeros(1000, 1000)}
'''
NAMES = ("dying", "dying-once", "waiting", "broken", "large")


class Bench(NamedTuple):
    """Where a test of sweeps works.

    Args:
        root: Its folder.
        gate: The file that the misbehaving methods look for.
        environment: For processes.
    """

    root: Path
    gate: Path
    environment: dict[str, str]

    @property
    def out(self) -> Path:
        return self.root / "out"

    def suite(self, text: str) -> Path:
        path = self.root / "suite.yaml"
        path.write_text(text)
        return path


def draw_photos(folder: Path, images: int = 8) -> None:
    """Four classes of small PNGs."""
    numbers = np.random.default_rng(0)
    for label, colour in {"beech": 60, "oak": 120, "pine": 180, "yew": 240}.items():
        (folder / label).mkdir(parents=True)
        for index in range(images):
            pixels = np.clip(colour + numbers.integers(-40, 40, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{index}.png")


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Bench:
    plugin = tmp_path / "plugin"
    (plugin / "misbehaving-1.0.dist-info").mkdir(parents=True)
    (plugin / "misbehaving.py").write_text(MISBEHAVING)
    (plugin / "misbehaving-1.0.dist-info" / "METADATA").write_text("Name: misbehaving\nVersion: 1.0\n")
    points = "".join(f"{name} = misbehaving\n" for name in NAMES)
    (plugin / "misbehaving-1.0.dist-info" / "entry_points.txt").write_text(f"[adaptkit.methods]\n{points}")
    draw_photos(tmp_path / "photos")
    draw_photos(tmp_path / "others", images=6)
    paths = [str(plugin), str(Path(adaptkit.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    settings = {
        "SWEEP_GATE": str(tmp_path / "gate"),
        "ADAPTKIT_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(plugin))
    list(methods)  # other packages' methods are read now, so that ours come on top
    for name in NAMES:
        monkeypatch.setitem(methods._entries, name, Entry(name, "misbehaving", "plugin"))
        monkeypatch.setitem(methods._objects, name, None)
        del methods._objects[name]
    monkeypatch.delitem(sys.modules, "misbehaving", raising=False)
    monkeypatch.chdir(tmp_path)
    return Bench(tmp_path, tmp_path / "gate", os.environ | settings)
