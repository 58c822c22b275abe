"""The benchmark of many adapters runs, on sizes whose ratio means nothing."""

from __future__ import annotations

import json

from click.testing import CliRunner

from benchmarks.adapter_set.__main__ import KINDS, main


def test_it_runs(tmp_path):
    words = ["--backbone", "mini", "--adapters", "4", "--classes", "3", "--batch", "2", "--repeats", "1"]
    outcome = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "result.json")])
    assert outcome.exit_code in (0, 1), outcome.output
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["adapters"] == len(written["kinds"]) == len(KINDS) == 4
    assert written["ratio"] > 0
    assert "4 adapters on 2 images" in outcome.output
