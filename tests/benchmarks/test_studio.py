"""The benchmark of the studio runs, on sizes whose seconds mean nothing."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

pytest.importorskip("fastapi")

from benchmarks.studio.__main__ import main


def test_it_runs(tmp_path):
    words = ["--classes", "3", "--shots", "2", "--repeats", "2", "--methods", "tip-adapter,zero-shot"]
    outcome = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "result.json")])
    assert outcome.exit_code in (0, 1), outcome.output
    written = json.loads((tmp_path / "result.json").read_text())
    assert list(written["methods"]) == ["tip-adapter", "zero-shot"]
    assert all(len(facts["seconds"]) == 2 for facts in written["methods"].values())
    assert "tip-adapter" in outcome.output
