"""One shelf of small adapters for all tests of the room."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")

from starlette.testclient import TestClient

from adaptkit.serving.app import create_app
from adaptkit.serving.limits import Limits
from adaptkit.serving.shelf import Shelf
from tests.serving.made import save_adapters

LIMITS = Limits(body_bytes=2**20, pixels=1_000_000, images=4, seconds=20)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return save_adapters(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def shelf(folders):
    return Shelf(folders)


@pytest.fixture(scope="session")
def client(shelf):
    with TestClient(create_app(shelf, LIMITS), raise_server_exceptions=False) as asked:
        yield asked
