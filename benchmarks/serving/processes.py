"""`adaptkit serve` in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def served(*words: object, **environment: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A server on a free port, and what it says of itself; killed at the end if it still runs."""
    start = "from adaptkit.commands.main import main; main()"
    command = [sys.executable, "-c", start, "serve", *map(str, words), "--port", "0", "--json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if line == "}\n":
                break
        if not said:
            assert process.stderr is not None
            raise AssertionError(process.stderr.read())
        yield process, json.loads(said)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
