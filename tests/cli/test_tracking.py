"""`--log` of `run` and `compare`: where it goes, and that no run depends on it."""

from __future__ import annotations

import json
from importlib import util

import pytest

from adaptkit.evaluation import tracking
from adaptkit.evaluation.results import read_run
from tests.trackers import Recorder, put_recorder

FEW = ["--shots", 2, "--set", "training.epochs=2", "--set", "training.views=0"]


@pytest.mark.skipif(not (util.find_spec("accelerate") and util.find_spec("tensorboard")), reason="not installed")
def test_tensorboard_beside_the_run(call, photos, tmp_path):
    outcome = call("run", photos, "--method", "coop", *FEW, "--out", tmp_path / "all" / "one", "--log", "tensorboard")
    assert outcome.exit_code == 0, outcome.output
    logs = tmp_path / "all" / "logs" / "tensorboard"
    assert f"tensorboard --logdir {logs}" in outcome.stderr
    assert len(list(logs.glob("coop-photos-few-shot-2shots-seed1-*/events.out.tfevents.*"))) == 1
    assert {path.name for path in (tmp_path / "all" / "one").iterdir()} == {
        "adapter",
        "predictions.safetensors",
        "result.json",
    }


def test_compare_logs_what_it_runs(call, photos, tmp_path, monkeypatch):
    recorder = put_recorder(monkeypatch, Recorder())
    words = ["compare", photos, "--shots", 2, "--out", tmp_path / "out", "--log", "tensorboard"]
    assert call(*words, "--methods", "zero-shot,gda").exit_code == 0
    assert recorder.calls == ["start", "config", "log", "finish"] * 2
    assert call(*words, "--methods", "zero-shot,gda,tip-adapter").exit_code == 0
    assert recorder.calls == ["start", "config", "log", "finish"] * 3  # those that were done aren't logged again
    assert recorder.config["method"] == "tip-adapter"
    assert (tmp_path / "out" / "logs").is_dir()


@pytest.mark.parametrize("fails_at", ["start", "log"])
def test_a_tracker_that_raises_leaves_the_run_alone(call, photos, tmp_path, monkeypatch, fails_at):
    recorder = put_recorder(monkeypatch, Recorder(fails_at))
    words = ["--out", tmp_path / "out", "--log", "tensorboard", "--log-dir", tmp_path / "logs", "--json"]
    outcome = call("run", photos, "--method", "coop", *FEW, *words)
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.stdout)["key_digest"] == read_run(tmp_path / "out").key_digest
    said = "note: tensorboard failed and logs no more, the run isn't touched: RuntimeError: no network"
    assert outcome.stderr.count(said) == 1
    assert recorder.calls[-1] == fails_at


def test_a_run_that_fails_ends_its_tracker(call, photos, tmp_path, monkeypatch):
    recorder = put_recorder(monkeypatch, Recorder())
    words = ["--set", "training.lr=1e30", "--set", "training.schedule=constant", "--set", "training.warmup_epochs=0"]
    words += ["--set", "training.epochs=9", "--shots", 4, "--out", tmp_path / "out", "--log", "tensorboard"]
    outcome = call("run", photos, "--method", "coop", *words)
    assert outcome.exit_code == 1, outcome.output
    assert recorder.calls[-1] == "finish"


def test_what_is_missing_is_said_before_any_work(refused, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "_installed", lambda package: package == "accelerate")
    for verb in (["run", photos, "--method", "coop"], ["compare", photos]):
        said = refused(*verb, "--out", tmp_path / "out", "--log", "wandb", "--log", "mlflow")
        assert "pip install 'adaptkit[wandb,mlflow]'" in said
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_refused(refused, photos, tmp_path, monkeypatch):
    put_recorder(monkeypatch, Recorder())
    (tmp_path / "file").write_text("", encoding="utf-8")
    words = ["run", photos, "--method", "coop", "--out", tmp_path / "out", "--log", "tensorboard"]
    assert "Choose another --log-dir" in refused(*words, "--log-dir", tmp_path / "file" / "logs")
    assert "'tensorbord' is not one of" in refused(*words[:-1], "tensorbord")
