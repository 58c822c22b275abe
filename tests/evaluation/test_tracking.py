"""Trackers: what reaches them, and that nothing they do reaches the run."""

from __future__ import annotations

import functools
import sqlite3
import threading
import time
from importlib import util
from pathlib import Path

import pytest

from adaptkit.backbones import load_backbone
from adaptkit.data.features import FeatureStore
from adaptkit.data.sources import load_dataset
from adaptkit.errors import ConfigError
from adaptkit.evaluation import tracking
from adaptkit.evaluation.protocols import plan_run, run_method
from adaptkit.evaluation.tasks import make_task
from adaptkit.evaluation.tracking import TRACKERS, Trackers, check_trackers, config_of, numbers_of
from tests.trackers import Recorder, put_recorder

EPOCHS = 3


def needs(name: str) -> pytest.MarkDecorator:
    here = util.find_spec("accelerate") is not None and util.find_spec(name) is not None
    return pytest.mark.skipif(not here, reason=f"accelerate or {name} isn't installed")


@pytest.fixture
def recorded(monkeypatch):
    return functools.partial(put_recorder, monkeypatch)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    mini = load_backbone("mini")
    task = make_task(load_dataset("digits"), protocol="base-to-novel", shots=2, seed=1)
    words = [f"training.epochs={EPOCHS}", "training.views=0"]
    return plan_run("coop", mini, task, overrides=words), mini, FeatureStore(tmp_path_factory.mktemp("store"))


def follow(trackers: Trackers, planned, seconds: float = 30.0):
    plan, backbone, store = planned
    trackers.begin(plan)
    outcome = run_method(plan, backbone, store=store, on_epoch=trackers.epoch)
    trackers.end(outcome.result)
    assert trackers.close(seconds) == ()
    return outcome.result


def test_what_is_logged(recorded, planned, tmp_path):
    recorder = recorded(Recorder())
    result = follow(Trackers(["tensorboard", "tensorboard"], tmp_path), planned)
    plan = planned[0]
    assert recorder.calls == ["start", "config", *["log"] * (EPOCHS + 1), "finish"]
    assert recorder.config == config_of(plan)
    assert recorder.config["key_digest"] == plan.key.digest
    assert recorder.config["settings.training.epochs"] == EPOCHS
    assert recorder.config["settings.templates"] == '["a photo of the digit {}."]'
    steps = [step for step, _ in recorder.logged]
    assert steps == [1, 2, 3, 3]
    assert [values["train/loss"] for _, values in recorder.logged[:EPOCHS]] == result.fit["losses"]
    assert [values["train/learning_rate"] for _, values in recorder.logged[:EPOCHS]] == result.fit["learning_rates"]
    last = recorder.logged[-1][1]
    assert last == numbers_of(result)
    assert last["test/base/accuracy"] == result.part("base").accuracy
    assert last["test/harmonic_mean"] == result.harmonic_mean
    assert last["trained_parameters"] == result.trained_parameters
    assert last["seconds/fit"] == result.seconds["fit"]
    assert len(recorder.threads) == 1
    assert threading.get_ident() not in recorder.threads


def test_following_changes_no_number(recorded, planned, tmp_path):
    recorded(Recorder())
    followed = follow(Trackers(["tensorboard"], tmp_path), planned)
    plan, backbone, store = planned
    alone = run_method(plan, backbone, store=store).result
    assert (followed.key, followed.parts, followed.fit["losses"]) == (alone.key, alone.parts, alone.fit["losses"])


@pytest.mark.parametrize("fails_at", ["start", "config", "log", "finish"])
@pytest.mark.parametrize("error", [RuntimeError("no network\nat all"), OSError(28, "disk full"), SystemExit(1)])
def test_a_tracker_that_raises_is_one_note(recorded, planned, tmp_path, fails_at, error):
    recorder = recorded(Recorder(fails_at, error))
    other = recorded(Recorder(), "wandb")
    trackers = Trackers(["tensorboard", "wandb"], tmp_path)
    assert follow(trackers, planned).harmonic_mean is not None
    (note,) = trackers.notes
    assert note.startswith(f"tensorboard failed and logs no more, the run isn't touched: {type(error).__name__}: ")
    assert "\n" not in note
    assert recorder.calls[-1] == fails_at  # left alone from then on
    assert len(other.logged) == EPOCHS + 1


def test_a_broken_package_is_a_note(recorded, planned, tmp_path, monkeypatch):
    recorded(Recorder())

    def broken(module):
        raise ImportError("libcudart.so.11 not found")

    monkeypatch.setattr(tracking, "_prepare", broken)
    trackers = Trackers(["tensorboard"], tmp_path)
    follow(trackers, planned)
    assert trackers.notes == (
        "tensorboard failed and logs no more, the run isn't touched: ImportError: libcudart.so.11 not found",
    )


def test_notes_hold_no_passwords(recorded, planned, tmp_path):
    recorded(Recorder("start", RuntimeError("no answer from https://me:hunter2@tracks.example:8080/api")))
    trackers = Trackers(["tensorboard"], tmp_path)
    follow(trackers, planned)
    assert "hunter2" not in trackers.notes[0]
    assert "https://tracks.example:8080/api" in trackers.notes[0]


