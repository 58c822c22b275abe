"""The rollout benchmark on the embedded model, smallest sizes: both ways give the same numbers."""

from __future__ import annotations

import json

from click.testing import CliRunner

from benchmarks.rollouts.__main__ import main


def test_both_ways_give_the_same_numbers(tmp_path):
    words = ["--images", "2", "--answers", "3", "--tokens", "3", "--repeats", "1", "--out", str(tmp_path / "out.json")]
    outcome = CliRunner().invoke(main, words)
    assert outcome.exit_code == 0, outcome.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["same_answers"] == 1
    assert found["gradient_difference"] < 1e-4
    assert found["prompt_tokens"] > 20
    assert all(found[what][side] > 0 for what in ("drawing", "gradient") for side in ("shared", "plain", "ratio"))
