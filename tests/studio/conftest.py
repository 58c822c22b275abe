"""Small projects with coloured pictures, and a studio without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adaptkit.backbones.load import load_backbone
from adaptkit.studio.engine import Engine
from adaptkit.studio.project import Project

COLOURS = {"red": (210, 40, 40), "green": (40, 170, 60), "blue": (40, 60, 210)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTKIT_CACHE", str(tmp_path / "cache"))


def png(colour: str, seed: int) -> bytes:
    """A noisy picture of one colour, as a file."""
    numbers = np.random.default_rng([seed, *COLOURS[colour]])
    noisy = np.clip(np.array(COLOURS[colour]) + numbers.integers(-40, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(noisy).save(file, "PNG")
    return file.getvalue()


def write_folder(root: Path, per_class: int = 3, *, classes: bool = True) -> Path:
    """A folder of such pictures, in class folders or loose."""
    for colour in COLOURS:
        for seed in range(per_class):
            path = root / colour / f"{seed}.png" if classes else root / f"{colour}-{seed}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(colour, seed))
    return root


@pytest.fixture(scope="session")
def mini():
    return load_backbone("mini")


@pytest.fixture
def project(tmp_path) -> Iterator[Project]:
    opened = Project(tmp_path / "project")
    yield opened
    opened.close()


@pytest.fixture
def fill(project) -> Callable[..., list[str]]:
    """Add pictures of a colour to the project, labelled with a class or not; returns their ids."""
    from adaptkit.studio.pictures import take_in

    def add(colour: str, count: int, label: str | None = None, first: int = 0) -> list[str]:
        files = [png(colour, first + n) for n in range(count)]
        taken = dict(take_in(project.folder, file, f"{colour}-{first + n}.png", label) for n, file in enumerate(files))
        return project.add_pictures(taken)

    return add


@pytest.fixture
def engine(project, mini) -> Engine:
    return Engine(project, mini)
