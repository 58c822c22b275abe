"""Learning by rewards from the command line: what the record says, adapters, bad input."""

from __future__ import annotations

import json

import pytest

import adaptkit
from adaptkit.evaluation.results import read_run
from tests.backbones import tiny_mllm as tiny

SHORT = ["--set", "tags=false", "--set", "max_tokens=3", "--set", "training.epochs=1"]


@pytest.fixture
def backbone():
    return f"transformers:{tiny.save('llava')}"


@pytest.mark.filterwarnings("ignore:dive-k got no answer")
def test_a_run_and_its_adapter(call, photos, tmp_path, backbone):
    out, picture = tmp_path / "out", photos / "oak" / "0.png"
    words = ["run", photos, "--method", "dive-k", "--backbone", backbone, "--shots", 2, "--protocol", "base-to-novel"]
    outcome = call(*words, *SHORT, "--set", "samples=3", "--out", out)
    assert outcome.exit_code == 0, outcome.output
    result = read_run(out)
    assert result.recipe == "dive-k/base-to-novel"
    assert result.fit["options_from"] == "samples, with the list of training classes"
    assert sum(result.fit["options_by_source"].values()) + result.fit["images_too_easy"] == 4
    assert len(result.fit["equal_groups"]) == len(result.fit["losses"]) == 1
    assert [(part.name, part.num_classes) for part in result.parts] == [("base", 2), ("novel", 2)]
    for part in result.parts:
        answers = part.metrics["answers"]
        ways = [answers[f"accuracy_{way}"] for way in ("first_sample", "majority_vote", "pass_at_3", "two_step")]
        assert part.correct == ways[3] * part.total
        assert max(ways) == ways[2]
        assert answers["samples_per_image"] == 3
    assert (out / "adapter" / "peft").is_dir()
    outcome = call("predict", out, picture, "--json")
    assert outcome.exit_code == 0, outcome.output
    assert adaptkit.load(out / "adapter").predict_one(picture) in json.dumps(json.loads(outcome.stdout))


def test_virft_answers_as_it_was_trained(call, photos, tmp_path, backbone):
    out = tmp_path / "out"
    words = ["run", photos, "--method", "virft", "--backbone", backbone, "--shots", 2, "--out", out]
    outcome = call(*words, *SHORT)
    assert outcome.exit_code == 0, outcome.output
    result = read_run(out)
    assert result.fit["route"] == "open"
    assert result.fit["reward_accuracy"] == [0.0]
    assert result.fit["equal_groups"] == [1.0]
    assert result.part("all").metrics["answers"]["share_none"] == 1


def test_bad_input(refused, photos, backbone):
    def run(method, *more):
        words = ["run", photos, "--backbone", backbone, "--shots", 2, "--protocol", "base-to-novel", "--method", method]
        return " ".join(refused(*words, *more).split())

    assert "(max_tokens)" in run("dive-k", "--set", "class_list=never")  # 1,024 tokens of thoughts don't fit
    assert "mined_from" in run("dive-k", *SHORT, "--set", "mined_from=sample")
    assert "rollouts is 1" in run("virft", *SHORT, "--set", "rollouts=1")
    leak = ["--set", "prompt=Is it a yew or what {noun} is it?"]
    for method in ("dive-k", "virft"):
        assert "name novel classes ('yew')" in run(method, *SHORT, *leak)
