"""The benchmark of the server runs, on sizes whose ratio means nothing; no request is lost in it."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

pytest.importorskip("fastapi")

from benchmarks.serving.__main__ import main


def test_it_runs(tmp_path):
    words = [
        "--backbone",
        "mini",
        "--batch",
        "4",
        "--images",
        "40",
        "--rounds",
        "1",
        "--requests",
        "300",
        "--clients",
        "8",
    ]
    outcome = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "result.json")])
    assert outcome.exit_code in (0, 1), outcome.output
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["endurance"]["statuses"] == {"200": 300}
    assert written["endurance"]["memory_growth"] < 0.2
    assert written["throughput"]["statuses"] == {"200": 40}
    assert written["throughput"]["ratio"] > 0
    assert "300 requests" in outcome.output