def test_a_slow_tracker_holds_nothing_up(recorded, planned, tmp_path):
    recorded(Recorder(sleeps=0.5))
    trackers = Trackers(["tensorboard"], tmp_path)
    trackers.begin(planned[0])
    began = time.perf_counter()
    for _ in range(1000):
        trackers.epoch("coop", {"loss": 1.0})
    assert time.perf_counter() - began < 0.4
    assert trackers.close(0.1) == ("tensorboard",)  # 500 seconds of work are left, which nobody waits for


def test_a_run_that_fails_is_closed_before_the_next(recorded, planned, tmp_path):
    recorder = recorded(Recorder())
    trackers = Trackers(["tensorboard"], tmp_path)
    trackers.begin(planned[0])
    trackers.begin(planned[0])
    assert trackers.close(10) == ()
    assert recorder.calls == ["start", "config", "finish", "start", "config", "finish"]
    assert trackers.notes == ()


def test_values_that_are_not_finite_and_methods_fitted_first(recorded, planned, tmp_path):
    recorder = recorded(Recorder())
    trackers = Trackers(["tensorboard"], tmp_path)
    trackers.begin(planned[0])
    trackers.epoch("taskres", {"loss": 2.0, "accuracy": float("nan")})
    trackers.epoch("coop", {"loss": 1.0, "loss/kl <a>": 0.5})
    assert trackers.close(10) == ()
    assert recorder.logged == [(1, {"train/taskres/loss": 2.0}), (2, {"train/loss": 1.0, "train/loss/kl_a_": 0.5})]


def test_missing_packages_are_said_at_once(monkeypatch):
    monkeypatch.setattr(tracking, "_installed", lambda package: package in ("accelerate", "wandb"))
    with pytest.raises(ConfigError, match=r"tensorboard and mlflow.*pip install 'adaptkit\[tensorboard,mlflow\]'"):
        check_trackers(TRACKERS)
    check_trackers(["wandb"])
    monkeypatch.setattr(tracking, "_installed", lambda package: package != "accelerate")
    with pytest.raises(ConfigError, match=r"adaptkit\[wandb\]"):
        check_trackers(["wandb"])
    check_trackers([])


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb_of_old_runs").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not tracking._installed("wandb_of_old_runs")
    assert not tracking._installed("no_such_package_at_all")
    assert tracking._installed("json")


@needs("tensorboard")
def test_tensorboard(planned, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = Trackers(["tensorboard"], tmp_path)
    result = follow(trackers, planned)
    assert trackers.notes == ()
    assert trackers.hints == (f"tensorboard --logdir {tmp_path / 'tensorboard'}",)
    (folder,) = (tmp_path / "tensorboard").iterdir()
    assert folder.name.startswith("coop-digits-base-to-novel-2shots-seed1-")
    events = EventAccumulator(str(folder)).Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [1, 2, 3]
    assert [event.value for event in losses] == pytest.approx(result.fit["losses"], rel=1e-6)
    (novel,) = events.Scalars("test/novel/accuracy")
    assert novel.value == pytest.approx(result.part("novel").accuracy, rel=1e-6)
    (written,) = folder.glob("*/hparams.yml")
    assert f"key_digest: {result.key_digest}" in written.read_text(encoding="utf-8")


@needs("wandb")
def test_wandb_offline(planned, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trackers = Trackers(["wandb"], tmp_path)
    result = follow(trackers, planned, 60)
    assert trackers.notes == ()
    (stored,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    wanted = ("train/loss", "test/novel/accuracy", result.key_digest)
    end = time.monotonic() + 60  # a service of wandb's own writes the file, and may be behind on a busy machine
    while time.monotonic() < end and not all(text.encode() in stored.read_bytes() for text in wanted):
        time.sleep(0.1)
    content = stored.read_bytes()
    for text in wanted:
        assert text.encode() in content, text


@pytest.mark.slow
@needs("mlflow")
def test_mlflow_in_a_file(planned, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    trackers = Trackers(["mlflow"], tmp_path)
    result = follow(trackers, planned, 60)
    assert trackers.notes == ()
    store = sqlite3.connect(Path(tmp_path, "mlflow.db"))
    (run,) = store.execute("select name, status from runs").fetchall()
    assert run[0].startswith("coop-digits-base-to-novel-2shots-seed1-")
    assert run[1] == "FINISHED"
    losses = store.execute("select value from metrics where key = 'train/loss' order by step").fetchall()
    assert [value for (value,) in losses] == pytest.approx(result.fit["losses"])
    assert store.execute("select value from params where key = 'key_digest'").fetchall() == [(result.key_digest,)]
    store.close()


@needs("mlflow")
def test_mlflow_whose_server_is_not_there(planned, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    trackers = Trackers(["mlflow"], tmp_path)
    follow(trackers, planned, 60)
    (note,) = trackers.notes
    assert note.startswith("mlflow failed and logs no more, the run isn't touched: ")
    assert not Path(tmp_path, "mlflow.db").exists()
