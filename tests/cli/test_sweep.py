"""`adaptkit sweep`: plan, run, status and retry as a user sees them. The workers are real; see tests/sweeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SUITE = """
methods: [zero-shot, {name: clip-adapter, set: [training.epochs=3, training.warmup_epochs=0, training.lr=RATE]}]
datasets: [photos]
shots: [1]
seeds: [1]
"""


@pytest.fixture
def suite(photos, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "mine.yaml").write_text(SUITE.replace("RATE", "1e-3"))
    return tmp_path / "mine.yaml"


def test_a_sweep_from_plan_to_done(call, suite):
    planned = call("sweep", "plan", suite)
    assert planned.exit_code == 0, planned.output
    assert "mine: 2 runs, few-shot, mini, shots 1, seeds 1" in " ".join(planned.output.split())
    assert "The 2 missing runs take about" in planned.output
    assert "rough model" in planned.output
    assert not Path("sweeps").exists()  # a plan writes nothing
    done = call("sweep", "run", suite, "--jobs", 1, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["done"], found["failed"], found["left"], found["out"]) == (2, [], 0, "sweeps/mine")
    again = call("sweep", "run", suite)
    assert again.exit_code == 0
    assert "2 runs: 0 done now, 2 before" in again.output
    planned = call("sweep", "plan", suite, "--json")
    runs = json.loads(planned.stdout)["runs"]
    assert [run["state"] for run in runs] == ["done", "done"]
    assert all((Path("sweeps/mine") / run["folder"] / "result.json").is_file() for run in runs)
    assert "Everything is done." in call("sweep", "plan", suite).output


def test_a_failed_run_is_exit_code_1_and_is_listed_with_its_reason(call, suite):
    suite.write_text(SUITE.replace("RATE", "1e38"))
    done = call("sweep", "run", suite, "--jobs", 1)
    assert done.exit_code == 1, done.output
    assert "2 runs: 1 done now, 0 before, 1 failed" in done.output
    assert "failed: clip-adapter on photos, few-shot, 1 shots, seed 1: " in done.output
    assert "Traceback" not in done.output
    status = call("sweep", "status", suite, "--json")
    assert status.exit_code == 0
    found = json.loads(status.stdout)
    assert (found["done"], found["failed"], found["missing"], found["running"]) == (1, 1, 0, 0)
    assert found["failures"][0]["reason"]
    shown = call("sweep", "status", suite)
    assert "sweep retry mine" in shown.output
    narrowed = call("sweep", "status", suite, "--methods", "zero-shot", "--json")
    assert json.loads(narrowed.stdout)["runs"] == 1


def test_bad_input_is_all_said_before_any_work(refused, suite):
    suite.write_text(
        "methods: [coopp, {name: coop, set: [training.epoch=3]}]\ndatasets: [photos, digitts]\nshots: [0, 400]\n"
    )
    message = refused("sweep", "run", suite)
    assert "coopp" in message
    assert "shots holds 0" in message
    suite.write_text("methods: [{name: coop, set: [training.epoch=3]}]\ndatasets: [photos, digitts]\nshots: [400]\n")
    message = refused("sweep", "run", suite)
    for part in ("training.epoch", "digitts", "400"):
        assert part in message
    assert not Path("sweeps").exists()
    assert "no suite file" in refused("sweep", "plan", "nothing.yaml")
    assert "embedded" in refused("sweep", "plan", "embeded")
    suite.write_text(SUITE.replace("RATE", "1e-3"))
    assert "'zero-shot'" in refused("sweep", "run", suite, "--methods", "zero-shott")
    Path("file").write_text("")
    assert "is a file" in refused("sweep", "run", suite, "--out", "file/below")
