"""The benchmark of shared examples on the embedded model, smallest sizes: both ways give the same logits."""

from __future__ import annotations

import json

from click.testing import CliRunner

from benchmarks.examples.__main__ import main


def test_both_ways_give_the_same_logits(tmp_path):
    words = ["--images", "3", "--examples", "2,4", "--repeats", "1", "--out", str(tmp_path / "out.json")]
    outcome = CliRunner().invoke(main, words)
    assert outcome.exit_code == 0, outcome.output
    found = json.loads((tmp_path / "out.json").read_text())["examples"]
    assert list(found) == ["2", "4"]
    assert all(own["difference"] < 1e-5 and own["ratio"] > 0 for own in found.values())
