"""The embedded multimodal language model from the command line."""

from __future__ import annotations

import json

import pytest


def test_a_run_from_the_command_line(call, photos, tmp_path):
    words = ["run", photos, "--method", "mllm-zero-shot", "--backbone", "mini-mllm", "--shots", 2]
    outcome = call(*words, "--set", "route=letters", "--set", "shifts=1", "--out", tmp_path / "out", "--json")
    assert outcome.exit_code == 0, outcome.output
    assert "mini-mllm" in json.dumps(json.loads(outcome.stdout))


def test_it_is_listed(call):
    assert "mini-mllm" in call("list", "backbones").output


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute on a core of its own
def test_lora_pays_out_of_the_box(call, tmp_path):
    base = {}
    for method in ("mllm-zero-shot", "mllm-lora"):
        words = ["run", "--backbone", "mini-mllm", "--method", method, "--dataset", "shapes"]
        outcome = call(*words, "--protocol", "base-to-novel", "--out", tmp_path / method, "--json")
        assert outcome.exit_code == 0, outcome.output
        result = json.loads(outcome.stdout)
        assert result["recipe"] == f"{method}/base-to-novel-quick"
        base[method] = result["parts"][0]["correct"] / result["parts"][0]["total"]
    assert base["mllm-lora"] > base["mllm-zero-shot"] + 0.05
