"""The embedded multimodal language model from the command line."""

from __future__ import annotations

import json


def test_a_run_from_the_command_line(call, photos, tmp_path):
    words = ["run", photos, "--method", "mllm-zero-shot", "--backbone", "mini-mllm", "--shots", 2]
    outcome = call(*words, "--set", "route=letters", "--set", "shifts=1", "--out", tmp_path / "out", "--json")
    assert outcome.exit_code == 0, outcome.output
    assert "mini-mllm" in json.dumps(json.loads(outcome.stdout))


def test_it_is_listed(call):
    assert "mini-mllm" in call("list", "backbones").output
