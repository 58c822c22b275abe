"""A small run of Python that refuses what an exported folder must not need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REFUSED = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused!r}:
            raise ModuleNotFoundError(f"refused: {{name}}")
sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture
def run_alone():
    """Run Python in a folder, in a process where the named packages can't be imported; returns what it prints."""

    def run(code: str, folder: Path, refused: tuple[str, ...]) -> str:
        code = REFUSED.format(refused=refused) + code
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
